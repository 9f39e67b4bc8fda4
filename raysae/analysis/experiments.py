"""The analyses of a study: each takes a `Lab`, has its parts worked out, and returns tables, figures and numbers, which are written and logged.

They build on one another through the lab's parts: every analysis but the first takes its probes from the first's, and nothing is worked out twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raysae.analysis import downstream_loss as downstream
from raysae.analysis import figures, figures_parts, fits
from raysae.analysis.claims import FAILS, HOLDS, UNTOLD, decide
from raysae.analysis.earlier_layers import earlier_layers as predict_errors
from raysae.analysis.error_regression import ErrorRegression
from raysae.analysis.error_regression import error_regression as regress
from raysae.analysis.error_saes import error_saes as compare_errors
from raysae.analysis.figures_errors import error_sae_bars
from raysae.analysis.introduced_error import ABLATED, LEVELS, SyntheticModel, correlation_table, noise_grid, noise_unit
from raysae.analysis.introduced_error import introduced_error as introduce
from raysae.analysis.lab import Lab, Recorded
from raysae.analysis.parts import Part, language_model
from raysae.analysis.per_token import write_per_token
from raysae.analysis.per_token_scaling import per_token_scaling as compare_pairs
from raysae.analysis.per_token_scaling import token_lines
from raysae.analysis.pursuit import pursuit as pursue
from raysae.analysis.regression import Linear, save_linear
from raysae.analysis.report import write_report
from raysae.analysis.subjects import Subject
from raysae.config import ERROR_KINDS, AnalysisConfig, ErrorsConfig, ModelConfig, SAEConfig, UserError
from raysae.lm.tokenizer import load_tokenizer
from raysae.text.contexts import Contexts

GROUP = 3  # SAEs that share a task's pass over the activations
LINE_TOKENS = 100  # of the per-token line plot
FEWEST_WIDTHS = 3  # for a fit against width
PURSUIT_ROWS = 32_768  # to fit, and as many to measure: by far the slowest analysis, and its intervals are narrow
SYNTHETIC = {"d": 32, "features": 96, "rows": 400_000}  # the fully synthetic model of introduced_error; rows to fit, and as many to measure


@dataclass
class Findings:
    """What an analysis has found. `numbers` are its headlines; `per_sae` has a row per SAE (column `sae`); both go to MLflow as metrics."""

    analysis: str
    key: list  # what they depend on
    per_sae: pd.DataFrame
    numbers: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)  # name → Figure
    notes: list[str] = field(default_factory=list)  # what could not be shown, and why
    files: list[Path] = field(default_factory=list)  # written

    def draw(self, name: str, figure: Callable[..., Any], *arguments: object) -> None:
        """Adds a figure, or a note where these SAEs do not give one."""
        try:
            self.figures[name] = figure(*arguments)
        except UserError as error:
            self.notes.append(str(error))


# ---------------------------------------------------------------- 1 and 2


def regressions(lab: Lab, hook_point: str, saes: Mapping[str, Subject]) -> dict[str, ErrorRegression]:
    """Analyses 1 and 2 of each of `saes`, worked out or read."""
    recorded = lab.record([hook_point])
    by_width = sorted(saes.values(), key=lambda sae: sae.width)
    tasks = -(-len(by_width) // GROUP)
    groups = [by_width[i::tasks] for i in range(tasks)]  # wide and narrow ones together: tasks of like length
    parts = [
        Part("error_regression", lab.key(*group), _regress, (recorded, hook_point, group, lab.replicates, lab.seed)) for group in groups
    ]  # fmt: skip
    return {name: found for group in lab.run(parts) for name, found in group.items()}


def _regress(recorded: Recorded, hook_point: str, saes: Sequence[Subject], replicates: int, seed: int) -> dict[str, ErrorRegression]:
    return regress(recorded.open(), hook_point, {sae.name: sae.load() for sae in saes}, replicates, seed)


def regression_table(lab: Lab, saes: Mapping[str, Subject], found: Mapping[str, ErrorRegression]) -> pd.DataFrame:
    """A row per SAE: sae, hook_point, layer, width, architecture, and `ErrorRegression.row`."""
    rows = []
    for name, result in found.items():
        sae = saes[name]
        layer = next((int(part) for part in sae.hook_point.split(".") if part.isdigit()), 0)
        known = {"sae": name, "hook_point": sae.hook_point, "layer": layer, "width": sae.width, "architecture": sae.params.get("architecture", "")}
        rows.append(known | result.row())
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Shown:
    """One SAE per width at a hook point, those with the L0 nearest to the target, narrowest first: what the figures against width show."""

    hook_point: str
    table: pd.DataFrame
    results: dict[str, ErrorRegression]
    saes: dict[str, Subject]

    @property
    def probes(self) -> dict[str, Linear]:
        return {name: result.probe for name, result in self.results.items()}

    @property
    def central(self) -> Subject:
        """The one in the middle: analyses of a single SAE take it."""
        return list(self.saes.values())[(len(self.saes) - 1) // 2]


def main_hook_point(lab: Lab) -> str:
    """The one with the most SAEs."""
    return max(lab.hook_points, key=lambda hook: len(lab.of(hook)))


def shown(lab: Lab) -> Shown:
    """Of the main hook point, and of the architecture with the most SAEs there."""
    hook_point = main_hook_point(lab)
    saes = lab.of(hook_point)
    found = regressions(lab, hook_point, saes)
    table = regression_table(lab, saes, found)
    table = table[table["architecture"] == table["architecture"].mode()[0]]
    table = fits.at_nearest_l0(table, lab.config.target_l0).reset_index(drop=True)
    names = list(table["sae"])
    return Shown(hook_point, table, {name: found[name] for name in names}, {name: saes[name] for name in names})


def error_regression(lab: Lab) -> Findings:
    """Analyses 1 and 2: R² of e and of norms for every SAE, the breakdown of the error over widths, and the controls for undertraining."""
    results = {hook: regressions(lab, hook, lab.of(hook)) for hook in lab.hook_points}
    table = pd.concat([regression_table(lab, lab.saes, found) for found in results.values()], ignore_index=True)
    chosen = shown(lab)
    findings = Findings("error_regression", lab.key(*lab.saes.values()), table, tables={"regressions": table})
    where = _where(lab, chosen)
    for column in ("r2_error", "r2_error_weighted", "r2_error_norm", "r2_norm_nonlinear", "nonlinear_fvu", "fvu", "l0"):
        findings.numbers[f"median/{column}"] = float(table[column].median())
    trained = _half_trained(lab, chosen, findings) if lab.config.half_trained else None
    if trained is not None:
        findings.tables["half_trained"] = trained

    against = chosen.table.copy()
    pursued = lab.kept(_pursuit_parts(lab, chosen))
    if pursued is not None:
        found = pd.concat(pursued).set_index("sae")["nonlinear_fvu_pursuit"]
        against["pursuit_nonlinear_fvu"] = found.reindex(against["sae"]).to_numpy()
    if against["width"].nunique() >= FEWEST_WIDTHS:
        law = fits.fit_power_law(against["width"], against["fvu"])
        level = fits.nonlinear_level(against["width"], against["nonlinear_fvu"], against["fvu"])
        parts = fits.breakdown(against, law)
        findings.tables |= {"breakdown": parts, "fit": pd.DataFrame([{**vars(law), **{f"level_{k}": v for k, v in vars(level).items()}}])}
        findings.numbers |= {"fit/c": law.c, "fit/m": law.m, "fit/c_low": law.c_low, "fit/c_high": law.c_high}
        findings.numbers |= {"level/value": level.value, "level/slope": level.slope, "level/share_of_fall": level.share_of_fall}
        findings.figures["breakdown"] = figures.breakdown(parts, law, level, where)
    else:
        findings.notes.append(f"a fit against width needs {FEWEST_WIDTHS} widths, there are {against['width'].nunique()}")
    for hook, found in results.items():
        part = table[table["hook_point"] == hook]
        findings.draw(_named("contours", hook, lab), figures.contours, part, f"{_model(lab)} · {hook} · {len(part)} SAEs")
        findings.figures[_named("norms", hook, lab)] = figures.norm_prediction(part, f"{_model(lab)} · {hook}")
        some = list(chosen.saes if hook == chosen.hook_point else found)
        some = some[:: max(1, (len(some) - 1) // 2)]  # the narrowest, the central and the widest
        findings.draw(_named("loadings", hook, lab), figures.loadings, {name: found[name] for name in some}, hook)
    if table["layer"].nunique() > 1:
        findings.figures["layers"] = figures.r2_per_layer(table, _model(lab))
    else:
        findings.notes.append("R² per layer needs SAEs at several layers: train them with --hook_points resid_post.1,resid_post.3,…")
    folder = lab.folder / "probes"
    folder.mkdir(parents=True, exist_ok=True)
    for found in results.values():
        for name, result in found.items():
            save_linear({"probe": result.probe}, folder / f"{name}.safetensors")
    return findings


def _half_trained(lab: Lab, chosen: Shown, findings: Findings) -> pd.DataFrame | None:
    """The SAEs of the figure trained anew on half the tokens, with all else as it was, beside the whole ones."""
    configs = [sae.config for sae in chosen.saes.values() if sae.metrics.get("tokens", 0) >= lab.sweep.train.tokens]
    if len(configs) < len(chosen.saes):
        findings.notes.append(
            "the control with half the training tokens was left out: it trains SAEs anew, and some of these are no sweep's, or were stopped early"
        )
        return None
    alike: dict[tuple, list[SAEConfig]] = {}  # one sweep for all that differ in width alone
    for config in configs:
        alike.setdefault(tuple(config.model_dump(exclude={"width"}).values()), []).append(config)
    made: dict[str, Subject] = {}
    for group in alike.values():
        made |= lab.train("half", [chosen.hook_point], [config.width for config in group], group[0], lab.sweep.train.tokens // 2)
    table = regression_table(lab, made, regressions(lab, chosen.hook_point, made)).set_index("width")
    whole = chosen.table.set_index("width")
    columns = ["fvu", "l0", "nonlinear_fvu", "r2_error", "r2_error_weighted", "r2_error_norm", "r2_error_rescaled", "r2_error_norm_rescaled"]
    ends = {f"{column}{end}": f"{column}_half{end}" for column in columns for end in ("", "_low", "_high")}
    both = whole[columns].join(table[list(ends)].rename(columns=ends), how="inner").reset_index()
    findings.numbers["median/r2_error_half_trained"] = float(both["r2_error_half"].median())
    findings.numbers["median/r2_error_rescaled"] = float(both["r2_error_rescaled"].median())
    return both


# ---------------------------------------------------------------- 3


def per_token_scaling(lab: Lab) -> Findings:
    """Analysis 3: error norms of SAEs of one width from those of another, norms along a context, and the per-token tables."""
    chosen = shown(lab)
    recorded = lab.record([chosen.hook_point])
    saes = list(chosen.saes.values())
    key = lab.key(*saes)
    parts = [Part("per_token_scaling", key, _scaling, (recorded, chosen.hook_point, saes, chosen.probes, lab.replicates, lab.seed))]
    folder = lab.folder / "per_token"
    for sae in saes:
        path = folder / f"{sae.name}-{sae.content[:8]}.parquet"
        parts.append(Part("per_token_tables", lab.key(sae), _table, (recorded, sae, chosen.probes[sae.name], path)))
    (pairs, lines), *tables = lab.run(parts)
    findings = Findings("per_token_scaling", key, pd.DataFrame({"sae": list(chosen.saes)}), tables={"pairs": pairs, "lines": lines}, files=tables)
    if len(pairs):
        numbers = pairs[["r2", "squared_correlation", "r2_with_nonlinear", "gain"]]
        findings.numbers = {f"mean/{name}": float(value) for name, value in numbers.mean().items()}
        findings.figures["pairs"] = figures.pair_maps(pairs, _where(lab, chosen))
    else:
        findings.notes.append("pairs need SAEs of at least two widths")
    tokenizer = load_tokenizer(lab.plan.config.model)
    first = lines[lines["sae"] == lines["sae"].iloc[0]]
    texts = [tokenizer.decode([token]) for token in first["token"]]
    findings.figures["lines"] = figures.token_lines(lines, texts, title=_where(lab, chosen))
    return findings


def _scaling(
    recorded: Recorded, hook_point: str, saes: Sequence[Subject], probes: Mapping[str, Linear], replicates: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    activations, loaded = recorded.open(), {sae.name: sae.load() for sae in saes}
    pairs = compare_pairs(activations, hook_point, loaded, probes, replicates, seed) if len(saes) > 1 else pd.DataFrame()
    return pairs, token_lines(activations, hook_point, loaded, probes, LINE_TOKENS)


def _table(recorded: Recorded, sae: Subject, probe: Linear, path: Path) -> Path:
    return write_per_token(recorded.open(), sae.hook_point, sae.load(), probe, path)


# ---------------------------------------------------------------- 4


def introduced_error(lab: Lab) -> Findings:
    """Analysis 4: what the regression makes of errors put in on purpose, on the central SAE and on the fully synthetic model."""
    chosen = shown(lab)
    recorded, sae = lab.record([chosen.hook_point]), chosen.central
    parts = [
        Part("introduced_error", lab.key(sae), _introduce, (recorded, sae, lab.seed)),
        Part("introduced_error", [SYNTHETIC, lab.seed], _synthetic, (lab.seed,)),
    ]
    found, (grid, table, compared, unit) = lab.run(parts)
    findings = Findings("introduced_error", lab.key(sae), pd.DataFrame({"sae": [sae.name]}))
    findings.tables = {"grid": found.grid, "correlations": _with_index(found.table), "closed_form": found.closed_form}
    findings.tables |= {"synthetic_grid": grid, "synthetic_correlations": _with_index(table), "synthetic_closed_form": compared}
    for prefix, correlations in (("", found.table), ("synthetic/", table)):
        for sigma in correlations.index:
            for estimate in correlations.columns:
                findings.numbers[f"{prefix}correlation_{sigma}_{estimate}"] = float(correlations.loc[sigma, estimate])
    findings.numbers["reencoding_fvu"] = found.reencoding_fvu
    findings.numbers["synthetic/largest_deviation"] = float(compared["deviation"].max())
    findings.figures["grid"] = figures.introduced_error(found.grid, found.table, found.unit, f"{_model(lab)} · {sae.name}")
    findings.figures["synthetic"] = figures.introduced_error(grid, table, unit, "fully synthetic model: known dictionary and dense part")
    return findings


def _introduce(recorded: Recorded, sae: Subject, seed: int):
    return introduce(recorded.open(), sae.hook_point, sae.load(), seed=seed)


def _synthetic(seed: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, float]:
    """Of the synthetic model: grid, correlations, estimates beside their closed forms, and the unit of noise."""
    model = SyntheticModel.random(SYNTHETIC["d"], SYNTHETIC["features"], seed)
    rows = SYNTHETIC["rows"]
    unit = noise_unit(model.covariance())
    grid = noise_grid(model.sample(rows, ABLATED, seed), model.sample(rows, ABLATED, seed + 1), ABLATED, LEVELS, unit)
    return grid, correlation_table(grid), model.compare(grid, unit), unit


# ---------------------------------------------------------------- 5


def downstream_loss(lab: Lab) -> Findings:
    """Analysis 5: cross-entropy with parts of the error put back, for every SAE."""
    lm = lab.plan.config.model
    parts, key = [], lab.key(*lab.saes.values(), tokens=lab.config.predicted_tokens)
    for hook_point in lab.hook_points:
        saes = lab.of(hook_point)
        recorded = lab.record([hook_point])
        found = regressions(lab, hook_point, saes)
        names = list(saes)
        for start in range(0, len(names), 2 * GROUP):  # a clean pass per group
            group = [saes[name] for name in names[start : start + 2 * GROUP]]
            probes = {sae.name: found[sae.name].probe for sae in group}
            arguments = (recorded, hook_point, group, probes, lm, lab.config.predicted_tokens, lab.replicates, lab.seed)
            part_key = lab.key(*group, tokens=lab.config.predicted_tokens)
            parts.append(Part("downstream_loss", part_key, _downstream, arguments, gpus=lab.config.resources.producer_gpus, contexts=True))
    table = pd.concat(lab.run(parts), ignore_index=True)
    findings = Findings("downstream_loss", key, table, tables={"downstream": table})
    for part in downstream.PARTS:
        for column in (f"recovered_{part}", f"variance_share_{part}", f"norm_share_{part}"):
            findings.numbers[f"median/{column}"] = float(table[column].median())
    chosen = shown(lab)
    of_hook = table[table["sae"].isin(lab.of(chosen.hook_point))]
    findings.figures["widths"] = figures_parts.ce_recovered(of_hook[of_hook["sae"].isin(chosen.saes)], "width", _where(lab, chosen))
    of_width = of_hook[of_hook["width"] == chosen.central.width]
    if len(of_width) > 1:
        findings.figures["sparsities"] = figures_parts.ce_recovered(
            of_width, "l0", f"{_model(lab)} · {chosen.hook_point} · width {chosen.central.width:,}"
        )
    return findings


def _downstream(
    contexts: Contexts, recorded: Recorded, hook_point: str, saes: Sequence[Subject], probes: Mapping[str, Linear], model: ModelConfig,
    predicted: int, replicates: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    import torch

    lm = language_model(model)
    skip = recorded.first_position
    wanted = -(-predicted // (contexts.tokens.shape[1] - 1 - skip))
    tokens = torch.from_numpy(contexts[recorded.contexts("C")[:wanted]]).to(lm.device)
    loaded = {sae.name: sae.load() for sae in saes}
    return downstream.downstream_loss(lm, tokens, hook_point, loaded, probes, skip, replicates, seed)


# ---------------------------------------------------------------- 6


def error_saes(lab: Lab) -> Findings:
    """Analysis 6: TopK SAEs of the central SAE's width and L0 trained on e, ê and ε of it, compared."""
    chosen = shown(lab)
    sae = chosen.central
    recorded = lab.record([chosen.hook_point])
    like = _topk(lab, chosen, sae)
    probe = lab.folder / "probes" / f"{sae.name}.safetensors"
    probe.parent.mkdir(parents=True, exist_ok=True)
    save_linear({"probe": chosen.probes[sae.name]}, probe)
    hooks = [f"{chosen.hook_point}.{kind}" for kind in ERROR_KINDS]
    made = lab.train("errors", hooks, [sae.width], like, lab.train_tokens, ErrorsConfig(sae=sae.where, probe=str(probe)))
    trained = {subject.hook_point.rpartition(".")[2]: subject for subject in made.values()}
    part = Part(
        "error_saes", lab.key(sae, *trained.values()), _compare_errors, (recorded, sae, chosen.probes[sae.name], trained, lab.replicates, lab.seed)
    )
    table = lab.run([part])[0]
    findings = Findings("error_saes", part.key, pd.DataFrame({"sae": [sae.name]}), tables={"error_saes": table})
    for row in table.itertuples():
        findings.numbers |= {f"{row.kind}/fvu": row.fvu, f"{row.kind}/l0": row.l0, f"{row.kind}/dead_fraction": row.dead_fraction}
    findings.figures["error_saes"] = error_sae_bars(table, f"{_model(lab)} · {sae.name} · {lab.train_tokens:,} tokens")
    return findings


