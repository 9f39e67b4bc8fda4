"""The tokenizer that belongs to a language model."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from raysae.config import ModelConfig, digest
from raysae.lm.digests import file_digest
from raysae.lm.facts import hub_commit, model_folder, not_loadable, not_loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "*.py",
)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `config` names.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer  # The import takes seconds, because torch comes with it

    folder = model_folder(config)
    if folder is None and config.name == "embedded":
        raise not_loadable(config)
    with not_loading(config):
        return AutoTokenizer.from_pretrained(
            folder or config.name,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )


def tokenizer_digest(config: ModelConfig) -> str:
    """16 hexadecimal digits of all that the tokens of a text depend on.

    That is the tokenizer's files, or its commit on the hub, and the versions of the libraries that read them. The
    digest does without loading the tokenizer, which takes seconds. So text that was tokenised before is found fast.
    """
    folder = model_folder(config)
    files = sorted({path for pattern in FILES for path in folder.glob(pattern)}) if folder else []
    content = {path.name: file_digest(path) for path in files} if folder else f"{config.name}@{hub_commit(config)}"
    return digest([content, version("tokenizers"), version("transformers")])
