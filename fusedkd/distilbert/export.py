"""What a folder that is exported must say for those who use it, where training or the teacher has it otherwise."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import BertTokenizer, DistilBertTokenizer, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer


def usable_positions(config: PreTrainedConfig) -> int:
    """The longest sequence a model takes. RoBERTa's first token has position pad_token_id + 1: 512 of its 514 rows."""
    return config.max_position_embeddings - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def tokenizer_for(config: PreTrainedConfig, tokenizer: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer, which knows the model's longest sequence and makes what the model takes.

    DistilBERT takes no token types, which transformers 4 refuses and 5 ignores.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, usable_positions(config))
    if config.model_type == "distilbert":
        if type(tokenizer) is BertTokenizer:
            tokenizer.__class__ = DistilBertTokenizer  # a BertTokenizer but for the names of what it makes
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def name_tokenizer_class(folder: str | Path) -> None:
    """Of a saved tokenizer without a class of its own: by the name that transformers 4 has for it, and 5 knows too."""
    file = Path(folder) / "tokenizer_config.json"
    if file.is_file() and (saved := json.loads(file.read_text())).get("tokenizer_class") == "TokenizersBackend":
        file.write_text(json.dumps({**saved, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


@contextmanager
def as_exported(model: Any) -> Iterator[None]:
    """Within, the model generates with a cache: the Trainer turns it off in the configuration, for training."""
    parts = [getattr(model, name, None) for name in ("config", "generation_config")]
    off: list[Any] = [part for part in parts if getattr(part, "use_cache", None) is False]
    for part in off:
        set_cache(part)
    try:
        yield
    finally:
        for part in off:
            part.use_cache = False


def set_cache(part: Any) -> None:
    """As a new configuration of its class has it; those without generation have no such attribute."""
    fresh = type(part)()
    if hasattr(fresh, "use_cache"):
        part.use_cache = fresh.use_cache
    else:
        del part.use_cache
