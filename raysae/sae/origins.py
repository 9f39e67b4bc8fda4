"""Where an SAE's activations come from: other people's names of hook points and models, and whether they fit a model.

Two traps are told here. A module's output is another tensor than what the block adds, where a post-norm follows. And
TransformerLens reads a model with processed weights by default, so activations differ from the model's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from raysae.config import UserError
from raysae.lm.facts import ModelFacts, hook_width, parse_hook_point

TRANSFORMER_LENS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_z": "blocks.{}.attn.hook_z",
    "mlp_act": "blocks.{}.mlp.hook_post",
}
# A module inside a block → what its output is. Output projections give what their module gives.
ATTENTION = r"(?:attn|self_attn|attention)(?:\.(?:c_proj|o_proj|dense|out_proj|wo))?"
MLP = r"(?:mlp|feed_forward|block_sparse_moe)(?:\.(?:c_proj|down_proj|dense_4h_to_h|fc_out|w2))?"
# Models whose layer norms subtract a mean. TransformerLens centres only weights of these.
CENTRED = re.compile(r"gpt|pythia|neo|opt|bloom|phi|stanford|santacoder|codegen|stablelm|falcon|solu|gelu")
CENTRED_KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out")
SHORT_NAMES = {"gpt2-small": "gpt2"}  # TransformerLens's name → the hub's


@dataclass(frozen=True)
class Origin:
    """What an SAE's files say of its activations.

    - `hook_point`: ours, None where they do not say or the place is none of ours.
    - `module_output`: whether they are the output of the attention or MLP module itself, before any post-norm.
    - `model`: the language model's name, None where they do not say.
    - `doubt`: a sentence about what the files leave open.
    """

    hook_point: str | None = None
    module_output: bool = False
    model: str | None = None
    doubt: str | None = None


UNKNOWN = Origin()


# ---------------------------------------------------------------- names of hook points


def from_transformer_lens(name: object) -> str | None:
    """`blocks.3.hook_resid_post` → `resid_post.3`. raysae's own names stay. None for other places."""
    for kind, pattern in TRANSFORMER_LENS.items():
        if match := re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)") + rf"|{kind}\.(\d+)", str(name)):
            return f"{kind}.{match[1] or match[2]}"
    return None


def from_module_path(name: object) -> Origin:
    """The place of a module's output: `layers.5` is resid_post.5, `transformer.h.5.mlp` is mlp_out.5."""
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(.+))?", str(name))
    if match is None:
        return UNKNOWN
    layer, module = match.groups()
    if module is None:
        return Origin(f"resid_post.{layer}")
    if module == "post_feedforward_layernorm":
        return Origin(f"mlp_out.{layer}")
    for pattern, kind in ((ATTENTION, "attn_out"), (MLP, "mlp_out")):
        if re.fullmatch(pattern, module):
            return Origin(f"{kind}.{layer}", module_output=True)
    return UNKNOWN


def from_submodule_name(name: object) -> Origin:
    """dictionary_learning's names of outputs.

    `resid_post_layer_8` is resid_post.8, `mlp_layer_8` is mlp_out.8, `attn_layer_8` is attn_out.8.
    """
    match = re.fullmatch(r"(resid_post|mlp|attn|attention)_layer_(\d+)", str(name))
    if match is None:
        return UNKNOWN
    kind = {"resid_post": "resid_post", "mlp": "mlp_out"}.get(match[1], "attn_out")
    return Origin(f"{kind}.{match[2]}", module_output=kind != "resid_post")


def from_gemma_scope(places: tuple[str, ...], module: object) -> Origin:
    """Gemma Scope's places.

    Args:
        places: names of the folders that lead to the files, such as gemma-scope-2b-pt-att/layer_20/….
        module: the module that Gemma 3's config.json names, or None.
    """
    repository, layer = "/".join(places), re.search(r"layer_(\d+)", "/".join(places[-3:]))
    model = _gemma(repository)
    modules = {
        r"model\.layers\.(\d+)\.output": "resid_post",
        r"model\.layers\.(\d+)\.self_attn\.o_proj\.input": "attn_z",
        r"model\.layers\.(\d+)\.post_feedforward_layernorm\.output": "mlp_out",
    }
    for pattern, kind in modules.items():
        if match := re.fullmatch(pattern, str(module)):
            return Origin(f"{kind}.{match[1]}", model=model)
    kinds = {r"-res/|/resid_post/": "resid_post", r"-att/|/attn_out/": "attn_z", r"-mlp/|/mlp_out/": "mlp_out"}
    found = [kind for pattern, kind in kinds.items() if re.search(pattern, repository)]
    return Origin(f"{found[0]}.{layer[1]}" if len(found) == 1 and layer else None, model=model)


