"""Hook points of every architecture: reading, replacing, continuing from one, stopping early.

Activations must equal the model's own hidden states and its modules' outputs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from raysae.config import ModelConfig, UserError
from raysae.lm.facts import KINDS, hook_width
from raysae.lm.model import LanguageModel
from tests.lm.models import CONFIGS, LAYERS, LENGTH, VOCABULARY, load, random_tokens, save

EVERY_HOOK_POINT = [f"{kind}.{layer}" for kind in KINDS for layer in range(LAYERS)]

# Paths in each causal LM: the blocks, the final norm, and in each block the two output projections.
# They are written here independently of the package.
PATHS = {
    "gpt2": ("transformer.h", "transformer.ln_f", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox_parallel": ("gpt_neox.layers", "gpt_neox.final_layer_norm", "attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox_sequential": ("gpt_neox.layers", "gpt_neox.final_layer_norm", "attention.dense", "mlp.dense_4h_to_h"),
    **dict.fromkeys(
        ("llama", "gemma2", "qwen2", "qwen3", "mistral"),
        ("model.layers", "model.norm", "self_attn.o_proj", "mlp.down_proj"),
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def lm(architecture, tmp_path_factory) -> LanguageModel:
    return load(save(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture(scope="module")
def seen(lm) -> dict[str, torch.Tensor]:
    return lm.activations(random_tokens(), EVERY_HOOK_POINT)


def blocks_and_norm(lm: LanguageModel, architecture: str):
    blocks, norm, _, _ = PATHS[architecture]
    return lm.model.get_submodule(blocks), lm.model.get_submodule(norm)


def nonlinear(x: torch.Tensor) -> torch.Tensor:
    return 1.5 * x.tanh() + 0.1


class Calls:
    """Context manager that counts completed forward passes of modules."""

    def __init__(self, modules) -> None:
        self.counts = [0] * len(modules)
        self._modules = list(modules)

    def __enter__(self) -> list[int]:
        self._handles = [m.register_forward_hook(lambda *_, i=i: self._count(i)) for i, m in enumerate(self._modules)]
        return self.counts

    def _count(self, i: int) -> None:
        self.counts[i] += 1

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()


# ---------------------------------------------------------------- reading


def test_residual_stream_is_the_models_hidden_states(lm, seen, architecture):
    hidden = lm.model(random_tokens(), output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(LAYERS):
        assert_close(seen[f"resid_pre.{layer}"], hidden[layer], rtol=0, atol=0)
    for layer in range(LAYERS - 1):
        assert_close(seen[f"resid_post.{layer}"], hidden[layer + 1], rtol=0, atol=0)


def test_last_residual_is_the_last_blocks_output(lm, seen, architecture):
    blocks, norm = blocks_and_norm(lm, architecture)
    outputs = []
    with blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output)):
        hidden = lm.model(random_tokens(), output_hidden_states=True, use_cache=False).hidden_states
    last = seen[f"resid_post.{LAYERS - 1}"]
    assert_close(last, outputs[0], rtol=0, atol=0)
    assert_close(norm(last), hidden[-1], rtol=0, atol=0)  # transformers gives the last one after the final norm
    assert not torch.allclose(last, hidden[-1], atol=1e-2)


def test_parts_add_up_to_the_block(seen):
    for layer in range(LAYERS):
        total = seen[f"resid_pre.{layer}"] + seen[f"attn_out.{layer}"] + seen[f"mlp_out.{layer}"]
        assert_close(total, seen[f"resid_post.{layer}"], rtol=1e-5, atol=1e-5)
        assert min(seen[f"attn_out.{layer}"].norm(), seen[f"mlp_out.{layer}"].norm()) > 0.1


def test_projections_take_attn_z_and_mlp_act_to_what_is_added(lm, seen, architecture):
    blocks, _ = blocks_and_norm(lm, architecture)
    for layer, block in enumerate(blocks):
        for path, inner, outer, norm in zip(
            PATHS[architecture][2:],
            ("attn_z", "mlp_act"),
            ("attn_out", "mlp_out"),
            ("post_attention_layernorm", "post_feedforward_layernorm"),
            strict=True,
        ):
            added = block.get_submodule(path)(seen[f"{inner}.{layer}"])
            if architecture == "gemma2":
                added = block.get_submodule(norm)(added)
            assert_close(added, seen[f"{outer}.{layer}"], rtol=1e-5, atol=1e-5)


def test_widths_are_those_in_the_facts(lm, seen):
    tokens = random_tokens()
    for name, activation in seen.items():
        assert activation.shape == (*tokens.shape, hook_width(name, lm.facts))


def test_reading_some_equals_reading_all(lm, seen):
    tokens = random_tokens()
    for name in EVERY_HOOK_POINT:
        assert_close(lm.activations(tokens, [name])[name], seen[name], rtol=0, atol=0)
    two = lm.activations(tokens, ["mlp_act.1", "resid_pre.0", "mlp_act.1"])
    assert list(two) == ["mlp_act.1", "resid_pre.0"]


def test_no_hook_points_no_forward(lm, architecture):
    with Calls([lm.model]) as calls:
        assert lm.activations(random_tokens(), []) == {}
    assert calls == [0]


def test_forward_stops_after_the_highest_hook_point(lm, architecture):
    blocks, norm = blocks_and_norm(lm, architecture)
    head = lm.model.get_output_embeddings()
    attention_output, mlp_output = PATHS[architecture][2:]
    with Calls([*(block.get_submodule(attention_output) for block in blocks), norm, head]) as calls:
        lm.activations(random_tokens(), ["resid_post.0", "resid_pre.1"])
        assert calls == [1, 0, 0, 0, 0]
        lm.activations(random_tokens(), ["attn_z.1"])
        assert calls == [2, 0, 0, 0, 0]  # The second pass stops before the projection
    with Calls([*(block.get_submodule(mlp_output) for block in blocks), norm, head]) as calls:
        lm.activations(random_tokens(), ["attn_out.2", "mlp_out.0"])
        assert calls == [1, 1, 0, 0, 0]
        lm.activations(random_tokens(), [f"resid_post.{LAYERS - 1}"])
        assert calls == [2, 2, 1, 0, 0]


def test_token_loss(lm, seen, monkeypatch):
    tokens = random_tokens()
    monkeypatch.setattr("raysae.lm.model.LOGITS_AT_ONCE", 2 * LENGTH * VOCABULARY)  # Takes two contexts, then one
    result = lm.activations(tokens, ["resid_pre.1"], token_loss=True)
    assert set(result) == {"resid_pre.1", "token_loss"}
    assert_close(result["resid_pre.1"], seen["resid_pre.1"], rtol=0, atol=0)
    log_probability = lm.model(tokens).logits.double().log_softmax(-1)
    truth = -log_probability[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert_close(result["token_loss"][:, 1:].double(), truth, rtol=1e-5, atol=1e-5)
    assert result["token_loss"][:, 0].isnan().all()


# ---------------------------------------------------------------- replacing


def test_logits_are_the_models(lm):
    assert_close(lm.logits(random_tokens()), lm.model(random_tokens()).logits, rtol=0, atol=0)


def test_replacing_by_itself_changes_nothing(lm):
    clean = lm.logits(random_tokens())
    assert_close(
        lm.logits(random_tokens(), {name: lambda x: x.clone() for name in EVERY_HOOK_POINT}), clean, rtol=0, atol=0
    )


@pytest.mark.parametrize(("kind", "projection"), [("attn_out", 2), ("attn_z", 2), ("mlp_out", 3), ("mlp_act", 3)])
def test_zeroed_parts_equal_zeroed_weights(lm, architecture, kind, projection):
    """Zeroing what a block adds, or what its projection reads, equals zeroing the projection's weights."""
    layer = 1
    ablated = lm.logits(random_tokens(), {f"{kind}.{layer}": torch.zeros_like})
    assert not torch.allclose(ablated, lm.logits(random_tokens()), atol=1e-2)
    module = blocks_and_norm(lm, architecture)[0][layer].get_submodule(PATHS[architecture][projection])
    parameters = [module.weight] + ([module.bias] if kind.endswith("_out") and module.bias is not None else [])
    kept = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.zero_()
    try:
        truth = lm.model(random_tokens()).logits
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    assert_close(ablated, truth, rtol=1e-5, atol=1e-5)


