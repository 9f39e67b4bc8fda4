"""Tokenised text as fixed-length contexts on disk: built once per content, memory-mapped, addressable by index.

Definition. Changing it means raising `DEFINITION`.

- A document belongs to the evaluation split if the first 64 bits of its SHA-256 are below `evaluation_fraction` · 2^64.
  So equal documents never lie on both sides.
- Each split is the concatenation of its documents' tokens in the source's order. Each text is followed by
  `text.separator` and tokenised together with it. A separator that contains special tokens is tokenised on its own and
  becomes those.
- Special tokens spelled out in a text are plain text. There is no BOS between the texts of a context.
- A chat is what the tokenizer's chat template makes of it. The template's special tokens become special tokens, those
  spelled out in messages are plain text. No separator follows it, and none follows token ids.
- A chat or a document of token ids loses the BOS at its start, unless it has more of them.
- A document longer than 131,072 characters is cut after the last line end before that length. A longer line is cut at
  that length. The pieces are tokenised one by one.
- A context is the tokenizer's BOS and the next `context_length` - 1 tokens. EOS stands in if a tokenizer has no BOS.
  Without either, a context is `context_length` tokens of text.
- Contexts do not overlap. What remains at the end of a split is dropped.
- With `text.join_documents` false, each context is one document without a separator: BOS, unless the document begins
  with it, and the document's first tokens. A shorter document is followed by BOS up to the context length, by token 0
  without a BOS. Attention is causal, so this padding changes nothing before it.
- Each context's documents are recorded. So contexts can be divided further without a document on both sides.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shlex
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raysae.config import TextConfig, UserError, digest
from raysae.storage import SEAL, check_folder, local_path, sealed, unsealed
from raysae.text.sources import Document, content, documents, fingerprint
from raysae.text.tokens import Encoder, Piece, pieces

log = logging.getLogger(__name__)

DEFINITION = 2
MANIFEST = "contexts.json"
BATCH_CHARACTERS = 1 << 19  # Characters per call of the tokenizer, which holds some 200 bytes per token
SPELLED_OFTEN = 1e-6  # Special tokens per character of text. Rarer ones separate nothing, such as <s> in a web page

Split = Literal["train", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "evaluation")


@dataclass(frozen=True, eq=False)
class Contexts:
    """Contexts of one split.

    - `digest`: digest of the content of `tokens`.
    - `tokens`: `(contexts, context_length)`, unsigned integers, memory-mapped. It is a plain array over the mapping.
      `ray.put(contexts)` stores it once per node, and readers share it.
    - `documents`: `(documents,)` uint64, the first 64 bits of each document's SHA-256, in order.
    - `spans`: `(contexts, 2)` int64, the first and the last document (inclusive) that have text in a context. The
      separator counts as a document's text.

    `documents` and `spans` are None if nobody recorded them. `lengths` `(contexts,)` int64 counts each context's tokens
    before its padding. It is None if no context is padded.
    """

    digest: str
    tokens: np.ndarray
    documents: np.ndarray | None = None
    spans: np.ndarray | None = None
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: np.ndarray | slice | list[int]) -> np.ndarray:
        """Token ids of some contexts, `(n, context_length)` int64."""
        return self.tokens[indices].astype(np.int64)

    def real(self, indices: np.ndarray) -> np.ndarray:
        """Whether each position of some contexts has a token and no padding, `(n, context_length)` bool."""
        length = self.tokens.shape[1]
        lengths = np.full(len(indices), length) if self.lengths is None else self.lengths[indices]
        return np.arange(length) < lengths[:, None]

    def before_no_padding(self, indices: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Of the positions `kept` `(n, context_length)` bool of some contexts, those that padding does not follow."""
        return kept & np.pad(self.real(indices)[:, 1:], ((0, 0), (0, 1)), constant_values=True)


