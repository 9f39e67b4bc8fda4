"""Whether an SAE fits a language model: by hook point, width, model, post-norm, and processed weights."""

import pytest

from raysae.config import ModelConfig, UserError
from raysae.lm.facts import model_facts
from raysae.sae.origins import Origin, doubt_of, from_gemma_scope, is_of, processing_doubt, require_fit
from tests.lm.models import save


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A Gemma 2 of three layers, 24 wide, which has post-norms."""
    return model_facts(ModelConfig(name=str(save("gemma2", tmp_path_factory.mktemp("gemma2")))))


def test_an_sae_of_the_models_own_hook_point_and_width_fits(facts):
    require_fit("a", "mlp_out.2", 24, Origin("mlp_out.2"), facts, "google/gemma-2-2b")


@pytest.mark.parametrize(
    ("hook_point", "d_in", "origin", "sentence"),
    [
        ("resid_post.3", 24, Origin(), "^a does not fit model.name 'google/gemma-2-2b': hook point"),
        ("resid_post.1", 25, Origin(), "^a takes activations 25 wide, but resid_post.1 of .* is 24 wide"),
        ("resid_post.1", 24, Origin(model="gpt2-xl"), "^a was trained on gpt2-xl, and model.name is 'goo"),
        ("mlp_out.1", 24, Origin(module_output=True), "^a was trained on a module's output before its post-norm"),
        ("attn_out.1", 24, Origin(module_output=True), "^a was trained on a module's output before its post-norm"),
    ],
)  # fmt: skip
def test_an_sae_that_does_not_fit_is_refused_by_name(hook_point, d_in, origin, sentence, facts):
    with pytest.raises(UserError, match=sentence):
        require_fit("a", hook_point, d_in, origin, facts, "google/gemma-2-2b")


def test_a_modules_output_is_the_hook_point_where_no_post_norm_follows(tmp_path):
    facts = model_facts(ModelConfig(name=str(save("llama", tmp_path / "llama"))))
    require_fit("a", "mlp_out.1", 24, Origin(module_output=True), facts, "some/llama")


@pytest.mark.parametrize(
    ("said", "model", "verdict"),
    [
        ("pythia-70m", "EleutherAI/pythia-70m", True),
        ("gpt2-small", "gpt2", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("google/gemma-2-2b", "google/gemma-2-2b-it", None),  # An SAE of the base model on the tuned one
        ("gpt2", "embedded", False),
        ("embedded", "gpt2", False),
        ("google/gemma-2-2b", "google/gemma-2-9b", False),
        ("/home/me/my-model", "google/gemma-2-9b", None),
        (None, "gpt2", None),
    ],
)
def test_names_of_models(said, model, verdict):
    assert is_of(said, model) is verdict


def test_a_folder_may_hold_any_model(tmp_path, monkeypatch):
    assert is_of("gpt2", str(tmp_path)) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert is_of("gpt2", "mine") is None


def test_what_is_not_certain_is_a_warning_with_the_saes_name():
    assert doubt_of("a", Origin(model="gpt2"), "gpt2") is None
    assert doubt_of("a", Origin(), "gpt2") is None
    assert doubt_of("a", Origin(model="google/gemma-2-2b"), "google/gemma-2-2b-it").startswith(
        "a was trained on google"
    )
    assert doubt_of("a", Origin(doubt="its files lie"), "gpt2") == "a: its files lie"


@pytest.mark.parametrize(
    ("said", "hook_point", "told"),
    [
        ({"model_name": "gpt2-small"}, "resid_post.3", True),
        ({"model_name": "gpt2-small", "model_from_pretrained_kwargs": {}}, "resid_post.3", True),
        ({"model_name": "gpt2-small", "model_from_pretrained_kwargs": {"fold_ln": True}}, "resid_post.3", True),
        ({"model_name": "gpt2", "model_from_pretrained_kwargs": {"center_writing_weights": False}}, "mlp_out.3", False),
        ({"model_name": "gpt2-small"}, "mlp_act.3", False),  # Neurons read the layer norm's output, which is the same
        ({"model_name": "gpt2-small"}, "attn_z.3", True),
        ({"model_name": "gemma-2b"}, "resid_post.3", False),  # Its norms do not subtract a mean
        ({"model_name": "gpt2", "model_class_name": "AutoModelForCausalLM"}, "resid_post.3", False),
    ],
)  # fmt: skip
def test_files_that_do_not_say_how_weights_were_processed_are_doubted(said, hook_point, told):
    kind, layer = hook_point.split(".")
    names = {
        "resid_post": "hook_resid_post",
        "mlp_out": "hook_mlp_out",
        "mlp_act": "mlp.hook_post",
        "attn_z": "attn.hook_z",
    }
    doubt = processing_doubt(said | {"hook_name": f"blocks.{layer}.{names[kind]}"}, hook_point)
    assert (doubt is not None) is told


@pytest.mark.parametrize(
    ("repository", "model"),
    [
        ("gemma-scope-2b-pt-res", "google/gemma-2-2b"),
        ("gemma-scope-9b-it-res", "google/gemma-2-9b-it"),
        ("gemma-scope-2-1b-pt", "google/gemma-3-1b-pt"),
        ("downloads", None),
    ],
)
def test_gemma_scopes_repositories_name_their_model(repository, model):
    assert from_gemma_scope((repository, "layer_3"), None).model == model
