"""Other people's autoencoders.

Each test writes files as their authors do. Reconstructions must equal the authors' formulas, or loading must refuse.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raysae.config import UserError
from raysae.sae.base import Codes
from raysae.sae.files import save_sae
from raysae.sae.importers import load_any
from tests.sae.test_base import briefly_trained

D, N, K = 12, 40, 5


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Random latent-major weights with every oddity.

    Decoder rows have several norms, and one is zero. Biases are far from zero. Some thresholds are below 0.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    W_dec = normal(N, D) * torch.linspace(0.5, 2, N).unsqueeze(1) / D**0.5
    W_dec[3] = 0
    return {
        "W_enc": normal(N, D) / D**0.5,
        "W_dec": W_dec,
        "b_enc": 0.3 * normal(N),
        "b_dec": normal(D),
        "threshold": normal(N).add(0.5) * 0.4,
    }


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(300, D, generator=torch.Generator().manual_seed(1)) + 1


def top(codes: Tensor) -> Tensor:
    """`codes` with all but the K largest of each row set to 0."""
    values, indices = codes.topk(K)
    return torch.zeros_like(codes).scatter(1, indices, values)


def active(sae, x: Tensor) -> Tensor:
    codes = sae.encode(x)
    return (codes.values if isinstance(codes, Codes) else codes).gt(0).sum(1)


def check(where, name: str, hook_point: str, x: Tensor, codes: Tensor, reconstruction: Tensor) -> None:
    """Loads `where` and compares with what its authors' formulas gave in float64."""
    loaded = load_any(where)
    assert (loaded.name, loaded.sae.config.hook_point) == (name, hook_point)
    torch.testing.assert_close(loaded.sae(x).double(), reconstruction, rtol=1e-5, atol=1e-5)
    assert torch.equal(active(loaded.sae, x), (codes > 0).sum(1))
    assert codes.gt(0).any()


# ---------------------------------------------------------------- SAELens


def write_saelens(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    base = {
        "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.3.hook_mlp_out",
                     "context_size": 128},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({**base, **config}))
    return folder


def saelens_tensors(jumprelu: bool = False) -> dict[str, Tensor]:
    w = weights()
    return {
        "W_enc": w["W_enc"].T,
        "W_dec": w["W_dec"],
        "b_enc": w["b_enc"],
        "b_dec": w["b_dec"],
        **({"threshold": w["threshold"]} if jumprelu else {}),
    }


@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "topk by norm"])
def test_saelens(architecture, subtracted, x, tmp_path):
    """The formulas are those of SAELens 6: standard_sae.py, jumprelu_sae.py, topk_sae.py."""
    config = {"architecture": architecture.split()[0], "apply_b_dec_to_input": subtracted}
    if "topk" in architecture:
        config |= {"k": K, "rescale_acts_by_decoder_norm": "norm" in architecture}
    tensors = saelens_tensors(architecture == "jumprelu")
    write_saelens(tmp_path / "run" / "my sae", tensors, **config)
    W_enc, W_dec, b_enc, b_dec = (tensors[name].double() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    pre = (x.double() - b_dec * subtracted) @ W_enc + b_enc
    if architecture == "standard":
        codes = pre.relu()
        reconstruction = codes @ W_dec + b_dec
    elif architecture == "jumprelu":
        codes = pre.relu() * (pre > tensors["threshold"])
        reconstruction = codes @ W_dec + b_dec
    elif architecture == "topk":
        codes = top(pre).relu()
        reconstruction = codes @ W_dec + b_dec
    else:
        norms = W_dec.norm(dim=1)
        codes = top(pre * norms).relu()
        reconstruction = codes / norms.where(norms > 0, 1) @ W_dec + b_dec
    check(tmp_path / "run" / "my sae", "my-sae", "mlp_out.3", x, codes, reconstruction)
    check(tmp_path / "run" / "my sae" / "cfg.json", "my-sae", "mlp_out.3", x, codes, reconstruction)


@pytest.mark.parametrize("subtracted", [True, False])
def test_saelens_gated(subtracted, x, tmp_path):
    """The formulas are those of SAELens 6: gated_sae.py."""
    w, other = weights(), weights(1)
    tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {"b_gate": w["b_enc"], "b_mag": other["b_enc"], "r_mag": other["threshold"]}
    write_saelens(tmp_path / "sae", tensors, architecture="gated", apply_b_dec_to_input=subtracted)
    p = {name: tensor.double() for name, tensor in tensors.items()}
    sae_in = x.double() - p["b_dec"] * subtracted
    active_features = sae_in @ p["W_enc"] + p["b_gate"] > 0
    codes = active_features * (sae_in @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]).relu()
    check(tmp_path / "sae", "sae", "mlp_out.3", x, codes, codes @ p["W_dec"] + p["b_dec"])
    assert load_any(tmp_path / "sae").sae.config.architecture == "gated"


