"""Shards equal their definition, computed by brute force on a fake model. On a real model they are pure functions."""

import numpy as np
import pytest
import torch

from raysae.config import ModelConfig
from raysae.stream.blocks import as_tensor
from raysae.stream.cache import BlockCache
from raysae.stream.shard import ShardMaker, numerics
from raysae.stream.spec import ActivationSpec
from raysae.text.contexts import Contexts
from tests.stream.fakes import WIDTHS, FakeLanguageModel, activation, fake_contexts, fake_spec

HOOKS = list(WIDTHS)
BLOCK_MIB = 0.01
CONTEXTS = fake_contexts()


def maker(hooks=HOOKS, lm=None, **changes) -> ShardMaker:
    return ShardMaker(lm or FakeLanguageModel(), CONTEXTS, fake_spec(CONTEXTS, **changes), hooks, BLOCK_MIB)


def rows_of(made: ShardMaker, shard: int) -> dict[str, np.ndarray]:
    return {hook: np.concatenate(blocks) for hook, blocks in made.make(shard)[1].items()}


@pytest.mark.parametrize("shard", [0, 2, 3, 5])
@pytest.mark.parametrize("batch_contexts", [1, 48, 256, 1000])
def test_a_shard_is_what_the_design_says(shard, batch_contexts):
    spec = fake_spec(CONTEXTS, batch_contexts=batch_contexts)
    lm = FakeLanguageModel()
    found = rows_of(maker(lm=lm, batch_contexts=batch_contexts), shard)
    order = spec.permutation_of(shard)
    for hook in HOOKS:
        laid = []  # Contexts laid end to end, one row at a time
        for index in spec.contexts_of(shard):
            states = activation(torch.from_numpy(CONTEXTS[[index]]), hook)[0]
            laid += [states[position].numpy() for position in range(spec.skip_positions, spec.context_length)]
        assert found[hook].shape == (spec.rows_per_shard, WIDTHS[hook])
        for row in range(spec.rows_per_shard):
            assert np.array_equal(found[hook][row], laid[order[row]])
    assert lm.forwarded == 256
    sizes = [size for size, _ in lm.asked]
    assert sizes[:-1] == [batch_contexts] * (len(sizes) - 1), (
        "one pass of batch_contexts at a time, for all hook points at once"
    )
    assert {hooks for _, hooks in lm.asked} == {tuple(HOOKS)}


def test_meta():
    meta, blocks = maker().make(4)
    seconds = meta.pop("seconds")
    assert seconds > 0
    assert meta == {
        "index": 4, "contexts_forwarded": 256, "rows_left_out": 0, "from_cache": False, "nonfinite": [],
        "nonfinite_contexts": [], "numerics": numerics(FakeLanguageModel()),
    }  # fmt: skip
    assert list(blocks) == HOOKS
    assert len(blocks["mlp_act.1"]) > len(blocks["resid_post.0"]) > 1


def test_neither_companions_nor_history_change_a_bit():
    together = maker()
    first = rows_of(together, 1)
    together.make(0)
    again = rows_of(together, 1)
    for hook in HOOKS:
        alone = rows_of(maker([hook]), 1)
        assert list(alone) == [hook]
        assert alone[hook].tobytes() == first[hook].tobytes() == again[hook].tobytes()
    assert rows_of(maker(seed=6), 1)["resid_post.0"].tobytes() != first["resid_post.0"].tobytes()


def test_an_epoch_reads_every_context_once_and_the_next_in_another_order():
    made = maker()
    spec = made.spec
    assert spec.shards == 6
    seen = [made.annotations(shard, token_loss=False)["context"] for shard in range(spec.shards)]
    kept = spec.context_length - spec.skip_positions
    for epoch in (seen[:3], seen[3:]):
        contexts, counts = np.unique(np.concatenate(epoch), return_counts=True)
        assert len(contexts) == 3 * 256
        assert set(counts) == {kept}
    assert not np.array_equal(seen[0], seen[3])


def test_annotations_belong_to_the_rows():
    lm = FakeLanguageModel()
    made = maker(lm=lm)
    notes = made.annotations(3)
    order = made.spec.permutation_of(3)
    rows = rows_of(maker(), 3)["resid_post.0"]
    expected = notes["token"][order] + notes["position"][order] / 100
    np.testing.assert_allclose(rows[:, 0], expected, rtol=1e-6)
    assert np.array_equal(notes["token"], CONTEXTS.tokens[notes["context"], notes["position"]])
    length = CONTEXTS.tokens.shape[1]
    last = notes["position"] == length - 1
    after = CONTEXTS.tokens[notes["context"], np.minimum(notes["position"] + 1, length - 1)]
    np.testing.assert_allclose(notes["token_loss"], np.where(last, np.nan, after / 7), rtol=1e-6)
    assert {len(note) for note in notes.values()} == {made.spec.rows_per_shard}
    assert {hooks for _, hooks in lm.asked} == {()}
    lm.asked.clear()
    assert "token_loss" not in made.annotations(3, token_loss=False)
    assert not lm.asked


