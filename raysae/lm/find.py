"""Find the modules of a language model by what they compute, on a random twin of it (see `twin`).

One forward pass records what every module takes and gives. From that record follow:

- the blocks: the longest `ModuleList` whose elements hand one tensor (c, t, d) on to the next,
- the parts of a block: one or two modules inside it with out − in = f·a + g·b, the outermost ones,
- attention: the part that mixes positions if the block's input changes at one position,
- post-norms: modules without a matrix that take what another module gave,
- output projections: the last module with a two-dimensional weight that gives what its part gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raysae.lm.hooks import Look, Site, given, hooked, taken

EXACT = 1e-3  # Error of a sum in units of its smaller part. Rounding gives 1e-5, another module 0.1 and more
LEAST_PART = 1e-3  # A part that is smaller in units of the sum does not count
MIXES = 1e-4  # Least change of a part at other positions, in units of the part
SAME_DIRECTION = 1e-4  # Largest angle between what a block hands on and what the next one takes


@dataclass(frozen=True)
class Call:
    """One call of a module, with copies of its tensors on the CPU."""

    path: str  # From the model
    taken: Tensor | None
    given: Tensor | None
    order: int  # When it ended
    extras: int | None  # How many elements follow `given` in a tuple. None if the tensor is alone

    @property
    def depth(self) -> int:
        return self.path.count(".")


Record = dict[str, Call]  # The modules that a pass called exactly once, by path


@torch.no_grad()
def record(model: nn.Module, tokens: Tensor, looks: Iterable[tuple[Site, Look]] = ()) -> Record:
    """What every module took and gave in a forward pass over `tokens` (c, t), in which `looks` may replace tensors."""
    calls: dict[str, list[Call]] = {name: [] for name, _ in model.named_modules()}
    entered: dict[str, Tensor | None] = {}
    handles = []

    def copy(tensor: Tensor | None) -> Tensor | None:
        return tensor.to("cpu", copy=True) if tensor is not None and tensor.is_floating_point() else None

    def watch(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            entered[name] = copy(taken(args, kwargs)[0])

        def after(module: nn.Module, args: tuple, output: object) -> None:
            extras = len(output) - 1 if isinstance(output, (tuple, list)) else None
            order = sum(map(len, calls.values()))
            calls[name].append(Call(name, entered.pop(name, None), copy(given(output)), order, extras))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    try:
        with hooked(looks, tokens.shape):
            for name, module in model.named_modules():
                watch(name, module)
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[0] for name, found in calls.items() if len(found) == 1}


def find_blocks(model: nn.Module, seen: Record, shape: tuple[int, int]) -> str | None:
    """Path of the list of decoder blocks, or None if no list hands one tensor (c, t, d) on."""
    found = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _hands_on(name, len(module), seen, shape)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _hands_on(name: str, length: int, seen: Record, shape: tuple[int, int]) -> bool:
    calls = [seen.get(f"{name}.{i}") for i in range(length)]
    for call in calls:
        if call is None or call.taken is None or call.given is None:
            return False
        if call.taken.shape != call.given.shape or call.taken.dim() != 3 or call.taken.shape[:2] != shape:
            return False
    return all(
        torch.cosine_similarity(a.given.flatten(), b.taken.flatten(), dim=0) > 1 - SAME_DIRECTION
        for a, b in pairwise(calls)
    )


# ---------------------------------------------------------------- what a block adds


class Part(NamedTuple):
    """A module whose output, times `factor`, a block adds to the residual stream."""

    call: Call
    factor: float


def find_parts(seen: Record, block: str, named: tuple[str, ...] = ()) -> list[Part]:
    """The one or two outermost modules of a block that add up to out − in, in the order in which they ran.

    Args:
        seen: the record of a pass.
        block: the block's path.
        named: paths of modules that must be among them.
    """
    whole = seen[block]
    added = (whole.given - whole.taken).double().flatten()
    must = [seen[path] for path in named]
    candidates = must + [call for call in _candidates(seen, block, whole) if call.path not in named]
    vectors = torch.stack([call.given.double().flatten() for call in candidates]) if candidates else added[None, :0]
    least = len(must)
    for depth in sorted({call.depth for call in candidates}):
        near = [i for i, call in enumerate(candidates) if call.depth <= depth or i < least]
        for count in (2, 1):
            for chosen in combinations(near, count):
                if set(range(least)) <= set(chosen) and (factors := _fit(vectors[list(chosen)], added)):
                    parts = [Part(candidates[i], factor) for i, factor in zip(chosen, factors, strict=True)]
                    return sorted(parts, key=lambda part: part.call.order)
    return []


def find_summed(seen: Record, block: str, norms: set[str]) -> tuple[list[Part], tuple[str, str]] | None:
    """The two parts of a block that norms after adding, in the order in which they ran, and the paths of its norms.

    Args:
        seen: the record of a pass.
        block: the block's path.
        norms: paths of modules that may be norms.
    """
    whole = seen[block]
    near = _candidates(seen, block, whole)
    able = [c for c in _inside(seen, block) if c.path in norms and like(c.given, whole.given) and c.taken is not None]
    for last in (call for call in able if same(call.given, whole.given)):
        for first in (call for call in able if call.order < last.order):
            parts = []
            for entering, norm in ((whole.taken, first), (first.given, last)):
                added = (norm.taken - entering.view(norm.taken.shape)).double().flatten()
                fits = ((c, _fit(c.given.double().view(1, -1), added)) for c in near if c.order < norm.order)
                parts += [Part(call, factors[0]) for call, factors in fits if factors][:1]
            if len(parts) == 2:
                return parts, (first.path, last.path)
    return None


def _candidates(seen: Record, block: str, whole: Call) -> list[Call]:
    """Modules of a block that give a tensor like the block's. Of those that give the same one, the outermost."""
    inside = [call for call in _inside(seen, block) if like(call.given, whole.given) and call.given.isfinite().all()]
    kept: list[Call] = []
    for call in sorted(inside, key=lambda call: (call.depth, call.order)):
        others = (whole.given, whole.taken, *(other.given for other in kept))
        if call.given.any() and not any(same(call.given, other) for other in others):
            kept.append(call)
    return kept


