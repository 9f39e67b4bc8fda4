"""What is Matryoshka's own: groups of latents, nested reconstructions, and features that contain others."""

import pytest
import torch

from raysae.analysis.instruments.dictionaries import mmcs
from raysae.config import GROUP_SHARES, TrainConfig
from raysae.kernels.rows import unit_rows
from raysae.sae.base import StepInfo
from raysae.sae.matryoshka import groups_of
from tests.sae.conftest import make
from tests.sae.planted import train


@pytest.mark.parametrize("n", [4, 10, 64, 4096])
def test_groups_divide_the_latents(n):
    groups = groups_of(n, list(GROUP_SHARES))
    assert [latent for group in groups for latent in group] == list(range(n))
    assert all(groups)


def test_shares_of_groups():
    assert [len(group) for group in groups_of(64, list(GROUP_SHARES))] == [2, 4, 8, 16, 34]
    with pytest.raises(ValueError, match=r"the shares add up to 0.9: they must add up to 1"):
        TrainConfig(group_shares=[0.5, 0.4])


def test_one_group_is_batchtopk():
    """With one group the loss and every gradient are BatchTopK's."""
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).double()
    step = StepInfo(dead=torch.arange(60) < 9)
    ours, plain = (make(name, 16, 60, group_shares=[1.0]).double() for name in ("matryoshka", "batchtopk"))
    found, expected = ours.loss_and_grads(x, x, step), plain.loss_and_grads(x, x, step)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}
    )
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


class Tree:
    """Rows in which each child feature appears only together with its parent."""

    def __init__(self, parents: int = 6, children: int = 5, d: int = 32, seed: int = 0):
        self.generator = torch.Generator().manual_seed(1000 + seed)
        features = unit_rows(torch.randn(parents * (1 + children), d, generator=self.generator))
        self.parents, self.children = features[:parents], features[parents:]

    def rows(self, b: int) -> torch.Tensor:
        parents, each = len(self.parents), len(self.children) // len(self.parents)
        on = torch.rand(b, parents, generator=self.generator) < 0.25
        with_child = on & (torch.rand(b, parents, generator=self.generator) < 0.5)
        child = torch.randint(0, each, (b, parents), generator=self.generator)
        child_on = torch.nn.functional.one_hot(child, each) * with_child.unsqueeze(2)
        return on.float() @ self.parents + child_on.flatten(1).float() @ self.children


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_first_group_finds_the_general_features(seed):
    """Six latents that must reconstruct alone become the six general features. BatchTopK's first six do not.

    Alone, a latent reconstructs best with the mean row of its parent: the parent and half of the mean of its children.
    """
    found = {}
    for architecture in ("matryoshka", "batchtopk"):
        tree = Tree(seed=seed)
        sae = make(architecture, 32, 96, k=3, group_shares=[6 / 96, 90 / 96], seed=seed)
        train(sae, tree, steps=3000, learning_rate=3e-3)
        dictionary = sae.folded().decoder()
        general = unit_rows(tree.parents + 0.5 * tree.children.unflatten(0, (6, -1)).mean(1))
        found[architecture] = mmcs(general, dictionary[:6])
        assert mmcs(tree.children, dictionary) >= 0.85
    assert found["matryoshka"] >= 0.95
    assert found["batchtopk"] <= 0.6
