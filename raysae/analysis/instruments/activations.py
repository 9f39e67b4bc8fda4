"""What every analysis reads: activations of whole contexts, split by document into A, B and C.

Split A fits W, B fits probes on ê and ε, and C evaluates. `ArrayActivations` holds activations in memory.
`StreamActivations` of `raysae.analysis.lab.recording` maps files that `collect` records once per spec and hook point.
The module also encodes and reconstructs rows with an SAE, within bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from raysae.config import UserError
from raysae.sae.base import SAE, Codes

if TYPE_CHECKING:
    from raysae.text.contexts import Contexts

SPLITS = "ABC"
THIRDS = (1 / 3, 1 / 3, 1 / 3)
CHUNK_ROWS = 8192  # Approximate rows of a chunk, which holds whole contexts
# Documents of a group begin within a window of at most so many contexts, and there are at least so many windows
MOST_WINDOW, FEWEST_WINDOWS = 16, 12
MOST_DROPPED = 0.1  # Share of the contexts that may join two groups and are dropped


@dataclass(frozen=True)
class Chunk:
    """Rows of whole contexts, in order."""

    x: dict[str, Tensor]  # hook point → (b, d) float32
    token: Tensor  # (b,) int64 token ids
    position: Tensor  # (b,) int64, position in the context
    context: Tensor  # (b,) int64, index of the context. All rows of a context are in one chunk, next to each other
    group: Tensor  # (b,) int64, the group of documents that the context belongs to. Intervals are over groups
    # (b,) float32, the language model's loss in nats of the prediction made at the position, of the token after it. NaN
    # at the last position
    token_loss: Tensor | None = None


class Activations(Protocol):
    """Activations at some hook points, split by document.

    Reading is repeatable and always in the same order.
    """

    widths: dict[str, int]  # hook point → d

    def chunks(self, split: str) -> Iterator[Chunk]:
        """Yields the rows of split "A", "B" or "C", chunk by chunk."""


# ---------------------------------------------------------------- in memory


class ArrayActivations:
    """Activations in memory, split by context, or by `document` where given.

    Args:
        x: hook point → (n, d).
        context: (n,) int64. Rows of a context need not lie together.
        token, position, token_loss: (n,). token defaults to 0, position to the row's place in its context.
        document: (n,) int64, the document of each row, constant within a context. A document is a group.
        seed: draws the order in which documents (or contexts) of equal size are assigned.
        chunk_rows: rows after which a chunk ends with its context.

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
        seed: int = 0,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        order = torch.argsort(context, stable=True)
        self._context = context[order]
        self._x = {hook: rows[order].float() for hook, rows in x.items()}
        self.widths = {hook: rows.shape[1] for hook, rows in self._x.items()}
        _, lengths = torch.unique_consecutive(self._context, return_counts=True)
        self._edges = [0, *lengths.cumsum(0).tolist()]  # First row of each context, then the number of rows
        place = torch.cat([torch.arange(length) for length in lengths])
        self._position = place if position is None else position[order]
        self._token = torch.zeros_like(self._context) if token is None else token[order]
        self._token_loss = None if token_loss is None else token_loss[order]
        self._group = self._context if document is None else document[order]
        unit = self._group[self._edges[:-1]]
        units, of_context = torch.unique(unit, return_inverse=True)
        sizes = torch.zeros(len(units)).index_add_(0, of_context, lengths.float())
        self._split = _assign(sizes.numpy(), THIRDS, seed)[of_context.numpy()]
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
        x = {hook: x[rows] for hook, x in self._x.items()}
        return Chunk(x, self._token[rows], self._position[rows], self._context[rows], self._group[rows], loss)


# ---------------------------------------------------------------- splits


@dataclass(frozen=True)
class Split:
    """Which contexts belong to which split and group.

    split: (contexts,) int8. 0, 1 and 2 are A, B and C, and −1 is none.
    group: (contexts,) int64, the group of documents of each context in a split.
    """

    split: np.ndarray
    group: np.ndarray