def test_saelens_before_version_6(x, tmp_path):
    tensors = saelens_tensors()
    write_saelens(tmp_path / "old", tensors)
    old = {"d_in": D, "d_sae": N, "dtype": "torch.float32", "hook_point": "blocks.2.attn.hook_z",
           "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False,
           "hook_head_index": None,
           "model_from_pretrained_kwargs": {"center_writing_weights": False}}  # fmt: skip
    (tmp_path / "old" / "cfg.json").write_text(json.dumps(old))
    codes = top((x.double() - tensors["b_dec"]) @ tensors["W_enc"].double() + tensors["b_enc"]).relu()
    check(tmp_path / "old", "old", "attn_z.2", x, codes, codes @ tensors["W_dec"].double() + tensors["b_dec"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "temporal"}, "architecture is temporal"),
        ({"architecture": "gated"}, "lacks the tensors b_gate, b_mag, r_mag"),
        ({"architecture": ["topk"]}, "architecture is .'topk'"),
        (
            {
                "metadata": {
                    "hook_name": "blocks.3.attn.hook_z",
                    "model_from_pretrained_kwargs": {"fold_value_biases": True},
                }
            },
            "processed weights .fold_value_biases",
        ),
        (
            {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
            "processed weights .center_writing_weights",
        ),
        (
            {"model_from_pretrained_kwargs": [1]},
            r"model_from_pretrained_kwargs is \[1\], which is not a JSON object",
        ),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 0}}, "attention head 0"),
        ({"metadata": "blocks.3"}, "metadata is 'blocks.3', which is not a JSON object"),
        ({"metadata": {"hook_name": 3}}, "name its hook point"),
        ({"activation_fn": "topk", "activation_fn_kwargs": [16]}, "activation_fn_kwargs is .16., which is not"),
        ({"normalize_activations": "layer_norm"}, r"normalises each activation by itself .*layer_norm"),
        ({"normalize_activations": "expected_average_only_in"}, "their mean norm .* which its files do not hold"),
        ({"normalize_activations": True}, "their mean norm .* which its files do not hold"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"architecture": "topk"}, "k is None"),
        ({"architecture": "topk", "k": 41}, "k is 41"),
        ({"architecture": "jumprelu"}, "lacks the tensor threshold"),
        ({"metadata": {"hook_name": "blocks.0.ln1.hook_normalized"}}, "name its hook point"),
    ],
)
def test_saelens_refused(config, message, tmp_path):
    write_saelens(tmp_path, saelens_tensors(), **config)
    with pytest.raises(UserError, match=message) as error:
        load_any(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
@pytest.mark.parametrize("said", [{}, {"finetuning_scaling_factor": True}])
def test_saelens_fine_tuned_multiplies_codes_before_the_decoder(name, said, x, tmp_path):
    """SAELens of April 2024 decodes codes · scaling_factor."""
    factor = torch.linspace(0.5, 1.5, N)
    tensors = saelens_tensors()
    write_saelens(tmp_path / "sae", tensors | {name: factor}, **said)
    W_enc, W_dec, b_enc, b_dec = (tensors[name].double() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    codes = ((x.double() - b_dec) @ W_enc + b_enc).relu()
    check(tmp_path / "sae", "sae", "mlp_out.3", x, codes, (codes * factor) @ W_dec + b_dec)


def test_saelens_scaling_factors_of_one_are_no_fine_tuning(x, tmp_path):
    plain = load_any(write_saelens(tmp_path / "plain", saelens_tensors())).sae
    ones = saelens_tensors() | {"scaling_factor": torch.ones(N)}
    write_saelens(tmp_path / "ones", ones, finetuning_scaling_factor=False)
    assert torch.equal(load_any(tmp_path / "ones").sae(x), plain(x))


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.full((N,), 2.0), "its configuration says that there is none"),
        (torch.full((N + 1,), 2.0), "not one number per latent"),
    ],
)
def test_saelens_scaling_factors_that_contradict_are_refused(factor, message, tmp_path):
    said = {"finetuning_scaling_factor": False} if len(factor) == N else {}
    write_saelens(tmp_path, saelens_tensors() | {"scaling_factor": factor}, **said)
    with pytest.raises(UserError, match=message):
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("hook_name", "hook_point", "module_output"),
    [
        ("transformer.h.1", "resid_post.1", False),
        ("model.layers.5", "resid_post.5", False),
        ("gpt_neox.layers.2.attention", "attn_out.2", True),
        ("model.layers.5.mlp", "mlp_out.5", True),
        ("model.layers.5.mlp.down_proj", "mlp_out.5", True),
        ("model.layers.5.post_feedforward_layernorm", "mlp_out.5", False),
        ("model.language_model.layers.7.self_attn.o_proj", "attn_out.7", True),
    ],
)
def test_saelens_hooks_named_by_a_module_are_its_output(hook_name, hook_point, module_output, tmp_path):
    write_saelens(tmp_path, saelens_tensors(), metadata={"hook_name": hook_name, "model_name": "m"})
    origin = load_any(tmp_path).origin
    assert (origin.hook_point, origin.module_output, origin.model) == (hook_point, module_output, "m")


