"""Knobs as text and back, and the sentence for a value that does not fit."""

import pytest
from pydantic import ValidationError

from raysae.config import SAEConfig, SweepConfig, UserError
from raysae.knobs import explain, fields, flattened, from_flat, nested


def test_explain_names_what_is_missing_or_unknown():
    with pytest.raises(ValidationError) as error:
        SAEConfig(hook_point="resid_post.1", learning_rate=1e-3, k=8)
    assert explain(error.value) == "width is missing"
    with pytest.raises(ValidationError) as error:
        SAEConfig(hook_point="resid_post.1", learning_rate=1e-3, k=8, width=16, depth=3)
    assert explain(error.value) == "unknown key depth"
    with pytest.raises(ValidationError) as error:
        SAEConfig(hook_point="resid_post.1", learning_rate=1e-3, k=8, width=4)
    assert explain(error.value) == "k is 8, more than the width 4"


def test_flattened_and_nested_undo_each_other() -> None:
    knobs = dict(fields(SweepConfig))
    tree = {"widths": [8], "train": {"tokens": 5}, "model": {"modules": {"blocks": "h"}}}
    flat = dict(flattened(tree, knobs))
    assert flat == {"widths": [8], "train.tokens": 5, "model.modules": {"blocks": "h"}}, "a dict that is a value stays"
    assert nested(flat) == tree


def test_a_config_comes_back_from_text() -> None:
    """MLflow keeps a run's parameters as text. Names that are no knobs any more are passed over."""
    flat = {"train.tokens": "5000", "widths": "256,512", "model.modules.blocks": "h", "study": "None", "gone": "1"}
    config = from_flat(SweepConfig, flat)
    assert (config.train.tokens, config.widths, config.model.modules) == (5000, [256, 512], {"blocks": "h"})
    assert config.study is None
    with pytest.raises(UserError, match=r"^train\.tokens is -5: it must be greater than 0$"):
        from_flat(SweepConfig, {"train.tokens": "-5"})
