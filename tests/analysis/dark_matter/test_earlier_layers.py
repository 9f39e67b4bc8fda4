"""Which places analysis 8 reads, and when it has to ask the language model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raysae.analysis.dark_matter.earlier_layers import earlier_places


def lab(answer: bool | None) -> SimpleNamespace:
    """A lab with a model of all kinds. Its tasks answer `answer`, and None lets no task run."""

    def run(tasks: list) -> list[bool]:
        assert answer is not None, "nothing has to be asked"
        assert [task.arguments[1:] for task in tasks] == [("mlp_out.2", "attn_out.2")]
        return [answer]

    kinds = ["resid_pre", "resid_post", "attn_out", "mlp_out", "attn_z", "mlp_act"]
    facts = SimpleNamespace(kinds=kinds, digest="m", layers_with=lambda kind: range(4))
    plan = SimpleNamespace(facts=facts, config=SimpleNamespace(model=None))
    return SimpleNamespace(plan=plan, run=run, config=SimpleNamespace(resources=SimpleNamespace(producer_gpus=0)))


@pytest.mark.parametrize(
    ("sequential", "expected"), [(True, ["resid_post.1", "attn_out.2", "attn_z.2"]), (False, ["resid_post.1"])]
)
def test_before_an_mlp_comes_attention_in_sequential_blocks_alone(sequential: bool, expected: list[str]) -> None:
    assert earlier_places(lab(sequential), "mlp_out.2") == expected


@pytest.mark.parametrize("hook_point", ["resid_post.2", "resid_pre.2", "attn_out.2", "attn_z.2", "resid_pre.0"])
def test_elsewhere_the_model_is_not_asked(hook_point: str) -> None:
    places = earlier_places(lab(None), hook_point)
    assert hook_point not in places
    assert bool(places) == (hook_point != "resid_pre.0")
