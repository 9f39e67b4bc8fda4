"""The actor that owns a language model: it produces shards and evaluates SAEs in the model. Created and called by `queue.StreamQueue`.

Importing this module imports neither torch nor transformers: the queue, which does, stays light.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import ray

from raysae.config import ModelConfig, StreamConfig, UserError
from raysae.processes import be_nice, threads
from raysae.stream.spec import ActivationSpec

if TYPE_CHECKING:
    from torch import Tensor

    from raysae.sae.base import SAE
    from raysae.stream.shard import ShardMaker
    from raysae.text.contexts import Contexts


@dataclass(frozen=True)
class Production:
    """What a producer needs to know, the same for all producers of a sweep.

    `specs` and `contexts` are by stream name. The contexts lie in the object store, once per machine; here are references to them, pickled by
    themselves, which keeps them for as long as the driver lives and so for a restarted queue too. `threads` are CPU threads; unset: torch's default.
    """

    model: ModelConfig
    stream: StreamConfig
    specs: Mapping[str, ActivationSpec]
    contexts: Mapping[str, bytes]
    widths: Mapping[str, int]  # of the hook points, in the order of the blocks
    threads: int | None = None


class Producer:
    """A language model on the device that Ray has assigned to this process."""

    def __init__(self, production: Production):
        others = threads()  # Ray's

        import torch

        from raysae.determinism import be_deterministic
        from raysae.lm.model import LanguageModel

        gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        if gpu:
            be_deterministic()
        if production.threads is not None:
            torch.set_num_threads(production.threads)
        self.production = production
        self.lm = LanguageModel.load(production.model, "cuda" if gpu else "cpu")
        for spec in production.specs.values():
            if spec.model != self.lm.facts.digest:
                raise UserError(
                    f"model.name is {production.model.name!r}: on this machine it is not what the driver has (its digest is {self.lm.facts.digest}, "
                    f"not {spec.model}): put the same files there"
                )
        self.contexts: dict[str, Contexts] = {name: ray.get(ray.cloudpickle.loads(ref)) for name, ref in production.contexts.items()}
        self.makers = {name: self._maker(name) for name in production.specs}
        if not gpu:
            be_nice(others)  # not before the model is loaded: trainers that start wait for the first shard

    def _maker(self, stream: str) -> ShardMaker:
        from raysae.stream.cache import open_cache
        from raysae.stream.shard import ShardMaker, numerics

        plan, spec = self.production, self.production.specs[stream]
        cache = open_cache(plan.stream, spec, plan.widths, numerics(self.lm))
        return ShardMaker(self.lm, self.contexts[stream], spec, list(plan.widths), plan.stream.block_mib, cache)

    def ping(self) -> tuple[int, str]:
        """The process id and the machine's id, once the model is loaded."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def produce(self, stream: str, shard: int, tolerant: bool = False) -> list:
        """[meta, *blocks of the first hook point, *blocks of the second, …]: a pure function of its arguments, so that any producer can repeat it.

        ValueError: some activation is NaN or infinite, unless `tolerant`: then meta says at which hook points, and the others can be used.
        """
        meta, blocks = self.makers[stream].make(shard)
        if meta["nonfinite"] and not tolerant:
            raise ValueError(nonfinite(meta))
        return [meta, *(block for hook in self.production.widths for block in blocks[hook])]

    def evaluate(self, stream: str, hook_point: str, saes: Mapping[str, str], mean: np.ndarray, predicted_tokens: int) -> dict[str, dict]:
        """Cross-entropy and KL with the SAEs' reconstructions in place of the activations, by SAE; see `downstream.DownstreamSums.finish`.

        Args:
            stream: of held-out contexts; they are taken in the stream's order.
            saes: folder or URL of each SAE, by name.
            mean: (width,), mean activation over training rows.
            predicted_tokens: at least this many predictions are judged, or all that the stream has.
        """
        import torch

        from raysae.lm.patched_loss import downstream_metrics
        from raysae.sae.base import share_buffers
        from raysae.sae.files import load_sae

        spec = self.production.specs[stream]
        predictions = spec.context_length - 1 - spec.skip_positions  # per context
        wanted = min(-(-predicted_tokens // predictions), spec.shards * spec.shard_contexts)
        shards = range(-(-wanted // spec.shard_contexts))
        indices = np.concatenate([spec.contexts_of(shard) for shard in shards])[:wanted]
        tokens = torch.from_numpy(self.contexts[stream][indices]).to(self.lm.device)
        mean = torch.from_numpy(np.array(mean)).to(self.lm.device)
        with torch.no_grad():
            loaded = {name: load_sae(folder) for name, folder in saes.items()}
            share_buffers(loaded.values())
            functions = {name: _where_rows_are(sae) for name, sae in loaded.items()}
            return downstream_metrics(self.lm, tokens, hook_point, functions, mean, spec.skip_positions).finish()


def nonfinite(meta: Mapping[str, object]) -> str:
    """What is wrong with a shard, in words."""
    return f"activations at {', '.join(meta['nonfinite'])} are NaN or infinite in contexts {', '.join(map(str, meta['nonfinite_contexts']))}"


def _where_rows_are(sae: SAE) -> Callable[[Tensor], Tensor]:
    """The SAE as a function that computes on the device of its rows: a model spread over GPUs has each layer's activations on another."""
    return lambda rows: (sae if sae.W_enc.device == rows.device else sae.to(rows.device))(rows)
