"""Conversations for :mod:`fusedkd.integrations.cache_teacher`: tokens by the tokenizer's chat template, labels on what
the assistant says.
"""

from __future__ import annotations

import re
from typing import Any

import datasets
import jinja2
import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.command import UsageError

IGNORE = -100
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks the assistant's turns in a template."""


def conversations(data: datasets.Dataset, column: str, tokenizer: Tokenizer, console: Console) -> datasets.Dataset:
    """``input_ids`` and ``labels`` of each conversation, a list of messages with a role and a content. Labels are −100
    outside the assistant's turns, where the template says where they are; else where the tokens of the conversation up
    to a turn, with the prompt to answer, are those at which the whole conversation begins.

    Raises:
        UsageError: where neither tells, or there is no template, or a conversation that it does not take.
    """
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise UsageError(
            f"the column {column} needs a tokenizer with a chat template, which {tokenizer.name_or_path} lacks: see "
            "--tokenizer"
        ) from None
    label = _by_marks if GENERATION.search(template) else _by_prefixes

    def row(messages: Any, index: int) -> dict[str, list[int]]:
        try:
            plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
            ids, said = label(tokenizer, plain)
        except _Untold:
            raise UsageError(
                f"what the assistant says in conversation {index} cannot be told: the chat template marks no "
                "generation, and renders earlier turns otherwise once a turn follows; give rows of input_ids and labels"
            ) from None
        except (jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"the chat template does not take conversation {index}: {reason}") from error
        return {"input_ids": ids, "labels": [token if s else IGNORE for token, s in zip(ids, said, strict=True)]}

    rows = data.select_columns(column).map(row, with_indices=True, input_columns=column, remove_columns=column)
    labels = [np.concatenate(some["labels"]) for some in rows.with_format("numpy").iter(batch_size=1000)]
    total, labelled = (sum(map(len, each)) for each in (labels, [part[part != IGNORE] for part in labels]))
    if total and not labelled:
        raise UsageError(f"no conversation of the column {column} has tokens of the assistant")
    console.print(f"[bold]Chat[/bold]: {labelled:,} of {total:,} tokens are the assistant's")
    return rows


class _Untold(Exception):
    pass


def _by_marks(tokenizer: Tokenizer, messages: list[Any]) -> tuple[list[int], list[int]]:
    found: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


def _by_prefixes(tokenizer: Tokenizer, messages: list[Any]) -> tuple[list[int], list[int]]:
    def tokens(count: int, prompt: bool = False) -> list[int]:
        rendered: Any = tokenizer.apply_chat_template(messages[:count], add_generation_prompt=prompt, return_dict=True)
        ids: list[int] = rendered["input_ids"]
        if ids != whole[: len(ids)]:
            raise _Untold
        return ids

    rendered: Any = tokenizer.apply_chat_template(messages, return_dict=True)
    whole: list[int] = rendered["input_ids"]
    said = [0] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = len(tokens(i, prompt=True)) if i else 0, len(tokens(i + 1))
            said[start:end] = [1] * (end - start)
    return whole, said
