"""The activation cache returns equal bits, keeps a prefix of the pass and replaces damaged files."""

import os
import struct
import time
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raysae.config import StreamConfig, UserError
from raysae.stream.blocks import as_tensor, bytes_per_shard
from raysae.stream.cache import BlockCache, open_cache
from raysae.stream.shard import ShardMaker
from tests.stream.fakes import WIDTHS, FakeLanguageModel, fake_contexts, fake_spec

CONTEXTS = fake_contexts()
HOOKS = list(WIDTHS)
SPEC = fake_spec(CONTEXTS)
SHARD = bytes_per_shard(SPEC, WIDTHS.values())


def maker(cache: BlockCache | None, lm=None, hooks=HOOKS, block_mib=0.01, spec=SPEC) -> ShardMaker:
    return ShardMaker(lm or FakeLanguageModel(), CONTEXTS, spec, hooks, block_mib, cache)


def bits(blocks: dict[str, list[np.ndarray]]) -> dict[str, bytes]:
    return {hook: np.concatenate(parts).tobytes() for hook, parts in blocks.items()}


@pytest.fixture(params=["local", "object store"])
def location(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "cache")
    else:
        yield "memory://bucket/cache"
        fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_hit_equals_a_miss_bit_for_bit(location, dtype):
    spec = fake_spec(CONTEXTS, dtype=dtype)
    lm = FakeLanguageModel(getattr(torch, dtype))
    meta, produced = maker(BlockCache(location, spec, WIDTHS, 10 * SHARD), lm, spec=spec).make(2)
    assert (meta["from_cache"], meta["contexts_forwarded"], lm.forwarded) == (False, 256, 256)
    meta, cached = maker(BlockCache(location, spec, WIDTHS, 10 * SHARD), lm, spec=spec).make(2)
    assert (meta["from_cache"], meta["contexts_forwarded"], lm.forwarded) == (True, 0, 256)
    _, plain = maker(None, lm, spec=spec).make(2)
    assert bits(produced) == bits(cached) == bits(plain)
    assert [len(b) for b in cached["mlp_act.1"]] == [len(b) for b in plain["mlp_act.1"]]


def test_block_size_does_not_matter(location):
    _, produced = maker(BlockCache(location, SPEC, WIDTHS, 10 * SHARD)).make(0)
    meta, cached = maker(BlockCache(location, SPEC, WIDTHS, 10 * SHARD), block_mib=32).make(0)
    assert meta["from_cache"]
    assert [len(parts) for parts in cached.values()] == [1, 1]
    assert bits(produced) == bits(cached)


def test_only_missing_hook_points_are_produced(location):
    cache = BlockCache(location, SPEC, WIDTHS, 10 * SHARD)
    maker(cache, hooks=["mlp_act.1"]).make(1)
    lm = FakeLanguageModel()
    meta, blocks = maker(cache, lm).make(1)
    assert {hooks for _, hooks in lm.asked} == {("resid_post.0",)}
    assert (meta["from_cache"], meta["contexts_forwarded"]) == (False, 256)
    assert bits(blocks) == bits(maker(None).make(1)[1])
    assert maker(cache).make(1)[0]["from_cache"]


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (SHARD - 1, 0), (SHARD, 1), (3 * SHARD - 1, 2), (100 * SHARD, 6)])
def test_a_prefix_is_kept_and_nothing_is_evicted(location, limit, kept):
    cache = BlockCache(location, SPEC, WIDTHS, limit)
    made = maker(cache)
    for shard in [5, 0, 4, 1, 3, 2]:
        made.make(shard)
    assert [made.make(shard)[0]["from_cache"] for shard in range(6)] == [shard < kept for shard in range(6)]


def test_specs_and_numerics_do_not_mix(location):
    maker(BlockCache(location, SPEC, WIDTHS, SHARD, {"threads": 1})).make(0)
    assert maker(BlockCache(location, SPEC, WIDTHS, SHARD, {"threads": 1})).make(0)[0]["from_cache"]
    assert not maker(BlockCache(location, SPEC, WIDTHS, SHARD, {"threads": 2})).make(0)[0]["from_cache"]
    other = fake_spec(CONTEXTS, seed=1)
    assert not maker(BlockCache(location, other, WIDTHS, SHARD, {"threads": 1}), spec=other).make(0)[0]["from_cache"]


def test_files_are_safetensors(tmp_path):
    for dtype in ("float32", "bfloat16", "float16"):
        spec = fake_spec(CONTEXTS, dtype=dtype)
        cache = BlockCache(str(tmp_path), spec, WIDTHS, SHARD)
        _, blocks = maker(cache, spec=spec).make(0)
        rows = load_file(cache.path("mlp_act.1", 0))["rows"]
        assert torch.equal(rows, as_tensor(np.concatenate(blocks["mlp_act.1"]), dtype))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")], "no temporary files are left"


