"""A producer that needs neither a language model nor torch. Its processes start at once."""

from __future__ import annotations

import os
import time

import numpy as np
import ray

from raysae.stream.blocks import cut
from raysae.stream.producer import Production
from raysae.stream.spec import ActivationSpec

WIDTHS = {"resid_post.0": 8, "mlp_out.1": 4}
CONTEXTS = 256
SPEC = ActivationSpec(
    model="m", text="t", contexts=CONTEXTS * 8, context_length=6, skip_positions=2, dtype="float32", seed=0, epochs=1,
    shard_contexts=CONTEXTS, batch_contexts=CONTEXTS,
)  # fmt: skip
ROWS = SPEC.rows_per_shard  # 1,024
SHARD_MIB = ROWS * sum(WIDTHS.values()) * 4 / 2**20
BLOCK_MIB = 0.01  # A shard has several blocks of this size


def rows_of(stream: str, hook_point: str, shard: int) -> np.ndarray:
    """The activations of the fake producers: a pure function, as the stream requires."""
    seed = [len(stream), list(WIDTHS).index(hook_point), shard]
    return np.random.default_rng(seed).standard_normal((ROWS, WIDTHS[hook_point]), np.float32)


class FakeProducer:
    """Fails in the way that `model.name` names.

    - 'broken' does not start.
    - 'slow' takes 0.3 s more for each shard.
    - 'poison' raises on every shard, 'poison:i' on shard i alone.
    - 'nan:i' raises on shard i. If it must be tolerant, it reports NaN at mlp_out.1 in context 7 instead.
    - 'hang:FILE' makes FILE and never returns. Once FILE exists, it works.
    """

    def __init__(self, production: Production):
        self.production = production
        self.mode = production.model.name
        if self.mode == "broken":
            raise OSError("no such weights")

    def ping(self) -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def produce(self, stream: str, shard: int, tolerant: bool) -> list:
        if self.mode == "slow":
            time.sleep(0.3)
        if self.mode in ("poison", f"poison:{shard}"):
            raise ValueError("bad shard")
        if self.mode.startswith("hang:") and not os.path.exists(self.mode[5:]):
            open(self.mode[5:], "w").close()
            time.sleep(3600)
        broken = (
            {"nonfinite": ["mlp_out.1"], "nonfinite_contexts": [7]}
            if self.mode == f"nan:{shard}"
            else {"nonfinite": []}
        )
        if broken["nonfinite"] and not tolerant:
            raise ValueError("NaN")
        meta = {
            "index": shard,
            "contexts_forwarded": CONTEXTS,
            "rows_left_out": 0,
            "seconds": 0.01,
            "from_cache": False,
            "numerics": {"threads": 1, "dtype": "float32"},
        } | broken
        return [meta, *(block for hook in WIDTHS for block in cut(rows_of(stream, hook, shard), "float32", BLOCK_MIB))]

    def evaluate(self, stream, hook_point, saes, mean, predicted_tokens) -> dict:
        common = {"sum": float(mean.sum()), "tokens": predicted_tokens, "hook": hook_point, "together": len(saes)}
        return {name: common | {"folder": folder} for name, folder in saes.items()}
