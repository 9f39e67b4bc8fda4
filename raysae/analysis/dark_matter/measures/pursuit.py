"""Gradient pursuit with a frozen decoder, and the encoder error that it reveals.

This is analysis 7 of the dark-matter spec (Engels et al. 2024). Pursuit replaces the encoder at inference time, each
token at its own L0. D (n, d) is the dictionary of features, with rows of norm 1. Each token x − b_dec starts at weights
w = 0 and takes L0(token) steps. With the residual r = x − b_dec − wD, one step is

    support = {w ≠ 0} ∪ {argmax of D·r},  g = D·r on the support and 0 elsewhere,
    w ← max(0, w + step · g)  with  step = ⟨gD, r⟩ / ⟨gD, gD⟩, and 0 where the denominator is 0.

⟨gD, r⟩ is ‖g‖². At most one latent enters per step, so a token's weights take one slot per step. They are (b, L0),
never (b, n). A clipped latent leaves a slot of weight 0 behind.

The argmax over all n latents costs most of the time. Two ways find it:

- D·r = D·x − wG, with the Gram matrix G = DDᵀ. It needs few rows of G while w has few slots. On a CPU it is then
  several times faster than the product with D. G is cut into blocks of columns that fit into the cache. Only the
  largest score of each block is kept. g and ‖gD‖² follow from G between the slots.
- D·r as a dense product: with many slots, where G would be large, and on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
import torch
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Chunk, reconstruct
from raysae.analysis.instruments.intervals import REPLICATES, GroupSums, with_intervals
from raysae.analysis.instruments.regression import Linear, Moments
from raysae.kernels.buffers import chunk_rows
from raysae.kernels.products import decode_rows
from raysae.kernels.rows import unit_rows
from raysae.kernels.selection import top_k
from raysae.sae.base import SAE, Codes

GRAM_BYTES = 512 << 20  # Largest Gram matrix. Beyond it D·r is a dense product
GRAM_COLUMNS = 128  # Columns in a block of the Gram matrix
# On a CPU, reading one row of G costs about as much as this many columns of the dense product.
DIMENSIONS_PER_SLOT = 8
MOST_GRAM_STEPS = 128  # Limit on slots, because each token's G between its slots is kept too
SCORE_BYTES = 64 << 20  # Scores of the tokens that run together, and G between their slots


@torch.no_grad()
def pursuit(
    activations: Activations,
    hook_point: str,
    saes: Mapping[str, SAE],
    replicates: int = REPLICATES,
    seed: int = 0,
    rows: int | None = None,
) -> pd.DataFrame:
    """Runs analysis 7 for the folded `saes` (by name) of one hook point.

    Probes are fitted on A, and everything is measured on C. `rows` limits both to about that many rows. Unset: all.

    Returns:
        A row per SAE. Columns other than `sae` and `width` come with the ends of their intervals over groups of
        documents (`…_low`, `…_high`).
        `sae`, `width`: name and number of latents.
        `fvu`, `nonlinear_fvu`: FVU(x, Sae(x)) and FVU(x, Sae(x) + ê).
        `fvu_pursuit`, `nonlinear_fvu_pursuit`: the same with the pursued reconstruction in place of Sae(x). ê is then
            fitted to its own error.
        `encoder_error`: nonlinear_fvu − nonlinear_fvu_pursuit.
        `encoder_share`: encoder_error/nonlinear_fvu.
        `l0`, `l0_pursuit`: mean active latents, of the encoder and of what as many steps of pursuit leave.
    """
    pursuits = {name: Pursuit(sae.decoder()) for name, sae in saes.items()}
    moments = Moments()
    for chunk in first_chunks(activations.chunks("A"), rows):
        x = chunk.x[hook_point]
        targets = {}
        for name, sae in saes.items():
            for when, (reconstruction, _) in before_and_after(sae, pursuits[name], x).items():
                targets[f"{name}/{when}"] = x - reconstruction
        moments.add(x, targets)
    probes = moments.solve().maps

    sums = {name: GroupSums(replicates, seed) for name in saes}
    for chunk in first_chunks(activations.chunks("C"), rows):
        x = chunk.x[hook_point]
        for name, sae in saes.items():
            sums[name].add(chunk.group, x=x, x_squared=x.double().square())
            for when, (reconstruction, l0) in before_and_after(sae, pursuits[name], x).items():
                add_errors(sums[name], chunk.group, x, reconstruction, probes[f"{name}/{when}"], when)
                sums[name].add(chunk.group, **{f"{when}_l0": l0})
    return pd.DataFrame([{"sae": name, "width": sae.n, **_numbers(sums[name])} for name, sae in saes.items()])


def first_chunks(chunks: Iterator[Chunk], rows: int | None) -> Iterator[Chunk]:
    """Yields whole chunks until they hold `rows` rows. None: yields all."""
    given = 0
    for chunk in chunks:
        if rows is not None and given >= rows:
            return
        given += len(chunk.context)
        yield chunk


def before_and_after(sae: SAE, pursuit: Pursuit, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Reconstructs `x` (b, d) "before" and "after" pursuit.

    Each gives the reconstruction (b, d) and the number of active latents per token (b,).
    """
    reconstruction, l0 = reconstruct(sae, x)
    codes = pursuit(x.to(sae.b_dec) - sae.b_dec, l0.long().to(sae.b_dec.device))
    pursued = (pursuit.decode(codes) + sae.b_dec).to(x)
    return {"before": (reconstruction, l0), "after": (pursued, (codes.values > 0).sum(1).to(x))}


