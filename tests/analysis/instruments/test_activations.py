"""Splits, recorded activations, and what SAEs make of them.

They must equal a brute-force definition, the model's own activations, and dense sums.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raysae.analysis.instruments.activations import (
    SPLITS,
    Activity,
    ArrayActivations,
    encoded,
    reconstruct,
    split_contexts,
)
from raysae.analysis.lab.recording import Recorded, collect
from raysae.config import UserError
from raysae.stream.shard import ShardMaker
from raysae.stream.spec import ActivationSpec
from raysae.text.contexts import Contexts
from tests.analysis.planted import HOOK, activations, rows, sae
from tests.stream.fakes import WIDTHS, FakeLanguageModel, activation, fake_contexts, fake_spec


def with_documents(contexts: int, lengths: list[int], hashes: list[int] | None = None, body: int = 11) -> Contexts:
    """Contexts over documents with these lengths in tokens."""
    owner = np.repeat(np.arange(len(lengths)), lengths)[: contexts * body].reshape(contexts, body)
    base = fake_contexts() if contexts == 900 else Contexts("c", np.zeros((contexts, body + 1), np.uint16))
    documents = np.array(hashes if hashes is not None else range(100, 100 + len(lengths)), np.uint64)
    return Contexts(base.digest, base.tokens, documents, np.stack([owner[:, 0], owner[:, -1]], 1))


def lengths_for(contexts: int, longest: int, seed: int = 0, body: int = 11) -> list[int]:
    rng, lengths = np.random.default_rng(seed), []
    while sum(lengths) < contexts * body:
        lengths.append(int(rng.integers(1, longest)))
    return lengths


@pytest.mark.parametrize(("longest", "dropped"), [(5, 0.1), (60, 0.1), (700, 0.1)])
@pytest.mark.parametrize("twins", [0, 5])
def test_no_document_is_in_two_splits(longest, dropped, twins):
    lengths = lengths_for(900, longest)
    hashes = np.arange(len(lengths))
    if twins:  # Some documents occur twice
        hashes[len(hashes) // 2 :: twins * 7] = hashes[1 : 1 + len(hashes[len(hashes) // 2 :: twins * 7])]
    contexts = with_documents(900, lengths, hashes.tolist())
    found = split_contexts(contexts, seed=3)
    split = found.split
    owners: dict[int, set[int]] = {}
    groups: dict[int, set[int]] = {}
    for (first, last), part in zip(contexts.spans, split, strict=True):
        if part >= 0:
            for document in range(first, last + 1):
                owners.setdefault(int(contexts.documents[document]), set()).add(int(part))
    assert all(len(parts) == 1 for parts in owners.values())
    assert ((split < 0) == (found.group < 0)).all()
    for (first, last), group in zip(contexts.spans, found.group, strict=True):
        if group >= 0:
            for document in range(first, last + 1):
                groups.setdefault(int(contexts.documents[document]), set()).add(int(group))
    assert all(len(each) == 1 for each in groups.values()), "no document is in two groups"
    assert (split < 0).mean() < dropped + 0.1 * bool(twins)
    shares = [(split == i).mean() for i in range(3)]
    assert min(shares) > 0.22
    assert np.array_equal(split, split_contexts(contexts, seed=3).split)
    if longest < 100:
        assert not np.array_equal(split, split_contexts(contexts, seed=4).split)


def test_shares_of_the_splits():
    split = split_contexts(with_documents(900, lengths_for(900, 40)), fractions=(0.6, 0.1, 0.3)).split
    assert [(split == i).sum() / (split >= 0).sum() for i in range(3)] == pytest.approx([0.6, 0.1, 0.3], abs=0.04)


def test_there_are_as_many_groups_as_documents_where_those_are_long():
    long = split_contexts(with_documents(900, [11 * 30 + 4] * 30))  # One context in 30 joins two documents
    assert len(np.unique(long.group[long.group >= 0])) == 30
    assert (long.split < 0).sum() == 27, "two of the 29 borders lie between contexts"
    short = split_contexts(with_documents(900, [3] * 4000))
    groups, contexts = np.unique(short.group[short.group >= 0], return_counts=True)
    assert len(groups) > 80
    assert contexts.max() <= 16


def test_texts_that_cannot_be_split_are_refused():
    with pytest.raises(UserError, match="2 documents in 90 contexts, too few for three splits"):
        split_contexts(with_documents(90, [500, 490]))
    with pytest.raises(UserError, match="do not say which documents"):
        split_contexts(fake_contexts())


def test_arrays_are_split_by_document_with_contexts_whole():
    context = torch.arange(90).repeat(10)  # Rows of a context lie apart
    document = context // 2
    source = ArrayActivations({HOOK: context.float().unsqueeze(1)}, context, document=document, chunk_rows=30)
    seen: dict[str, set[int]] = {}
    for split in SPLITS:
        chunks = list(source.chunks(split))
        assert len(chunks) > 5
        for chunk in chunks:
            assert torch.equal(chunk.x[HOOK].squeeze(1).long(), chunk.context)
            assert (torch.bincount(chunk.context)[chunk.context.unique()] == 10).all()
            assert torch.equal(chunk.position, torch.arange(10).repeat(len(chunk.context) // 10))
        seen[split] = {int(c) for chunk in chunks for c in chunk.context}
        assert len(seen[split]) == 30
    assert {c // 2 for c in seen["A"]}.isdisjoint({c // 2 for c in seen["B"]} | {c // 2 for c in seen["C"]})
    assert len(seen["A"] | seen["B"] | seen["C"]) == 90
    with pytest.raises(UserError, match="too few for the splits"):
        ArrayActivations({HOOK: torch.zeros(4, 1)}, torch.tensor([0, 0, 1, 1]))


class Recorder:
    """Makes shard makers, and remembers the hook points it was asked for."""

    def __init__(self, contexts: Contexts, spec: ActivationSpec | None = None, **lm):
        self.contexts, self.spec, self.lm, self.asked = contexts, spec or fake_spec(contexts), lm, []

    def __call__(self, hooks: list[str]) -> ShardMaker:
        self.asked.append(hooks)
        return ShardMaker(FakeLanguageModel(**self.lm), self.contexts, self.spec, hooks, 0.01)


CONTEXTS = with_documents(900, lengths_for(900, 60))


@pytest.mark.parametrize("shards", [1, None])
def test_recorded_activations_are_the_models(tmp_path, shards):
    load = Recorder(CONTEXTS)
    spec = fake_spec(CONTEXTS)
    found = collect(tmp_path, spec, CONTEXTS, list(WIDTHS), load, shards)
    parts = split_contexts(CONTEXTS)
    split = parts.split
    used = np.concatenate([spec.contexts_of(i) for i in range(shards or 3)])
    assert found.widths == WIDTHS
    for i, name in enumerate(SPLITS):
        chunks = list(found.chunks(name))
        context = torch.cat([chunk.context for chunk in chunks]).view(-1, 9)
        assert context[:, 0].tolist() == [c for c in used if split[c] == i]
        assert found.rows(name) == context.numel()
        group = torch.cat([chunk.group for chunk in chunks]).view(-1, 9)
        assert group[:, 0].tolist() == parts.group[context[:, 0].numpy()].tolist()
        tokens = torch.from_numpy(CONTEXTS[context[:, 0].numpy()])
        assert torch.equal(torch.cat([chunk.token for chunk in chunks]), tokens[:, 3:].flatten())
        assert torch.equal(torch.cat([chunk.position for chunk in chunks]), torch.arange(3, 12).repeat(len(tokens)))
        torch.testing.assert_close(
            torch.cat([chunk.token_loss for chunk in chunks]).view(-1, 9)[:, :-1], (tokens.float() / 7)[:, 4:]
        )
        for hook in WIDTHS:
            assert torch.equal(
                torch.cat([chunk.x[hook] for chunk in chunks]), activation(tokens, hook)[:, 3:].flatten(0, 1)
            )
    assert list(found.select(["mlp_act.1"]).widths) == ["mlp_act.1"]


@pytest.mark.parametrize("padded", [False, True])
def test_rows_left_out_are_in_no_chunk_and_nothing_takes_their_places(tmp_path, padded):
    """So no document has a row in two splits, and all hook points have the same rows."""
    lengths = np.random.default_rng(0).integers(5, 13, 900) if padded else None
    contexts = replace(CONTEXTS, lengths=lengths)
    spec = fake_spec(contexts, leave_out_tokens=(7, 8), leave_out_norm=1.01, leave_out_hook_point="mlp_act.1")
    load = Recorder(contexts, spec)
    found = collect(tmp_path, spec, contexts, ["resid_post.0"], load, 2)
    found = collect(tmp_path, spec, contexts, list(WIDTHS), load, 2)
    assert load.asked == [["resid_post.0"], ["mlp_act.1"]]
    maker, split = load([]), split_contexts(contexts).split
    kept = {}
    for shard in range(2):
        notes = maker.annotations(shard, token_loss=False)
        wanted = notes["kept"] & (split[notes["context"]] >= 0)
        kept |= dict.fromkeys(zip(notes["context"][wanted], notes["position"][wanted], strict=True))
    seen = []
    recorded = Recorded(found.folder, tuple(WIDTHS), 3)
    for i, name in enumerate(SPLITS):
        for chunk in found.chunks(name):
            assert (split[chunk.context.numpy()] == i).all()
            tokens = torch.from_numpy(contexts.tokens[chunk.context, chunk.position].astype(np.int64))
            assert torch.equal(chunk.token, tokens)
            torch.testing.assert_close(chunk.x["resid_post.0"][:, 0], tokens + chunk.position / 100)
            assert torch.equal(chunk.x["mlp_act.1"][:, :6], -chunk.x["resid_post.0"])
            last = chunk.position == torch.from_numpy(contexts.real(chunk.context.numpy()).sum(1)) - 1
            after = contexts.tokens[chunk.context, (chunk.position + 1).clamp_max(11)].astype(np.float32) / 7
            torch.testing.assert_close(
                chunk.token_loss, torch.from_numpy(after).where(~last, torch.nan), equal_nan=True
            )
            seen += zip(chunk.context.tolist(), chunk.position.tolist(), strict=True)
        assert recorded.kept(name).shape == (len(recorded.contexts(name)), 9)
        assert found.rows(name) == recorded.kept(name).sum() == sum(split[c] == i for c, _ in seen)
    assert set(seen) == set(kept)
    assert len(seen) == len(kept) < 0.95 * 2 * 256 * 9


def test_a_second_analysis_reads_what_is_there(tmp_path):
    spec, load = fake_spec(CONTEXTS), Recorder(CONTEXTS)
    collect(tmp_path, spec, CONTEXTS, ["resid_post.0"], load, 1)
    collect(tmp_path, spec, CONTEXTS, ["resid_post.0"], load, 1)
    assert load.asked == [["resid_post.0"]]
    collect(tmp_path, spec, CONTEXTS, list(WIDTHS), load, 1)
    assert load.asked[1:] == [["mlp_act.1"]]
    collect(tmp_path, spec, CONTEXTS, ["resid_post.0"], load, 1, seed=1)
    collect(tmp_path, spec, CONTEXTS, ["resid_post.0"], load, 2)
    assert len(load.asked) == 4
    assert len(list(tmp_path.iterdir())) == 3


def test_recording_that_is_broken_off_leaves_nothing(tmp_path):
    spec = fake_spec(CONTEXTS)

    def breaks(hooks):
        maker = Recorder(CONTEXTS)(hooks)
        read = maker.unpermuted
        maker.unpermuted = lambda shard: read(shard) if shard == 0 else 1 / 0
        return maker

    with pytest.raises(ZeroDivisionError):
        collect(tmp_path, spec, CONTEXTS, ["resid_post.0"], breaks, 2)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    load = Recorder(CONTEXTS)
    collect(tmp_path, spec, CONTEXTS, ["resid_post.0"], load, 2)
    assert load.asked == [["resid_post.0"]]


def test_activations_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"activations at mlp_act.1 are NaN or infinite in contexts .*, in shard 0"):
        collect(
            tmp_path,
            fake_spec(CONTEXTS),
            CONTEXTS,
            list(WIDTHS),
            Recorder(CONTEXTS, poison={"mlp_act.1": float("nan")}),
            1,
        )


@pytest.mark.parametrize("k", [4, None])
def test_reconstructions_and_activity(k):
    autoencoder, x = sae(k=k), rows(300)
    activity = Activity(autoencoder.n)
    found, l0 = reconstruct(autoencoder, x[:200], activity)
    reconstruct(autoencoder, x[200:], activity)
    torch.testing.assert_close(found, autoencoder(x[:200]))
    dense = torch.zeros(300, autoencoder.n)
    for part, codes in encoded(autoencoder, x):
        dense[part] = dense[part].scatter(1, codes.indices, codes.values) if k else codes
    assert torch.equal(l0, (dense[:200] > 0).sum(1).float())
    assert torch.equal(activity.count, (dense > 0).sum(0).double())
    torch.testing.assert_close(activity.mean, dense.double().mean(0))
    torch.testing.assert_close(activity.mean_active * activity.count, dense.double().sum(0))


def test_planted_contexts_come_back_in_the_same_order():
    source = activations()
    assert [chunk.context[0] for chunk in source.chunks("B")] == [chunk.context[0] for chunk in source.chunks("B")]
