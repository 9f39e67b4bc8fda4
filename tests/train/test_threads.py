"""Another number of threads gives an SAE other bits, and the same quality. See docs/determinism.md."""

import json

import pytest
import torch

from raysae.config import EvaluationConfig, TrainConfig
from raysae.sae.files import load_sae
from raysae.train.loop import Loop
from tests.train.synthetic import SPEC, ArraySource, D, config

TRAIN = TrainConfig(tokens=512 * 150, batch=512, reports=1, checkpoint_seconds=1e6)
EVALUATION = EvaluationConfig(rows=4096, interim_rows=4096)
SAES = [config(architecture, width=256, seed=3) for architecture in ("topk", "batchtopk", "jumprelu")]
# Relative tolerance for FVU and L0. This short run differed by less than 1e-8, with weights up to 2e-7 apart.
TOLERANCE = 0.001


@pytest.fixture(scope="module")
def trained_with(tmp_path_factory):
    """Folders of the same SAEs, trained twice with one thread and once with two."""
    folders = {}
    before = torch.get_num_threads()
    source = ArraySource(TRAIN, EVALUATION)
    for name, threads in (("one", 1), ("again", 1), ("two", 2)):
        folders[name] = tmp_path_factory.mktemp(name)
        torch.set_num_threads(threads)
        loop = Loop(str(folders[name]), D, SPEC, TRAIN, EVALUATION, source)
        for sae in SAES:
            loop.add(sae)
        loop.run()
    torch.set_num_threads(before)
    return folders


def outcome(folder, name: str) -> dict:
    return json.loads((folder / "saes" / name / "outcome.json").read_text())


@pytest.mark.parametrize("sae", SAES, ids=lambda sae: sae.architecture)
def test_the_quality_does_not_depend_on_the_threads(trained_with, sae):
    one, two = (outcome(trained_with[name], sae.name)["reports"][-1] for name in ("one", "two"))
    assert one["fvu"] < 0.5, "the SAE has learnt something"
    assert two["fvu"] == pytest.approx(one["fvu"], rel=TOLERANCE)
    assert two["l0"] == pytest.approx(one["l0"], rel=TOLERANCE)


@pytest.mark.parametrize("sae", SAES, ids=lambda sae: sae.architecture)
def test_equal_threads_give_equal_bits_and_others_are_in_the_fingerprint(trained_with, sae):
    one, again = (load_sae(trained_with[name] / "saes" / sae.name).state_dict() for name in ("one", "again"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    facts = [
        json.loads((trained_with[name] / "saes" / sae.name / "cfg.json").read_text())["metadata"]["fingerprint"]
        for name in ("one", "two")
    ]
    assert [each["threads"] for each in facts] == [1, 2]