@pytest.mark.parametrize("hook_name", ["model.layers.5.input_layernorm", "model.embed_tokens", "lm_head"])
def test_saelens_hooks_at_modules_that_are_no_hook_point_need_one(hook_name, tmp_path):
    write_saelens(tmp_path, saelens_tensors(), metadata={"hook_name": hook_name})
    with pytest.raises(UserError, match="name its hook point"):
        load_any(tmp_path)


# ---------------------------------------------------------------- Gemma Scope


def gemma_reconstruction(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction of the JumpReLU in Gemma Scope's tutorial. It encodes x without subtracting b_dec."""
    pre = x.double() @ w["W_enc"].double().T + w["b_enc"]
    codes = (pre > w["threshold"]) * pre.relu()
    return codes, codes @ w["W_dec"].double() + w["b_dec"]


@pytest.mark.parametrize(
    ("suffix", "hook_point"), [("res", "resid_post.20"), ("att", "attn_z.20"), ("mlp", "mlp_out.20")]
)
def test_gemma_scope_2(suffix, hook_point, x, tmp_path):
    w = weights()
    folder = tmp_path / f"gemma-scope-2b-pt-{suffix}" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz", **{name: (tensor.T if name == "W_enc" else tensor).numpy() for name, tensor in w.items()}
    )
    for where in (folder, folder / "params.npz", f"file://{folder}", f"file://{folder}/params.npz"):
        check(where, "layer_20_width_16k_average_l0_71", hook_point, x, *gemma_reconstruction(x, w))
    assert load_any(folder, hook_point="resid_post.1").sae.config.hook_point == "resid_post.1"


def write_gemma_3(folder: Path, **extra: Tensor) -> dict[str, Tensor]:
    w = weights()
    folder.mkdir(parents=True)
    lower = {
        "w_enc": w["W_enc"].T,
        "w_dec": w["W_dec"],
        "b_enc": w["b_enc"],
        "b_dec": w["b_dec"],
        "threshold": w["threshold"],
        **extra,
    }
    save_file({name: tensor.contiguous() for name, tensor in lower.items()}, folder / "params.safetensors")
    return w


