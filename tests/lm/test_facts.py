"""What is known of a model before it is loaded, and the errors for wrong names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from raysae.config import ModelConfig, UserError
from raysae.lm import facts as facts_module
from raysae.lm.facts import hook_width, model_facts, parse_hook_point
from raysae.lm.model import LanguageModel
from raysae.lm.tokenizer import load_tokenizer, tokenizer_digest
from tests.lm.models import CONFIGS, save


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("architecture", "d_attn", "d_mlp"),
    [
        ("gpt2", 24, 96),
        ("gpt_neox_parallel", 24, 40),
        ("llama", 24, 40),
        ("gemma2", 32, 40),
        ("qwen2", 24, 40),
        ("qwen3", 32, 40),
        ("mistral", 24, 40),
    ],
)
def test_sizes(architecture, d_attn, d_mlp, tmp_path):
    facts = model_facts(ModelConfig(name=str(save(architecture, tmp_path))))
    assert facts.model_type == CONFIGS[architecture].model_type
    assert (facts.layers, facts.d_model, facts.context_length) == (3, 24, 64)
    assert facts.kinds == ["resid_pre", "resid_post", "attn_out", "mlp_out", "attn_z", "mlp_act"]
    assert [hook_width(f"{kind}.2", facts) for kind in facts.kinds] == [24, 24, 24, 24, d_attn, d_mlp]


def test_facts_need_no_torch(llama):
    code = (
        "import sys; from raysae.config import ModelConfig; from raysae.lm.facts import model_facts, hook_width;"
        f"facts = model_facts(ModelConfig(name={str(llama)!r})); assert hook_width('mlp_act.1', facts) == 40; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_digest_follows_content_not_place(llama, tmp_path):
    def digest_of(folder, **config):
        return model_facts(ModelConfig(name=str(folder), **config)).digest

    copy = shutil.copytree(llama, tmp_path / "copy")
    assert digest_of(copy) == digest_of(llama)
    assert digest_of(copy, modules={"attn": "self_attn.o_proj"}) != digest_of(llama)
    assert digest_of(save("llama", tmp_path / "other", seed=1)) != digest_of(llama)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert digest_of(copy) != digest_of(llama)


def test_parse_hook_point(llama):
    facts = model_facts(ModelConfig(name=str(llama)))
    assert parse_hook_point("resid_pre.0", facts) == ("resid_pre", 0)
    assert parse_hook_point("mlp_act.2", facts) == ("mlp_act", 2)
    for wrong in ("resid_post.3", "resid_mid.1", "resid_post", "resid_post.-1", "resid_post.x", "resid_post.01", ""):
        with pytest.raises(
            UserError, match=r"resid_pre, resid_post, attn_out, mlp_out, attn_z, mlp_act and a layer from 0 to 2"
        ) as caught:
            parse_hook_point(wrong, facts)
        assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("read", [model_facts, LanguageModel.load, load_tokenizer])
@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "what is this?", "embedded"])
def test_models_that_are_not_there(read, name, monkeypatch, tmp_path):
    monkeypatch.setattr(facts_module, "EMBEDDED", tmp_path / "nothing")
    with pytest.raises(UserError) as caught:
        read(ModelConfig(name=name))
    message = str(caught.value)
    assert message.startswith(f"model.name is {name!r}")
    assert "\n" not in message


def test_folders_without_a_model(tmp_path):
    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            model_facts(ModelConfig(name=str(tmp_path)))
        return str(caught.value)

    assert "there is no config.json" in refusal()
    (tmp_path / "config.json").write_text("{,")
    assert "not the configuration of a transformers model" in refusal()
    (tmp_path / "config.json").write_text("[]")
    assert "not the configuration of a transformers model" in refusal()
    tiny = {"n_layer": 2, "n_embd": 8, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **tiny}))
    assert "there are no weights" in refusal()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert "transformers cannot build a causal language model from its configuration (Unrecognized" in refusal()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobodys"}))
    assert "transformers cannot build a causal language model from its configuration (The checkpoint" in refusal()
    assert "The traceback is in " in refusal()


def test_sizes_that_config_json_leaves_out_are_the_configurations(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 2}))
    assert model_facts(ModelConfig(name=str(tmp_path))).context_length == 1024
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 24}))
    facts = model_facts(ModelConfig(name=str(tmp_path)))
    assert [hook_width(f"{kind}.1", facts) for kind in facts.kinds] == [24, 24, 24, 24, 24, 96]


def test_unknown_key_in_modules(llama):
    with pytest.raises(
        UserError, match=r"'mlp_out', which is none of blocks, attn, attn_proj, mlp, mlp_proj, attn_norm, mlp_norm"
    ):
        model_facts(ModelConfig(name=str(llama), modules={"mlp_out": "mlp"}))


def test_embedded_is_a_folder_in_the_package(llama, monkeypatch):
    monkeypatch.setattr(facts_module, "EMBEDDED", llama)
    facts = model_facts(ModelConfig())
    assert facts == model_facts(ModelConfig(name=str(llama)))


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/folder/of/mine"])
def test_a_path_is_no_name_on_the_hub(name):
    with pytest.raises(UserError, match=r"there is no such folder"):
        model_facts(ModelConfig(name=name))


def test_a_file_of_a_models_folder_is_told_from_the_folder(llama):
    with pytest.raises(UserError, match=r"it is a file: name its folder"):
        model_facts(ModelConfig(name=str(llama / "config.json")))


def test_hub_names(llama, tmp_path):
    """A model in the hub client's local cache is found by name without a network. Its commit identifies it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "from raysae.config import ModelConfig; from raysae.lm.facts import model_facts; "
        "from raysae.lm.model import LanguageModel;"
        "config = ModelConfig(name='someone/tiny'); facts = model_facts(config);"
        f"assert (facts.folder_or_name, facts.commit) == ('someone/tiny', {commit!r}), facts;"
        f"assert facts.digest == model_facts(ModelConfig(name='someone/tiny', revision={commit!r})).digest;"
        "assert LanguageModel.load(config).facts == facts"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, env=os.environ | {"HF_HUB_CACHE": str(tmp_path)}
    )


def test_stories(stories_model, llama):
    facts = model_facts(ModelConfig(name=str(stories_model)))
    assert (facts.model_type, facts.layers, facts.d_model, facts.context_length) == (
        "llama",
        5,
        64,
        512,
    )
    assert (hook_width("attn_z.4", facts), hook_width("mlp_act.0", facts)) == (64, 172)
    tokenizer = load_tokenizer(ModelConfig(name=str(stories_model)))
    ids = tokenizer("Once upon a time")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "Once upon a time"
    with pytest.raises(UserError, match="a model's folder that transformers cannot load"):
        load_tokenizer(ModelConfig(name=str(llama)))


def test_tokenizers_differ(shared_data):
    one, other = (ModelConfig(name=str(shared_data / "models" / name)) for name in ("stories260K", "babyllama-char361"))
    assert tokenizer_digest(one) == tokenizer_digest(one) != tokenizer_digest(other)


def test_a_tokenizers_digest_is_of_what_tokens_depend_on(stories_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(stories_model, copy)
    config = ModelConfig(name=str(copy))
    assert tokenizer_digest(config) == tokenizer_digest(ModelConfig(name=str(stories_model)))
    (copy / "README.md").write_text("a note")
    assert tokenizer_digest(config) == tokenizer_digest(ModelConfig(name=str(stories_model)))
    settings = copy / "tokenizer_config.json"
    settings.write_text(settings.read_text() + " ")
    assert tokenizer_digest(config) != tokenizer_digest(ModelConfig(name=str(stories_model)))
