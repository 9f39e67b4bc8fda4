"""How well an SAE reconstructs held-out activations, in one streaming pass with float64 sums.

Everything is in raw units. `sae` is folded (see `SAE.folded`), and rows come as they are on the stream.

Definitions, over all N rows:

- `fvu` = Σ‖x−x̂‖² / Σ‖x−x̄‖², where x̄ is the mean of these rows.
- `l0` = mean number of active latents per row.
- `dead_fraction` = share of the latents active on none of the rows.
- `cosine` = mean of the cosine of x and x̂.
- `norm_ratio` = mean of ‖x̂‖/‖x‖.
- `density` = histogram of the latents' log10 firing frequency, see `DENSITY_EDGES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from raysae.kernels.buffers import power_of_two
from raysae.sae.base import SAE, Codes

# Bins of log10(share of rows on which a latent is active), half a decade each. The first bin also takes everything
# rarer. Dead latents are in none.
DENSITY_EDGES = np.linspace(-6, 0, 13)
# Bound on the bytes of a temporary, which holds codes in float32 or (rows, d) in float64.
# A CPU would page-fault larger ones anew for every chunk.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
FEWEST_ROWS = 32
TINY = 1e-30  # Keeps a row of zeros from dividing by zero. Its cosine and its ratio count as 0.


@dataclass
class Reconstruction:
    """The metrics of one SAE on one set of rows. `frequency` counts the rows with each latent active, `(n,)`."""

    rows: int
    fvu: float
    l0: float
    dead_fraction: float
    cosine: float
    norm_ratio: float
    density: list[int]
    frequency: np.ndarray

    def scalars(self) -> dict[str, float]:
        """The numbers that go into a report."""
        return {key: value for key, value in asdict(self).items() if key not in ("rows", "density", "frequency")}


class Variance:
    """Σ‖x−x̄‖² of a stream of rows, in float64.

    Each chunk is summed about its own mean and merged by Chan's rule. That stays accurate where the mean is far from 0.
    """

    def __init__(self, d: int) -> None:
        self.rows = 0
        self.mean = torch.zeros(d, dtype=torch.float64)
        self.sum = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Add a chunk `(r, d)`."""
        x = x.double()
        mean = x.mean(0)
        difference = mean.cpu() - self.mean
        total = self.rows + len(x)
        self.sum += float((x - mean).square().sum()) + float(difference.square().sum()) * self.rows * len(x) / total
        self.mean += difference * (len(x) / total)
        self.rows = total


@torch.no_grad()
def reconstruction_metrics(
    sae: SAE, chunks: Iterable[torch.Tensor], variance: Variance | None = None
) -> Reconstruction:
    """Metrics of the folded `sae` over raw rows. The `chunks` `(r, d)` may have any length and float dtype.

    SAEs evaluated on the same rows can share one `variance` of these rows. An empty one takes the rows in. One that
    already has rows is used as it is.

    Chunks are split so that no temporary exceeds `CHUNK_BYTES`, which bounds memory. Sparse codes are never made dense.

    Raises:
        ValueError: there is no row.
    """
    device = sae.W_enc.device
    variance = variance or Variance(sae.d_in)
    unseen = variance.rows == 0
    active = torch.zeros(sae.n, dtype=torch.int64, device=device)
    error = cosine = ratio = 0.0
    most = CHUNK_BYTES[device.type]
    step = power_of_two(max(FEWEST_ROWS, most // max(4 * sae.code_width, 8 * sae.d_in)))
    for chunk in chunks:
        if unseen:
            # Split without regard to the SAE's width, so that all SAEs see the same bits.
            for x in chunk.split(max(FEWEST_ROWS, most // (8 * sae.d_in))):
                variance.add(x.to(device, torch.float32))
        for x in chunk.split(step):
            x = x.to(device, torch.float32)
            codes = sae.encode(x)
            reconstruction = sae.decode(codes)
            active += latents_active(codes, sae.n)
            x_norm, norm = x.norm(dim=1).double(), reconstruction.norm(dim=1).double()
            error += float((x - reconstruction).square().sum(1).double().sum())
            cosine += float(((x * reconstruction).sum(1).double() / (x_norm * norm).clamp_min(TINY)).sum())
            ratio += float((norm / x_norm.clamp_min(TINY)).sum())
    rows = variance.rows
    if rows == 0:
        raise ValueError("no rows to evaluate on")
    frequency = active.cpu().numpy()
    return Reconstruction(
        rows=rows,
        fvu=error / variance.sum if variance.sum > 0 else float("nan"),
        l0=float(frequency.sum() / rows),
        dead_fraction=float((frequency == 0).mean()),
        cosine=cosine / rows,
        norm_ratio=ratio / rows,
        density=density_histogram(frequency, rows),
        frequency=frequency,
    )


def latents_active(codes: Codes | torch.Tensor, n: int) -> torch.Tensor:
    """Number of rows on which each latent is active (its value is positive), `(n,)` int64.

    `codes` are (values, indices) or dense `(r, n)`.
    """
    if isinstance(codes, Codes):
        return torch.bincount(codes.indices[codes.values > 0], minlength=n)
    return (codes > 0).sum(0)


def density_histogram(frequency: np.ndarray, rows: int) -> list[int]:
    """Number of latents per bin of `DENSITY_EDGES`. `frequency` counts the rows with each latent active, `(n,)`."""
    share = np.log10(frequency[frequency > 0] / rows)
    return np.histogram(np.clip(share, DENSITY_EDGES[0], DENSITY_EDGES[-1]), DENSITY_EDGES)[0].tolist()
