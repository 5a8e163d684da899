"""The columns of a data set that hold a teacher's best tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

COLUMNS = ("teacher_ids", "teacher_logprobs")

Batch = dict[str, Any]


class OfflineTeacherCollator:
    """Pads the columns of an offline teacher to the batch that another collator makes of the other columns.

    Each example may have ``teacher_ids`` (L, K) and ``teacher_logprobs`` (L, K), L that of its ``input_ids``. They
    become ``(B, L, K)``, padded on the tokenizer's side with ids of −1. Batches without these columns pass.
    """

    def __init__(self, base_collator: Callable[[list[Any]], Batch]):
        self.base_collator = base_collator

    def __call__(self, examples: list[Any]) -> Batch:
        if isinstance(self.base_collator, OfflineTeacherCollator) or any(c not in examples[0] for c in COLUMNS):
            return self.base_collator(examples)
        rest = [{k: v for k, v in example.items() if k not in COLUMNS} for example in examples]
        lengths = [len(example["input_ids"]) for example in rest]
        batch = self.base_collator(rest)
        length = batch["input_ids"].shape[1]
        left = getattr(getattr(self.base_collator, "tokenizer", None), "padding_side", "right") == "left"
        for name, padding in zip(COLUMNS, (-1, 0.0), strict=True):
            rows = [torch.as_tensor(example[name]) for example in examples]
            for row, tokens in zip(rows, lengths, strict=True):
                if row.dim() != 2 or row.shape[0] != tokens:
                    raise ValueError(f"{name} must have a row for each of the {tokens} tokens, not {tuple(row.shape)}")
            shape = (len(rows), length, max(row.shape[1] for row in rows))
            batch[name] = padded = torch.full(shape, padding, dtype=rows[0].dtype)
            for i, row in enumerate(rows):
                start = length - len(row) if left else 0
                padded[i, start : start + len(row), : row.shape[1]] = row
        return batch
