"""The figures of analyses 5 to 8 show what is in their tables."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from raysae.analysis.dark_matter.downstream_loss import ce_recovered
from raysae.analysis.dark_matter.earlier_layers import earlier_layer_bars
from raysae.analysis.dark_matter.error_parts import taken_apart
from raysae.analysis.dark_matter.error_saes import error_sae_bars
from raysae.analysis.dark_matter.measures.earlier_layers import BY_DEFINITION, TARGETS
from raysae.analysis.dark_matter.pursuit import pursued, pursuit_bars
from raysae.analysis.instruments.intervals import with_intervals
from raysae.analysis.instruments.plots import PAPER_WIDTH, SOURCE_PARTS, save


def with_ends(**numbers: float) -> dict[str, float]:
    return {
        key: value
        for name, v in numbers.items()
        for key, value in {name: v, f"{name}_low": v - 0.01, f"{name}_high": v + 0.01}.items()
    }


def heights(ax) -> list[float]:
    return [bar.get_height() for container in ax.containers for bar in container]


def test_ce_recovered(tmp_path):
    shares = {f"{kind}_share_{part}": 0.4 for kind in ("norm", "variance") for part in ("linear", "nonlinear")}
    rows = [
        {"width": w, "l0": 20 - w / 1000}
        | with_ends(recovered_linear=w / 10_000, recovered_nonlinear=w / 20_000, **shares)
        for w in (4096, 256)
    ]
    figure = ce_recovered(pd.DataFrame(rows), title="somewhere")
    linear, nonlinear = figure.axes
    assert heights(linear) == pytest.approx([2.56, 40.96])  # Percentages, narrow SAE first
    assert heights(nonlinear) == pytest.approx([1.28, 20.48])
    assert [label.get_text() for label in linear.get_xticklabels()] == ["256", "4,096"]
    assert linear.get_ylabel() == "%"
    by_l0 = ce_recovered(pd.DataFrame(rows), along="l0")
    assert heights(by_l0.axes[0]) == pytest.approx([40.96, 2.56])
    (file,) = save(figure, tmp_path / "ce")
    assert file.stat().st_size > 10_000
    assert figure.get_size_inches()[0] == PAPER_WIDTH


def test_error_sae_bars(tmp_path):
    values = {"error": 0.6, "linear": 0.3, "nonlinear": 0.5}
    table = pd.DataFrame(
        [
            {"kind": kind, "equal_l0": 16, "l0": 16.4, "dead_fraction": 0.02} | with_ends(fvu_equal_l0=value)
            for kind, value in reversed(values.items())
        ]
    )
    of_saes = pd.DataFrame(
        [
            {"kind": kind, "l0": 16.4, "dead_fraction": 0.01 * i, "fvu_equal_l0": value + 0.05 * (i - 1)}
            for kind, value in values.items()
            for i in range(3)
        ]
    )
    figure = error_sae_bars(table, of_saes, "somewhere")
    fvu, l0, dead = figure.axes
    assert heights(fvu) == pytest.approx(list(values.values()))  # In the order e, ê, ε
    assert fvu.get_ylabel() == "FVU at L0 16"
    assert heights(l0) == pytest.approx([16.4] * 3)
    assert heights(dead) == pytest.approx([2.0] * 3)
    assert fvu.get_lines()[2].get_ydata().tolist() == pytest.approx([0.45, 0.5, 0.55])
    assert fvu.get_ylim()[1] > 0.65
    assert save(figure, tmp_path / "errors")[0].exists()


def test_pursuit_bars(tmp_path):
    rows = [
        {"width": 512, "l0": 16} | with_ends(fvu=0.2, fvu_pursuit=0.15, nonlinear_fvu=0.1, nonlinear_fvu_pursuit=0.09)
    ]
    figure = pursuit_bars(pd.DataFrame(rows))
    assert [heights(ax) for ax in figure.axes] == [pytest.approx([0.2, 0.15]), pytest.approx([0.1, 0.09])]
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["-25 %", "-10 %"]
    assert save(figure, tmp_path / "pursuit")[0].exists()


def test_numbers_without_an_interval_are_drawn(tmp_path):
    """Fewer than 10 groups of documents give none."""
    numbers = {name: torch.full((6,), 0.1) for name in ("fvu", "fvu_pursuit", "nonlinear_fvu", "nonlinear_fvu_pursuit")}
    table = pd.DataFrame([{"width": 512} | with_intervals(numbers, 5)])
    figure = pursuit_bars(table)
    assert [heights(ax) for ax in figure.axes] == [pytest.approx([0.1, 0.1])] * 2
    assert save(figure, tmp_path / "pursuit")[0].exists()


def test_errors_after_pursuit_are_taken_apart():
    values = {"fvu": 0.2, "fvu_pursuit": 0.15, "nonlinear_fvu": 0.1, "nonlinear_fvu_pursuit": 0.09}
    numbers = {name: torch.full((41,), value, dtype=torch.float64) for name, value in values.items()}
    table = pd.DataFrame([{"width": width} | with_intervals(numbers, 40) for width in (1, 2, 4)])
    after = pursued(table)
    assert after["fvu"].tolist() == [0.15] * 3
    assert after["nonlinear_fvu_high"].tolist() == [0.09] * 3
    parts, law, _ = taken_apart(after.assign(fvu=[0.3, 0.2, 0.15]))
    assert law.warning
    assert parts["linear_gap"].tolist() == pytest.approx([0.21, 0.11, 0.06])


def test_earlier_layer_bars(tmp_path):
    rows = []
    for source, parts in {"resid_post.1": SOURCE_PARTS, "mlp_out.1": SOURCE_PARTS, "attn_z.1": ["activation"]}.items():
        for part in parts:
            for target in TARGETS:
                known = source == "resid_post.1" and (part, target) in BY_DEFINITION
                value = (
                    1
                    if known
                    else float("nan")
                    if (source, part) == ("mlp_out.1", "reconstruction")
                    else -0.1
                    if target == "e"
                    else 0.3
                )
                rows.append(
                    {"source": source, "part": part, "target": target, "by_definition": known} | with_ends(r2=value)
                )
    figure = earlier_layer_bars(pd.DataFrame(rows))
    assert len(figure.axes) == 3
    for ax in figure.axes:
        assert len(ax.patches) == 11
        assert sum(bool(bar.get_hatch()) for bar in ax.patches) == {"e": 1, "ê": 2, "ε": 1}[ax.get_title()[-1]]
    assert "-0.10" in {text.get_text() for text in figure.axes[0].texts}  # There is no bar, and still a number
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["resid_post.1", "mlp_out.1", "attn_z.1"]
    assert save(figure, tmp_path / "earlier")[0].exists()
