"""Models in .gguf files: planted weights come back, and a bad file is refused in a sentence."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from raysae.config import ModelConfig, UserError
from raysae.lm import gguf as ours
from raysae.lm.facts import model_facts
from raysae.lm.model import LanguageModel
from raysae.lm.tokenizer import load_tokenizer, tokenizer_digest

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: it rotates neighbours, transformers rotates halves."""
    size = len(weight) // heads
    return weight.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, kind: Type) -> dict[str, np.ndarray]:
    """Writes the model as llama.cpp does. Returns the matrices of 2-D tensors that the file stands for, by our name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *(chr(ord("!") + i) for i in range(61)), '!"'])
    writer.add_token_types([3, 3, *[1] * 62])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    stands_for = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = name.split(".")
        if parts[1] == "layers":
            there = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.weight"
        else:
            there = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]
        values = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(parts[-2])
        values = interleaved(values, heads) if heads else values
        if values.ndim == 1:
            writer.add_tensor(there, values)
            continue
        packed = gguf.quantize(values, kind)
        writer.add_tensor(there, packed, raw_dtype=kind)
        if not heads:
            stands_for[name] = gguf.dequantize(packed, kind).reshape(values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "UNPACKED", tmp_path / "unpacked")
    return tmp_path / "unpacked"


def test_a_file_of_float32_gives_the_logits_of_the_model_that_it_was_written_from(tmp_path, llama):
    write_gguf(tmp_path / "tiny.gguf", llama, Type.F32)
    config = ModelConfig(name=str(tmp_path / "tiny.gguf"))
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(LanguageModel.load(config).logits(tokens), llama(tokens).logits.detach())
    assert model_facts(config).dtype == "float32"
    assert len(tokenizer_digest(config)) == 16
    assert load_tokenizer(config).bos_token_id == 0


def test_quantised_weights_become_the_bfloat16_nearest_to_what_they_stand_for(tmp_path, llama, cache):
    stands_for = write_gguf(tmp_path / "tiny.gguf", llama, Type.Q8_0)
    config = ModelConfig(name=str(tmp_path / "tiny.gguf"))
    assert model_facts(config).dtype == "bfloat16"
    (folder,) = cache.iterdir()
    found = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in found  # It is the embedding
    for name, values in stands_for.items():
        assert torch.equal(found[name], torch.from_numpy(values).bfloat16()), name


def test_a_file_is_unpacked_once_and_anew_when_it_changes(tmp_path, llama, cache):
    write_gguf(tmp_path / "tiny.gguf", llama, Type.F32)
    first = ours.unpacked(tmp_path / "tiny.gguf")
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert ours.unpacked(tmp_path / "tiny.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    llama.model.norm.weight.data.mul_(2)
    write_gguf(tmp_path / "tiny.gguf", llama, Type.F32)
    assert ours.unpacked(tmp_path / "tiny.gguf") != first


def test_a_file_that_cannot_be_loaded_is_refused_in_a_sentence_and_leaves_nothing(tmp_path, cache):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"bad\.gguf', which cannot be unpacked to"):
        model_facts(ModelConfig(name=str(tmp_path / "bad.gguf")))
    assert list(cache.iterdir()) == []


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        model_facts(ModelConfig(name=str(tmp_path / "none.gguf")))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"")
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'raysae\[gguf\]'"):
        model_facts(ModelConfig(name=str(tmp_path / "tiny.gguf")))
