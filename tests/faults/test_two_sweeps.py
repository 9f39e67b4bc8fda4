"""Two sweeps run at once on one cluster and one activation cache. One of them is disturbed.

Both leave what they leave alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.faults.harness import SHARD_ROWS, Sweep, assert_same

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]


@pytest.mark.long
def test_two_sweeps_share_cluster_and_cache(
    sweep: Callable[..., Sweep], undisturbed: Callable[..., Sweep], tmp_path: Path
) -> None:
    knobs = {"stream__cache": "on", "stream__cache_dir": tmp_path / "cache"}
    one = sweep(**knobs)
    other = sweep(**knobs, widths=96)
    other.until_share(0.2)
    other.kill("producer")
    other.kill("queue")
    for each in (one, other):
        each.finish()
    assert_same(one, undisturbed())
    assert_same(other, undisturbed(widths=96))
    cached = sorted((tmp_path / "cache").rglob("*.safetensors"))
    # Six shards of the training stream and one of the held-out one. Each is there once although four language models
    # wrote them.
    assert len(cached) == 7
    for path in cached:
        with safe_open(path, "np") as file:
            assert file.get_tensor("rows").shape == (SHARD_ROWS, 32)
