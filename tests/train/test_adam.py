"""The bank's Adam equals torch's fused Adam bit for bit."""

import subprocess
import sys

import torch

from raysae.train.adam import Adam


def test_it_is_torchs_fused_adam_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 16), (40,), (16,))
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    adam, reference = Adam(ours, 0.9, 0.99), torch.optim.Adam(theirs, lr=1.0, betas=(0.9, 0.99), fused=True)
    for step in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        reference.param_groups[0]["lr"] = 1e-3 / (step + 1)
        adam.step(1e-3 / (step + 1))
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert adam.state[mine].keys() == reference.state[other].keys()
        for key, value in reference.state[other].items():
            assert torch.equal(adam.state[mine][key], value)
            assert adam.state[mine][key].dtype == value.dtype


def test_training_does_without_torchs_compiler():
    program = """
import sys, torch
from raysae.config import SAEConfig, TrainConfig
from raysae.train.bank import Bank
bank = Bank(8, TrainConfig(tokens=64, batch=32))
sae = SAEConfig(architecture="topk", width=16, k=2, hook_point="resid_post.0", learning_rate=1e-3)
rows = torch.randn(32, 8)
bank.add(sae.name, sae).initialise(rows)
bank.step(rows, 0)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
