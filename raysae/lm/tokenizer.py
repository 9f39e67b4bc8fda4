"""The tokenizer that belongs to a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysae.config import ModelConfig, UserError, digest
from raysae.lm.facts import model_folder, not_loadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `config` names.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer  # importing it takes seconds

    folder = model_folder(config)
    if folder is None and config.name == "embedded":
        raise not_loadable(config)
    try:
        return AutoTokenizer.from_pretrained(folder or config.name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        if folder is None:
            raise not_loadable(config, error) from None
        raise UserError(f"model.name is {config.name!r}: the folder holds no tokenizer that transformers can load") from None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits: equal where two tokenizers turn every text into the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([rules, tokenizer.bos_token_id, tokenizer.eos_token_id])