def test_replaced_residual_reaches_norm_and_head(lm, architecture):
    _, norm = blocks_and_norm(lm, architecture)
    replacement = torch.randn(3, LENGTH, lm.facts.d_model, generator=torch.Generator().manual_seed(1))
    logits = lm.logits(random_tokens(), {f"resid_post.{LAYERS - 1}": lambda _: replacement})
    truth = lm.model.get_output_embeddings()(norm(replacement))
    if architecture == "gemma2":
        truth = 30 * (truth / 30).tanh()
    assert_close(logits, truth, rtol=1e-5, atol=1e-5)


def test_resid_pre_is_the_resid_post_below(lm):
    above = lm.logits(random_tokens(), {"resid_pre.2": nonlinear})
    assert_close(above, lm.logits(random_tokens(), {"resid_post.1": nonlinear}), rtol=0, atol=0)


def test_several_replacements_act_in_order(lm):
    tokens = random_tokens()
    constant = torch.ones_like(lm.activations(tokens, ["resid_pre.1"])["resid_pre.1"])
    both = lm.logits(tokens, {"resid_pre.2": nonlinear, "resid_pre.1": lambda _: constant})
    middle = []
    lm.logits(tokens, {"resid_pre.1": lambda _: constant, "resid_pre.2": lambda x: middle.append(x)})
    assert_close(both, lm.logits(tokens, {"resid_pre.2": lambda _: nonlinear(middle[0])}), rtol=0, atol=0)