def _compare_errors(recorded: Recorded, sae: Subject, probe: Linear, trained: Mapping[str, Subject], replicates: int, seed: int) -> pd.DataFrame:
    loaded = {kind: subject.load() for kind, subject in trained.items()}
    return compare_errors(recorded.open(), sae.hook_point, sae.load(), probe, loaded, replicates, seed)


# ---------------------------------------------------------------- 7


def _pursuit_parts(lab: Lab, chosen: Shown) -> list[Part]:
    recorded = lab.record([chosen.hook_point])
    saes = sorted(chosen.saes.values(), key=lambda sae: -sae.width)  # the longest first
    return [Part("pursuit", lab.key(sae, rows=PURSUIT_ROWS), _pursue, (recorded, sae, lab.replicates, lab.seed)) for sae in saes]


def pursuit(lab: Lab) -> Findings:
    """Analysis 7: how much of the nonlinear error a better choice of latents removes, for the SAEs of the figure."""
    chosen = shown(lab)
    parts = _pursuit_parts(lab, chosen)
    table = pd.concat(lab.run(parts)).sort_values("width", ignore_index=True)
    findings = Findings("pursuit", lab.key(*chosen.saes.values()), table, tables={"pursuit": table})
    share = table["encoder_error"] / table["nonlinear_fvu"]
    findings.numbers = {"median/encoder_error": float(table["encoder_error"].median()), "median/encoder_share": float(share.median())}
    findings.figures["pursuit"] = figures_parts.pursuit_bars(table, title=_where(lab, chosen))
    return findings