def _gemma(repository: str) -> str | None:
    """The model of a Gemma Scope repository: gemma-scope-2b-pt-res is of Gemma 2, gemma-scope-2-1b-pt of Gemma 3."""
    if match := re.search(r"gemma-scope-2-(\d+[bm])-(pt|it)", repository):
        return f"google/gemma-3-{match[1]}-{match[2]}"
    if match := re.search(r"gemma-scope-(\d+b)-(pt|it)", repository):
        return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}"
    return None


# ---------------------------------------------------------------- processed weights


def processing_doubt(said: Mapping[str, object], hook_point: str | None) -> str | None:
    """What SAELens's files leave open of TransformerLens's processing of weights, or None.

    By default TransformerLens centres the weights that write to the residual stream, and moves biases of values into
    the output's bias. Folding of layer norms changes no hook point of raysae.

    Raises:
        UserError: they say that it changed the activations. The message lacks the SAE's name.
    """
    options = said.get("model_from_pretrained_kwargs") or {}
    if not isinstance(options, Mapping):
        raise UserError(f"its model_from_pretrained_kwargs is {options!r}, which is not a JSON object")
    kind = str(hook_point).partition(".")[0]
    changing = {"center_writing_weights": CENTRED_KINDS, "fold_value_biases": ("attn_z",)}
    option = next((name for name, kinds in changing.items() if kind in kinds), None)
    if option is None or said.get("model_class_name") == "AutoModelForCausalLM":
        return None
    if options.get(option):
        raise UserError(
            f"it was trained on a model with processed weights ({option}), which gives other activations. "
            "Name an SAE that was trained on the model's own weights"
        )
    told_by_name = from_transformer_lens(said.get("hook_name") or said.get("hook_point")) is not None
    if option in options or not told_by_name or not CENTRED.search(str(said.get("model_name", "")).lower()):
        return None
    return (
        f"its files do not say whether {option} was off when it was trained with TransformerLens. If it was on, its "
        "activations differ from this model's, and its FVU will be far above what its authors report"
    )


# ---------------------------------------------------------------- does it fit a model?


def require_fit(name: str, hook_point: str, d_in: int | None, origin: Origin, facts: ModelFacts, model: str) -> None:
    """Check that an SAE reads activations of a language model.

    Args:
        name: the SAE's name.
        hook_point: where it reads.
        d_in: width of what it reads, None where unknown.
        origin: what its files say.
        facts: the language model's.
        model: the name that the language model was given by.

    Raises:
        UserError: the model has no such hook point or layer, of this width, or is another one.
    """
    try:
        width = hook_width(hook_point, facts)
    except UserError as error:
        raise UserError(f"{name} does not fit model.name {model!r}: {error}") from None
    if is_of(origin.model, model) is False:
        raise UserError(
            f"{name} was trained on {origin.model}, and model.name is {model!r}. Name the model that it was trained on"
        )
    if d_in not in (None, width):
        raise UserError(
            f"{name} takes activations {d_in} wide, but {hook_point} of {model} is {width} wide. Name the hook point "
            "and the model that it was trained on"
        )
    kind, layer = parse_hook_point(hook_point, facts)
    field = {"attn_out": "attn", "mlp_out": "mlp"}.get(kind)
    if origin.module_output and field and not facts.architecture.blocks[layer].adds_as_is(field):
        raise UserError(
            f"{name} was trained on a module's output before its post-norm or factor, but {hook_point} of {model} is "
            "what the block adds, after it. raysae has no hook point before the post-norm"
        )


def doubt_of(name: str, origin: Origin, model: str) -> str | None:
    """A warning where it is not certain that an SAE was trained on this language model, or None."""
    if origin.model is not None and is_of(origin.model, model) is None:
        return f"{name} was trained on {origin.model}. Check that model.name {model!r} is the same model"
    return f"{name}: {origin.doubt}" if origin.doubt else None


def is_of(said: str | None, model: str) -> bool | None:
    """Whether the model that an SAE's files name is `model`. None where that cannot be told.

    Names on the hub tell models apart. A folder may hold anything. A name that begins with the other may be of a
    fine-tuned version, on which SAEs of the base model are used on purpose.
    """
    if said is None:
        return None
    ours, theirs = (_short(name) for name in (model, said))
    if ours == theirs:
        return True
    folders = said.startswith("/") or os.path.exists(os.path.expanduser(model))
    prefix = ours.startswith(theirs) or theirs.startswith(ours)
    return None if folders or prefix else False


def _short(name: str) -> str:
    """The last part of a model's name, in lower case: EleutherAI/pythia-70m and pythia-70m are one model."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return SHORT_NAMES.get(last, last)
