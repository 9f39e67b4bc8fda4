"""A sweep's steps on a GPU, one after another and without Ray, against the same on the CPU.

The steps are a shard, the training of SAEs on it, and their evaluation.
"""

import pytest
import torch

from raysae.config import ModelConfig, SAEConfig, TrainConfig
from raysae.determinism import be_deterministic
from raysae.lm.model import LanguageModel
from raysae.lm.patched_loss import downstream_metrics
from raysae.lm.tokenizer import load_tokenizer
from raysae.stream.blocks import as_tensor
from raysae.stream.shard import ShardMaker
from raysae.stream.spec import ActivationSpec
from raysae.text.contexts import Contexts
from raysae.train.bank import Bank
from raysae.train.evaluation import reconstruction_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
HOOK, LENGTH, SKIP = "resid_post.2", 128, 8


@pytest.fixture(scope="module")
def contexts(request) -> Contexts:
    """The first 256 contexts of this repository's tests, in the embedded model's tokens."""
    text = "\n".join(path.read_text() for path in sorted((request.config.rootpath / "tests").rglob("*.py")))
    tokens = torch.tensor(load_tokenizer(ModelConfig()).encode(text))[: 256 * LENGTH]
    return Contexts("tests", tokens.view(-1, LENGTH).to(torch.uint16).numpy())


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    be_deterministic()
    return {device: LanguageModel.load(ModelConfig(), device) for device in ("cpu", "cuda")}


def shard(lm: LanguageModel, contexts: Contexts) -> torch.Tensor:
    spec = ActivationSpec(
        model="m", text=contexts.digest, contexts=len(contexts), context_length=LENGTH, epochs=1, skip_positions=SKIP,
        dtype="float32", seed=0, shard_contexts=256, batch_contexts=32,
    )  # fmt: skip
    _, blocks = ShardMaker(lm, contexts, spec, [HOOK], 4).make(0)
    return torch.cat([as_tensor(block, "float32") for block in blocks[HOOK]])


def test_from_a_shard_to_an_evaluated_sae(models, contexts):
    rows = {device: shard(lm, contexts) for device, lm in models.items()}
    assert ((rows["cuda"] - rows["cpu"]).norm() / rows["cpu"].norm()).item() < 1e-4
    assert torch.equal(rows["cuda"], shard(models["cuda"], contexts))

    batch, fvu = 2048, {}
    for device in models:
        bank = Bank(256, TrainConfig(batch=batch, tokens=150 * batch), device)
        members = []
        for architecture, level in (
            ("topk", {"k": 32}),
            ("batchtopk", {"k": 32}),
            ("jumprelu", {"sparsity": 0.3}),
            ("relu", {"sparsity": 0.3}),
        ):
            config = SAEConfig(architecture=architecture, hook_point=HOOK, width=4096, learning_rate=1e-3, **level)
            members.append(bank.add(config.name, config))
        bank.initialise(members, rows["cpu"][:4096])
        for number in range(150):
            start = number * batch % (len(rows["cpu"]) - batch)
            bank.step(rows["cpu"][start : start + batch], number * batch)
        assert not any(member.failed for member in members)
        saes = {member.config.architecture: member.sae.folded() for member in members}
        fvu[device] = {name: reconstruction_metrics(sae, [rows["cpu"]]).fvu for name, sae in saes.items()}
    for name, found in fvu["cuda"].items():
        assert found == pytest.approx(fvu["cpu"][name], rel=0.03), fvu  # The GPU trains in bfloat16, the CPU in float32

    tokens, mean = torch.from_numpy(contexts[range(16)]).long(), rows["cpu"].mean(0)
    on_gpu = downstream_metrics(models["cuda"], tokens, HOOK, saes, mean.cuda(), SKIP).finish()
    on_cpu = downstream_metrics(
        models["cpu"], tokens, HOOK, {name: sae.cpu() for name, sae in saes.items()}, mean, SKIP
    ).finish()
    for name, numbers in on_gpu.items():
        assert numbers == pytest.approx(on_cpu[name], rel=1e-3, abs=1e-4)
