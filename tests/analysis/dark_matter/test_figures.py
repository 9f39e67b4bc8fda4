"""Figures from small tables. They draw what the tables say, name their axes, and reach their files."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from raysae.analysis.dark_matter.error_parts import breakdown_figure, taken_apart
from raysae.analysis.dark_matter.error_regression import (
    baselines_per_layer,
    contours,
    loadings,
    norm_prediction,
    r2_per_layer,
)
from raysae.analysis.dark_matter.introduced_error import introduced_error_figure
from raysae.analysis.dark_matter.measures.breakdown import breakdown, fit_power_law, nonlinear_level
from raysae.analysis.dark_matter.measures.error_regression import BASELINES, FEWEST_ACTIVE, NORMS, error_regression
from raysae.analysis.dark_matter.measures.introduced_error import introduced_error
from raysae.analysis.dark_matter.measures.per_token_scaling import per_token_scaling, token_lines
from raysae.analysis.dark_matter.per_token_scaling import pair_maps, token_lines_figure
from raysae.analysis.dark_matter.probes import largest_group
from raysae.analysis.instruments.plots import save
from raysae.config import UserError
from tests.analysis.planted import HOOK, activations, sae

WIDTHS = np.array([256, 512, 1024, 2048, 4096, 8192])
SAES = {"narrow": sae(16, seed=2), "middle": sae(32, seed=3), "wide": sae(64, seed=1)}


@pytest.fixture(scope="module")
def results():
    return error_regression(activations(), HOOK, SAES, replicates=5)


def labelled(figure) -> None:
    """Asserts that every panel names its x axis, except colour bars and the correlation table."""
    panels = [
        ax
        for ax in figure.axes
        if ax.get_label() != "<colorbar>" and ax.axison and not ax.get_title().startswith("correlation")
    ]
    assert panels
    assert all(ax.get_xlabel() for ax in panels)


@pytest.mark.parametrize("pursuit", [True, False])
def test_breakdown(tmp_path, pursuit):
    table = pd.DataFrame({"width": WIDTHS, "fvu": 0.09 + 3 * WIDTHS**-0.6, "nonlinear_fvu": np.linspace(0.1, 0.07, 6)})
    if pursuit:
        table["encoder_share"] = [0.1, 0.2, 0.1, -0.1, 0.3, 0.2]  # Pursuit may do worse
    law = fit_power_law(table["width"], table["fvu"])
    parts = breakdown(table, law)
    assert 0 < parts["stacks"].sum() < 6
    figure = breakdown_figure(parts, law, nonlinear_level(WIDTHS, table["nonlinear_fvu"], table["fvu"]), "planted")
    bars = [bar for container in figure.axes[1].containers for bar in container]
    tops = {}
    for bar in bars:
        tops[bar.get_x()] = max(tops.get(bar.get_x(), 0), bar.get_y() + bar.get_height())
    np.testing.assert_allclose(sorted(tops.values(), reverse=True), parts["fvu"], rtol=1e-6)
    drawn = max(np.max(line.get_xdata()) for line in figure.axes[0].get_lines())
    assert drawn == pytest.approx(81920), "the fit goes on to ten times the widest SAE"
    names = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert ("encoder error" in names) == pursuit
    assert "linear or absent (not told apart)" in names
    labelled(figure)
    files = save(figure, tmp_path / "deep" / "breakdown", pdf=True)
    assert [file.suffix for file in files] == [".png", ".pdf"]
    assert all(file.stat().st_size > 5000 for file in files)


@pytest.mark.parametrize(
    ("fvu", "nonlinear", "encoder"),
    [
        ([0.3, 0.2, 0.16, 0.12, 0.11, 0.1], [0.2, 0.15, 0.1, 0.08, 0.07, 0.06], -0.2),  # Pursuit does worse
        ([0.3, 0.2, 0.1, 0.14, 0.12, 0.12], [0.02, 0.02, 0.02, 0.02, 0.02, 0.02], 0.1),  # c lies above an FVU
        ([0.3, 0.2, 0.16, 0.12, 0.11, 0.1], [0.31, 0.22, 0.17, 0.13, 0.12, 0.11], 0.1),  # The probe does harm
    ],
)
def test_the_stack_never_exceeds_the_fvu(fvu, nonlinear, encoder):
    table = pd.DataFrame({"width": WIDTHS, "fvu": fvu, "nonlinear_fvu": nonlinear, "encoder_share": encoder})
    parts, law, level = taken_apart(table)
    tops = np.zeros(6)
    for container in breakdown_figure(parts, law, level).axes[1].containers:
        for i, bar in enumerate(container):
            assert bar.get_height() >= -1e-9
            tops[i] = max(tops[i], bar.get_y() + bar.get_height())
    np.testing.assert_allclose(tops, parts["fvu"])


def test_a_warning_is_on_the_figure():
    table = pd.DataFrame({"width": WIDTHS[:4], "fvu": 0.05 + 3 * WIDTHS[:4] ** -0.6, "nonlinear_fvu": 0.03})
    law = fit_power_law(table["width"], table["fvu"])
    figure = breakdown_figure(
        breakdown(table, law), law, nonlinear_level(table["width"], table["nonlinear_fvu"], table["fvu"])
    )
    assert "4 widths over 8×" in figure.get_supxlabel()


def test_contours():
    width, l0 = (values.ravel() for values in np.meshgrid(WIDTHS, [8, 16, 32]))
    table = pd.DataFrame(
        {"width": width, "l0": l0, "nonlinear_fvu": 1 / l0, "r2_error": 1 / width, "r2_error_norm": 0.5 + 1 / width}
    )
    figure = contours(table)
    labelled(figure)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["8", "16", "32"]
    silent, undefined = table.iloc[[0]].assign(l0=0.0), table.iloc[[1]].assign(r2_error=np.nan)
    with_both = pd.concat([table.iloc[2:], silent, undefined])
    assert len(contours(with_both).axes[0].get_lines()[0].get_xdata()) == len(table) - 2


@pytest.mark.parametrize(
    ("width", "l0"),
    [
        ([256, 512, 1024], [8, 8, 8]),
        ([256, 256, 256], [8, 16, 32]),
        ([256, 512], [8, 16]),
        ([256, 512, 1024], [8, 16, 32]),  # The points lie on a line
        ([256, 512, 1024], [8, 8.0001, 8]),  # TopK SAEs of one k, one of them with a dead latent
        ([256, 512, 512], [8, 16, 0]),
        ([256, 512, 512], [8, 16, np.nan]),
    ],
)
def test_contours_need_points_that_span_a_plane(width, l0):
    table = pd.DataFrame({"width": width, "l0": l0, "nonlinear_fvu": 0.1, "r2_error": 0.5, "r2_error_norm": 0.9})
    with pytest.raises(UserError, match="at least two widths"):
        contours(table)


def test_layers():
    table = pd.DataFrame({"layer": [0, 0, 1], "r2_error": [0.2, 0.4, 0.5], "r2_error_norm": [0.8, 0.6, 0.9]})
    ax = r2_per_layer(table).axes[0]
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.get_lines()}
    assert lines["R² of ‖e‖² from x"] == pytest.approx([0.7, 0.9])
    assert lines["R² of e from x (mean over dimensions)"] == pytest.approx([0.3, 0.5])


def test_norm_prediction_and_loadings(results):
    table = pd.DataFrame([result.row() for result in results.values()])
    figure = norm_prediction(table.drop(columns="r2_error_norm_from_token_loss"))
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == list(NORMS)
    assert [tick.get_text() for tick in right.get_xticklabels()] == [name for name in BASELINES if name != "token loss"]
    labelled(figure)
    scatter = loadings(results).axes
    assert len(scatter) == 3
    points = scatter[2].collections[0].get_offsets()
    often = results["wide"].active_rows >= FEWEST_ACTIVE
    assert 10 < len(points) == int(often.sum())
    order = results["wide"].mean_active[often].argsort()
    np.testing.assert_allclose(points[:, 1], results["wide"].loading[often][order])
    values = scatter[2].get_lines()[1].get_ydata()
    assert (np.diff(values) >= 0).all(), "latents come by ascending mean value"


def test_baselines_per_layer():
    columns = dict.fromkeys(BASELINES.values(), 0.5) | {"r2_error_norm": [0.8, 0.6, 0.9]}
    ax = baselines_per_layer(pd.DataFrame({"layer": [0, 0, 1]} | columns)).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert set(BASELINES) <= set(lines)
    assert lines["x"] == pytest.approx([0.7, 0.9])


def test_figures_compare_saes_of_one_kind():
    kinds = ["topk, learning rate 0.001, seed 0"] * 3 + ["topk, learning rate 0.001, seed 1"] * 4 + ["relu"] * 2
    table = pd.DataFrame({"alike": kinds, "width": [1, 2, 3, 1, 1, 2, 2, 1, 2], "fvu": range(9)})
    assert largest_group(table)["fvu"].tolist() == [0, 1, 2], "most widths come before most SAEs"


def test_loadings_leave_out_saes_that_are_hardly_active(results):
    silent = replace(results["wide"], active_rows=torch.zeros_like(results["wide"].active_rows))
    assert len(loadings({"silent": silent} | results).axes) == 3
    assert len(loadings({"silent": silent, "narrow": results["narrow"]}).axes) == 1
    with pytest.raises(UserError, match="no SAE has one"):
        loadings({"silent": silent})


def test_lines_and_pairs(results, tmp_path):
    probes = {name: result.probe for name, result in results.items()}
    lines = token_lines(activations(), HOOK, SAES, probes, tokens=18)
    figure = token_lines_figure(lines, [" a", "\n", "$x$", *["w"] * 15], magnified=(0, 4))
    assert [tick.get_text() for tick in figure.axes[3].get_xticklabels()] == ["␣a", "⏎", r"\$x\$", "w"]
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), lines[lines["sae"] == "narrow"]["error"])
    save(figure, tmp_path / "lines")
    pairs = per_token_scaling(activations(), HOOK, SAES, probes, replicates=5)
    shown = pair_maps(pairs).axes[0].images[0].get_array()
    assert shown[0, 1] == pytest.approx(pairs[(pairs["small"] == "narrow") & (pairs["large"] == "wide")]["r2"].item())
    assert np.ma.getmaskarray(shown)[1, 0] or np.isnan(shown[1, 0])


def test_introduced_error(tmp_path):
    found = introduced_error(activations(), HOOK, SAES["wide"], ablated=(0.0, 0.5))
    figure = introduced_error_figure(found.grid, found.table, found.closed_form, found.unit)
    shown = figure.axes[0].images[0].get_array()
    cell = found.grid[(found.grid["ablated"] == 0) & (found.grid["sigma_x"] == 4) & (found.grid["sigma_r"] == 1)]
    assert shown[1, 4] == pytest.approx(cell["linear"].item())
    labelled(figure)
    assert save(figure, tmp_path / "introduced")[0].exists()
