"""A sweep under a killer that strikes at random for as long as it is told to: at the end all is as if nothing had happened.

`make faults` runs it for ten minutes with each of three seeds. `SOAK_SECONDS=600 SOAK_SEEDS=2 pytest tests/faults/test_soak.py -s` replays one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.faults.harness import SHARD_ROWS, Killer, Sweep, assert_same

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]
SECONDS = float(os.environ.get("SOAK_SECONDS", 30))
SEEDS = [int(seed) for seed in os.environ.get("SOAK_SEEDS", "1").split(",")]
STRIKES_PER_SHARD = 20  # that a killer may have on the same shard, and
DEATHS = 1000  # that it may cause among producers: neither is what this test is about


@pytest.mark.parametrize("seed", SEEDS)
def test_soak(seed: int, sweep: Callable[..., Sweep], undisturbed: Callable[..., Sweep]) -> None:
    print(f"\nsoak: SOAK_SECONDS={SECONDS:g} SOAK_SEEDS={seed} replays it", flush=True)
    tokens = int(max(16, SECONDS / 6)) * SHARD_ROWS  # so that the run lasts for as long as the strikes, on a fast machine too
    knobs = {"train__tokens": tokens, "stream__epochs": 1 + tokens // (10 * SHARD_ROWS)}
    faults = {"faults__hang_seconds": 8, "faults__producer_deaths": DEATHS, "faults__shard_attempts": STRIKES_PER_SHARD}
    ours = sweep(**knobs, **faults)
    ours.wait_for("trainer")
    killer = Killer(ours, seed, SECONDS)
    killer.start()
    killer.check()
    assert len(killer.strikes) >= SECONDS / 15
    ours.finish(1800)
    assert_same(ours, undisturbed(**knobs))