def build_contexts(
    text: TextConfig,
    load_tokenizer: Callable[[], Any],
    tokenizer_digest: str,
    context_length: int,
    enough: Mapping[Split, int] | None = None,
    run: Callable[..., None] = lambda function, *arguments: function(*arguments),
    load_vocabulary: Callable[[], tuple[int, int | None]] | None = None,
) -> dict[Split, Contexts]:
    """The contexts of both splits, from the cache in `text.cache` or tokenised now in one pass over the source.

    Special tokens that the text often spells out are logged, with the knob that splits the text there.

    Args:
        text: the source, the separator, the split and the cache.
        load_tokenizer: loads the tokenizer. It is called only if the text is tokenised now. Documents of token ids do
            without.
        tokenizer_digest: identifies the tokenizer.
        context_length: tokens per context.
        enough: how many contexts of each split will do. Reading stops once both splits have that many, so that a sweep
            over a dataset of terabytes begins soon. It is part of what the contexts are. Unset: the source is read to
            its end.
        run: `run(function, *arguments)` tokenises. With `apart.apart`, and a `load_tokenizer` that pickles, it does so
            in a process of its own.
        load_vocabulary: finds the `tokens.Vocabulary` of the language model, for documents of token ids. Unset: it is
            the tokenizer's.

    Raises:
        UserError: the source cannot be read, has no text, or has documents of one split only. It has token ids or chats
            that the language model cannot take. Or `text.cache` cannot be written.
    """
    key = {
        "definition": DEFINITION,
        "documents": fingerprint(text),
        "separator": text.separator,
        "evaluation_fraction": text.evaluation_fraction,
        "tokenizer": tokenizer_digest,
        "context_length": context_length,
    }
    key |= {"enough": dict(enough)} if enough else {}
    key |= {} if text.join_documents else {"join_documents": False}
    folder = local_path("text.cache", text.cache) / digest(key)
    contexts = {split: _open_split(folder, split) for split in SPLITS}
    if None in contexts.values():
        check_folder("text.cache", text.cache, folder)
        run(_write_splits, folder, text, load_tokenizer, load_vocabulary, context_length, enough)
        contexts = {split: _open_split(folder, split) for split in SPLITS}
        if None in contexts.values():
            raise OSError(f"tokenised text written to {folder} could not be read back")
    if told := _spelled(text, _manifest(folder).get("special_tokens", {})):
        log.warning(told)
    return contexts


def is_held_out(document: Document, evaluation_fraction: float) -> bool:
    """Whether a document belongs to the evaluation split."""
    return document_hash(document) / 2**64 < evaluation_fraction


def document_hash(document: Document) -> int:
    """The first 64 bits of the SHA-256 of the document's `content`."""
    return int.from_bytes(hashlib.sha256(content(document)).digest()[:8], "big")


# ---------------------------------------------------------------- tokenising


def _batches(text: TextConfig) -> Iterator[list[Piece]]:
    """Pieces of documents in order, in batches of about `BATCH_CHARACTERS`."""
    batch, characters = [], 0
    for document in documents(text):
        split = "evaluation" if is_held_out(document, text.evaluation_fraction) else "train"
        *inner, last = pieces(document)
        for piece in [*(Piece(split, part) for part in inner), Piece(split, last, document_hash(document))]:
            batch.append(piece)
            characters += piece.characters
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _spelled(text: TextConfig, found: Mapping[str, Any]) -> str | None:
    """What to tell of special tokens that a text spells out, from `Encoder.findings`."""
    least = SPELLED_OFTEN * found.get("characters", 0)
    often = {t: n for t, n in found.get("spelled", {}).items() if n > least or t in found["special"]}
    if not often:
        return None
    counts = ", ".join(f"{token!r} {count:,} times" for token, count in often.items())
    into = "special tokens inside contexts, where activations have outlier norms" if found["special"] else "plain text"
    knob = f"--text.delimiter {shlex.quote(next(iter(often)))}"
    return (
        f"text.source '{text.source}' spells special tokens of the language model's tokenizer ({counts}), which become "
        f"{into}: give {knob} if it separates documents"
    )


# ---------------------------------------------------------------- files
# A folder holds contexts.json and for each split its tokens and documents, e.g. train.tokens and train.documents. Where
# documents are not joined, it holds its lengths too.


