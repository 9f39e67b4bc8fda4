"""Try every causal language model of the installed transformers: are its modules found, and are they right?

Each configuration class is built with its defaults and at most `LAYERS` layers as a small random twin (see
`raysae/lm/twin.py`). Then:

- residual streams must equal the model's own `output_hidden_states`,
- parts must add up in every kind of block,
- `resume` must equal `logits` with the same replacement, at every kind of hook point of every kind of block,
- output projections of the families in `PROJECTIONS` must be those written here by hand.

    python scripts/list_architectures.py [--write docs/language-models.md] [MODEL_TYPE ...]

The table goes to the terminal, or between the marks of a document. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from raysae.config import UserError
from raysae.lm import twin
from raysae.lm.examine import examine_twin
from raysae.lm.facts import ModelFacts, ranges
from raysae.lm.layout import KINDS, Block
from raysae.lm.model import LanguageModel

LAYERS = 8  # Most layers of a tried model. Patterns of layers repeat sooner
BEGIN, END = "<!-- table of scripts/list_architectures.py -->", "<!-- end of the table -->"
CLOSE = 1e-4  # Relative error of float32 in two orders of summation
_LLAMA = ("self_attn.o_proj", "mlp.down_proj")
_MOE = ("self_attn.o_proj", None)
# Output projections of attention and MLP in the kinds of blocks, from the first layer up
PROJECTIONS: dict[str, tuple[tuple[str | None, str | None], ...]] = {
    **dict.fromkeys(
        ("llama", "gemma2", "gemma3", "gemma3_text", "qwen3", "olmo2", "olmo3", "phi3", "granite", "smollm3", "glm4",
         "cohere", "cohere2"), (_LLAMA,),
    ),
    **dict.fromkeys(("qwen3_moe", "mixtral", "llama4", "llama4_text"), (_MOE,)),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), (("linear_attn.out_proj", "mlp.down_proj"), _LLAMA)),
    "deepseek_v3": (_LLAMA, _MOE),
    "gpt2": (("attn.c_proj", "mlp.c_proj"),),
    "gptj": (("attn.out_proj", "mlp.fc_out"),),
    "gpt_neo": (("attn.attention.out_proj", "mlp.c_proj"),),
    "gpt_neox": (("attention.dense", "mlp.dense_4h_to_h"),),
    "opt": (("self_attn.out_proj", "fc2"),),
    "falcon": (("self_attention.dense", "mlp.dense_4h_to_h"),),
    "stablelm": (_LLAMA,),
    "starcoder2": (("self_attn.o_proj", "mlp.c_proj"),),
    "phi": (("self_attn.dense", "mlp.fc2"),),
    "mamba": (("mixer.out_proj", None),),
    "bert": (("attention.output.dense", "output.dense"),),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What was found of an architecture, or why nothing was."""

    name: str
    blocks: str | None = None  # Path of the list of blocks
    kinds: tuple[Block, ...] = ()  # Distinct kinds of blocks, in the order of the layers
    resumes: bool = True
    problem: str = ""  # What did not build, was not found or is not right
    wrong: bool = False  # Whether a check failed

    @property
    def pair(self) -> bool:
        """Whether every kind of block has its additive parts: two, or the one that it has."""
        return bool(self.kinds) and all(block.parts for block in self.kinds)


def complete(config: PretrainedConfig) -> PretrainedConfig:
    """Fill what a configuration's defaults leave open, and make encoders decoders."""
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    text = config.get_text_config(decoder=True)
    content = vars(text)
    if content.get("num_key_value_heads", 0) is None:
        text.num_key_value_heads = text.num_attention_heads
    if content.get("head_dim", 0) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    return config


def shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with at most `LAYERS` layers, lists of layers cut likewise."""
    few = copy.deepcopy(config)
    text = few.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:LAYERS])
    text.num_hidden_layers = min(layers, LAYERS)
    return few


def small_model(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A twin of an architecture's defaults and the tokens it reads. It has all layers if it does not run with few."""
    config = complete(CONFIG_MAPPING[name]())
    torch.manual_seed(0)
    try:
        return twin.smallest(shallow(config))
    except Exception:  # A model's own code raises whatever it likes
        return twin.smallest(config)


def try_architecture(name: str) -> Row:
    try:
        model, tokens = small_model(name)
    except Exception as error:  # Whatever a configuration's or a model's own code raises
        return Row(name, problem=f"does not build: {' '.join(str(error).split())[:120]}")
    try:
        own = examine_twin(model, tokens)
    except UserError as error:
        return Row(name, blocks="", problem=str(error).split(". ")[0])
    lm = LanguageModel(model, ModelFacts(name, None, name, "float32", "", own))
    try:
        found = next(problems(lm, tokens), "") or wrong_projections(lm.facts)
    except Exception as error:  # One that fails must not end the list
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Row(name, own.path, kinds_of_blocks(lm.facts), own.resumes, found, wrong=bool(found))


