"""A study in MLflow: a parent run for the sweep, a child run per SAE.

Every call returns at once, because an outbox and its sender do the rest. `flush` and `close` wait for them.
"""

from __future__ import annotations

import getpass
import logging
import math
import subprocess
import sys
import time as clock
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from raysae.config import TrackingConfig, UserError
from raysae.processes import command
from raysae.tracking.database import absolute
from raysae.tracking.outbox import FAILED, FINISHED, KILLED, STUDY, Outbox
from raysae.tracking.sender import Sender
from raysae.tracking.tags import KIND_ANALYSIS, KIND_STUDY

LONGEST_PARAM = 500  # Characters that every MLflow server takes (newer ones take 6,000)
CUT = "…"  # Ends what is cut
LONGEST_TAG = 5000

log = logging.getLogger(__name__)


class Study:
    """The runs of one sweep. Opening the same study again continues the same runs.

    Runs are addressed by SAE name, and the study's own by None. Several threads of one process may use a study.

    Args:
        outbox_path: a file on a local disk, because SQLite needs locks.
        tracking: where the numbers go.
        name: the study's name, by which its runs are found again.
        config: parameters of the parent run, flattened to dotted names.
        analysis: whether the runs are an analysis and the SAEs it read.
        made_for: study whose analysis needs this one.

    Raises:
        UserError: the outbox holds another study.
    """

    def __init__(
        self,
        outbox_path: str | Path,
        tracking: TrackingConfig,
        name: str,
        config: Mapping[str, Any],
        analysis: bool = False,
        made_for: str | None = None,
    ) -> None:
        self.name = name
        self.outbox = Outbox(outbox_path)
        known = self.outbox.meta("study")
        if known not in (None, name):
            raise UserError(f"{outbox_path} holds the numbers of the study {known}: it cannot take those of {name}")
        direct(self.outbox, absolute(tracking.uri), tracking.experiment)
        self.outbox.set_meta("study", name)
        self.outbox.set_meta("kind", KIND_ANALYSIS if analysis else KIND_STUDY)
        if made_for:
            self.outbox.set_meta("made_for", made_for)
        self.outbox.start(STUDY, _milliseconds())
        self.outbox.add_tags(STUDY, _provenance())
        self.outbox.add_params(STUDY, flatten(config))
        self._sender = Sender(self.outbox)
        self._sender.start()

    def child(self, sae_name: str, params: Mapping[str, Any]) -> None:
        """Opens the SAE's run, or opens it again. One that has finished stays finished."""
        self.outbox.start(sae_name, _milliseconds())
        self.outbox.add_tags(sae_name, _provenance())
        self.outbox.add_params(sae_name, flatten(params))

    def metrics(self, sae_name: str | None, values: Mapping[str, float], step: int, time: float | None = None) -> None:
        """Records numbers at `step` (tokens seen). What is known for (run, key, step) stays.

        `time` is when they were measured, in seconds since 1970. Without it, that is now.

        Infinite numbers and NaN become a tag of the run instead. MLflow would store them as 1.8e308 and 0.
        """
        run = sae_name or STUDY
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        broken = {
            f"raysae.nonfinite.{key}": f"{float(values[key])} at step {step}" for key in values.keys() - finite.keys()
        }
        self.outbox.add_metrics(run, finite, int(step), _milliseconds(time))
        if broken:
            log.warning(
                "%s: not tracked, because not finite: %s",
                sae_name or self.name,
                ", ".join(f"{key[17:]} {why}" for key, why in broken.items()),
            )
            self.outbox.add_tags(run, broken)

    def tag(self, sae_name: str | None, tags: Mapping[str, str]) -> None:
        """Adds notes to a run, e.g. `{"raysae.reason": "loss is nan at step 40"}`.

        A later value replaces an earlier one.
        """
        self.outbox.add_tags(sae_name or STUDY, {key: str(value)[:LONGEST_TAG] for key, value in tags.items()})

    def artifact(self, sae_name: str | None, path: str | Path, artifact_path: str = "") -> None:
        """Puts a file, or a folder's content, into the run's artifact folder `artifact_path`.

        It is read when it is sent, so leave it where it is.
        """
        self.outbox.add_artifact(sae_name or STUDY, str(Path(path).absolute()), artifact_path)

    def end(self, sae_name: str | None, status: str) -> None:
        """Closes a run as FINISHED, FAILED or KILLED.

        The study's end also closes its open children, as KILLED. They end as FAILED where it failed.
        """
        if status not in (FINISHED, FAILED, KILLED):
            raise ValueError(f"status is {status}: it must be FINISHED, FAILED or KILLED")
        self.outbox.end(sae_name or STUDY, status, _milliseconds())

    def flush(self, timeout: float = 60) -> int:
        """Waits up to `timeout` seconds until everything is sent.

        Returns how many numbers, tags, artifacts … are still unsent.
        """
        return self._sender.flush(timeout)

    def close(self, timeout: float = 10) -> None:
        """Stops the sender within about `timeout` seconds.

        What is unsent stays on disk for the next Study of this name, or for `send`.
        """
        self._sender.stop(timeout)
        if unsent := self.outbox.unsent():
            sending = command("-m", "raysae.commands.send", self.outbox.path)
            log.warning("%d entries are not in MLflow yet. To send them: %s", unsent, sending)
        self.outbox.close()


def direct(outbox: Outbox, uri: str, experiment: str) -> None:
    """Addresses the outbox to a server and experiment. After a change, all of it is to be sent anew."""
    before = outbox.meta("uri"), outbox.meta("experiment")
    outbox.set_meta("uri", uri)
    outbox.set_meta("experiment", experiment)
    if before not in ((None, None), (uri, experiment)):
        for run in outbox.runs():
            outbox.forget(run.run)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flattens a config to dotted names, with values within MLflow's limit.

    `{"train": {"tokens": 5}, "k": [8, 16], "study": None}` → `{"train.tokens": "5", "k": "8, 16"}`
    """
    return {
        key: value if len(value) <= LONGEST_PARAM else value[: LONGEST_PARAM - 1] + CUT
        for key, value in _flat(config, prefix)
    }


def is_cut(value: str) -> bool:
    """Whether a parameter in MLflow is only the beginning of its knob's value."""
    return len(value) == LONGEST_PARAM and value.endswith(CUT)


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def _milliseconds(seconds: float | None = None) -> int:
    return round(1000 * (clock.time() if seconds is None else seconds))


@cache
def _provenance() -> dict[str, str]:
    """Who ran which program from which commit, under the tags that MLflow's run table shows."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "python", "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            cwd=Path(__file__).parent,
        )
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    except (OSError, KeyError, subprocess.SubprocessError):
        # An installed package may have no repository around it. A machine may have no user database and no git.
        pass
    return tags
