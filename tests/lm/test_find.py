"""The search for modules: on architectures of transformers, and on models that plant one difficulty each."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close

from raysae.config import ModelConfig, UserError, digest
from raysae.lm import architecture
from raysae.lm.examine import examine_twin
from raysae.lm.facts import ModelFacts, hook_width, model_facts, parse_hook_point, ranges
from raysae.lm.layout import Block
from raysae.lm.model import LanguageModel
from scripts.list_architectures import problems
from tests.lm.models import STRANGERS, load, random_tokens, save
from tests.lm.planted import LAYERS, WIDTH, Planted

# What each kind of block has: attention, its projection and its width, then the same of the MLP
EXPECTED = {
    "olmo2": [("post_attention_layernorm", "self_attn.o_proj", 24, "post_feedforward_layernorm", "mlp.down_proj", 40)],
    "granite": [("self_attn", "self_attn.o_proj", 24, "mlp", "mlp.down_proj", 40)],
    "gptj": [("attn", "attn.out_proj", 24, "mlp", "mlp.fc_out", 96)],
    "gpt_neo": [("attn", "attn.attention.out_proj", 24, "mlp", "mlp.c_proj", 96)],
    "opt": [("self_attn", "self_attn.out_proj", 24, "fc2", "fc2", 40)],
    "falcon": [("self_attention", "self_attention.dense", 24, "mlp", "mlp.dense_4h_to_h", 96)],
    "gemma3": [("post_attention_layernorm", "self_attn.o_proj", 32, "post_feedforward_layernorm", "mlp.down_proj", 40)],
    "gemma3_of_images": [
        ("post_attention_layernorm", "self_attn.o_proj", 32, "post_feedforward_layernorm", "mlp.down_proj", 40)
    ],
    "qwen3_moe": [("self_attn", "self_attn.o_proj", 32, "mlp", None, None),
                  ("self_attn", "self_attn.o_proj", 32, "mlp", "mlp.down_proj", 40)],
    "phi3": [("self_attn", "self_attn.o_proj", 24, "mlp", "mlp.down_proj", 40)],
    "deepseek_v3": [("self_attn", "self_attn.o_proj", 40, "mlp", "mlp.down_proj", 40),
                    ("self_attn", "self_attn.o_proj", 40, "mlp", None, None)],
    "cohere": [("self_attn", "self_attn.o_proj", 24, "mlp", "mlp.down_proj", 40)],
    "mamba": [("mixer", "mixer.out_proj", 48, None, None, None)],
    "bert": [("attention.output.dense", "attention.output.dense", 24, "output.dense", "output.dense", 40)],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that gives the folder of a model, saved once."""
    return functools.cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", STRANGERS)
def test_an_architecture_is_found_and_right(name, folder):
    lm = load(folder(name))
    kinds = list(dict.fromkeys(lm.facts.architecture.blocks))
    assert [(b.attn, b.attn_proj, b.d_attn, b.mlp, b.mlp_proj, b.d_mlp) for b in kinds] == EXPECTED[name]
    assert (lm.facts.d_model, lm.facts.architecture.resumes) == (24, True)
    assert {b.attn_factor for b in kinds} == {b.mlp_factor for b in kinds} == ({0.3} if name == "granite" else {1.0})
    tokens = random_tokens() % 58  # The last ids stand for images
    assert list(problems(lm, tokens)) == []
    assert lm.activations(tokens, [], token_loss=True)["token_loss"][:, 1:].isfinite().all()


def test_bfloat16_passes_the_same_checks(folder):
    for name in ("granite", "deepseek_v3", "opt", "bert"):
        lm = load(folder(name), dtype="bfloat16")
        assert lm.facts.architecture == load(folder(name)).facts.architecture


def test_sizes_have_the_names_of_the_configuration(folder):
    facts = model_facts(ModelConfig(name=str(folder("gpt_neo"))))
    assert (facts.layers, facts.d_model, facts.context_length) == (2, 24, 64)
    assert hook_width("mlp_act.1", facts) == 96