class _SplitWriter:
    """Packs a stream of token ids into contexts and writes them as little-endian integers.

    Documents are written as (hash, end). The end counts steps of which a context has `body`: tokens of text.
    """

    def __init__(self, path: Path, context_length: int, dtype: str, first: int | None):
        self.path, self.file = path, path.open("wb")
        self.context_length, self.dtype, self.first = context_length, dtype, first
        self.body = context_length - (first is not None)
        self.pending = np.empty(0, dtype)
        self.tokens = self.contexts = 0
        self.documents: list[tuple[int, int]] = []
        self.content = _content_hash(context_length, dtype)

    def add(self, ids: list[list[int]], ended: list[int | None]) -> None:
        for row, document in zip(ids, ended, strict=True):
            self.tokens += len(row)
            if document is not None:
                self.documents.append((document, self.tokens))
        flat = np.concatenate([self.pending, *(np.array(row, self.dtype) for row in ids)])
        count = len(flat) // self.body
        rows = np.empty((count, self.context_length), self.dtype)
        if self.first is not None:
            rows[:, 0] = self.first
        rows[:, -self.body :] = flat[: count * self.body].reshape(count, self.body)
        self.pending = flat[count * self.body :].copy()
        self._write(rows)

    def _write(self, rows: np.ndarray) -> None:
        self.contexts += len(rows)
        self.content.update(rows)
        self.file.write(rows.data)

    def close(self) -> dict[str, object]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        documents = np.array(self.documents, "<u8").reshape(-1, 2)
        _write_array(self.path.with_suffix(".documents"), documents)
        return {
            "documents": len(documents),
            "documents_sha256": hashlib.sha256(documents).hexdigest(),
            "contexts": self.contexts,
            "body": self.body,
            "sha256": self.content.hexdigest(),
        }


class _DocumentWriter(_SplitWriter):
    """Writes one document per context, cut or padded. A context is one step."""

    def __init__(self, path: Path, context_length: int, dtype: str, first: int | None):
        super().__init__(path, context_length, dtype, first)
        self.body = 1
        self.row: list[int] = []  # Of the document that is being written
        self.lengths: list[int] = []

    def add(self, ids: list[list[int]], ended: list[int | None]) -> None:
        rows = np.full((sum(hash is not None for hash in ended), self.context_length), self.first or 0, self.dtype)
        unwritten = iter(rows)
        for piece, document in zip(ids, ended, strict=True):
            if not self.row and self.first is not None and piece[:1] != [self.first]:
                self.row.append(self.first)
            self.row += piece[: self.context_length - len(self.row)]
            if document is not None:
                next(unwritten)[: len(self.row)] = self.row
                self.lengths.append(len(self.row))
                self.documents.append((document, len(self.lengths)))
                self.row = []
        self._write(rows)

    def close(self) -> dict[str, object]:
        lengths = np.array(self.lengths, "<i8")
        self.content.update(lengths)
        _write_array(self.path.with_suffix(".lengths"), lengths)
        return super().close() | {"padded": bool((lengths < self.context_length).any())}


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def _content_hash(context_length: int, dtype: str) -> Any:
    return hashlib.sha256(f"{context_length} {dtype}\n".encode())


def _write_splits(
    folder: Path,
    text: TextConfig,
    load_tokenizer: Callable[[], Any],
    load_vocabulary: Callable[[], tuple[int, int | None]] | None,
    context_length: int,
    enough: Mapping[Split, int] | None,
) -> None:
    """Tokenise the source into a temporary folder and rename it to `folder`. So nobody sees an incomplete `folder`."""
    try:
        work = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"text.cache is '{text.cache}', which cannot be written ({error.strerror}): "
            "name a folder that you can write to"
        ) from error
    try:
        encode = Encoder(text, load_tokenizer, load_vocabulary)
        manifest = _write_batches(work, text, encode, context_length, enough)
        with (work / MANIFEST).open("wb") as file:
            file.write(sealed(manifest))
            file.flush()
            os.fsync(file.fileno())
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # Otherwise another process was first, and its folder holds the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_batches(
    work: Path, text: TextConfig, encode: Encoder, context_length: int, enough: Mapping[Split, int] | None
) -> dict[str, object]:
    """Tokenise the source into the folder `work`. Returns what contexts.json holds."""
    batches = _batches(text)
    start = next(batches, None)
    if start is None:
        raise UserError(f"text.source is '{text.source}', which holds no text")
    size, first = encode.vocabulary_of(start)
    dtype = "<u2" if size <= 1 << 16 else "<u4"
    kind = _SplitWriter if text.join_documents else _DocumentWriter
    writers = {split: kind(work / f"{split}.tokens", context_length, dtype, first) for split in SPLITS}
    for batch in itertools.chain([start], batches):
        ids = encode(batch)
        for split, writer in writers.items():
            own = [(row, piece.ended) for row, piece in zip(ids, batch, strict=True) if piece.split == split]
            writer.add([row for row, _ in own], [ended for _, ended in own])
        if enough and all(writers[split].contexts >= enough[split] for split in SPLITS):
            break
    found = encode.findings()
    of_splits = {split: writer.close() for split, writer in writers.items()}
    _check_documents(text, *(len(writers[split].documents) for split in SPLITS), _spelled(text, found))
    return {"context_length": context_length, "dtype": dtype, **of_splits, "special_tokens": found}