def _inside(seen: Record, block: str) -> list[Call]:
    return [call for path, call in seen.items() if path.startswith(f"{block}.") and call.given is not None]


def like(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is (c, t, d) as `whole`, or (c · t, d)."""
    return tensor.shape in (whole.shape, (whole.shape[0] * whole.shape[1], whole.shape[2]))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same elements in the same order."""
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def _fit(vectors: Tensor, added: Tensor) -> list[float] | None:
    """Factors with which vectors (n, k) add up to `added` (k,), or None if they do not."""
    gram = vectors @ vectors.T
    if torch.linalg.matrix_rank(gram, rtol=1e-9) < len(gram):
        return None
    factors = torch.linalg.solve(gram, vectors @ added)
    parts = factors[:, None] * vectors
    smaller = parts.norm(dim=1).min()
    if smaller < LEAST_PART * added.norm() or (parts.sum(0) - added).norm() > EXACT * smaller:
        return None
    return [1.0 if abs(factor - 1) < EXACT else float(f"{factor:.5g}") for factor in factors.tolist()]


def mixing(model: nn.Module, tokens: Tensor, seen: Record, blocks: str) -> set[str]:
    """Paths of the modules whose output changes at other positions if their block's input changes at position 0."""
    generator = torch.Generator().manual_seed(0)
    looks = []
    for i, block in enumerate(model.get_submodule(blocks)):
        entering = seen[f"{blocks}.{i}"].taken.clone()
        noise = torch.randn(entering[:, 0].shape, generator=generator)
        entering[:, 0] += entering[:, 0].norm() / noise.norm() * noise
        looks.append((Site(block, "input"), lambda _, entering=entering: entering))
    moved = record(model, tokens, looks)
    found = set()
    for path, call in seen.items():
        if call.given is None or path not in moved or call.given.shape != moved[path].given.shape:
            continue
        if call.given.numel() % tokens.numel() == 0:
            before, after = (c.given.reshape(*tokens.shape, -1)[:, 1:] for c in (call, moved[path]))
            if (before - after).norm() > MIXES * before.norm():
                found.add(path)
    return found


# ---------------------------------------------------------------- inside a part


def projection(model: nn.Module, seen: Record, block: str, part: Call) -> str | None:
    """Path of a part's output projection, or None if no projection gives what the part gives below its post-norms."""
    computes = below_norms(model, seen, block, part)
    found = [
        call
        for call in _inside(seen, block)
        if same(call.given, computes.given) and projects(model.get_submodule(call.path), call)
    ]
    return max(found, key=lambda call: call.order).path if found else None


def projects(module: nn.Module, call: Call) -> bool:
    """Whether a module multiplies each position with its one matrix."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2 or call.taken is None or call.given is None:
        return False
    return sorted(weight.shape) == sorted((call.taken.shape[-1], call.given.shape[-1]))


def below_norms(model: nn.Module, seen: Record, block: str, part: Call) -> Call:
    """The module whose output reaches `part` through nothing but norms and the like."""
    while part.taken is not None and norm_like(model.get_submodule(part.path)):
        below = [
            call
            for call in _inside(seen, block)
            if call.order < part.order and not call.path.startswith(f"{part.path}.") and same(call.given, part.taken)
        ]
        if not below:
            break
        part = min(below, key=lambda call: (call.depth, call.order))
    return part


def norm_like(module: nn.Module) -> bool:
    """Whether a module has no matrix, as norms and dropouts have none."""
    return all(weight.dim() < 2 for weight in module.parameters())
