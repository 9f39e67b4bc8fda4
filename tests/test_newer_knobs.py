"""Studies that are older than a knob.

A newer knob may change what a run does. An older study lacks it, and keeps the value that it ran with.
"""

from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from raysae.config import SweepConfig, TrainConfig, UserError, newer_knob
from raysae.knobs import completed, earlier, from_flat
from raysae.study import place
from raysae.study.place import saved_config
from raysae.train import checkpoint
from raysae.train.checkpoint import check_fingerprint


class Inner(BaseModel):
    old: int = 1
    new: float = newer_knob(0.2, before=1.0)


class Outer(BaseModel):
    inner: Inner = Inner()
    name: str = "a"


def test_an_older_study_gets_the_earlier_value_and_a_newer_one_keeps_its_own():
    assert earlier(Outer) == {"inner.new": 1.0}
    assert Outer.model_validate(completed(Outer, {"inner": {"old": 5}, "name": "b"})).inner == Inner(old=5, new=1.0)
    assert Outer.model_validate(completed(Outer, {"inner": {"old": 5, "new": 0.3}})).inner == Inner(old=5, new=0.3)
    assert Outer.model_validate(completed(Outer, {"name": "b"})).inner.new == 1.0, "a section may be missing as a whole"
    assert from_flat(Outer, {"inner.old": "3"}).inner == Inner(old=3, new=1.0)
    assert from_flat(Outer, {"inner.old": "3", "inner.new": "0.5"}).inner == Inner(old=3, new=0.5)


class NewerTrain(TrainConfig):
    anneal: float = newer_knob(0.2, before=1.0)


class NewerSweep(SweepConfig):
    train: NewerTrain = NewerTrain()


def saved(settings: dict[str, Any], folder: Any) -> str:
    (folder / "s").mkdir()
    (folder / "s" / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(folder)


def test_a_study_is_resumed_that_lacks_a_newer_knob(tmp_path, monkeypatch):
    output = saved(SweepConfig(study="s").model_dump(), tmp_path)
    monkeypatch.setattr(place, "SweepConfig", NewerSweep)
    assert saved_config(output, "s").train.anneal == 1.0


def test_a_study_from_before_the_papers_unit_keeps_the_saes_it_had(tmp_path):
    asked = {"architectures": ["jumprelu"], "hook_points": ["resid_post.0"], "widths": [64]}
    settings = SweepConfig(study="s", **asked).model_dump()
    settings["train"] |= {"beta1": 0.9, "bandwidth": 0.03}  # Such a study has all its knobs in its config
    del settings["train"]["jumprelu_unit"]
    config = saved_config(saved(settings, tmp_path), "s")
    assert [sae.sparsity for sae in config.saes()] == [0.03, 0.3, 3.0]
    assert (config.train.beta1, config.train.bandwidth, config.train.jumprelu_unit) == (0.9, 0.03, "sum")


def test_a_study_that_lacks_an_older_knob_is_damaged(tmp_path):
    settings = SweepConfig(study="s").model_dump()
    del settings["train"]["warmup"]
    with pytest.raises(UserError, match=r"train\.warmup is not in it"):
        saved_config(saved(settings, tmp_path), "s")


def test_a_checkpoint_without_the_knob_goes_on_where_it_has_the_earlier_value(monkeypatch):
    monkeypatch.setattr(checkpoint, "TrainConfig", NewerTrain)
    check_fingerprint("it", {"train.batch": 8}, {"train.batch": 8, "train.anneal": 1.0}, set())
    with pytest.raises(UserError, match=r"train.anneal \(was 1.0, is 0.2\)"):
        check_fingerprint("it", {"train.batch": 8}, {"train.batch": 8, "train.anneal": 0.2}, set())
    with pytest.raises(UserError, match=r"train.batch \(was None, is 8\)"):
        check_fingerprint("it", {}, {"train.batch": 8, "train.anneal": 1.0}, set())


@pytest.mark.parametrize("content", ["", "[1, 2]", "text", "train: null"])
def test_a_config_that_holds_no_knobs_is_damaged(content, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config.yaml is damaged, or of another version of raysae"):
        saved_config(str(tmp_path), "s")