def _pursue(recorded: Recorded, sae: Subject, replicates: int, seed: int) -> pd.DataFrame:
    return pursue(recorded.open(), sae.hook_point, {sae.name: sae.load()}, replicates, seed, PURSUIT_ROWS)


# ---------------------------------------------------------------- 8


def earlier_layers(lab: Lab) -> Findings:
    """Analysis 8: the central SAE's error from what is known at the same residual, the previous one and this layer's MLP and attention.

    SAEs that the sweep lacks there are trained, TopK with the central SAE's width and L0, all on one pass of the language model.
    """
    chosen = shown(lab)
    sae = chosen.central
    hooks = _earlier(lab, chosen.hook_point)
    with_saes = [hook for hook in hooks if not hook.startswith("attn_z")]  # its activation alone: attn_out is a linear function of it
    there = {chosen.hook_point: sae} | {hook: _alike(lab, hook, sae) for hook in with_saes if lab.of(hook)}
    lacking = [hook for hook in with_saes if hook not in there]
    if lacking:
        made = lab.train("earlier", lacking, [sae.width], _topk(lab, chosen, sae), lab.train_tokens)
        there |= {subject.hook_point: subject for subject in made.values()}
    recorded = lab.record([chosen.hook_point, *hooks])
    part = Part("earlier_layers", lab.key(*there.values(), hooks=hooks), _predict, (recorded, chosen.hook_point, there, lab.replicates, lab.seed))
    table = lab.run([part])[0].assign(hook_point=chosen.hook_point)
    findings = Findings("earlier_layers", part.key, pd.DataFrame({"sae": [sae.name]}), tables={"earlier_layers": table})
    free = table[~table["by_definition"]]
    for row in free[free["part"] == "reconstruction"].itertuples():
        findings.numbers[f"r2_{_ascii(row.target)}_from_reconstruction/{row.source}"] = row.r2
    residuals = {chosen.hook_point: {sae.name: chosen.results[sae.name]}}
    for hook, other in there.items():
        if hook.startswith("resid_post") and hook != chosen.hook_point:
            residuals[hook] = regressions(lab, hook, {other.name: other})
    subjects = {subject.name: subject for subject in there.values()}
    findings.tables["layers"] = pd.concat([regression_table(lab, subjects, found) for found in residuals.values()], ignore_index=True)
    if findings.tables["layers"]["layer"].nunique() > 1:
        findings.figures["layers"] = figures.r2_per_layer(findings.tables["layers"], f"{_model(lab)} · width {sae.width:,}")
    findings.figures["earlier_layers"] = figures_parts.earlier_layer_bars(table, title=f"{_model(lab)} · {sae.name}")
    return findings


