"""Documents of every kind of source, in order, and the message that each mistake gets."""

import gzip
import json
import lzma
import shutil
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from raysae.config import TextConfig, UserError
from raysae.text.sources import documents, fingerprint, local_files, stdlib_files

TEXTS = ["first\nlines", "zweite: äöü €", "third"]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def content(kind: str, tmp_path: Path) -> bytes:
    """Content of a file of this kind that holds TEXTS."""
    match kind:
        case ".jsonl":
            return "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)).encode()
        case ".parquet":
            parquet.write_table(pyarrow.table({"id": [0, 1, 2], "text": TEXTS}), tmp_path / "table")
            return (tmp_path / "table").read_bytes()
    return "<|end|>".join(TEXTS).encode()


def read(source: object, **options) -> list[str]:
    return list(documents(TextConfig(source=str(source), **options)))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".parquet"])
def test_every_kind_and_compression(tmp_path, kind, compression):
    path = tmp_path / f"texts{kind}{compression}"
    path.write_bytes(COMPRESS[compression](content(kind, tmp_path)))
    assert read(path, delimiter="<|end|>") == TEXTS


def test_without_delimiter_a_file_is_one_document_and_python_is_never_split(tmp_path):
    for name in ("a.txt", "b.py"):
        (tmp_path / name).write_text("x<|end|>y\n")
    assert read(tmp_path / "a.txt") == ["x<|end|>y"]
    assert read(tmp_path, delimiter="<|end|>") == ["x", "y", "x<|end|>y"]


def test_a_delimiter_across_the_border_of_two_reads(tmp_path):
    first, second = "a" * ((1 << 20) - 3), "b" * 10
    (tmp_path / "a.txt").write_text(f"{first}<|end|>{second}<|end|>")
    assert read(tmp_path / "a.txt", delimiter="<|end|>") == [first, second]


def test_documents_are_stripped_and_empty_ones_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one \r\n--\r\n \n--two\r\nlines\n")
    assert read(tmp_path / "a.txt", delimiter="--") == ["one", "two\nlines"]


def test_json_that_spells_lone_surrogates_is_made_encodable(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n\n{"text": null}\n')
    assert read(tmp_path / "a.jsonl") == ["a ? b"]


def test_folders_globs_and_lists_are_read_in_order_each_file_once(tmp_path):
    for name in ("b/2.txt", "b/1.md", "a/3.txt", ".hidden/4.txt", "b/.5.txt", "b/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/3.txt", "b/1.md", "b/2.txt"]
    assert read(f"{tmp_path}/b/*.txt, {tmp_path}/*/*.txt,{tmp_path}/b") == ["b/2.txt", "a/3.txt", "b/1.md"]
    assert read(f"{tmp_path}/**/*.txt") == ["a/3.txt", "b/2.txt"]
    assert len(local_files(f"{tmp_path}/b/1.md,{tmp_path}/b/1.md")) == 1
    assert read(tmp_path, max_documents=2) == ["a/3.txt", "b/1.md"]


def test_the_standard_library(tmp_path, monkeypatch):
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in stdlib_files()]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))]
    texts = list(documents(TextConfig()))
    expected = [(root / name).read_text(encoding="utf-8").strip() for name in names]
    assert texts == [text for text in expected if text]
    assert sum(map(len, texts)) > 4_000_000

    # The same files elsewhere, with packages installed beside them
    moved = tmp_path / "elsewhere"
    for name in names[:40]:
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, moved / name)
    (moved / "site-packages").mkdir()
    (moved / "site-packages" / "package.py").write_text("x = 1")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(moved))
    assert [path.relative_to(moved).as_posix() for path in stdlib_files()] == names[:40]
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no Python sources"):
        documents(TextConfig())


def test_hugging_face_datasets_from_local_files(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(content(".jsonl", tmp_path))
    (folder / "test.jsonl").write_text('{"text": "held out", "id": 7}')
    assert read(f"hf:{folder}") == TEXTS
    assert read(f"hf:{folder}", split="test") == ["held out"]
    assert read(f"hf:json:{folder}/train.jsonl") == TEXTS
    assert read(f"hf:json:{folder}/t*.jsonl", max_documents=2) == ["held out", TEXTS[0]]
    (tmp_path / "table.parquet").write_bytes(content(".parquet", tmp_path))
    assert read(f"hf:parquet:{tmp_path}/table.parquet") == TEXTS
    same = [
        TextConfig(source=s) for s in (f"hf:{folder}", f"hf:parquet:{tmp_path}/table.parquet", f"{folder}/train.jsonl")
    ]
    assert len({fingerprint(config) for config in same}) == 1


IDS = [[1, 2, 3], [7], [2, 2]]
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    [{"role": "user", "content": "a \nb"}],
    [{"role": "system", "content": "be brief"}],
]


@pytest.mark.parametrize("column", [IDS, CHATS], ids=["ids", "chats"])
def test_columns_of_token_ids_and_chats(tmp_path, column):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"c": value, "id": i}) for i, value in enumerate(column)))
    parquet.write_table(pyarrow.table({"c": column, "id": [0, 1, 2]}), tmp_path / "a.parquet")
    local = [f"{tmp_path}/a.jsonl", f"{tmp_path}/a.parquet"]
    sources = [*local, f"hf:json:{local[0]}", f"hf:parquet:{local[1]}"]
    assert all(read(source, field="c", delimiter="hi") == column for source in sources)
    assert len({fingerprint(TextConfig(source=source, field="c")) for source in sources}) == 1