def truncate(content: bytes) -> bytes:
    return content[:-1]


def flip(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


def retitle(content: bytes) -> bytes:
    return content.replace(b'"shard": "0"', b'"shard": "1"')


DAMAGES = [
    truncate, flip, retitle,
    lambda content: content + b"x",
    lambda content: b"",
    lambda content: content[:5],
    lambda content: struct.pack("<Q", 2**62) + content[8:],
    lambda content: struct.pack("<Q", 2) + b"[]" + content[8:],
    lambda content: b"\xff" * len(content),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_removed_and_made_anew(tmp_path, damage):
    cache = BlockCache(str(tmp_path), SPEC, WIDTHS, SHARD)
    _, produced = maker(cache).make(0)
    path = Path(cache.path("resid_post.0", 0))
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    with pytest.warns(RuntimeWarning, match=f"{path.name} are damaged"):
        assert cache.load("resid_post.0", 0) is None
    assert not path.exists()
    path.write_bytes(damage(content))
    with pytest.warns(RuntimeWarning, match="damaged"):
        meta, again = maker(cache).make(0)
    assert not meta["from_cache"]
    assert bits(again) == bits(produced)
    assert path.read_bytes() == content
    assert maker(cache).make(0)[0]["from_cache"]


def test_activations_that_are_not_finite_are_not_kept(location):
    cache = BlockCache(location, SPEC, WIDTHS, SHARD)
    poisoned = FakeLanguageModel(poison={"mlp_act.1": float("nan")})
    for _ in range(2):
        meta, _ = maker(cache, poisoned).make(0)
        assert not meta["from_cache"]
        assert meta["nonfinite"] == ["mlp_act.1"]
    assert cache.load("mlp_act.1", 0) is None
    assert cache.load("resid_post.0", 0) is not None
    assert maker(cache).make(0)[0]["nonfinite"] == []
    assert maker(cache).make(0)[0]["from_cache"]


@pytest.mark.filterwarnings("ignore:cached activations in .* cannot be read")
def test_a_cache_that_cannot_be_written_does_not_stop_the_pass(tmp_path):
    cache = BlockCache(str(tmp_path), SPEC, WIDTHS, 6 * SHARD)
    Path(cache.folder).parent.mkdir(exist_ok=True)
    Path(cache.folder).write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="nothing more is cached"):
        _, blocks = maker(cache).make(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing more is cached")
        maker(cache).make(1)
    assert bits(blocks) == bits(maker(None).make(0)[1])


def test_a_failed_write_leaves_no_torn_file(tmp_path, monkeypatch):
    def torn(file, header, rows):
        file.write(header)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raysae.stream.cache._write", torn)
    cache = BlockCache(str(tmp_path), SPEC, WIDTHS, SHARD)
    with pytest.warns(RuntimeWarning, match="No space left"):
        maker(cache).make(0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_killed_writers_have_left_goes_after_a_day(tmp_path):
    cache = BlockCache(str(tmp_path), SPEC, WIDTHS, 6 * SHARD)
    maker(cache).make(0)
    folder = Path(cache.path("mlp_act.1", 0)).parent
    # Another machine may still be writing the second file
    old, new = folder / ".000001.safetensors-0a", folder / ".000002.safetensors-0b"
    for path, age in ((old, 25), (new, 23), (folder / "000000.safetensors", 25)):
        path.touch()
        os.utime(path, (time.time() - 3600 * age,) * 2)
    maker(cache).make(1)
    assert not old.exists()
    assert sorted(path.name for path in folder.iterdir()) == [new.name, "000000.safetensors", "000001.safetensors"]


def test_when_a_pass_is_cached(tmp_path):
    def opened(mode: str, gib: float) -> BlockCache | None:
        return open_cache(
            StreamConfig(cache=mode, cache_gib=gib, cache_dir=str(tmp_path)), SPEC, WIDTHS, {"torch": "x"}
        )

    whole = 6 * SHARD / 2**30
    assert opened("auto", whole).shards == 6
    assert opened("auto", whole * 0.99) is None
    assert opened("on", whole * 0.99).shards == 5
    assert opened("off", 4) is None


def test_unknown_storage():
    with pytest.raises(UserError, match=r"stream.cache_dir is 'nonsense://x'"):
        BlockCache("nonsense://x", SPEC, WIDTHS, SHARD)
