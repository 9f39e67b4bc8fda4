"""The main job through `ray job submit` on a local cluster of two nodes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.integration.job import ENVIRONMENT, REPOSITORY, arguments


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def dashboard() -> Iterator[str]:
    port = free_port()
    head = {
        "num_cpus": 1,
        "include_dashboard": True,
        "dashboard_port": port,
        "dashboard_host": "127.0.0.1",
        "object_store_memory": 400_000_000,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    # The node has its own folder, as on a machine of its own. Nodes that share a folder unpack the job's files over
    # each other's.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # The path is short because sockets lie in it
    cluster.add_node(num_cpus=1, object_store_memory=400_000_000, temp_dir=folder)
    cluster.wait_for_nodes()
    yield f"http://127.0.0.1:{port}"
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_ray_job_submit_on_two_nodes(dashboard: str, shared_data: Path, tmp_path: Path) -> None:
    words = arguments(shared_data, tmp_path, **{"resources.trainer_cpus": 0.5, "resources.producer_cpus": 0.5})
    ray = Path(sys.executable).parent / "ray"
    job = [
        "job",
        "submit",
        "--address",
        dashboard,
        "--working-dir",
        str(REPOSITORY),
        "--submission-id",
        "sweep",
        "--no-wait",
        "--",
    ]
    subprocess.run(
        [ray, *job, sys.executable, "jobs/scaling_sweep.py", *words], env=ENVIRONMENT, check=True, timeout=120
    )
    client = JobSubmissionClient(dashboard)
    give_up = time.monotonic() + 240
    while not client.get_job_status("sweep").is_terminal() and time.monotonic() < give_up:
        time.sleep(1)
    logs = client.get_job_logs("sweep")
    assert client.get_job_status("sweep") == JobStatus.SUCCEEDED, logs
    table = pd.read_csv(tmp_path / "runs/test/summary/summary.csv")
    assert len(table) == 4
    assert (table["status"] == "done").all()
    assert "1,024 contexts forwarded for training (1,024 needed" in logs.replace("\n", " ")
