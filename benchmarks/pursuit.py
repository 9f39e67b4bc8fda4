"""Tokens per second of pursuit against the definition computed densely, on all cores.

    python benchmarks/pursuit.py [--d 256] [--n 4096] [--l0 32] [--tokens 4096] [--repeats 5] [--threads 2]

The dense version holds weights (b, n) and takes three dense products per step. Its batch size comes first: the fastest
of several. Then the two alternate. So a disturbance of the machine meets both.

The GEMM bound is nothing but one dense product D·r per token and step. It takes its turn in the same alternation. A
share above 1 means that dense products were avoided.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # A job's processes set this too. Importing torch reads it.

import torch
from torch import Tensor

from raysae.analysis.dark_matter.measures.pursuit import Pursuit
from raysae.kernels.rows import unit_rows

BATCHES = (32, 64, 128, 256, 512, 1024)


def naive(x: Tensor, features: Tensor, steps: int) -> Tensor:
    """Dense weights (b, n) after `steps` steps, by the definition of analysis 7."""
    w, r = x.new_zeros(len(x), len(features)), x
    for _ in range(steps):
        scores = r @ features.T
        support = w != 0
        support.scatter_(1, scores.argmax(1, keepdim=True), True)
        g = scores.mul_(support)
        direction = g @ features
        denominator = direction.square().sum(1, keepdim=True)
        step = torch.where(denominator > 0, (direction * r).sum(1, keepdim=True) / denominator, 0)
        w = w.addcmul_(g, step).clamp_min_(0)
        r = x - w @ features
    return w


def rate(function: Callable[[], object], tokens: int) -> float:
    """Tokens per second of one call."""
    began = time.perf_counter()
    function()
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"d": 256, "n": 4096, "l0": 32, "tokens": 4096, "repeats": 5, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    features = unit_rows(torch.randn(options.n, options.d))
    active = torch.rand(options.tokens, options.n) * (
        torch.rand(options.tokens, options.n) < 1.5 * options.l0 / options.n
    )
    x = active @ features + 0.02 * torch.randn(options.tokens, options.d)
    pursue, steps = Pursuit(features), torch.full((options.tokens,), options.l0)

    codes = pursue(x[:256], steps[:256])
    dense = naive(x[:256], features, options.l0)
    difference = (pursue.decode(codes) - dense @ features).norm(dim=1) / x[:256].norm(dim=1)
    print(
        f"same reconstructions to 1e-4: {(difference < 1e-4).float().mean():.1%} of 256 tokens "
        "(the others met two latents equal to rounding)"
    )

    sample = x[:1024]
    trials = {b: [] for b in BATCHES}
    for _ in range(2):
        for b, rates in trials.items():
            rates.append(
                rate(
                    lambda b=b: [naive(part, features, options.l0) for part in sample[: max(b, 256)].split(b)],
                    max(b, 256),
                )
            )
    best = max(BATCHES, key=lambda b: max(trials[b]))

    scores = torch.empty(1024, options.n)
    contenders = {
        "ours": (lambda: pursue(x, steps), options.tokens),
        "naive": (lambda: [naive(part, features, options.l0) for part in sample.split(best)], len(sample)),
        "GEMM bound": (lambda: [torch.mm(sample, features.T, out=scores) for _ in range(options.l0)], len(sample)),
    }
    rates = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, (function, tokens) in contenders.items():
            rates[name].append(rate(function, tokens))
    print(
        f"d = {options.d}, n = {options.n}, L0 = {options.l0}, {options.threads} threads; "
        f"naive at batch {best}, the best of {BATCHES}"
    )
    for name, values in rates.items():
        print(f"{name:12s} {statistics.median(values):10,.0f} tokens/s   from {min(values):,.0f} to {max(values):,.0f}")
    for other in ("naive", "GEMM bound"):
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[other], strict=True)]
        print(f"ours / {other:12s} {statistics.median(ratios):6.2f}   from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
