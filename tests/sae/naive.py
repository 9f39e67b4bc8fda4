"""The training loss of every architecture, written from its definition in plain dense PyTorch.

Read this file to learn what each method does. One function holds one whole method, and autograd finds the gradients.
The modules of `raysae/sae` compute the same losses faster, with gradients written by hand for active latents only.
They must agree with this file. Tests compare losses and gradients of both in float64.

Every method encodes a row x into n pre-activations and keeps a few of them as its codes.
It decodes the codes to a reconstruction x̂ and minimises the squared error.
The methods differ in how they keep codes few:

- `topk` keeps the k largest pre-activations of each row.
- `batchtopk` keeps the b·k largest of a whole batch, so rows may use more or fewer than k.
- `matryoshka` selects like `batchtopk` and makes every prefix of the latents reconstruct x by itself.
- `relu` keeps all positive pre-activations and penalises their sum.
- `tied` does the same with one matrix for encoder and decoder.
- `jumprelu` keeps what exceeds a learned threshold per latent and penalises the number of active latents.
- `gated` has two sets of pre-activations: one decides which latents are active, the other how strongly.

A training step takes the loss and its gradients, then removes the gradient's component along each decoder row.
After the optimizer's update it rescales decoder rows to norm 1. The tied method needs neither.

Shapes, with b rows in a batch, activations of width d and n latents:

    x             (b, d)   activations, scaled so that the mean of ‖x‖² is d (raw activations for `tied`)
    W_enc, W_dec  (n, d)   one row per latent
    b_enc         (n,)     encoder bias
    b_dec         (d,)     decoder bias, subtracted before encoding and added back after decoding
    pre, codes    (b, n)   pre-activations and codes, zero where a latent is inactive
    dead          (n,)     bool, latents that have not been active for a long time
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int,
    dead: Tensor | None = None,
    k_aux: int = 0,
    aux_coefficient: float = 0.0,
) -> Tensor:
    """TopK (Gao et al. 2024, arXiv 2406.04093): the k largest pre-activations of each row, then ReLU."""
    pre = (x - b_dec) @ W_enc.T + b_enc  # (b, n)
    codes = dense_top(pre, k).relu()  # (b, n), at most k per row are positive
    error = x - (codes @ W_dec + b_dec)  # (b, d)
    return mean_square(error) + aux_coefficient * aux_k(error, pre, W_dec, dead, k_aux)


def batchtopk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int,
    dead: Tensor | None = None,
    k_aux: int = 0,
    aux_coefficient: float = 0.0,
) -> Tensor:
    """BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the b·k largest positive pre-activations of the batch.

    Rows compete in training only. At inference a fixed threshold selects, at which k latents are active on average.
    """
    pre = (x - b_dec) @ W_enc.T + b_enc  # (b, n)
    codes = batch_top(pre, k)  # (b, n), at most b·k are positive
    error = x - (codes @ W_dec + b_dec)  # (b, d)
    return mean_square(error) + aux_coefficient * aux_k(error, pre, W_dec, dead, k_aux)


def matryoshka(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int,
    prefixes: Sequence[int],
    dead: Tensor | None = None,
    k_aux: int = 0,
    aux_coefficient: float = 0.0,
) -> Tensor:
    """Matryoshka (Bussmann et al. 2025, arXiv 2503.17547): nested autoencoders that share latents.

    The first m latents reconstruct x without the others, for each m of `prefixes`. The last prefix is the full width n.
    Early latents therefore learn general features, and late ones add detail. AuxK fits the full reconstruction's error.
    """
    assert prefixes[-1] == len(W_dec)
    pre = (x - b_dec) @ W_enc.T + b_enc  # (b, n)
    codes = batch_top(pre, k)  # (b, n), selected once for all prefixes
    errors = [x - (codes[:, :m] @ W_dec[:m] + b_dec) for m in prefixes]  # (b, d) each
    squared_errors = sum(mean_square(error) for error in errors)  # unweighted
    return squared_errors + aux_coefficient * aux_k(errors[-1], pre, W_dec, dead, k_aux)


def relu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, sparsity: float, p: float = 1.0
) -> Tensor:
    """ReLU with an L1 penalty on the codes.

    Decoder rows have norm 1. Otherwise large rows with small codes would evade the penalty.
    With p below 1 (p-annealing, Karvonen et al. 2024, arXiv 2408.00113) weak codes cost more and strong ones less.
    """
    codes = ((x - b_dec) @ W_enc.T + b_enc).relu()  # (b, n)
    error = x - (codes @ W_dec + b_dec)  # (b, d)
    return mean_square(error) + sparsity * lp(codes, p).mean()


def lp(codes: Tensor, p: float, epsilon: float = 1e-3) -> Tensor:
    """Σ (c + ε)^p − ε^p of each row, (b,). With p = 1 this is the L1 norm. ε keeps the slope at 0 finite."""
    return ((codes + epsilon) ** p - epsilon**p).sum(1)


def tied(x: Tensor, W_dec: Tensor, b_enc: Tensor, sparsity: float, p: float = 1.0) -> Tensor:
    """The tied autoencoder (Cunningham et al. 2023, arXiv 2309.08600): ReLU and L1 with one matrix and no decoder bias.

    Encoder and decoder both use the rows of W_dec scaled to norm 1. The squared error is a mean over d as well as b.
    """
    features = W_dec / W_dec.norm(dim=1, keepdim=True)  # (n, d)
    codes = (x @ features.T + b_enc).relu()  # (b, n)
    error = x - codes @ features  # (b, d)
    return error.square().mean() + sparsity * lp(codes, p).mean()


def jumprelu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    log_threshold: Tensor,
    bandwidth: float,
    sparsity: float,
) -> Tensor:
    """JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): a latent is active above its own threshold θ.

    The penalty counts active latents. Codes and count jump at θ, so their true derivative for θ is zero or undefined.
    Within ε/2 of θ, the paper's equations 11 and 12 take −θ/ε for a code and −1/ε for the count instead.
    Here ε is `bandwidth`. Pre-activations get an ordinary gradient from active codes, and none from the count.
    """
    threshold = log_threshold.exp()  # θ, (n,), positive whatever the parameter is
    pre = (x - b_dec) @ W_enc.T + b_enc  # (b, n)
    active = (pre > threshold).to(pre)  # (b, n), 1 or 0
    near = ((pre - threshold).abs() < bandwidth / 2).to(pre)  # (b, n), 1 or 0
    codes = straight_through(pre * active, threshold, -threshold * near / bandwidth)  # (b, n)
    count = straight_through(active, threshold, -near / bandwidth).sum(1)  # (b,)
    error = x - (codes @ W_dec + b_dec)  # (b, d)
    return mean_square(error) + sparsity * count.mean()


def gated(
    x: Tensor,
    W_enc: Tensor,
    b_gate: Tensor,
    r_mag: Tensor,
    b_mag: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    coefficient: float,
) -> Tensor:
    """The gated autoencoder (Rajamanoharan et al. 2024, arXiv 2404.16014): a gate says whether, a magnitude how much.

    Both share W_enc up to a factor exp(r_mag) per latent. Each has its own bias, b_gate and b_mag. All three are (n,).
    The penalty acts on the gate alone, so it does not shrink the codes. The gate is a step and passes no gradient.
    Instead the gate learns from a third term: it reconstructs x itself, through a frozen copy of the decoder.
    Decoder rows have norm 1. Otherwise large rows with small gates would evade the penalty.
    """
    projected = (x - b_dec) @ W_enc.T  # (b, n)
    gate = projected + b_gate  # π_gate, (b, n)
    magnitude = r_mag.exp() * projected + b_mag  # π_mag, (b, n)
    codes = (gate > 0) * magnitude.relu()  # (b, n)
    error = x - (codes @ W_dec + b_dec)  # (b, d)
    penalty = gate.relu().sum(1).mean()
    gate_error = x - (gate.relu() @ W_dec.detach() + b_dec.detach())  # (b, d)
    return mean_square(error) + coefficient * penalty + mean_square(gate_error)


def mean_square(error: Tensor) -> Tensor:
    """Mean over rows of ‖error‖², for `error` (b, d). The square is summed over d."""
    return error.square().sum(1).mean()


def dense_top(values: Tensor, k: int) -> Tensor:
    """`values` (r, c) with all but the k largest of each row set to 0."""
    top = values.topk(k, dim=1)
    return torch.zeros_like(values).scatter(1, top.indices, top.values)


def batch_top(pre: Tensor, k: int) -> Tensor:
    """Codes (b, n): the b·k largest of all pre-activations `pre` (b, n), where they are positive."""
    return dense_top(pre.flatten()[None], k * len(pre)).relu().view_as(pre)


def aux_k(error: Tensor, pre: Tensor, W_dec: Tensor, dead: Tensor | None, k_aux: int) -> Tensor | float:
    """AuxK (Gao et al. 2024): the share of the error that dead latents fail to reconstruct, times d.

    Top-k selection gives no gradient to latents that it never selects. AuxK revives them with a task of their own.
    In each row the k_aux dead latents of largest pre-activation reconstruct the error e = x − x̂, taken as a constant.
    The result is d · ‖e − ê‖² / ‖e − ē‖², where ē is the batch mean of e. Without dead latents it is 0.
    Fast versions also give 0 where the error has no variance, as with one row. This one does not handle that case.
    """
    if dead is None or not dead.any():
        return 0.0
    error = error.detach()  # (b, d)
    k_aux = min(k_aux, int(dead.sum()))
    codes = dense_top(pre.masked_fill(~dead, -torch.inf), k_aux).relu()  # (b, n), zero at latents that are alive
    missed = (error - codes @ W_dec).square().sum()
    variance = (error - error.mean(0)).square().sum()
    return error.shape[1] * missed / variance


def straight_through(value: Tensor, parameter: Tensor, derivative: Tensor) -> Tensor:
    """`value` unchanged, with `derivative` added to its gradient with respect to `parameter`."""
    return value + derivative.detach() * (parameter - parameter.detach())


def penalty(sae, factor: float) -> dict[str, float]:
    """Coefficient and exponent of relu's and tied's penalty, at the stage of annealing that `sae` is at."""
    p, rescale = sae.stage[:2].tolist() if sae.annealed else (1.0, 1.0)
    return {"sparsity": sae.config.sparsity * factor * rescale, "p": p}


def loss(sae, p: dict[str, Tensor], x: Tensor, factor: float, dead: Tensor | None) -> Tensor:
    """The loss of `sae`'s architecture on `x`, with parameters `p` by name instead of its own.

    Args:
        sae: gives configuration only.
        p: a tensor for each of `sae.named_parameters()`.
        x: activations (b, d).
        factor: what the warm-up multiplies the sparsity coefficient with, 0 to 1.
        dead: dead latents (n,) for AuxK, or None for no AuxK.
    """
    config, train = sae.config, sae.train_config
    match config.architecture:
        case "topk":
            return topk(x, **p, k=config.k, dead=dead, k_aux=sae.k_aux, aux_coefficient=train.aux_coefficient)
        case "batchtopk":
            return batchtopk(x, **p, k=config.k, dead=dead, k_aux=sae.k_aux, aux_coefficient=train.aux_coefficient)
        case "matryoshka":
            prefixes = [group.stop for group in sae.groups]
            aux = {"dead": dead, "k_aux": sae.k_aux, "aux_coefficient": train.aux_coefficient}
            return matryoshka(x, **p, k=config.k, prefixes=prefixes, **aux)
        case "relu":
            return relu(x, **p, **penalty(sae, factor))
        case "tied":
            return tied(x, **p, **penalty(sae, factor))
        case "jumprelu":
            coefficient = sae.penalty_weight * config.sparsity * factor
            return jumprelu(x, **p, bandwidth=sae.bandwidth, sparsity=coefficient)
        case "gated":
            return gated(x, **p, coefficient=config.sparsity * factor)
        case other:
            raise ValueError(f"No naive loss is entered for {other!r}. Add a case here.")