def test_bfloat16_rows_are_the_models_bits():
    spec = fake_spec(CONTEXTS, dtype="bfloat16")
    made = maker(lm=FakeLanguageModel(torch.bfloat16), dtype="bfloat16")
    for hook, rows in rows_of(made, 2).items():
        assert rows.dtype == np.int16
        tokens = torch.from_numpy(CONTEXTS[spec.contexts_of(2)])
        laid = activation(tokens, hook).to(torch.bfloat16)[:, spec.skip_positions :].flatten(0, 1)
        assert torch.equal(as_tensor(rows, "bfloat16"), laid[torch.from_numpy(spec.permutation_of(2))])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_that_are_not_finite_are_reported_by_hook_point(value, dtype):
    lm = FakeLanguageModel(poison={"mlp_act.1": value})
    meta, _ = maker(lm=lm, dtype=dtype).make(0)
    assert meta["nonfinite"] == ["mlp_act.1"]
    # The second context of each forward pass
    batches = fake_spec(CONTEXTS).contexts_of(0).reshape(-1)[1::48]
    assert meta["nonfinite_contexts"] == sorted(batches)
    sound, _ = maker(["resid_post.0"], lm=lm).make(0)
    assert sound["nonfinite"] == sound["nonfinite_contexts"] == []


def test_shards_outside_the_pass():
    for shard in (-1, 6):
        with pytest.raises(IndexError, match="outside a pass of 6"):
            maker().make(shard)
        with pytest.raises(IndexError):
            maker().annotations(shard)


def test_contexts_of_another_text_are_refused():
    other = Contexts("another", CONTEXTS.tokens)
    with pytest.raises(ValueError, match="are not those of the spec"):
        ShardMaker(FakeLanguageModel(), other, fake_spec(CONTEXTS), HOOKS, BLOCK_MIB)


def test_numerics_tell_the_version_of_what_permutes():
    assert numerics(FakeLanguageModel())["numpy"] == np.__version__


def test_numerics_follow_the_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        changed = numerics(FakeLanguageModel())
    finally:
        torch.set_num_threads(threads)
    assert changed != numerics(FakeLanguageModel())


def test_a_real_model(stories_model):
    from raysae.lm.model import LanguageModel

    lm = LanguageModel.load(ModelConfig(name=str(stories_model)))
    tokens = np.random.default_rng(1).integers(3, 512, (300, 24), dtype=np.uint16)
    tokens[:, 0] = 1
    contexts = Contexts("real", tokens)
    hooks = ["resid_post.2", "mlp_act.0", "attn_z.1"]
    spec = fake_spec(
        contexts, model=lm.facts.digest, contexts=300, context_length=24, skip_positions=8, batch_contexts=32
    )

    def rows(hook_points: list[str]) -> dict[str, np.ndarray]:
        return rows_of(ShardMaker(lm, contexts, spec, hook_points, 1), 0)

    found = rows(hooks)
    for hook in hooks:
        assert rows([hook])[hook].tobytes() == found[hook].tobytes()
    notes = ShardMaker(lm, contexts, spec, hooks, 1).annotations(0)
    with torch.no_grad():
        output = lm.model(torch.from_numpy(contexts[spec.contexts_of(0)]), output_hidden_states=True)
    laid = output.hidden_states[3][:, 8:].flatten(0, 1).numpy()
    np.testing.assert_allclose(found["resid_post.2"], laid[spec.permutation_of(0)], atol=1e-4, rtol=1e-4)
    predicted = output.logits.log_softmax(-1)[:, 8:-1]  # Made at positions 8 to the last but one
    loss = -predicted.gather(2, torch.from_numpy(contexts[spec.contexts_of(0)][:, 9:, None])).squeeze(2)
    found_loss = notes["token_loss"].reshape(len(loss), -1)
    np.testing.assert_allclose(found_loss[:, :-1], loss.numpy(), atol=1e-4)
    assert np.isnan(found_loss[:, -1]).all()


# ---------------------------------------------------------------- rows left out

# Hashes of specs as they were before rows could be left out: caches and studies of that time are found under them
HASH, HASH_16 = "9031ea2fb1424607", "6a1b618562180aa8"


def test_the_hash_of_a_spec_that_leaves_nothing_out_is_what_it_was():
    fields = {
        "model": "m", "text": "t", "contexts": 1024, "context_length": 16, "skip_positions": 1, "dtype": "float32",
        "seed": 0, "epochs": 1, "shard_contexts": 256, "batch_contexts": 32,
    }  # fmt: skip
    assert ActivationSpec(**fields).hash == HASH
    assert ActivationSpec(**fields | {"dtype": "bfloat16", "seed": 7}).hash == HASH_16
    changes = {"leave_out_tokens": (3,)}, {"leave_out_norm": 10.0, "leave_out_hook_point": "resid_post.0"}
    assert len({ActivationSpec(**fields | change).hash for change in ({}, *changes)}) == 3


