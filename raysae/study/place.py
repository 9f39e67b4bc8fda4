"""Where a study lies: its folder (local, or a URL such as s3://… that every machine reaches), and the driver's own files beside it."""

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

from raysae.config import SweepConfig, UserError
from raysae.knobs import completed
from raysae.storage import write_atomically
from raysae.stream.skipped import FILE as SKIPPED
from raysae.stream.skipped import Skipped

CONFIG, LOCK = "config.yaml", "driver.lock"


@dataclass(frozen=True)
class Place:
    """`folder` has the config, checkpoints and SAEs. `local` has outbox and summary, on the driver's disk: the same folder unless that is a URL."""

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
    """`config` with absolute paths for what the sweep writes and for what it reads, so that it goes on from any folder.

    In a Ray job only for what it writes: what it reads came with the job, into another folder on each machine.
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
        text = text.model_copy(update={"source": ",".join(_absolute(part.strip()) for part in text.source.split(",") if part.strip())})
    errors = {field: _absolute(value) if value and "://" not in value else value for field, value in errors.items()}
    return config.model_copy(update={"model": model, "text": text, "errors": config.errors.model_copy(update=errors)})


def check_writable(config: SweepConfig) -> None:
    """UserError, before anything has been started, where the local folder `output` cannot be written."""
    if "://" in config.output:
        return
    there = next(path for path in (Path(config.output), *Path(config.output).parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"output is {config.output}, which cannot be written: {there} is {'read-only' if there.is_dir() else 'a file'}")


def new_place(config: SweepConfig, resume: str | None) -> Place:
    """The study's place, made, with its config in it. UserError: a study of this name is there already, or the storage cannot be written."""
    name = resume or config.study or time.strftime("%Y%m%d-%H%M%S")
    folder = f"{config.output}/{name}"
    place = Place(name, folder, _base() / "runs" / name if "://" in folder else Path(folder))
    try:
        files, path = fsspec.core.url_to_fs(folder)
        if not resume and files.exists(path):
            raise UserError(f"study is '{name}' but {folder} exists: choose another name, or go on with it by --resume {name}")
        files.makedirs(path, exist_ok=True)
        place.local.mkdir(parents=True, exist_ok=True)
        settled = yaml.safe_dump(config.model_copy(update={"study": name}).model_dump(), sort_keys=False)
        write_atomically(files, f"{path}/{CONFIG}", settled.encode())  # a study whose config were torn could not be gone on with
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"output is {config.output}, which cannot be written ({error}): name a folder or a URL such as s3://bucket/runs") from error
    return place


@contextmanager
def driving(place: Place) -> Iterator[None]:
    """Around a driver's work: UserError where another driver of this study runs on this machine. The lock goes with its process."""
    with (place.local / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"study is '{place.name}', which still runs: wait for its end, or stop it first") from None
        yield


def saved_config(output: str, study: str, faults: Mapping[str, Any] = {}) -> SweepConfig:
    """The config a study was started with, with these `faults` changed: they say how it is run, and change no bit.

    UserError: there is no such study in `output`, or what it cannot go on without is damaged.
    """
    output = output if "://" in output else str(_base() / Path(output).expanduser())
    files, path = fsspec.core.url_to_fs(output)
    if not files.exists(f"{path}/{study}/{CONFIG}"):
        known = sorted(found.split("/")[-2] for found in files.glob(f"{path}/*/{CONFIG}"))
        raise UserError(f"--resume {study}: there is no such study in {output}" + (f", there are {', '.join(known)}" if known else ""))
    Skipped(f"{output}/{study}/{SKIPPED}")
    try:
        saved = yaml.safe_load(files.cat_file(f"{path}/{study}/{CONFIG}"))
        saved = completed(SweepConfig, saved)
        config = SweepConfig.model_validate(saved)
        if lacking := _paths(config.model_dump()) - _paths(saved):  # with defaults for them, another sweep would be trained
            raise ValueError(f"{min(lacking)} is not in it")
        return config.model_copy(update={"faults": config.faults.model_copy(update=faults)})
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}/{study}/{CONFIG} is damaged, or of another version of raysae ({str(error).splitlines()[0]})") from error


def _paths(settings: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of all settings."""
    names = set()
    for name, value in settings.items():
        names |= {prefix + name} | (_paths(value, f"{prefix}{name}.") if isinstance(value, Mapping) else set())
    return names


def _base() -> Path:
    """What relative paths are relative to: the working directory, except in a Ray job, which runs in a copy of it that is thrown away: ~/raysae."""
    return Path.home() / "raysae" if _in_ray_job() else Path.cwd()


def _in_ray_job() -> bool:
    return "_ray_pkg_" in str(Path.cwd())


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