def _check_documents(text: TextConfig, train: int, evaluation: int, spelled: str | None) -> None:
    total = train + evaluation
    if train == 0 or evaluation == 0:
        amount = "a single document" if total == 1 else f"{total} documents, all of them in one split"
        more = (
            "Give more documents: each is a line of jsonl, a row of parquet, or a whole txt or md file unless "
            "text.delimiter splits it"
        )
        if total == 1 and text.delimiter:
            more = f"text.delimiter {text.delimiter!r} occurs nowhere in it: give what separates its documents"
        raise UserError(
            f"text.source '{text.source}' is {amount}, so train and evaluation cannot both have text. "
            f"{more}" + (f". {spelled}" if spelled else "")
        )


def _manifest(folder: Path) -> dict[str, Any]:
    """What a folder's manifest holds. Those of older folders have no counts of special tokens, and no checksum.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.
    """
    data = (folder / MANIFEST).read_bytes()
    content = json.loads(data)
    return unsealed(data, MANIFEST) if "special_tokens" in content or SEAL in content else content


def _open_split(folder: Path, split: Split) -> Contexts | None:
    """Contexts of a split as written, or None if there are none.

    Damaged contexts are removed with a warning and count as none.
    """
    if not folder.is_dir():
        return None
    try:
        manifest = _manifest(folder)
        length, dtype, entry = manifest["context_length"], manifest["dtype"], manifest[split]
        path = folder / f"{split}.tokens"
        shape = (entry["contexts"], length)
        if path.stat().st_size != shape[0] * length * np.dtype(dtype).itemsize:
            raise ValueError(f"{path.name} has a wrong size")
        tokens = _mapped(path, dtype, shape)
        lengths = _mapped(path.with_suffix(".lengths"), "<i8", shape[:1]) if "padded" in entry else None
        checksum = _content_hash(length, dtype)
        checksum.update(tokens)
        if lengths is not None:
            checksum.update(lengths)
        if checksum.hexdigest() != entry["sha256"]:
            raise ValueError(f"{path.name} {'has' if lengths is None else 'or its lengths have'} a wrong checksum")
        documents = np.fromfile(path.with_suffix(".documents"), "<u8").reshape(-1, 2)
        if hashlib.sha256(documents).hexdigest() != entry["documents_sha256"]:
            raise ValueError(f"{path.stem}.documents has a wrong checksum")
        edges = entry["body"] * np.arange(len(tokens) + 1)
        ends = documents[:, 1].astype(np.int64)
        first, last = (np.searchsorted(ends, tokens_at, side="right") for tokens_at in (edges[:-1], edges[1:] - 1))
        spans = np.stack([first, last], 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"tokenised text in {folder} is damaged ({error}): it is removed and tokenised again",
            RuntimeWarning,
            stacklevel=3,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Contexts(
        entry["sha256"][:16], tokens, documents[:, 0].copy(), spans, lengths if entry.get("padded") else None
    )


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A file's content as a plain array, because a memmap would pickle in-band. An empty file cannot be mapped."""
    return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray) if shape[0] else np.empty(shape, dtype)
