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

import yaml
from pydantic import ValidationError

from raysae.borders import border, reason
from raysae.config import SweepConfig, UserError
from raysae.knobs import completed, explain, shown
from raysae.storage import (
    check_folder,
    inside,
    is_name,
    local_path,
    open_location,
    patterns,
    quoted,
    write_atomically,
)
from raysae.stream.skipped import FILE as SKIPPED
from raysae.stream.skipped import Skipped
from raysae.text.sources import absolute_source
from raysae.tracking.database import absolute, check_database

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
        output = str(_base() / local_path("output", output))
    tracking = config.tracking.model_copy(update={"uri": absolute(uri, _base())})
    config = config.model_copy(update={"output": output, "tracking": tracking})
    if _in_ray_job():
        return config
    model, text, errors = config.model, config.text, config.errors.model_dump()
    if os.path.exists(os.path.expanduser(model.name)):
        model = model.model_copy(update={"name": _absolute(model.name)})
    if text.source != "stdlib" and not text.source.startswith("hf:"):
        here = quoted(os.getcwd())
        source = ",".join(os.path.normpath(os.path.join(here, pattern)) for pattern in patterns(text.source))
        text = text.model_copy(update={"source": source})
    elif text.source.startswith("hf:"):
        text = text.model_copy(update={"source": absolute_source(text.source)})
    errors = {field: _absolute(value) if value and "://" not in value else value for field, value in errors.items()}
    return config.model_copy(update={"model": model, "text": text, "errors": config.errors.model_copy(update=errors)})


def check_writable(config: SweepConfig) -> None:
    """Raise UserError where the local folder `output` or the tracking database cannot be written.

    Nothing has been started then.
    """
    check_database(config.tracking.uri)
    if "://" not in config.output:
        check_folder("output", config.output, Path(config.output))


def new_place(config: SweepConfig, resume: str | None) -> Place:
    """Make the study's place and write its config into it.

    Raises:
        UserError: a study of this name is there already, or the storage cannot be written.
    """
    name = resume or config.study or time.strftime("%Y%m%d-%H%M%S")
    folder = f"{config.output}/{name}"
    place = Place(name, folder, _base() / "runs" / name if "://" in folder else Path(folder))
    instead = "name a folder or a URL such as s3://bucket/runs"
    with border("output", config.output, "which cannot be written", instead):
        files, path = open_location("output", folder)
        if not resume and files.exists(path):
            raise UserError(
                f"study is '{name}' but {folder} exists: choose another name, or go on with it by --resume {name}"
            )
        files.makedirs(path, exist_ok=True)
        place.local.mkdir(parents=True, exist_ok=True)
        settled = yaml.safe_dump(config.model_copy(update={"study": name}).model_dump(), sort_keys=False)
        # A study with half a config could not be resumed
        write_atomically(files, f"{path}/{CONFIG}", settled.encode())
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
    if not is_name(study):
        raise UserError(f"--resume {shown(study)}: that is no study's name")
    output = output if "://" in output else str(_base() / local_path("output", output))
    with border("output", output, "which cannot be read", "name the folder or URL of the study"):
        files, path = open_location("output", output)
        if not files.exists(f"{path}/{study}/{CONFIG}"):
            known = [found.split("/")[-2] for found in inside(files, path, f"*/{CONFIG}")]
            others = f", there are {', '.join(known)}" if known else ""
            raise UserError(f"--resume {study}: there is no such study in {output}{others}")
        content = files.cat_file(f"{path}/{study}/{CONFIG}")
    Skipped(f"{output}/{study}/{SKIPPED}")  # Raises where it is damaged
    config = config_of(content, f"{path}/{study}/{CONFIG}")
    return config.model_copy(update={"faults": config.faults.model_copy(update=faults)})


def config_of(content: bytes, where: str) -> SweepConfig:
    """The config in a study's file.

    Raises:
        UserError: it is damaged. The message names the file, `where`.
    """
    try:
        saved = completed(SweepConfig, yaml.safe_load(content))
        config = SweepConfig.model_validate(saved)
        if lacking := _paths(config.model_dump()) - _paths(saved):  # Defaults for these would train another sweep
            raise ValueError(f"{min(lacking)} is not in it")
        return config
    except Exception as error:  # YAML's values raise errors of many classes, such as that of a date
        why = explain(error) if isinstance(error, ValidationError) else reason(error)
        raise UserError(f"{where} is damaged, or of another version of raysae: {why}") from error


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
    return local_path("output", "~/raysae") if _in_ray_job() else Path.cwd()


def _in_ray_job() -> bool:
    return "_ray_pkg_" in str(Path.cwd())


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
