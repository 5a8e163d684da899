"""Prompts and completions of a data set as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusedkd.integrations.offline import Batch
from fusedkd.integrations.tokenizers import cut_behind

PROMPT, COMPLETION = "prompt", "completion"


class PromptCollator:
    """Makes batches of examples with a `prompt` and, if there is one, a `completion`, padded on the right; labels are
    −100 but at the completion's tokens. Columns other than these two are left out.

    A prompt is text, token ids, or messages, which the chat template turns into text with its generation prompt; so is
    a completion, which of text ends with the tokenizer's end of sequence. Ids are taken as they are.

    Args:
        tokenizer: may be None where all are ids.
        template: options of the chat template, such as ``enable_thinking=False``.

    Raises:
        ValueError, TypeError: naming the example and the column, for what is empty or of another type, and for a chat
            template by which the messages of the prompt are not the beginning of the whole.
    """

    def __init__(self, tokenizer: Any = None, **template: Any):
        self.tokenizer, self.template = tokenizer, template

    def __call__(self, examples: list[Any]) -> Batch:
        pairs = [self._tokens(example, i) for i, example in enumerate(examples)]
        rows = [torch.cat(pair) for pair in pairs]
        labels = [torch.cat([torch.full_like(prompt, -100), completion]) for prompt, completion in pairs]
        padding = getattr(self.tokenizer, "pad_token_id", None)
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=padding or 0),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    def _tokens(self, example: Mapping[str, Any], index: int) -> tuple[Tensor, Tensor]:
        if PROMPT not in example:
            raise ValueError(f"example {index} of the batch has no column prompt, only {', '.join(example)}")
        prompt, completion = example[PROMPT], example.get(COMPLETION)
        ids = self._ids(prompt, f"the prompt of example {index}", begins=True)
        if len(ids) == 0:
            raise ValueError(f"the prompt of example {index} is empty: a completion needs a token before it")
        if completion is None:
            return ids, ids[:0]
        if _kind(completion) == "messages":
            if _kind(prompt) != "messages":
                raise TypeError(f"the completion of example {index} is messages, but its prompt is not")
            whole = self._chat([*prompt, *completion], False)
            if not torch.equal(whole[: len(ids)], ids):
                raise ValueError(
                    f"by the chat template the prompt of example {index} is not the beginning of prompt and "
                    "completion: pass both as text or token ids"
                )
            return ids, whole[len(ids) :]
        what = f"the completion of example {index}"
        if _kind(completion) == "text" and self.tokenizer is not None:
            return ids, self._behind(prompt, ids, completion, what)
        return ids, self._ids(completion, what, begins=False)

    def _behind(self, prompt: Any, ids: Tensor, completion: str, what: str) -> Tensor:
        """The tokens of text as it goes on: some tokenizers put a space before a text of its own."""
        if _kind(prompt) == "text":
            whole = self._ids(prompt + completion, what, begins=True)
            found = whole[len(ids) :] if torch.equal(whole[: len(ids)], ids) else whole[:0]
        else:
            found = ids[:0]
        if len(found) == 0:
            found = torch.tensor(cut_behind(self.tokenizer, [completion])[0], dtype=torch.int64)
        if len(found) == 0:
            return self._ids(completion, what, begins=False)
        end = self.tokenizer.eos_token_id
        return found if end is None else torch.cat([found, torch.tensor([end])])

    def _ids(self, given: Any, what: str, begins: bool) -> Tensor:
        kind = _kind(given)
        if kind == "ids":
            return torch.as_tensor(given, dtype=torch.int64)
        if kind is None:
            raise TypeError(f"{what} must be text, token ids or messages, not {type(given).__name__}")
        if self.tokenizer is None:
            raise ValueError(f"{what} is {kind}, for which a tokenizer is needed: pass processing_class=")
        if kind == "messages":
            return self._chat(given, True)
        end = self.tokenizer.eos_token_id
        ids = list(self.tokenizer(given, add_special_tokens=begins)["input_ids"])
        ids = ids[:-1] if ids and ids[-1] == end else ids  # which some tokenizers add to a beginning as well
        return torch.tensor(ids if begins or end is None else [*ids, end], dtype=torch.int64)

    def _chat(self, messages: Any, generate: bool) -> Tensor:
        options = {"tokenize": True, "return_dict": False, "add_generation_prompt": generate, **self.template}
        return torch.tensor(self.tokenizer.apply_chat_template(list(messages), **options), dtype=torch.int64)


def _kind(given: Any) -> str | None:
    """ "text", "ids", "messages" or None."""
    if isinstance(given, str):
        return "text"
    if isinstance(given, Tensor):
        return "ids" if given.dim() == 1 and not given.is_floating_point() else None
    if not isinstance(given, list | tuple) and not hasattr(given, "tolist"):
        return None
    items = list(given)
    if items and all(isinstance(item, Mapping) for item in items):
        return "messages"
    return "ids" if all(not isinstance(item, Mapping | str | float) for item in items) else None
