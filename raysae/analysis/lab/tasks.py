"""The analyses' work on the cluster: Ray tasks whose results are kept on disk. No other module of analysis/ knows Ray.

A result is a pickle under a digest of all it depends on. So a job that was killed goes on with the tasks it lacks, and
another job reads what the first has worked out. The price: whoever may write to the folder may run code here.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from raysae.cluster.connect import connect
from raysae.config import ModelConfig, UserError, digest
from raysae.lm.model import LanguageModel
from raysae.processes import ENVIRONMENT
from raysae.study.plan import Plan, store_bytes
from raysae.text.contexts import Contexts

TRAINED_AT = 4  # Most hook points an analysis trains SAEs at. Their held-out rows lie in the object store.
RESULTS_DEFINITION = 5  # Raise it when results or their classes change. Every result is then worked out anew.


@dataclass(frozen=True)
class Task:
    """A piece of work on the cluster: `function(*arguments)` in a process of its own.

    Args:
        analysis: the analysis that the result is kept under.
        key: names all that the result depends on.
        function: a function of a module, so that another process can import it.
        arguments: what it is called with.
        whole_machine: whether it uses every core of its machine. Otherwise it uses one.
        gpus: GPUs that it reserves. Unset means resources.trainer_gpus.
        contexts: whether the held-out contexts go before the arguments. They travel through the object store.
    """

    analysis: str
    key: object
    function: Callable[..., Any]
    arguments: tuple
    whole_machine: bool = False
    gpus: float | None = None
    contexts: bool = False

    @property
    def file(self) -> str:
        """The name of the file that keeps the result."""
        return f"{self.analysis}-{digest([RESULTS_DEFINITION, self.analysis, self.key])}.pickle"


def ensure_ray(settled: Plan) -> None:
    """Connects to Ray, unless this process is connected.

    Raises:
        UserError: the cluster has several machines, and nobody says that they share the results' folder.
    """
    if ray.is_initialized():
        return
    config = settled.config
    of_attention = (block.d_attn or 0 for block in settled.facts.architecture.blocks)
    held_out_width = TRAINED_AT * max(*settled.widths.values(), *of_attention)
    connect(config.resources.address, store_bytes(settled, held_out_width, token_copies=4))
    machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and not config.resources.shared_storage:
        raise UserError(
            f"output is the folder '{config.output}', and the cluster has {len(machines)} machines. "
            "Name a folder that they share, and say so with --resources.shared_storage true."
        )


def work(folder: Path, tasks: Sequence[Task], settled: Plan) -> list[Any]:
    """The tasks' results, in order. The cluster works out those that `folder` does not keep.

    Raises:
        Exception: what a task raises, once the tasks under way have been cancelled.
    """
    results = _kept(folder, tasks)
    missing = [task for task in tasks if task.file not in results]
    if missing:
        ensure_ray(settled)
        folder.mkdir(parents=True, exist_ok=True)
        _work(folder, missing, len(tasks), settled)
        results |= {task.file: _read(folder / task.file) for task in missing}
    return [results[task.file] for task in tasks]


def _kept(folder: Path, tasks: Sequence[Task]) -> dict[str, Any]:
    """The results that `folder` keeps, by file name. A file that cannot be read counts as missing."""
    results = {}
    for path in [folder / task.file for task in tasks]:
        if not path.exists():
            continue
        try:
            results[path.name] = _read(path)
        except Exception as error:  # A damaged pickle raises anything, one of a class that has moved an ImportError.
            print(f"{path} cannot be read ({type(error).__name__}). Its task runs again.", file=sys.stderr)
    return results


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _work(folder: Path, missing: Sequence[Task], total: int, settled: Plan) -> None:
    """Runs the `missing` ones of `total` tasks on the cluster and prints how far they are."""
    began = time.monotonic()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = int(min(resources.get("CPU", 1) for resources in nodes if resources.get("CPU")))
    held_out = ray.put(settled.contexts["evaluation"]) if any(task.contexts for task in missing) else None
    waiting: dict[ray.ObjectRef, Task] = {}
    for task in missing:
        gpus = settled.config.resources.trainer_gpus if task.gpus is None else task.gpus
        cpus = cores if task.whole_machine and not gpus else 1
        remote = _work_task.options(num_cpus=cpus, num_gpus=gpus, runtime_env=ENVIRONMENT)
        waiting[remote.remote(str(folder / task.file), task, cpus, *([held_out] if task.contexts else []))] = task
    left = list(waiting)
    try:
        while left:
            done, left = ray.wait(left, num_returns=1)
            ray.get(done)
            finished, took = total - len(left), time.monotonic() - began
            print(f"  {waiting[done[0]].analysis}: {finished} of {total} tasks, {took:.0f} s", flush=True)
    except BaseException:
        for reference in left:
            ray.cancel(reference, force=True)
        raise


@ray.remote(max_retries=3)
def _work_task(path: str, task: Task, threads: int, *contexts: Contexts) -> None:
    """Works a task out and keeps its result at `path`. The file appears whole or not at all."""
    torch.set_num_threads(threads)
    result = task.function(*contexts, *task.arguments)
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
    """The GPU that Ray has given this process, or the CPU."""
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
