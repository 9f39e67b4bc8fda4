"""A bank trains its SAEs independently: company, skipped steps, clipping, failures."""

import pytest
import torch

from raysae.train.bank import Bank, Member
from raysae.train.checkpoint import Checkpoint, CheckpointStore
from raysae.train.evaluation import reconstruction_metrics
from tests.train.synthetic import ARCHITECTURES, TRAIN, D, config, rows

BATCH = TRAIN.batch
DATA = rows(TRAIN.steps * BATCH)


def bank_of(*configs) -> Bank:
    bank = Bank(D, TRAIN)
    for c in configs:
        bank.add(c.name, c).initialise(DATA[:512])
    return bank


def train(bank: Bank, first: int = 0, steps: int = TRAIN.steps) -> None:
    for step in range(first, first + steps):
        bank.step(DATA[step * BATCH : (step + 1) * BATCH], step * BATCH)


def assert_same_state(one: Member, other: Member) -> None:
    (tensors, scalars), (tensors_, scalars_) = one.state(), other.state()
    assert scalars == scalars_
    assert tensors.keys() == tensors_.keys()
    for name in tensors:
        assert torch.equal(tensors[name], tensors_[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alone_and_in_company_give_equal_bits(architecture):
    wanted = config(architecture)
    alone = bank_of(wanted)
    company = bank_of(config("topk", 32), config("tied", 48), wanted, *(config(a, 40, seed=1) for a in ARCHITECTURES))
    train(alone)
    train(company)
    assert alone.members[wanted.name].finished
    assert_same_state(alone.members[wanted.name], company.members[wanted.name])


def test_a_skipped_step_counts_and_changes_nothing(tmp_path):
    wanted = config()
    bank = bank_of(wanted)
    member = bank.members[wanted.name]
    train(bank, 0, 5)
    tensors = {name: tensor.clone() for name, tensor in member.state()[0].items()}
    mean = member.mean
    bank.skip(5 * BATCH)
    bank.skip(6 * BATCH)
    bank.skip(5 * BATCH)  # No member is at this row any more
    assert member.next_row == 7 * BATCH
    assert all(torch.equal(tensors[name], tensor) for name, tensor in member.state()[0].items())
    assert torch.equal(member.mean, mean)
    other = Bank(D, TRAIN)
    again = other.add(wanted.name, wanted, member.state())
    for each in (bank, other):
        train(each, 7, TRAIN.steps - 7)
    assert_same_state(member, again)
    trained = torch.cat([DATA[: 5 * BATCH], DATA[7 * BATCH :]]).double().mean(0)
    torch.testing.assert_close(again.mean, trained, rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_loaded_and_continued_equals_undisturbed(architecture, tmp_path):
    wanted = config(architecture)
    undisturbed = bank_of(wanted)
    train(undisturbed)
    first = bank_of(wanted)
    train(first, 0, 7)
    store = CheckpointStore(str(tmp_path))
    tensors, scalars = first.members[wanted.name].state()
    store.save(Checkpoint(tensors, scalars, {}))
    loaded = store.load({})
    second = Bank(D, TRAIN)
    member = second.add(wanted.name, wanted, (loaded.tensors, loaded.header))
    assert member.next_row == 7 * BATCH
    train(second, 7, TRAIN.steps - 7)
    assert_same_state(undisturbed.members[wanted.name], member)


def test_state_before_the_first_step_comes_back():
    wanted = config()
    fresh = bank_of(wanted)
    copy = Bank(D, TRAIN)
    copy.add(wanted.name, wanted, fresh.members[wanted.name].state())
    train(fresh)
    train(copy)
    assert_same_state(fresh.members[wanted.name], copy.members[wanted.name])


def test_members_train_only_on_their_row():
    a, b = config(seed=0), config(seed=1)
    bank = bank_of(a, b)
    bank.members[b.name].steps_done = 3
    train(bank, 0, 3)
    assert bank.members[a.name].steps_done == 3
    assert bank.members[b.name].steps_done == 3
    assert bank.members[b.name].summed == 0
    assert {member.name for member in bank.step(DATA[3 * BATCH : 4 * BATCH], 3 * BATCH)} == {a.name, b.name}


def test_loss_falls():
    for architecture in ARCHITECTURES:
        level = ARCHITECTURES[architecture].pick(k=4, sparsity=1e-4)
        wanted = config(architecture, **level)
        bank = bank_of(wanted)
        member = bank.members[wanted.name]
        train(bank, 0, 2)
        before = member.take_means()["squared_error"]
        train(bank, 2, TRAIN.steps - 2)
        assert member.take_means()["squared_error"] < before, architecture


def test_gradients_are_clipped_to_the_global_norm_of_their_own_sae():
    seen = []
    a, b = config(seed=0), config(seed=1)
    tight = TRAIN.model_copy(update={"clip_norm": 1e-3})
    bank = Bank(D, tight)
    for c in (a, b):
        bank.add(c.name, c).initialise(DATA[:512])
    for member in bank.members.values():
        step = member.adam.step
        member.adam.step = lambda rate, member=member, step=step: (
            seen.append(float(member._gradient_norms()[0])),
            step(rate),
        )
    train(bank, 0, 3)
    assert seen == pytest.approx([1e-3 * D**0.5] * 6, rel=1e-4)
    assert bank.members[a.name].sums["gradient_norm"] > 3e-3 * D**0.5  # Reports give the norm before clipping


def test_small_gradients_are_left_as_they_are():
    wanted = config()
    loose, looser = (Bank(D, TRAIN.model_copy(update={"clip_norm": norm})) for norm in (1e6, 1e9))
    for bank in (loose, looser):
        bank.add(wanted.name, wanted).initialise(DATA[:512])
        train(bank)
    assert_same_state(loose.members[wanted.name], looser.members[wanted.name])


def test_dead_latents_are_those_quiet_for_a_tenth_of_the_run():
    wanted = config("topk")
    bank = bank_of(wanted)
    member = bank.members[wanted.name]
    assert member.dead_after == TRAIN.tokens // 10  # Two batches
    with torch.no_grad():
        member.sae.b_enc[5] = -1e6
    told = []
    inner = member.sae.loss_and_grads
    member.sae.loss_and_grads = lambda x, target, step: (told.append(bool(step.dead[5])), inner(x, target, step))[1]
    train(bank, 0, 4)
    assert told == [False, False, True, True]
    assert member.quiet[5] == 4 * BATCH
    assert int(member.quiet.min()) == 0


def test_sparsity_warms_up_only_through_the_schedule():
    wanted = config("relu")
    bank = bank_of(wanted)
    member = bank.members[wanted.name]
    factors = []
    inner = member.sae.loss_and_grads
    member.sae.loss_and_grads = lambda x, target, step: (factors.append(step.sparsity_factor), inner(x, target, step))[
        1
    ]
    train(bank, 0, 4)
    assert factors == [0, 0.5, 1, 1]  # sparsity_warmup is 0.1 of 20 steps


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_stop_every_member_with_its_name_step_and_row(bad):
    wanted = config()
    bank = bank_of(wanted)
    train(bank, 0, 3)
    x = DATA[3 * BATCH : 4 * BATCH].clone()
    x[10, 2] = bad
    (member,) = bank.step(x, 3 * BATCH)
    assert member.failed == f"{wanted.name}: activation is {bad} at step 3 (row {3 * BATCH + 10})"
    assert bank.at(3 * BATCH) == []


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_bad_loss_or_gradient_stops_that_sae_alone(what):
    good, bad = config(seed=0), config(seed=1)
    bank, alone = bank_of(good, bad), bank_of(good)
    member = bank.members[bad.name]
    inner = member.sae.loss_and_grads

    def broken(x, target, step):
        terms = inner(x, target, step)
        if member.steps_done == 5:
            (terms["loss"] if what == "loss" else member.sae.W_enc.grad).fill_(float("nan"))
        return terms

    member.sae.loss_and_grads = broken
    train(bank)
    train(alone)
    assert member.failed == f"{bad.name}: {what} is nan at step 5 (rows {5 * BATCH} to {6 * BATCH - 1})"
    assert member.steps_done == 5
    assert all(bool(torch.isfinite(tensor).all()) for tensor in member.state()[0].values())
    assert_same_state(bank.members[good.name], alone.members[good.name])


def spoilt(data: torch.Tensor, share: float = 0.003) -> torch.Tensor:
    """`data` (b, d) in which some rows have a hundred times their norm."""
    planted = torch.rand(len(data), generator=torch.Generator().manual_seed(2)) < share
    return torch.where(planted[:, None], 100 * data, data)


def far_off(data: torch.Tensor) -> torch.Tensor:
    """`data` (b, d) in which 0.3 % of the rows have a hundred times their norm, all of them in one direction."""
    direction = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(5)), dim=0)
    moved = spoilt(data).norm(dim=1, keepdim=True)
    return torch.where(moved > 50 * data.norm(dim=1, keepdim=True), moved * direction, data)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"tied"}))
