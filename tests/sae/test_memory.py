"""Memory of a training step beyond weights and gradients, at a great width. Each test measures a fresh process."""

import subprocess
import sys

import pytest

STEP = """
import resource, sys, torch
from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig
from raysae.sae.architectures import build
from raysae.sae.base import SAE, StepInfo
from raysae.kernels.buffers import Workspace
from raysae.kernels.screening import top_pre_activations
from raysae.kernels.selection import top_k
architecture, width, d, batch = sys.argv[1], *map(int, sys.argv[2:5])
level = ARCHITECTURES[architecture].pick(k=32, sparsity=1.0)
config = SAEConfig(architecture=architecture, hook_point="resid_post.2", width=width, learning_rate=1e-3, **level)
sae = build(config, d, TrainConfig())
if len(sys.argv) > 5:  # The threshold sets how many latents are active
    sae.threshold.fill_(float(sys.argv[5]))
for parameter in sae.parameters():
    parameter.grad = torch.ones_like(parameter)
x = torch.randn(batch, d)
# Run each kind of work once. Libraries and compiler get their own buffers before the measurement.
(x[:64] @ x[:64].T).sum()
top_k(x[:64], 1)
top_pre_activations(torch.randn(64, 8), torch.randn(64, 8), torch.zeros(64), 2, Workspace())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sae.loss_and_grads(x, x, StepInfo(dead=torch.arange(width) % 2 == 0))
sae.after_grads()
sae.after_step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.timeout(300)
def test_memory_of_a_list_is_bounded():
    """About 3 % of latents are active, nearly as many as a list may hold.

    Pre-activations have a standard deviation of 1, so a threshold of 1.87 gives that share.
    """
    out = subprocess.run(
        [sys.executable, "-c", STEP, "jumprelu", "131072", "32", "640", "1.87"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(out.stdout) < 256


@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize(
    "size",
    [(131_072, 32, 640), (32_768, 2_304, 640), (65_536, 1_024, 640)],
    ids=["codes of 320 MiB", "weights of 288 MiB", "weights of 256 MiB, which may be rounded to integers"],
)
def test_step_memory_is_bounded(architecture, size):
    """No temporary is as large as a dense code matrix or a weight matrix."""
    out = subprocess.run(
        [sys.executable, "-c", STEP, architecture, *map(str, size)], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < 256
