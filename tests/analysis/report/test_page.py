"""The report's page has every warning, and numbers whose intervals are paired."""

import numpy as np
import pandas as pd

from raysae.analysis.instruments.intervals import with_intervals
from raysae.analysis.report.page import Paper, write_report


def page(tmp_path, table: pd.DataFrame, warnings: list[str]) -> str:
    paper = Paper(
        "Title", {"a": ("Heading", "Question")}, {}, [("R²", "a", "t", "r2", "0.5")], lambda *_: [], "Reading"
    )
    return write_report(tmp_path / "r.html", paper, ["facts"], [], {"a": {"t": table}}, {}, {}, warnings).read_text()


def test_every_warning_is_on_the_page(tmp_path):
    text = page(tmp_path, pd.DataFrame(), ["too little <text>", "another stream"])
    assert text.count('<p class="warning">') == 2
    assert "too little &lt;text&gt;" in text
    assert text.index("another stream") < text.index("Claims of the paper")
    assert "warning" not in page(tmp_path, pd.DataFrame(), []).partition("</style>")[2]


def test_a_median_over_saes_has_a_paired_interval(tmp_path):
    """Of three SAEs two take turns around the third: the median does not move, while the medians of the ends do."""
    swing = np.array([0, *([1, -1] * 20)])
    rows = [with_intervals({"r2": 0.5 + sign * 0.2 * swing}, 40) for sign in (-1, 0, 1)]
    assert "0.500 [0.500, 0.500]" in page(tmp_path, pd.DataFrame(rows), [])
    few = [with_intervals({"r2": np.full(6, 0.5)}, 5)]
    assert "0.500 [–, –]" in page(tmp_path, pd.DataFrame(few), [])
