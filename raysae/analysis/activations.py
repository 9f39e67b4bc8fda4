"""What every analysis reads: activations of whole contexts, divided by document into A (fit W), B (fit probes on ê and ε) and C (evaluate).

`ArrayActivations` holds them in memory; `StreamActivations` maps files that `collect` records once per spec and hook point.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from raysae.config import ActivationSpec, UserError, digest
from raysae.sae.base import SAE, Codes
from raysae.stream.blocks import as_tensor

if TYPE_CHECKING:
    from raysae.stream.shard import ShardMaker
    from raysae.text.contexts import Contexts

SPLITS = "ABC"
THIRDS = (1 / 3, 1 / 3, 1 / 3)
CHUNK_ROWS = 8192  # per chunk, about: chunks hold whole contexts
BLOCK_CONTEXTS = 16  # neighbouring documents of at least this many contexts go to the same split together
DEFINITION = 1  # of the recorded files; raising it makes them anew


@dataclass(frozen=True)
class Chunk:
    """Rows of whole contexts, in order."""

    x: dict[str, Tensor]  # hook point → (b, d) float32
    token: Tensor  # (b,) int64 token ids
    position: Tensor  # (b,) int64, position in the context
    context: Tensor  # (b,) int64, index of the context; all rows of a context are in one chunk, next to each other
    token_loss: Tensor | None = None  # (b,) float32, the language model's loss in nats in predicting this token


class Activations(Protocol):
    """Activations at some hook points, split by document; reading is repeatable and always in the same order."""

    widths: dict[str, int]  # hook point → d

    def chunks(self, split: str) -> Iterator[Chunk]:
        """The rows of split "A", "B" or "C", chunk by chunk."""


# ---------------------------------------------------------------- in memory


class ArrayActivations:
    """Activations in memory, split by context, or by `document` where given.

    Args:
        x: hook point → (n, d).
        context: (n,) int64; rows of a context need not lie together.
        token, position, token_loss: (n,); token defaults to 0, position to the row's place in its context.
        document: (n,) the document of each row, constant within a context.
        fractions: shares of the documents (or contexts) in A, B and C.

    Raises:
        UserError: fewer than three documents or contexts.
    """

    def __init__(
        self,
        x: Mapping[str, Tensor],
        context: Tensor,
        token: Tensor | None = None,
        position: Tensor | None = None,
        token_loss: Tensor | None = None,
        document: Tensor | None = None,
        fractions: Sequence[float] = THIRDS,
        seed: int = 0,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        order = torch.argsort(context, stable=True)
        self._context = context[order]
        self._x = {hook: rows[order].float() for hook, rows in x.items()}
        self.widths = {hook: rows.shape[1] for hook, rows in self._x.items()}
        _, lengths = torch.unique_consecutive(self._context, return_counts=True)
        self._edges = [0, *lengths.cumsum(0).tolist()]  # of contexts
        place = torch.cat([torch.arange(length) for length in lengths])
        self._position = place if position is None else position[order]
        self._token = torch.zeros_like(self._context) if token is None else token[order]
        self._token_loss = None if token_loss is None else token_loss[order]
        unit = (self._context if document is None else document[order])[self._edges[:-1]]
        units, of_context = torch.unique(unit, return_inverse=True)
        sizes = torch.zeros(len(units)).index_add_(0, of_context, lengths.float())
        self._split = _assign(sizes.numpy(), fractions, seed)[of_context.numpy()]
        self._chunk_rows = chunk_rows

    def chunks(self, split: str) -> Iterator[Chunk]:
        rows: list[Tensor] = []
        for i in np.flatnonzero(self._split == SPLITS.index(split)):
            rows.append(torch.arange(self._edges[i], self._edges[i + 1]))
            if sum(map(len, rows)) >= self._chunk_rows:
                yield self._chunk(torch.cat(rows))
                rows = []
        if rows:
            yield self._chunk(torch.cat(rows))

    def _chunk(self, rows: Tensor) -> Chunk:
        loss = None if self._token_loss is None else self._token_loss[rows]
        return Chunk({h: x[rows] for h, x in self._x.items()}, self._token[rows], self._position[rows], self._context[rows], loss)


# ---------------------------------------------------------------- splits


def split_contexts(contexts: Contexts, fractions: Sequence[float] = THIRDS, seed: int = 0) -> np.ndarray:
    """The split of each context, `(contexts,)` int8: 0, 1, 2 for A, B, C, and −1 for a context that belongs to none.

    Contexts join documents. Documents are taken together in blocks of neighbours (so that few contexts lie on an edge) and blocks drawn for the
    splits; documents of equal content follow the first of them. A context all of whose documents are in one split is in it, others are dropped:
    no document has a token in two splits.

    Raises:
        UserError: the documents of the contexts are not recorded, or too few for three splits.
    """
    if contexts.spans is None or contexts.documents is None:
        raise UserError("text: these contexts do not say which documents they join: build them from the text again")
    first, last = contexts.spans.T
    seen = int(last.max(initial=-1)) + 1  # documents with text in some context
    start = np.searchsorted(last, np.arange(seen))  # the first context with text of each document
    size = int(np.clip(len(contexts) // 60, 1, BLOCK_CONTEXTS))
    _, block = np.unique(start // size, return_inverse=True)
    _, original, alike = np.unique(contexts.documents[:seen], return_index=True, return_inverse=True)
    block = block[original][alike]  # of equal documents, that of the first
    if len(np.unique(block)) < len(SPLITS):
        raise UserError(
            f"the held-out text has {seen} document{'s' * (seen != 1)} in {len(contexts)} contexts, too few for three splits by document: raise "
            "text.evaluation_fraction, set text.delimiter to what separates documents inside its files, or give more text"
        )
    spread = np.diff(start, append=len(contexts)) + 1e-6
    used, block = np.unique(block, return_inverse=True)
    document = _assign(np.bincount(block, spread, len(used)), fractions, seed)[block]
    changes = np.concatenate([[0], np.cumsum(document[1:] != document[:-1])])
    split = np.where(changes[first] == changes[last], document[first], -1).astype(np.int8)
    if missing := [name for i, name in enumerate(SPLITS) if not (split == i).any()]:
        raise UserError(
            f"the held-out text has no whole context for split {missing[0]}: raise text.evaluation_fraction, lower stream.context_length or give "
            "more text"
        )
    return split


def _assign(sizes: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """A split for each unit, `(units,)` int8: the largest first (equal ones in random order), each to the split that lacks most of its share."""
    if len(sizes) < len(fractions):
        raise UserError(f"the activations have {len(sizes)} documents or contexts, too few for the splits A, B and C: give more text")
    wanted = np.asarray(fractions, float) / np.sum(fractions) * sizes.sum()
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    split = np.empty(len(sizes), np.int8)
    for unit in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        split[unit] = np.argmax(wanted)
        wanted[split[unit]] -= sizes[unit]
    return split


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


# ---------------------------------------------------------------- what SAEs make of activations


def encoded(sae: SAE, x: Tensor) -> Iterator[tuple[slice, Codes | Tensor]]:
    """The codes of `x` (b, d) in pieces of rows that bound the memory of codes, on the SAE's device."""
    x = x.to(sae.b_dec)
    size = sae.rows_at_once()
    for start in range(0, len(x), size):
        part = slice(start, min(start + size, len(x)))
        yield part, sae.encode(x[part])


