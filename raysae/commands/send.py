"""Sends an outbox that could not be sent while its sweep ran.

python -m raysae.commands.send OUTBOX [--uri URI] [--experiment NAME]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from raysae.borders import border
from raysae.commands.parse import main
from raysae.config import UserError
from raysae.tracking.client import client_of, experiment_id
from raysae.tracking.database import absolute
from raysae.tracking.delivery import Delivery
from raysae.tracking.outbox import KILLED, RUNNING, STUDY, Outbox, refusal
from raysae.tracking.runs import direct
from raysae.tracking.sender import try_lock


def send(path: str | Path, uri: str | None = None, experiment: str | None = None) -> int:
    """Send what the outbox at `path` still holds. Everything goes to another `uri` or `experiment`.

    Runs that a dead driver has left open are closed as KILLED, at the time of its last sign of life. `--resume` opens
    them again.

    Returns:
        How many entries were sent. What MLflow refuses for good stays in the outbox (see `outbox.refusal`).

    Raises:
        UserError: there is no outbox, its sweep is alive, the experiment was deleted, or MLflow does not answer. What
            has not been sent is kept.
    """
    if Path(path).is_dir():
        path = Path(path) / "outbox.db"
    if not Path(path).is_file():
        raise UserError(f"{path} is not there: name the outbox file of a study, or the study's folder")
    outbox = Outbox(path)
    if outbox.meta("study") is None:
        raise UserError(f"{path} holds no study: name the outbox file of a study")
    lock = try_lock(outbox)
    if lock is None:
        raise UserError(f"{path} belongs to a sweep that is running and sends it itself: wait until it ends")
    with lock:
        uri, experiment = absolute(uri or outbox.meta("uri")), experiment or outbox.meta("experiment")
        with border("tracking.uri", uri, "where MLflow takes nothing now", f"what it has not taken is kept in {path}"):
            experiment_id(client_of(uri), uri, experiment)  # Once MLflow answers, the outbox may be addressed to it
            direct(outbox, uri, experiment)
            if any(run.status == RUNNING for run in outbox.runs()):
                outbox.end(STUDY, KILLED, outbox.last_time())
            waiting, refused = outbox.unsent(), sum(outbox.refused().values())
            Delivery(outbox).deliver()
        sent = waiting - (sum(outbox.refused().values()) - refused)
    outbox.close()
    return sent


def job(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m raysae.commands.send",
        description="Sends the numbers and artifacts that a study has kept on disk.",
    )
    parser.add_argument("outbox", help="Outbox file in the study's folder.")
    parser.add_argument("--uri", help="MLflow tracking URI. The default is the study's own.")
    parser.add_argument("--experiment", help="MLflow experiment. The default is the study's own.")
    arguments = parser.parse_args(argv)
    print(f"{send(arguments.outbox, arguments.uri, arguments.experiment)} entries sent")
    if refused := refusal(Outbox(arguments.outbox)):
        print(refused)
    return 0


if __name__ == "__main__":
    main(job)