def test_rows_at_left_out_tokens_give_way_to_other_rows_of_the_shard():
    out = tuple(range(100))
    made, plain = maker(leave_out_tokens=out), maker()
    notes = made.annotations(1, token_loss=False)
    assert np.array_equal(notes["kept"], ~np.isin(notes["token"], out))
    rows, before = rows_of(made, 1), rows_of(plain, 1)
    order = made.spec.order_of(1, notes["kept"])
    laid = np.empty_like(before["resid_post.0"])
    laid[plain.spec.permutation_of(1)] = before["resid_post.0"]
    assert np.array_equal(rows["resid_post.0"], laid[order])
    assert notes["kept"][order].all()
    stays = notes["kept"][made.spec.permutation_of(1)]
    for hook in HOOKS:
        assert rows[hook].shape == before[hook].shape
        assert np.array_equal(rows[hook][stays], before[hook][stays]), "kept rows are where they were"
        assert not np.array_equal(rows[hook], before[hook])
    assert np.array_equal(rows["mlp_act.1"][:, :6], -rows["resid_post.0"]), "rows of both hook points align"
    counts = np.bincount(order, minlength=len(order))[notes["kept"]]
    assert set(counts) == {1, 2}, "no row comes thrice while another has come once"


def test_left_out_rows_are_more_than_the_kept():
    out = tuple(range(400))
    made = maker(leave_out_tokens=out)
    kept = made.kept(0)
    counts = np.bincount(made.spec.order_of(0, kept), minlength=len(kept))
    assert kept.mean() < 0.3
    assert np.array_equal(counts > 0, kept)
    assert np.ptp(counts[kept]) <= 1


@pytest.mark.parametrize("asked", [HOOKS, ["resid_post.0"], ["mlp_act.1"]])
def test_the_norm_at_one_hook_point_leaves_out_rows_at_all(asked):
    """The fake's norm grows with the token. A multiple of 1.01 leaves out the rows of the largest ones."""
    made = maker(asked, leave_out_norm=1.01, leave_out_hook_point="mlp_act.1")
    meta, _ = made.make(2)
    notes = made.annotations(2, token_loss=False)
    tokens, positions = torch.from_numpy(notes["token"]), torch.from_numpy(notes["position"])
    norms = (tokens[:, None] + positions[:, None] / 100 + torch.arange(10) * 1000.0).norm(dim=1).numpy()
    expected = norms <= 1.01 * np.sort(norms)[(len(norms) - 1) // 2]
    assert np.array_equal(notes["kept"], expected)
    assert 0.01 < 1 - expected.mean() < 0.45
    assert meta["rows_left_out"] == (~expected).sum()
    whole = rows_of(maker(leave_out_norm=1.01, leave_out_hook_point="mlp_act.1"), 2)
    for hook, rows in rows_of(made, 2).items():
        assert np.array_equal(rows, whole[hook])
    fresh = maker(asked, leave_out_norm=1.01, leave_out_hook_point="mlp_act.1")
    assert np.array_equal(fresh.kept(2), expected), "also where the shard was not made before"


def test_padding_gives_no_rows():
    lengths = np.random.default_rng(4).integers(5, 13, len(CONTEXTS.tokens))
    padded = Contexts(CONTEXTS.digest, CONTEXTS.tokens, lengths=lengths)
    made = ShardMaker(FakeLanguageModel(), padded, fake_spec(CONTEXTS), HOOKS, BLOCK_MIB)
    notes = made.annotations(0)
    assert np.array_equal(notes["kept"], notes["position"] < lengths[notes["context"]])
    assert np.array_equal(~np.isnan(notes["token_loss"]), notes["position"] + 1 < lengths[notes["context"]])
    rows = rows_of(made, 0)["resid_post.0"][:, 0]
    order = made.spec.order_of(0, notes["kept"])
    np.testing.assert_allclose(rows, (notes["token"] + notes["position"] / 100)[order], rtol=1e-6)


def test_a_shard_without_a_row_to_keep_says_so():
    with pytest.raises(ValueError, match=r"all rows of shard 0 are left out, by stream.leave_out_tokens"):
        maker(leave_out_tokens=tuple(range(500))).make(0)


def test_a_cached_shard_is_the_one_with_rows_left_out(tmp_path):
    spec = fake_spec(CONTEXTS, leave_out_norm=1.01, leave_out_hook_point="mlp_act.1")
    cache = BlockCache(str(tmp_path), spec, WIDTHS, 1 << 30)
    lm = FakeLanguageModel()
    made = ShardMaker(lm, CONTEXTS, spec, HOOKS, BLOCK_MIB, cache)
    first = rows_of(made, 0)
    lm.forwarded = 0
    again = rows_of(ShardMaker(lm, CONTEXTS, spec, HOOKS, BLOCK_MIB, cache), 0)
    assert lm.forwarded == 0
    assert all(np.array_equal(first[hook], again[hook]) for hook in HOOKS)
    plain = BlockCache(str(tmp_path), fake_spec(CONTEXTS), WIDTHS, 1 << 30)
    assert plain.load("resid_post.0", 0) is None
