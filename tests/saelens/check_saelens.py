"""Compares saved autoencoders with SAELens itself.

SAELens has its own environment, so there are two commands.

python check_saelens.py write FOLDER      Needs raysae. Saves an SAE of each architecture, activations, reconstructions.
python check_saelens.py compare FOLDER    Needs sae_lens. Loads each SAE, reconstructs and compares.

`compare` exits with 1 if a reconstruction differs by more than 1e-5 of its largest value.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TOLERANCE = 1e-5  # Relative to the largest value of a reconstruction
D, WIDTH = 48, 192


def write(folder: Path) -> None:
    import torch

    from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig
    from raysae.sae.architectures import build
    from raysae.sae.base import StepInfo
    from raysae.sae.files import load_sae, save_sae

    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(2048, D, generator=generator) + 10 * torch.randn(D, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "x.npy", x.numpy())
    for architecture, facts in ARCHITECTURES.items():
        level = facts.pick(k=8, sparsity={"tied": 0.05, "jumprelu": 0.01}.get(architecture, 0.5))
        config = SAEConfig(
            architecture=architecture, hook_point="resid_post.2", width=WIDTH, learning_rate=1e-3, **level
        )
        sae = build(config, D, TrainConfig(bandwidth=0.3))
        sae.initialise(x)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(30):
            sae.loss_and_grads(scaled := x / sae.scale, scaled, StepInfo())
            sae.after_grads()
            optimizer.step()
            sae.after_step()
        sae.calibrate(x / sae.scale)
        save_sae(sae, folder / architecture, {"model_name": "embedded", "context_size": 256, "prepend_bos": True})
        np.save(folder / f"{architecture}.npy", load_sae(folder / architecture)(x).numpy())


def compare(folder: Path) -> None:
    import sae_lens
    import torch

    x = torch.from_numpy(np.load(folder / "x.npy"))
    worst = {}
    for architecture in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        sae = sae_lens.SAE.load_from_disk(folder / architecture, device="cpu")
        with torch.no_grad():
            theirs = sae(x).numpy()
            active = (sae.encode(x) > 0).sum(1).float().mean().item()
        ours = np.load(folder / f"{architecture}.npy")
        worst[architecture] = float(np.abs(theirs - ours).max() / np.abs(ours).max())
        metadata = sae.cfg.metadata
        assert (metadata.model_name, metadata.hook_name, metadata.context_size) == (
            "embedded",
            "blocks.2.hook_resid_post",
            256,
        ), metadata
        print(
            f"{architecture:10} loads as {type(sae).__name__:12} {active:6.2f} active latents   "
            f"largest difference {worst[architecture]:.1e}"
        )
    equal = sum(difference <= TOLERANCE for difference in worst.values())
    print(f"sae_lens {sae_lens.__version__}: {equal} of {len(worst)} architectures reconstruct equally, to {TOLERANCE}")
    if equal < len(worst):
        sys.exit(1)


if __name__ == "__main__":
    command, folder = sys.argv[1:]
    {"write": write, "compare": compare}[command](Path(folder))
