"""Checkpoints come back exactly, survive damage and crashes, and refuse another run."""

import logging
import os
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from raysae.config import SAEConfig, TrainConfig, UserError
from raysae.storage import PARTIAL
from raysae.stream.spec import ActivationSpec
from raysae.train import checkpoint as module
from raysae.train.checkpoint import Checkpoint, CheckpointStore, fingerprint
from raysae.train.outcome import Outcome, Outcomes

SPEC = ActivationSpec(
    model="m",
    text="t",
    contexts=512,
    context_length=16,
    skip_positions=1,
    dtype="float32",
    seed=0,
    epochs=1,
    shard_contexts=256,
    batch_contexts=32,
)
SAE = SAEConfig(architecture="topk", hook_point="resid_post.0", width=8, k=2, learning_rate=1e-3)
FACTS = {"threads": 1, "torch": "2"}


def example(value: float) -> Checkpoint:
    tensors = {
        "weights": torch.full((3, 4), value),
        "count": torch.tensor([1, 2**40]),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    return Checkpoint(tensors, {"row": 12, "sum": 0.1 + 0.2, "reports": [{"fvu": value}], "leaving": None}, dict(FACTS))


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> str:
    return str(tmp_path / "a" / "b") if request.param == "local" else f"memory://{tmp_path}"


def test_comes_back_exactly(folder):
    store = CheckpointStore(folder)
    assert store.load(FACTS) is None
    saved = example(1 / 3)
    store.save(saved)
    loaded = CheckpointStore(folder).load(FACTS)
    assert loaded.header == saved.header
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_the_last_two_are_kept(folder):
    store = CheckpointStore(folder)
    for value in range(4):
        store.save(example(value))
    assert len(store.paths()) == 2
    assert store.load(FACTS).header["reports"][0]["fvu"] == 3
    store.clear()
    assert store.paths() == []
    assert store.load(FACTS) is None


@pytest.mark.parametrize("harm", ["torn", "flipped", "empty"])
def test_a_damaged_newest_is_named_and_the_one_before_it_used(folder, harm, caplog):
    store = CheckpointStore(folder)
    for value in range(2):
        path = store.save(example(value))
    content = store.files.cat_file(path)
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    store.files.pipe_file(path, {"torn": content[: len(content) // 2], "flipped": flipped, "empty": b""}[harm])
    with caplog.at_level(logging.WARNING):
        assert store.load(FACTS).header["reports"][0]["fvu"] == 0
    assert path in caplog.text
    assert "damaged" in caplog.text
    # A later checkpoint counts as the newest, although the damaged one lies beside it.
    store.save(example(7))
    assert store.load(FACTS).header["reports"][0]["fvu"] == 7


def test_both_damaged_is_as_none(tmp_path, caplog):
    store = CheckpointStore(str(tmp_path))
    for value in range(2):
        Path(store.save(example(value))).write_bytes(b"x")
    assert store.load(FACTS) is None
    assert caplog.text.count("is damaged") == 2


def test_a_crash_while_writing_leaves_the_earlier_one(tmp_path, monkeypatch):
    store = CheckpointStore(str(tmp_path))
    store.save(example(0))

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(
        UserError,
        match=f"cannot be written .no space left on device.: the checkpoints before it in {tmp_path} are whole",
    ):
        store.save(example(1))
    assert len(list(tmp_path.iterdir())) == 1
    assert store.load(FACTS).header["reports"][0]["fvu"] == 0


def test_what_a_killed_process_has_half_written_goes_with_the_next_one(tmp_path, monkeypatch):
    store = CheckpointStore(str(tmp_path))
    store.save(example(0))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        patched.setattr(os, "unlink", lambda path: None)  # SIGKILL leaves no time to remove the file
        with pytest.raises(KeyboardInterrupt):
            store.save(example(1))
        with pytest.raises(KeyboardInterrupt):
            store.wish_leave({"tokens": 1})
    checkpoint, wish = sorted(tmp_path.glob(".*.partial"))
    assert checkpoint.name.startswith(".000000002.")
    store.save(example(2))
    assert not checkpoint.exists()
    assert wish.exists(), "another thread may be writing it"
    store.clear()
    assert not tmp_path.exists()


def test_a_half_written_file_that_its_writer_finishes_meanwhile_stops_nobody(tmp_path, monkeypatch):
    """The writer is a process that was given up for dead and still runs."""
    monkeypatch.setattr(LocalFileSystem, "glob", lambda self, path: [str(tmp_path / f".gone{PARTIAL}")])
    store = CheckpointStore(str(tmp_path))
    store.save(example(0))
    assert store.load(FACTS).header["reports"][0]["fvu"] == 0
    outcomes = Outcomes(str(tmp_path))
    outcomes.save("a", Outcome("failed", 0, [0.0]))
    assert outcomes.load("a").state == "failed"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"tokens": 640, "sha256": "0"}'])
def test_a_damaged_wish_to_leave_is_named_and_counts_as_none(tmp_path, caplog, content):
    store = CheckpointStore(str(tmp_path))
    store.wish_leave({"reason": "worse than others", "tokens": 640})
    (tmp_path / "leave.json").write_bytes(content)
    assert store.wished_leave() is None
    assert f"{tmp_path}/leave.json is damaged" in caplog.text
    store.wish_leave({"reason": "told again", "tokens": 960})
    store.wish_leave({"reason": "and again", "tokens": 1280})
    assert store.wished_leave() == {"reason": "told again", "tokens": 960}


def test_file_is_plain_safetensors(tmp_path):
    path = CheckpointStore(str(tmp_path)).save(example(2))
    assert module.safetensors.torch.load_file(path)["weights"][0, 0] == 2


def test_another_run_is_refused_unless_allowed_by_name(tmp_path, caplog):
    store = CheckpointStore(str(tmp_path))
    store.save(example(0))
    present = FACTS | {"threads": 4, "torch": "3"}
    with pytest.raises(UserError, match=r"threads \(was 1, is 4\), torch \(was 2, is 3\)"):
        store.load(present)
    with pytest.raises(UserError, match=r"differs in torch \("):
        store.load(present, allow={"threads"})
    assert store.load(present, allow={"threads", "torch"}) is not None
    assert "threads (was 1, is 4)" in caplog.text
    assert "not be bit for bit" in caplog.text


def test_fingerprint_covers_what_bits_depend_on():
    base = fingerprint(SPEC, SAE, TrainConfig(), "cpu")
    assert {
        "torch",
        "numba",
        "fast_integers",
        "device",
        "threads",
        "spec",
        "sae.k",
        "sae.seed",
        "train.batch",
        "train.tokens",
    } <= base.keys()
    assert base["threads"] == torch.get_num_threads()
    for changed in (
        fingerprint(SPEC.model_copy(update={"seed": 1}), SAE, TrainConfig(), "cpu"),
        fingerprint(SPEC, SAE.model_copy(update={"k": 3}), TrainConfig(), "cpu"),
        fingerprint(SPEC, SAE, TrainConfig(batch=8), "cpu"),
    ):
        assert changed != base
    assert fingerprint(SPEC, SAE, TrainConfig(reports=3, checkpoint_seconds=1, threads=5), "cpu") == base


def test_memory_file_system_is_used_as_given(tmp_path):
    CheckpointStore(f"memory://{tmp_path}/x").save(example(0))
    assert len(fsspec.filesystem("memory").ls(f"{tmp_path}/x")) == 1
