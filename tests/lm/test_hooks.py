"""What hooks give back to a model: the kinds of results that modules have."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from raysae.lm.hooks import Site, hooked


class Named(NamedTuple):
    states: Tensor
    other: str


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> object:
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda x: x, lambda output: output),
        (lambda x: (x, "other"), lambda output: output[0]),
        (lambda x: [x, "other"], lambda output: output[0]),
        (lambda x: Named(x, "other"), lambda output: output.states),
        (lambda x: x.flatten(0, 1), lambda output: output),
    ],
)
def test_a_replaced_result_is_of_the_modules_own_kind(make, first):
    module, x, seen = Returns(make), torch.ones(2, 3, 4), []
    with hooked([(Site(module, "output", factor=0.5), lambda h: seen.append(h) or torch.full_like(h, 3))], (2, 3)):
        output = module(x)
    assert type(output) is type(make(x))
    assert torch.equal(seen[0], torch.full((2, 3, 4), 0.5))
    assert torch.equal(first(output), torch.full_like(first(make(x)), 6))  # The block halves it again
    if not isinstance(output, Tensor):
        assert output[1] == "other"