def add_errors(sums: GroupSums, group: Tensor, x: Tensor, reconstruction: Tensor, probe: Linear, name: str) -> None:
    """Adds ‖e‖² and ‖e − ê‖² to `sums` as `NAME_error` and `NAME_nonlinear`.

    Divided by the variance of x they are FVU and nonlinear FVU. Here e = x − `reconstruction`, (b, d) both, and
    ê = `probe`(x).
    """
    e = x.double() - reconstruction
    sums.add(group, **{f"{name}_error": e.square().sum(1), f"{name}_nonlinear": (e - probe(x)).square().sum(1)})


def _numbers(sums: GroupSums) -> dict[str, float]:
    variance = sums.variation("x").sum(1)
    fvu = {
        name: sums[name].squeeze(1) / variance
        for name in ("before_error", "before_nonlinear", "after_error", "after_nonlinear")
    }
    numbers = {
        col.FVU: fvu["before_error"],
        col.NONLINEAR_FVU: fvu["before_nonlinear"],
        col.FVU_PURSUIT: fvu["after_error"],
        col.NONLINEAR_FVU_PURSUIT: fvu["after_nonlinear"],
        col.ENCODER_ERROR: fvu["before_nonlinear"] - fvu["after_nonlinear"],
        col.ENCODER_SHARE: 1 - fvu["after_nonlinear"] / fvu["before_nonlinear"],
        col.L0: sums.mean("before_l0"),
        col.L0_PURSUIT: sums.mean("after_l0"),
    }
    return with_intervals(numbers, sums.groups)


# ---------------------------------------------------------------- the pursuit


