"""Documents of a text source, in a fixed order: the standard library, local files, or a Hugging Face dataset.

A document is a string without surrounding white space, with `\\n` line ends. Empty documents are dropped. Files are
read as UTF-8. Everything streams: at most one document is held at a time. Of a file with a delimiter it is about a
megabyte.
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
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from raysae.config import TextConfig, UserError, digest
from raysae.storage import named, patterns

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
SUPPORTED = f"{' '.join(k[1:] for k in KINDS)}, each also {' '.join(COMPRESSIONS)}"

# The default text leaves out installed packages, tests, generated folders and other programs. Generated are character
# tables, help topics and build settings. Other programs are IDLE and the 2to3 grammar. Distributions differ in which
# of these they install.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
NOT_STDLIB |= {"idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo", "__phello__"}
NOT_STDLIB_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


def documents(config: TextConfig) -> Iterator[str]:
    """The source's documents, at most `max_documents`.

    Raises:
        UserError: the source is not there, which is raised at once. While reading: a file cannot be read, or it lacks
            the column `text.field`.
    """
    if config.source == "stdlib":
        texts = itertools.chain.from_iterable(_read(path, config) for path in stdlib_files())
    elif config.source.startswith("hf:"):
        texts = _hugging_face_texts(config)
    else:
        texts = itertools.chain.from_iterable(_read(path, config) for path in local_files(config.source))
    cleaned = (text for text in map(_clean, texts) if text)
    return itertools.islice(cleaned, config.max_documents)


def fingerprint(config: TextConfig) -> str:
    """Digest of the documents' content, wherever they lie.

    A dataset on the Hugging Face hub is not read for it. Its digest is that of its name, its commit and the settings
    that pick its documents.
    """
    if config.source.startswith("hf:") and not _is_local(config.source):
        builder = _load(config)
        return digest(
            ["hub", config.source, config.subset, config.split, config.field, config.max_documents, builder.hash]
        )
    content = hashlib.sha256()
    for text in documents(config):
        encoded = text.encode()
        content.update(len(encoded).to_bytes(8, "little"))
        content.update(encoded)
    return content.hexdigest()[:16]


def _clean(text: str) -> str:
    """The text with `\\n` line ends and without surrounding white space.

    Lone surrogates become question marks. JSON can spell them, but no encoder takes them.
    """
    return text.encode("utf-8", errors="replace").decode().replace("\r\n", "\n").strip()


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


def _read(path: Path, config: TextConfig) -> Iterator[str]:
    reader = {".jsonl": _jsonl_texts, ".parquet": _parquet_texts}.get(kind_of(path), _plain_texts)

    def texts() -> Iterator[str]:
        with _open(path) as file:
            yield from reader(file, path, config)

    return _with_sentence(texts(), str(path))


def _with_sentence(texts: Iterator[str], where: str) -> Iterator[str]:
    """The same texts. An error in reading them becomes a UserError."""
    try:
        yield from texts
    except UserError:
        raise
    # ValueError means that the file is not UTF-8, JSON or Parquet.
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"text.source: {where} cannot be read ({reason})") from error


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


def _jsonl_texts(file: BinaryIO, path: Path, config: TextConfig) -> Iterator[str]:
    with io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield from _column(json.loads(line), config.field, f"{path} line {number}")


def _parquet_texts(file: BinaryIO, path: Path, config: TextConfig) -> Iterator[str]:
    from pyarrow import parquet

    with tempfile.TemporaryFile() as seekable:
        if path.suffix in COMPRESSIONS:  # Parquet is read from its end, so the file must be seekable
            shutil.copyfileobj(file, seekable, 1 << 20)
            file = seekable
        table = parquet.ParquetFile(file)
        _column(dict.fromkeys(table.schema_arrow.names), config.field, str(path))
        for batch in table.iter_batches(batch_size=256, columns=[config.field]):
            for text in batch.column(0).to_pylist():
                yield from _column({config.field: text}, config.field, str(path))


def _column(record: Any, field: str, where: str) -> list[str]:
    """The record's text in a list, which is empty if the text is null.

    Raises:
        UserError: the record has no such field, or the field holds no text.
    """
    if not isinstance(record, dict) or field not in record:
        columns = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"text.field is '{field}', which {where} does not have: it has {columns}")
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"text.field is '{field}', which in {where} holds {type(text).__name__}, not text")
    return [] if text is None else [text]


# ---------------------------------------------------------------- Hugging Face datasets


def _hugging_face_texts(config: TextConfig) -> Iterator[str]:
    builder = _load(config)
    try:
        records = builder.as_streaming_dataset(split=config.split)
    except ValueError as error:
        raise UserError(f"text.split is '{config.split}', which {config.source} does not have ({error})") from error
    columns = (_column(record, config.field, config.source) for record in records)
    return _with_sentence(itertools.chain.from_iterable(columns), config.source)


def _load(config: TextConfig) -> Any:
    """The dataset's builder.

    It knows `hf:NAME` and `hf:NAME@REVISION` on the hub, `hf:FOLDER`, and `hf:BUILDER:FILES`. A builder is json, csv,
    parquet, text or arrow.
    """
    from datasets import load_dataset_builder

    name, revision, files = _parse(config.source)
    try:
        return load_dataset_builder(name, config.subset, data_files=files, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"text.source is '{config.source}', which cannot be loaded ({reason})") from error


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
