"""Checkpoints of one SAE's training: complete, checksummed and atomic.

A checkpoint that would not continue the same run is refused.

A checkpoint is a plain safetensors file. Its metadata holds a JSON header of counters, reports and fingerprint. Loading
it executes nothing. Its name is `<number>.<SHA-256 of the content>.safetensors`. So the file proves itself, and no
second file can disagree with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass

import numba
import safetensors.torch
import torch
from safetensors import SafetensorError

from raysae.config import SAEConfig, TrainConfig, UserError
from raysae.determinism import Scalar, device_facts, precision_of_training
from raysae.kernels.backends import VERSION, triton_version
from raysae.kernels.screening import fast_integers
from raysae.knobs import earlier
from raysae.storage import PARTIAL, inside, open_location, sealed, unsealed, write_atomically
from raysae.stream.spec import ActivationSpec

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
HEADER = "raysae"  # Key of the JSON header in the safetensors metadata
KEPT = 2
LEAVE = "leave.json"
# Knobs that a run may change between two of its processes. None of them touches the bits of an SAE.
# The fingerprint has the number of threads really used as a fact of its own.
WITHOUT_EFFECT = {"threads", "reports", "checkpoint_seconds"}


@dataclass
class Checkpoint:
    """What is stored: `tensors` by name, any JSON `header`, and the fingerprint of what the bits depend on."""

    tensors: dict[str, torch.Tensor]
    header: dict
    fingerprint: dict[str, Scalar]


def fingerprint(
    spec: ActivationSpec, sae: SAEConfig, train: TrainConfig, device: torch.device | str
) -> dict[str, Scalar]:
    """What the bits of a trained SAE depend on in the trainer, flat and readable.

    The facts are those of the calling process and thread. The bits also depend on the producers' numerics, which come
    with the rows (see `stream.shard.numerics`). An SAE's file has both.
    """
    facts = device_facts(device) | {"kernels": VERSION, "spec": spec.hash}
    if torch.device(device).type == "cpu":
        # numba compiles sums, with its own order of addition. It does so where products of integers are fast.
        facts |= {"numba": numba.__version__, "fast_integers": fast_integers()}
    else:
        facts |= {
            "triton": triton_version(),
            "precision": str(precision_of_training(train, device) or torch.float32).removeprefix("torch."),
        }
    facts |= {f"sae.{key}": value for key, value in sae.model_dump().items()}
    return facts | {f"train.{key}": value for key, value in train.model_dump().items() if key not in WITHOUT_EFFECT}


def check_fingerprint(what: str, stored: dict[str, Scalar], present: dict[str, Scalar], allow: set[str]) -> None:
    """Refuse to continue where a fact of `what` differs from before.

    Facts named in `allow` may differ, with a warning. A knob that is newer than what is stored counts as it did before.

    Raises:
        UserError: a fact differs that is not in `allow`.
    """
    stored = {key: value for key, value in _earlier().items() if key in present} | stored
    differing = [key for key in sorted(stored.keys() | present.keys()) if stored.get(key) != present.get(key)]

    def told(keys: list[str]) -> str:
        return ", ".join(f"{key} (was {stored.get(key)}, is {present.get(key)})" for key in keys)

    if refused := [key for key in differing if key not in allow]:
        names = ",".join(refused)
        raise UserError(f"{what} differs in {told(refused)}: restore the earlier values, or pass --allow {names}")
    if differing:
        log.warning(
            "%s differs in %s, as allowed. The SAE will not be bit for bit that of an undisturbed run.",
            what,
            told(differing),
        )


def _earlier() -> dict[str, Scalar]:
    """What facts of knobs count as in a fingerprint that is older than the knob."""
    models = {"sae": SAEConfig, "train": TrainConfig}
    return {f"{kind}.{knob}": value for kind, model in models.items() for knob, value in earlier(model).items()}


class CheckpointStore:
    """A folder of one SAE's checkpoints, local or any URL fsspec knows (s3://…). It keeps the two newest."""

    def __init__(self, folder: str) -> None:
        self.files, self.folder = open_location("output", str(folder))

    def save(self, checkpoint: Checkpoint) -> str:
        """Write the checkpoint, drop all but the two newest, and return its path.

        A crash at any point leaves the earlier checkpoints whole. One process at a time saves here. So a half-written
        file is a killed predecessor's, and is removed first to make room.

        Raises:
            UserError: the storage takes no more. The earlier checkpoints are whole.
        """
        for leftover in inside(self.files, self.folder, f".*{SUFFIX}.*{PARTIAL}"):
            with suppress(FileNotFoundError):  # A process given up for dead may still run and finish it first
                self.files.rm_file(leftover)
        header = json.dumps({"header": checkpoint.header, "fingerprint": checkpoint.fingerprint})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        content = safetensors.torch.save(tensors, {HEADER: header})
        earlier = self.paths()
        number = 1 + (int(earlier[0].rpartition("/")[2].partition(".")[0]) if earlier else 0)
        path = f"{self.folder}/{number:09d}.{hashlib.sha256(content).hexdigest()}{SUFFIX}"
        write_atomically(self.files, path, content, f"the checkpoints before it in {self.folder} are whole")
        for old in earlier[KEPT - 1 :]:
            with suppress(FileNotFoundError):  # A process given up for dead may still run and remove it first
                self.files.rm_file(old)
        return path

    def load(self, present: dict[str, Scalar], allow: set[str] = frozenset()) -> Checkpoint | None:
        """The newest intact checkpoint, or None where there is none.

        A warning names each damaged one.

        Raises:
            UserError: see `check_fingerprint`.
        """
        for path in self.paths():
            try:
                content = self.files.cat_file(path)
            except FileNotFoundError:  # A process given up for dead may have removed it
                continue
            if hashlib.sha256(content).hexdigest() != path.removesuffix(SUFFIX).rpartition(".")[2]:
                log.warning(
                    "checkpoint %s is damaged (its SHA-256 is not the one in its name). "
                    "The one before it is used, if any.",
                    path,
                )
                continue
            try:
                tensors = safetensors.torch.load(content)
                length = int.from_bytes(content[:8], "little")
                stored = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEADER])
                header, facts = stored["header"], stored["fingerprint"]
            except (SafetensorError, ValueError, KeyError, TypeError):
                log.warning("checkpoint %s is no checkpoint. The one before it is used, if any.", path)
                continue
            check_fingerprint(f"the run that would go on with checkpoint {path}", facts, present, allow)
            return Checkpoint(tensors, header, facts)
        return None

    def paths(self) -> list[str]:
        """Paths of the checkpoints. The newest, which has the highest number, is first."""
        self.files.invalidate_cache()
        if not self.files.exists(self.folder):
            return []
        return sorted(
            (path for path in self.files.ls(self.folder, detail=False) if path.endswith(SUFFIX)), reverse=True
        )

    def wish_leave(self, wish: dict) -> None:
        """Note that the SAE is to end early. An earlier note stays."""
        if self.wished_leave() is None:
            write_atomically(self.files, f"{self.folder}/{LEAVE}", sealed(wish))

    def wished_leave(self) -> dict | None:
        """The note that the SAE is to end early, or None where there is none.

        A damaged note counts as none, with a warning. The worst result is an SAE that trains longer. A resumed sweep
        asks its scheduler again.
        """
        path = f"{self.folder}/{LEAVE}"
        try:
            return unsealed(self.files.cat_file(path), path) if self.files.exists(path) else None
        except UserError as error:
            log.warning("%s: its SAE trains on until it is told again to end early", error)
            return None

    def clear(self) -> None:
        """Remove everything, because the SAE is finished."""
        if self.files.exists(self.folder):
            self.files.rm(self.folder, recursive=True)
