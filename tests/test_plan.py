"""The planner's model of cost (benchmarks/plan.py): what it counts and fits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raysae.config import ModelConfig
from raysae.lm.model import LanguageModel


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan", Path(__file__).parents[1] / "benchmarks" / "plan.py")
    module = sys.modules["plan"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_of_a_language_model_are_those_that_torch_counts(plan: ModuleType):
    """Torch counts attention as if every position saw all others, so twice of what is causal."""
    context, layer = 64, 1
    model = LanguageModel.load(ModelConfig()).model
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused one
    body = model.base_model
    body.layers = body.layers[: layer + 1]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        body(input_ids=torch.zeros(1, context, dtype=torch.long), use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "bmm" in str(op))
    weights = sum(count for op, count in counts.items() if "bmm" not in str(op))
    lm, _ = plan.language_model("embedded", layer, context)
    norms = 2 * sum(p.numel() for block in body.layers for p in block.parameters() if p.dim() == 1)  # their weights do not multiply matrices
    assert attention > 0
    assert lm.operations - norms == pytest.approx((weights + attention / 2) / context)
    assert lm.d == model.config.hidden_size


def test_a_planted_cost_is_found(plan: ModuleType):
    planted = np.array([2e-12, 0.0, 3e-11, 5e-10, 1e-4])
    features = [plan.of_step(*sizes) for sizes in plan.STEPS]
    found, error = plan.fit(features, list(np.array(features) @ planted))
    assert found == pytest.approx(planted, rel=1e-6, abs=1e-15)
    assert error < 1e-9
