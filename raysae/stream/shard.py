"""Producing shards: shard i at a hook point is a pure function of (spec, hook point, i)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from raysae.determinism import Scalar, device_facts
from raysae.kernels.rows import norm_limit
from raysae.stream.blocks import as_array, cut
from raysae.stream.spec import ActivationSpec

if TYPE_CHECKING:
    from raysae.lm.model import LanguageModel
    from raysae.stream.cache import BlockCache
    from raysae.text.contexts import Contexts


def numerics(lm: LanguageModel) -> dict[str, Scalar]:
    """What the bits of a shard depend on beside its spec, flat and readable.

    These facts are in the cache's key. They go with every block into the fingerprint of the SAEs that are trained on
    it. numpy is among them because it permutes the contexts of an epoch and the rows of a shard.
    """
    return {
        **device_facts(lm.device),
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "attention": lm.attention,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


class ShardMaker:
    """Makes the shards of a spec at some hook points, or reads them from the cache.

    It takes one forward pass of the language model per shard. Shard i has the contexts `spec.contexts_of(i)`. Their
    positions from `skip_positions` on are laid end to end. The rows of the shard are these positions in the order
    `spec.order_of(i, kept(i))`, which is `spec.permutation_of(i)` where no row is left out. Neither the other hook
    points nor the shards made before change a bit of a shard.
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
            raise ValueError(
                f"the contexts ({contexts.digest}, {contexts.tokens.shape}) are not those of the spec ({spec.text})"
            )
        self.lm = lm
        self.contexts = contexts
        self.spec = spec
        self.hook_points = list(dict.fromkeys(hook_points))
        self.block_mib = block_mib
        self.cache = cache
        self._judged: tuple[int, np.ndarray] | None = None  # The shard judged last, and which of its rows are kept

    def make(self, shard: int) -> tuple[dict[str, object], dict[str, list[np.ndarray]]]:
        """Shard `shard` as (meta, blocks per hook point).

        Meta holds:

        - `index`: the shard's index.
        - `contexts_forwarded`: contexts that the language model read, 0 if everything was cached.
        - `rows_left_out`: rows that were left out, 0 if everything was cached.
        - `from_cache`: whether everything was cached.
        - `seconds`: the time it took.
        - `nonfinite`: the hook points at which some activation is NaN or infinite.
        - `nonfinite_contexts`: the contexts that have such an activation.
        - `numerics`: what its bits depend on beside the spec.

        Raises:
            IndexError: the spec has no such shard.
            RuntimeError: the language model failed. The message names the contexts.
            ValueError: all rows of the shard are left out.
        """
        self._check(shard)
        started = time.perf_counter()
        made = {
            hook: kept for hook in self.hook_points if self.cache and (kept := self.cache.load(hook, shard)) is not None
        }
        missing = [hook for hook in self.hook_points if hook not in made]
        bad: dict[str, list[int]] = {}
        if missing:
            produced, bad = self._produce(shard, missing)
            made |= produced
            for hook, rows in produced.items():
                if self.cache and not bad[hook]:  # A broken shard may come out right another time
                    self.cache.store(hook, shard, rows)
        meta = {
            "index": shard,
            "contexts_forwarded": self.spec.shard_contexts if missing else 0,
            "rows_left_out": int((~self.kept(shard)).sum()) if missing else 0,
            "from_cache": not missing,
            "seconds": time.perf_counter() - started,
            **_nonfinite(bad),
            "numerics": numerics(self.lm),
        }
        return meta, {hook: cut(made[hook], self.spec.dtype, self.block_mib) for hook in self.hook_points}

    def unpermuted(self, shard: int) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        """The shard before any row is left out or moved, as (meta, rows (rows_per_shard, width) by hook point).

        Meta holds `nonfinite`, `nonfinite_contexts` and `numerics`, as in `make`. The cache is not used.
        """
        self._check(shard)
        rows, bad, norms = self._read(shard, self.hook_points, np.arange(self.spec.rows_per_shard))
        self._judge(shard, norms)
        return {**_nonfinite(bad), "numerics": numerics(self.lm)}, rows

    def kept(self, shard: int) -> np.ndarray:
        """Which of the shard's rows are not left out, *unpermuted*, (rows_per_shard,) bool.

        Left out are rows at padding, at the tokens `spec.leave_out_tokens`, and of a norm above `spec.leave_out_norm`
        times the median norm of the shard's other rows. To judge norms takes a forward pass, unless this shard was the
        last one made here.
        """
        self._check(shard)
        if self._judged is None or self._judged[0] != shard:
            self._judge(shard, self._read(shard, [], None)[2] if self.spec.leave_out_norm else None)
        return self._judged[1]

    def annotations(self, shard: int, token_loss: bool = True) -> dict[str, np.ndarray]:
        """What the shard's rows stand for, *unpermuted*.

        Each array is `(rows_per_shard,)`. Row r of the stream's shard is its entry `spec.order_of(shard, kept)[r]`.

        - `token`: the token's id.
        - `position`: its position in its context.
        - `context`: the context's index in the text.
        - `kept`: whether the row is not left out, see `kept`.
        - `token_loss`: the language model's loss in nats of the prediction made at this position, of the token after
          it. NaN at the last position and before padding. It takes a whole forward pass.
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
            "kept": self.kept(shard),
        }
        if token_loss:
            losses = [
                self.lm.activations(batch.to(self.lm.device), [], token_loss=True)["token_loss"]
                for batch in self._batches(tokens)
            ]
            of_next = torch.cat([F.pad(loss[:, 1:].float(), (0, 1), value=torch.nan).cpu() for loss in losses])
            padded = torch.from_numpy(~self.contexts.real(indices)[:, 1:])
            of_next[:, :-1].masked_fill_(padded, torch.nan)
            found["token_loss"] = of_next[:, spec.skip_positions :].reshape(-1).numpy()
        return found

    def _produce(self, shard: int, hook_points: list[str]) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
        """By hook point: the shard's rows in the wire format, and the contexts with activations that are not finite."""
        spec = self.spec
        permutation = spec.permutation_of(shard)
        place = np.empty_like(permutation)  # Where each row of the contexts laid end to end goes
        place[permutation] = np.arange(len(permutation))
        rows, bad, norms = self._read(shard, hook_points, place)
        kept = self._judge(shard, norms)
        if not kept.all():
            order = spec.order_of(shard, kept)
            away = np.flatnonzero(order != permutation)
            for of_hook in rows.values():
                of_hook[torch.from_numpy(away)] = of_hook[torch.from_numpy(place[order[away]])]
        return {hook: as_array(rows[hook]) for hook in hook_points}, bad

    def _read(
        self, shard: int, hook_points: list[str], place: np.ndarray | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[int]], torch.Tensor | None]:
        """One forward pass over the shard's contexts.

        Args:
            shard: index of the shard.
            hook_points: where activations are read.
            place: (rows_per_shard,), where each row of the contexts laid end to end goes. Unused without hook points.

        Returns:
            By hook point the rows (rows_per_shard, width) and the contexts with activations that are not finite. Last
            the norms (rows_per_shard,) float32 at `spec.leave_out_hook_point`, *unpermuted*, or None where
            `spec.leave_out_norm` is unset.
        """
        spec = self.spec
        judge = spec.leave_out_hook_point if spec.leave_out_norm else None
        asked = list(dict.fromkeys([*hook_points, *([judge] if judge else [])]))
        rows: dict[str, torch.Tensor] = {}
        bad: dict[str, list[int]] = {hook: [] for hook in hook_points}
        norms: list[torch.Tensor] = []
        targets = None if place is None else torch.from_numpy(place).view(spec.shard_contexts, -1)
        for first, indices, activations in self._passes(shard, asked):
            if judge:
                at = activations[judge][:, spec.skip_positions :]
                norms.append(torch.linalg.vector_norm(at, dim=-1, dtype=torch.float32).flatten().cpu())
            for hook in hook_points:
                # (c, t - skip, width)
                kept = activations[hook][:, spec.skip_positions :].to(getattr(torch, spec.dtype))
                if hook not in rows:
                    rows[hook] = torch.empty(spec.rows_per_shard, kept.shape[-1], dtype=kept.dtype)
                # NaN if any activation is. This needs no temporary of the activations' size.
                extremes = torch.stack(torch.aminmax(kept))
                if not bool(torch.isfinite(extremes).all()):
                    bad[hook] += indices[~torch.isfinite(kept).flatten(1).all(1).cpu()].tolist()
                rows[hook][targets[first : first + len(indices)]] = kept.cpu()
        return rows, bad, torch.cat(norms) if judge else None

    def _passes(
        self, shard: int, hook_points: list[str]
    ) -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
        """Yields per forward pass the place of its first context in the shard, its contexts, and their activations."""
        first = 0
        for indices in torch.from_numpy(self.spec.contexts_of(shard)).split(self.spec.batch_contexts):
            try:
                tokens = torch.from_numpy(self.contexts[indices.numpy()]).to(self.lm.device)
                activations = self.lm.activations(tokens, hook_points)
            except Exception as error:
                among = ", ".join(map(str, indices.tolist()))
                raise RuntimeError(f"{type(error).__name__}: {error}, in one of the contexts {among}") from error
            yield first, indices, activations
            first += len(indices)

    def _judge(self, shard: int, norms: torch.Tensor | None) -> np.ndarray:
        """Which rows of the shard are kept, see `kept`, and note it. `norms` are those of `_read`."""
        spec = self.spec
        indices = spec.contexts_of(shard)
        left_out = np.isin(self.contexts[indices], spec.leave_out_tokens)
        kept = (self.contexts.real(indices) & ~left_out)[:, spec.skip_positions :].reshape(-1)
        if norms is not None and kept.any():
            kept &= ~(norms.numpy() > norm_limit(norms[torch.from_numpy(kept)], spec.leave_out_norm))
        self._judged = shard, kept
        return kept

    def _batches(self, tokens: np.ndarray) -> tuple[torch.Tensor, ...]:
        return torch.from_numpy(tokens).split(self.spec.batch_contexts)

    def _check(self, shard: int) -> None:
        if not 0 <= shard < self.spec.shards:
            raise IndexError(f"shard {shard} lies outside a pass of {self.spec.shards} shards")


def _nonfinite(bad: dict[str, list[int]]) -> dict[str, object]:
    """What meta says of the contexts with activations that are not finite, which are `bad` by hook point."""
    return {
        "nonfinite": [hook for hook, contexts in bad.items() if contexts],
        "nonfinite_contexts": sorted(set().union(*bad.values())),
    }
