"""Conversations for :mod:`fusedkd.integrations.cache_teacher`: tokens by the tokenizer's chat template, labels on what
the assistant says.
"""

from __future__ import annotations

import json
import re
from typing import Any

import datasets
import jinja2
import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.kinds import IGNORE

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks the assistant's turns in a template."""
TOOLS = "tools"
"""The column of the functions that the assistant of a conversation may call."""


def conversations(data: datasets.Dataset, column: str, tokenizer: Tokenizer, console: Console) -> datasets.Dataset:
    """``input_ids`` and ``labels`` of each conversation, a list of messages with a role and a content; the template is
    given what a column `TOOLS` lists, too, in JSON or as it is. Labels are −100 outside the assistant's turns. Where
    these are, with what the template closes them by, says the template (``{% generation %}``); else a turn begins where
    the conversation before it ends, with the prompt to answer (the first message: where its content begins), and ends
    where the conversation up to it does, with or without an end-of-sequence token, or with its own first one.

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

    columns = [column, TOOLS] if TOOLS in data.column_names else [column]

    def row(messages: Any, *rest: Any) -> dict[str, list[int]]:
        *given, index = rest
        try:
            tools = _tools(*given)
        except ValueError as error:
            raise UsageError(f"the {TOOLS} of conversation {index} are no JSON: {error}") from None
        try:
            ids, said = label(tokenizer, _without_none(list(messages)), **tools)
        except _Untold as error:
            raise UsageError(
                f"what the assistant says in conversation {index} cannot be told: {error}; give rows of input_ids and "
                "labels"
            ) from None
        except (jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"the chat template does not take conversation {index}: {reason}") from error
        return {"input_ids": ids, "labels": [token if s else IGNORE for token, s in zip(ids, said, strict=True)]}

    if left := [name for name in data.column_names if name not in columns]:
        console.print(f"[bold]Left out[/bold]: the columns {', '.join(left)}")
    rows = data.select_columns(columns).map(row, with_indices=True, input_columns=columns, remove_columns=columns)
    labels = [np.concatenate(some["labels"]) for some in rows.with_format("numpy").iter(batch_size=1000)]
    total, labelled = (sum(map(len, each)) for each in (labels, [part[part != IGNORE] for part in labels]))
    if total and not labelled:
        raise UsageError(f"no conversation of the column {column} has tokens of the assistant")
    console.print(f"[bold]Chat[/bold]: {labelled:,} of {total:,} tokens are the assistant's")
    return rows


def _tools(given: Any = None) -> dict[str, Any]:
    """The option of a chat template, if there are any."""
    given = json.loads(given) if isinstance(given, str) and given else given
    given = [given] if isinstance(given, dict) else given
    tools = [json.loads(tool) if isinstance(tool, str) else _without_none(tool) for tool in given or ()]
    return {"tools": tools} if tools else {}


def _without_none(value: Any) -> Any:
    """A dict without the fields that are None: datasets gives every row the fields of all rows."""
    if isinstance(value, dict):
        return {name: _without_none(x) for name, x in value.items() if x is not None}
    return [_without_none(x) for x in value] if isinstance(value, list) else value


class _Untold(Exception):
    """Why."""


def _by_marks(tokenizer: Tokenizer, messages: list[Any], **more: Any) -> tuple[list[int], list[int]]:
    found: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **more)
    said = found["assistant_masks"]
    roles = [message["role"] if message.get("content") else None for message in messages]
    turns = sum(a == "assistant" != b for a, b in zip(roles, [None, *roles], strict=False))
    if sum(a > b for a, b in zip(said, [0, *said], strict=False)) < turns:
        # transformers marks all the rest where the last character of a turn, such as a space, is in no token.
        raise _Untold(f"the chat template marks fewer than its {turns} turns")
    return found["input_ids"], said


def _by_prefixes(tokenizer: Tokenizer, messages: list[Any], **more: Any) -> tuple[list[int], list[int]]:
    def tokens(messages: list[Any], prompt: bool = False) -> list[int]:
        options = {"add_generation_prompt": prompt, "return_dict": True, **more}
        rendered: Any = tokenizer.apply_chat_template(messages, **options)
        ids: list[int] = rendered["input_ids"]
        return ids

    whole, eos = tokens(messages), tokenizer.eos_token_id
    said = [0] * len(whole)

    def begin_of(i: int) -> int:
        """Where the content of a message does: what another one leaves the same. At the end, if there is none."""
        if i == len(messages):
            return len(whole)
        another = "B" if str(messages[i].get("content")).startswith("A") else "A"
        other = tokens([*messages[:i], messages[i] | {"content": another}, *messages[i + 1 :]])
        return next((n for n, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), len(other))

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = tokens(messages[:i], prompt=True) if i else whole[: begin_of(0)], tokens(messages[: i + 1])
        start, end = len(before), len(through)
        ends = whole[:end] == through
        if not ends and through[-1:] == [eos]:  # one for all the conversation
            end -= 1
            ends = whole[:end] == through[:end] and start < end
        if not ends and eos in whole[start : begin_of(i + 1)]:
            ends, end = True, whole.index(eos, start) + 1
        if not ends or whole[:start] != before:
            raise _Untold("the chat template marks no generation, and renders earlier turns otherwise in later ones")
        said[start:end] = [1] * (end - start)
    return whole, said
