"""Compiles the loops of raysae/kernels for this CPU and keeps them where the next process looks for them.

    python scripts/compile_loops.py

See `raysae.kernels.compiled`. `make` runs it after an installation. Otherwise the first sweep would compile the loops,
for some seconds before its first step. It takes a few training steps of every architecture on random rows, with dead
latents too, and evaluates.
"""

from __future__ import annotations

import torch

from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig
from raysae.train.bank import Bank
from raysae.train.evaluation import reconstruction_metrics

D, BATCH, WIDTHS = 256, 1024, (512, 4096)  # Narrow and wide SAEs find their largest latents in different ways


def main() -> None:
    rows = torch.randn(BATCH, D, generator=torch.Generator().manual_seed(0))
    train = TrainConfig(batch=BATCH, tokens=3 * BATCH)
    for architecture, facts in ARCHITECTURES.items():
        bank = Bank(D, train)
        for width in WIDTHS:
            sae = SAEConfig(
                architecture=architecture,
                width=width,
                hook_point="resid_post.0",
                learning_rate=1e-3,
                **facts.pick(k=16, sparsity=1e-3),
            )
            bank.add(sae.name, sae)
        bank.initialise(list(bank.members.values()), rows)
        for step in range(train.steps):
            for member in bank.members.values():
                member.quiet[::2] += train.tokens * step  # Half of the latents count as dead from the second step on
            bank.step(rows, step * BATCH)
        for member in bank.members.values():
            reconstruction_metrics(member.sae.folded(), [rows])


if __name__ == "__main__":
    main()
