"""The machines that producers run on settle `model.dtype`, and the study keeps what they say."""

import pytest
import ray

from raysae.config import SweepConfig, UserError
from raysae.lm.facts import model_facts
from raysae.study import number_format
from raysae.study.plan import plan
from tests.lm.test_number_format import folder  # noqa: F401


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of one machine, whose address a study names."""
    ray.init("local", include_dashboard=False, num_cpus=1, object_store_memory=80 * 2**20, log_to_driver=False)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    yield
    ray.shutdown()


def config_of(folder, **resources) -> SweepConfig:  # noqa: F811
    return SweepConfig.model_validate({"model": {"name": str(folder)}, "resources": resources})


def test_this_machine_settles_it_where_ray_starts_here(folder, monkeypatch):  # noqa: F811
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for fast, dtype in (({"bfloat16"}, "bfloat16"), (set(), "float32")):
        monkeypatch.setattr(number_format, "fast_formats", lambda gpu, fast=fast: fast)
        assert number_format.settled_dtype(config_of(folder), model_facts(config_of(folder).model)) == dtype


def test_the_settled_format_is_in_the_plans_config_and_in_the_specs(monkeypatch):
    monkeypatch.setattr("raysae.study.plan.settled_dtype", lambda config, facts: "bfloat16")
    settled = plan(SweepConfig.model_validate({"train": {"tokens": 1000}, "evaluation": {"rows": 1000}}))
    assert settled.config.model.dtype == settled.training.dtype == settled.evaluation.dtype == "bfloat16"


@pytest.mark.slow
def test_a_machine_of_the_cluster_settles_it_where_one_is_named(folder, cluster, monkeypatch):  # noqa: F811
    monkeypatch.setattr(number_format, "fast_formats", lambda gpu: frozenset({"bfloat16"} if not gpu else ()))
    facts = model_facts(config_of(folder).model)
    assert number_format.settled_dtype(config_of(folder, producer_cpus=1), facts) == "bfloat16"
    monkeypatch.setattr(number_format, "ANSWER_SECONDS", 1.0)
    with pytest.raises(UserError, match="no machine of the cluster had room for a producer"):
        number_format.settled_dtype(config_of(folder, producer_cpus=64), facts)