def test_a_layer_without_a_hook_point_names_those_that_have_it(folder):
    facts = model_facts(ModelConfig(name=str(folder("deepseek_v3"))))
    assert parse_hook_point("mlp_act.0", facts) == ("mlp_act", 0)
    with pytest.raises(UserError, match=r"hook point 'mlp_act\.2': layer 2 has no mlp_act\. The layers 0 have one"):
        parse_hook_point("mlp_act.2", facts)
    facts = model_facts(ModelConfig(name=str(folder("mamba"))))
    with pytest.raises(UserError, match=r"'mlp_out\.0' needs a module 'mlp'.* It has resid_pre, resid_post, attn_out"):
        parse_hook_point("mlp_out.0", facts)
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"


# ---------------------------------------------------------------- what is kept


def test_a_search_needs_no_torch_here_and_is_kept(folder, tmp_path):
    code = (
        "import sys; from raysae.config import ModelConfig; from raysae.lm import architecture;"
        "from raysae.lm.facts import model_facts, hook_width;"
        f"architecture.CACHE = {str(tmp_path)!r};\n"
        "if __name__ == '__main__':\n"
        f"    facts = model_facts(ModelConfig(name={str(folder('opt'))!r}));"
        "    assert hook_width('mlp_act.1', facts) == 40; assert 'torch' not in sys.modules\n"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text())["path"] == "model.decoder.layers"


def test_what_was_found_is_not_searched_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "CACHE", str(tmp_path))
    config = ModelConfig(name=str(folder("bert")))
    found = model_facts(config)
    monkeypatch.setattr(architecture, "_examine", lambda *_: pytest.fail("a search"))
    assert model_facts(config) == found
    next(tmp_path.glob("*.json")).write_text("{")
    with pytest.raises(pytest.fail.Exception):
        model_facts(config)


def test_digests_of_the_tables_architectures_are_those_of_earlier_versions(folder):
    modules = {
        "blocks": "model.layers", "attn": "self_attn", "attn_proj": "self_attn.o_proj", "mlp": "mlp",
        "mlp_proj": "mlp.down_proj", "attn_norm": None, "mlp_norm": None,
    }  # fmt: skip
    place = folder("llama")
    files = {name: sha256_of(place / name) for name in ("config.json", "model.safetensors")}
    assert model_facts(ModelConfig(name=str(place))).digest == digest([files, modules])


def sha256_of(path):
    from hashlib import sha256

    return sha256(path.read_bytes()).hexdigest()


def test_a_search_leaves_random_numbers_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "CACHE", str(tmp_path))
    torch.manual_seed(5)
    model_facts(ModelConfig(name=str(folder("opt"))))
    found = torch.rand(3)
    torch.manual_seed(5)
    assert_close(found, torch.rand(3), rtol=0, atol=0)


# ---------------------------------------------------------------- planted models

TOKENS = torch.arange(14).view(2, 7) + 10


def planted(plant: str) -> LanguageModel:
    torch.manual_seed(0)
    model = Planted(plant)
    return LanguageModel(model, ModelFacts("planted", None, "planted", "float32", "", examine_twin(model, TOKENS)))


def test_a_factor_is_part_of_what_is_added():
    lm = planted("")
    assert lm.facts.architecture.blocks == (
        Block("mixer", "mixer.out", WIDTH, 0.25, "mlp", "mlp", WIDTH, 0.25),
    ) * LAYERS  # fmt: skip
    assert list(problems(lm, TOKENS)) == []


def test_a_learned_factor_is_not_taken_for_a_constant():
    assert planted("learned factor").facts.architecture.blocks == (Block(),) * LAYERS


def test_blocks_that_add_more_than_two_parts_have_their_residual_streams():
    lm = planted("three parts")
    assert lm.facts.kinds == ["resid_pre", "resid_post"]
    assert list(problems(lm, TOKENS)) == []
    with pytest.raises(UserError, match=r"'attn_out\.1' needs a module 'attn'"):
        lm.activations(TOKENS, ["attn_out.1"])