@pytest.mark.parametrize(("place", "module", "hook_point"), [
    ("resid_post", "output", "resid_post.7"),
    ("attn_out", "self_attn.o_proj.input", "attn_z.7"),
    ("mlp_out", "post_feedforward_layernorm.output", "mlp_out.7"),
])  # fmt: skip
def test_gemma_scope_3(place, module, hook_point, x, tmp_path):
    folder = tmp_path / "gemma-scope-2-1b-pt" / place / "layer_7_width_16k_l0_small"
    w = write_gemma_3(folder)
    check(folder, f"{place}_layer_7_width_16k_l0_small", hook_point, x, *gemma_reconstruction(x, w))
    (folder / "config.json").write_text(
        json.dumps({"architecture": "jump_relu", "hf_hook_point_in": f"model.layers.8.{module}"})
    )
    check(folder, f"{place}_layer_7_width_16k_l0_small", hook_point.replace("7", "8"), x, *gemma_reconstruction(x, w))


def test_gemma_transcoders_are_refused(tmp_path):
    write_gemma_3(tmp_path / "a", affine_skip_connection=torch.zeros(D, D))
    with pytest.raises(UserError, match="transcoder"):
        load_any(tmp_path / "a", hook_point="mlp_out.3")
    write_gemma_3(tmp_path / "b")
    places = {
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
    }
    (tmp_path / "b" / "config.json").write_text(json.dumps({"architecture": "jump_relu", **places}))
    with pytest.raises(UserError, match="transcoder"):
        load_any(tmp_path / "b")


def test_gemma_scope_of_unknown_place_needs_a_hook_point(tmp_path):
    folder = tmp_path / "downloads"
    w = write_gemma_3(folder)
    with pytest.raises(UserError, match="name its hook point"):
        load_any(folder)
    assert load_any(folder, hook_point="resid_post.4").sae.config.hook_point == "resid_post.4"
    save_file({"w_enc": w["W_enc"].T.contiguous()}, folder / "params.safetensors")
    with pytest.raises(UserError, match="lacks the tensors w_dec, b_enc, b_dec, threshold"):
        load_any(folder, hook_point="resid_post.4")


# ---------------------------------------------------------------- sparsify


def write_sparsify(
    folder: Path, dtype: torch.dtype = torch.float32, extra: dict[str, Tensor] | None = None, **config
) -> dict[str, Tensor]:
    w = {name: tensor.to(dtype) for name, tensor in weights().items()}
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
        **(extra or {}),
    }
    save_file(tensors, folder / "sae.safetensors")
    base = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K,
            "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({**base, **config}))
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("hookpoint", "hook_point"),
    [("layers.5", "resid_post.5"), ("layers.5.mlp", "mlp_out.5"), ("h.2.attn", "attn_out.2")],
)
def test_sparsify(hookpoint, hook_point, dtype, x, tmp_path, monkeypatch):
    """SparseCoder.encode subtracts b_dec, applies ReLU, then keeps the k largest."""
    w = {name: tensor.double() for name, tensor in write_sparsify(tmp_path / "sae-pythia" / hookpoint, dtype).items()}
    codes = top(((x.double() - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu())
    folder = tmp_path / "sae-pythia" / hookpoint
    monkeypatch.chdir(folder)
    for where in (folder, folder / "cfg.json", folder / "sae.safetensors", "."):
        check(where, f"sae-pythia_{hookpoint}", hook_point, x, codes, codes @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "transcoder"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"signed": True}, "signed"),
    ],
)
def test_sparsify_refused(config, message, tmp_path):
    write_sparsify(tmp_path / "layers.5", **config)
    with pytest.raises(UserError, match=message):
        load_any(tmp_path / "layers.5")


# ---------------------------------------------------------------- dictionary_learning


