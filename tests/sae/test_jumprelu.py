"""What is JumpReLU's own: the paper's units, and a coefficient that lowers L0."""

import itertools
import math

import pytest
import torch

from raysae.config import SAEConfig, SweepConfig, TrainConfig
from raysae.sae.base import StepInfo
from raysae.train.bank import Bank, Member
from tests.sae import naive
from tests.sae.conftest import make
from tests.sae.planted import Planted

EPSILON, LAMBDA = 1e-3, 6e-3  # In the paper's units, where the mean of ‖x‖² is 1


def test_the_loss_is_d_times_the_papers():
    """Rows, biases and thresholds of the paper's SAE are ours divided by √d. Its loss is ours divided by d."""
    d, generator = 20, torch.Generator().manual_seed(0)
    sae = make("jumprelu", d, 70, sparsity=LAMBDA).double()
    x = torch.randn(20_000, d, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        sae.log_threshold.uniform_(-1, 1, generator=generator)
    sae.after_step()
    small = {name: p.detach().clone() for name, p in sae.named_parameters()}
    for name in ("b_enc", "b_dec"):
        small[name] /= math.sqrt(d)
    small["log_threshold"] -= math.log(math.sqrt(d))
    paper = {name: tensor.requires_grad_() for name, tensor in small.items()}
    loss = naive.jumprelu(x / math.sqrt(d), **paper, bandwidth=EPSILON, sparsity=LAMBDA)
    loss.backward()
    ours = sae.loss_and_grads(x, x, StepInfo())["loss"]
    torch.testing.assert_close(ours, d * loss.detach(), rtol=1e-12, atol=0)
    for name, parameter in sae.named_parameters():
        unit = math.sqrt(d) if name.startswith("b_") else d
        torch.testing.assert_close(parameter.grad, unit * paper[name].grad, rtol=1e-9, atol=1e-9, msg=name)
    assert paper["log_threshold"].grad.count_nonzero() > 50, "no row lies in most windows"


def test_a_member_takes_its_architectures_beta1_unless_one_is_set():
    def beta1(architecture: str, **train) -> float:
        config = make(architecture, 8, 30).config
        return Member("a", config, 8, TrainConfig(**train)).adam.beta1

    assert (beta1("jumprelu"), beta1("topk")) == (0.0, 0.9)
    assert (beta1("jumprelu", beta1=0.5), beta1("topk", beta1=0.5)) == (0.5, 0.5)
    assert make("jumprelu", 16, 30).bandwidth == pytest.approx(0.004)
    assert make("jumprelu", 16, 30, bandwidth=0.03).bandwidth == 0.03


def test_a_study_of_the_earlier_unit_keeps_its_range_and_its_loss():
    sweep = {"architectures": ["jumprelu", "relu"], "hook_points": ["resid_post.0"], "widths": [64]}
    before = SweepConfig(**sweep, train={"jumprelu_unit": "sum"}).saes()
    assert [sae.sparsity for sae in before] == [0.03, 0.3, 3.0, 0.3, 1.0, 3.0]
    x, losses = torch.randn(50, 16), []
    for unit, sparsity in (("norm", 0.01), ("sum", 0.16)):
        sae = make("jumprelu", 16, 40, sparsity=sparsity, jumprelu_unit=unit)
        losses.append(sae.loss_and_grads(x, x, StepInfo())["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.timeout(300)
def test_l0_falls_as_the_coefficient_grows_even_in_a_short_run():
    """From far below the default range to far above. Differences under 2 % are ties."""
    planted, train = Planted(d=64, n=128, active=6, offset=0.5), TrainConfig(tokens=200 * 512, batch=512)
    rows, held_out = planted.rows(train.tokens), planted.rows(8192)
    bank = Bank(64, train)
    for sparsity in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0):
        config = SAEConfig(
            architecture="jumprelu", hook_point="resid_post.0", width=256, learning_rate=1e-3, sparsity=sparsity
        )
        bank.add(config.name, config)
    bank.initialise(list(bank.members.values()), rows[:8192])
    for row in range(0, train.tokens, train.batch):
        bank.step(rows[row : row + train.batch], row)
    l0 = [(member.sae.folded().encode(held_out) > 0).sum(1).float().mean().item() for member in bank.members.values()]
    assert all(later <= 1.02 * earlier for earlier, later in itertools.pairwise(l0)), l0
    assert l0[-1] < 0.8 * l0[0]
