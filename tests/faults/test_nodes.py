"""Machines of a cluster die, or are drained with a deadline, while a sweep runs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.faults.harness import LONG, Sweep, assert_same

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]
# Ray sees the death of a machine within seconds
QUICK = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 500, "failure_threshold": 6}
STORE = 150 * 2**20
# The GPUs may exist in name alone: without one, trainers compute on the CPU. Ray keeps producers off a machine with
# GPUs while there is room on another.
NEEDS = {"resources__trainer_gpus": 0.5, "resources__trainer_cpus": 0.5, "resources__producer_cpus": 1}
ROOM = {
    "trainers": {"num_cpus": 1, "num_gpus": 1},
    "producers": {"num_cpus": 1},
    "both": {"num_cpus": 2, "num_gpus": 1},
}


class Machines:
    """Machines of a cluster.

    `trainers` have what two trainers ask for, `producers` have what a producer asks for, `both` have both.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.folders: list[str] = []

    def add(self, kind: str) -> str:
        """Adds a machine and returns its id."""
        # Each machine has its own folder. The path is short because sockets lie in it.
        self.folders.append(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        node = self.cluster.add_node(**ROOM[kind], object_store_memory=STORE, temp_dir=self.folders[-1])
        return node.node_id

    def kill(self, node_id: str) -> None:
        node = next(node for node in self.cluster.list_all_nodes() if node.node_id == node_id)
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def machines_of() -> Iterator[Machines]:
    """A cluster with a head that takes no work."""
    kept = dict(os.environ)
    os.environ.update({f"RAY_health_check_{key}": str(value) for key, value in QUICK.items()})
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    made = Machines(cluster)
    try:
        yield made
    finally:
        ray.shutdown()
        cluster.shutdown()
        for folder in made.folders:
            shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(kept)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with machines_of() as made:
        yield made


@pytest.fixture
def sweep(machines: Machines, made: Path, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    started: list[Sweep] = []

    def start(**knobs: object) -> Sweep:
        new = Sweep(machines.cluster.address, made, tmp_path, NEEDS | knobs)
        started.append(new)
        new.start()
        return new

    yield start
    for one in started:
        one.close()


def drain(node: str, seconds: float) -> None:
    """Sends a spot notice: the machine goes in so many seconds.

    Ray tells those who ask. It neither moves nor kills anything.
    """
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node, reason, "spot", int(1000 * (time.time() + seconds)))
    assert accepted, why


def test_machines_die(machines: Machines, sweep: Callable[..., Sweep], undisturbed: Callable[..., Sweep]) -> None:
    """First the machine with the producers dies, then the one with the trainers.

    The machine that took up both dies last. Another stands ready each time.
    """
    producers, trainers = machines.add("producers"), machines.add("trainers")
    machines.cluster.wait_for_nodes()
    ours = sweep(**LONG)
    ours.until_share(0.05)
    assert ours.nodes("producer") == {producers}
    assert ours.nodes("trainer") == {trainers}
    both = machines.add("both")
    machines.kill(producers)
    ours.until(lambda: ours.nodes("producer") == {both})
    machines.kill(trainers)
    ours.until(lambda: ours.nodes("trainer") == {both} and len(ours.pids("trainer")) == 2)
    ours.until_share(0.4)
    last = machines.add("both")
    machines.kill(both)
    ours.until(lambda: ours.nodes("trainer") == ours.nodes("producer") == {last})
    ours.finish()
    machines.kill(last)
    assert_same(ours, undisturbed(**LONG))


@pytest.mark.long
def test_a_machine_is_drained(
    machines: Machines, sweep: Callable[..., Sweep], undisturbed: Callable[..., Sweep]
) -> None:
    """Before the deadline its trainers write checkpoints and leave, and its producers move.

    Then the machine dies, and nothing is on it.
    """
    drained = machines.add("both")
    machines.cluster.wait_for_nodes()
    ours = sweep(**LONG, train__checkpoint_seconds=10_000)  # Only leaving writes checkpoints
    ours.until_share(0.05)
    assert not list((ours.place / "checkpoints").glob("*/*.safetensors"))
    staying = machines.add("both")
    at = dict(ours.progress())
    drain(drained, 90)
    deadline = time.monotonic() + 90
    written: set[Path] = set()
    moved: set[str] = set()

    def gone() -> bool:
        written.update(path.parent for path in (ours.place / "checkpoints").glob("*/*.safetensors"))
        moved.update(kind for kind in ("trainer", "producer") if ours.nodes(kind) == {staying})
        return moved == {"trainer", "producer"}

    ours.until(gone)
    assert time.monotonic() < deadline, "they left too late"
    assert len(written) == 4, ours.log()
    machines.kill(drained)
    ours.finish()
    machines.kill(staying)
    assert min(at.values()) > 0
    assert_same(ours, undisturbed(**LONG))
