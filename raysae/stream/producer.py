"""The actor that owns a language model. It produces shards and evaluates SAEs in the model.

`queue.StreamQueue` creates and calls it. Importing this module imports neither torch nor transformers, so the queue,
which imports it, stays light.
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
    """What a producer needs to know. It is the same for all producers of a sweep.

    `specs` and `contexts` are keyed by stream name. The contexts lie in the object store, once per machine. The values
    here are references to them, each pickled by itself. That keeps the contexts as long as the driver lives, and so for
    a restarted queue too. `threads` counts CPU threads. Unset: torch's default.
    """

    model: ModelConfig
    stream: StreamConfig
    specs: Mapping[str, ActivationSpec]
    contexts: Mapping[str, bytes]
    widths: Mapping[str, int]  # Hook point → width, in the order of the blocks
    threads: int | None = None


class Producer:
    """A language model on the device that Ray has assigned to this process.

    A mistake of the user's that shows while it starts is raised by `ping`. Raised here it would reach the pool as text.
    """

    def __init__(self, production: Production):
        self._refusal: UserError | None = None
        try:
            self._start(production)
        except UserError as error:
            self._refusal = error

    def _start(self, production: Production) -> None:
        others = threads()  # Ray's threads

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
                    f"model.name is {production.model.name!r}, whose files on this machine differ from the driver's "
                    f"(digest {self.lm.facts.digest}, not {spec.model}): copy the driver's files to this machine"
                )
        self.contexts: dict[str, Contexts] = {
            name: ray.get(ray.cloudpickle.loads(ref)) for name, ref in production.contexts.items()
        }
        self.makers = {name: self._maker(name) for name in production.specs}
        if not gpu:
            be_nice(others)  # Only once the model is loaded, because trainers that start wait for the first shard

    def _maker(self, stream: str) -> ShardMaker:
        from raysae.stream.cache import open_cache
        from raysae.stream.shard import ShardMaker, numerics

        plan, spec = self.production, self.production.specs[stream]
        cache = open_cache(plan.stream, spec, plan.widths, numerics(self.lm))
        return ShardMaker(self.lm, self.contexts[stream], spec, list(plan.widths), plan.stream.block_mib, cache)

    def ping(self) -> tuple[int, str]:
        """The process id and the machine's id, once the model is loaded.

        Raises:
            UserError: it cannot be loaded, or its files differ from the driver's.
        """
        if self._refusal:
            raise self._refusal
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def produce(self, stream: str, shard: int, tolerant: bool = False) -> list:
        """A shard as [meta, *blocks of the first hook point, *blocks of the second, …].

        It is a pure function of the arguments, so any producer can repeat it.

        Args:
            stream: name of the stream.
            shard: index of the shard.
            tolerant: whether to accept activations that are NaN or infinite. Meta then says at which hook points they
                are. The other hook points can be used.

        Raises:
            ValueError: some activation is NaN or infinite, and `tolerant` is not set.
        """
        meta, blocks = self.makers[stream].make(shard)
        if meta["nonfinite"] and not tolerant:
            raise ValueError(nonfinite(meta))
        return [meta, *(block for hook in self.production.widths for block in blocks[hook])]

    def evaluate(
        self, stream: str, hook_point: str, saes: Mapping[str, str], mean: np.ndarray, predicted_tokens: int
    ) -> dict[str, dict]:
        """Cross-entropy and KL with the SAEs' reconstructions in place of the activations, by SAE.

        `downstream.DownstreamSums.finish` lists the metrics.

        Args:
            stream: name of a stream of held-out contexts. They are taken in the stream's order.
            hook_point: where the SAEs were trained.
            saes: folder or URL of each SAE, by name.
            mean: (width,), mean activation over training rows.
            predicted_tokens: how many predictions to judge at least, at rows that are not left out. A stream with
                fewer is judged whole.
        """
        import torch

        from raysae.lm.patched_loss import downstream_metrics
        from raysae.sae.base import share_buffers
        from raysae.sae.files import load_sae

        spec = self.production.specs[stream]
        tokens, kept = (
            torch.from_numpy(array).to(self.lm.device) for array in self._contexts_for(stream, predicted_tokens)
        )
        mean = torch.from_numpy(np.array(mean)).to(self.lm.device)
        with torch.no_grad():
            loaded = {name: load_sae(folder) for name, folder in saes.items()}
            share_buffers(loaded.values())
            functions = {name: _where_rows_are(sae) for name, sae in loaded.items()}
            return downstream_metrics(self.lm, tokens, hook_point, functions, mean, spec.skip_positions, kept).finish()

    def _contexts_for(self, stream: str, predictions: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream's first contexts with at least that many predictions at rows that are not left out.

        Returns:
            Token ids, and whether a position is replaced, (c, t) each.
        """
        contexts, maker = self.contexts[stream], self.makers[stream]
        taken: list[tuple[np.ndarray, np.ndarray]] = []
        for shard in range(maker.spec.shards):
            indices = maker.spec.contexts_of(shard)
            kept = np.zeros((len(indices), maker.spec.context_length), bool)
            kept[:, maker.spec.skip_positions :] = maker.kept(shard).reshape(len(indices), -1)
            kept = contexts.before_no_padding(indices, kept)
            made = kept[:, :-1].sum(1).cumsum()
            enough = int(np.searchsorted(made, predictions)) + 1
            taken.append((contexts[indices[:enough]], kept[:enough]))
            predictions -= int(made[-1])
            if predictions <= 0:
                break
        tokens, kept = (np.concatenate(arrays) for arrays in zip(*taken, strict=True))
        return tokens, kept


def nonfinite(meta: Mapping[str, object]) -> str:
    """What is wrong with a shard, in words."""
    contexts = ", ".join(map(str, meta["nonfinite_contexts"]))
    found = f"activations at {', '.join(meta['nonfinite'])} are NaN or infinite in contexts {contexts}"
    if meta["numerics"]["dtype"] == "float16":
        return f"{found}: model.dtype is float16, which holds at most 65,504, so set it to float32 or bfloat16"
    return found


def _where_rows_are(sae: SAE) -> Callable[[Tensor], Tensor]:
    """The SAE as a function that computes on the device of its rows.

    A model spread over GPUs has the activations of its layers on different devices.
    """
    return lambda rows: (sae if sae.W_enc.device == rows.device else sae.to(rows.device))(rows)
