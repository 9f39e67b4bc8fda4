"""An analysis's pieces of work: Ray tasks, a core each, whose results are kept on disk. The one module of the analyses that knows Ray."""

from __future__ import annotations

import os
import pickle
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from raysae.cluster.connect import connect
from raysae.config import ModelConfig, ResourcesConfig, UserError, digest
from raysae.lm.model import LanguageModel
from raysae.processes import ENVIRONMENT
from raysae.study.plan import Plan, store_bytes
from raysae.text.contexts import Contexts

TRAINED_AT = 4  # hook points at most, of SAEs that an analysis trains: their held-out rows lie in the object store
DEFINITION = 2  # of the parts' results; raising it makes them anew


@dataclass(frozen=True)
class Task:
    """A piece of work: `function(*arguments)`, in a process of its own. Its result is kept under `analysis` and the digest of `key`, which names all
    that it depends on. `whole_machine`: it uses every core; `gpus` that it reserves (unset: resources.trainer_gpus); `contexts`: its first argument
    is the held-out contexts, which go to it through the object store."""

    analysis: str
    key: object
    function: Callable[..., Any]
    arguments: tuple
    whole_machine: bool = False
    gpus: float | None = None
    contexts: bool = False

    @property
    def file(self) -> str:
        return f"{self.analysis}-{digest([DEFINITION, self.analysis, self.key])}.pickle"


def ensure_ray(settled: Plan) -> None:
    """To Ray, once. UserError: the cluster has several machines that do not share the results' folder."""
    if ray.is_initialized():
        return
    config = settled.config
    held_out_width = TRAINED_AT * max(settled.widths.values())
    connect(config.resources.address, store_bytes(settled, held_out_width, token_copies=4))
    machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and not config.resources.shared_storage:
        raise UserError(
            f"output is the folder '{config.output}' and the cluster has {len(machines)} machines: name a folder that they share, and say so with "
            "--resources.shared_storage true"
        )


def work(folder: Path, parts: Sequence[Task], resources: ResourcesConfig, contexts: Contexts) -> list[Any]:
    """The parts' results, in order; those that are not in `folder` yet are worked out on the cluster. Whatever a part raises comes when the others
    that were under way have been given up."""
    missing = [part for part in parts if not (folder / part.file).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _work(folder, missing, len(parts), resources, contexts)
    return [pickle.loads((folder / part.file).read_bytes()) for part in parts]


def _work(folder: Path, missing: Sequence[Task], total: int, resources: ResourcesConfig, contexts: Contexts) -> None:
    began = time.monotonic()
    cores = int(min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))
    held_out = ray.put(contexts) if any(part.contexts for part in missing) else None
    waiting: dict[ray.ObjectRef, Task] = {}
    for part in missing:
        gpus = resources.trainer_gpus if part.gpus is None else part.gpus
        cpus = cores if part.whole_machine and not gpus else 1
        task = _work_task.options(num_cpus=cpus, num_gpus=gpus, runtime_env=ENVIRONMENT)
        waiting[task.remote(str(folder / part.file), part, cpus, *([held_out] if part.contexts else []))] = part
    left = list(waiting)
    try:
        while left:
            done, left = ray.wait(left, num_returns=1)
            ray.get(done)
            finished = total - len(left)
            print(f"  {waiting[done[0]].analysis}: {finished} of {total} parts, {time.monotonic() - began:.0f} s", flush=True)
    except BaseException:
        for task in left:
            ray.cancel(task, force=True)
        raise


@ray.remote(max_retries=3)
def _work_task(path: str, part: Task, threads: int, *contexts: Contexts) -> None:
    """Works a part out and keeps its result, which appears whole or not at all."""
    torch.set_num_threads(threads)
    result = part.function(*contexts, *part.arguments)
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(temporary, "wb") as file:
            pickle.dump(result, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def language_model(config: ModelConfig) -> LanguageModel:
    """The language model, on the GPU that Ray has given this process, if any."""
    return LanguageModel.load(config, device())


def device() -> str:
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