def test_a_replacement_of_another_shape_is_refused(lm):
    with pytest.raises(ValueError, match="shape"):
        lm.logits(random_tokens(), {"resid_pre.1": lambda x: x[:, 1:]})
    prefix = lm.prefix(random_tokens(), "resid_pre.1")
    with pytest.raises(ValueError, match="shape"):
        lm.resume(prefix, prefix.activation[:1])


# ---------------------------------------------------------------- continuing


@pytest.mark.parametrize("hook_point", EVERY_HOOK_POINT)
def test_continuing_equals_a_whole_pass(lm, seen, hook_point):
    tokens = random_tokens()
    prefix = lm.prefix(tokens, hook_point)
    assert_close(prefix.activation, seen[hook_point], rtol=0, atol=0)
    clean, replaced = lm.logits(tokens), lm.logits(tokens, {hook_point: nonlinear})
    assert not torch.allclose(clean, replaced, atol=1e-2)
    assert_close(lm.resume(prefix, nonlinear(prefix.activation)), replaced, rtol=1e-5, atol=1e-5)
    assert_close(lm.resume(prefix, prefix.activation), clean, rtol=1e-5, atol=1e-5)  # A prefix works twice
    assert_close(lm.logits(tokens), clean, rtol=0, atol=0)  # The model is unchanged


@pytest.mark.parametrize(
    ("hook_point", "computed"),
    [
        ("resid_pre.0", [1, 1, 1]),
        ("resid_post.0", [0, 1, 1]),
        ("attn_out.1", [0, 1, 1]),
        ("mlp_act.2", [0, 0, 1]),
        ("resid_post.2", [0, 0, 0]),
    ],
)
def test_continuing_computes_only_the_blocks_from_the_hook_point_up(lm, architecture, hook_point, computed):
    prefix = lm.prefix(random_tokens(), hook_point)
    projections = [block.get_submodule(PATHS[architecture][3]) for block in blocks_and_norm(lm, architecture)[0]]
    with Calls(projections) as calls:
        lm.resume(prefix, nonlinear(prefix.activation))
    assert calls == computed


def test_a_twin_shares_weights_and_no_hooks(lm):
    tokens = random_tokens()
    twin, clean = lm.twin(), lm.logits(tokens)
    assert [t.data_ptr() for t in twin.model.state_dict().values()] == [
        t.data_ptr() for t in lm.model.state_dict().values()
    ]
    inside = []
    replaced = lm.logits(tokens, {"resid_post.0": lambda x: inside.append(twin.logits(tokens)) or nonlinear(x)})
    assert_close(inside, [clean], rtol=0, atol=0)
    assert_close(twin.logits(tokens, {"resid_post.0": nonlinear}), replaced, rtol=0, atol=0)