def kinds_of_blocks(facts: ModelFacts) -> tuple[Block, ...]:
    """The distinct kinds of blocks. Widths do not tell kinds apart."""
    return tuple(dict.fromkeys(replace(block, d_attn=None, d_mlp=None) for block in facts.architecture.blocks))


def layers_to_try(facts: ModelFacts) -> list[int]:
    """The first layer of each kind of block, and the last layer."""
    blocks = facts.architecture.blocks
    return sorted({*(blocks.index(block) for block in blocks), len(blocks) - 1})


def problems(lm: LanguageModel, tokens: torch.Tensor) -> Iterator[str]:
    """What is wrong with a model's hook points, one sentence each."""
    facts = lm.facts
    layers = layers_to_try(facts)
    names = [f"{kind}.{layer}" for layer in layers for kind in KINDS if layer in facts.layers_with(kind)]
    residual = [f"{kind}.{layer}" for kind in ("resid_pre", "resid_post") for layer in range(facts.layers)]
    seen = lm.activations(tokens, [*names, *residual])
    yield from _hidden_states(lm, tokens, seen)
    for layer in layers:
        block = facts.architecture.blocks[layer]
        if block.parts and not block.sums:
            parts = [seen[name] for kind in ("attn_out", "mlp_out") if (name := f"{kind}.{layer}") in seen]
            added = seen[f"resid_post.{layer}"] - seen[f"resid_pre.{layer}"]
            if not _close(sum(parts), added):
                yield f"parts do not add up in block {layer}"
    clean = lm.logits(tokens)
    for name in names:
        prefix = lm.prefix(tokens, name)
        replaced = lm.logits(tokens, {name: torch.tanh})
        if not _close(prefix.activation, seen[name]):
            yield f"reading {name} alone gives something else"
        if not _close(lm.resume(prefix, prefix.activation.tanh()), replaced):
            yield f"resume is not logits with a replacement at {name}"
        if _close(replaced, clean):
            yield f"replacing {name} changes nothing"


def wrong_projections(facts: ModelFacts) -> str:
    """How the projections differ from those written here by hand. Empty where they do not, or none are written."""
    found = tuple(dict.fromkeys((block.attn_proj, block.mlp_proj) for block in facts.architecture.blocks))
    expected = PROJECTIONS.get(facts.model_type, found)
    return "" if found == expected else f"projections are {found}, not {expected}"


def _hidden_states(lm: LanguageModel, tokens: torch.Tensor, seen: dict[str, torch.Tensor]) -> Iterator[str]:
    hidden = getattr(lm.model(input_ids=tokens, output_hidden_states=True, use_cache=False), "hidden_states", None)
    if not hidden:
        return
    # Architectures differ in whether their list begins with the embeddings
    off = [
        layer
        for layer, near in zip(range(lm.facts.layers - 1), pairwise(hidden), strict=False)
        if not any(_close(seen[f"resid_post.{layer}"], state) for state in near)
    ]
    if off:
        yield f"hidden states differ at {ranges(off)}"


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= CLOSE * other.norm())


# ---------------------------------------------------------------- the table


def table(rows: list[Row]) -> str:
    """The results as Markdown."""
    built = [row for row in rows if row.blocks is not None]
    counts = (
        f"transformers {transformers.__version__}: of {len(rows)} architectures {len(built)} build as a small random "
        f"model. Of these, blocks are found in {sum(bool(row.blocks) for row in built)}, and what every block adds in "
        f"{sum(row.pair for row in built)}."
    )
    lines = ["| model_type | blocks | attention: part, projection | MLP: part, projection | notes |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in (row for row in built if row.blocks):
        parts = [" / ".join(dict.fromkeys(_cell(block, field) for block in row.kinds)) for field in ("attn", "mlp")]
        lines.append(f"| {row.name} | `{row.blocks}` | {parts[0]} | {parts[1]} | {_notes(row)} |")
    rest = [f"- `{row.name}`: {row.problem}" for row in rows if not row.blocks]
    return "\n".join([counts, "", *lines, "", "Not found, or not built with a configuration's defaults:", "", *rest])


def _cell(block: Block, field: str) -> str:
    part, projection, factor = (getattr(block, name) for name in (field, f"{field}_proj", f"{field}_factor"))
    if part is None:
        return "–"
    times = "" if factor == 1 else f"{factor:g} · "
    return f"{times}`{part}`" if projection is None else f"{times}`{part}`, `{projection}`"


def _notes(row: Row) -> str:
    notes = []
    if any(block.sums for block in row.kinds):
        notes.append("norms after adding")
    if not row.resumes:
        notes.append("continues with whole passes")
    return ", ".join([*notes, *([row.problem] if row.problem else [])])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE", help="architectures to try. None: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="document that gets the table between its marks")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in options.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        began = time.monotonic()
        row = try_architecture(name)
        rows.append(row)
        says = row.problem or ("found" if row.pair else "blocks alone in some layers")
        print(f"{name}: {says} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        gc.collect()
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        options.write.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    else:
        print(table(rows))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
