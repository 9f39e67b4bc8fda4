"""The vocabulary of a language model, with a tokenizer and without."""

import pytest

from raysae.config import ModelConfig, UserError
from raysae.lm.tokenizer import load_vocabulary, tokenizer_digest
from tests.lm.models import VOCABULARY, save


def test_the_vocabulary_of_a_model_without_a_tokenizer_is_its_configs(tmp_path):
    assert load_vocabulary(ModelConfig(name=str(save("llama", tmp_path)))) == (VOCABULARY, 1)


def test_bos_is_the_tokenizers(stories_model):
    assert load_vocabulary(ModelConfig(name=str(stories_model))) == (512, 1)
    assert load_vocabulary(ModelConfig()) == (4096, 0)


def test_no_model_no_vocabulary(tmp_path):
    with pytest.raises(UserError, match=r"model\.name is"):
        load_vocabulary(ModelConfig(name=str(tmp_path)))


def test_the_digest_covers_the_chat_template(tmp_path):
    config = ModelConfig(name=str(save("llama", tmp_path)))
    before = tokenizer_digest(config)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(config) != before
