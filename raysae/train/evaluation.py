"""How well an SAE reconstructs held-out activations, in one streaming pass with float64 sums.

Everything is in raw units. `sae` is folded (see `SAE.folded`), and rows come as they are on the stream.

Definitions, over all N rows:

- `fvu` = Σ‖x−x̂‖² / Σ‖x−x̄‖², where x̄ is the mean of these rows.
- `fvu_inliers` = the same over the rows that are no outliers. Outliers have a norm above `outlier_norm` times the
  median norm. A few rows of a hundred times the median norm hold nearly all variance. Then `fvu` speaks of them alone.
- `outlier_fraction` = share of the rows that are outliers.
- `largest_rows_share` = share of Σ‖x−x̄‖² that the 0.1 % of the rows farthest from x̄ hold.
- `l0` = mean number of active latents per row.
- `dead_fraction` = share of the latents active on none of the rows.
- `cosine` = mean of the cosine of x and x̂.
- `norm_ratio` = mean of ‖x̂‖/‖x‖.
- `density` = histogram of the latents' log10 firing frequency, see `DENSITY_EDGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from raysae.config import OUTLIER_NORM
from raysae.kernels.buffers import power_of_two
from raysae.kernels.rows import norm_limit
from raysae.sae.base import SAE, Codes

# Bins of log10(share of rows on which a latent is active), half a decade each. The first bin also takes everything
# rarer. Dead latents are in none.
DENSITY_EDGES = np.linspace(-6, 0, 13)
# Bound on the bytes of a temporary, which holds codes in float32 or (rows, d) in float64.
# A CPU would page-fault larger ones anew for every chunk.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
FEWEST_ROWS = 32
LARGEST = 1 / 1000  # The share of the rows that `largest_rows_share` is about
TINY = 1e-30  # Keeps a row of zeros from dividing by zero. Its cosine and its ratio count as 0.


@dataclass
class Reconstruction:
    """The metrics of one SAE on one set of rows. `frequency` counts the rows with each latent active, `(n,)`."""

    rows: int
    fvu: float
    fvu_inliers: float
    outlier_fraction: float
    largest_rows_share: float
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


class HeldOut:
    """What the rows are like that SAEs are evaluated on. SAEs evaluated on the same rows share it.

    - `variance`: of all rows.
    - `inliers`: variance of the rows that are no outliers.
    - `limit`: the norm above which a row is an outlier.
    - `largest_rows_share`: see the module.

    It is the same whatever SAEs are evaluated.

    Args:
        read: gives the raw rows in chunks (r, d), every time the same. It is called twice.
        d: width of the rows.
        outlier_norm: multiple of the median norm above which a row is an outlier.
        device: where sums are taken.

    Raises:
        ValueError: there is no row.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[torch.Tensor]],
        d: int,
        outlier_norm: float = OUTLIER_NORM,
        device: torch.device | str = "cpu",
    ) -> None:
        self.variance, self.inliers = Variance(d), Variance(d)
        norms, deviations = [], []
        for x in _pieces(read(), d, device):
            self.variance.add(x)
            norms.append(torch.linalg.vector_norm(x, dim=1).cpu())
        if not norms:
            raise ValueError("no rows to evaluate on")
        self.limit = norm_limit(torch.cat(norms), outlier_norm)
        mean = self.variance.mean.to(device)
        for x in _pieces(read(), d, device):
            deviations.append((x.double() - mean).square().sum(1).cpu())
            inside = x[torch.linalg.vector_norm(x, dim=1) <= self.limit]
            if len(inside):
                self.inliers.add(inside)
        largest = torch.cat(deviations).topk(max(1, round(LARGEST * self.variance.rows))).values
        self.largest_rows_share = _ratio(float(largest.sum()), self.variance.sum)


def _pieces(chunks: Iterable[torch.Tensor], d: int, device: torch.device | str) -> Iterator[torch.Tensor]:
    """The rows in float32 on the device, in pieces that `CHUNK_BYTES` bounds in float64."""
    most = CHUNK_BYTES[torch.device(device).type]
    for chunk in chunks:
        for x in chunk.split(max(FEWEST_ROWS, most // (8 * d))):
            yield x.to(device, torch.float32)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


@torch.no_grad()
def reconstruction_metrics(sae: SAE, chunks: Iterable[torch.Tensor], held_out: HeldOut | None = None) -> Reconstruction:
    """Metrics of the folded `sae` over raw rows. The `chunks` `(r, d)` may have any length and float dtype.

    SAEs evaluated on the same rows can share what is known of these rows, `held_out`. Without it, all chunks are held
    at the same time.

    Chunks are split so that no temporary exceeds `CHUNK_BYTES`, which bounds memory. Sparse codes are never made dense.

    Raises:
        ValueError: there is no row.
    """
    device = sae.W_enc.device
    if held_out is None:
        chunks = list(chunks)
        held_out = HeldOut(lambda: chunks, sae.d_in, device=device)
    active = torch.zeros(sae.n, dtype=torch.int64, device=device)
    error = error_inliers = cosine = ratio = 0.0
    most = CHUNK_BYTES[device.type]
    step = power_of_two(max(FEWEST_ROWS, most // max(4 * sae.code_width, 8 * sae.d_in)))
    for chunk in chunks:
        for x in chunk.split(step):
            x = x.to(device, torch.float32)
            codes = sae.encode(x)
            reconstruction = sae.decode(codes)
            active += latents_active(codes, sae.n)
            x_norm, norm = x.norm(dim=1).double(), reconstruction.norm(dim=1).double()
            errors = (x - reconstruction).square().sum(1).double()
            error += float(errors.sum())
            error_inliers += float(errors.where(x_norm <= held_out.limit, 0).sum())
            cosine += float(((x * reconstruction).sum(1).double() / (x_norm * norm).clamp_min(TINY)).sum())
            ratio += float((norm / x_norm.clamp_min(TINY)).sum())
    rows = held_out.variance.rows
    frequency = active.cpu().numpy()
    return Reconstruction(
        rows=rows,
        fvu=_ratio(error, held_out.variance.sum),
        fvu_inliers=_ratio(error_inliers, held_out.inliers.sum),
        outlier_fraction=1 - held_out.inliers.rows / rows,
        largest_rows_share=held_out.largest_rows_share,
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
