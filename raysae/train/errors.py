"""Rows to train on that are an error of another SAE.

For activations x these are e = x − Sae(x), its linear prediction ê from x, or ε = e − ê.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import load_file
from torch import Tensor

from raysae.borders import border
from raysae.config import ErrorsConfig, UserError, error_kind
from raysae.sae.importers import load_any
from raysae.storage import local_path
from raysae.stream.reader import BatchReader


class ErrorOf:
    """Maps raw activations (b, `width`) to an error of another SAE, on `device` in float32.

    `hook_point` is H.KIND. H is the hook point of the activations, and KIND names the error. `digest` names the
    content: the tensors of the SAE and of the probe.

    Raises:
        UserError: the SAE or the probe is missing, damaged, or for activations of another width.
    """

    def __init__(self, hook_point: str, config: ErrorsConfig, width: int, device: torch.device | str = "cpu") -> None:
        self.kind, of = error_kind(hook_point)
        self.sae = load_any(config.sae, of).sae.to(device)
        with border("errors.probe", config.probe, "which is no probe that jobs/error_regression.py has saved"):
            probe = load_file(local_path("errors.probe", config.probe))
            weight, bias = probe["probe/weight"], probe["probe/bias"]
        if self.sae.d_in != width or weight.shape != (width, width):
            raise UserError(
                f"errors.sae takes activations {self.sae.d_in} wide and errors.probe {len(weight)}, "
                f"but {of} is {width} wide. Name an SAE of this hook point and its probe."
            )
        content = hashlib.sha256()
        for name, tensor in sorted({**self.sae.state_dict(), **probe}.items()):
            content.update(name.encode())
            content.update(tensor.cpu().contiguous().numpy())
        self.digest = f"{self.kind} {content.hexdigest()[:16]}"
        self.weight, self.bias = weight.float().to(device), bias.float().to(device)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The error of each row, (b, d) float32 on the device."""
        x = x.to(self.weight)
        if self.kind == "linear":
            return torch.addmm(self.bias, x, self.weight)
        error = x - self.sae(x)
        return error if self.kind == "error" else error - torch.addmm(self.bias, x, self.weight)


class Transformed:
    """A reader that passes its batches through a function."""

    def __init__(self, reader: BatchReader, transform: ErrorOf) -> None:
        self._reader, self._transform = reader, transform

    @property
    def waited_seconds(self) -> float:
        return self._reader.waited_seconds

    def next(self) -> Tensor | None:
        rows = self._reader.next()
        return None if rows is None else self._transform(rows)

    def close(self) -> None:
        self._reader.close()