def test_an_error_while_continuing_leaves_the_model_whole(lm):
    tokens = random_tokens()
    clean = lm.logits(tokens)

    def fail(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        lm._logits_from(tokens, 2, torch.zeros(3, LENGTH, lm.facts.d_model), {"mlp_out.2": fail})
    assert_close(lm.logits(tokens), clean, rtol=0, atol=0)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel", "gemma2", "llama"])
def test_bfloat16(name, tmp_path):
    folder = save(name, tmp_path)
    half, full = load(folder, dtype="bfloat16"), load(folder)
    tokens = random_tokens()
    activations = half.activations(tokens, EVERY_HOOK_POINT, token_loss=True)
    assert activations.pop("token_loss").dtype == torch.float32
    assert {a.dtype for a in activations.values()} == {torch.bfloat16}
    truth = full.activations(tokens, EVERY_HOOK_POINT)
    for hook_point, activation in activations.items():
        assert (activation.float() - truth[hook_point]).norm() < 0.05 * truth[hook_point].norm(), hook_point
        prefix = half.prefix(tokens, hook_point)
        # The model casts the function's float32 to bfloat16
        replaced = half.logits(tokens, {hook_point: lambda x: nonlinear(x.float())})
        assert_close(half.resume(prefix, nonlinear(prefix.activation.float())), replaced, rtol=0, atol=0)


def test_device_map_is_passed_on(tmp_path, monkeypatch):
    folder = save("llama", tmp_path)
    pytest.importorskip("accelerate")
    from_pretrained, passed = AutoModelForCausalLM.from_pretrained, []
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **kwargs: passed.append(kwargs) or from_pretrained(*args, **kwargs),
    )
    spread, whole = load(folder, device_map="auto"), load(folder)
    assert [(kwargs["device_map"], kwargs["trust_remote_code"]) for kwargs in passed] == [
        ("auto", False),
        (None, False),
    ]
    tokens = random_tokens()
    for hook_point in EVERY_HOOK_POINT:
        prefix = spread.prefix(tokens, hook_point)
        expected = whole.logits(tokens, {hook_point: nonlinear})
        assert_close(spread.resume(prefix, nonlinear(prefix.activation)).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_blocks_with_a_forward_of_their_own_get_it_back(tmp_path):
    """accelerate gives each block a forward of its own where a model is spread over devices.

    Continuing from a hook point hides these forwards and restores them.
    """
    accelerate = pytest.importorskip("accelerate")
    lm = load(save("llama", tmp_path))
    clean = lm.logits(random_tokens())
    accelerate.dispatch_model(lm.model, {"": "cpu"}, force_hooks=True)
    own = [block.__dict__.get("forward") for block in lm.blocks]
    prefix = lm.prefix(random_tokens(), "resid_post.1")
    assert_close(lm.resume(prefix, prefix.activation), clean, rtol=0, atol=0)
    assert [block.__dict__.get("forward") for block in lm.blocks] == own


def test_gradients_are_off(tmp_path):
    lm = load(save("gpt2", tmp_path))
    assert not lm.model.training
    assert not lm.logits(random_tokens()).requires_grad


def test_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 of the model's tensors, e.g. model.layers.1.mlp.down_proj.weight"):
        load(folder)


# ---------------------------------------------------------------- architectures described by module paths

LLAMA_PATHS = {
    "blocks": "model.layers",
    "attn": "self_attn",
    "attn_proj": "self_attn.o_proj",
    "mlp": "mlp",
    "mlp_proj": "mlp.down_proj",
}
POST_NORMS = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}


def test_module_paths_make_an_unknown_architecture_known(tmp_path):
    folder = save("olmo2", tmp_path)
    lm = load(folder, modules={**LLAMA_PATHS, **POST_NORMS})
    tokens = random_tokens()
    seen = lm.activations(tokens, EVERY_HOOK_POINT)
    test_parts_add_up_to_the_block(seen)
    for hook_point in EVERY_HOOK_POINT:
        prefix = lm.prefix(tokens, hook_point)
        assert_close(
            lm.resume(prefix, nonlinear(prefix.activation)),
            lm.logits(tokens, {hook_point: nonlinear}),
            rtol=1e-5,
            atol=1e-5,
        )


