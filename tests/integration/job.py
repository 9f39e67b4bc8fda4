"""Runs the main job as a user would: a separate process, on the small real language model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "160",
}


def arguments(shared_data: Path, folder: Path, **knobs: object) -> list[str]:
    """Command-line overrides of a sweep that takes seconds.

    `knobs` override them in turn, with `__` for a dot.
    """
    defaults = {
        "model.name": shared_data / "models" / "stories260K",
        "text.source": shared_data / "text" / "tinystories" / "train*.txt",
        "text.delimiter": "<|endoftext|>",
        "text.cache": folder.parent / "text",
        "stream.context_length": 128,
        "stream.cache": "off",
        "hook_points": "resid_post.2",
        "widths": "128,512",
        "k": "8,16",
        "train.tokens": 120_000,
        "train.reports": 4,
        "evaluation.rows": 30_000,
        "evaluation.predicted_tokens": 2_000,
        "output": folder / "runs",
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "study": "test",
    }
    settings = defaults | {key.replace("__", "."): value for key, value in knobs.items()}
    return [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]


def start(arguments: list[str], **more) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "jobs" / "scaling_sweep.py"), *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def run(arguments: list[str], timeout: float = 280) -> subprocess.CompletedProcess:
    process = start(arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
