"""The planner's model of cost (benchmarks/plan.py): what it counts and fits."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raysae.config import ModelConfig
from raysae.lm.model import LanguageModel


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return importlib.import_module("plan")


def test_operations_of_a_language_model_are_those_that_torch_counts(plan: ModuleType):
    """Torch counts attention as if every position saw all others. That is twice the causal count."""
    context, layer = 64, 1
    model = LanguageModel.load(ModelConfig()).model
    # The counter does not know the CPU's fused attention
    model.set_attn_implementation("eager")
    body = model.base_model
    body.layers = body.layers[: layer + 1]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        body(input_ids=torch.zeros(1, context, dtype=torch.long), use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "bmm" in str(op))
    weights = sum(count for op, count in counts.items() if "bmm" not in str(op))
    lm, _ = plan.language_model("embedded", layer, context)
    # Weights of norms do not multiply matrices
    norms = 2 * sum(p.numel() for block in body.layers for p in block.parameters() if p.dim() == 1)
    assert attention > 0
    assert lm.operations - norms == pytest.approx((weights + attention / 2) / context)
    assert lm.d == model.config.hidden_size


PLANTED = np.array([2e-12, 0.0, 3e-11, 5e-10, 1e-4])


def test_a_planted_cost_is_found(plan: ModuleType):
    features = [plan.of_step(*sizes) for sizes in plan.STEPS]
    seconds = list(np.array(features) @ PLANTED)
    assert plan.fit(features, seconds) == pytest.approx(PLANTED, rel=1e-6, abs=1e-15)
    assert max(plan.errors_of(features, seconds)) < 1e-6


def test_the_error_of_a_prediction_is_that_of_a_fit_without_it(plan: ModuleType):
    within, without = plan.errors_of([[1.0], [1.0], [1.0]], [1.0, 1.0, 1.1])
    assert within < 0.09
    assert without == pytest.approx(1 - 1 / 1.1)


def test_devices_are_filled_by_hours_and_by_memory(plan: ModuleType):
    assert len(plan.devices_for([(0.1, 0.5)] * 4)) == 2  # Memory decides
    assert len(plan.devices_for([(0.4, 0.1)] * 4)) == 2  # Hours decide
    assert [list(device) for device in plan.devices_for([(0.5, 0.25), (0.5, 0.75)])] == [[1.0, 1.0]]
    # The first SAE needs more than a device, so nothing joins it
    assert len(plan.devices_for([(0.1, 1.5), (0.1, 0.1)])) == 2


@pytest.fixture
def planned(plan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that runs the script for the embedded model on a machine with planted costs.

    It takes knobs and returns what the script prints.
    """
    lm = [plan.of_lm(plan.language_model("embedded", layer, 256)[0]) for layer in range(3)]
    measured = {
        "threads": 2, "matmul": 3e11, "memory": 1e10,
        "lm": [{"features": row, "seconds": 1e-12 * row[0] + 1e-8 * row[1]} for row in lm],
        "steps": [{"sizes": sizes, "seconds": float(np.dot(plan.of_step(*sizes), PLANTED))} for sizes in plan.STEPS],
    }  # fmt: skip
    (tmp_path / "cost.json").write_text(json.dumps(measured))

    def run(**knobs: object) -> str:
        words = [word for name, value in knobs.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(
            sys, "argv", ["plan.py", "--measured", str(tmp_path / "cost.json"), "--model", "embedded", *words]
        )
        plan.main()
        return capsys.readouterr().out

    return run


def test_a_sweep_needs_devices_for_all_its_states_at_once(planned):
    """Weights, gradients and Adam of n = 2^20, d = 256 take 2·d·n·16 bytes, 8.6 GB.

    Eight fit into the usable part of an H100.
    """
    told = planned(widths=2**20, k=",".join(map(str, range(1, 21))), tokens=1e6, hours=1e6)
    assert "20 SAEs" in told
    assert "take 8.6 GB" in told
    assert "1 h100 for the language model, 3 for the SAEs" in told
    assert "An SAE's step is reckoned by profiles on an H200 with AuxK idle" in told
    assert "does not split" not in told


def test_what_a_step_costs_however_small(planned):
    """A fixed cost takes nearly all of a small SAE's step on a single token.

    It is 1e-4 s as planted here, and 7e-4 s on every GPU.
    """
    for device, right in (("here", 10_000), ("h100", 1 / 7e-4), ("a100", 1 / 7e-4)):
        rate = planned(widths=64, k=4, batch=1, device=device).split("n =        64:")[1].split("tokens/s")[0]
        assert float(rate.replace(",", "")) == pytest.approx(right, rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "milliseconds"),
    [((2304, 65536, 64, 8192), 9.79), ((2304, 65536, 64, 32768), 26.2), ((768, 24576, 32, 8192), 2.12)],
)
def test_the_cost_of_a_step_on_a_gpu_is_what_was_measured(
    plan: ModuleType, planned, tmp_path: Path, sizes, milliseconds
):
    """benchmarks/gpu_steps.py measured it on an H200.

    On other devices each term scales with the rate that it depends on.
    """
    planned(widths=64, k=4, device="here")  # Writes the measurements
    measured = json.loads((tmp_path / "cost.json").read_text())
    here, _ = plan.fitted(measured, None, 0.5)
    assert here.step == pytest.approx(PLANTED, rel=1e-6, abs=1e-15)
    h200, _ = plan.fitted(measured, plan.DEVICES["h200"], 0.5)
    assert 1e3 * sizes[-1] * h200.of_step(*sizes) == pytest.approx(milliseconds, rel=0.1)
    a100, _ = plan.fitted(measured, plan.DEVICES["a100"], 0.5)
    assert a100.step / h200.step == pytest.approx([989 / 312, 2.4, 2.4, 2.4, 1])
    assert a100.lm[0] == pytest.approx(1 / (0.5 * 312e12))


