"""A causal language model whose activations can be read and replaced at named hook points (see `facts`).

Every method works on whole contexts of equal length, in evaluation mode and without gradients. Padding at their end
needs no mask: attention is causal, so nothing before it changes. Shapes
are in contexts `c`, positions `t`, a hook point's width `w`, the model's width `d` and the vocabulary `V`.

The model's own forward pass does all the computing. Hooks read and replace tensors on the way. An exception ends the
pass after the highest hook point needed. To continue from a hook point, the blocks below it are passed over. So masks,
positions and whatever else an architecture does stay its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysae.config import ModelConfig, UserError
from raysae.lm.check import check_modules, probe
from raysae.lm.facts import ModelFacts, model_facts, not_loading, parse_hook_point
from raysae.lm.hooks import Site, Stop, hooked, passed_over
from raysae.lm.layout import KINDS
from raysae.lm.number_format import fast_formats, number_format

Replacement = Callable[[Tensor], Tensor]
# Elements of the logits held at a time if only sums over the vocabulary are wanted. In float32 they are 8 MiB, which
# stay in the processor's cache.
LOGITS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Prefix:
    """A clean forward pass up to a hook point. `LanguageModel.resume` continues it any number of times.

    - `tokens`: (c, t) token ids.
    - `activation`: (c, t, w), the activation at the hook point.
    - `hidden`: (c, t, d), the residual stream entering block `first`. At resid_pre and resid_post it is the activation.
    - `first`: the lowest block to run again.
    """

    tokens: Tensor
    hook_point: str
    activation: Tensor
    hidden: Tensor
    first: int


class LanguageModel:
    """A decoder-only transformers model, its facts and its hook points."""

    def __init__(self, model: nn.Module, facts: ModelFacts) -> None:
        """
        Raises:
            UserError: the module paths in `facts` do not fit the model.
        """
        self.model = model.eval().requires_grad_(False)
        self.facts = facts
        self._block_extras = check_modules(self.model, facts.architecture, probe(model.config).to(self.device))
        self.blocks: nn.ModuleList = model.get_submodule(facts.architecture.path)

    @classmethod
    def load(cls, config: ModelConfig, device: str | torch.device = "cpu") -> LanguageModel:
        """Load weights onto `device`, or with `config.device_map` spread over all GPUs. See `number_format`.

        Attention is PyTorch's fused one. It is the eager one if the architecture does not allow that, as with Gemma 2's
        soft-capping.

        Raises:
            UserError: the model is not found, incomplete, of unknown architecture, or its module paths do not fit.
        """
        from transformers import AutoModelForCausalLM

        facts = model_facts(config)
        fast = fast_formats(gpu=bool(config.device_map) or torch.device(device).type == "cuda")
        with not_loading(config):
            model, report = AutoModelForCausalLM.from_pretrained(
                facts.folder_or_name,
                revision=facts.commit,
                dtype=getattr(torch, number_format(config, facts, fast)),
                device_map=config.device_map,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(
                f"model.name is {config.name!r}: "
                f"its weight files lack {len(missing)} of the model's tensors, e.g. {missing[0]}"
            )
        return cls(model if config.device_map else model.to(device), facts)

    @property
    def device(self) -> torch.device:
        """The device that tokens go to.

        With a device map other layers may be elsewhere, and activations stay where they were computed.
        """
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the activations."""
        return self.model.dtype

    @property
    def attention(self) -> str:
        """How attention is computed: transformers' name for it.

        If PyTorch chooses a kernel on a GPU, the kernels that it may choose from follow.
        """
        name = str(self.model.config._attn_implementation)
        if name != "sdpa" or self.device.type != "cuda":
            return name
        kernels = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        return " ".join([name, *(kernel for kernel, enabled in kernels.items() if enabled)])

    def twin(self) -> LanguageModel:
        """The same model with modules of its own on the same weights.

        It is for use in another thread, because hooks in one model are not in the other.
        """
        weights = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self, {id(tensor): tensor for tensor in weights})

    def contexts_at_once(self, length: int) -> int:
        """How many contexts of `length` tokens have logits of at most LOGITS_AT_ONCE elements. It is at least 1."""
        return max(1, LOGITS_AT_ONCE // (length * self.model.config.get_text_config().vocab_size))

    # ---------------------------------------------------------------- reading

    @torch.no_grad()
    def activations(self, tokens: Tensor, hook_points: Sequence[str], token_loss: bool = False) -> dict[str, Tensor]:
        """Activations (c, t, w) at every hook point, from one forward pass that stops after the highest.

        Args:
            tokens: (c, t) token ids.
            hook_points: e.g. `["resid_post.3", "mlp_act.0"]`.
            token_loss: whether to add a float32 tensor (c, t) under the key "token_loss". It holds the loss in nats of
                predicting token t from those before it, and NaN at position 0. The pass then runs to the end. Logits
                are computed for only a few contexts at a time.
        """
        if not token_loss:
            return self._capture(tokens, hook_points)
        last = f"resid_post.{self.facts.layers - 1}"
        captured = self._capture(tokens, [*hook_points, last])
        size = self.contexts_at_once(tokens.shape[1])
        loss = torch.full(tokens.shape, torch.nan, device=self.device)
        for i in range(0, len(tokens), size):
            logits = self._logits_from(tokens[i : i + size], self.facts.layers, captured[last][i : i + size])
            loss[i : i + size, 1:] = next_token_loss(logits, tokens[i : i + size])
        return {name: captured[name] for name in hook_points} | {"token_loss": loss}

    @torch.no_grad()
    def logits(self, tokens: Tensor, replace: Mapping[str, Replacement] = {}) -> Tensor:
        """Logits (c, t, V) of a whole forward pass.

        At each hook point of `replace`, the function's result takes the place of the activation.
        """
        with hooked([(self._site(name), function) for name, function in replace.items()], tokens.shape):
            return self._forward(tokens)

    # ---------------------------------------------------------------- continuing from a hook point up

    @torch.no_grad()
    def prefix(self, tokens: Tensor, hook_point: str) -> Prefix:
        """One clean pass that stops at the hook point and keeps what `resume` needs."""
        kind, layer = parse_hook_point(hook_point, self.facts)
        if kind in ("resid_pre", "resid_post"):
            activation = self._capture(tokens, [hook_point])[hook_point]
            return Prefix(tokens, hook_point, activation, hidden=activation, first=layer + (kind == "resid_post"))
        entering = f"resid_pre.{layer}"
        captured = self._capture(tokens, [hook_point, entering])
        return Prefix(tokens, hook_point, captured[hook_point], hidden=captured[entering], first=layer)

    @torch.no_grad()
    def resume(self, prefix: Prefix, activation: Tensor) -> Tensor:
        """Logits (c, t, V) with `activation` (c, t, w) in place of the prefix's own.

        `resume(prefix(tokens, hook), f(prefix.activation))` equals `logits(tokens, {hook: f})`. Only the blocks above
        the hook point are computed. The hook point's own block is computed too, except at resid_post. If blocks need
        more of those below them than the residual stream, all are computed.

        Raises:
            ValueError: the activation has another shape than the prefix's.
        """
        if activation.shape != prefix.activation.shape:
            raise ValueError(
                f"the activation has the shape {tuple(activation.shape)}, the prefix's {tuple(prefix.activation.shape)}"
            )
        if not self.facts.architecture.resumes:
            return self.logits(prefix.tokens, {prefix.hook_point: lambda _: activation})
        if prefix.hidden is prefix.activation:
            return self._logits_from(prefix.tokens, prefix.first, activation.to(prefix.hidden))
        return self._logits_from(prefix.tokens, prefix.first, prefix.hidden, {prefix.hook_point: lambda _: activation})

    # ---------------------------------------------------------------- inside

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens.to(self.device), use_cache=False).logits

    def _logits_from(
        self, tokens: Tensor, first: int, hidden: Tensor, replace: Mapping[str, Replacement] = {}
    ) -> Tensor:
        """Logits of a pass in which `hidden` (c, t, d) enters block `first`.

        If `first` is the number of layers, only the final norm and the head remain. The embedding lookup is wasted,
        which is cheap. Running it lets the model build its masks and positions.
        """
        if first == 0 or not self.facts.architecture.resumes:
            entering = f"resid_pre.{first}" if first < self.facts.layers else f"resid_post.{first - 1}"
            return self.logits(tokens, {entering: lambda _: hidden, **replace})
        with passed_over(self.blocks[:first], hidden, self._block_extras[:first]):
            return self.logits(tokens, replace)

    def _capture(self, tokens: Tensor, hook_points: Sequence[str]) -> dict[str, Tensor]:
        """Activations at the hook points.

        The forward pass ends when it has all of them, whatever the order of modules within a block.
        """
        wanted = {name: self._site(name) for name in hook_points}
        captured: dict[str, Tensor] = {}

        def keep(name: str, tensor: Tensor) -> None:
            captured[name] = tensor.clone()  # The model may add to it in place
            if len(captured) == len(wanted):
                raise Stop

        if wanted:
            looks = [(site, functools.partial(keep, name)) for name, site in wanted.items()]
            with suppress(Stop), hooked(looks, tokens.shape):
                self._forward(tokens)
        return {name: captured[name] for name in wanted}

    def _site(self, hook_point: str) -> Site:
        name, layer = parse_hook_point(hook_point, self.facts)
        kind, block = KINDS[name], self.facts.architecture.blocks[layer]
        if kind.module == "blocks":
            return Site(self.blocks[layer], kind.side)
        factor = getattr(block, f"{kind.module}_factor") if kind.side == "output" else 1.0
        return Site(self.blocks[layer].get_submodule(getattr(block, kind.module)), kind.side, factor)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, float32 (c, t − 1).

    Entry p is the loss of predicting token p + 1 from the logits (c, t, V) at position p.
    """
    predicted = tokens[:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), predicted.flatten(), reduction="none").view(
        predicted.shape
    )
