"""Values that the config refuses by itself."""

import pytest

from raysae.config import SweepConfig


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"widths": [256, 512, 256]}, "widths has 256 twice"),
        ({"study": "../x"}, "no name for a folder"),
        ({"study": ".."}, "no name for a folder"),
        ({"model": {"name": ""}}, "at least 1 character"),
    ],
)
def test_knobs_that_say_nothing_sensible(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SweepConfig.model_validate(settings)


@pytest.mark.parametrize("uri", ["file:./runs", "./mlruns", "sqlite:/mlflow.db"])
def test_a_tracking_uri_that_mlflow_does_not_take_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///mlflow\.db, postgresql://"):
        SweepConfig.model_validate({"tracking": {"uri": uri}})