def split_contexts(contexts: Contexts, fractions: Sequence[float] = THIRDS, seed: int = 0) -> Split:
    """Splits contexts by document: no document has a token in two splits.

    Contexts join documents. Documents that begin within a few contexts form a group, and so do documents of equal
    content. A context belongs to the group that has all its documents, and a context that joins two groups is dropped.
    So no context ties a group to another, and intervals may take groups as independent. Groups are as small as they can
    be without dropping more than a tenth of the contexts. Whole groups go to a split.

    Raises:
        UserError: the documents of the contexts are not recorded, or too few for three splits.
    """
    if contexts.spans is None or contexts.documents is None:
        raise UserError("text: these contexts do not say which documents they join: build them from the text again")
    group = _groups(contexts.spans, contexts.documents)
    groups, of_context = np.unique(group[group >= 0], return_inverse=True)
    if len(groups) < len(SPLITS):
        seen = int(contexts.spans.max(initial=-1)) + 1
        raise UserError(
            f"the held-out text has {seen} document{'s' * (seen != 1)} in {len(contexts)} contexts, too few for three "
            "splits by document: raise text.evaluation_fraction, set text.delimiter to what separates documents inside "
            "its files, or give more text"
        )
    split = np.full(len(contexts), -1, np.int8)
    split[group >= 0] = _assign(np.bincount(of_context), fractions, seed)[of_context]
    return Split(split, group)


def _groups(spans: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The group of each context, (contexts,) int64. −1 is a context that joins two groups.

    Documents of a group begin within `size` contexts. `size` is the least that drops no more than MOST_DROPPED of the
    contexts. Many groups matter more than contexts where there are few.
    """
    first, last = spans.T
    seen = int(last.max(initial=-1)) + 1  # Number of documents up to the last with text in some context
    start = np.searchsorted(last, np.arange(seen))  # First context with text of each document
    _, original, alike = np.unique(documents[:seen], return_index=True, return_inverse=True)
    for size in range(1, int(np.clip(len(spans) // FEWEST_WINDOWS, 2, MOST_WINDOW)) + 1):
        of_document = (start // size)[original][alike]  # Equal documents take the group of the first of them
        changes = np.concatenate([[0], np.cumsum(of_document[1:] != of_document[:-1])])
        whole = changes[first] == changes[last]
        if whole.mean() >= 1 - MOST_DROPPED:
            break
    return np.where(whole, of_document[first], -1)


def _assign(sizes: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Assigns a split to each unit, `(units,)` int8.

    The largest unit comes first, equal ones in random order. Each goes to the split that lacks most of its share.
    """
    if len(sizes) < len(fractions):
        raise UserError(
            f"the activations have {len(sizes)} documents or contexts, too few for the splits A, B and C: give more "
            "text"
        )
    wanted = np.asarray(fractions, float) / np.sum(fractions) * sizes.sum()
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    split = np.empty(len(sizes), np.int8)
    for unit in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        split[unit] = np.argmax(wanted)
        wanted[split[unit]] -= sizes[unit]
    return split


# ---------------------------------------------------------------- what SAEs make of activations


def encoded(sae: SAE, x: Tensor) -> Iterator[tuple[slice, Codes | Tensor]]:
    """Yields the codes of `x` (b, d) on the SAE's device, with the rows they belong to.

    Pieces of rows bound the memory of codes.
    """
    x = x.to(sae.b_dec)
    size = sae.rows_at_once()
    for start in range(0, len(x), size):
        part = slice(start, min(start + size, len(x)))
        yield part, sae.encode(x[part])


@torch.no_grad()
def reconstruct(sae: SAE, x: Tensor, activity: Activity | None = None) -> tuple[Tensor, Tensor]:
    """Sae(x) (b, d) and the number of active latents of each row (b,).

    Both are float32 on the device of `x` (b, d). `activity`, where given, takes in the codes.
    """
    reconstruction, l0 = [], []
    for _, codes in encoded(sae, x):
        reconstruction.append(sae.decode(codes).float())
        values = codes.values if isinstance(codes, Codes) else codes
        l0.append((values > 0).sum(1).float())
        if activity is not None:
            activity.add(codes)
    return torch.cat(reconstruction).to(x.device), torch.cat(l0).to(x.device)


class Activity:
    """How often and how strongly each of `n` latents is active.

    `rows` is the number of rows seen. `count` (n,) is the number of rows on which a latent is active, `total` (n,) the
    sum of its values.
    """

    def __init__(self, n: int) -> None:
        self.rows = 0
        self.count = torch.zeros(n, dtype=torch.float64)
        self.total = torch.zeros(n, dtype=torch.float64)

    def add(self, codes: Codes | Tensor) -> None:
        """Takes in the codes of some rows."""
        n = len(self.count)
        if isinstance(codes, Codes):
            indices, values = codes.indices.flatten(), codes.values.flatten()
            count, total = (
                torch.bincount(indices, (values > 0).double(), n),
                torch.bincount(indices, values.double(), n),
            )
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
        """Mean value over the rows on which a latent is active, (n,). 0 where it never is."""
        return self.total / self.count.clamp_min(1)
