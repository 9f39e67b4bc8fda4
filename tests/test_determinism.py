"""An SAE's fingerprint holds what the producers' bits depend on.

The trainer keeps these facts in the SAE's file. It compares them on resume, and all through a run.
"""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from raysae.config import FACTS, TrainConfig, UserError
from raysae.determinism import cpu_model, device_facts, precision_of_training, together, told
from raysae.stream import shard
from raysae.train.checkpoint import fingerprint
from tests.train.synthetic import SPEC, TRAIN, ArraySource, config
from tests.train.test_loop import KilledError, assert_same_sae, killed_at, loop_on, trained

A, B = config(seed=0), config("relu", width=40, seed=1)


def fingerprint_of(folder, name: str) -> dict:
    return json.loads((folder / "saes" / name / "cfg.json").read_text())["metadata"]["fingerprint"]


def changing_at(row: int, **facts) -> ArraySource:
    """A source whose rows come from a producer with other facts, starting at `row`."""
    source = ArraySource()
    open_ = source.open

    def open_and_change(start: int):
        reader = open_(start)
        next_ = reader.next

        def next_from_another():
            if reader.row == row:
                source.numerics = together(source.numerics, {key: [value] for key, value in facts.items()})
            return next_()

        reader.next = next_from_another
        return reader

    source.open = open_and_change
    return source


def test_they_are_in_the_file_of_a_trained_sae(tmp_path):
    trained(tmp_path, A)
    facts = fingerprint_of(tmp_path, A.name)
    assert {key: facts[key] for key in facts if key.startswith("producer.")} == {
        "producer.threads": 1,
        "producer.device": "cpu",
    }
    assert facts.items() >= device_facts("cpu").items()


def test_other_producers_are_refused_on_resume_unless_allowed_by_name(tmp_path, caplog):
    loop = loop_on(tmp_path, killed_at(640))
    loop.add(A)
    with pytest.raises(KilledError):
        loop.run()
    other = ArraySource()
    other.numerics = {"threads": [2], "device": ["cpu"]}
    refused = loop_on(tmp_path, other)
    refused.add(A)
    with pytest.raises(
        UserError, match=rf"{A.name} differs in producer.threads \(was 1, is 1 and 2\): .* --allow producer.threads"
    ):
        refused.run()
    assert trained(tmp_path, A, source=other, allow={"producer.threads"}).status()[0]["state"] == "done"
    assert "will not be bit for bit" in caplog.text
    assert fingerprint_of(tmp_path, A.name)["producer.threads"] == "1 and 2"


def test_producers_that_differ_from_each_other_stop_the_run_with_checkpoints_of_all_before(tmp_path):
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    trained(whole, A, B)
    loop = loop_on(mixed, changing_at(640, device="another"))
    loop.add(A)
    loop.add(B)
    with pytest.raises(UserError, match=r"differs in producer.device \(was cpu, is cpu and another\)"):
        loop.run()
    again = trained(mixed, A, B)  # The other producer is gone
    assert again.source.opened == [640]
    for c in (A, B):
        assert_same_sae(whole, mixed, c.name)
        assert fingerprint_of(mixed, c.name)["producer.device"] == "cpu"


def test_mixed_producers_may_be_allowed_and_are_then_warned_of_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        loop = trained(tmp_path, A, source=changing_at(640, device="another"), allow={"producer.device"})
    assert loop.status()[0]["tokens"] == TRAIN.tokens
    assert caplog.text.count("as allowed") == 1
    assert fingerprint_of(tmp_path, A.name)["producer.device"] == "cpu and another"


def test_together_and_told():
    one = {"threads": [1], "device": ["cpu"]}
    assert together(one, {"threads": [1]}) is one
    assert together({}, one) == one
    both = together(one, {"threads": [2, 1], "tf32": [False]})
    assert both == {"threads": [1, 2], "device": ["cpu"], "tf32": [False]}
    assert told(both) == {"producer.threads": "1 and 2", "producer.device": "cpu", "producer.tf32": False}


def test_the_device_is_the_model_of_the_cpu_with_its_instructions(tmp_path):
    assert device_facts("cpu")["device"] == f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"
    described = tmp_path / "cpuinfo"
    core = "processor\t: {}\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\n"
    described.write_text(core.format(0) + "\n" + core.format(1))
    assert cpu_model(described) == "Intel(R) Xeon(R) Platinum 8481C (6/143)"
    arm = tmp_path / "arm"
    arm.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert cpu_model(arm) == cpu_model(tmp_path / "no such file") != ""


@pytest.mark.parametrize(
    ("device", "asked", "has_it", "right"),
    [
        ("cpu", None, True, None),
        ("cpu", "float32", True, None),
        ("cuda", None, True, torch.bfloat16),
        ("cuda", None, False, None),
        ("cuda", "float32", True, None),
        ("cuda", "bfloat16", False, torch.bfloat16),
    ],
)
def test_precision_of_training(device, asked, has_it, right, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it and not including_emulation)
    assert precision_of_training(TrainConfig(precision=asked), device) == right


def test_bfloat16_is_refused_on_a_cpu():
    with pytest.raises(UserError, match=r"train.precision is bfloat16, which is for GPUs, and this trainer has none"):
        precision_of_training(TrainConfig(precision="bfloat16"), "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_fact_may_be_allowed_by_name(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    lm = SimpleNamespace(device=torch.device(device), attention="sdpa", dtype=torch.float32)
    facts = {*fingerprint(SPEC, A, TRAIN, device), *(f"producer.{fact}" for fact in shard.numerics(lm))}
    assert {fact for fact in facts if not fact.startswith(("sae.", "train."))} <= {*FACTS}
    assert {"cpu": {"numba", "fast_integers"}, "cuda": {"triton", "precision", "producer.tf32", "bf16_reduction"}}[
        device
    ] <= facts


def test_another_cpu_is_refused_on_resume_unless_allowed_by_name(tmp_path, monkeypatch):
    loop = loop_on(tmp_path, killed_at(640))
    loop.add(A)
    with pytest.raises(KilledError):
        loop.run()
    monkeypatch.setattr("raysae.determinism.cpu_model", lambda: "Another CPU (1/2)")
    refused = loop_on(tmp_path, ArraySource())
    refused.add(A)
    with pytest.raises(UserError, match=r"differs in device \(was .*, is Another CPU \(1/2\), .*--allow device"):
        refused.run()
    assert trained(tmp_path, A, allow={"device"}).status()[0]["state"] == "done"
