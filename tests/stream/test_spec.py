"""Which contexts a shard holds."""

import numpy as np

from raysae.stream import spec as module
from raysae.stream.spec import ActivationSpec


def make(contexts: int, seed: int = 3, epochs: int = 2, shard_contexts: int = 256) -> ActivationSpec:
    return ActivationSpec(
        model="m", text="t", contexts=contexts, context_length=8, skip_positions=1, dtype="float32", seed=seed,
        epochs=epochs, shard_contexts=shard_contexts, batch_contexts=32,
    )  # fmt: skip


def test_contexts_are_those_of_the_epochs_permutation():
    spec = make(70, shard_contexts=16)
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(70)
        for within in range(4):
            found = spec.contexts_of(epoch * 4 + within)
            assert found.tolist() == order[within * 16 : (within + 1) * 16].tolist()
            found[:] = -1  # A caller may write into them
    assert (spec.contexts_of(0) >= 0).all()
    small = make(8, shard_contexts=8)
    assert small.contexts_of(0).tolist() == [6, 7, 2, 1, 4, 5, 3, 0]
    assert small.contexts_of(1).tolist() == [2, 1, 4, 0, 5, 7, 6, 3]


def test_many_shards_of_a_large_text_draw_an_epochs_order_once(monkeypatch):
    drawn = []
    default_rng = np.random.default_rng

    def counted(seed):
        drawn.append(tuple(seed))
        return default_rng(seed)

    monkeypatch.setattr(module.np.random, "default_rng", counted)
    ActivationSpec._order.cache_clear()
    spec, held_out = make(4_000_000), make(1000, seed=4)
    for shard in range(300):
        spec.contexts_of(shard)
        held_out.contexts_of(shard % 3)
    assert drawn == [(3, 0), (4, 0)]
    spec.contexts_of(spec.shards_per_epoch)
    assert drawn == [(3, 0), (4, 0), (3, 1)]
