"""The sweep and the analyses against values of an independent implementation.

Language model and text are real.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.integration.job import arguments, run
from tests.integration.test_dark_matter import analyse

# FVU of TopK, k = 16, at resid_post.2 of stories260K on TinyStories. Context 128, first 8 positions skipped, Adam 1e-3,
# 800 steps of 2,048 rows. The independent implementation does not clip gradients. Without clipping our FVU is 0.145,
# 0.099, 0.080. Where activations are not scaled either, it is 0.149, 0.101, 0.083. With the default clipping it is
# 0.138, 0.090, 0.066.
FVU = {128: 0.15, 512: 0.11, 2048: 0.09}
# The independent implementation's analyses of these SAEs give these values. The comments hold ours, without clipping.
# Our nonlinear FVU is lower, as FVU itself is. ε is 0.75, 0.85 and 0.89 of our error, and 0.73, 0.83 and 0.88 of
# theirs.
LINEAR_R2 = {128: 0.27, 512: 0.17, 2048: 0.12}  # R² of e from x, mean over dimensions: 0.257, 0.156, 0.109
NORM_R2 = {128: 0.63, 512: 0.55, 2048: 0.47}  # R² of ‖e‖² from x: 0.659, 0.564, 0.456
NONLINEAR_FVU = {128: 0.113, 512: 0.093, 2048: 0.082}  # Ours: 0.109, 0.085, 0.072
ON_THE_SAME_TOKENS = {(128, 512): 0.78, (512, 2048): 0.82}  # Squared correlation of ‖e‖: 0.765, 0.808


@pytest.fixture(scope="module")
def swept(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    knobs = {
        "stream.epochs": 2,
        "widths": "128,512,2048",
        "k": "16",
        "train.batch": 2048,
        "train.tokens": 800 * 2048,
        "evaluation.rows": 100_000,
    }
    knobs["train.clip_norm"] = 1e9
    done = run(arguments(shared_data, folder, **knobs), timeout=850)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fvu_is_that_of_an_independent_implementation(swept: Path) -> None:
    fvu = pd.read_csv(swept / "runs/test/summary/summary.csv").set_index("width")["fvu"]
    for width, expected in FVU.items():
        assert fvu[width] == pytest.approx(expected, rel=0.25)
    assert fvu[2048] < fvu[512] < fvu[128]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_analyses_give_what_an_independent_implementation_gives(swept: Path) -> None:
    for job, more in (("error_regression", ["--half_trained", "false"]), ("per_token_scaling", [])):
        done = analyse(job, swept, *more, timeout=400)
        assert done.returncode == 0, done.stderr
    results = swept / "runs/test/analysis"
    found = pd.read_parquet(results / "error_regression/regressions.parquet").set_index("width")
    for column, expected, within in (
        ("r2_error", LINEAR_R2, 0.03),
        ("r2_error_norm", NORM_R2, 0.05),
        ("nonlinear_fvu", NONLINEAR_FVU, 0.02),
    ):
        assert found[column].to_dict() == pytest.approx(expected, abs=within)
    pairs = pd.read_parquet(results / "per_token_scaling/pairs.parquet").set_index(["small_width", "large_width"])[
        "squared_correlation"
    ]
    for widths, expected in ON_THE_SAME_TOKENS.items():
        assert pairs[widths] == pytest.approx(expected, abs=0.03)
