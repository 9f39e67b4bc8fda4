"""The tokenizer that belongs to a language model, and the token ids that the model takes."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from raysae.config import ModelConfig, UserError, digest
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
    "chat_template*",
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


def load_vocabulary(config: ModelConfig) -> tuple[int, int | None]:
    """How many token ids the model that `config` names takes, and the id that begins a context: BOS, or else EOS.

    The second is the tokenizer's. The model's configuration gives it where there is no tokenizer. It is None where the
    model has neither token.

    Raises:
        UserError: there is no model.
    """
    from transformers import AutoConfig

    with not_loading(config):
        found = AutoConfig.from_pretrained(
            model_folder(config) or config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        ).get_text_config()
    try:
        of = load_tokenizer(config)
    except UserError:
        of = found
    first = of.eos_token_id if of.bos_token_id is None else of.bos_token_id
    return found.vocab_size, first[0] if isinstance(first, list) else first


def tokenizer_digest(config: ModelConfig) -> str:
    """16 hexadecimal digits of all that the tokens of a text depend on.

    That is the tokenizer's files, or its commit on the hub, and the versions of the libraries that read them. The
    digest does without loading the tokenizer, which takes seconds. So text that was tokenised before is found fast.
    """
    folder = model_folder(config)
    files = sorted({path for pattern in FILES for path in folder.glob(pattern)}) if folder else []
    content = {path.name: file_digest(path) for path in files} if folder else f"{config.name}@{hub_commit(config)}"
    return digest([content, version("tokenizers"), version("transformers")])
