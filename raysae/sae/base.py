"""What all sparse autoencoders share: parameters, initialisation, folding, files, and the steps around an optimiser's.

Training works in normalised units. Activations are divided by `scale`, measured once, so that the mean of ‖x / scale‖²
is the activation's width d. Outliers do not count there, see `Bank.initialise`. The tied architecture takes raw
activations, with a scale of 1. `folded()` gives the same autoencoder for raw activations. Evaluation, analyses and
files know only folded ones.

One training step is

    x = rows / sae.scale
    terms = sae.loss_and_grads(x, x, step)               # sets .grad of every parameter, in buffers kept between steps
    sae.after_grads()                                    # removes what would change the norm of decoder rows
    ... clip the gradients, optimizer.step() ...
    sae.after_step()                                     # decoder rows back to norm 1, thresholds brought up to date

Before an SAE is evaluated or saved, `calibrate` sets what inference needs beside what is trained.

`tests/sae/naive.py` is the readable version of every architecture's step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raysae.config import SAEConfig, TrainConfig
from raysae.kernels.buffers import Workspace, chunk_rows
from raysae.kernels.products import decode_rows
from raysae.kernels.rows import geometric_median, normalise_rows_, remove_parallel_, unit_rows


class Codes(NamedTuple):
    """Sparse codes: the active latents of each row, in no particular order. A place without one has the value 0."""

    values: Tensor  # (b, k), at least 0
    indices: Tensor  # (b, k) int64


def centre_of(rows: Tensor, train: TrainConfig) -> Tensor:
    """Mean or geometric median (train.decoder_bias) of raw activations `rows` (r, d): (d,)."""
    return rows.mean(0) if train.decoder_bias == "mean" else geometric_median(rows)


@dataclass(frozen=True)
class StepInfo:
    """What a training step depends on beside the batch."""

    sparsity_factor: float = 1.0  # Warm-up of the penalty's coefficient, 0 … 1
    dead: Tensor | None = None  # (n,) bool, the latents that count as dead, for AuxK
    progress: float = 0.0  # Share of the run's steps that are done, 0 … 1, for architectures that anneal


class SAE(nn.Module):
    """A sparse autoencoder with n latents: x̂ = W_decᵀ c + b_dec, c = activation(W_enc (x − b_dec) + b_enc).

    Weights are latent-major, W_enc (n, d_in) and W_dec (n, d_out). Every architecture so far reconstructs its input,
    so that both widths are d. Every architecture but the tied one keeps decoder rows at norm 1 and starts with W_enc =
    W_dec, rows of random directions. A subclass gives the activation (`encode`) and the loss with its gradients.

    State that training needs is in buffers, which a checkpoint keeps. `SAVED` names what an SAE's file keeps.

    One instance may encode and decode in several threads at once, each with buffers of its own, and train in one.

    On a GPU `precision` may be bfloat16. Operands of training's products are then rounded to it (see
    `products.product`), and so are TopK's pre-activations before their bias is added. Parameters, other sums, losses
    and gradients stay float32. `encode` always computes in float32.
    """

    precision: torch.dtype | None = None
    SAVED: tuple[str, ...] = ("W_enc", "W_dec", "b_enc", "b_dec")  # SAELens's names of the tensors in a file
    KNOBS: tuple[str, ...] = ()  # Knobs of training that a loaded SAE needs
    CALIBRATION_ROWS = 0  # Rows that `calibrate` takes, at most
    UNCLIPPED: tuple[str, ...] = ()  # Parameters whose gradients are neither clipped nor counted for it
    FACTOR_WITHOUT_DIRECTION = 1.0  # For codes of a latent with a decoder row of zeros, see `unit_decoder_rows_`

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__()
        self.config, self.train_config, self.n = config, train, config.width
        self.d_in = self.d_out = d
        self._make_weights(torch.Generator().manual_seed(config.seed))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("_fired", torch.zeros(self.n, dtype=torch.bool), persistent=False)
        self._workspace = Workspace()

    def _make_weights(self, generator: torch.Generator) -> None:
        directions = unit_rows(torch.randn(self.n, self.d_in, generator=generator))
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(self.n))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    @torch.no_grad()
    def initialise(self, rows: Tensor, centre: Tensor | None = None) -> None:
        """Measures `scale` on raw activations `rows` (r, d) and sets b_dec to their `centre_of`.

        `centre` (d,) is that point where it is known already.
        """
        rows = rows.to(self.b_dec)
        self.scale.copy_(rows.double().square().mean().sqrt())
        self.b_dec.copy_((centre_of(rows, self.train_config) if centre is None else centre) / self.scale)

    # ---------------------------------------------------------------- encoding and decoding

    def encoder(self) -> Tensor:
        """The encoder's rows as they are used, (n, d_in)."""
        return self.W_enc

    def decoder(self) -> Tensor:
        """The decoder's rows as they are used, the dictionary's features, (n, d_out) of norm 1."""
        return self.W_dec

    def encode(self, x: Tensor) -> Codes | Tensor:
        """Codes of `x` (b, d_in): `Codes` for topk, else a dense (b, n) tensor."""
        raise NotImplementedError

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """x̂ (b, d_out) of sparse or dense codes."""
        if isinstance(codes, Codes):
            return decode_rows(codes.indices, codes.values, self.decoder()) + self.b_dec
        return torch.addmm(self.b_dec, codes, self.decoder())

    def forward(self, x: Tensor) -> Tensor:
        """x̂ (b, d_out). Rows are taken in chunks, so that memory is bounded at any width."""
        return torch.cat([self.decode(self.encode(rows)) for rows in x.split(self.rows_at_once())])

    @property
    def code_width(self) -> int:
        """How many numbers `encode` gives for one row."""
        return self.n

    def rows_at_once(self) -> int:
        """Rows whose codes fit into bounded memory."""
        width = max(self.code_width, self.d_in)
        return chunk_rows(width, self.W_enc.element_size(), self.W_enc.device.type)

    @property
    def bias(self) -> Tensor:
        """The bias (n,) of pre-activations."""
        return self.b_enc

    def pre_activations(self, x: Tensor) -> Tensor:
        """W_enc (x − b_dec) + bias, latent-major (n, b) as in `products.pre_activation_chunks`."""
        return torch.addmm(self.bias.unsqueeze(1), self.encoder(), (x - self.b_dec).T)

    # ---------------------------------------------------------------- training

    def loss_and_grads(self, x: Tensor, target: Tensor, step: StepInfo) -> dict[str, Tensor]:
        """Loss terms of a batch in normalised units, as scalars.

        Overwrites .grad of every parameter and what `fired` tells.

        Args:
            x: input (b, d_in).
            target: what x̂ is to be, (b, d_out). An autoencoder's is `x` itself.
            step: where training stands.

        Returns:
            `loss` is what is minimised. `squared_error` is the mean over rows of ‖target − x̂‖², a sum over d. `l0` is
            the mean number of active latents per row. Further terms are the architecture's own.
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

    def calibrate(self, x: Tensor) -> None:
        """Sets what inference takes from data and training does not need, from normalised rows `x` (r, d).

        Most architectures have nothing of the kind. Training comes out the same, whether and when this is called.
        """

    def fired(self) -> Tensor:
        """(n,) bool: the latents active in the batch last given to `loss_and_grads`."""
        return self._fired

    def _centred(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Input and target less b_dec, (b, d) each. They are one tensor where the target is the input."""
        centred = torch.sub(x, self.b_dec, out=self._workspace.take("centred", x.shape, x))
        if target is x:
            return centred, centred
        return centred, torch.sub(target, self.b_dec, out=self._workspace.take("centred_target", target.shape, target))

    def _take_grads(self) -> None:
        """Gives every parameter a .grad to write into, where an earlier step left none."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    # ---------------------------------------------------------------- folding and files

    @torch.no_grad()
    def folded(self) -> SAE:
        """The same autoencoder for raw activations, a copy for inference.

        folded(x) = scale · self(x / scale), and its codes are self's times scale. Every activation function here
        commutes with a positive factor. So biases and thresholds take the factor, and weights stay as they are.
        """
        folded = copy.deepcopy(self).requires_grad_(False)
        for tensor in folded._in_activation_units():
            tensor.mul_(self.scale)
        folded.scale.fill_(1)
        return folded

    def _in_activation_units(self) -> list[Tensor]:
        """The tensors that a factor on the activations multiplies."""
        return [*self._per_latent(), self.b_dec]

    def _per_latent(self) -> list[Tensor]:
        """The tensors that a factor on one latent's pre-activation multiplies, (n,) each, beside its row of W_enc."""
        return [self.b_enc]

    def saved(self) -> dict[str, Tensor]:
        """The tensors named in `SAVED`, weights latent-major."""
        return {name: getattr(self, name) for name in self.SAVED}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors as `saved` gives them."""
        own = self.state_dict()
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])

    @torch.no_grad()
    def subtract_b_dec_(self) -> None:
        """For weights whose encoder takes x itself: the same codes from x − b_dec."""
        self.b_enc.add_(self.W_enc @ self.b_dec)

    @torch.no_grad()
    def unit_decoder_rows_(self) -> None:
        """Moves the norms of decoder rows into the codes. A row of zeros stays."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1)
        self.W_dec.div_(norms.where(norms > 0, 1).unsqueeze(1))
        self._multiply_codes(norms.where(norms > 0, self.FACTOR_WITHOUT_DIRECTION))

    def _multiply_codes(self, factors: Tensor) -> None:
        """Multiplies every latent's codes by its factor (n,), at least 0."""
        self.W_enc.mul_(factors.unsqueeze(1))
        for tensor in self._per_latent():
            tensor.mul_(factors)


def share_buffers(saes: Iterable[SAE]) -> None:
    """Lets SAEs that are used in turns have the same buffers: as many as the largest needs, not the sum."""
    workspace = Workspace()
    for sae in saes:
        sae._workspace = workspace
