"""BatchTopK's threshold of inference: k latents per held-out row, however often the SAE is evaluated on its way."""

import pytest
import torch

from raysae.config import EvaluationConfig, SweepConfig, TextConfig, TrainConfig
from raysae.lm.model import LanguageModel
from raysae.stream.shard import ShardMaker
from raysae.study.plan import plan
from raysae.train.bank import EVERY, Bank
from raysae.train.evaluation import reconstruction_metrics
from tests.train.synthetic import TRAIN, D, config, rows
from tests.train.test_loop import KilledError, assert_same_sae, killed_at, loop_on, trained

BY_BATCH = ["batchtopk", "matryoshka"]


@pytest.mark.parametrize("architecture", BY_BATCH)
def test_evaluations_change_no_bit_of_the_final_sae(architecture, tmp_path):
    wanted = config(architecture)
    for reports in (1, 20):
        trained(tmp_path / str(reports), wanted, train=TRAIN.model_copy(update={"reports": reports}))
    assert_same_sae(tmp_path / "1", tmp_path / "20", wanted.name)


@pytest.mark.parametrize("architecture", BY_BATCH)
@pytest.mark.parametrize("row", [64, 640, 1216])
def test_killed_and_restarted_has_the_threshold_of_an_undisturbed_run(architecture, row, tmp_path):
    wanted = config(architecture)
    trained(tmp_path / "whole", wanted)
    loop = loop_on(tmp_path / "broken", killed_at(row))
    loop.add(wanted)
    with pytest.raises(KilledError):
        loop.run()
    trained(tmp_path / "broken", wanted)
    assert_same_sae(tmp_path / "whole", tmp_path / "broken", wanted.name)


def test_the_rows_of_the_calibration_are_the_last_by_number(monkeypatch):
    monkeypatch.setattr("raysae.sae.batchtopk.BatchTopK.CALIBRATION_ROWS", 40)
    bank, wanted, data = Bank(D, TRAIN), config("batchtopk"), rows(TRAIN.tokens)
    member = bank.add("a", wanted)
    member.initialise(data[:512])
    for step in range(20):
        x = data[step * 64 : step * 64 + 64].clone()
        if step == 18:
            bank.skip(step * 64)
        else:
            bank.step(x, step * 64)
        x.zero_()  # As readers do, which reuse their buffers
        if step == 1:
            early = torch.cat([data[480:512], data[:128:EVERY]])
            assert torch.equal(member.state()[0]["recent"], early)
    last = torch.cat([data[: 18 * 64 : EVERY], data[19 * 64 :: EVERY]])[-40:]
    assert torch.equal(member.state()[0]["recent"], last)
    member.calibrate()
    active = (member.sae.encode(last / member.sae.scale) > 0).sum().item()
    assert active == 4 * 40


def test_architectures_without_a_calibration_keep_no_rows():
    bank, wanted = Bank(D, TRAIN), config("topk")
    member = bank.add("a", wanted)
    member.initialise(rows(512))
    bank.step(rows(64), 0)
    assert "recent" not in member.state()[0]


@pytest.mark.timeout(600)
def test_l0_of_held_out_activations_is_k(activations):
    """On the embedded language model, after 100 and 200 steps. A threshold that lags behind gave a third of k."""
    seen, held_out = activations
    train = TrainConfig(tokens=200 * 512, batch=512)
    bank = Bank(seen.shape[1], train)
    for architecture, k in (("batchtopk", 8), ("batchtopk", 32), ("matryoshka", 16)):
        bank.add(architecture + str(k), config(architecture, 256, learning_rate=1e-3, k=k))
    bank.initialise(list(bank.members.values()), seen[:16_384])
    for row in range(0, train.tokens, train.batch):
        bank.step(seen[row : row + train.batch], row)
        if row + train.batch in (100 * 512, train.tokens):
            for name, member in bank.members.items():
                member.calibrate()
                found = reconstruction_metrics(member.sae.folded(), [held_out[:30_000]]).l0
                assert found == pytest.approx(member.config.k, rel=0.03), name


@pytest.fixture(scope="module")
def activations(tmp_path_factory) -> tuple[torch.Tensor, torch.Tensor]:
    """Two training shards and a held-out one at the middle layer of the embedded language model."""
    settled = plan(
        SweepConfig(
            text=TextConfig(max_documents=400, cache=str(tmp_path_factory.mktemp("text"))),
            train=TrainConfig(tokens=102_400),
            evaluation=EvaluationConfig(rows=50_000),
        )
    )
    lm, (hook,) = LanguageModel.load(settled.config.model), settled.hook_points

    def made(split: str, spec, shards: int) -> torch.Tensor:
        maker = ShardMaker(lm, settled.contexts[split], spec, [hook], 1e6)
        return torch.cat([torch.from_numpy(maker.make(shard)[1][hook][0]) for shard in range(shards)])

    return made("train", settled.training, 2), made("evaluation", settled.evaluation, 1)
