"""p-annealing of relu and tied: the exponent's path, the rescaled coefficient, gradients, and the state it needs."""

import pytest
import torch

from raysae.analysis.instruments.dictionaries import fraction_above
from raysae.config import SAEConfig, TrainConfig
from raysae.sae import relu
from raysae.sae.base import StepInfo
from raysae.train.bank import Member
from tests.sae.conftest import make
from tests.sae.planted import Planted, train
from tests.sae.test_gradients import D, N, check

KINDS = ["relu", "tied"]


def stepped(sae, steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """p and the penalty after each of `steps` passes over one batch, without an update of weights."""
    x = torch.randn(40, sae.d_in, generator=torch.Generator().manual_seed(seed)).double()
    seen = []
    for step in range(steps):
        terms = sae.loss_and_grads(x, x, StepInfo(progress=step / steps))
        seen.append((float(sae.stage[0]), terms["penalty"].item()))
    return seen


@pytest.mark.parametrize("architecture", KINDS)
def test_p_falls_in_equal_steps_and_the_penalty_stays(architecture):
    sae = make(architecture, 12, 30, p_end=0.2, sparsity_warmup=0.1, decay=0.2, tokens=100 * 1024).double()
    seen = stepped(sae, 100)
    exponents = list(dict.fromkeys(round(p, 6) for p, _ in seen))
    assert exponents == pytest.approx([1 - 0.08 * level for level in range(relu.LEVELS + 1)])
    assert seen[10][0] == 1, "p stays 1 while the coefficient warms up"
    assert seen[80][0] == pytest.approx(0.2), "p is at its end where the learning rate begins to fall"
    assert [penalty for _, penalty in seen] == pytest.approx([seen[0][1]] * 100), (
        "on equal codes it is rescaled exactly"
    )
    assert float(sae.stage[1]) != pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("progress", [0.2, 0.5, 0.95])
def test_gradients_equal_autograd_at_any_stage(architecture, progress):
    """`check` takes its steps at progress 0, which leaves the stage that was reached before."""
    sae = make(architecture, D, N, p_end=0.2, sparsity_warmup=0.1, decay=0.2, tokens=100 * 1024).double()
    x = torch.randn(40, D).double()
    for step in range(int(100 * progress) + 1):
        sae.loss_and_grads(x, x, StepInfo(progress=step / 100))
    assert float(sae.stage[0]) < 1
    check(sae, dead=None)


@pytest.mark.parametrize("architecture", KINDS)
def test_p_end_of_1_is_the_plain_penalty(architecture):
    plain = make(architecture, 12, 30)
    assert not plain.annealed
    assert not {"stage", "penalties"} & set(plain.state_dict())


@pytest.mark.parametrize("architecture", KINDS)
def test_a_checkpoint_keeps_the_stage(architecture):
    """A member that goes on from its saved state takes the same steps, bit for bit, over a change of p."""
    knobs = TrainConfig(batch=32, tokens=40 * 32, p_end=0.3, sparsity_warmup=0.1)
    config = SAEConfig(architecture=architecture, hook_point="h.0", width=30, sparsity=0.01, learning_rate=1e-2)
    planted = Planted(d=12, n=20)
    rows = [planted.rows(32) for _ in range(40)]
    undisturbed = Member("a", config, 12, knobs)
    undisturbed.initialise(torch.cat(rows[:4]))
    for number, x in enumerate(rows):
        if number == 17:
            tensors, scalars = undisturbed.state()
            kept = {name: tensor.clone() for name, tensor in tensors.items()}, dict(scalars)
        undisturbed.step(x / undisturbed.scale, x.sum(0).double())
    resumed = Member("a", config, 12, knobs)
    resumed.load(kept)
    assert 0.3 < float(resumed.sae.stage[0]) < 1
    for x in rows[17:]:
        resumed.step(x / resumed.scale, x.sum(0).double())
    for name, tensor in undisturbed.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name
    assert float(resumed.sae.stage[0]) == pytest.approx(0.3)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_batch_without_active_latents_or_a_skipped_one_delays_p(architecture):
    sae = make(architecture, 12, 30, p_end=0.2, sparsity_warmup=0.1, decay=0.2, tokens=100 * 1024).double()
    x = torch.randn(40, 12).double()
    bias = sae.b_enc.detach().clone()
    for step in (s for s in range(100) if s not in range(30, 50)):  # Steps 30 to 49 are skipped
        with torch.no_grad():
            sae.b_enc.copy_(bias - 1e3 if step < 25 else bias)  # Nothing is active in the first steps
        terms = sae.loss_and_grads(x, x, StepInfo(progress=step / 100))
        assert terms["loss"].isfinite(), step
        if step < 25:
            assert float(sae.stage[0]) == 1
    assert float(sae.stage[0]) == pytest.approx(0.2)
    assert terms["penalty"].item() == pytest.approx(_l1(sae, x))


def _l1(sae, x: torch.Tensor) -> float:
    """Σ of the codes of a batch: the penalty that rescaling keeps."""
    with torch.no_grad():
        return sae.encode(x).sum().item() / len(x)


def test_a_short_run_reaches_p_end():
    sae = make("relu", 12, 30, p_end=0.2, tokens=8 * 1024).double()
    assert stepped(sae, 8)[-1][0] == pytest.approx(0.2)


def test_no_room_between_warm_up_and_decay():
    with pytest.raises(ValueError, match=r"p_end is 0.2, but sparsity_warmup 0.8 and decay 0.2 leave no steps"):
        TrainConfig(p_end=0.2, sparsity_warmup=0.8, decay=0.2)
    TrainConfig(sparsity_warmup=0.8, decay=0.2)


@pytest.mark.timeout(300)
def test_an_annealed_sae_recovers_a_planted_dictionary():
    planted = Planted(offset=0.5)
    sae = make("relu", 32, 96, sparsity=1.0, seed=1, p_end=0.2, tokens=2000 * 1024)
    train(sae, planted, steps=2000, learning_rate=1e-2)
    assert float(sae.stage[0]) == pytest.approx(0.2)
    assert fraction_above(planted.features, sae.folded().decoder()) == 1
