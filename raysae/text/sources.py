"""Documents of a text source, in a fixed order: the standard library, local files, or a Hugging Face dataset.

A document is a string without surrounding white space, with `\\n` line ends; empty ones are dropped. Files are read as UTF-8. Everything streams:
at most one document (or one megabyte of a file with a delimiter) is held at a time.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from raysae.config import TextConfig, UserError, digest

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
SUPPORTED = f"{' '.join(k[1:] for k in KINDS)}, each also {' '.join(COMPRESSIONS)}"

# Not part of the default text: installed packages, tests, and folders that are generated (character tables, help topics, build settings) or
# hold another program (IDLE, the 2to3 grammar). Distributions differ in which of these they install.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
NOT_STDLIB |= {"idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo", "__phello__"}
NOT_STDLIB_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


def documents(config: TextConfig) -> Iterator[str]:
    """The source's documents, `max_documents` at most.

    Raises UserError at once where the source is not there, and while reading where a file cannot be read or lacks the column `text.field`.
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
    """Digest of the documents: of their content, wherever they lie, or for a dataset on the Hugging Face hub of its name and commit."""
    if config.source.startswith("hf:") and not _is_local(config.source):
        builder = _load(config)
        return digest(["hub", config.source, config.subset, config.split, config.field, config.max_documents, builder.hash])
    content = hashlib.sha256()
    for text in documents(config):
        encoded = text.encode()
        content.update(len(encoded).to_bytes(8, "little"))
        content.update(encoded)
    return content.hexdigest()[:16]


def _clean(text: str) -> str:
    """Lone surrogates, which JSON can spell but no encoder takes, become question marks."""
    return text.encode("utf-8", errors="replace").decode().replace("\r\n", "\n").strip()


# ---------------------------------------------------------------- files


def stdlib_files() -> list[Path]:
    """Source files of the running interpreter's standard library, by relative path: the same list wherever this interpreter is installed."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        if not NOT_STDLIB.intersection(folders) and not any(f.startswith("config-") for f in folders) and not path.name.startswith(NOT_STDLIB_FILES):
            files.append(path)
    if not files:
        raise UserError(f"text.source is 'stdlib', but {root} holds no Python sources: name files or a dataset instead")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def local_files(source: str) -> list[Path]:
    """Files of a comma-separated list of files, folders (read recursively, hidden ones left out) and globs; each file once.

    The order is that of the list, within a folder or glob by relative path.
    """
    files: dict[Path, None] = {}
    for part in filter(None, map(str.strip, source.split(","))):
        path = Path(part).expanduser()
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and kind_of(p) and not any(f.startswith(".") for f in p.relative_to(path).parts)]
            found.sort(key=lambda p: p.relative_to(path).as_posix())
        elif path.is_file():
            if not kind_of(path):
                raise UserError(f"text.source names {part}, a kind of file raysae does not read: it reads {SUPPORTED}")
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file() and kind_of(Path(p))]
        if not found:
            raise UserError(f"text.source names {part}, where no file lies that raysae reads: give a file, folder or glob of {SUPPORTED}")
        files.update(dict.fromkeys(p.resolve() for p in found))
    if not files:
        raise UserError(f"text.source is '{source}': name 'stdlib', files, folders or globs ({SUPPORTED}), or 'hf:NAME'")
    return list(files)


def kind_of(path: Path) -> str | None:
    """`.txt`, `.md`, `.py`, `.jsonl` or `.parquet`, below a compression's suffix; None for any other file."""
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
    """The same texts; what goes wrong in reading them becomes a UserError."""
    try:
        yield from texts
    except UserError:
        raise
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:  # ValueError: not UTF-8, not JSON, not Parquet
        raise UserError(f"text.source: {where} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})") from error


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
        if path.suffix in COMPRESSIONS:  # Parquet is read from its end
            shutil.copyfileobj(file, seekable, 1 << 20)
            file = seekable
        table = parquet.ParquetFile(file)
        _column(dict.fromkeys(table.schema_arrow.names), config.field, str(path))
        for batch in table.iter_batches(batch_size=256, columns=[config.field]):
            for text in batch.column(0).to_pylist():
                yield from _column({config.field: text}, config.field, str(path))


def _column(record: Any, field: str, where: str) -> list[str]:
    """The record's text as a list of one, or of none where it is null."""
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
    return _with_sentence(itertools.chain.from_iterable(_column(record, config.field, config.source) for record in records), config.source)


def _load(config: TextConfig) -> Any:
    """The dataset's builder. `hf:NAME`, `hf:NAME@REVISION` (hub), `hf:FOLDER` and `hf:BUILDER:FILES` (json, csv, parquet, text, arrow) are known."""
    from datasets import load_dataset_builder

    name, revision, files = _parse(config.source)
    try:
        return load_dataset_builder(name, config.subset, data_files=files, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"text.source is '{config.source}', which cannot be loaded ({str(error).splitlines()[0]})") from error


def _parse(source: str) -> tuple[str, str | None, str | None]:
    """Name, revision and data files of `hf:…`."""
    name = source.removeprefix("hf:")
    if not name:
        raise UserError("text.source is 'hf:': name a dataset, e.g. 'hf:roneneldan/TinyStories', 'hf:/a/folder' or 'hf:json:/a/file.jsonl'")
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), None, None
    builder, colon, files = name.partition(":")
    if colon:
        return builder, None, files if "://" in files else str(Path(files).expanduser())
    name, at, revision = name.partition("@")
    return name, revision if at else None, None


def _is_local(source: str) -> bool:
    name, _, files = _parse(source)
    return files is not None or Path(name).is_dir()
