"""`model.dtype` 'auto': the model's own format where the machine multiplies it fast, else float32."""

import pytest
import torch

from raysae.config import ModelConfig
from raysae.lm.facts import model_facts
from raysae.lm.model import LanguageModel
from raysae.lm.number_format import fast_formats, number_format
from tests.lm.models import random_tokens, save

SAPPHIRE_RAPIDS = "flags\t\t: fpu avx512f avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8\n"
GRANITE_RAPIDS = "flags\t\t: fpu avx512f amx_bf16 amx_tile amx_fp16\n"
ZEN4 = "flags\t\t: fpu avx2 avx512f avx512_bf16\n"  # It has the format, but no fast products of it


@pytest.mark.parametrize(
    ("flags", "fast"),
    [(SAPPHIRE_RAPIDS, {"bfloat16"}), (GRANITE_RAPIDS, {"bfloat16", "float16"}), (ZEN4, set()), ("", set())],
)
def test_a_cpus_flags_say_what_is_fast(flags, fast, tmp_path):
    (tmp_path / "cpuinfo").write_text(flags)
    assert fast_formats(gpu=False, cpuinfo=tmp_path / "cpuinfo") == fast


def test_a_system_that_does_not_tell_its_cpus_flags_takes_float32(tmp_path):
    assert fast_formats(gpu=False, cpuinfo=tmp_path / "none") == frozenset()


@pytest.mark.parametrize(("bfloat16", "fast"), [(True, {"bfloat16", "float16"}), (False, {"float16"})])
def test_a_gpu_without_bfloat16_has_float16(bfloat16, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    assert fast_formats(gpu=True) == fast


@pytest.fixture
def folder(tmp_path):
    """A Llama whose checkpoint is bfloat16."""
    folder = save("llama", tmp_path / "llama")
    LanguageModel.load(ModelConfig(name=str(folder))).model.bfloat16().save_pretrained(folder)
    return folder


def test_auto_takes_the_checkpoints_format_only_where_it_is_fast(folder):
    config = ModelConfig(name=str(folder))
    facts = model_facts(config)
    assert facts.dtype == "bfloat16"
    assert number_format(config, facts, fast={"bfloat16"}) == "bfloat16"
    assert number_format(config, facts, fast={"float16"}) == "float32"
    assert number_format(config, facts, fast=()) == "float32"


def test_a_named_format_holds_wherever_it_runs(folder):
    config = ModelConfig(name=str(folder), dtype="float16")
    assert number_format(config, model_facts(config), fast=()) == "float16"


def test_the_embedded_model_runs_in_float32_though_its_checkpoint_is_float16():
    config = ModelConfig()
    assert model_facts(config).dtype == "float16"
    assert number_format(config, model_facts(config), fast={"float16"}) == "float32"


def test_a_model_is_loaded_in_the_format_that_this_machine_takes(folder, monkeypatch):
    for fast, dtype in (({"bfloat16"}, torch.bfloat16), (set(), torch.float32)):
        monkeypatch.setattr("raysae.lm.model.fast_formats", lambda gpu, fast=fast: fast)
        assert LanguageModel.load(ModelConfig(name=str(folder))).dtype == dtype


def test_float16_gives_the_activations_of_float32_up_to_its_rounding(folder):
    half = LanguageModel.load(ModelConfig(name=str(folder), dtype="float16"))
    full = LanguageModel.load(ModelConfig(name=str(folder), dtype="float32"))
    a, b = (lm.activations(random_tokens(), ["resid_post.2"])["resid_post.2"] for lm in (half, full))
    assert a.dtype == torch.float16
    assert float((a.float() - b).norm() / b.norm()) < 3e-3  # float16 rounds to 2⁻¹¹, several times on the way