def _earlier(lab: Lab, hook_point: str) -> list[str]:
    """The previous residual, and this layer's MLP and attention output and the attention's own, as far as the model has them."""
    kinds, layer = lab.plan.facts.kinds, int(hook_point.split(".")[1])
    previous = f"resid_post.{layer - 1}" if layer else "resid_pre.0"
    hooks = [previous] + [f"{kind}.{layer}" for kind in ("mlp_out", "attn_out", "attn_z") if kind in kinds]
    return [hook for hook in hooks if hook != hook_point]


def _alike(lab: Lab, hook_point: str, sae: Subject) -> Subject:
    """The study's SAE at `hook_point` that is most like `sae` in width, then in L0."""
    l0 = float(sae.metrics.get("l0", 1))
    return min(lab.of(hook_point).values(), key=lambda other: (abs(np.log(other.width / sae.width)), abs(float(other.metrics.get("l0", 1)) - l0)))


def _predict(recorded: Recorded, target: str, saes: Mapping[str, Subject], replicates: int, seed: int) -> pd.DataFrame:
    return predict_errors(recorded.open(), target, {hook: sae.load() for hook, sae in saes.items()}, None, replicates, seed)


# ---------------------------------------------------------------- all of them


ANALYSES: dict[str, Callable[[Lab], Findings]] = {
    "pursuit": pursuit,  # before error_regression, whose breakdown shows what it found
    "error_regression": error_regression,
    "per_token_scaling": per_token_scaling,
    "introduced_error": introduced_error,
    "downstream_loss": downstream_loss,
    "error_saes": error_saes,
    "earlier_layers": earlier_layers,
}