def test_module_paths_that_do_not_add_up_are_refused(tmp_path):
    with pytest.raises(UserError, match="attn_norm"):
        load(save("olmo2", tmp_path / "olmo2"), modules=LLAMA_PATHS)


def test_named_parts_get_the_blocks_factor(tmp_path):
    granite = save("granite", tmp_path)
    tokens = random_tokens()
    named, found = load(granite, modules=LLAMA_PATHS), load(granite)
    assert named.facts.architecture == found.facts.architecture
    test_parts_add_up_to_the_block(named.activations(tokens, EVERY_HOOK_POINT))
    lm = load(granite, modules={"blocks": "model.layers"})
    assert lm.facts.kinds == ["resid_pre", "resid_post"]
    hidden = lm.model(random_tokens(), output_hidden_states=True).hidden_states
    assert_close(lm.activations(random_tokens(), ["resid_post.1"])["resid_post.1"], hidden[2], rtol=0, atol=0)
    with pytest.raises(UserError, match=r"'attn_out\.1' needs a module 'attn'"):
        lm.activations(random_tokens(), ["attn_out.1"])


def test_blocks_that_return_tuples(tmp_path):
    lm = load(
        save("gptj", tmp_path),
        modules={
            "blocks": "transformer.h",
            "attn": "attn",
            "attn_proj": "attn.out_proj",
            "mlp": "mlp",
            "mlp_proj": "mlp.fc_out",
        },
    )
    assert isinstance(lm.blocks[0](torch.zeros(1, 4, 24), position_ids=torch.arange(4)[None]), tuple)
    tokens = random_tokens()
    hook_points = [f"{kind}.{layer}" for kind in lm.facts.kinds for layer in range(LAYERS)]
    test_parts_add_up_to_the_block(lm.activations(tokens, hook_points))
    for hook_point in hook_points:
        prefix = lm.prefix(tokens, hook_point)
        assert_close(
            lm.resume(prefix, nonlinear(prefix.activation)),
            lm.logits(tokens, {hook_point: nonlinear}),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"blocks": "model.layer"}, "'blocks' is 'model.layer', which LlamaForCausalLM does not have"),
        ({"blocks": "model"}, "'blocks' is 'model', which is not the list of the model's decoder blocks"),
        ({"mlp_proj": "mlp.down"}, "'mlp_proj' is 'mlp.down', which LlamaDecoderLayer does not have"),
        ({"mlp_proj": "mlp.up_proj"}, "'mlp_proj' is 'mlp.up_proj', whose output is not that of 'mlp'"),
    ],
)
def test_wrong_module_paths(tmp_path, modules, message):
    with pytest.raises(UserError, match=message):
        load(save("llama", tmp_path), modules=modules)


def test_a_module_that_the_forward_pass_does_not_use(tmp_path):
    lm = load(save("llama", tmp_path))
    lm.blocks[0].idle = torch.nn.Identity()
    architecture = lm.facts.architecture
    idle = tuple(replace(block, attn_proj="idle") for block in architecture.blocks)
    facts = replace(lm.facts, architecture=replace(architecture, blocks=idle))
    with pytest.raises(UserError, match=r"'attn_proj' is 'idle', but the model's forward pass does not go through it"):
        LanguageModel(lm.model, facts)


# ---------------------------------------------------------------- a real model


def test_stories(stories_model):
    lm = LanguageModel.load(ModelConfig(name=str(stories_model)))
    tokens = torch.tensor([[1, 403, 407, 261, 378]])  # "<s> Once upon a time"
    loss = lm.activations(tokens, [], token_loss=True)["token_loss"]
    assert loss.shape == (1, 5)
    assert loss[:, 1:].isfinite().all()
    names = [f"{kind}.4" for kind in KINDS]
    seen = lm.activations(tokens, names)
    assert_close(
        seen["resid_pre.4"] + seen["attn_out.4"] + seen["mlp_out.4"], seen["resid_post.4"], rtol=1e-5, atol=1e-5
    )
