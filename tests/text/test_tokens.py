"""Documents of token ids, chats, contexts of one document each, and special tokens that a text spells out."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from raysae.config import TextConfig, UserError
from raysae.text import contexts as module
from raysae.text.contexts import Contexts, build_contexts
from raysae.text.tokens import special_tokens
from tests.text.test_contexts import BOS, DOCUMENTS, byte_tokenizer, halves

SPECIAL = {BOS.bos_token_id, BOS.eos_token_id}
TEMPLATE = "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
CHATS = [
    [{"role": "user", "content": f"What is {i}? <s>"}, {"role": "assistant", "content": "Half of " + str(2 * i)}]
    for i in range(200)
]


def plain(text: str) -> list[int]:
    return BOS(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def no_tokenizer():
    raise UserError("there is no tokenizer")


def config(folder: Path, documents: list, **options) -> TextConfig:
    (folder / "documents.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    source = str(folder / "documents.jsonl")
    return TextConfig(source=source, cache=str(folder / "cache"), evaluation_fraction=0.3, **options)


def texts_of(contexts: Contexts) -> set[tuple[int, ...]]:
    """The real tokens of each context after BOS."""
    lengths = np.full(len(contexts), contexts.tokens.shape[1]) if contexts.lengths is None else contexts.lengths
    return {tuple(row[1:length].tolist()) for row, length in zip(contexts.tokens, lengths, strict=True)}


# ---------------------------------------------------------------- token ids


def test_token_ids_equal_their_definition(tmp_path):
    ids = [[3 + i % 7, i % 250, *range(i % 30)] for i in range(300)]
    text = config(tmp_path, ids)
    built = build_contexts(text, no_tokenizer, "t", 16, load_vocabulary=lambda: (70_000, 256))
    for split, contexts in built.items():
        own = [row for row in ids if (split == "evaluation") == module.is_held_out(row, text.evaluation_fraction)]
        flat = [i for row in own for i in row]
        expected = [[256, *flat[i : i + 15]] for i in range(0, len(flat) - 14, 15)]
        assert contexts.tokens.tolist() == expected
        assert contexts.tokens.dtype == np.uint32  # The vocabulary is too large for 16 bits


@pytest.mark.parametrize("bad", [258, -1])
def test_an_id_outside_the_vocabulary_is_told(tmp_path, bad):
    text = config(tmp_path, [[1, 2, bad], *([[i] for i in range(50)])])
    with pytest.raises(UserError, match=rf"text\.field is 'text', whose token ids hold {bad}, but .* 0 to 257"):
        build_contexts(text, no_tokenizer, "t", 16, load_vocabulary=lambda: (258, 256))


def test_a_bos_that_begins_token_ids_is_dropped_where_documents_are_joined(tmp_path):
    starting = [[256, 101, i] for i in range(60)]
    several = [[256, 102, i, 256] for i in range(60)]
    text = config(tmp_path, starting + several)
    built = build_contexts(text, no_tokenizer, "t", 8, load_vocabulary=lambda: (258, 256))
    inside = np.concatenate([contexts.tokens[:, 1:].ravel() for contexts in built.values()]).tolist()
    assert inside.count(101) > 50
    assert abs(inside.count(256) - 2 * inside.count(102)) <= 4  # What remains at the ends of the splits is dropped
    alone = text.model_copy(update={"join_documents": False})
    built = build_contexts(alone, no_tokenizer, "t", 8, load_vocabulary=lambda: (258, 256))
    assert {tuple(row[:3]) for c in built.values() for row in c.tokens.tolist()} == {
        (256, n, i) for n in (101, 102) for i in range(60)
    }


def test_texts_need_the_tokenizer_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer"):
        build_contexts(config(tmp_path, DOCUMENTS), no_tokenizer, "t", 16, load_vocabulary=lambda: (258, 256))


# ---------------------------------------------------------------- chats


def chatting():
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_chats_go_through_the_template_and_its_special_tokens_become_special(tmp_path):
    def naive(chat) -> list[int]:
        bos, eos = BOS.bos_token_id, BOS.eos_token_id
        return [i for m in chat for i in [bos, *plain(f"{m['role']}: {m['content']}"), eos]]

    text = config(tmp_path, CHATS)
    for split, contexts in build_contexts(text, chatting, "t", 32).items():
        own = [chat for chat in CHATS if (split == "evaluation") == module.is_held_out(chat, 0.3)]
        flat = [i for chat in own for i in naive(chat)]
        assert contexts.tokens.tolist() == [[256, *flat[i : i + 31]] for i in range(0, len(flat) - 30, 31)]
    alone = build_contexts(text.model_copy(update={"join_documents": False}), chatting, "t", 80)
    assert {tuple(naive(chat)[1:]) for chat in CHATS} == texts_of(alone["train"]) | texts_of(alone["evaluation"])


def test_a_tokenizer_without_a_template_gets_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"text\.field is 'text', which holds chats, but .* has no chat template"):
        build_contexts(config(tmp_path, CHATS), lambda: BOS, "t", 32)


def test_a_chat_that_the_template_refuses_gets_one_sentence(tmp_path):
    def strict():
        tokenizer = chatting()
        tokenizer.chat_template = "{{ raise_exception('roles must alternate\\nand more') }}"
        return tokenizer

    with pytest.raises(UserError, match=r"chat template refuses a chat \(.*roles must alternate\)\. The traceback"):
        build_contexts(config(tmp_path, CHATS), strict, "t", 32)


# ---------------------------------------------------------------- one document per context


@pytest.mark.parametrize("tokenizer", [BOS, byte_tokenizer()], ids=["bos", "none"])
def test_unjoined_contexts_equal_their_definition(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("raysae.text.tokens.PIECE_CHARACTERS", 40)  # Cuts documents into several pieces
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    text = config(tmp_path, DOCUMENTS, join_documents=False)
    built = build_contexts(text, lambda: tokenizer, "t", 128)
    head = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for split, documents in halves(0.3).items():
        rows = [(head + plain(document))[:128] for document in documents]
        contexts = built[split]
        assert contexts.lengths.tolist() == [len(row) for row in rows]
        assert contexts.lengths.min() < 128 == contexts.lengths.max()
        assert contexts.tokens.tolist() == [row + [head[0] if head else 0] * (128 - len(row)) for row in rows]
        assert contexts.spans.tolist() == [[i, i] for i in range(len(rows))]
        assert contexts.documents.tolist() == [module.document_hash(document) for document in documents]


def test_lengths_are_mapped_and_none_where_nothing_is_padded(tmp_path):
    text = config(tmp_path, DOCUMENTS, join_documents=False)
    padded, full = (build_contexts(text, lambda: BOS, "t", length)["train"] for length in (64, 8))
    assert type(padded.lengths) is np.ndarray
    assert not padded.lengths.flags.writeable
    assert full.lengths is None
    assert (
        build_contexts(text.model_copy(update={"join_documents": True}), lambda: BOS, "t", 64)["train"].lengths is None
    )


def test_equal_tokens_of_other_lengths_have_another_digest(tmp_path):
    digests = set()
    for end in ([], [256]):  # The second document's end looks like padding
        text = config(tmp_path, [[i, 5, *end] for i in range(60)], join_documents=False)
        built = build_contexts(text, no_tokenizer, "t", 8, load_vocabulary=lambda: (258, 256))
        digests.add(built["train"].digest)
    assert len(digests) == 2


def test_damaged_lengths_are_made_anew(tmp_path):
    text = config(tmp_path, DOCUMENTS, join_documents=False)
    first = build_contexts(text, lambda: BOS, "t", 64)["train"]
    expected = first.lengths.copy()
    (folder,) = (tmp_path / "cache").iterdir()
    content = bytearray((folder / "train.lengths").read_bytes())
    content[8] ^= 1
    (folder / "train.lengths").write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"train\.tokens or its lengths have a wrong checksum"):
        again = build_contexts(text, lambda: BOS, "t", 64)["train"]
    assert np.array_equal(again.lengths, expected)


# ---------------------------------------------------------------- special tokens


def stories(folder: Path, between: str, count: int = 60) -> TextConfig:
    for name in ("a", "b", "c", "d", "e", "f"):
        (folder / f"{name}.txt").write_text(between.join(f"{name} story {i}" for i in range(count)))
    return TextConfig(source=str(folder), cache=str(folder / "cache"), evaluation_fraction=0.5)


def test_special_tokens_in_a_text_are_told_with_the_knob_also_from_the_cache(tmp_path, caplog, monkeypatch):
    text = stories(tmp_path, "\n</s>\n")
    built = build_contexts(text, lambda: BOS, "t", 16)
    (told,) = [record.message for record in caplog.records]
    assert "('</s>' 354 times), which become plain text: give --text.delimiter '</s>' if" in told
    assert "\n" not in told
    assert not any(SPECIAL & set(contexts.tokens[:, 1:].ravel().tolist()) for contexts in built.values())
    caplog.clear()
    monkeypatch.setattr(module, "_write_splits", lambda *_: pytest.fail("tokenised again"))
    build_contexts(text, lambda: BOS, "t", 16)
    assert [record.message for record in caplog.records] == [told]


def test_nothing_is_told_of_a_split_text_or_of_rare_special_tokens(tmp_path, caplog):
    text = stories(tmp_path, "</s>")
    build_contexts(text.model_copy(update={"delimiter": "</s>"}), lambda: BOS, "t", 16)
    (tmp_path / "g.txt").write_text("one <s> in many words " + "word " * 300_000)
    build_contexts(text.model_copy(update={"delimiter": "</s>"}), lambda: BOS, "t", 16)
    assert not caplog.records


def test_a_single_document_is_refused_with_the_special_token_that_may_split_it(tmp_path):
    stories(tmp_path, "</s>")
    text = TextConfig(source=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"a single document.* give --text\.delimiter '</s>'"):
        build_contexts(text, lambda: BOS, "t", 16)


def test_a_tokenizer_that_makes_special_tokens_of_text_is_told_apart(tmp_path, caplog):
    class Careless:
        """Ignores `split_special_tokens`, as tokenizers with code of their own may."""

        def __getattr__(self, name):
            return getattr(BOS, name)

        def __len__(self):
            return len(BOS)

        def __call__(self, text, split_special_tokens=False, **options):
            return BOS(text, split_special_tokens=False, **options)

    build_contexts(stories(tmp_path, "</s>"), Careless, "t", 16)
    assert "which become special tokens inside contexts" in caplog.records[0].message


def test_special_tokens_without_a_role_are_special_too(tmp_path, caplog):
    tokenizer = byte_tokenizer(bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<file>"]}, replace_extra_special_tokens=False)
    tokenizer._extra_special_tokens = []  # As SmolLM2's tokenizer has them: special, without a role
    assert "<file>" not in tokenizer.all_special_tokens
    assert special_tokens(tokenizer) == ["<s>", "<file>"]
    text = stories(tmp_path, "<file>")
    build_contexts(text, lambda: tokenizer, "t", 16)
    assert "'<file>' 354 times" in caplog.records[0].message
    separated = text.model_copy(update={"separator": "<file>", "delimiter": "<file>"})
    found = build_contexts(separated, lambda: tokenizer, "t", 16)["train"]
    assert (found.tokens == tokenizer.convert_tokens_to_ids("<file>")).sum() > 50


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.WARNING, "raysae.text")
