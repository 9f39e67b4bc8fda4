"""The number format of a language model, where `model.dtype` is 'auto': its own where that is fast, else float32.

What is fast follows from the device and the CPU's flags. Nothing is timed, so a machine always decides the same.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from raysae.config import ModelConfig
from raysae.lm.facts import ModelFacts

CPU_FLAGS = {"amx_bf16": "bfloat16", "amx_fp16": "float16"}  # As Linux names them. Other systems' CPUs take float32.


def fast_formats(gpu: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The formats of 16 bits that this machine multiplies faster than float32, on its GPU or its CPU.

    Args:
        gpu: whether the model is to run on a GPU. A machine without one answers for its CPU.
        cpuinfo: the file in which Linux tells the CPU's flags.
    """
    if gpu:
        import torch

        if torch.cuda.is_available():
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return frozenset({"float16", "bfloat16"} if bfloat16 else {"float16"})
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return frozenset(name for flag, name in CPU_FLAGS.items() if flag in flags)


def number_format(config: ModelConfig, facts: ModelFacts, fast: Collection[str]) -> str:
    """The number format of the model that `config` names, on a machine on which `fast` formats are fast."""
    if config.dtype != "auto":
        return config.dtype
    return facts.dtype if config.name != "embedded" and facts.dtype in fast else "float32"
