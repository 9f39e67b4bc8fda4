"""Ray for a job: the cluster that is named, or a Ray of its own on this machine.

A local Ray is kept small and out of reach. It has no autoscaler, no dashboard and no server that other machines reach.
Ray has no options for some of this, so this module patches Ray's internals while Ray starts.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import ray
from ray._private import ray_constants, services
from ray._private.node import Node

from raysae.borders import border, reason
from raysae.config import UserError

LONGEST_TMPDIR = 36  # Bytes of the path of the folder for temporary files in which Ray's sockets have room
REACHABLE_SECONDS = 5.0  # Longest wait for a cluster's address to answer


def connect(address: str | None, store_bytes: int) -> None:
    """Connect to a cluster, or start Ray on this machine. Does nothing where this process is connected already.

    Args:
        address: the cluster's address (resources.address). None: RAY_ADDRESS, which `ray job submit` sets. Where that
            is unset too, Ray starts on this machine.
        store_bytes: size of the object store of a Ray that starts here.

    Raises:
        UserError: no cluster answers at the address, or this machine has no room for such a store.
    """
    address = named_cluster(address)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # The driver handles interruptions, so that trainers checkpoint
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    if address:
        _check_reachable(address)
        with border("resources.address", address, "where no Ray cluster answers", "unset it for a Ray of this machine"):
            ray.init(address=address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
        return
    with border("resources.address", "unset", "and Ray does not start on this machine"):
        _start(store_bytes)


def _start(store_bytes: int) -> None:
    """Start Ray on this machine, with an object store of this size, and connect to it."""
    stay_on_loopback()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Only this machine's users can reach it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "error",
        "ignore_reinit_error": True,
        "object_store_memory": store_bytes,
        "_system_config": {"num_workers_soft_limit": 0},
        "_temp_dir": folder_of_sockets(),
    }
    if (word := shlex.quote(sys.executable)) != sys.executable:  # Ray pastes the path into a shell's line
        options["runtime_env"] = {"py_executable": word}
    try:
        with _out_of_reach(), _bare():
            ray.init("local", **options)
    except ValueError as error:
        if "memory" not in str(error):
            raise
        raise UserError(
            "the activations in flight (stream.mib_in_flight), the held-out ones (evaluation.rows × hook_points) and "
            f"the tokens take {store_bytes / 2**30:.1f} GiB of shared memory, which this machine does not have "
            f"({reason(error)}): choose less of them"
        ) from error


def folder_of_sockets() -> str:
    """The folder in which Ray makes its sockets: that of RAY_TMPDIR, TMPDIR or /tmp, if it will do.

    The system takes no socket whose path is longer than about 107 bytes. Ray's own part of the path has 68.

    Raises:
        UserError: no such folder has a short path and can be written.
    """
    variable = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    usual = os.environ.get(variable) or "/tmp"
    for folder in map(os.path.abspath, (usual, "/tmp", "/var/tmp", "/dev/shm")):
        if (
            len(os.fsencode(folder)) <= LONGEST_TMPDIR
            and os.path.isdir(folder)
            and os.access(folder, os.W_OK | os.X_OK)
        ):
            return os.path.join(folder, "ray")
    raise UserError(
        f"{variable} is {usual}, where Ray cannot make its sockets: set it to a folder that can be written, with a "
        f"path of at most {LONGEST_TMPDIR} characters"
    )


def named_cluster(address: str | None) -> str | None:
    """The cluster's address: `address` or RAY_ADDRESS. None where Ray is to start on this machine."""
    address = address or os.environ.get("RAY_ADDRESS")
    return address if address and address != "local" else None


def _check_reachable(address: str) -> None:
    """Raise UserError where nobody listens at `HOST:PORT`. Ray itself would try for most of a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # It is `auto`, or something only Ray understands
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHABLE_SECONDS).close()
    except OSError as error:
        raise UserError(f"resources.address is {address}, where no Ray cluster answers ({error})") from error


@contextmanager
def _out_of_reach() -> Iterator[None]:
    """Put the processes that Ray starts meanwhile into process groups of their own.

    `timeout` and batch systems send SIGTERM to the driver's group. Ray would end before the trainers have written their
    checkpoints. Where the driver itself is killed, Ray still ends with it.
    """
    start = services.ConsolePopen
    services.ConsolePopen = partial(start, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = start


@contextmanager
def _bare() -> Iterator[None]:
    """Start Ray without autoscaler, forwarding of logs to this process, and the dashboard's server.

    That saves 170 MiB and a second of start-up. `ray.init` has no options for these.
    """
    names = [
        name for name in ("start_monitor", "start_log_monitor", "start_api_server") if hasattr(Node, name)
    ]  # internals: others in other Rays
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, lambda self, **options: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def stay_on_loopback() -> None:
    """Make a local Ray's servers bind to the loopback address, as they do on macOS.

    On Linux they would bind to every interface of the machine, and whoever reaches them can run code. Ray has no option
    for this. The variable is for the processes that Ray starts, the constant for this one.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
