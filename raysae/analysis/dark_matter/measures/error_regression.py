"""Error regression and norm prediction (analyses 1 and 2 of the dark-matter spec).

Source: Engels et al. 2024, sections 4 and 5. Least squares predicts e = x − Sae(x) from x. The prediction is ê, and
ε = e − ê is left. Each split has one pass:

- A fits W and all else that needs only x and e.
- B fits the probes whose targets hold ê, ε or α.
- C evaluates.

All SAEs of a hook point share the predictors' factorisation.

Undertraining is a confound: a shrunken reconstruction leaves a multiple of x in e, which is linear. So R² of e and of
‖e‖² comes again for e_α, the error of the best rescaled reconstruction. α is measured on A:

    reconstruction: b_dec + α(Sae(x) − b_dec)
    its error: e_α = αe + (1 − α)(x − b_dec)
    linear prediction: αê + (1 − α)(x − b_dec)
    residual: αε

The other control is the same SAE after half its training tokens. It is one more SAE in `saes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Activity, Chunk, reconstruct
from raysae.analysis.instruments.intervals import REPLICATES, Estimate, GroupSums, in_columns
from raysae.analysis.instruments.regression import Fit, Linear, Moments, add_target, r2
from raysae.config import OUTLIER_NORM
from raysae.sae.base import SAE
from raysae.train.evaluation import HeldOut

# v → name of the R² with which x predicts ‖v‖²
NORMS = {
    "x": col.R2_NORM_X,
    "Sae(x)": col.R2_NORM_RECONSTRUCTION,
    "e": col.R2_ERROR_NORM,
    "ε": col.R2_NORM_NONLINEAR,
    "Sae(x) + ε": col.R2_NORM_RECONSTRUCTION_PLUS_NONLINEAR,
    "ê": col.R2_NORM_LINEAR,
}
# Predictor of ‖e‖² → name of its R²
BASELINES = {
    "x": col.R2_ERROR_NORM,
    "token": col.R2_ERROR_NORM_FROM_TOKEN,
    "token loss": col.R2_ERROR_NORM_FROM_TOKEN_LOSS,
    "L0": col.R2_ERROR_NORM_FROM_L0,
    "‖x‖²": col.R2_ERROR_NORM_FROM_X_NORM,
}
FEWEST_ACTIVE = 30  # Rows of A. A latent active on fewer has no reliable mean value


@dataclass(frozen=True)
class ErrorRegression:
    """What the regressions say of one SAE.

    `numbers`, measured on C with intervals over groups of documents:
        fvu, nonlinear_fvu             FVU(x, Sae(x)) and FVU(x, Sae(x) + ê)
        …_inliers                      both without outliers, rows of a large norm
        linear_gap                     fvu − nonlinear_fvu, the part of the breakdown that no fit enters
        l0                             mean active latents
        r2_error, r2_error_weighted    R² of ê for e: mean over dimensions (the paper's figure), and variance-weighted
        …_half_fit                     the same with W fitted on every second context of A only
        r2_…_rescaled                  the same for e_α (see above)
        r2_error_norm, r2_norm_…       R² of ‖v‖² predicted from x, see NORMS
        r2_error_norm_from_…           R² of ‖e‖² predicted from something else, see BASELINES
        r2_error_norm_lead             r2_error_norm less the best of the other baselines
        r2_norm_nonlinear_lack         r2_error_norm less r2_norm_nonlinear
    """

    numbers: dict[str, Estimate]
    probe: Linear  # x → ê
    fit: Fit  # Pass A's rows, method, ridge, rank and condition, without its maps
    rescale: float  # α
    largest_rows_share: float  # Share of C's Σ‖x−x̄‖² that the 0.1 % of its rows farthest from x̄ hold
    loading: Tensor  # (n,), a*·decoder row, where a* is the probe z → ‖z‖² for z = Sae(x) − b_dec, no intercept
    mean_active: Tensor  # (n,), mean value of each latent over the rows of A where it is active
    active_rows: Tensor  # (n,), number of rows of A where each latent is active

    @property
    def loading_correlation(self) -> float:
        """Pearson correlation of `loading` and `mean_active`.

        Only latents active on at least `FEWEST_ACTIVE` rows count. It is NaN for fewer than 3 of them.
        """
        often = self.active_rows >= FEWEST_ACTIVE
        if int(often.sum()) < 3:
            return float("nan")
        return float(torch.corrcoef(torch.stack([self.loading[often], self.mean_active[often]]))[0, 1])

    def row(self) -> dict[str, object]:
        """Every number in one flat mapping, with its interval as `in_columns` writes it."""
        return in_columns(self.numbers) | {
            "rescale": self.rescale,
            "largest_rows_share": self.largest_rows_share,
            "loading_correlation": self.loading_correlation,
            "fit_rows": self.fit.rows,
            "fit_ridge": self.fit.ridge,
            "fit_rank": self.fit.rank,
            "fit_condition": self.fit.condition,
        }


@torch.no_grad()
def error_regression(
    activations: Activations,
    hook_point: str,
    saes: Mapping[str, SAE],
    replicates: int = REPLICATES,
    seed: int = 0,
    outlier_norm: float = OUTLIER_NORM,
) -> dict[str, ErrorRegression]:
    """Runs analyses 1 and 2 for the folded `saes` (by name) of one hook point.

    The activations are (b, d) in raw units. Rows of C are outliers where their norm is above `outlier_norm` times the
    median norm. Memory is 12 bytes per row of C, and a few (d, d) and (replicates, 3d) matrices in float64 per SAE.
    """
    fitted = {name: _PassA(sae) for name, sae in saes.items()}
    shared = _Shared()
    for chunk in activations.chunks("A"):
        _fit(chunk, hook_point, saes, fitted, shared)
    whole, half = shared.solve()
    for name, state in fitted.items():
        state.finish(name, whole, half)

    norms = Moments()
    for chunk in activations.chunks("B"):
        x = chunk.x[hook_point].double()
        targets = {}
        for name, sae in saes.items():
            for norm, values in (
                fitted[name].parts(x, reconstruct(sae, chunk.x[hook_point])[0].double()).norms().items()
            ):
                targets[f"{name}/{norm}"] = values
        norms.add(x, targets)
    maps = _Maps(whole.maps, norms.solve().maps, shared.univariate, shared.tokens)

    common = GroupSums(replicates, seed)
    sums = {name: GroupSums(replicates, seed) for name in saes}
    held_out = HeldOut(
        lambda: (chunk.x[hook_point] for chunk in activations.chunks("C")), activations.widths[hook_point], outlier_norm
    )
    for chunk in activations.chunks("C"):
        x = chunk.x[hook_point].double()
        squared = x.square().sum(1)
        inside = squared.sqrt() <= held_out.limit
        add_target(common, chunk.group, "x", x, {})
        add_target(common, chunk.group[inside], "x_inliers", x[inside], {})
        add_target(common, chunk.group, "x_norm", squared, {"x": whole.maps["x_norm"](x)})
        for name, sae in saes.items():
            reconstruction, l0 = reconstruct(sae, chunk.x[hook_point])
            state = fitted[name]
            parts = state.parts(x, reconstruction.double())
            _evaluate(sums[name], chunk, squared, parts, l0, name, state, maps)
            missed = {"inliers_e": parts.e[inside].square().sum(1)}
            missed["inliers_nonlinear"] = parts.nonlinear[inside].square().sum(1)
            sums[name].add(chunk.group[inside], **missed)
    return {name: fitted[name].result(common, sums[name], held_out.largest_rows_share) for name in saes}


# ---------------------------------------------------------------- the passes


class _Shared:
    """Pass A of all SAEs of a hook point: co-moments of even and odd contexts, and the baselines' predictors."""

    def __init__(self) -> None:
        self.halves = (Moments(), Moments())
        self.scalars = {"token_loss": Moments(), "x_norm": Moments()}
        self.tokens = _TokenMeans()
        self.contexts = 0

    def solve(self) -> tuple[Fit, Fit]:
        """Returns the fits on all of A and on every second context of it, then drops the co-moments."""
        first, second = self.halves
        half = first.solve()
        first.merge(second)
        whole = first.solve()
        self.halves = ()
        self.univariate = {name: moments.solve().maps for name, moments in self.scalars.items() if moments.rows}
        self.tokens.finish()
        return whole, half


class _PassA:
    """What pass A gathers about one SAE, and the maps fitted to it."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.bias = sae.b_dec.detach().double().cpu()
        self.activity = Activity(sae.n)
        self.on_x = self.on_itself = 0.0  # Σ⟨x − b_dec, Sae(x) − b_dec⟩ and Σ‖Sae(x) − b_dec‖²
        self.l0 = Moments()
        self.along = Moments()  # Of z = Sae(x) − b_dec and ‖z‖²

    def finish(self, name: str, whole: Fit, half: Fit) -> None:
        self.rescale = self.on_x / self.on_itself if self.on_itself else 1.0
        self.probe, self.half_probe = whole.maps[f"{name}/e"], half.maps[f"{name}/e"]
        self.half_norm = half.maps[f"{name}/e_norm"]
        self.fit = Fit({}, whole.rows, whole.method, whole.ridge, whole.rank, whole.condition)
        self.a = self.along.through_origin().solve().maps["norm"].weight.squeeze(1)
        del self.along
        self.l0_map = self.l0.solve().maps["e"]

    def parts(self, x: Tensor, reconstruction: Tensor) -> _Parts:
        e = x - reconstruction
        linear = self.probe(x)
        return _Parts(x, reconstruction, e, linear, e - linear, self.rescale * e + (1 - self.rescale) * (x - self.bias))

    def result(self, common: GroupSums, sums: GroupSums, largest_rows_share: float) -> ErrorRegression:
        variance = common.variation("x").sum(1)
        inliers = common.variation("x_inliers").sum(1)
        missed = sums["e_missed_x"].sum(1)
        values = {
            col.FVU: sums["fvu"].squeeze(1) / variance,
            col.NONLINEAR_FVU: missed / variance,
            col.LINEAR_GAP: (sums["fvu"].squeeze(1) - missed) / variance,
            col.FVU_INLIERS: sums["inliers_e"].squeeze(1) / inliers,
            col.NONLINEAR_FVU_INLIERS: sums["inliers_nonlinear"].squeeze(1) / inliers,
            col.L0: sums.mean("l0"),
            col.R2_NORM_X: r2(common, "x_norm", "x")[0],
        }
        pairs = {
            col.R2_ERROR: r2(sums, "e", "x"),
            col.R2_ERROR + col.HALF_FIT: r2(sums, "e", "half"),
            col.R2_ERROR + col.RESCALED: r2(sums, "e_rescaled", "", residual=self.rescale**2 * sums["e_missed_x"]),
        }
        for name, (mean, weighted) in pairs.items():
            values |= {name: mean, name.replace(col.R2_ERROR, col.R2_ERROR_WEIGHTED): weighted}
        for name, target, by in _NORM_NUMBERS:
            if f"{target}_missed_{by}" in sums:
                values[name] = r2(sums, target, by)[0]
        others = [values[name] for name in BASELINES.values() if name in values and name != col.R2_ERROR_NORM]
        values[col.R2_ERROR_NORM_LEAD] = values[col.R2_ERROR_NORM] - torch.stack(others).amax(0)
        values[col.R2_NORM_NONLINEAR_LACK] = values[col.R2_ERROR_NORM] - values[col.R2_NORM_NONLINEAR]
        return ErrorRegression(
            numbers={name: Estimate.of(each, sums.groups) for name, each in values.items()},
            probe=self.probe,
            fit=self.fit,
            rescale=float(self.rescale),
            largest_rows_share=largest_rows_share,
            loading=self.sae.decoder().detach().double().cpu() @ self.a,
            mean_active=self.activity.mean_active,
            active_rows=self.activity.count,
        )


# Number, target and prediction of each scalar regression
_NORM_NUMBERS = (
    (col.R2_NORM_RECONSTRUCTION, "reconstruction_norm", "x"),
    (col.R2_NORM_NONLINEAR, "nonlinear_norm", "x"),
    (col.R2_NORM_RECONSTRUCTION_PLUS_NONLINEAR, "reconstruction_plus_nonlinear_norm", "x"),
    (col.R2_NORM_LINEAR, "linear_norm", "x"),
    (col.R2_ERROR_NORM, "e_norm", "x"),
    (col.R2_ERROR_NORM + col.HALF_FIT, "e_norm", "half"),
    (col.R2_ERROR_NORM + col.RESCALED, "e_rescaled_norm", "x"),
    (col.R2_ERROR_NORM_FROM_TOKEN, "e_norm", "token"),
    (col.R2_ERROR_NORM_FROM_TOKEN_LOSS, "e_norm", "token_loss"),
    (col.R2_ERROR_NORM_FROM_L0, "e_norm", "l0"),
    (col.R2_ERROR_NORM_FROM_X_NORM, "e_norm", "x_norm"),
)


@dataclass(frozen=True)
class _Parts:
    """x, Sae(x), e, ê, ε and e_α of some rows, (b, d) each."""

    x: Tensor
    reconstruction: Tensor
    e: Tensor
    linear: Tensor
    nonlinear: Tensor
    rescaled: Tensor

    def norms(self) -> dict[str, Tensor]:
        """Squared norms (b,) whose probes are fitted on B, because they need a W or an α from A."""
        return {
            "nonlinear_norm": self.nonlinear.square().sum(1),
            "reconstruction_plus_nonlinear_norm": (self.reconstruction + self.nonlinear).square().sum(1),
            "linear_norm": self.linear.square().sum(1),
            "e_rescaled_norm": self.rescaled.square().sum(1),
        }


def _fit(chunk: Chunk, hook_point: str, saes: Mapping[str, SAE], fitted: dict[str, _PassA], shared: _Shared) -> None:
    """Adds to `fitted` and `shared` what a chunk of A holds."""
    x = chunk.x[hook_point].double()
    squared = x.square().sum(1)
    targets, norms = {"x_norm": squared}, {}
    for name, sae in saes.items():
        state = fitted[name]
        reconstruction, l0 = reconstruct(sae, chunk.x[hook_point], state.activity)
        reconstruction = reconstruction.double()
        e, centred = x - reconstruction, reconstruction - state.bias
        squared_centred = centred.square().sum(1)
        state.on_x += float(((x - state.bias) * centred).sum())
        state.on_itself += float(squared_centred.sum())
        state.along.add(centred, {"norm": squared_centred})
        norms[name] = e.square().sum(1)
        state.l0.add(l0.unsqueeze(1), {"e": norms[name]})
        targets |= {f"{name}/e": e, f"{name}/e_norm": norms[name]}
        targets[f"{name}/reconstruction_norm"] = reconstruction.square().sum(1)
    _, of_row = torch.unique_consecutive(chunk.context, return_inverse=True)
    odd = (of_row + shared.contexts) % 2 == 1
    shared.contexts += int(of_row[-1]) + 1
    for half, rows in zip(shared.halves, (~odd, odd), strict=True):
        half.add(x[rows], {name: y[rows] for name, y in targets.items()})
    shared.scalars["x_norm"].add(squared.unsqueeze(1), norms)
    if chunk.token_loss is not None:
        known = ~chunk.token_loss.isnan()
        shared.scalars["token_loss"].add(
            chunk.token_loss[known].unsqueeze(1), {name: y[known] for name, y in norms.items()}
        )
    shared.tokens.add(chunk.token, norms)


def _evaluate(
    sums: GroupSums,
    chunk: Chunk,
    squared: Tensor,
    parts: _Parts,
    l0: Tensor,
    name: str,
    state: _PassA,
    maps: _Maps,
) -> None:
    """Adds to `sums` what the numbers of SAE `name` need, for a chunk of C."""
    group, x = chunk.group, parts.x
    norm = parts.e.square().sum(1)
    sums.add(group, fvu=norm, l0=l0)
    add_target(sums, group, "e", parts.e, {"x": parts.linear, "half": state.half_probe(x)})
    add_target(sums, group, "e_rescaled", parts.rescaled, {})
    add_target(
        sums,
        group,
        "reconstruction_norm",
        parts.reconstruction.square().sum(1),
        {"x": maps.whole[f"{name}/reconstruction_norm"](x)},
    )
    for target, values in parts.norms().items():
        add_target(sums, group, target, values, {"x": maps.norms[f"{name}/{target}"](x)})
    predictions = {
        "x": maps.whole[f"{name}/e_norm"](x),
        "half": state.half_norm(x),
        "l0": state.l0_map(l0.unsqueeze(1)),
        "x_norm": maps.univariate["x_norm"][name](squared.unsqueeze(1)),
        "token": maps.tokens.predict(chunk.token, name),
    }
    if chunk.token_loss is not None:
        from_loss = maps.univariate["token_loss"][name](chunk.token_loss.unsqueeze(1))
        # Nothing is predicted at the last position, so its rows have no loss and get the mean
        predictions["token_loss"] = from_loss.nan_to_num(nan=maps.tokens.overall(name))
    add_target(sums, group, "e_norm", norm, predictions)


@dataclass(frozen=True)
class _Maps:
    """Predictions that passes A and B fitted for all SAEs of a hook point."""

    whole: Mapping[str, Linear]  # Fitted on all of A
    norms: Mapping[str, Linear]  # Fitted on B, for the squared norms of `_Parts.norms`
    univariate: Mapping[str, Mapping[str, Linear]]  # Predictor of one column → SAE → map to ‖e‖²
    tokens: _TokenMeans


class _TokenMeans:
    """Mean of named scalars per token id. A token that A lacks gets the mean over all rows."""

    def __init__(self) -> None:
        self.count = torch.zeros(0, dtype=torch.float64)
        self.total: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}

    def add(self, token: Tensor, values: Mapping[str, Tensor]) -> None:
        size = max(len(self.count), int(token.max()) + 1)
        self.count = self._grown(self.count, size) + torch.bincount(token, minlength=size)
        for name, y in values.items():
            before = self._grown(self.total.get(name, torch.zeros(0, dtype=torch.float64)), size)
            self.total[name] = before + torch.bincount(token, y.double(), size)

    def finish(self) -> None:
        for name, total in self.total.items():
            overall = total.sum() / self.count.sum()
            self.mean[name] = torch.cat(
                [torch.where(self.count > 0, total / self.count.clamp_min(1), overall), overall.unsqueeze(0)]
            )

    def overall(self, name: str) -> float:
        """Mean of the scalar `name` over all rows."""
        return float(self.mean[name][-1])

    def predict(self, token: Tensor, name: str) -> Tensor:
        """Mean of the scalar `name` for each token, (b,)."""
        return self.mean[name][token.clamp_max(len(self.count))]

    @staticmethod
    def _grown(values: Tensor, size: int) -> Tensor:
        return torch.cat([values, values.new_zeros(size - len(values))])