def carry_out(lab: Lab, analysis: str) -> Findings:
    """Works an analysis out, writes its tables and figures and logs it to MLflow."""
    findings = ANALYSES[analysis](lab)
    findings.files += lab.save(analysis, findings.tables, findings.figures)
    lab.track(analysis, findings.key, findings.numbers, findings.per_sae, findings.files)
    return findings


def run(config: AnalysisConfig, given: Mapping[str, Any], analysis: str) -> int:
    """A job of one analysis; the exit code."""
    lab = Lab(config, given)
    print(f"Study {lab.study}: {len(lab.saes)} SAEs at {', '.join(lab.hook_points)}", flush=True)
    findings = carry_out(lab, analysis)
    for note in findings.notes:
        print(f"Note: {note}")
    for name, value in findings.numbers.items():
        print(f"  {name:<40} {value:.4g}")
    print(f"Tables and figures: {lab.folder / analysis}\nMLflow: experiment '{config.tracking.experiment}' at {lab.sweep.tracking.uri}")
    return 0


def run_all(config: AnalysisConfig, given: Mapping[str, Any]) -> int:
    """The job of all analyses and their report; the exit code."""
    began = time.monotonic()
    lab = Lab(config, given)
    print(f"Study {lab.study}: {len(lab.saes)} SAEs at {', '.join(lab.hook_points)}", flush=True)
    lab.record(list(dict.fromkeys([*lab.hook_points, *_earlier(lab, main_hook_point(lab))])))  # one pass of the language model for all of them
    found: dict[str, Findings] = {}
    for analysis in ANALYSES:
        started = time.monotonic()
        found[analysis] = carry_out(lab, analysis)
        print(f"{analysis}: {time.monotonic() - started:.0f} s", flush=True)
    tables = {analysis: findings.tables for analysis, findings in found.items()}
    claims = decide(tables)
    spec = lab.plan.evaluation
    facts = [
        f"study {lab.study}", f"model {_model(lab)}", f"text {lab.plan.config.text.source}", f"{len(lab.saes)} SAEs at {', '.join(lab.hook_points)}",
        f"{lab.shards * spec.rows_per_shard:,} held-out tokens for A, B and C", f"context {spec.context_length}, first {spec.skip_positions} skipped",
    ]  # fmt: skip
    report = write_report(
        lab.folder / "report.html", "The dark matter of sparse autoencoders", facts, claims, tables,
        {analysis: [file for file in findings.files if file.suffix == ".png"] for analysis, findings in found.items()},
        {analysis: findings.notes for analysis, findings in found.items()}, lab.warning,
    )  # fmt: skip
    numbers = {f"claims/{verdict.replace(' ', '_')}": float(sum(claim.verdict == verdict for claim in claims)) for verdict in (HOLDS, FAILS, UNTOLD)}
    keys = [findings.key for findings in found.values()]
    lab.track("dark_matter", keys, numbers, pd.DataFrame({"sae": []}), [report])
    for claim in claims:
        print(f"  {claim.verdict:<20} {claim.text}")
    minutes = (time.monotonic() - began) / 60
    print(f"Report: {report}\nMLflow: experiment '{config.tracking.experiment}' at {lab.sweep.tracking.uri}\n{minutes:.1f} minutes in all")
    return 0


# ---------------------------------------------------------------- small parts


def _ascii(target: str) -> str:
    return {"e": "error", "ê": "linear", "ε": "nonlinear"}[target]


def _topk(lab: Lab, chosen: Shown, sae: Subject) -> SAEConfig:
    """A TopK SAE of the width and L0 of `sae`."""
    l0 = float(chosen.table.set_index("sae").loc[sae.name, "l0"])
    k = min(sae.width, max(1, round(l0)))
    return SAEConfig(architecture="topk", hook_point=sae.hook_point, width=sae.width, k=k, learning_rate=lab.sweep.learning_rates[0])


def _model(lab: Lab) -> str:
    return Path(lab.plan.config.model.name).name


def _where(lab: Lab, chosen: Shown) -> str:
    return f"{_model(lab)} · {chosen.hook_point} · L0 {chosen.table['l0'].median():.3g}"


def _named(name: str, hook_point: str, lab: Lab) -> str:
    return name if len(lab.hook_points) == 1 else f"{name}_{hook_point}"


def _with_index(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename_axis("noise").reset_index()
