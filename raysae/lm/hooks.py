"""Hooks for the length of a forward pass: they read or replace tensors on their way through a module.

Blocks can also be passed over, so that they compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

from torch import Tensor, nn

Look = Callable[[Tensor], Tensor | None]  # Sees a tensor. Returns another in its place, or None to let it pass


class Stop(Exception):  # noqa: N818 - a signal, as StopIteration is
    """Raised by a hook to end the forward pass there."""


class Site(NamedTuple):
    """A place in a model: the tensor that enters or leaves a module. If a tuple leaves it, its first element counts."""

    module: nn.Module
    side: Literal["input", "output"]


@contextmanager
def hooked(looks: Iterable[tuple[Site, Look]]) -> Iterator[None]:
    """Show each site's tensor to its function while this lasts. The function may replace the tensor or raise `Stop`."""
    with ExitStack() as stack:
        for (module, side), look in looks:
            if side == "input":
                handle = module.register_forward_pre_hook(_on_input(look), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_on_output(look))
            stack.callback(handle.remove)
        yield


def _on_input(look: Look):
    def hook(module: nn.Module, args: tuple, kwargs: dict):
        seen = args[0] if args else kwargs["hidden_states"]
        new = look(seen)
        if new is None:
            return None
        new = _like(new, seen)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(look: Look):
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple):
        seen = output if isinstance(output, Tensor) else output[0]
        new = look(seen)
        if new is None:
            return None
        new = _like(new, seen)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    return hook


def _like(new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise ValueError(f"the replacement has the shape {tuple(new.shape)}, the activation {tuple(old.shape)}")
    return new.to(device=old.device, dtype=old.dtype)


@contextmanager
def passed_over(blocks: Sequence[nn.Module], hidden: Tensor, extras: int | None) -> Iterator[None]:
    """Make `blocks` compute nothing while this lasts. The last returns `hidden`, the others return their input.

    Args:
        blocks: consecutive decoder blocks from the first on.
        hidden: (c, t, d), the residual stream that leaves the last of them.
        extras: how many elements follow the tensor in the tuple that a block returns. None means that a block returns
            its tensor alone.
    """

    def stand_in(last: bool):
        def forward(hidden_states: Tensor, *args, **kwargs):
            leaving = hidden if last else hidden_states
            return leaving if extras is None else (leaving, *[None] * extras)

        return forward

    # The instance's `forward` hides the class's. If the model is spread over devices, accelerate has already put one
    # of its own there.
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = stand_in(block is blocks[-1])
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
