"""Contexts against a naive version of their definition, and the cache of tokenised text."""

import hashlib
import json
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raysae.config import TextConfig, UserError
from raysae.text import contexts as module
from raysae.text import tokens as tokens_module
from raysae.text.contexts import Contexts, _write_splits, build_contexts, documents, is_held_out
from raysae.text.tokens import Piece, pieces

DOCUMENTS = [
    f"Story {i}: "
    + " ".join(f"word{j * i % 17}" for j in range(i % 40 + 1))
    + ("\nsays <s> and </s>" if i % 7 == 0 else "")
    for i in range(300)
]


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte. Special tokens come after those in the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


BOS = byte_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture
def text(tmp_path) -> TextConfig:
    (tmp_path / "stories.txt").write_text("\n<|end|>\n".join(DOCUMENTS))
    return TextConfig(
        source=str(tmp_path / "stories.txt"),
        delimiter="<|end|>",
        cache=str(tmp_path / "cache"),
        evaluation_fraction=0.3,
    )


def naive(documents: list[str], tokenizer, length: int, first: int | None) -> np.ndarray:
    ids = [
        i
        for document in documents
        for i in tokenizer(document + "\n\n", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ]
    head = [] if first is None else [first]
    body = length - len(head)
    return np.array([head + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)])


def halves(fraction: float) -> dict[str, list[str]]:
    found = {"train": [], "evaluation": []}
    for document in DOCUMENTS:
        share = int(hashlib.sha256(document.encode()).hexdigest()[:16], 16) / 16**16
        found["evaluation" if share < fraction else "train"].append(document)
    return found


@pytest.mark.parametrize("split", ["train", "evaluation"])
@pytest.mark.parametrize(
    ("tokenizer", "first"),
    [(BOS, BOS.bos_token_id), (byte_tokenizer(eos_token="</s>"), 256), (byte_tokenizer(), None)],
    ids=["bos", "eos", "neither"],
)
def test_contexts_equal_their_definition(text, split, tokenizer, first, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)  # Gives many batches
    found = build_contexts(text, lambda: tokenizer, "t", 32)[split]
    expected = naive(halves(0.3)[split], tokenizer, 32, first)
    assert 0.15 < len(halves(0.3)["evaluation"]) / len(DOCUMENTS) < 0.45
    assert np.array_equal(found.tokens, expected)
    assert found.tokens.dtype == np.uint16
    assert len(found) == len(expected)
    picked = found[np.array([3, 0])]
    assert picked.dtype == np.int64
    assert np.array_equal(picked, expected[[3, 0]])
    if first is not None:
        assert (found.tokens[:, 1:] < 256).all(), "special tokens spelled out in documents are plain text"


def test_a_real_tokenizer(text, stories_model):
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    found = build_contexts(text, lambda: tokenizer, "t", 64)["train"]
    assert np.array_equal(found.tokens, naive(halves(0.3)["train"], tokenizer, 64, 1))


def test_long_documents_are_cut_at_line_ends(text, monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 40)
    for document in DOCUMENTS:
        found = list(pieces(document))
        assert "".join(found) == document
        assert all(len(piece) <= 40 for piece in found)
    assert list(pieces("a" * 39 + "\n" + "b" * 90)) == ["a" * 39 + "\n", "b" * 40, "b" * 40, "b" * 10]
    found = build_contexts(text, lambda: BOS, "t", 32)["train"]  # Cuts change nothing for a byte tokenizer
    assert np.array_equal(found.tokens, naive(halves(0.3)["train"], BOS, 32, BOS.bos_token_id))


def test_a_separator_of_special_tokens_becomes_those(text):
    found = build_contexts(text.model_copy(update={"separator": "</s>"}), lambda: BOS, "t", 32)["train"]
    ends = (found.tokens == BOS.eos_token_id).sum()
    assert abs(ends - len(halves(0.3)["train"])) <= 1  # The last separator may fall into the dropped rest


def test_large_vocabularies_take_four_bytes(text):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(1 << 16)])
    assert build_contexts(text, lambda: tokenizer, "t", 32)["train"].tokens.dtype == np.uint32


def test_equal_inputs_give_equal_digests_wherever_they_lie(text, tmp_path):
    first = build_contexts(text, lambda: BOS, "t", 32)["train"]
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"body": document}) for document in DOCUMENTS))
    other = TextConfig(
        source=str(tmp_path / "other.jsonl"), field="body", cache=str(tmp_path / "elsewhere"), evaluation_fraction=0.3
    )
    assert build_contexts(other, lambda: BOS, "t", 32)["train"].digest == first.digest
    different = [
        build_contexts(text, lambda: BOS, "t", 32)["evaluation"],
        build_contexts(text, lambda: BOS, "t", 48)["train"],
        build_contexts(text.model_copy(update={"separator": "\n"}), lambda: BOS, "t", 32)["train"],
        build_contexts(text.model_copy(update={"evaluation_fraction": 0.4}), lambda: BOS, "t", 32)["train"],
    ]
    assert len({first.digest, *(c.digest for c in different)}) == 5


def test_the_cache_is_used(text, monkeypatch):
    first = build_contexts(text, lambda: BOS, "t", 32)["train"]
    monkeypatch.setattr(module, "_write_splits", lambda *_: pytest.fail("tokenised again"))
    again = build_contexts(text, lambda: BOS, "t", 32)["train"]
    assert again.digest == first.digest
    assert np.array_equal(again.tokens, first.tokens)
    assert not again.tokens.flags.writeable
    build_contexts(text, lambda: BOS, "t", 32)["evaluation"]  # The same pass has made this split
    with pytest.raises(pytest.fail.Exception):
        build_contexts(text, lambda: BOS, "another tokenizer", 32)["train"]


