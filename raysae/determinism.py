"""What bits depend on beside the configuration, and how CUDA is made to repeat them. See docs/determinism.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from raysae.config import TrainConfig, UserError

Scalar = int | float | str | bool | None
Seen = Mapping[str, list[Scalar]]  # Fact → its values so far, oldest first. Producers that differ give more than one.


def device_facts(device: torch.device | str) -> dict[str, Scalar]:
    """torch's version, the kind of device and the settings of its arithmetic, for the calling thread.

    A CPU's kind is its model and the vector instructions of PyTorch's own kernels. MKL and oneDNN choose their own by
    the model.

    A GPU's results do not depend on the number of CPU threads, nor a CPU's on TF32. Each leaves out the other's fact.
    """
    device = torch.device(device)
    facts: dict[str, Scalar] = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        matmul = torch.backends.cuda.matmul
        arithmetic = {"tf32": matmul.allow_tf32, "bf16_reduction": matmul.allow_bf16_reduced_precision_reduction}
        return facts | {"device": torch.cuda.get_device_name(device), **arithmetic}
    kind = f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
    return facts | {"device": kind, "threads": torch.get_num_threads()}


def precision_of_training(train: TrainConfig, device: torch.device | str) -> torch.dtype | None:
    """`SAE.precision` of training on this device.

    Raises:
        UserError: bfloat16 was asked for, but the device is no GPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    if train.precision == "bfloat16" and not on_gpu:
        raise UserError(
            "train.precision is bfloat16, which is for GPUs, and this trainer has none. Leave it unset, or set float32."
        )
    wanted = train.precision or (
        "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    )
    return torch.bfloat16 if wanted == "bfloat16" else None


@cache
def cpu_model(described: Path = Path("/proc/cpuinfo")) -> str:
    """Name, family and model number of the CPU, as in "AMD EPYC (25/1)".

    The numbers matter because virtual machines give several generations one name. Only Linux on x86 tells them.
    Elsewhere it is what Python knows of the CPU.
    """
    pairs = (
        (line.partition(":") for line in described.read_text().split("\n\n")[0].splitlines())
        if described.exists()
        else ()
    )
    first = {key.strip(): value.strip() for key, _, value in pairs}  # Facts of the first core
    if "model name" in first:
        return f"{first['model name']} ({first.get('cpu family')}/{first.get('model')})"
    return platform.processor() or platform.machine()


def be_deterministic() -> None:
    """Make CUDA operations give the same bits every time. CPU operations do so by themselves.

    Call it before the first CUDA operation.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True, warn_only=True)  # An operation without a deterministic form says so once
    torch.utils.deterministic.fill_uninitialized_memory = False  # Nothing here reads what it has not written


def together(before: Seen, more: Seen) -> Seen:
    """`before` with the values of `more`. Returns the same object where nothing is new."""
    merged = {key: list(dict.fromkeys([*before.get(key, []), *more.get(key, [])])) for key in {**before, **more}}
    return before if merged == before else merged


def told(seen: Seen) -> dict[str, Scalar]:
    """One value per fact, under the names of the fingerprint.

    An example is `{"producer.threads": 2, "producer.device": "NVIDIA A100 and NVIDIA H100"}`.
    """
    return {
        f"producer.{key}": values[0] if len(values) == 1 else " and ".join(map(str, values))
        for key, values in seen.items()
    }
