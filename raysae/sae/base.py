"""What all sparse autoencoders share: parameters, initialisation, folding, and the steps around an optimiser's.

Training works in normalised units: activations are divided by `scale`, measured once so that the mean of ‖x / scale‖² is the activation's
width d (the tied architecture takes raw activations, scale 1). `folded()` gives the same autoencoder for raw activations; evaluation,
analysis and files know only folded ones.

One training step is

    terms = sae.loss_and_grads(x / sae.scale, step)      # sets .grad of every parameter, in buffers kept between steps
    sae.after_grads()                                    # removes what would change the norm of decoder rows
    ... clip the gradients, optimizer.step() ...
    sae.after_step()                                     # decoder rows back to norm 1, thresholds brought up to date
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raysae.config import SAEConfig, TrainConfig
from raysae.kernels.buffers import Workspace, chunk_rows
from raysae.kernels.products import decode_rows
from raysae.kernels.rows import geometric_median, normalise_rows_, remove_parallel_, unit_rows


class Codes(NamedTuple):
    """Sparse codes: the active latents of each row, in no particular order. A place that holds no active latent has the value 0."""

    values: Tensor  # (b, k), at least 0
    indices: Tensor  # (b, k) int64


def centre_of(rows: Tensor, train: TrainConfig) -> Tensor:
    """Mean or geometric median (train.decoder_bias) of raw activations `rows` (r, d): (d,)."""
    return rows.mean(0) if train.decoder_bias == "mean" else geometric_median(rows)


@dataclass(frozen=True)
class StepInfo:
    """What a training step depends on beside the batch."""

    sparsity_factor: float = 1.0  # warm-up of the penalty's coefficient, 0 … 1
    dead: Tensor | None = None  # (n,) bool: the latents that count as dead, for AuxK


class SAE(nn.Module):
    """A sparse autoencoder of width `n` on activations of width `d`: x̂ = W_decᵀ c + b_dec with c = activation(W_enc (x − b_dec) + b_enc).

    Weights are latent-major, W_enc and W_dec are (n, d). Every architecture but the tied one keeps decoder rows at norm 1 and starts with
    W_enc = W_dec, rows of random directions. A subclass gives the activation (`encode`) and the loss with its gradients.
    One instance may encode and decode in several threads at once, each with buffers of its own, and train in one.

    On a GPU `precision`, bfloat16, may be set: what operands of training's products are rounded to (see `kernels.product`), and
    TopK's pre-activations before their bias is added. Parameters, other sums, losses and gradients are float32 all the same;
    everything is where None stands, and in `encode`.
    """

    precision: torch.dtype | None = None

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__()
        self.config, self.train_config, self.d, self.n = config, train, d, config.width
        self._make_weights(torch.Generator().manual_seed(config.seed))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("_fired", torch.zeros(self.n, dtype=torch.bool), persistent=False)
        self._workspace = Workspace()

    def _make_weights(self, generator: torch.Generator) -> None:
        directions = unit_rows(torch.randn(self.n, self.d, generator=generator))
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(self.n))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(self.d))

    @torch.no_grad()
    def initialise(self, rows: Tensor, centre: Tensor | None = None) -> None:
        """Measures `scale` and sets b_dec to the `centre_of` these `rows` (r, d), raw activations; `centre` (d,), where it is known already."""
        rows = rows.to(self.b_dec)
        self.scale.copy_(rows.double().square().mean().sqrt())
        self.b_dec.copy_((centre_of(rows, self.train_config) if centre is None else centre) / self.scale)

    def encoder(self) -> Tensor:
        """The encoder's rows as they are used, (n, d)."""
        return self.W_enc

    def decoder(self) -> Tensor:
        """The decoder's rows as they are used, the dictionary's features, (n, d) of norm 1."""
        return self.W_dec

    def encode(self, x: Tensor) -> Codes | Tensor:
        """Codes of `x` (b, d): `Codes` for topk, else a dense (b, n) tensor."""
        raise NotImplementedError

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """x̂ (b, d) of sparse or dense codes."""
        if isinstance(codes, Codes):
            return decode_rows(codes.indices, codes.values, self.decoder()) + self.b_dec
        return torch.addmm(self.b_dec, codes, self.decoder())

    def forward(self, x: Tensor) -> Tensor:
        """x̂ (b, d), rows taken in chunks so that memory is bounded at any width."""
        return torch.cat([self.decode(self.encode(rows)) for rows in x.split(self.rows_at_once())])

    @property
    def code_width(self) -> int:
        """How many numbers the codes of one row are, as `encode` gives them."""
        return self.n

    def rows_at_once(self) -> int:
        """Rows whose codes fit into bounded memory."""
        return chunk_rows(max(self.code_width, self.d), self.W_enc.element_size(), self.W_enc.device.type)

    def pre_activations(self, x: Tensor) -> Tensor:
        """W_enc (x − b_dec) + b_enc, latent-major (n, b) as in `kernels.pre_activation_chunks`."""
        return torch.addmm(self.b_enc.unsqueeze(1), self.encoder(), (x - self.b_dec).T)

    def loss_and_grads(self, x: Tensor, step: StepInfo) -> dict[str, Tensor]:
        """Loss terms of a batch `x` (b, d) in normalised units, as scalars; overwrites .grad of every parameter and what `fired` tells.

        `loss` is what is minimised; `squared_error` is the mean over rows of ‖x − x̂‖² (a sum over d); `l0` the mean number of active
        latents per row; further terms are the architecture's own.
        """
        raise NotImplementedError

    @torch.no_grad()
    def after_grads(self) -> None:
        """Removes the part of W_dec's gradient parallel to each decoder row."""
        remove_parallel_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def after_step(self) -> None:
        """Brings decoder rows back to norm 1."""
        normalise_rows_(self.W_dec)

    def fired(self) -> Tensor:
        """(n,) bool: the latents active in the batch last given to `loss_and_grads`."""
        return self._fired

    @torch.no_grad()
    def folded(self) -> SAE:
        """The same autoencoder for raw activations, a copy for inference: folded(x) = scale · self(x / scale), its codes are self's times scale.

        Every activation function here commutes with a positive factor, so biases and thresholds take the factor and weights stay as they are.
        """
        folded = copy.deepcopy(self).requires_grad_(False)
        for tensor in folded._in_activation_units():
            tensor.mul_(self.scale)
        folded.scale.fill_(1)
        return folded

    def _in_activation_units(self) -> list[Tensor]:
        return [self.b_enc, self.b_dec]

    def _take_grads(self) -> None:
        """Every parameter gets a .grad to write into, where an earlier step left none."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def share_buffers(saes: Iterable[SAE]) -> None:
    """Lets SAEs that are used in turns have the same buffers: as many as the largest needs, not the sum."""
    workspace = Workspace()
    for sae in saes:
        sae._workspace = workspace
