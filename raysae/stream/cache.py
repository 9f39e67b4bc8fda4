"""Activations kept on disk or in S3-type storage, for late and repeated readers.

There is one file per shard and hook point: `LOCATION/KEY/HOOK POINT/SHARD.safetensors`. KEY is the digest of the spec
and of the numerics that its bits depend on. A file is in safetensors format and holds the tensor `rows`,
`(rows_per_shard, width)`. Its metadata include the SHA-256 of its data. The size of blocks does not matter, because
they are cut when read.

The cache keeps a prefix of the pass, the shards 0, 1, … with all hook points, up to its limit. It never evicts, because
a sequential reader would find nothing in a cache that evicts by age.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from raysae.config import StreamConfig, digest
from raysae.storage import open_location
from raysae.stream.blocks import WIRE_DTYPES, bytes_per_shard
from raysae.stream.spec import ActivationSpec

LEFTOVER_SECONDS = 86_400  # A temporary file older than this was left by a dead process
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def open_cache(
    stream: StreamConfig, spec: ActivationSpec, widths: Mapping[str, int], numerics: Mapping[str, object]
) -> BlockCache | None:
    """The cache of a pass as `stream.cache` wants it.

    It is None for `off`, and for `auto` if the whole pass exceeds `stream.cache_gib`.
    """
    limit = int(stream.cache_gib * 2**30)
    whole = spec.shards * bytes_per_shard(spec, widths.values())
    if stream.cache == "off" or (stream.cache == "auto" and whole > limit):
        return None
    return BlockCache(stream.cache_dir, spec, widths, limit, numerics)


class BlockCache:
    """A prefix of a pass at the hook points of `widths` (hook point → width). It takes at most `limit` bytes in all."""

    def __init__(
        self,
        location: str,
        spec: ActivationSpec,
        widths: Mapping[str, int],
        limit: int,
        numerics: Mapping[str, object] | None = None,
    ):
        self.fs, root = open_location("stream.cache_dir", location)
        self.spec = spec
        self.widths = dict(widths)
        self.folder = f"{root.rstrip('/')}/{digest([spec.hash, dict(numerics or {})])}"
        # Length of the prefix
        self.shards = limit // bytes_per_shard(spec, self.widths.values())
        self.writable = True

    def path(self, hook_point: str, shard: int) -> str:
        return f"{self.folder}/{hook_point}/{shard:06d}.safetensors"

    def load(self, hook_point: str, shard: int) -> np.ndarray | None:
        """Rows of a shard `(rows_per_shard, width)` in the wire format, or None if they are not kept.

        A damaged file is removed with a warning, and counts as not kept. A file that cannot be read counts as not kept
        too.
        """
        path = self.path(hook_point, shard)
        try:
            with self.fs.open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, 1 << 20)))
                rows = np.empty(self._shape(hook_point), WIRE_DTYPES[self.spec.dtype])
                if file.readinto(memoryview(rows).cast("B")) != rows.nbytes or file.read(1):
                    raise ValueError("its size is wrong")
            if header["__metadata__"] != self._metadata(hook_point, shard, rows):
                raise ValueError("its checksum or description is wrong")
        except FileNotFoundError:
            return None
        except OSError as error:
            warnings.warn(
                f"cached activations in {path} cannot be read ({error}): they are produced again",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"cached activations in {path} are damaged ({error}): the file is removed and they are produced again",
                RuntimeWarning,
                stacklevel=2,
            )
            with contextlib.suppress(OSError):  # The file is gone already, or not ours to remove
                self.fs.rm_file(path)
            return None
        return rows

    def store(self, hook_point: str, shard: int, rows: np.ndarray) -> bool:
        """Keep a shard's rows if it belongs to the prefix, and return whether the cache takes more.

        Local files appear whole or not at all. S3-type storage does that by itself. A cache that cannot be written, for
        instance on a full disk, warns once and keeps nothing more. The pass goes on without it.
        """
        if shard >= self.shards or not self.writable:
            return False
        tensor = {
            "dtype": SAFETENSORS_DTYPES[self.spec.dtype],
            "shape": list(rows.shape),
            "data_offsets": [0, rows.nbytes],
        }
        header = json.dumps({"__metadata__": self._metadata(hook_point, shard, rows), "rows": tensor}).encode()
        header += b" " * (-len(header) % 8)
        path = self.path(hook_point, shard)
        try:
            if isinstance(self.fs, LocalFileSystem):
                _write_local(Path(path), header, rows)
            else:
                with self.fs.open(path, "wb") as file:
                    _write(file, header, rows)
        except OSError as error:
            warnings.warn(
                f"activations cannot be cached in {path} ({error}): nothing more is cached",
                RuntimeWarning,
                stacklevel=2,
            )
            self.writable = False
        return self.writable

    def _shape(self, hook_point: str) -> tuple[int, int]:
        return self.spec.rows_per_shard, self.widths[hook_point]

    def _metadata(self, hook_point: str, shard: int, rows: np.ndarray) -> dict[str, str]:
        return {
            "spec": self.spec.hash,
            "hook_point": hook_point,
            "shard": str(shard),
            "sha256": hashlib.sha256(rows).hexdigest(),
        }


def _write(file, header: bytes, rows: np.ndarray) -> None:
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    file.write(memoryview(rows).cast("B"))


def _write_local(path: Path, header: bytes, rows: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".*.safetensors-*"):
        with contextlib.suppress(OSError):  # The file is gone already, or not ours to remove
            if leftover.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                leftover.unlink()
    work = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with work.open("wb") as file:
            _write(file, header, rows)
        work.replace(path)  # No fsync: a file torn by a power cut fails its checksum and is produced again
    finally:
        work.unlink(missing_ok=True)