def test_an_sae_too_large_or_too_slow_for_a_device_is_named(planned):
    told = planned(widths=f"1024,{2**24}", k=32, tokens=1e6, hours=1e6)
    assert "SAEs of width 16,777,216 do not fit into a device's usable 72 GB: raysae does not split an SAE" in told
    told = planned(widths="1024,65536", k=32, tokens=1e9, hours=0.1)
    assert "SAEs of width 65,536 take more than 0.1 hours on a device: raysae does not split an SAE" in told


def test_the_errors_of_fits_are_told_of_this_machine(planned):
    assert "The fits are off by 0% at most" in planned(widths=64, k=4, tokens=1e6, hours=1, device="here")


def test_one_of_a_thing_is_told_as_one(planned):
    told = planned(widths=64, k=4, tokens=1e6, hours=1)
    assert "1 SAE on 1,000,000 tokens" in told
    assert "In 1 hour: 1 h100" in told
    assert "(1 consumer, 4 blocks a shard)" in told


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"hours": 0}, "--hours: '0' is not a number above 0"),
        ({"hours": "inf"}, "--hours: 'inf' is not a number above 0"),
        ({"tokens": -1}, "--tokens: '-1' is not a number above 0"),
        ({"widths": "256,a"}, "--widths: in '256,a', 'a' is not a whole number of at least 1"),
        ({"widths": "256,-2"}, "--widths: in '256,-2', '-2' is not a whole number of at least 1"),
        ({"k": "8,,16"}, "--k: in '8,,16', '' is not a whole number of at least 1"),
        ({"k": "8,8"}, "--k: '8,8' has a number twice"),
        ({"k": 65, "widths": "64,128"}, "--k: 65 is more than the 64 latents of the smallest of --widths"),
        ({"batch": 0}, "--batch: '0' is not a whole number of at least 1"),
        ({"block-mib": 0}, "--block-mib: '0' is not a number above 0"),
        ({"efficiency": 1.5}, "--efficiency: '1.5' is not a number above 0 and at most 1"),
        ({"context": 128, "skip": 200}, "--context: 128 is too short: of it 200 positions are skipped"),
        ({"context": 9}, "--context: 9 is too short: of it 8 positions are skipped"),
        ({"layer": 9}, "layer is 9: embedded has the layers 0 to"),
        ({"model": "/absent"}, "model is '/absent': name the config.json of a language model"),
        ({"model": "FOLDER/cost.json"}, "cost.json': name the config.json of a language model"),
        ({"model": "FOLDER"}, "name the config.json of a language model"),
        ({"measured": "FOLDER"}, "is not what --measure writes"),
        ({"measured": "FOLDER/other.json"}, "other.json is not what --measure writes"),
        ({"measured": "FOLDER/absent.json"}, "absent.json is not there: begin with --measure"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(
    planned, tmp_path: Path, capsys: pytest.CaptureFixture[str], knobs: dict, sentence: str
):
    (tmp_path / "other.json").write_text('{"threads": 2, "lm": []}')
    with pytest.raises(SystemExit) as refused:
        planned(**{name: str(value).replace("FOLDER", str(tmp_path)) for name, value in knobs.items()})
    assert sentence in (refused.value.code if isinstance(refused.value.code, str) else capsys.readouterr().err)