@torch.no_grad()
def reconstruct(sae: SAE, x: Tensor, activity: Activity | None = None) -> tuple[Tensor, Tensor]:
    """Sae(x) (b, d) and the number of active latents of each row (b,), both float32 on the device of `x` (b, d); counts `activity` where given."""
    reconstruction, l0 = [], []
    for _, codes in encoded(sae, x):
        reconstruction.append(sae.decode(codes).float())
        values = codes.values if isinstance(codes, Codes) else codes
        l0.append((values > 0).sum(1).float())
        if activity is not None:
            activity.add(codes)
    return torch.cat(reconstruction).to(x.device), torch.cat(l0).to(x.device)


class Activity:
    """How often and how strongly each of `n` latents is active: `rows` seen, `count` (n,) of them on which it is, `total` (n,) of its values."""

    def __init__(self, n: int) -> None:
        self.rows = 0
        self.count = torch.zeros(n, dtype=torch.float64)
        self.total = torch.zeros(n, dtype=torch.float64)

    def add(self, codes: Codes | Tensor) -> None:
        """Take in the codes of some rows."""
        n = len(self.count)
        if isinstance(codes, Codes):
            indices, values = codes.indices.flatten(), codes.values.flatten()
            count, total = torch.bincount(indices, (values > 0).double(), n), torch.bincount(indices, values.double(), n)
            self.rows += len(codes.values)
        else:
            count, total = (codes > 0).sum(0), codes.sum(0, dtype=torch.float64)
            self.rows += len(codes)
        self.count += count.cpu()
        self.total += total.cpu()

    @property
    def mean(self) -> Tensor:
        """Mean value over all rows, (n,)."""
        return self.total / max(1, self.rows)

    @property
    def mean_active(self) -> Tensor:
        """Mean value over the rows on which a latent is active, (n,); 0 where it never is."""
        return self.total / self.count.clamp_min(1)
