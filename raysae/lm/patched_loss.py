"""Cross-entropy and KL of a language model whose activations give way to an SAE's reconstructions at a hook point.

Definitions. A context's first `skip` positions are left intact, and so are positions left out of the stream. At all
others the activation is replaced. Cross-entropy (CE, nats per token) and KL are taken over the predictions made *at* a
replaced position. These predict the tokens skip + 1 … t − 1.

- `ce_recovered` = (CE_mean − CE_sae) / (CE_mean − CE_clean). For CE_mean, every replaced activation is the mean over
  training rows.
- `ce_recovered_zero` is the same with zeros in place of the mean.
- Both are undefined (None) if the denominator is below 0.01 nats: there is nothing to recover.
- `kl` = KL(clean ‖ patched), mean per token.

Contexts go through in small batches. Each has one clean pass up to the hook point. Then each variant has one partial
pass from there up. On a CPU with small logits, each of torch's threads has batches of its own. Otherwise the threads
wait for each other in every operation, which costs a quarter of their time. The embedded model's logits are small in
this sense, GPT-2's are not.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from raysae.lm.model import LanguageModel

THREADS = 16  # Most threads with batches of their own. Each holds the logits of a batch several times
LEAST_DENOMINATOR = 0.01  # Nats below which there is nothing to recover
ROWS_AT_ONCE = 4096  # Rows given to an SAE at a time. Wide SAEs hold (rows, latents)


@dataclass(frozen=True)
class DownstreamSums:
    """Sums over predicted tokens, in float64. The sums of several shards add up with `+`, and `finish` divides.

    `clean`, `mean`, `zero` and `sae` are summed cross-entropies in nats. `sae` and `kl` are keyed by SAE.
    """

    tokens: int  # Predicted tokens
    clean: float
    mean: float
    zero: float
    sae: dict[str, float]
    kl: dict[str, float]

    def __add__(self, other: DownstreamSums) -> DownstreamSums:
        if self.sae.keys() != other.sae.keys():
            raise ValueError(f"sums over different SAEs do not add up: {sorted(self.sae)} and {sorted(other.sae)}")
        return DownstreamSums(
            self.tokens + other.tokens,
            self.clean + other.clean,
            self.mean + other.mean,
            self.zero + other.zero,
            {name: value + other.sae[name] for name, value in self.sae.items()},
            {name: value + other.kl[name] for name, value in self.kl.items()},
        )

    def finish(self) -> dict[str, dict[str, float | None]]:
        """Metrics by SAE.

        They are ce_recovered and ce_recovered_zero (None where undefined), and in nats per token kl, ce_clean, ce_sae,
        ce_mean and ce_zero.
        """
        clean, mean, zero = self.clean / self.tokens, self.mean / self.tokens, self.zero / self.tokens
        metrics = {}
        for name in self.sae:
            sae = self.sae[name] / self.tokens
            metrics[name] = {
                "ce_recovered": _recovered(mean, sae, clean),
                "ce_recovered_zero": _recovered(zero, sae, clean),
                "kl": self.kl[name] / self.tokens,
                "ce_clean": clean,
                "ce_sae": sae,
                "ce_mean": mean,
                "ce_zero": zero,
            }
        return metrics


def _recovered(ablated: float, sae: float, clean: float) -> float | None:
    return (ablated - sae) / (ablated - clean) if ablated - clean >= LEAST_DENOMINATOR else None


def downstream_metrics(
    lm: LanguageModel,
    tokens: Tensor,
    hook_point: str,
    saes: Mapping[str, Callable[[Tensor], Tensor]],
    mean: Tensor,
    skip: int,
    kept: Tensor | None = None,
) -> DownstreamSums:
    """Sums of the metrics above over the contexts of one shard.

    Args:
        lm: the language model.
        tokens: (c, t) token ids.
        hook_point: where the SAEs were trained.
        saes: functions by name. They take raw activations (rows, w) in float32 on the hook point's device and return
            reconstructions of the same shape. Several threads may call them at once.
        mean: (w,), mean activation over training rows.
        skip: how many first positions of each context are left intact, less than t − 1.
        kept: (c, t) bool, whether a position after the first `skip` is replaced. The caller sets False where the next
            token is padding, since that prediction must not count. Unset: all are replaced.

    Raises:
        ValueError: `skip` is out of range, there are no contexts, or no prediction is made at a replaced position.
    """
    length = tokens.shape[1]
    if not 0 <= skip < length - 1:
        raise ValueError(
            f"skip is {skip}, but contexts have {length} tokens: "
            f"give a number from 0 to {length - 2}, so that a replaced position predicts a token"
        )
    if not len(tokens):
        raise ValueError("there are no contexts to evaluate")
    replaced = torch.ones_like(tokens, dtype=torch.bool) if kept is None else kept
    at_once = lm.contexts_at_once(length)
    size = max(1, min(at_once, ROWS_AT_ONCE // length))
    pairs = zip(tokens.split(size), replaced[:, skip:].split(size), strict=True)
    batches = [(batch, of_batch) for batch, of_batch in pairs if bool(of_batch[:, :-1].any())]
    if not batches:
        raise ValueError("no prediction is made at a replaced position")
    # With larger logits one context fills the cache, and contexts of each thread's own would fill memory.
    apart = lm.device.type == "cpu" and at_once > 1
    threads = min(torch.get_num_threads(), len(batches), THREADS) if apart else 1
    free = SimpleQueue()
    for model in (lm, *(lm.twin() for _ in range(threads - 1))):
        free.put(model)

    def sums(batch: tuple[Tensor, Tensor]) -> DownstreamSums:
        model = free.get()
        try:
            return _batch_sums(model, *batch, hook_point, saes, mean)
        finally:
            free.put(model)

    with _mapping(threads) as each:
        return functools.reduce(operator.add, each(sums, batches))


@contextmanager
def _mapping(threads: int) -> Iterator[Callable]:
    """A `map` over `threads` threads, in each of which torch uses one thread.

    For one thread it is the plain `map`, in which torch uses all of its threads.
    """
    if threads == 1:
        yield map
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(before)  # BLAS has one number of threads for the whole process


@torch.no_grad()
def _batch_sums(
    lm: LanguageModel,
    tokens: Tensor,
    replaced: Tensor,
    hook_point: str,
    saes: Mapping[str, Callable[[Tensor], Tensor]],
    mean: Tensor,
) -> DownstreamSums:
    """The sums over contexts `tokens` (c, t). `replaced` (c, t − skip) bool tells which of the last positions are."""
    prefix = lm.prefix(tokens, hook_point)
    original = prefix.activation  # (c, t, w)
    skip = tokens.shape[1] - replaced.shape[1]
    replaced = replaced.to(original.device)
    counted = replaced[:, :-1]  # Predictions made at these positions
    rows = original[:, skip:][replaced].float()

    def patched(replacement: Tensor) -> Tensor:
        """Logits (c, t, V) with `replacement` (rows, w) or (w,) at the replaced positions."""
        activation = original.clone()
        activation[:, skip:][replaced] = replacement.expand_as(rows).to(original)
        return lm.resume(prefix, activation)

    predicted = tokens[:, skip + 1 :].to(original.device).unsqueeze(-1)

    def log_probability(logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1)[:, skip:-1]  # (c, t − 1 − skip, V). Cutting first would copy the logits

    def cross_entropy(log_probability: Tensor) -> float:
        return -log_probability.gather(-1, predicted).squeeze(-1)[counted].sum(dtype=torch.float64).item()

    clean_log_probability = log_probability(lm.resume(prefix, original))
    clean = cross_entropy(clean_log_probability)
    probability = clean_log_probability.exp()
    sae, kl = {}, {}
    for name, reconstruct in saes.items():
        found = log_probability(patched(reconstruct(rows)))
        sae[name] = cross_entropy(found)
        difference = torch.sub(clean_log_probability, found, out=found)
        kl[name] = torch.linalg.vecdot(probability, difference)[counted].sum(dtype=torch.float64).item()
    return DownstreamSums(
        tokens=int(counted.sum()),
        clean=clean,
        mean=cross_entropy(log_probability(patched(torch.as_tensor(mean)))),
        zero=cross_entropy(log_probability(patched(torch.zeros_like(rows[0])))),
        sae=sae,
        kl=kl,
    )
