"""Opens MLflow's UI on the studies of a database.

python -m raysae.commands.ui [--uri URI] [--experiment NAME] [--port PORT]
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from raysae.commands.parse import main
from raysae.config import TrackingConfig, UserError
from raysae.tracking.client import ENVIRONMENT
from raysae.tracking.database import absolute, database_file
from raysae.tracking.views import ALL, LATEST, VIEW_TAG, view_url

HOST = "127.0.0.1"  # Nobody else can reach the server
PORT = 5000
LONGEST_STOP = 10  # Seconds that the server has to end by itself

get = build_opener(ProxyHandler({})).open  # Bypasses proxies, which do not know this machine's loopback address


def job(argv: list[str]) -> int:
    default = TrackingConfig()
    parser = argparse.ArgumentParser(
        prog="python -m raysae.commands.ui", description="Opens MLflow's UI on the tracked studies."
    )
    parser.add_argument(
        "--uri", default=default.uri, help=f"MLflow tracking URI of a database. The default is {default.uri}."
    )
    parser.add_argument(
        "--experiment", default=default.experiment, help=f"MLflow experiment. The default is {default.experiment}."
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"Port on {HOST}. The default is {PORT}.")
    arguments = parser.parse_args(argv)
    check(arguments.uri, arguments.port)
    address = f"http://{HOST}:{arguments.port}"
    with running_server(absolute(arguments.uri), arguments.port) as server:
        while not answers(address):
            if server.poll() is not None:
                return server.returncode
            time.sleep(0.2)
        print(welcome(address, arguments.experiment), flush=True)
        return server.wait()


def check(uri: str, port: int) -> None:
    """Checks that the server could start.

    Raises:
        UserError: there is no database, or another program has the port.
    """
    if uri.startswith(("http://", "https://")):
        raise UserError(f"--uri is {uri}, which is a server already. Open it in a browser.")
    if (file := database_file(uri)) and not file.is_file():
        raise UserError(
            f"--uri is {uri}: there is no such database yet. "
            "Train SAEs first (make sweep), or name the database of your sweeps."
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # A port whose server has just ended is free
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            taken = getattr(error, "errno", None) == errno.EADDRINUSE
            why = "another program has it" if taken else "it cannot be used"
            other = PORT + 1 if port == PORT else PORT
            raise UserError(f"--port is {port}: {why}. Choose another one, e.g. make ui PORT={other}") from error


@contextmanager
def running_server(uri: str, port: int) -> Iterator[subprocess.Popen]:
    """Runs MLflow's server on this database until the body ends.

    Ctrl-C and SIGTERM end it with all its processes.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning"]
    environment = ENVIRONMENT | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "PYTHONWARNINGS": "ignore",
    }
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    server = subprocess.Popen(command, env=environment | os.environ, start_new_session=True)
    try:
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(LONGEST_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        signal.signal(signal.SIGTERM, previous)


def answers(address: str) -> bool:
    try:
        with get(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def welcome(address: str, experiment: str) -> str:
    """Where to look: the address, and the views that the studies of this experiment have saved."""
    lines = [f"MLflow is at {address}, until Ctrl-C"]
    try:
        with get(
            f"{address}/api/2.0/mlflow/experiments/get-by-name?{urlencode({'experiment_name': experiment})}", timeout=30
        ) as answer:
            found = json.load(answer)["experiment"]
    except HTTPError:
        return "\n".join([*lines, f"It has no experiment {experiment} yet: name yours with --experiment"])
    number, tags = found["experiment_id"], {tag["key"] for tag in found.get("tags", [])}
    views = [
        ("latest study, charts", LATEST, "CHART"),
        ("latest study, table", LATEST, "TABLE"),
        ("all SAEs, table", ALL, "TABLE"),
    ]
    lines += [
        f"  {name + ':':22}{view_url(address, number, view, mode)}"
        for name, view, mode in views
        if VIEW_TAG + view in tags
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(job)
