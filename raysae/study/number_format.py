"""Settling `model.dtype` before anything starts, on a machine like those that producers run on."""

from __future__ import annotations

from raysae.config import SweepConfig, UserError
from raysae.lm.facts import ModelFacts
from raysae.lm.number_format import fast_formats, number_format
from raysae.processes import apart

ANSWER_SECONDS = 900.0  # Longest wait for a machine with a producer's resources. A cluster may have to start one.


def settled_dtype(config: SweepConfig, facts: ModelFacts) -> str:
    """The number format that the study's producers use.

    Where `model.dtype` is 'auto', this machine decides if Ray starts here. On a cluster a machine decides that has what
    a producer reserves. Its answer holds for all machines, even where they differ.

    Raises:
        UserError: the cluster has no machine for a producer.
    """
    wanted = number_format(config.model, facts, fast={facts.dtype})
    if wanted == "float32" or config.model.dtype != "auto":
        return wanted
    return number_format(config.model, facts, _fast_formats(config))


def _fast_formats(config: SweepConfig) -> frozenset[str]:
    from raysae.cluster.connect import connect, named_cluster

    gpus, address = config.resources.producer_gpus, named_cluster(config.resources.address)
    if address is None:
        return apart(fast_formats, True) if gpus else fast_formats(gpu=False)
    import ray

    connect(address, store_bytes=0)
    ask = ray.remote(fast_formats).options(num_cpus=config.resources.producer_cpus, num_gpus=gpus)
    try:
        return ray.get(ask.remote(bool(gpus)), timeout=ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise UserError(
            f"model.dtype is 'auto', and for {ANSWER_SECONDS / 60:.0f} minutes no machine of the cluster had room for "
            "a producer to ask it: set model.dtype, or lower resources.producer_cpus or resources.producer_gpus"
        ) from None
