"""Activations of held-out text, recorded once on disk and read by every analysis.

Recording costs disk: 4 bytes × dimensions × tokens per hook point. For it the language model runs once per study, and
tasks on the cluster map the files instead of being sent activations.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raysae.analysis.instruments.activations import CHUNK_ROWS, SPLITS, Chunk, Split, split_contexts
from raysae.analysis.lab.tasks import Task, language_model
from raysae.config import SweepConfig, UserError, digest
from raysae.storage import local_path
from raysae.stream.producer import nonfinite
from raysae.stream.shard import ShardMaker
from raysae.stream.spec import ActivationSpec
from raysae.text.contexts import Contexts

RECORDING_DEFINITION = 2  # Raise it when the recorded files change. They are then recorded anew.


# ---------------------------------------------------------------- reading


class StreamActivations:
    """Activations in files that `collect` recorded. They are memory-mapped: a chunk is read when it is asked for.

    The folder has `HOOK.npy` (c, t, d) float32 per hook point, `token.npy` and `token_loss.npy` (c, t), `context.npy`,
    `group.npy` and `split.npy` (c,). c counts the contexts that belong to a split, t the positions from
    `first_position` on. Where rows are left out, `kept.npy` (c, t) says which are not. Nothing takes their places: a
    chunk does without.
    """

    def __init__(self, folder: Path, hook_points: Sequence[str], first_position: int, token_loss: bool) -> None:
        self.folder, self.first_position = folder, first_position
        self._x = {hook: _mapped(folder / f"{hook}.npy") for hook in hook_points}
        self._loss = _mapped(folder / "token_loss.npy") if token_loss else None
        self._token = _mapped(folder / "token.npy")
        self._context, self._group, self._split = (
            np.load(folder / f"{name}.npy") for name in ("context", "group", "split")
        )
        self._kept = _kept(folder, self._token.shape)
        self.widths = {hook: x.shape[2] for hook, x in self._x.items()}

    def select(self, hook_points: Sequence[str]) -> StreamActivations:
        """The same rows at fewer hook points. Nothing reads the files of the others."""
        return StreamActivations(self.folder, hook_points, self.first_position, self._loss is not None)

    def rows(self, split: str) -> int:
        """The number of rows of a split."""
        return int(self._kept[self._split == SPLITS.index(split)].sum())

    def chunks(self, split: str) -> Iterator[Chunk]:
        """The rows of a split, chunk by chunk, always in the same order."""
        positions = self._token.shape[1]
        at_once = max(1, CHUNK_ROWS // positions)
        wanted = np.flatnonzero(self._split == SPLITS.index(split))
        for begin in range(0, len(wanted), at_once):
            contexts = wanted[begin : begin + at_once]
            kept = torch.from_numpy(self._kept[contexts])
            if not kept.any():
                continue
            of_row, place = torch.nonzero(kept, as_tuple=True)

            def rows(file: np.ndarray, contexts: np.ndarray = contexts, kept: torch.Tensor = kept) -> torch.Tensor:
                whole = torch.from_numpy(file[contexts]).flatten(0, 1)
                return whole if kept.all() else whole[kept.flatten()]

            yield Chunk(
                x={hook: rows(x) for hook, x in self._x.items()},
                token=rows(self._token).long(),
                position=self.first_position + place,
                context=torch.from_numpy(self._context[contexts])[of_row],
                group=torch.from_numpy(self._group[contexts])[of_row],
                token_loss=None if self._loss is None else rows(self._loss),
            )


@dataclass(frozen=True)
class Recorded:
    """Where recorded activations lie. A task gets this in place of activations, and maps the files itself."""

    folder: Path
    hook_points: tuple[str, ...]
    first_position: int

    def open(self) -> StreamActivations:
        """The activations, with the language model's losses."""
        return StreamActivations(self.folder, self.hook_points, self.first_position, token_loss=True)

    def rows(self, split: str) -> int:
        """The number of rows of a split, without those left out."""
        return int(self.kept(split).sum())

    def contexts(self, split: str) -> np.ndarray:
        """Indices of the contexts of a split, in the order of its chunks."""
        return self._of_split("context", split)

    def groups(self, split: str) -> np.ndarray:
        """The group of documents of each of these contexts, in the same order."""
        return self._of_split("group", split)

    def kept(self, split: str) -> np.ndarray:
        """Which positions from `first_position` on are not left out, (contexts of the split, positions) bool."""
        return _kept(self.folder, _mapped(self.folder / "token.npy").shape)[self._of(split)]

    def _of_split(self, name: str, split: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy")[self._of(split)]

    def _of(self, split: str) -> np.ndarray:
        return np.load(self.folder / "split.npy") == SPLITS.index(split)


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _kept(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    """Which rows (c, t) are not left out."""
    file = folder / "kept.npy"
    return np.load(file) if file.exists() else np.ones(shape, bool)


# ---------------------------------------------------------------- recording


@dataclass(frozen=True)
class Recording:
    """Activations that an analysis wants: `shards` held-out shards at some hook points, recorded under `folder`.

    `seed` draws the splits A, B and C.
    """

    folder: Path
    spec: ActivationSpec
    hook_points: tuple[str, ...]
    shards: int
    seed: int

    def find(self, contexts: Contexts) -> Recorded | None:
        """The recorded activations, or None where a file is missing."""
        with suppress(_AbsentError):
            return self.make(contexts, _absent)
        return None

    def make(self, contexts: Contexts, load: Callable[[list[str]], ShardMaker]) -> Recorded:
        """Records what is missing, see `collect`."""
        made = collect(self.folder, self.spec, contexts, self.hook_points, load, self.shards, self.seed)
        return Recorded(made.folder, self.hook_points, self.spec.skip_positions)

    def task(self, config: SweepConfig) -> Task:
        """The task that loads the language model and records what is missing. Its result is a `Recorded`."""
        key = [self.spec.hash, self.shards, self.seed, *sorted(self.hook_points)]
        gpus = config.resources.producer_gpus
        return Task("activations", key, _record_task, (self, config), whole_machine=True, gpus=gpus, contexts=True)


class _AbsentError(Exception):
    """Activations are not recorded yet."""


def _absent(missing: list[str]) -> ShardMaker:
    raise _AbsentError


def _record_task(contexts: Contexts, recording: Recording, config: SweepConfig) -> Recorded:
    def load(missing: list[str]) -> ShardMaker:
        lm = language_model(config.model)
        return ShardMaker(lm, contexts, recording.spec, missing, config.stream.block_mib)

    return recording.make(contexts, load)


def collect(
    folder: str | Path,
    spec: ActivationSpec,
    contexts: Contexts,
    hook_points: Sequence[str],
    load: Callable[[list[str]], ShardMaker],
    shards: int | None = None,
    seed: int = 0,
) -> StreamActivations:
    """Activations and token losses of the first `shards` shards of `spec`. What is missing under `folder` is recorded.

    The folder's name is a digest of spec, shards and splits. Threads and device are not in it: they change rounding,
    and no result here depends on rounding. A file appears whole or not at all, and hook points and losses
    independently. So two processes may record at the same time. Contexts that `split_contexts` drops are left out.

    Args:
        folder: recordings of any spec lie in it.
        spec: the stream.
        contexts: the held-out contexts that the spec draws from.
        hook_points: where activations are read.
        load: makes the maker of shards at the missing hook points. Only missing files make this call, so a second
            analysis of the same spec loads no language model.
        shards: all of the spec's by default.
        seed: draws the splits.

    Raises:
        UserError: too few documents, an activation is not finite, or the folder cannot be written to.
    """
    shards = min(shards or spec.shards_per_epoch, spec.shards_per_epoch)
    hook_points = list(dict.fromkeys(hook_points))
    parts = split_contexts(contexts, seed=seed)
    content = hashlib.sha256(parts.split.tobytes() + parts.group.tobytes()).hexdigest()
    key = [RECORDING_DEFINITION, spec.hash, shards, content]
    place = local_path("folder", str(folder)) / digest(key)
    wanted = [*hook_points, "token_loss", "token", "context", "group", "split"]
    wanted += ["kept"] if spec.leave_out_tokens or spec.leave_out_norm or contexts.lengths is not None else []
    missing = [name for name in wanted if not (place / f"{name}.npy").exists()]
    if missing:
        try:
            place.mkdir(parents=True, exist_ok=True)
            maker = load([name for name in missing if name in hook_points])
            _record(place, maker, parts, shards, missing, {"key": key, "spec": spec.model_dump()})
        except OSError as error:
            raise UserError(
                f"activations cannot be recorded in {folder} ({error.strerror}). "
                "Name a folder with room that can be written to."
            ) from error
    return StreamActivations(place, hook_points, spec.skip_positions, token_loss=True)


def _record(place: Path, maker: ShardMaker, parts: Split, shards: int, names: list[str], facts: dict) -> None:
    """Writes the files `names`, with one forward pass per shard. Losses take another."""
    spec, split = maker.spec, parts.split
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
                for hook, rows in _rows(maker, shard).items():
                    write(hook, at, rows.reshape(len(indices), positions, -1)[inside])
            notes = maker.annotations(shard, token_loss="token_loss" in names)
            notes["token"] = notes["token"].astype(np.int32)
            for name in ("token", "token_loss", "kept"):
                if name in names:
                    write(name, at, notes[name].reshape(len(indices), positions)[inside])
            of_contexts = {"context": indices.astype(np.int64), "group": parts.group[indices], "split": split[indices]}
            for name, of_context in of_contexts.items():
                if name in names:
                    write(name, at, of_context[inside])
        for name, file in files.items():
            file.flush()
            os.replace(place / f"{name}{suffix}", place / f"{name}.npy")
        (place / "facts.json").write_text(json.dumps(facts, indent=1))
    finally:
        for name in files:
            (place / f"{name}{suffix}").unlink(missing_ok=True)


def _rows(maker: ShardMaker, shard: int) -> dict[str, np.ndarray]:
    """The shard's rows per hook point, float32, in the order of contexts and positions."""
    meta, made = maker.unpermuted(shard)
    if meta["nonfinite"]:
        raise UserError(f"{nonfinite(meta)}, in shard {shard}")
    return {hook: rows.float().numpy() for hook, rows in made.items()}
