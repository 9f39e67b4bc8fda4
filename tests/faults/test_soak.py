"""A killer strikes a sweep at random for a given time. At the end all is as if nothing had happened.

`make faults` runs it for ten minutes with each of three seeds. This replays one:

    SOAK_SECONDS=600 SOAK_SEEDS=2 pytest tests/faults/test_soak.py -s
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest

from tests.faults.harness import PATIENCE, SHARD_ROWS, Killer, Sweep, assert_same

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]
SECONDS = float(os.environ.get("SOAK_SECONDS", 30))
SEEDS = [int(seed) for seed in os.environ.get("SOAK_SEEDS", "1").split(",")]
STRIKES_PER_SHARD = 20  # Attempts per shard. This test is not about their limit.
DEATHS = 1000  # Deaths of producers. This test is not about their limit either.
# Tokens of the sweep, as a multiple of those it could train on in SECONDS if nobody disturbed it. Under strikes it gets
# half as far.
MARGIN = 0.4
# Most contexts forwarded since the queue's last start, as a multiple of those needed. At each death trainers go back by
# a checkpoint's age.
MOST_WORK = 3


@pytest.mark.parametrize("seed", SEEDS)
def test_soak(seed: int, sweep: Callable[..., Sweep], undisturbed: Callable[..., Sweep]) -> None:
    print(f"\nsoak: SOAK_SECONDS={SECONDS:g} SOAK_SEEDS={seed} replays it", flush=True)
    pace = undisturbed().number("tokens_per_second")  # The pace of this machine
    tokens = math.ceil(max(16, MARGIN * SECONDS * pace / SHARD_ROWS)) * SHARD_ROWS
    knobs = {"train__tokens": tokens, "stream__epochs": 1 + tokens // (10 * SHARD_ROWS)}
    faults = {"faults__hang_seconds": 8, "faults__producer_deaths": DEATHS, "faults__shard_attempts": STRIKES_PER_SHARD}
    ours = sweep(**knobs, **faults)
    ours.wait_for("trainer")
    killer = Killer(ours, seed, SECONDS)
    killer.start()
    killer.check()
    assert killer.outlived, f"the sweep ended before {SECONDS:g} s were over: {tokens} tokens are too few"
    assert len(killer.strikes) >= SECONDS / 15
    ours.finish(3 * PATIENCE)
    calm = undisturbed(**knobs)
    assert_same(ours, calm)
    needed = calm.number("stream/contexts_needed")
    assert calm.number("stream/contexts_forwarded") >= needed
    assert ours.number("stream/contexts_forwarded") <= MOST_WORK * needed
