"""Producing shards: shard i at a hook point is a pure function of (spec, hook point, i)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers

from raysae.determinism import Scalar, device_facts
from raysae.stream.blocks import as_array, cut
from raysae.stream.spec import ActivationSpec

if TYPE_CHECKING:
    from raysae.lm.model import LanguageModel
    from raysae.stream.cache import BlockCache
    from raysae.text.contexts import Contexts


def numerics(lm: LanguageModel) -> dict[str, Scalar]:
    """What the bits of a shard depend on beside its spec, flat and readable. They are in the cache's key, and go with every block into the
    fingerprint of the SAEs that are trained on it. numpy permutes the contexts of an epoch and the rows of a shard."""
    return {
        **device_facts(lm.device),
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "attention": lm.attention,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


class ShardMaker:
    """Makes the shards of a spec at some hook points with one forward pass of the language model per shard, or reads them from the cache.

    The contexts of shard i are those of `spec.contexts_of(i)`; their positions from `skip_positions` on, laid end to end, are its rows in the order
    `spec.permutation_of(i)`. Neither the companions of a hook point nor the shards made before change a bit of it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        contexts: Contexts,
        spec: ActivationSpec,
        hook_points: list[str],
        block_mib: float,
        cache: BlockCache | None = None,
    ):
        if (contexts.digest, *contexts.tokens.shape) != (spec.text, spec.contexts, spec.context_length):
            raise ValueError(f"the contexts ({contexts.digest}, {contexts.tokens.shape}) are not those of the spec ({spec.text})")
        self.lm = lm
        self.contexts = contexts
        self.spec = spec
        self.hook_points = list(dict.fromkeys(hook_points))
        self.block_mib = block_mib
        self.cache = cache

    def make(self, shard: int) -> tuple[dict[str, object], dict[str, list[np.ndarray]]]:
        """Shard `shard` as (meta, blocks per hook point).

        meta: `index`; `contexts_forwarded` by the language model (0 where everything was cached); `from_cache`; `seconds` it took; `nonfinite`, the
        hook points at which some activation is NaN or infinite, in the `nonfinite_contexts`; `numerics`, what else its bits depend on.
        """
        self._check(shard)
        started = time.perf_counter()
        made = {hook: kept for hook in self.hook_points if self.cache and (kept := self.cache.load(hook, shard)) is not None}
        missing = [hook for hook in self.hook_points if hook not in made]
        bad: dict[str, list[int]] = {}
        if missing:
            produced, bad = self._produce(shard, missing)
            made |= produced
            for hook, rows in produced.items():
                if self.cache and not bad[hook]:  # what is broken may come out right another time
                    self.cache.store(hook, shard, rows)
        meta = {
            "index": shard,
            "contexts_forwarded": self.spec.shard_contexts if missing else 0,
            "from_cache": not missing,
            "seconds": time.perf_counter() - started,
            "nonfinite": [hook for hook in missing if bad[hook]],
            "nonfinite_contexts": sorted(set().union(*bad.values())),
            "numerics": numerics(self.lm),
        }
        return meta, {hook: cut(made[hook], self.spec.dtype, self.block_mib) for hook in self.hook_points}

    def annotations(self, shard: int, token_loss: bool = True) -> dict[str, np.ndarray]:
        """What the shard's rows stand for, *unpermuted*: each array is `(rows_per_shard,)`, and row r of the stream's shard is its entry
        `spec.permutation_of(shard)[r]`.

        `token` is the token's id, `position` its position in its context, `context` the context's index in the text, and `token_loss`, which takes a
        whole forward pass, the language model's loss in nats in predicting this token from those before it.
        """
        self._check(shard)
        spec = self.spec
        indices = spec.contexts_of(shard)
        tokens = self.contexts[indices]  # (c, t)
        positions = np.arange(spec.skip_positions, spec.context_length)
        found = {
            "token": tokens[:, spec.skip_positions :].reshape(-1),
            "position": np.tile(positions, spec.shard_contexts),
            "context": np.repeat(indices, len(positions)),
        }
        if token_loss:
            losses = [self.lm.activations(part.to(self.lm.device), [], token_loss=True)["token_loss"] for part in self._batches(tokens)]
            found["token_loss"] = torch.cat([loss[:, spec.skip_positions :].float().cpu() for loss in losses]).reshape(-1).numpy()
        return found

    def _produce(self, shard: int, hook_points: list[str]) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
        """Per hook point the shard's rows in the wire format, and the contexts with an activation that is not finite."""
        spec = self.spec
        place = torch.empty(spec.rows_per_shard, dtype=torch.int64)  # where each row of the contexts laid end to end goes
        place[torch.from_numpy(spec.permutation_of(shard))] = torch.arange(spec.rows_per_shard)
        places = place.view(spec.shard_contexts, -1).split(spec.batch_contexts)
        rows: dict[str, torch.Tensor] = {}
        bad: dict[str, list[int]] = {hook: [] for hook in hook_points}
        contexts = torch.from_numpy(spec.contexts_of(shard)).split(spec.batch_contexts)
        for indices, target in zip(contexts, places, strict=True):
            try:
                activations = self.lm.activations(torch.from_numpy(self.contexts[indices.numpy()]).to(self.lm.device), hook_points)
            except Exception as error:
                raise RuntimeError(f"{type(error).__name__}: {error}, in one of the contexts {', '.join(map(str, indices.tolist()))}") from error
            for hook in hook_points:
                kept = activations[hook][:, spec.skip_positions :].to(getattr(torch, spec.dtype))  # (c, t - skip, width)
                if hook not in rows:
                    rows[hook] = torch.empty(spec.rows_per_shard, kept.shape[-1], dtype=kept.dtype)
                extremes = torch.stack(torch.aminmax(kept))  # NaN if any is; needs no temporary of the activations' size
                if not bool(torch.isfinite(extremes).all()):
                    bad[hook] += indices[~torch.isfinite(kept).flatten(1).all(1).cpu()].tolist()
                rows[hook][target] = kept.cpu()
        return {hook: as_array(rows[hook]) for hook in hook_points}, bad

    def _batches(self, tokens: np.ndarray) -> tuple[torch.Tensor, ...]:
        return torch.from_numpy(tokens).split(self.spec.batch_contexts)

    def _check(self, shard: int) -> None:
        if not 0 <= shard < self.spec.shards:
            raise IndexError(f"shard {shard} of a pass of {self.spec.shards}")