def test_blocks_that_add_in_place_are_read_and_replaced_rightly():
    lm = planted("in place")
    assert lm.facts.kinds == ["resid_pre", "resid_post", "attn_out", "mlp_out", "attn_z", "mlp_act"]
    assert list(problems(lm, TOKENS)) == []
    prefix = lm.prefix(TOKENS, "resid_post.0")
    activation = prefix.activation.tanh()
    first = lm.resume(prefix, activation)
    assert_close(lm.resume(prefix, activation), first, rtol=0, atol=0)  # The block changed neither


def test_blocks_that_need_more_than_the_residual_stream_continue_with_whole_passes():
    lm = planted("shares")
    assert not lm.facts.architecture.resumes
    assert list(problems(lm, TOKENS)) == []
    loss = lm.activations(TOKENS, [], token_loss=True)["token_loss"]
    truth = torch.nn.functional.cross_entropy(lm.logits(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert_close(loss[:, 1:].mean(), truth)


# ---------------------------------------------------------------- wrong names

LLAMA = {"blocks": "model.layers", "attn": "self_attn", "attn_proj": "self_attn.o_proj", "mlp": "mlp",
         "mlp_proj": "mlp.down_proj"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "modules", "message"),
    [
        ("llama", {"attn": "input_layernorm"}, r"resid_pre \+ input_layernorm \+ mlp is not resid_post in block 0"),
        ("phi3", {"blocks": "model.layers", "mlp": "input_layernorm"}, r"resid_pre \+ input_layernorm is not"),
        ("phi3", {**LLAMA, "attn_proj": "self_attn.qkv_proj"}, r"'attn_proj' is 'self_attn.qkv_proj', whose output is"),
        ("phi3", {"attn": "self_attn"}, "model.modules lacks 'blocks'"),
        ("deepseek_v3", {**LLAMA, "mlp_proj": "mlp.down"}, "'mlp_proj' is 'mlp.down', which DeepseekV3Decoder"),
    ],
)  # fmt: skip
def test_wrong_names_are_told_before_the_weights_are_loaded(name, modules, message, folder):
    with pytest.raises(UserError, match=message):
        model_facts(ModelConfig(name=str(folder(name)), modules=modules))


def test_a_single_named_part_needs_no_other(folder):
    lm = load(folder("granite"), modules={"blocks": "model.layers", "mlp": "mlp"})
    assert lm.facts.kinds == ["resid_pre", "resid_post", "mlp_out"]
    block = lm.facts.architecture.blocks[1]
    assert (block.rest, block.rest_factor, block.mlp_factor) == ("self_attn", 0.3, 0.3)
    both = load(folder("granite")).activations(random_tokens(), ["mlp_out.1"])["mlp_out.1"]
    assert_close(lm.activations(random_tokens(), ["mlp_out.1"])["mlp_out.1"], both, rtol=0, atol=0)


def test_named_paths_hold_in_the_blocks_that_have_them(folder):
    facts = model_facts(ModelConfig(name=str(folder("deepseek_v3")), modules=LLAMA))
    assert facts.layers_with("mlp_act") == [0]
    assert facts.layers_with("mlp_out") == [0, 1, 2]


def test_weights_that_the_found_modules_do_not_fit_are_refused(folder):
    """The check on real weights sees elements, so a large one at one position covers nothing up."""
    lm = load(folder("llama"))
    wrong = Block(**{**asdict(lm.facts.architecture.blocks[0]), "attn": "input_layernorm", "attn_proj": None})
    facts = ModelFacts(**{**vars(lm.facts), "architecture": architecture.Architecture(
        **{**vars(lm.facts.architecture), "blocks": (wrong,) * 3})})  # fmt: skip
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[10] *= 1e4
    with pytest.raises(UserError, match="is not resid_post in block 0"):
        LanguageModel(lm.model, facts)