def test_texts_that_spell_token_ids_have_another_fingerprint(tmp_path):
    fingerprints = set()
    for name, value in (("a", [1, 2]), ("b", "[1,2]"), ("c", "\ufffd[1,2]")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": value}))
        fingerprints.add(fingerprint(TextConfig(source=str(tmp_path / f"{name}.jsonl"))))
    assert len(fingerprints) == 3


def test_chats_keep_no_empty_keys_and_no_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": [{"role": "user", "content": "a \\ud800", "name": null}]}\n{"text": []}'
    )
    assert read(tmp_path / "a.jsonl") == [[{"role": "user", "content": "a ?"}]]


def test_a_delimiter_splits_the_rows_of_a_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one--two"}) + "\n" + json.dumps({"text": "three"}))
    parquet.write_table(pyarrow.table({"text": ["one--two", "three"]}), tmp_path / "a.parquet")
    for source in (f"{tmp_path}/a.jsonl", f"{tmp_path}/a.parquet", f"hf:json:{tmp_path}/a.jsonl"):
        assert read(source, delimiter="--") == ["one", "two", "three"]
        assert read(source) == ["one--two", "three"]


def test_columns_beside_the_text_may_be_null_first_and_text_later(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as file:  # More than the 10 MiB from which types are guessed
        for i in range(12):
            file.write(json.dumps({"text": f"{i} " + "x" * (1 << 20), "note": "later" if i == 11 else None}) + "\n")
    assert [text[:2] for text in read(f"hf:json:{tmp_path}/a.jsonl")] == [f"{i} "[:2] for i in range(12)]
    for name, notes in (("1", pyarrow.nulls(2)), ("2", pyarrow.array(["x", "y"]))):
        parquet.write_table(
            pyarrow.table({"text": [f"{name}a", f"{name}b"], "note": notes}), tmp_path / f"{name}.parquet"
        )
    assert read(f"hf:parquet:{tmp_path}/*.parquet") == ["1a", "1b", "2a", "2b"]
    with (tmp_path / "b.jsonl").open("w") as file:
        for i in range(12):
            file.write(json.dumps({"text": "later" if i == 11 else None, "note": "x" * (1 << 20)}) + "\n")
    assert read(f"hf:json:{tmp_path}/b.jsonl") == ["later"]


def test_fingerprint_is_of_the_content_alone(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("one|two")
    a, b = (TextConfig(source=str(tmp_path / folder), delimiter="|") for folder in ("a", "b"))
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(a.model_copy(update={"delimiter": None})) != fingerprint(a)
    assert fingerprint(a.model_copy(update={"max_documents": 1})) != fingerprint(a)
    (tmp_path / "b" / "x.txt").write_text("on|etwo")
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("{}/missing.txt", {}, "missing.txt, where raysae finds no file"),
        ("{}/*.jsonl", {}, "where raysae finds no file"),
        ("{}/picture.png", {}, "picture.png, a kind of file raysae does not read: it reads txt md py jsonl parquet"),
        (" , ", {}, "text.source is ' , '"),
        ("{}/latin.txt", {}, "latin.txt, which cannot be read"),
        ("{}/broken.txt.gz", {}, "broken.txt.gz, which cannot be read"),
        ("{}/broken.txt.xz", {}, "broken.txt.xz, which cannot be read"),
        ("{}/broken.txt.zst", {}, "broken.txt.zst, which cannot be read"),
        ("{}/broken.parquet", {}, "broken.parquet, which cannot be read"),
        (
            "{}/rows.jsonl.gz",
            {"field": "body"},
            "text.field is 'body', which .*rows.jsonl.gz line 1 does not have: it has id, text",
        ),
        ("{}/rows.jsonl.gz", {"field": "id"}, "holds int, not text, a list of token ids, or a list of messages"),
        ("{}/lists/a.jsonl", {"field": "floats"}, "holds list of float, not text"),
        ("{}/lists/a.jsonl", {"field": "bools"}, "holds list of bool, not text"),
        ("{}/lists/a.jsonl", {"field": "turns"}, "holds list of dict with from, value, not text"),
        ("hf:{}/scripted", {}, "which cannot be loaded .*scripts are no longer supported, but found scripted.py"),
        ("hf:", {}, "name a dataset"),
        ("hf:{}/nowhere", {}, "cannot be loaded"),
        ("hf:nobody/nothing", {}, "text.source is 'hf:nobody/nothing', which cannot be loaded"),
        ("hf:json:{}/none.jsonl", {}, "cannot be loaded"),
        ("hf:json:{}/broken.json", {}, "broken.json, which cannot be read"),
        ("hf:json:{}/rows.jsonl.gz", {"split": "validation"}, "text.split is 'validation'"),
        (
            "hf:json:{}/rows.jsonl.gz",
            {"field": "body"},
            "text.field is 'body', which hf:json:.* does not have: it has id, text",
        ),
    ],
)
def test_bad_sources_get_one_sentence(tmp_path, source, options, message):
    (tmp_path / "picture.png").write_bytes(b"png")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    for kind in (".txt.gz", ".txt.xz", ".txt.zst", ".parquet"):
        (tmp_path / f"broken{kind}").write_bytes(b"neither this nor that")
    (tmp_path / "broken.json").write_bytes(b'{"text": "x"}\nneither')
    lists = {"floats": [1, 0.5], "bools": [True], "turns": [{"from": "human", "value": "x"}]}
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.jsonl").write_text(json.dumps(lists))
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("import datasets")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1, "text": "x"}\n'))
    with pytest.raises(UserError, match=message) as error:
        read(source.format(tmp_path), **options)
    assert "\n" not in str(error.value)
    assert ("The traceback is in " in str(error.value)) == ("cannot be" in message or "split" in options)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_truncated_file_is_an_error(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("".join(map(str, range(10_000))).encode())[:-10])
    with pytest.raises(UserError, match="cannot be read"):
        read(path)
