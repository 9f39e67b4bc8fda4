"""The real producer behind the queue. Its activations equal those made in this process, and its metrics agree."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import ray
import torch

from raysae.config import ModelConfig, ResourcesConfig, SAEConfig, StreamConfig, TrainConfig
from raysae.lm.facts import model_facts
from raysae.lm.model import LanguageModel
from raysae.lm.patched_loss import downstream_metrics
from raysae.sae.architectures import build
from raysae.sae.files import save_sae
from raysae.stream.client import StreamClient
from raysae.stream.queue import start_stream
from raysae.stream.shard import ShardMaker
from raysae.stream.spec import ActivationSpec
from raysae.stream.state import StreamError
from raysae.stream.task import Streaming
from raysae.text.contexts import Contexts

HOOKS = {"resid_post.2": 64, "mlp_out.3": 64}
BLOCK_MIB = 0.25


@pytest.fixture(scope="module")
def local_ray():
    ray.init("local", include_dashboard=False, num_cpus=2, object_store_memory=128 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_stream_is_what_a_shard_maker_makes(local_ray, stories_model, tmp_path):
    model = ModelConfig(name=str(stories_model))
    tokens = np.random.default_rng(0).integers(3, 512, (512, 16)).astype(np.uint16)
    contexts = Contexts("digest", tokens)
    spec = ActivationSpec(
        model=model_facts(model).digest, text="digest", contexts=512, context_length=16, skip_positions=4,
        dtype="float32", seed=3, epochs=1, shard_contexts=256, batch_contexts=64,
    )  # fmt: skip
    common = {
        "model": model,
        "resources": ResourcesConfig(),
        "contexts": {"train": contexts, "evaluation": contexts},
        "widths": HOOKS,
        "threads": 1,
    }
    stream = StreamConfig(block_mib=BLOCK_MIB, cache_dir=str(tmp_path / "cache"))
    other = spec.model_copy(update={"model": "of other weights"})
    refused = start_stream(Streaming(stream=stream, training=other, evaluation=other, **common))
    with pytest.raises(
        StreamError,
        match=r"^the activation stream has no producers: model\.name is .* differ from the driver's .* "
        r"copy the driver's files to this machine$",
    ):
        StreamClient(refused, "a", "resid_post.2", other, 64, BLOCK_MIB).open(0, 1).next()
    assert ray.get(refused.stats.remote())["producers_replaced"] == 1  # A user's mistake is not tried again
    ray.kill(refused)

    queue = start_stream(Streaming(stream=stream, training=spec, evaluation=spec, **common))
    torch.set_num_threads(1)
    lm = LanguageModel.load(model)
    maker = ShardMaker(lm, contexts, spec, list(HOOKS), BLOCK_MIB)
    for hook in HOOKS:
        reader = StreamClient(queue, hook, hook, spec, HOOKS[hook], BLOCK_MIB).open(0, spec.rows_per_shard)
        for shard in range(spec.shards):
            expected = np.concatenate(maker.make(shard)[1][hook])
            assert np.array_equal(reader.next().numpy(), expected)
        reader.close()
    stats = ray.get(queue.stats.remote())
    assert stats["shards_from_cache"] + stats["contexts_forwarded"] / 256 == stats["shards_produced"]
    assert stats["contexts_forwarded"] == 512, "the second reader came late, and was served from the cache"

    sae = build(SAEConfig(hook_point="resid_post.2", width=128, k=8, learning_rate=1e-3), 64, TrainConfig())
    sae.initialise(torch.from_numpy(np.concatenate(maker.make(0)[1]["resid_post.2"])))
    save_sae(sae, tmp_path / "sae", {})
    mean = np.full(64, 0.1, np.float32)
    found = ray.get(queue.evaluate.remote("resid_post.2", {"a": str(tmp_path / "sae")}, mean, 300 * 11 - 3, 8))
    chosen = torch.from_numpy(np.concatenate([contexts[spec.contexts_of(i)] for i in range(2)])[:300])
    expected = downstream_metrics(lm, chosen, "resid_post.2", {"a": sae.folded()}, torch.from_numpy(mean), 4).finish()
    # Random tokens leave nothing to recover, so `ce_recovered` is left out
    for metric in ("kl", "ce_clean", "ce_sae", "ce_mean", "ce_zero"):
        assert found["a"][metric] == pytest.approx(expected["a"][metric], rel=1e-5)
    ray.kill(queue)


def test_all_threads_of_a_model_are_nice():
    program = """
import os, threading, time
from raysae.processes import NICENESS, be_nice, threads
threading.Thread(target=time.sleep, args=[30], daemon=True).start()
others = threads()
import torch
torch.set_num_threads(3)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
own = threads() - others
assert len(own) >= 2
be_nice(others)
nice = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads()}
assert all(nice[thread] == NICENESS for thread in own | {threading.get_native_id()}), nice
assert all(nice[thread] == 0 for thread in others - {threading.get_native_id()}), nice
"""
    subprocess.run([sys.executable, "-c", program], check=True)
