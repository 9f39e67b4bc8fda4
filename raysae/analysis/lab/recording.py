"""TODO docstring."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from raysae.analysis.instruments.activations import CHUNK_ROWS, SPLITS, THIRDS, Chunk, split_contexts
from raysae.analysis.lab.tasks import language_model
from raysae.config import ModelConfig, UserError, digest
from raysae.stream.blocks import as_tensor
from raysae.stream.shard import ShardMaker
from raysae.stream.spec import ActivationSpec
from raysae.text.contexts import Contexts

if TYPE_CHECKING:
    from raysae.stream.shard import ShardMaker
    from raysae.text.contexts import Contexts

DEFINITION = 1  # of the recorded files; raising it makes them anew


# ---------------------------------------------------------------- on disk


class StreamActivations:
    """Activations in files that `collect` recorded, memory-mapped: a chunk is read when it is asked for.

    The folder has per hook point `HOOK.npy` (c, t, d) float32, and `token.npy`, `token_loss.npy` (c, t), `context.npy`, `split.npy` (c,), with c the
    contexts that belong to a split and t the positions from `first_position` on.
    """

    def __init__(self, folder: Path, hook_points: Sequence[str], first_position: int, token_loss: bool) -> None:
        self.folder, self.first_position = folder, first_position
        self._x = {hook: _mapped(folder / f"{hook}.npy") for hook in hook_points}
        self._loss = _mapped(folder / "token_loss.npy") if token_loss else None
        self._token = _mapped(folder / "token.npy")
        self._context, self._split = np.load(folder / "context.npy"), np.load(folder / "split.npy")
        self.widths = {hook: x.shape[2] for hook, x in self._x.items()}

    def select(self, hook_points: Sequence[str]) -> StreamActivations:
        """The same rows at fewer hook points, so that the others are not read."""
        return StreamActivations(self.folder, hook_points, self.first_position, self._loss is not None)

    def rows(self, split: str) -> int:
        """Rows of a split."""
        return int((self._split == SPLITS.index(split)).sum()) * self._token.shape[1]

    def chunks(self, split: str) -> Iterator[Chunk]:
        positions = self._token.shape[1]
        at_once = max(1, CHUNK_ROWS // positions)
        wanted = np.flatnonzero(self._split == SPLITS.index(split))
        for begin in range(0, len(wanted), at_once):
            part = wanted[begin : begin + at_once]
            yield Chunk(
                x={hook: torch.from_numpy(x[part]).flatten(0, 1) for hook, x in self._x.items()},
                token=torch.from_numpy(self._token[part]).flatten().long(),
                position=torch.arange(self.first_position, self.first_position + positions).repeat(len(part)),
                context=torch.from_numpy(self._context[part]).repeat_interleave(positions),
                token_loss=None if self._loss is None else torch.from_numpy(self._loss[part]).flatten(),
            )


def collect(
    folder: str | Path,
    spec: ActivationSpec,
    contexts: Contexts,
    hook_points: Sequence[str],
    load: Callable[[list[str]], ShardMaker],
    shards: int | None = None,
    fractions: Sequence[float] = THIRDS,
    seed: int = 0,
    token_loss: bool = True,
) -> StreamActivations:
    """The activations of the first `shards` shards of `spec` (all by default), recorded under `folder` where they are not there yet.

    `load(missing hook points)` gives the maker of their shards; it is called only where something is missing, so that a second analysis of the same
    spec loads no language model. The place is named by its content (spec, shards, splits). A file appears whole or not at all, hook points and losses
    independently: two processes may record at the same time. What else bits depend on (threads, device) is not in the name: it is rounding, which no
    result here depends on. Contexts that `split_contexts` drops are not recorded.

    Raises:
        UserError: too few documents, an activation is not finite, or the folder cannot be written to.
    """
    shards = min(shards or spec.shards_per_epoch, spec.shards_per_epoch)
    hook_points = list(dict.fromkeys(hook_points))
    split = split_contexts(contexts, fractions, seed)
    key = [DEFINITION, spec.hash, shards, hashlib.sha256(split).hexdigest()]
    place = Path(folder).expanduser() / digest(key)
    wanted = hook_points + ["token_loss"] * token_loss + ["token", "context", "split"]
    missing = [name for name in wanted if not (place / f"{name}.npy").exists()]
    if missing:
        try:
            place.mkdir(parents=True, exist_ok=True)
            _record(place, load([name for name in missing if name in hook_points]), split, shards, missing, {"key": key, "spec": spec.model_dump()})
        except OSError as error:
            raise UserError(
                f"activations cannot be recorded in {folder} ({error.strerror}): name a folder with room that can be written to"
            ) from error
    return StreamActivations(place, hook_points, spec.skip_positions, token_loss)


def _record(place: Path, maker: ShardMaker, split: np.ndarray, shards: int, names: list[str], facts: dict) -> None:
    """Writes the files `names`, one forward pass per shard (one more for losses)."""
    spec = maker.spec
    order = np.concatenate([spec.contexts_of(shard) for shard in range(shards)])
    kept = int((split[order] >= 0).sum())
    positions = spec.context_length - spec.skip_positions
    files: dict[str, np.memmap] = {}
    suffix = f".{uuid.uuid4().hex}.part"

    def write(name: str, at: slice, rows: np.ndarray) -> None:
        if name not in files:
            shape = (kept, *rows.shape[1:])
            files[name] = np.lib.format.open_memmap(place / f"{name}{suffix}", "w+", rows.dtype, shape)
        files[name][at] = rows

    done = 0
    try:
        for shard in range(shards):
            indices = spec.contexts_of(shard)
            inside = split[indices] >= 0
            at = slice(done, done + int(inside.sum()))
            done = at.stop
            if maker.hook_points:
                for hook, rows in _unpermuted(maker, shard).items():
                    write(hook, at, rows.reshape(len(indices), positions, -1)[inside])
            notes = maker.annotations(shard, token_loss="token_loss" in names)
            notes["token"] = notes["token"].astype(np.int32)
            for name in ("token", "token_loss"):
                if name in names:
                    write(name, at, notes[name].reshape(len(indices), positions)[inside])
            for name, of_context in (("context", indices.astype(np.int64)), ("split", split[indices])):
                if name in names:
                    write(name, at, of_context[inside])
        for name, file in files.items():
            file.flush()
            os.replace(place / f"{name}{suffix}", place / f"{name}.npy")
        (place / "facts.json").write_text(json.dumps(facts, indent=1))
    finally:
        for name in files:
            (place / f"{name}{suffix}").unlink(missing_ok=True)


def _unpermuted(maker: ShardMaker, shard: int) -> dict[str, np.ndarray]:
    """The shard's rows per hook point, float32, contexts laid end to end."""
    meta, made = maker.make(shard)
    if meta["nonfinite"]:
        raise UserError(f"hook point {meta['nonfinite'][0]} has activations that are not finite in shard {shard}: try model.dtype float32")
    place = np.argsort(maker.spec.permutation_of(shard))
    return {hook: torch.cat([as_tensor(block, maker.spec.dtype).float() for block in blocks]).numpy()[place] for hook, blocks in made.items()}


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


# ---------------------------------------------------------------- what is analysed


@dataclass(frozen=True)
class Recorded:
    """Recorded activations as a task can be told of them: files that it maps itself."""

    folder: Path
    hook_points: tuple[str, ...]
    first_position: int

    def open(self) -> StreamActivations:
        return StreamActivations(self.folder, self.hook_points, self.first_position, token_loss=True)

    def contexts(self, split: str) -> np.ndarray:
        """Indices of the contexts of a split, in the order of its chunks."""
        return np.load(self.folder / "context.npy")[np.load(self.folder / "split.npy") == "ABC".index(split)]


# ---------------------------------------------------------------- the lab


class _AbsentError(Exception):
    """Activations are not recorded yet."""


def record_task(
    contexts: Contexts, folder: Path, spec: ActivationSpec, hook_points: list[str], shards: int, seed: int, model: ModelConfig, block_mib: float
) -> Path:
    """Records activations; the folder they are in."""

    def load(missing: list[str]) -> ShardMaker:
        return ShardMaker(language_model(model), contexts, spec, missing, block_mib)

    return collect(folder, spec, contexts, hook_points, load, shards, seed=seed).folder
