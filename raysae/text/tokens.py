"""Documents as token ids, by the definition in `contexts`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from raysae.borders import border
from raysae.config import TextConfig, UserError
from raysae.text.sources import Document

PIECE_CHARACTERS = 1 << 17  # Longest text tokenised in one go
PLAIN = {
    "add_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}


class Vocabulary(NamedTuple):
    """The token ids of a language model: those below `size`.

    `first` is the id at position 0 of a context: BOS, or else EOS. It is None where the model has neither.
    """

    size: int
    first: int | None


@dataclass(frozen=True)
class Piece:
    """A piece of a document: a part of a long text, or the whole document.

    `ended` is the document's hash in its last piece, and None in the others.
    """

    split: str
    content: Document
    ended: int | None = None

    @property
    def characters(self) -> int:
        """About how many characters it has. A token id counts as four."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(4 if isinstance(item, int) else len(str(item)) for item in self.content)


def pieces(document: Document) -> Iterator[Document]:
    """The document, cut where a text is longer than `PIECE_CHARACTERS`."""
    start = 0
    while isinstance(document, str) and len(document) - start > PIECE_CHARACTERS:
        end = document.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        yield document[start:end]
        start = end
    yield document[start:]


def special_tokens(tokenizer: Any) -> list[str]:
    """Every special token of a tokenizer. `all_special_tokens` lacks those that have no role such as BOS."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token]


class Encoder:
    """Turns pieces of documents into token ids, and counts the special tokens that texts spell out.

    `characters` counts the characters of texts so far, `spelled` the special tokens in them.
    """

    def __init__(
        self,
        text: TextConfig,
        load_tokenizer: Callable[[], Any],
        load_vocabulary: Callable[[], tuple[int, int | None]] | None = None,
    ) -> None:
        """
        Args:
            text: names the separator and whether documents are joined.
            load_tokenizer: loads the tokenizer. Documents of token ids do without.
            load_vocabulary: finds the language model's `Vocabulary`. It is called for documents of token ids. Unset: it
                is the tokenizer's.
        """
        self.text, self._load_tokenizer, self._load_vocabulary = text, load_tokenizer, load_vocabulary
        self.characters, self.spelled = 0, Counter()

    @cached_property
    def tokenizer(self) -> Any:
        return self._load_tokenizer()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The language model's vocabulary, which documents of token ids are checked against."""
        return Vocabulary(*self._load_vocabulary()) if self._load_vocabulary else self.tokens

    @cached_property
    def tokens(self) -> Vocabulary:
        """What the tokenizer makes of texts."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return Vocabulary(len(self.tokenizer), eos if bos is None else bos)

    @cached_property
    def special(self) -> list[str]:
        return special_tokens(self.tokenizer)

    @cached_property
    def _separator(self) -> tuple[str, list[int]]:
        """What follows each text: as text tokenised with it, or as token ids."""
        separator = self.text.separator if self.text.join_documents else ""
        if any(token in separator for token in self.special):
            return "", self.tokenizer(separator, **PLAIN)["input_ids"]
        return separator, []

    def vocabulary_of(self, batch: Sequence[Piece]) -> Vocabulary:
        """The vocabulary of a batch's documents."""
        return self.vocabulary if all(_is_ids(piece.content) for piece in batch) else self.tokens

    def __call__(self, batch: Sequence[Piece]) -> list[list[int]]:
        """Token ids of each piece.

        Raises:
            UserError: an id is not in the vocabulary, or there are chats and the tokenizer cannot take them.
        """
        found: list[list[int]] = [[] for _ in batch]
        texts = [i for i, piece in enumerate(batch) if isinstance(piece.content, str)]
        ids = [i for i, piece in enumerate(batch) if _is_ids(piece.content)]
        chats = sorted(set(range(len(batch))) - {*texts, *ids})
        for encode, own in ((self._texts, texts), (self._ids, ids), (self._chats, chats)):
            if own:
                for i, row in zip(own, encode([batch[i] for i in own]), strict=True):
                    found[i] = row
        return found

    def _texts(self, batch: list[Piece]) -> list[list[int]]:
        as_text, as_ids = self._separator
        for piece in batch:
            self.characters += len(piece.content)
            self.spelled.update({token: n for token in self.special if (n := piece.content.count(token))})
        texts = [piece.content if piece.ended is None else piece.content + as_text for piece in batch]
        rows = self.tokenizer(texts, split_special_tokens=True, **PLAIN)["input_ids"]
        return [row if piece.ended is None else row + as_ids for row, piece in zip(rows, batch, strict=True)]

    def _ids(self, batch: list[Piece]) -> list[list[int]]:
        size, first = self.vocabulary
        for piece in batch:
            if bad := [i for i in piece.content if not 0 <= i < size]:
                raise UserError(
                    f"text.field is '{self.text.field}', whose token ids hold {bad[0]}, but the language model has the "
                    f"ids 0 to {size - 1}: name the model whose tokenizer made them"
                )
        return [self._joinable(piece.content, first) for piece in batch]

    def _chats(self, batch: list[Piece]) -> list[list[int]]:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"text.field is '{self.text.field}', which holds chats, but the language model's tokenizer has no chat "
                "template: name a model that chats, or a column that holds text"
            )
        fault = "where the language model's chat template refuses a chat"
        with border("text.field", f"'{self.text.field}'", fault):
            # Special tokens in messages stay text, and those of the template become special tokens
            rows = self.tokenizer.apply_chat_template(
                [piece.content for piece in batch], return_dict=False, sanitize_control_tokens=True
            )
        return [self._joinable(row, self.tokens.first) for row in rows]

    def _joinable(self, row: list[int], first: int | None) -> list[int]:
        """Without the BOS that begins the document, if documents are joined and the document has no other."""
        return row[1:] if self.text.join_documents and row[:1] == [first] and row.count(first) == 1 else row

    def findings(self) -> dict[str, Any]:
        """The special tokens that texts spell out, most frequent first, as JSON.

        - `characters`: how many characters of text there are.
        - `spelled`: how often each special token is in them.
        - `special`: those that the tokenizer makes special tokens of, although it is asked not to.
        """
        spelled = dict(self.spelled.most_common())
        as_ids = {token: self.tokenizer(token, split_special_tokens=True, **PLAIN)["input_ids"] for token in spelled}
        special = [t for t, ids in as_ids.items() if self.tokenizer.convert_tokens_to_ids(t) in ids]
        return {"characters": self.characters, "spelled": spelled, "special": special}


def _is_ids(document: Document) -> bool:
    return not isinstance(document, str) and isinstance(document[0], int)