def write_dictionary(folder: Path, dict_class: str, tensors: dict[str, Tensor], **trainer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    base = {"dict_class": dict_class, "activation_dim": D, "dict_size": N, "layer": 8,
            "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_8", "lr": 1e-4}  # fmt: skip
    (folder / "config.json").write_text(
        json.dumps({"trainer": {**base, **trainer}, "buffer": {"ctx_len": 128, "d_submodule": D}})
    )
    return folder


@pytest.mark.parametrize(
    "dict_class",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)
def test_dictionary_learning(dict_class, x, tmp_path):
    """The formulas are those of dictionary.py and trainers/{top_k, batch_top_k, matryoshka_batch_top_k}.py."""
    w = weights()
    linear = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    plain = {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    counts = {"k": torch.tensor(K), "threshold": torch.tensor(0.6)}
    tensors = {
        "AutoEncoder": {**linear, "bias": w["b_dec"]},
        "AutoEncoderNew": {**linear, "decoder.bias": w["b_dec"]},
        "AutoEncoderTopK": {**linear, "b_dec": w["b_dec"], **counts},
        "BatchTopKSAE": {**linear, "b_dec": w["b_dec"], **counts},
        "MatryoshkaBatchTopKSAE": {**plain, **counts, "group_sizes": torch.tensor([10, 30])},
        "JumpReluAutoEncoder": {**plain, "threshold": w["threshold"]},
    }[dict_class]
    folder = write_dictionary(
        tmp_path / "pythia" / "trainer_0", dict_class, tensors, **({"k": K} if "TopK" in dict_class else {})
    )
    w = {name: tensor.double() for name, tensor in w.items()}
    subtracted = dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    pre = (x.double() - w["b_dec"] * subtracted) @ w["W_enc"].T + w["b_enc"]
    if dict_class == "AutoEncoderTopK":
        codes = top(pre.relu())
    elif "Batch" in dict_class:
        codes = pre.relu() * (pre.relu() > 0.6)
    elif dict_class == "JumpReluAutoEncoder":
        codes = (pre * (pre > w["threshold"])).relu()
    else:
        codes = pre.relu()
    check(folder, "pythia_trainer_0", "resid_post.8", x, codes, codes @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize(
    ("dict_class", "trainer", "message"),
    [
        ("GatedAnnealAutoEncoder", {}, "GatedAnnealAutoEncoder"),
        ("AutoEncoderTopK", {"submodule_name": "embed"}, "name its hook point"),
        (None, {}, "None"),
    ],
)
def test_dictionary_learning_refused(dict_class, trainer, message, tmp_path):
    w = weights()
    tensors = {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "b_dec": w["b_dec"],
    }
    write_dictionary(tmp_path, dict_class, tensors, k=K, **trainer)
    with pytest.raises(UserError, match=message):
        load_any(tmp_path)


def test_dictionary_learning_gated(x, tmp_path):
    """The formulas are those of GatedAutoEncoder in dictionary.py."""
    w, other = weights(), weights(1)
    tensors = {"encoder.weight": w["W_enc"], "decoder.weight": w["W_dec"].T, "decoder_bias": w["b_dec"]}
    tensors |= {"r_mag": other["threshold"], "gate_bias": w["b_enc"], "mag_bias": other["b_enc"]}
    folder = write_dictionary(tmp_path / "pythia" / "trainer_0", "GatedAutoEncoder", tensors)
    p = {name: tensor.double() for name, tensor in tensors.items()}
    x_enc = (x.double() - p["decoder_bias"]) @ p["encoder.weight"].T
    codes = (x_enc + p["gate_bias"] > 0) * (p["r_mag"].exp() * x_enc + p["mag_bias"]).relu()
    check(folder, "pythia_trainer_0", "resid_post.8", x, codes, codes @ w["W_dec"].double() + p["decoder_bias"])


@pytest.mark.parametrize(
    ("submodule_name", "hook_point"),
    [
        ("resid_post_layer_8", "resid_post.8"),
        ("mlp_layer_3", "mlp_out.3"),
        ("attn_layer_0", "attn_out.0"),
        ("attention_layer_12", "attn_out.12"),
        ("resid_pre_layer_8", None),
        ("mlp_in_layer_3", None),
        ("resid_post", None),
        (None, None),
    ],
)
def test_places_of_dictionary_learning_are_not_guessed(submodule_name, hook_point, tmp_path):
    w = weights()
    tensors = {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "b_dec": w["b_dec"],
    }
    write_dictionary(tmp_path, "AutoEncoderTopK", tensors, k=K, submodule_name=submodule_name)
    if hook_point:
        assert load_any(tmp_path).sae.config.hook_point == hook_point
    else:
        with pytest.raises(UserError, match="name its hook point"):
            load_any(tmp_path)


def test_a_trainer_that_is_no_object_is_refused(tmp_path):
    write_dictionary(tmp_path, "AutoEncoder", {})
    (tmp_path / "config.json").write_text(json.dumps({"trainer": "x"}))
    with pytest.raises(UserError, match="trainer is 'x', which is not a JSON object"):
        load_any(tmp_path)


def test_pickled_code_is_not_run(tmp_path):
    write_dictionary(tmp_path, "AutoEncoder", {})
    torch.save({"encoder.weight": Path("x")}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=r"ae\.pt is damaged, or holds more than tensors .* The traceback is in "):
        load_any(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"junkjunk", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"]
)
def test_damaged_pickles(content, tmp_path):
    write_dictionary(tmp_path, "AutoEncoder", {})
    (tmp_path / "ae.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"ae\.pt is damaged, or holds more than tensors .* The traceback is in "):
        load_any(tmp_path)


# ---------------------------------------------------------------- Llama Scope


def write_llama_scope(folder: Path, **config) -> dict[str, Tensor]:
    w = weights()
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
               "decoder.bias": w["b_dec"]}  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "checkpoints/final.safetensors")
    base = {"d_model": D, "d_sae": N, "act_fn": "jumprelu", "jump_relu_threshold": 0.3,
            "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 7.0, "out": 7.0},
            "hook_point_in": "blocks.9.hook_resid_post",
            "hook_point_out": "blocks.9.hook_resid_post", "apply_decoder_bias_to_pre_encoder": False}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps({**base, **config}))
    return w


@pytest.mark.parametrize("subtracted", [False, True])
def test_llama_scope(subtracted, x, tmp_path):
    """The formulas are those of SAELens 6.54: its loader of Llama Scope, its jumprelu, and the norm's folding."""
    folder = tmp_path / "Llama3_1-8B-Base-L9R-8x"
    w = {
        name: tensor.double()
        for name, tensor in write_llama_scope(folder, apply_decoder_bias_to_pre_encoder=subtracted).items()
    }
    factor = D**0.5 / 7.0
    pre = (x.double() * factor - w["b_dec"] * subtracted) @ w["W_enc"].T + w["b_enc"]
    codes = pre.relu() * (pre > 0.3 * factor)
    for where in (folder, folder / "hyperparams.json", folder / "checkpoints/final.safetensors", f"file://{folder}"):
        check(where, folder.name, "resid_post.9", x, codes, (codes @ w["W_dec"] + w["b_dec"]) / factor)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hook_point_out": "blocks.9.hook_mlp_out"}, "transcoder"),
        ({"act_fn": "topk"}, "activation function is topk"),
        ({"use_glu_encoder": True}, "a gated linear unit"),
        ({"norm_activation": "token-wise"}, "needs norm_activation 'dataset-wise'"),
        ({"dataset_average_activation_norm": {}}, "dataset_average_activation_norm.in above 0"),
    ],
)
def test_llama_scope_refused(config, message, tmp_path):
    write_llama_scope(tmp_path / "sae", **config)
    with pytest.raises(UserError, match=message):
        load_any(tmp_path / "sae")