def test_a_source_that_changes_is_tokenised_again(text, tmp_path):
    first = build_contexts(text, lambda: BOS, "t", 32)["train"]
    dropped = halves(0.3)["train"][5]
    (tmp_path / "stories.txt").write_text("<|end|>".join(d for d in DOCUMENTS if d != dropped))
    assert build_contexts(text, lambda: BOS, "t", 32)["train"].digest != first.digest


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_documents_of_contexts_equal_their_definition(text, split, monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 40)  # Cuts documents into several pieces
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)
    found = build_contexts(text, lambda: BOS, "t", 32)[split]
    documents = halves(0.3)[split]
    owner = [
        i
        for i, document in enumerate(documents)
        for _ in BOS(document + "\n\n", split_special_tokens=True)["input_ids"]
    ]
    expected = [(owner[i], owner[i + 30]) for i in range(0, len(owner) - 30, 31)]
    assert found.spans.tolist() == [list(span) for span in expected]
    assert found.documents.dtype == np.uint64
    assert [int(h) for h in found.documents] == [
        int(hashlib.sha256(document.encode()).hexdigest()[:16], 16) for document in documents
    ]
    assert (found.spans[:, 0] != found.spans[:, 1]).any()
    assert (found.spans[:, 0] == found.spans[:, 1]).any()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no manifest", "half a manifest", "documents"])
def test_damaged_files_are_made_anew_with_a_warning(text, tmp_path, damage):
    first = build_contexts(text, lambda: BOS, "t", 32)["train"]
    expected = first.tokens.copy()
    (folder,) = (tmp_path / "cache").iterdir()
    path = folder / (
        "train.tokens"
        if damage in ("flipped", "truncated")
        else "train.documents"
        if damage == "documents"
        else "contexts.json"
    )
    content = bytearray(path.read_bytes())
    if damage in ("flipped", "documents"):
        content[100] ^= 1
    path.write_bytes(content if damage in ("flipped", "documents") else content[: len(content) // 2])
    if damage == "no manifest":
        path.unlink()
    with pytest.warns(RuntimeWarning, match="damaged"):
        again = build_contexts(text, lambda: BOS, "t", 32)["train"]
    assert again.digest == first.digest
    assert np.array_equal(again.tokens, expected)


def test_failure_leaves_nothing_behind(text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_batches", lambda _: iter([[Piece("train", "a story", 1)], None]))
    with pytest.raises(TypeError):
        build_contexts(text, lambda: BOS, "t", 32)["train"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_writer_that_comes_second_takes_the_first_ones_files(text, tmp_path):
    first = build_contexts(text, lambda: BOS, "t", 32)["train"]
    (folder,) = (tmp_path / "cache").iterdir()
    _write_splits(folder, text, lambda: BOS, None, 32, None)
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert build_contexts(text, lambda: BOS, "t", 32)["train"].digest == first.digest


def test_contexts_travel_out_of_band():
    contexts = Contexts("d", np.arange(12, dtype=np.uint16).reshape(3, 4))
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(contexts, protocol=5, buffer_callback=buffers.append)
    assert sum(len(buffer.raw()) for buffer in buffers) == contexts.tokens.nbytes
    assert np.array_equal(pickle.loads(pickled, buffers=buffers).tokens, contexts.tokens)


def test_mapped_contexts_are_plain_arrays(text):
    assert type(build_contexts(text, lambda: BOS, "t", 32)["train"].tokens) is np.ndarray


def test_sources_that_cannot_be_split(text, tmp_path):
    with pytest.raises(UserError, match=r"a single document, .* unless text\.delimiter"):
        build_contexts(text.model_copy(update={"delimiter": None}), lambda: BOS, "t", 32)["train"]
    with pytest.raises(UserError, match=r"a single document, .* text\.delimiter '<\|endoftxt\|>' occurs nowhere in it"):
        build_contexts(text.model_copy(update={"delimiter": "<|endoftxt|>"}), lambda: BOS, "t", 32)
    with pytest.raises(UserError, match=r"5 documents, all of them in one split, .* text\.delimiter"):
        build_contexts(text.model_copy(update={"evaluation_fraction": 1e-9, "max_documents": 5}), lambda: BOS, "t", 32)[
            "train"
        ]
    (tmp_path / "stories.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        build_contexts(text, lambda: BOS, "t", 32)["train"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(text, tmp_path):
    with pytest.raises(UserError, match=r"text\.cache is"):
        build_contexts(text.model_copy(update={"cache": str(tmp_path / "stories.txt")}), lambda: BOS, "t", 32)["train"]


def test_a_split_shorter_than_a_context(text):
    short = build_contexts(text, lambda: BOS, "t", 1_000_000)["evaluation"]
    assert len(short) == 0
    assert len(build_contexts(text, lambda: BOS, "t", 1_000_000)["train"]) == 0


def test_evaluation_fraction_is_kept():
    share = np.mean([is_held_out(str(i), 0.1) for i in range(20_000)])
    assert abs(share - 0.1) < 0.01


def test_reading_stops_once_there_is_enough(text, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)
    read = []
    all_documents = documents
    monkeypatch.setattr(
        module, "documents", lambda config: (read.append(document) or document for document in all_documents(config))
    )
    enough = {"train": 20, "evaluation": 5}
    some = build_contexts(text, lambda: BOS, "bytes", 32, enough)
    assert 0 < len(read) < len(DOCUMENTS) / 2
    assert all(len(some[split]) >= least for split, least in enough.items())
    for split, contexts in some.items():
        whole = build_contexts(text, lambda: BOS, "bytes", 32)[split]
        assert len(whole) > len(contexts)
        assert np.array_equal(whole[: len(contexts)], contexts[:])
        assert contexts.digest != whole.digest
