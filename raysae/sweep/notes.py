"""What a reader of a sweep's numbers must know of the rows behind them, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from raysae.config import EvaluationConfig
from raysae.stream.spec import ActivationSpec

if TYPE_CHECKING:
    import pandas as pd

SPOILT = 0.1  # Share of the variance in the largest 0.1 % of the rows above which FVU says little of the others
OFF = 0.05  # Relative difference from FVU above which the FVU without outliers is shown


def outliers_told(hook_point: str, report: Mapping[str, object], outlier_norm: float) -> str | None:
    """What outliers do to the FVU in an SAE's `report`, or None where it is sound."""
    share = report.get("largest_rows_share") or 0
    if not share > SPOILT:
        return None
    return (
        f"{hook_point}: the largest 0.1 % of the rows hold {share:.0%} of the variance, so fvu says little of the "
        f"others. fvu_inliers is without rows of more than {outlier_norm:g} times the median norm. "
        f"--stream.leave_out_norm {outlier_norm:g} leaves them out of training too"
    )


def left_out_note(stream: Mapping[str, float], spec: ActivationSpec) -> Iterator[str]:
    """How many rows of the training stream were left out, of those that did not come from the cache.

    `stream` are the queue's statistics.
    """
    if left_out := stream["rows_left_out"]:
        share = left_out / (stream["contexts_forwarded"] / spec.shard_contexts * spec.rows_per_shard)
        yield f"{share:.2%} of the rows were left out. Other rows of their shards took their places, and so came twice."


def held_out_notes(results: pd.DataFrame, evaluation: EvaluationConfig) -> Iterator[str]:
    """Sentences about outliers, and about fewer held-out rows than `evaluation.rows`, by hook point.

    `results` has a row per SAE, with the numbers of its last report.
    """
    if not {"final", "evaluation_rows"} <= set(results.columns):
        return
    for hook, group in results[results["final"] == True].groupby("hook_point"):  # noqa: E712  NaN is neither
        if told := outliers_told(str(hook), group.iloc[0].to_dict(), evaluation.outlier_norm):
            yield f"{told}."
        rows = int(group["evaluation_rows"].min())
        if rows < evaluation.rows:
            wider = (evaluation.rows / rows) ** 0.5 - 1
            yield (
                f"{hook}: {rows:,} held-out rows of the {evaluation.rows:,} wanted, since shards were skipped. The "
                f"random error of fvu is larger by about {wider:.0%}, and more latents look dead."
            )