# ---------------------------------------------------------------- OpenAI


def write_openai(folder: Path, **more) -> Path:
    w = weights()
    folder.mkdir(parents=True)
    state = {"pre_bias": w["b_dec"], "latent_bias": w["b_enc"], "encoder.weight": w["W_enc"],
             "decoder.weight": w["W_dec"].T, "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
             "activation": "ReLU", "activation_state_dict": {}}  # fmt: skip
    torch.save(state | more, folder / "8.pt")
    return folder / "8.pt"


@pytest.mark.parametrize(
    ("location", "hook_point"),
    [("resid_delta_mlp", "mlp_out.8"), ("mlp_post_act_v4", "mlp_act.8"), ("resid_post_mlp", "resid_post.8")],
)
def test_openai(location, hook_point, x, tmp_path):
    """The formulas are those of sparse_autoencoder/model.py without normalisation."""
    file = write_openai(tmp_path / location / "autoencoders")
    w = {name: tensor.double() for name, tensor in weights().items()}
    codes = ((x.double() - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu()
    for where in (file, f"file://{file}"):
        check(where, f"{location}_autoencoders_8", hook_point, x, codes, codes @ w["W_dec"] + w["b_dec"])


def test_openai_with_topk_is_refused(tmp_path):
    file = write_openai(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders", activation="TopK")
    with pytest.raises(UserError, match="activation is TopK, with which OpenAI's code normalises each activation"):
        load_any(file)


def test_another_file_of_tensors_is_not_taken_for_openais(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "8.pt")
    with pytest.raises(UserError, match="holds a tensor latent_bias"):
        load_any(tmp_path / "8.pt")


# ---------------------------------------------------------------- all of them


def test_own_saes(tmp_path):
    sae, x = briefly_trained("topk")
    save_sae(sae, tmp_path / "sae", {})
    loaded = load_any(tmp_path / "sae")
    assert loaded.name == sae.config.name
    assert torch.equal(loaded.sae(x), sae.folded()(x))
    assert load_any(f"file://{tmp_path}/sae", hook_point="mlp_out.1").sae.config.hook_point == "mlp_out.1"
    (tmp_path / "sae" / "raysae.json").unlink()  # SAELens would not write this file
    assert torch.equal(load_any(tmp_path / "sae").sae(x), sae.folded()(x))


def test_latents_have_norm_one_where_that_changes_nothing(tmp_path):
    write_saelens(tmp_path, saelens_tensors(True), architecture="jumprelu")
    norms = load_any(tmp_path).sae.decoder().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(N).where(torch.arange(N) != 3, 0))


@pytest.mark.parametrize("where", ["nowhere", "file:///nowhere/at/all"])
def test_nothing_there(where):
    with pytest.raises(UserError, match="no such file or folder"):
        load_any(where)


def test_urls_that_cannot_be_read(monkeypatch):
    with pytest.raises(UserError, match="sae is 'foo://x', which cannot be opened"):
        load_any("foo://x")

    def no_network(*_):
        raise RuntimeError("no network")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.exists", no_network)
    with pytest.raises(UserError, match="memory://sae, which cannot be reached"):
        load_any("memory://sae")


def test_not_an_sae(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not a saved SAE"):
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("W_enc", torch.zeros(D, N + 1), "W_enc is 41 × 12"),
        ("b_dec", torch.zeros(D + 1), "b_dec is 13"),
        ("W_dec", torch.zeros(N), "W_dec has 1 dimension"),
        ("b_enc", torch.full((N,), torch.nan), "not finite"),
    ],
)
def test_shapes_that_do_not_fit(name, tensor, message, tmp_path):
    write_saelens(tmp_path, saelens_tensors() | {name: tensor})
    with pytest.raises(UserError, match=message):
        load_any(tmp_path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_damaged_files(name, tmp_path):
    write_saelens(tmp_path, saelens_tensors())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_any(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.zeros(3))
    (tmp_path / "cfg.json").unlink()
    (tmp_path / "params.npz").write_bytes((tmp_path / "params.npz").read_bytes()[:50])
    with pytest.raises(UserError, match=r"params\.npz is damaged"):
        load_any(tmp_path)