@pytest.mark.parametrize("decoder_bias", ["mean", "median"])
def test_a_few_rows_of_a_hundred_times_the_norm_do_not_move_the_start(architecture, decoder_bias):
    train = TRAIN.model_copy(update={"decoder_bias": decoder_bias})
    started = []
    for first in (rows(16_384), spoilt(rows(16_384))):
        bank = Bank(D, train)
        member = bank.add("a", config(architecture))
        bank.initialise([member], first)
        started.append(member)
    clean, outliers = started
    assert outliers.scale == pytest.approx(clean.scale, rel=2e-3)
    assert torch.allclose(outliers.sae.b_dec, clean.sae.b_dec, atol=5e-3)
    assert clean.scale == pytest.approx(float(rows(16_384).double().square().mean().sqrt())), (
        "of all rows, if all count"
    )


def test_relu_learns_the_other_rows_beside_outliers():
    """With the scale of all rows, 5.5 times as large, the FVU on the other rows is 0.99."""
    train = TRAIN.model_copy(update={"tokens": 256 * 300, "batch": 256})
    data, held_out = rows(train.tokens), rows(5000, seed=9)
    found = []
    for stream, test in ((data, held_out), (far_off(data), far_off(held_out))):
        bank = Bank(D, train)
        member = bank.add("a", config("relu", width=96, sparsity=1.0))
        bank.initialise([member], stream[:16_384])
        for row in range(0, train.tokens, 256):
            bank.step(stream[row : row + 256], row)
        found.append(reconstruction_metrics(member.sae.folded(), [test]))
    clean, outliers = found
    assert outliers.fvu < 0.01, "what is reported of all rows"
    assert clean.fvu == clean.fvu_inliers < 0.5
    assert outliers.fvu_inliers == pytest.approx(clean.fvu, rel=0.25)


@pytest.mark.parametrize(("row", "words"), [(torch.zeros(D), "all zero"), (torch.arange(D) / 7 + 1, "all the same")])
def test_activations_that_are_alike_fail_with_their_cause(row, words):
    bank = Bank(D, TRAIN)
    members = [bank.add(str(seed), config(seed=seed)) for seed in (0, 1)]
    bank.initialise(members, row.repeat(512, 1) * (1 + 1e-7 * torch.randn(512, 1, generator=torch.Generator())))
    for member in members:
        assert f"the first 512 activations at resid_post.0 are {words}, so there is nothing to learn" in member.failed
    assert not bank.at(0)
