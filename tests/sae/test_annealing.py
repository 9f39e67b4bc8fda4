"""p-annealing of relu and tied: the exponent's path, the rescaled coefficient, gradients, and the state it needs."""

import pytest
import torch

from raysae.config import SAEConfig, TrainConfig
from raysae.sae import relu
from raysae.sae.base import StepInfo
from raysae.train.bank import Member
from tests.sae.conftest import make
from tests.sae.planted import Planted
from tests.sae.test_gradients import D, N, check

KINDS = ["relu", "tied"]


def stepped(sae, steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """p and the penalty after each of `steps` passes over one batch, without an update of weights."""
    x = torch.randn(40, sae.d_in, generator=torch.Generator().manual_seed(seed)).double()
    seen = []
    for step in range(steps):
        terms = sae.loss_and_grads(x, x, StepInfo(progress=step / steps))
        seen.append((float(sae.p), terms["penalty"].item()))
    return seen


@pytest.mark.parametrize("architecture", KINDS)
def test_p_falls_in_equal_steps_and_the_penalty_stays(architecture):
    sae = make(architecture, 12, 30, p_end=0.2, sparsity_warmup=0.1, decay=0.2).double()
    seen = stepped(sae, 100)
    exponents = list(dict.fromkeys(round(p, 6) for p, _ in seen))
    assert exponents == pytest.approx([1 - 0.08 * level for level in range(relu.LEVELS + 1)])
    assert seen[10][0] == 1, "p stays 1 while the coefficient warms up"
    assert seen[80][0] == pytest.approx(0.2), "p is at its end where the learning rate begins to fall"
    assert [penalty for _, penalty in seen] == pytest.approx([seen[0][1]] * 100), (
        "on equal codes it is rescaled exactly"
    )
    assert float(sae.rescale) != pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("progress", [0.2, 0.5, 0.95])
def test_gradients_equal_autograd_at_any_stage(architecture, progress):
    """`check` takes its steps at progress 0, which leaves the stage that was reached before."""
    sae = make(architecture, D, N, p_end=0.2, sparsity_warmup=0.1, decay=0.2).double()
    x = torch.randn(40, D).double()
    for step in range(int(100 * progress) + 1):
        sae.loss_and_grads(x, x, StepInfo(progress=step / 100))
    assert float(sae.p) < 1
    check(sae, dead=None)


@pytest.mark.parametrize("architecture", KINDS)
def test_p_end_of_1_is_the_plain_penalty(architecture):
    plain = make(architecture, 12, 30)
    assert not plain.annealed
    assert not {"p", "rescale", "penalties"} & set(plain.state_dict())


@pytest.mark.parametrize("architecture", KINDS)
def test_a_checkpoint_keeps_the_stage(architecture):
    """A member that goes on from its saved state takes the same steps, bit for bit, over a change of p."""
    train = TrainConfig(batch=32, tokens=40 * 32, p_end=0.3, sparsity_warmup=0.1)
    config = SAEConfig(architecture=architecture, hook_point="h.0", width=30, sparsity=0.01, learning_rate=1e-2)
    planted = Planted(d=12, n=20)
    rows = [planted.rows(32) for _ in range(40)]
    undisturbed = Member("a", config, 12, train)
    undisturbed.initialise(torch.cat(rows[:4]))
    for number, x in enumerate(rows):
        if number == 17:
            tensors, scalars = undisturbed.state()
            kept = {name: tensor.clone() for name, tensor in tensors.items()}, dict(scalars)
        undisturbed.step(x / undisturbed.scale, x.sum(0).double())
    resumed = Member("a", config, 12, train)
    resumed.load(kept)
    assert 0.3 < float(resumed.sae.p) < 1
    for x in rows[17:]:
        resumed.step(x / resumed.scale, x.sum(0).double())
    for name, tensor in undisturbed.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name
    assert float(resumed.sae.p) == pytest.approx(0.3)
