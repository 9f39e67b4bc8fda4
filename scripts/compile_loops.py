"""Compiles the loops of raysae/kernels for this CPU, and keeps them for later processes.

    python scripts/compile_loops.py

`make` runs it after an installation. Without it, the first sweep compiles them for some seconds before its first step.
It trains every architecture for a few steps on random rows, with dead latents, and evaluates. `raysae.kernels.compiled`
says where the code is kept.
"""

from __future__ import annotations

import torch

from raysae.config import SAEConfig, TrainConfig
from raysae.sae.architectures import ARCHITECTURES
from raysae.train.bank import Bank
from raysae.train.evaluation import reconstruction_metrics

D, BATCH, WIDTHS = 256, 1024, (512, 4096)  # Narrow and wide SAEs find their largest latents in different ways


def main() -> None:
    rows = torch.randn(BATCH, D, generator=torch.Generator().manual_seed(0))
    train = TrainConfig(batch=BATCH, tokens=3 * BATCH)
    for architecture in ARCHITECTURES:
        bank = Bank(D, train)
        for width in WIDTHS:
            sparsity = {"k": 16} if architecture in ("topk", "batchtopk") else {"sparsity": 1e-3}
            sae = SAEConfig(
                architecture=architecture, width=width, hook_point="resid_post.0", learning_rate=1e-3, **sparsity
            )
            bank.add(sae.name, sae)
        bank.initialise(list(bank.members.values()), rows)
        for step in range(train.steps):
            for member in bank.members.values():
                member.quiet[::2] += train.tokens * step  # These count as dead after the first step
            bank.step(rows, step * BATCH)
        for member in bank.members.values():
            reconstruction_metrics(member.sae.folded(), [rows])


if __name__ == "__main__":
    main()
