"""Trains a sweep, or goes on with one that was interrupted.

Ray is imported only after `--help` and mistakes in the arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from raysae.commands.parse import parse
from raysae.config import ARCHITECTURES, FACTS, SweepConfig, UserError

FLAGS = {
    "--resume": {
        "metavar": "STUDY",
        "help": "Go on with the interrupted study of this name in `output`. It keeps its own config. "
        "Only faults.* can be changed.",
    },
    "--allow": {
        "metavar": "FACTS",
        "default": "",
        "help": "Facts, separated by commas, in which a resumed run may differ from its checkpoints, "
        "e.g. torch,device.",
    },
}


def sweep(description: str) -> Callable[[list[str]], int]:
    """The job that trains a sweep, from arguments to exit code. `description` heads its help."""

    def job(argv: list[str]) -> int:
        config, flags = parse(SweepConfig, argv, description, FLAGS)
        allow = _facts(flags.allow)
        if flags.resume:
            config = _resumed(config, flags.resume, set(flags.given))
        else:
            _check_used(config, flags)
        from raysae.sweep.run import run_sweep

        return run_sweep(config, resume=flags.resume, allow=allow)

    return job


def _check_used(config: SweepConfig, flags: argparse.Namespace) -> None:
    """UserError: something is given that this sweep cannot use."""
    if flags.allow:
        raise UserError(
            f"--allow {flags.allow} goes with --resume STUDY: a new sweep has no checkpoints to differ from"
        )
    taken = {ARCHITECTURES[name].level for name in config.architectures}
    for level, knob in (("k", "k"), ("sparsity", "sparsities")):
        if knob in flags.given and level not in taken:
            other = "sparsities" if level == "k" else "k"
            raise UserError(
                f"{knob} is given, but {', '.join(config.architectures)} does not take it: give --{other}, or name an "
                "architecture that does"
            )


def _facts(allow: str) -> frozenset[str]:
    facts = frozenset(filter(None, allow.split(",")))
    if unknown := sorted(fact for fact in facts if fact not in FACTS and not fact.startswith(("sae.", "train."))):
        raise UserError(
            f"--allow {unknown[0]}: there is no such fact. There are {', '.join(FACTS)}, sae.KNOB and train.KNOB"
        )
    return facts


def _resumed(config: SweepConfig, study: str, given: set[str]) -> SweepConfig:
    """The study's own config, with the faults.* that are `given` now."""
    faults = {knob.removeprefix("faults.") for knob in given if knob.startswith("faults.")}
    if others := sorted(given - {"output"} - {f"faults.{name}" for name in faults}):
        raise UserError(
            f"--resume {study} keeps the study's own config. "
            f"Leave out --{', --'.join(others)}: only --faults.* can be changed"
        )
    from raysae.study.place import saved_config

    return saved_config(config.output, study, {name: getattr(config.faults, name) for name in faults})
