"""A text on which the language model gives NaN.

Either the sweep stops and names shard and contexts, or every SAE passes over the shard, whatever dies.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from raysae.commands.parse import parse
from raysae.config import SweepConfig
from raysae.storage import unsealed
from raysae.study.plan import plan
from raysae.text.contexts import is_held_out
from tests.faults.harness import BATCH, SHARD_ROWS, Sweep, assert_same, materials

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]
BAD = 2  # Index of the bad shard
KNOBS = {"evaluation.predicted_tokens": 0, "text.max_documents": 1200, "stream.bad_shards": "skip"}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Materials whose first document has a token with a NaN embedding."""
    folder = tmp_path_factory.mktemp("poisoned")
    materials(folder)
    tokens = AutoTokenizer.from_pretrained(folder / "model").get_vocab()
    weights = load_file(folder / "model" / "model.safetensors")
    embedding = next(weights[key] for key in weights if key.endswith("embed_tokens.weight"))
    embedding[[number for token, number in tokens.items() if "7" in token]] = float("nan")
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    document = next(
        text
        for n in itertools.count()
        if not is_held_out(text := "7" + " oh" * n, SweepConfig().text.evaluation_fraction)
    )
    text = folder / "text.txt"
    text.write_text(f"{document}\n<|end|>\n{text.read_text()}")
    return folder


@pytest.fixture(scope="module")
def knobs(poisoned: Path) -> dict[str, object]:
    """KNOBS with a seed that puts context 0, the document's, into the shard `BAD`."""
    settled = plan(parse(SweepConfig, Sweep("local", poisoned, poisoned / "plan", KNOBS).arguments(), "")[0])
    specs = ((seed, settled.training.model_copy(update={"seed": seed})) for seed in itertools.count())
    return KNOBS | {"stream.seed": next(seed for seed, spec in specs if 0 in spec.contexts_of(BAD))}


@pytest.fixture
def sweep(cluster: str, poisoned: Path, knobs: dict[str, object], tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    started: list[Sweep] = []

    def start(**further: object) -> Sweep:
        started.append(Sweep(cluster, poisoned, tmp_path / str(len(started)), knobs | further))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_skipped_by_every_sae_alike_whatever_dies(sweep: Callable[..., Sweep]) -> None:
    calm = sweep()
    calm.finish()
    stormy = sweep()
    stormy.until((stormy.place / "skipped.json").exists)
    stormy.kill("queue")
    stormy.until_share(0.5)  # Every SAE is beyond the bad shard
    stormy.kill("driver")
    stormy.start()
    stormy.kill("trainer")
    stormy.finish()
    assert_same(stormy, calm)
    noted = unsealed((stormy.place / "skipped.json").read_bytes(), "skipped.json")
    assert list(noted["train"]) == [str(BAD)]
    assert 0 in noted["train"][str(BAD)]["contexts"]
    assert "resid_post.0 are NaN or infinite in contexts 0. " in noted["train"][str(BAD)]["reason"]
    assert f"Skipped: shard {BAD} of the train stream" in stormy.log()
    reports = json.loads(next((calm.place / "saes").glob("*/outcome.json")).read_text())["reports"]
    assert reports[-1]["tokens"] == 6 * SHARD_ROWS
    silent = [r for r in reports if BAD * SHARD_ROWS + BATCH < r["tokens"] <= (BAD + 1) * SHARD_ROWS]
    assert silent
    assert all("loss" not in report for report in silent[1:]), "nothing was learnt meanwhile"


@pytest.mark.long
def test_stops_with_a_sentence(sweep: Callable[..., Sweep]) -> None:
    ours = sweep(stream__bad_shards="stop")
    assert ours.driver.wait(240) == 1, ours.log()
    words = " ".join(ours.log().split())
    found = re.search(
        rf"at step \d+: shard {BAD} of the train stream .*?NaN or infinite in contexts 0\. "
        r"Its contexts are \d+, .* and 248 more",
        words,
    )
    assert found, words[-3000:]
    assert re.search(
        r"SAEs that have not come to their end go on with: \S*python jobs/scaling_sweep.py .*--resume study ", words
    )
    assert list((ours.place / "checkpoints").glob("*/*.safetensors"))
