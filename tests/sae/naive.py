"""The losses of every architecture written down plainly and densely, for autograd to differentiate: what the fast versions must equal."""

from __future__ import annotations

import torch
from torch import Tensor


class Step(torch.autograd.Function):
    """1 where x > θ, with the straight-through derivative −K((x − θ)/ε)/ε for θ and none for x."""

    @staticmethod
    def forward(ctx, x, threshold, bandwidth):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return (x > threshold).to(x)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() / ctx.bandwidth < 0.5).to(x)
        return None, (-near * grad / ctx.bandwidth).sum(0), None


class JumpReLU(torch.autograd.Function):
    """x where x > θ, with the straight-through derivative −θ·K((x − θ)/ε)/ε for θ."""

    @staticmethod
    def forward(ctx, x, threshold, bandwidth):
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return x * (x > threshold)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() / ctx.bandwidth < 0.5).to(x)
        return grad * (x > threshold), (-threshold * near * grad / ctx.bandwidth).sum(0), None


def dense_top(values: Tensor, k: int) -> Tensor:
    """`values` with all but the k largest of each row set to 0."""
    top = values.topk(k, dim=1)
    return torch.zeros_like(values).scatter(1, top.indices, top.values)


def loss(sae, p: dict[str, Tensor], x: Tensor, factor: float, dead: Tensor | None) -> Tensor:
    """The loss of `sae`'s architecture with the parameters `p` on `x` (b, d)."""
    config, train = sae.config, sae.train_config
    if config.architecture == "tied":
        rows = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
        codes = (x @ rows.T + p["b_enc"]).relu()
        return (x - codes @ rows).square().mean() + config.sparsity * factor * codes.sum(1).mean()
    pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    penalty = 0.0
    if config.architecture == "topk":
        codes = dense_top(pre, config.k).relu()
    elif config.architecture == "batchtopk":
        codes = dense_top(pre.flatten()[None], config.k * len(x)).relu().view_as(pre)
    elif config.architecture == "relu":
        codes = pre.relu()
        penalty = config.sparsity * factor * codes.sum(1).mean()
    else:
        threshold = p["log_threshold"].exp()
        codes = JumpReLU.apply(pre, threshold, train.bandwidth)
        penalty = config.sparsity * factor * Step.apply(pre, threshold, train.bandwidth).sum(1).mean()
    x_hat = codes @ p["W_dec"] + p["b_dec"]
    total = (x - x_hat).square().sum(1).mean() + penalty
    if dead is not None:
        error = (x - x_hat).detach()
        dead_pre = pre.masked_fill(~dead, -torch.inf)
        k_aux = min(sae.k_aux, int(dead.sum()))
        top = dead_pre.topk(k_aux, dim=1)
        aux_codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        missed = (error - aux_codes @ p["W_dec"]).square().sum()
        total = total + train.aux_coefficient * sae.d * missed / (error - error.mean(0)).square().sum()
    return total
