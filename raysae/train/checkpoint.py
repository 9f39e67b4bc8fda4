"""Checkpoints of one SAE's training: complete, checksummed, atomic, and refused where they would not continue the same run.

A checkpoint is a plain safetensors file: tensors, and a JSON header (counters, reports, fingerprint) in its metadata; nothing in it is executed at
load. Its name is `<number>.<SHA-256 of the content>.safetensors`, so that a file proves itself and no second file can disagree with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass

import fsspec
import numba
import safetensors.torch
import torch
from safetensors import SafetensorError

from raysae.config import SAEConfig, TrainConfig, UserError
from raysae.determinism import Scalar, device_facts, precision_of_training
from raysae.kernels.backends import VERSION, triton_version
from raysae.kernels.screening import fast_integers
from raysae.storage import PARTIAL, sealed, unsealed, write_atomically
from raysae.stream.spec import ActivationSpec

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
HEADER = "raysae"  # key of the JSON header in the safetensors metadata
KEPT = 2
LEAVE = "leave.json"
# What a run may change between two of its processes: none of it touches the bits of an SAE (the threads really used are a fact of their own).
WITHOUT_EFFECT = {"threads", "reports", "checkpoint_seconds"}


@dataclass
class Checkpoint:
    """What is stored: `tensors` by name, any JSON `header`, and the fingerprint of what the bits depend on."""

    tensors: dict[str, torch.Tensor]
    header: dict
    fingerprint: dict[str, Scalar]


def fingerprint(spec: ActivationSpec, sae: SAEConfig, train: TrainConfig, device: torch.device | str) -> dict[str, Scalar]:
    """What the bits of a trained SAE depend on in the trainer, flat and readable, for the process and the thread that call it.

    They also depend on the numerics of the producers (see `stream.shard.numerics`), which come with the rows: an SAE's file has both.
    """
    facts = device_facts(device) | {"kernels": VERSION, "spec": spec.hash}
    if torch.device(device).type == "cpu":
        # numba compiles sums, in an order of its own, and does so where products of integers are fast
        facts |= {"numba": numba.__version__, "fast_integers": fast_integers()}
    else:
        facts |= {"triton": triton_version(), "precision": str(precision_of_training(train, device) or torch.float32).removeprefix("torch.")}
    facts |= {f"sae.{key}": value for key, value in sae.model_dump().items()}
    return facts | {f"train.{key}": value for key, value in train.model_dump().items() if key not in WITHOUT_EFFECT}


def check_fingerprint(what: str, stored: dict[str, Scalar], present: dict[str, Scalar], allow: set[str]) -> None:
    """Refuse (UserError) to go on where `what` differs from before. Facts named in `allow` may differ, with a warning."""
    differing = [key for key in sorted(stored.keys() | present.keys()) if stored.get(key) != present.get(key)]

    def told(keys: list[str]) -> str:
        return ", ".join(f"{key} (was {stored.get(key)}, is {present.get(key)})" for key in keys)

    if refused := [key for key in differing if key not in allow]:
        names = ",".join(refused)
        raise UserError(f"{what} differs in {told(refused)}: let it be as before, or allow the difference by name, --allow {names}")
    if differing:
        log.warning("%s differs in %s, as allowed: the SAE will not be bit for bit that of an undisturbed run", what, told(differing))


class CheckpointStore:
    """A folder, local or any URL fsspec knows (s3://…), of one SAE's checkpoints; the two newest are kept."""

    def __init__(self, folder: str) -> None:
        self.files, self.folder = fsspec.core.url_to_fs(str(folder))

    def save(self, checkpoint: Checkpoint) -> str:
        """Write the checkpoint and drop all but the two newest; returns its path. A crash at any point leaves the earlier ones whole, and so does
        storage that takes no more (UserError).

        One process at a time saves here: half a checkpoint is one that a process before it was killed at, and goes first, to make room.
        """
        for leftover in self.files.glob(f"{self.folder}/.*{SUFFIX}.*{PARTIAL}"):
            self.files.rm_file(leftover)
        header = json.dumps({"header": checkpoint.header, "fingerprint": checkpoint.fingerprint})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        content = safetensors.torch.save(tensors, {HEADER: header})
        earlier = self.paths()
        number = 1 + (int(earlier[0].rpartition("/")[2].partition(".")[0]) if earlier else 0)
        path = f"{self.folder}/{number:09d}.{hashlib.sha256(content).hexdigest()}{SUFFIX}"
        write_atomically(self.files, path, content, f"the checkpoints before it in {self.folder} are whole")
        for old in earlier[KEPT - 1 :]:
            with suppress(FileNotFoundError):  # a process that was given up for dead may still be there, and be as tidy
                self.files.rm_file(old)
        return path

    def load(self, present: dict[str, Scalar], allow: set[str] = frozenset()) -> Checkpoint | None:
        """The newest intact checkpoint, None where there is none; damaged ones are named in a warning. UserError: see `check_fingerprint`."""
        for path in self.paths():
            try:
                content = self.files.cat_file(path)
            except FileNotFoundError:  # as above
                continue
            if hashlib.sha256(content).hexdigest() != path.removesuffix(SUFFIX).rpartition(".")[2]:
                log.warning("checkpoint %s is damaged (its SHA-256 is not the one in its name): the one before it is used, if any", path)
                continue
            try:
                tensors = safetensors.torch.load(content)
                length = int.from_bytes(content[:8], "little")
                stored = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEADER])
                header, facts = stored["header"], stored["fingerprint"]
            except (SafetensorError, ValueError, KeyError, TypeError):
                log.warning("checkpoint %s is no checkpoint: the one before it is used, if any", path)
                continue
            check_fingerprint(f"the run that would go on with checkpoint {path}", facts, present, allow)
            return Checkpoint(tensors, header, facts)
        return None

    def paths(self) -> list[str]:
        """Paths of the checkpoints, newest (highest number) first."""
        self.files.invalidate_cache()
        if not self.files.exists(self.folder):
            return []
        return sorted((path for path in self.files.ls(self.folder, detail=False) if path.endswith(SUFFIX)), reverse=True)

    def wish_leave(self, wish: dict) -> None:
        """Note that the SAE is to end early; what was noted before stays."""
        if self.wished_leave() is None:
            write_atomically(self.files, f"{self.folder}/{LEAVE}", sealed(wish))

    def wished_leave(self) -> dict | None:
        """What was noted, None where nothing was. A damaged note counts as none, with a warning: the worst that comes of it is an SAE that is trained
        for longer, and a sweep that is resumed asks its scheduler again."""
        path = f"{self.folder}/{LEAVE}"
        try:
            return unsealed(self.files.cat_file(path), path) if self.files.exists(path) else None
        except UserError as error:
            log.warning("%s: that its SAE was to end early is forgotten, until it is told so again", error)
            return None

    def clear(self) -> None:
        """Remove everything: the SAE is finished."""
        if self.files.exists(self.folder):
            self.files.rm(self.folder, recursive=True)
