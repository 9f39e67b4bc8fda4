"""Fixtures of the tests that kill processes: the cluster, the materials and the undisturbed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from tests.faults.harness import PATIENCE, Sweep, materials


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the language model and the text of every sweep."""
    folder = tmp_path_factory.mktemp("materials")
    materials(folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a local Ray that outlives drivers."""
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def undisturbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sweep]:
    """`undisturbed(**knobs)`: the finished sweep with these knobs that nobody disturbed.

    It runs on a Ray of its own. Each set of knobs runs once.
    """
    done: dict[tuple, Sweep] = {}

    def run(**knobs: object) -> Sweep:
        key = tuple(sorted(knobs.items()))
        if key not in done:
            sweep = Sweep("local", made, tmp_path_factory.mktemp("undisturbed"), knobs)
            sweep.start()
            try:
                sweep.finish(3 * PATIENCE)  # A soak's run is long
            finally:
                sweep.close()
            done[key] = sweep
        return done[key]

    return run


@pytest.fixture
def sweep(cluster: str, made: Path, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """`sweep(**knobs)` starts a sweep on the cluster. The test's end kills what is left of it."""
    started: list[Sweep] = []

    def start(**knobs: object) -> Sweep:
        new = Sweep(cluster, made, tmp_path / f"sweep-{len(started)}", knobs)
        started.append(new)
        new.start()
        return new

    yield start
    for one in started:
        one.close()
