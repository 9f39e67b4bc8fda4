"""Damaged files of a study, and a full disk.

A checksum finds the damage, and a message names the file. The state before the damage is used, or the same is made
anew.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from raysae.config import SweepConfig, TextConfig, UserError
from raysae.lm.facts import EMBEDDED
from raysae.sae.files import load_sae
from raysae.stream.blocks import bytes_per_shard
from raysae.stream.cache import BlockCache
from raysae.stream.shard import ShardMaker
from raysae.stream.skipped import Skipped
from raysae.study.place import saved_config
from raysae.text.contexts import build_contexts
from tests.stream.fakes import WIDTHS, FakeLanguageModel, fake_contexts, fake_spec
from tests.train.synthetic import TRAIN, config
from tests.train.test_loop import KilledError, assert_same_sae, killed_at, lasting, loop_on, trained

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
A, B = config(seed=0), config("relu", width=40, seed=1)


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """Flips one bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES = pytest.mark.parametrize("damage", [torn, flipped], ids=["torn", "flipped"])


def harm(path: Path, damage: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads. Here it is one, as in the processes that are started.

    More threads would also get in each other's way and spin.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict]]]:
    """A study's folder, and each SAE's reports."""
    folder = tmp_path_factory.mktemp("undisturbed")
    loop = trained(folder, A, B)
    return folder, {c.name: lasting(loop.reports(c.name)[0]) for c in (A, B)}


# ---------------------------------------------------------------- a study's files


@DAMAGES
@pytest.mark.parametrize("how_many", [1, 2])
def test_checkpoint(undisturbed, tmp_path, caplog, damage, how_many):
    """The newest checkpoint is damaged, or both are.

    Training goes on from the one before, or from row 0. The result is the same.
    """
    for row in (256, 640):
        loop = loop_on(tmp_path, killed_at(row))
        loop.add(A)
        with pytest.raises(KilledError):
            loop.run()
    newest = sorted((tmp_path / "checkpoints" / A.name).glob("*.safetensors"), reverse=True)
    assert len(newest) == 2
    for path in newest[:how_many]:
        harm(path, damage)
    with caplog.at_level(logging.WARNING):
        again = trained(tmp_path, A)
    assert again.source.opened == [256 if how_many == 1 else 0]
    assert all(f"checkpoint {path} is damaged" in caplog.text for path in newest[:how_many])
    folder, reports = undisturbed
    assert_same_sae(folder, tmp_path, A.name)
    assert lasting(again.reports(A.name)[0]) == reports[A.name]


@DAMAGES
@pytest.mark.parametrize("file", ["outcome.json", "sae_weights.safetensors", "cfg.json", "raysae.json"])
def test_ended_sae(undisturbed, tmp_path, caplog, damage, file):
    """Any file of an ended SAE is damaged: that SAE is trained anew.

    The other SAE is only shown. Both are as before.
    """
    trained(tmp_path, A, B)
    path = tmp_path / "saes" / A.name / file
    harm(path, damage)
    if file != "outcome.json":
        with pytest.raises(UserError, match=f"{file}.* is damaged"):
            load_sae(path.parent)
    with caplog.at_level(logging.WARNING):
        again = trained(tmp_path, A, B)
    assert f"{path} is damaged" in caplog.text
    assert f"{A.name} is trained anew" in caplog.text
    assert again.source.opened == [0]
    assert again.source.served == list(range(0, TRAIN.tokens, TRAIN.batch))
    folder, reports = undisturbed
    for c in (A, B):
        assert_same_sae(folder, tmp_path, c.name)
        assert lasting(again.reports(c.name)[0]) == reports[c.name]


@DAMAGES
def test_wish_to_leave(undisturbed, tmp_path, caplog, damage):
    """The wish of one SAE is damaged: it is trained to its end. The other one ends early as told."""
    loop = loop_on(tmp_path, killed_at(640))
    for c in (A, B):
        loop.add(c)
    loop.on_change = lambda: [
        loop.leave(c.name, "worse than others", tokens=960) for c in (A, B) if loop.progress[c.name].tokens == 320
    ]
    with pytest.raises(KilledError):
        loop.run()
    path = tmp_path / "checkpoints" / A.name / "leave.json"
    harm(path, damage)
    again = trained(tmp_path, A, B)
    assert f"{path} is damaged" in caplog.text
    assert [(row["state"], row["tokens"]) for row in again.status()] == [("done", TRAIN.tokens), ("stopped", 960)]
    assert_same_sae(undisturbed[0], tmp_path, A.name)


def test_a_config_that_was_cut_short(tmp_path):
    """Defaults do not replace missing knobs. They would train another sweep."""
    config = SweepConfig(study="s", widths=[64], faults={"hang_seconds": 5})
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    (tmp_path / "s").mkdir()
    file = tmp_path / "s" / "config.yaml"
    file.write_text(text)
    assert saved_config(str(tmp_path), "s") == config
    assert saved_config(str(tmp_path), "s", {"start_seconds": 7}).faults.model_dump() == config.faults.model_dump() | {
        "start_seconds": 7
    }
    for lines in range(1, len(text.splitlines())):
        file.write_text("".join(text.splitlines(keepends=True)[:lines]))
        with pytest.raises(UserError, match=rf"^{file} is damaged, or of another version of raysae"):
            saved_config(str(tmp_path), "s")


@DAMAGES
def test_skipped_shards(tmp_path, damage):
    """The study cannot be resumed. It is refused by name, before anything starts."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "config.yaml").write_text(yaml.safe_dump(SweepConfig(study="s").model_dump()))
    record = tmp_path / "s" / "skipped.json"
    Skipped(str(record)).add("train", 2, 10, "bad", [1, 2])
    assert saved_config(str(tmp_path), "s").study == "s"
    harm(record, damage)
    with pytest.raises(UserError, match=rf"^{record} is damaged.*begin a new study"):
        saved_config(str(tmp_path), "s")


def test_killed_while_an_sae_is_saved(undisturbed, tmp_path):
    """A real process is killed between two files of an SAE.

    Nobody takes the incomplete folder for an SAE. Afterwards nothing of it is left and nothing is missing.
    """
    program = f"""
import os, signal
from raysae.train import outcome
from tests.train.synthetic import config
from tests.train.test_loop import trained
write = outcome.write_atomically
def write_and_die(files, path, content, *rest):
    if path.endswith("sae_weights.safetensors"):
        open(path.rpartition("/")[0] + "/.0.partial", "wb").write(content[:99])  # The write is half done
        os.kill(os.getpid(), signal.SIGKILL)
    write(files, path, content, *rest)
outcome.write_atomically = write_and_die
trained({str(tmp_path)!r}, config(seed=0))
"""
    died = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ONE_THREAD, timeout=200, check=False)
    assert died.returncode == -9
    folder = tmp_path / "saes" / A.name
    assert sorted(path.name for path in folder.iterdir()) == [".0.partial", "cfg.json", "raysae.json"]
    with pytest.raises(UserError, match=r"sae_weights\.safetensors is missing"):
        load_sae(folder)
    trained(tmp_path, A)
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json",
        "outcome.json",
        "raysae.json",
        "sae_weights.safetensors",
    ]
    assert_same_sae(undisturbed[0], tmp_path, A.name)


# ---------------------------------------------------------------- caches


@DAMAGES
def test_cached_activations(tmp_path, damage):
    contexts = fake_contexts()
    spec = fake_spec(contexts)
    cache = BlockCache(str(tmp_path), spec, WIDTHS, 10 * bytes_per_shard(spec, WIDTHS.values()))
    maker = ShardMaker(FakeLanguageModel(), contexts, spec, list(WIDTHS), 0.01, cache)
    _, whole = maker.make(1)
    path = Path(cache.path("resid_post.0", 1))
    content = path.read_bytes()
    harm(path, damage)
    with pytest.warns(RuntimeWarning, match=f"cached activations in {path} are damaged"):
        meta, again = maker.make(1)
    assert not meta["from_cache"]
    assert all(
        np.array_equal(one, other) for hook in WIDTHS for one, other in zip(whole[hook], again[hook], strict=True)
    )
    assert path.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert maker.make(1)[0]["from_cache"]


@DAMAGES
def test_cached_contexts(tmp_path, damage):
    text = tmp_path / "text.txt"
    text.write_text("\n---\n".join(f"The {i}th document says {i * i}. " * 40 for i in range(60)))
    settings = TextConfig(source=str(text), delimiter="---", cache=str(tmp_path / "cache"), evaluation_fraction=0.3)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)

    def built() -> dict[str, np.ndarray]:
        return {
            split: contexts.tokens for split, contexts in build_contexts(settings, lambda: tokenizer, "t", 32).items()
        }

    whole = {split: tokens.copy() for split, tokens in built().items()}
    paths = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(paths) >= 3
    for path in paths:
        content = path.read_bytes()
        harm(path, damage)
        with pytest.warns(RuntimeWarning, match=f"{path.parent} is damaged"):
            again = built()
        assert path.read_bytes() == content
        assert all(np.array_equal(whole[split], again[split]) for split in whole)


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 160 KiB: room for three checkpoints of A."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(
            f"a file system cannot be mounted here ({mounted.stderr.strip()}): "
            "the test with a limit on file sizes remains"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_disk_is_full_while_a_checkpoint_is_written(undisturbed, tiny_disk, tmp_path):
    loop = loop_on(tiny_disk, killed_at(256))
    loop.add(A)
    with pytest.raises(KilledError):
        loop.run()
    (kept,) = (tiny_disk / "checkpoints" / A.name).iterdir()
    content, hoard = kept.read_bytes(), tiny_disk / "hoard"
    with hoard.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    # Leave room for half of the next one
    os.truncate(hoard, hoard.stat().st_size - len(content) // 2)
    loop = loop_on(tiny_disk, killed_at(640))
    loop.add(A)
    with pytest.raises(UserError) as told:
        loop.run()
    sentence = str(told.value)
    assert sentence.startswith(str(tiny_disk / "checkpoints"))
    assert (
        f"cannot be written (No space left on device): the checkpoints before it in {kept.parent} are whole" in sentence
    )
    assert "\n" not in sentence
    assert list(kept.parent.iterdir()) == [kept], "nothing half-written is left"
    assert kept.read_bytes() == content
    hoard.unlink()
    again = trained(tiny_disk, A)
    assert again.source.opened == [256]
    assert_same_sae(undisturbed[0], tiny_disk, A.name)


def test_a_process_that_may_write_no_more_says_so_and_keeps_what_was_there(undisturbed, tmp_path):
    """The same without a separate file system.

    The operating system refuses to write beyond a limit, in the middle of the file.
    """
    loop = loop_on(tmp_path, killed_at(256))
    loop.add(A)
    with pytest.raises(KilledError):
        loop.run()
    (kept,) = (tmp_path / "checkpoints" / A.name).iterdir()
    content = kept.read_bytes()
    program = f"""
import resource
from raysae.config import UserError
from tests.train.synthetic import config
from tests.train.test_loop import loop_on
loop = loop_on({str(tmp_path)!r})
loop.cadence.seconds = 0
loop.add(config(seed=0))
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(content) // 2}, resource.RLIM_INFINITY))
try:
    loop.run()
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "cannot be written (File too large): the checkpoints before it" in done.stdout, done.stderr
    assert list(kept.parent.iterdir()) == [kept]
    assert kept.read_bytes() == content
    trained(tmp_path, A)
    assert_same_sae(undisturbed[0], tmp_path, A.name)
