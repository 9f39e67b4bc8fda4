"""Documents of a text source, in a fixed order: the standard library, local files, or a Hugging Face dataset.

A document is one of three things, and a column may mix them:

- a text, without surrounding white space and with `\\n` line ends,
- a list of token ids,
- a chat, a list of messages. Each is a dict with `role` and `content` at least. Keys without a value are dropped.

Empty documents are dropped. Files are read as UTF-8. Everything streams: at most one document is held at a time. Of a
file with a delimiter it is about a megabyte.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from raysae.borders import border
from raysae.config import TextConfig, UserError, digest
from raysae.storage import named, patterns

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
SUPPORTED = f"{' '.join(k[1:] for k in KINDS)}, each also {' '.join(COMPRESSIONS)}"

Document = str | list[int] | list[dict[str, Any]]
NOT_TEXT = b"\xff"  # No UTF-8 holds this byte, so no text's content equals that of token ids or a chat

# The default text leaves out installed packages, tests, generated folders and other programs. Generated are character
# tables, help topics and build settings. Other programs are IDLE and the 2to3 grammar. Distributions differ in which
# of these they install.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
NOT_STDLIB |= {"idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo", "__phello__"}
NOT_STDLIB_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


def documents(config: TextConfig) -> Iterator[Document]:
    """The source's documents, at most `max_documents`.

    Raises:
        UserError: the source is not there, which is raised at once. While reading: a file cannot be read, or it lacks
            the column `text.field`, or the column holds something else than documents.
    """
    if config.source == "stdlib":
        texts = itertools.chain.from_iterable(_read(path, config) for path in stdlib_files())
    elif config.source.startswith("hf:"):
        texts = _hugging_face_texts(config)
    else:
        texts = itertools.chain.from_iterable(_read(path, config) for path in local_files(config.source))
    cleaned = (document for document in map(_clean, texts) if document)
    return itertools.islice(cleaned, config.max_documents)


def content(document: Document) -> bytes:
    """What a document is, as bytes: UTF-8 of a text, and JSON behind `NOT_TEXT` of anything else."""
    if isinstance(document, str):
        return document.encode()
    return NOT_TEXT + json.dumps(document, sort_keys=True, separators=(",", ":"), default=str).encode()


def fingerprint(config: TextConfig) -> str:
    """Digest of the documents' content, wherever they lie.

    A dataset on the Hugging Face hub is not read for it. Its digest is that of its name, its commit and the settings
    that pick its documents.
    """
    if config.source.startswith("hf:") and not _is_local(config.source):
        builder = _load(config)
        picks = ["hub", config.source, config.subset, config.split, config.field, config.max_documents, builder.hash]
        return digest(picks + ([config.delimiter] if config.delimiter else []))
    found = hashlib.sha256()
    for encoded in map(content, documents(config)):
        found.update(len(encoded).to_bytes(8, "little"))
        found.update(encoded)
    return found.hexdigest()[:16]


def _clean(document: Document) -> Document:
    """A text with `\\n` line ends and without surrounding white space. Token ids and chats are left as they are.

    Lone surrogates become question marks, also in chats. JSON can spell them, but no encoder takes them.
    """
    if isinstance(document, str):
        return _encodable(document).replace("\r\n", "\n").strip()
    if document and isinstance(document[0], dict):
        return json.loads(_encodable(json.dumps(document, ensure_ascii=False, default=str)))
    return document


def _encodable(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()


# ---------------------------------------------------------------- files


def stdlib_files() -> list[Path]:
    """Source files of the running interpreter's standard library, sorted by relative path.

    The list is the same wherever this interpreter is installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        built = any(folder.startswith("config-") for folder in folders) or path.name.startswith(NOT_STDLIB_FILES)
        if not NOT_STDLIB.intersection(folders) and not built:
            files.append(path)
    if not files:
        raise UserError(f"text.source is 'stdlib', but {root} holds no Python sources: name files or a dataset instead")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def local_files(source: str) -> list[Path]:
    """Files of a comma-separated list of files, folders and globs, each file once. See `storage.patterns`.

    Folders are read recursively, without hidden files and folders. The order is that of the list. Within a folder or
    glob it is that of the paths.

    Raises:
        UserError: an entry has no file that raysae reads, or the list is empty.
    """
    files: dict[Path, None] = {}
    for part in patterns(source):
        path = named(part)
        if path and path.is_dir():
            known = [p for p in path.rglob("*") if p.is_file() and kind_of(p)]
            found = [p for p in known if not any(f.startswith(".") for f in p.relative_to(path).parts)]
            found.sort(key=lambda p: p.relative_to(path).as_posix())
        elif path and path.is_file():
            if not kind_of(path):
                raise UserError(f"text.source names {path}, a kind of file raysae does not read: it reads {SUPPORTED}")
            found = [path]
        else:
            paths = map(Path, sorted(glob.glob(part, recursive=True)))
            found = [p for p in paths if p.is_file() and kind_of(p)]
        if not found:
            raise UserError(
                f"text.source names {path or part}, where raysae finds no file that it reads: "
                f"give a file, folder or glob of {SUPPORTED}"
            )
        files.update(dict.fromkeys(p.resolve() for p in found))
    if not files:
        raise UserError(
            f"text.source is '{source}', which names nothing: "
            f"name 'stdlib', files, folders or globs ({SUPPORTED}), or 'hf:NAME'"
        )
    return list(files)


def kind_of(path: Path) -> str | None:
    """`.txt`, `.md`, `.py`, `.jsonl` or `.parquet`, or None for any other file. A compression's suffix is ignored."""
    name = path.stem if path.suffix in COMPRESSIONS else path.name
    kind = Path(name).suffix
    return kind if kind in KINDS else None


