"""A teacher per row: the column of a data set that names it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch

NONE = -1
"""In a batch: of a sequence that has no teacher. The other values are indices of teachers."""

Batch = dict[str, Any]


def is_none(value: Any) -> bool:
    """Whether a value of the column says that the example has no teacher: None, −1, or what is missing (NaN, NA), which
    does not equal itself.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    return value is None or (value == value) is not True or bool(value == NONE)


class TeacherColumnCollator:
    """Takes a column out of the examples, of which another collator makes a batch; puts it back as indices ``(B,)``.

    Args:
        base_collator: of the other columns.
        column: its name. An example's value is one of `keys`, or None (in numbers also −1 or NaN) for no teacher.
        keys: of the teachers, in order.

    Raises:
        ValueError: naming the column and the value, where it is no key; where some examples of a batch have the column
            and others have not; and where the collator does not keep one row per example.
    """

    def __init__(self, base_collator: Callable[[list[Any]], Batch], column: str, keys: Iterable[Any]):
        self.base_collator, self.column = base_collator, column
        self.keys = {key: index for index, key in enumerate(keys)}

    def __call__(self, examples: list[Any]) -> Batch:
        having = sum(isinstance(example, Mapping) and self.column in example for example in examples)
        if 0 < having < len(examples):
            raise ValueError(
                f"{having} of {len(examples)} examples have the column {self.column}: all must have it, None where an "
                "example has no teacher"
            )
        if having:
            named = [example[self.column] for example in examples]
            examples = [{k: v for k, v in example.items() if k != self.column} for example in examples]
            batch = self.base_collator(examples)
        else:  # a collator of one's own may make the column, and data without it passes
            batch = dict(self.base_collator(examples))
            if self.column not in batch:
                return batch
            named = list(batch[self.column])
        rows = len(batch.get("input_ids", named))  # the trainer refuses a batch without
        if rows != len(named):
            if not having:
                raise ValueError(
                    f"the collator made {rows} rows, but its column {self.column} has {len(named)} entries: "
                    "it must name a teacher for each row"
                )
            raise ValueError(
                f"the collator made {rows} rows out of {len(named)} examples, each of which names a teacher in the "
                f"column {self.column}: it must keep one row per example"
            )
        batch[self.column] = torch.tensor([self._index(value) for value in named])
        return batch

    def _index(self, value: Any) -> int:
        key = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(key, Hashable) and key in self.keys:
            return self.keys[key]
        if is_none(key):
            return NONE
        names = ", ".join(repr(name) for name in self.keys)
        raise ValueError(f"the column {self.column} must name one of the teachers {names}, or none, not {key!r}")
