"""Where a study lies: its folder, and the driver's own files beside it.

The folder is local, or a URL such as s3://… that every machine reaches. The driver's own files are always local.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import yaml
from pydantic import ValidationError

from raysae.config import SweepConfig, UserError
from raysae.knobs import completed, explain
from raysae.storage import write_atomically
from raysae.stream.skipped import FILE as SKIPPED
from raysae.stream.skipped import Skipped

CONFIG, LOCK = "config.yaml", "driver.lock"


@dataclass(frozen=True)
class Place:
    """The places of a study's files.

    `folder` has the config, checkpoints and SAEs. `local` has the outbox and the summary, on the driver's disk. Both
    are the same unless `folder` is a URL.
    """

    name: str
    folder: str
    local: Path

    @property
    def remote(self) -> bool:
        return "://" in self.folder

    @property
    def skipped(self) -> str:
        return f"{self.folder}/{SKIPPED}"

    def sae(self, name: str) -> str:
        return f"{self.folder}/saes/{name}"


def with_absolute_paths(config: SweepConfig) -> SweepConfig:
    """`config` with absolute paths, so that the sweep goes on from any folder.

    In a Ray job, only the paths that the sweep writes become absolute. What it reads came with the job, into another
    folder on each machine.
    """
    output, uri = config.output.rstrip("/"), config.tracking.uri
    if "://" not in output:
        output = str(_base() / Path(output).expanduser())
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        _base().mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{_base() / uri.removeprefix('sqlite:///')}"
    config = config.model_copy(update={"output": output, "tracking": config.tracking.model_copy(update={"uri": uri})})
    if _in_ray_job():
        return config
    model, text, errors = config.model, config.text, config.errors.model_dump()
    if Path(model.name).expanduser().exists():
        model = model.model_copy(update={"name": _absolute(model.name)})
    if text.source != "stdlib" and not text.source.startswith("hf:"):
        patterns = [_absolute(pattern.strip()) for pattern in text.source.split(",") if pattern.strip()]
        text = text.model_copy(update={"source": ",".join(patterns)})
    errors = {field: _absolute(value) if value and "://" not in value else value for field, value in errors.items()}
    return config.model_copy(update={"model": model, "text": text, "errors": config.errors.model_copy(update=errors)})


def check_writable(config: SweepConfig) -> None:
    """Raise UserError where the local folder `output` cannot be written. Nothing has been started then."""
    if "://" in config.output:
        return
    there = next(path for path in (Path(config.output), *Path(config.output).parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "read-only" if there.is_dir() else "a file"
        raise UserError(f"output is {config.output}, which cannot be written: {there} is {why}")


def new_place(config: SweepConfig, resume: str | None) -> Place:
    """Make the study's place and write its config into it.

    Raises:
        UserError: a study of this name is there already, or the storage cannot be written.
    """
    name = resume or config.study or time.strftime("%Y%m%d-%H%M%S")
    folder = f"{config.output}/{name}"
    place = Place(name, folder, _base() / "runs" / name if "://" in folder else Path(folder))
    try:
        files, path = fsspec.core.url_to_fs(folder)
        if not resume and files.exists(path):
            raise UserError(
                f"study is '{name}' but {folder} exists: choose another name, or go on with it by --resume {name}"
            )
        files.makedirs(path, exist_ok=True)
        place.local.mkdir(parents=True, exist_ok=True)
        settled = yaml.safe_dump(config.model_copy(update={"study": name}).model_dump(), sort_keys=False)
        # A study with half a config could not be resumed
        write_atomically(files, f"{path}/{CONFIG}", settled.encode())
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"output is {config.output}, which cannot be written ({error}): "
            "name a folder or a URL such as s3://bucket/runs"
        ) from error
    return place


@contextmanager
def driving(place: Place) -> Iterator[None]:
    """Hold the study's lock during the driver's work. The lock ends with the process.

    Raises:
        UserError: another driver of this study runs on this machine.
    """
    with (place.local / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"study is '{place.name}', which still runs: wait for its end, or stop it first") from None
        yield


def saved_config(output: str, study: str, faults: Mapping[str, Any] = {}) -> SweepConfig:
    """The config that a study was started with.

    Args:
        faults: knobs of `config.faults` that get other values now. They change no bit of an SAE.

    Raises:
        UserError: there is no such study in `output`, or its config or record of skipped shards is damaged.
    """
    output = output if "://" in output else str(_base() / Path(output).expanduser())
    files, path = fsspec.core.url_to_fs(output)
    if not files.exists(f"{path}/{study}/{CONFIG}"):
        known = sorted(found.split("/")[-2] for found in files.glob(f"{path}/*/{CONFIG}"))
        others = f", there are {', '.join(known)}" if known else ""
        raise UserError(f"--resume {study}: there is no such study in {output}{others}")
    Skipped(f"{output}/{study}/{SKIPPED}")  # Raises where it is damaged
    try:
        saved = yaml.safe_load(files.cat_file(f"{path}/{study}/{CONFIG}"))
        saved = completed(SweepConfig, saved)
        config = SweepConfig.model_validate(saved)
        if lacking := _paths(config.model_dump()) - _paths(saved):  # Defaults for these would train another sweep
            raise ValueError(f"{min(lacking)} is not in it")
        return config.model_copy(update={"faults": config.faults.model_copy(update=faults)})
    except (yaml.YAMLError, ValueError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise UserError(f"{path}/{study}/{CONFIG} is damaged, or of another version of raysae: {reason}") from error


def _paths(settings: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of all settings."""
    names = set()
    for name, value in settings.items():
        names |= {prefix + name} | (_paths(value, f"{prefix}{name}.") if isinstance(value, Mapping) else set())
    return names


def _base() -> Path:
    """The folder that relative paths start from: the working directory, or ~/raysae in a Ray job.

    A Ray job runs in a copy of the working directory, which Ray throws away.
    """
    return Path.home() / "raysae" if _in_ray_job() else Path.cwd()


def _in_ray_job() -> bool:
    return "_ray_pkg_" in str(Path.cwd())


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