class Pursuit:
    """Pursuit with the dictionary `features` (n, d), float32 or float64. Its rows are scaled to norm 1."""

    def __init__(self, features: Tensor) -> None:
        self.features = unit_rows(features.detach())
        (n, d), size = features.shape, features.element_size()
        self._gram = _Gram(self.features) if features.device.type == "cpu" and n * n * size <= GRAM_BYTES else None
        self._gram_steps = min(int(d / DIMENSIONS_PER_SLOT), MOST_GRAM_STEPS) if self._gram is not None else 0
        self._rows = max(1, SCORE_BYTES // (max(n, self._gram_steps**2) * size))

    @torch.no_grad()
    def __call__(self, x: Tensor, steps: Tensor) -> Codes:
        """Pursues the tokens `x` (b, d), b_dec subtracted, for `steps` (b,) steps each.

        Returns weights (b, T) and latents (b, T), with T the largest number of steps. Tokens with similar numbers of
        steps run together, so that none waits for the longest.
        """
        order = torch.argsort(steps, descending=True, stable=True)
        values = x.new_zeros(len(x), int(steps.max()) if len(steps) else 0)
        indices = torch.zeros(values.shape, dtype=torch.int64, device=x.device)
        for rows in order.split(self._rows) if len(order) else ():
            block = self._block(x[rows], steps[rows])
            values[rows, : block.values.shape[1]] = block.values
            indices[rows, : block.indices.shape[1]] = block.indices
        return Codes(values, indices)

    def decode(self, codes: Codes) -> Tensor:
        """wD (b, d), the reconstruction of the codes without b_dec."""
        return _sum_of_rows(self.features, codes.indices, codes.values)

    def _block(self, x: Tensor, steps: Tensor) -> Codes:
        """Pursues the tokens `x` (r, d) together. `steps` (r,) is in descending order."""
        values = x.new_zeros(len(x), int(steps[0]))
        indices = torch.zeros(values.shape, dtype=torch.int64, device=x.device)
        # Number of tokens that take step 1, 2, …
        running = torch.bincount(steps, minlength=values.shape[1] + 1).flip(0).cumsum(0).flip(0)[1:].tolist()
        products = (
            _GramProducts(self._gram, x, min(self._gram_steps, len(running)))
            if self._gram_steps
            else _DenseProducts(self.features, x)
        )
        for step, count in enumerate(running):
            if step == self._gram_steps:
                products = _DenseProducts(self.features, x)
            old = Codes(values[:count, :step].contiguous(), indices[:count, :step].contiguous())
            best = products.best(old)
            present = ((old.indices == best.unsqueeze(1)) & (old.values > 0)).any(1)
            indices[:count, step] = best
            support = Codes(values[:count, : step + 1], indices[:count, : step + 1])
            gradient = products.gradient(support)
            gradient[:, :-1].mul_(old.values > 0)
            gradient[:, -1].masked_fill_(present, 0)
            squared = products.squared_length(support.indices, gradient)
            length = torch.where(squared > 0, torch.linalg.vecdot(gradient, gradient) / squared, 0)
            values[:count, : step + 1] = torch.addcmul(support.values, gradient, length.unsqueeze(1)).clamp_min_(0)
        return Codes(values, indices)


class _DenseProducts:
    """What a step needs to know of the tokens `x` (r, d), by products with the features D (n, d)."""

    def __init__(self, features: Tensor, x: Tensor) -> None:
        self._features, self._x = features, x

    def best(self, codes: Codes) -> Tensor:
        """argmax of D·r of the first tokens, (c,). Their weights are `codes` (c, s)."""
        residual = self._x[: len(codes.values)] - _sum_of_rows(self._features, codes.indices, codes.values)
        parts = residual.split(chunk_rows(len(self._features), residual.element_size(), residual.device.type))
        return torch.cat([top_k(self._features @ part.T, 1)[1].squeeze(1) for part in parts])

    def gradient(self, support: Codes) -> Tensor:
        """D·r on the slots of `support` (c, s)."""
        with torch.enable_grad():
            weights = support.values.detach().requires_grad_()
            product = _sum_of_rows(self._features, support.indices, weights)
        return torch.autograd.grad(product, weights, self._x[: len(weights)] - product.detach())[0]

    def squared_length(self, indices: Tensor, gradient: Tensor) -> Tensor:
        """‖gD‖² (c,) of weights `gradient` on the slots `indices`, (c, s) both."""
        direction = _sum_of_rows(self._features, indices, gradient)
        return torch.linalg.vecdot(direction, direction)


class _Gram:
    """G = DDᵀ as blocks of columns, (blocks, n, c). Columns that no argmax finds fill up the last block."""

    def __init__(self, features: Tensor) -> None:
        self.n = len(features)
        blocks = -(-self.n // GRAM_COLUMNS)
        padded = features.new_zeros(blocks * GRAM_COLUMNS, features.shape[1])
        padded[: self.n] = features
        self._columns = padded.unflatten(0, (blocks, GRAM_COLUMNS))
        self.blocks = self._products(features)

    def scores(self, x: Tensor) -> Tensor:
        """D·x of `x` (r, d) in the same blocks, (blocks, r, c)."""
        scores = self._products(x)
        scores[-1, :, self.n - scores.shape[0] * GRAM_COLUMNS + GRAM_COLUMNS :] = -torch.inf
        return scores

    def _products(self, rows: Tensor) -> Tensor:
        products = rows.new_empty(len(self._columns), len(rows), GRAM_COLUMNS)
        for columns, product in zip(self._columns, products, strict=True):
            torch.mm(rows, columns.T, out=product)
        return products


class _GramProducts:
    """The same as `_DenseProducts`, from D·x and the Gram matrix.

    Each call of `best` fills one more slot, at most `slots` in all.
    """

    def __init__(self, gram: _Gram, x: Tensor, slots: int) -> None:
        self._gram = gram
        self._scores = gram.scores(x)
        self._slot_scores = x.new_empty(len(x), slots)  # D·x on the slots
        self._slot_gram = x.new_empty(len(x), slots, slots)  # G between slots
        self._rows = torch.arange(len(x))

    def best(self, codes: Codes) -> Tensor:
        count, slots = codes.values.shape
        largest = [
            _sum_of_rows(block, codes.indices, -codes.values).add_(scores[:count]).amax(1)
            for scores, block in zip(self._scores, self._gram.blocks, strict=True)
        ]
        winner, row = torch.stack(largest).argmax(0), self._rows[:count]  # (c,) each: the best block, and the token
        scores = self._scores[winner, row]  # (c, columns)
        others = codes.indices + (winner * self._gram.n).unsqueeze(1)  # Rows of G in the winning block
        place = _sum_of_rows(self._gram.blocks.flatten(0, 1), others, -codes.values).add_(scores).argmax(1)
        self._slot_scores[:count, slots] = scores[row, place]
        between = self._gram.blocks.flatten()[others * GRAM_COLUMNS + place.unsqueeze(1)]  # (c, s)
        self._slot_gram[:count, slots, :slots] = between
        self._slot_gram[:count, :slots, slots] = between
        self._slot_gram[:count, slots, slots] = 1
        return winner * GRAM_COLUMNS + place

    def gradient(self, support: Codes) -> Tensor:
        return self._slot_scores[: len(support.values), : support.values.shape[1]] - self._times_gram(support.values)

    def squared_length(self, indices: Tensor, gradient: Tensor) -> Tensor:
        return torch.linalg.vecdot(gradient, self._times_gram(gradient))

    def _times_gram(self, weights: Tensor) -> Tensor:
        count, slots = weights.shape
        return torch.linalg.vecdot(self._slot_gram[:count, :slots, :slots], weights.unsqueeze(1))


def _sum_of_rows(matrix: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Σ_j values[:, j] · matrix[indices[:, j]], (r, c), for `indices` and `values` (r, s), s = 0 included."""
    return decode_rows(indices, values, matrix) if indices.shape[1] else matrix.new_zeros(len(indices), matrix.shape[1])
