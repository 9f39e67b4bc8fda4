"""The elements of a chunk of pre-activations that a dense architecture's loss depends on: all of them, or a list where they are few.

An architecture that keeps what lies above a threshold begins with as many active latents as it likes and ends with a few in a hundred. `All` and
`Few` have the same methods, so that its formulas are written once: a *quantity* is a number per element, (n, r) with `All` and (N,) with `Few`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from raysae.kernels.buffers import Workspace
from raysae.kernels.codes import order_of, outer_blocks
from raysae.kernels.products import product

LISTED = 1 / 7  # the share of a chunk's elements from which on a list costs more than all of them
LONGEST = 1 << 18  # elements of a list, some 200 bytes each


def elements_of(where: Tensor, workspace: Workspace, precision: torch.dtype | None = None) -> All | Few:
    """Where `where` (n, r) is true; a list if that is faster: by their number alone, so that the same chunk takes the same way every time. On a GPU,
    where dense products are cheap and a list would have the host wait for its length, all."""
    few = not where.is_cuda and int(where.sum()) <= min(LONGEST, LISTED * where.numel())
    return Few(where) if few else All(workspace, precision)


class All:
    """Every element of an (n, r) chunk."""

    def __init__(self, workspace: Workspace, precision: torch.dtype | None = None):
        self._workspace, self._precision = workspace, precision

    def of(self, matrix: Tensor) -> Tensor:
        """The quantity with the values of `matrix` (n, r)."""
        return matrix

    def spread(self, latents: Tensor) -> Tensor:
        """The quantity with each latent's value of `latents` (n,), or what broadcasts to it."""
        return latents.unsqueeze(1)

    def sum(self, quantity: Tensor) -> Tensor:
        """A quantity's sum for each latent, (n,)."""
        return quantity.sum(1)

    def any(self, quantity: Tensor) -> Tensor:
        """Whether a quantity, of bool, is true at any element of a latent, (n,)."""
        return quantity.any(1)

    def decode(self, codes: Tensor, weight: Tensor) -> Tensor:
        """Codes, a quantity, times the latents' rows of `weight` (n, d): (r, d)."""
        return product(codes.T, weight, self._precision)

    def gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient for the codes last given to `decode`, a quantity, from that for its result, `grad` (r, d)."""
        shape = len(weight), len(grad)
        return product(weight, grad.T, self._precision, out=self._workspace.take("grad_codes", shape, grad))

    def add_outer_(self, out: Tensor, quantity: Tensor, source: Tensor) -> None:
        """Adds Σ over a latent's elements of quantity · source[row], with `source` (r, d), to the latent's row of `out` (n, d)."""
        if self._precision is None:
            out.addmm_(quantity, source)
        else:
            out.add_(product(quantity, source, self._precision))


class Few:
    """A list of elements, sorted by latent."""

    def __init__(self, where: Tensor):
        self._n, r = where.shape
        self._places = where.view(-1).nonzero().squeeze(1)
        self._latents = self._places.div(r, rounding_mode="floor")
        self._present, counts = self._latents.unique_consecutive(return_counts=True)  # at great widths few have an element in a chunk
        self._starts = counts.cumsum(0) - counts
        self._rows = torch.sub(self._places, self._latents, alpha=r)
        self._order, self._row_starts = order_of(self._rows, r)

    def of(self, matrix: Tensor) -> Tensor:
        return matrix.view(-1)[self._places]

    def spread(self, latents: Tensor) -> Tensor:
        return latents[self._latents]

    def sum(self, quantity: Tensor) -> Tensor:
        return quantity.new_zeros(self._n).index_add_(0, self._latents, quantity)

    def any(self, quantity: Tensor) -> Tensor:
        found = quantity.new_zeros(self._n)
        found[self._latents[quantity]] = True
        return found

    def decode(self, codes: Tensor, weight: Tensor) -> Tensor:
        self._leaf = codes[self._order].detach().requires_grad_()
        with torch.enable_grad():
            latents = self._latents[self._order]
            self._product = embedding_bag(latents, weight.detach(), self._row_starts, mode="sum", per_sample_weights=self._leaf)
        return self._product.detach()

    def gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        (by_row,) = torch.autograd.grad(self._product, self._leaf, grad)
        return torch.empty_like(by_row).index_copy_(0, self._order, by_row)

    def add_outer_(self, out: Tensor, quantity: Tensor, source: Tensor) -> None:
        for part, sums in outer_blocks(self._rows, quantity, self._starts, source):
            out.index_add_(0, self._present[part], sums)