def _read(path: Path, config: TextConfig) -> Iterator[Document]:
    reader = {".jsonl": _jsonl_texts, ".parquet": _parquet_texts}.get(kind_of(path), _plain_texts)

    def texts() -> Iterator[Document]:
        with _open(path) as file:
            yield from reader(file, path, config)

    return _with_sentence(texts(), str(path))


def _with_sentence(texts: Iterator[Document], where: str) -> Iterator[Document]:
    """The same texts. An error in reading them becomes a UserError."""
    with border("text.source", where, "which cannot be read"):
        yield from texts


def _open(path: Path) -> BinaryIO:
    match path.suffix:
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow

            return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _plain_texts(file: BinaryIO, path: Path, config: TextConfig) -> Iterator[str]:
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        if config.delimiter is None or kind_of(path) == ".py":
            yield text.read()
            return
        rest = ""
        while chunk := text.read(1 << 20):
            *whole, rest = (rest + chunk).split(config.delimiter)
            yield from whole
        yield rest


def _jsonl_texts(file: BinaryIO, path: Path, config: TextConfig) -> Iterator[Document]:
    with io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield from _column(json.loads(line), config, f"{path} line {number}")


def _parquet_texts(file: BinaryIO, path: Path, config: TextConfig) -> Iterator[Document]:
    from pyarrow import parquet

    with tempfile.TemporaryFile() as seekable:
        if path.suffix in COMPRESSIONS:  # Parquet is read from its end, so the file must be seekable
            shutil.copyfileobj(file, seekable, 1 << 20)
            file = seekable
        table = parquet.ParquetFile(file)
        _column(dict.fromkeys(table.schema_arrow.names), config, str(path))
        for batch in table.iter_batches(batch_size=256, columns=[config.field]):
            for value in batch.column(0).to_pylist():
                yield from _column({config.field: value}, config, str(path))


def _column(record: Any, config: TextConfig, where: str) -> list[Document]:
    """The record's documents: none if the field is null, and several if the delimiter splits its text.

    Raises:
        UserError: the record has no such field, or the field holds no document.
    """
    if not isinstance(record, dict) or config.field not in record:
        columns = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"text.field is '{config.field}', which {where} does not have: it has {columns}")
    value = record[config.field]
    if value is None:
        return []
    if isinstance(value, str):
        return value.split(config.delimiter) if config.delimiter else [value]
    if isinstance(value, list):
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value):
            return [[{key: part for key, part in item.items() if part is not None} for item in value]]
    raise UserError(
        f"text.field is '{config.field}', which in {where} holds {_described(value)}, not text, a list of token ids, "
        "or a list of messages that have role and content"
    )


def _described(value: Any) -> str:
    """What a column holds, e.g. "float", "list of float" or "list of dict with from, value"."""
    if not isinstance(value, list):
        return type(value).__name__
    item = next((item for item in value if type(item) is not int), None)
    return f"list of {type(item).__name__}" + (f" with {', '.join(item)}" if isinstance(item, dict) else "")


# ---------------------------------------------------------------- Hugging Face datasets


def _hugging_face_texts(config: TextConfig) -> Iterator[Document]:
    builder = _load(config)
    with border("text.source", config.source, "which cannot be read"):
        try:
            records = builder.as_streaming_dataset(split=config.split)
        except ValueError:
            with border("text.split", f"'{config.split}'", f"which {config.source} does not have"):
                raise
    if records.column_names is not None:
        _column(dict.fromkeys(records.column_names), config, config.source)
        # Read this column alone. The types of all columns were guessed from the first rows: casting the others to them
        # would fail at a column that is null first and text later.
        builder.info.features = None
        if getattr(records.features[config.field], "dtype", None) == "null":  # So may this column be itself
            records.info.features = None
        records = records.select_columns([config.field])
    columns = (_column(record, config, config.source) for record in records)
    return _with_sentence(itertools.chain.from_iterable(columns), config.source)


def _load(config: TextConfig) -> Any:
    """The dataset's builder.

    It knows `hf:NAME` and `hf:NAME@REVISION` on the hub, `hf:FOLDER`, and `hf:BUILDER:FILES`. A builder is json, csv,
    parquet, text or arrow.
    """
    from datasets import load_dataset_builder

    name, revision, files = _parse(config.source)
    with border("text.source", f"'{config.source}'", "which cannot be loaded"):  # Such as a dataset that is a script
        return load_dataset_builder(name, config.subset, data_files=files, revision=revision)


def _parse(source: str) -> tuple[str, str | None, str | None]:
    """Name, revision and data files of `hf:…`."""
    name = source.removeprefix("hf:")
    if not name:
        raise UserError(
            "text.source is 'hf:': name a dataset, e.g. 'hf:roneneldan/TinyStories', 'hf:/a/folder' or "
            "'hf:json:/a/file.jsonl'"
        )
    if os.path.isdir(os.path.expanduser(name)):
        return _absolute(name), None, None
    builder, colon, files = name.partition(":")
    if colon:  # datasets takes globs, but no comma in brackets
        there = os.path.lexists(os.path.expanduser(files))
        return builder, None, files if "://" in files else glob.escape(_absolute(files)) if there else _absolute(files)
    name, at, revision = name.partition("@")
    return name, revision if at else None, None


def absolute_source(source: str) -> str:
    """`hf:…` with the full path of a folder or file in it, so that it means the same in every working folder."""
    name = source.removeprefix("hf:")
    builder, colon, files = name.partition(":")
    if os.path.isdir(os.path.expanduser(name)):
        return f"hf:{_absolute(name)}"
    return f"hf:{builder}:{_absolute(files)}" if colon and "://" not in files else source


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _is_local(source: str) -> bool:
    name, _, files = _parse(source)
    return files is not None or Path(name).is_dir()
