"""Hooks for the length of a forward pass: they read or replace tensors on their way through a module.

Blocks can also be passed over, so that they compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor, nn

Look = Callable[[Tensor], Tensor | None]  # Sees a tensor. Returns another in its place, or None to let it pass


class Stop(Exception):  # noqa: N818 - a signal, as StopIteration is
    """Raised by a hook to end the forward pass there."""


class Site(NamedTuple):
    """A place in a model: the tensor that enters or leaves a module. If a tuple leaves it, its first element counts.

    What is seen there is the tensor times `factor`.
    """

    module: nn.Module
    side: Literal["input", "output"]
    factor: float = 1.0


@contextmanager
def hooked(looks: Iterable[tuple[Site, Look]], shape: Sequence[int]) -> Iterator[None]:
    """Show each site's tensor to its function while this lasts. The function may replace the tensor or raise `Stop`.

    Args:
        looks: sites and their functions. A function sees (c, t, w), also where the model flattens to (c · t, w).
        shape: c and t.
    """
    with ExitStack() as stack:
        for site, look in looks:
            shown = partial(_shown, look, site.factor, tuple(shape))
            if site.side == "input":
                handle = site.module.register_forward_pre_hook(_on_input(shown), with_kwargs=True)
            else:
                handle = site.module.register_forward_hook(_on_output(shown))
            stack.callback(handle.remove)
        yield


def _shown(look: Look, factor: float, shape: tuple[int, ...], tensor: Tensor) -> Tensor | None:
    """What takes the place of `tensor`: a copy, because a block may add to it in place. None lets it pass."""
    seen = tensor.reshape(*shape, -1) if tensor.dim() == 2 else tensor
    new = look(seen if factor == 1 else seen * factor)
    if new is None:
        return None
    if new.shape != seen.shape:
        raise ValueError(f"the replacement has the shape {tuple(new.shape)}, the activation {tuple(seen.shape)}")
    return (new if factor == 1 else new / factor).to(tensor, copy=True).view(tensor.shape)


def taken(args: tuple, kwargs: dict) -> tuple[Tensor | None, str | None]:
    """The tensor that a module is called with, and its name where that is not the first positional argument."""
    if args and isinstance(args[0], Tensor):
        return args[0], None
    names = ["hidden_states", *kwargs]
    name = next((name for name in names if isinstance(kwargs.get(name), Tensor)), None)
    return (None, None) if name is None else (kwargs[name], name)


def given(output: object) -> Tensor | None:
    """The tensor that a module returns, or the first of the tuple."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def _on_input(shown: Look):
    def hook(module: nn.Module, args: tuple, kwargs: dict):
        seen, name = taken(args, kwargs)
        new = shown(seen)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

    return hook


def _on_output(shown: Look):
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple):
        new = shown(given(output))
        if new is None:
            return None
        return new if isinstance(output, Tensor) else (new, *output[1:])

    return hook


@contextmanager
def passed_over(blocks: Sequence[nn.Module], hidden: Tensor, extras: Sequence[int | None]) -> Iterator[None]:
    """Make `blocks` compute nothing while this lasts. The last returns `hidden`, the others return their input.

    Args:
        blocks: consecutive decoder blocks from the first on.
        hidden: (c, t, d), the residual stream that leaves the last of them.
        extras: for each block, how many elements follow the tensor in the tuple that it returns. None means that it
            returns its tensor alone.
    """

    def stand_in(last: bool, extras: int | None):
        def forward(*args, **kwargs):
            leaving = hidden.clone() if last else taken(args, kwargs)[0]
            return leaving if extras is None else (leaving, *[None] * extras)

        return forward

    # The instance's `forward` hides the class's. If the model is spread over devices, accelerate has already put one
    # of its own there.
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, following in zip(blocks, extras, strict=True):
            block.forward = stand_in(block is blocks[-1], following)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
