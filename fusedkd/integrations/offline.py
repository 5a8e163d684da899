"""The columns of a data set that hold a teacher's best tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusedkd.integrations.cache_store import PACKED, Header, decode

COLUMNS = ("teacher_ids", "teacher_logprobs")
PADDING = (-1, 0.0)

Batch = dict[str, Any]


class OfflineTeacherCollator:
    """Pads the columns of an offline teacher to the batch that another collator makes of the other columns.

    Each example may have ``teacher_ids`` and ``teacher_logprobs``, a list of columns for each of the L tokens of its
    ``input_ids``: ``(L, K)``, or lists of different lengths. They become ``(B, L, K)``, padded with ids of −1, and lie
    where the batch has the example's tokens: at the beginning of a row, at its end, or one example after the other in a
    single row (a collator that flattens). The compact column ``teacher_packed`` of
    :mod:`fusedkd.integrations.cache_store` may stand in their place. Batches without these columns pass.

    ``position_ids`` (L,), if there are any, are padded in the same way, with 0. Where they restart within an example,
    they mark packed documents, which causal models of transformers keep apart only in a batch without
    ``attention_mask``: it is taken out; labels at padding, and ids before it, become −100 and −1.

    Args:
        base_collator: of the other columns.
        of: the column to whose tokens those of the teacher belong: of an encoder–decoder "labels".
        logprobs_temperature: that of the loss's ``TeacherTopK``, which the compact column must have been taken at.
            None: not compared.

    Raises:
        ValueError: naming the column and the example, where the two columns or the tokens differ in length, where the
            batch does not hold the examples' tokens, where the base collator fails on examples of different lengths,
            and where a compact column is damaged or of another temperature.
    """

    def __init__(
        self,
        base_collator: Callable[[list[Any]], Batch],
        *,
        of: str = "input_ids",
        logprobs_temperature: float | None = None,
    ):
        self.base_collator, self.of = base_collator, of
        self.logprobs_temperature = logprobs_temperature

    def __call__(self, examples: list[Any]) -> Batch:
        examples = [self._unpacked(example) if PACKED in example else example for example in examples]
        without = [i for i, example in enumerate(examples) if any(example.get(name) is None for name in COLUMNS)]
        if isinstance(self.base_collator, OfflineTeacherCollator) or len(without) == len(examples):
            return self.base_collator(examples)
        if without:
            raise ValueError(
                f"every example must have {' and '.join(COLUMNS)}, or none of a batch, but example {without[0]} of the "
                "batch has none"
            )
        ours = (*COLUMNS, "position_ids")
        rest = [{name: value for name, value in example.items() if name not in ours} for example in examples]
        tokens = [torch.as_tensor(example[self.of]) for example in rest]
        teacher = [_columns(examples[i], f"example {i} of the batch", len(ids)) for i, ids in enumerate(tokens)]
        batch = self._padded(rest, {len(ids) for ids in tokens})
        places = _places(batch, rest, tokens, self.of)
        for name, rows, padding in zip(COLUMNS, zip(*teacher, strict=True), PADDING, strict=True):
            batch[name] = _placed(rows, places, batch[self.of].shape, padding)
        if "position_ids" in examples[0]:
            _add_positions(batch, [_positions(examples[i], i, len(ids)) for i, ids in enumerate(tokens)], places)
        return batch

    def _padded(self, examples: list[Any], lengths: set[int]) -> Batch:
        try:
            return self.base_collator(examples)
        except (ValueError, RuntimeError) as error:
            if len(lengths) == 1:
                raise
            name = getattr(self.base_collator, "__name__", type(self.base_collator).__name__)
            raise ValueError(
                f"data_collator must pad examples of different lengths, here of {min(lengths)} to {max(lengths)} "
                f"tokens, and {name} failed: DataCollatorForSeq2Seq(tokenizer) pads labels as well"
            ) from error

    def _unpacked(self, example: Batch) -> Batch:
        rest = {name: value for name, value in example.items() if name != PACKED}
        if example[PACKED] is None:  # data sets that were concatenated
            return rest
        taken, wanted = Header.read(example[PACKED]).temperature, self.logprobs_temperature
        if wanted is not None and abs(taken - wanted) > 1e-6 * taken:
            raise ValueError(f"logprobs_temperature must be {taken:g}, at which {PACKED} was taken, not {wanted:g}")
        return rest | decode(example[PACKED])


def restarts(position_ids: Tensor) -> Tensor:
    """Where a document begins after another in the same row, ``(…, L)`` bool: where a position does not follow its
    predecessor. What transformers goes by.
    """
    first = torch.zeros_like(position_ids[..., :1], dtype=torch.bool)
    return torch.cat([first, position_ids.diff(dim=-1) != 1], -1)


def _columns(example: Batch, who: str, tokens: int) -> list[Tensor]:
    """Ids and log-probabilities ``(tokens, K)``; lists of different lengths are padded to the longest."""
    found, widths = [], []
    for name, padding, dtype in zip(COLUMNS, PADDING, (torch.int64, torch.float32), strict=True):
        value = example[name]
        try:
            widths.append([len(row) for row in value])
        except TypeError:
            raise ValueError(f"{name} must have a list of columns for each token, but that of {who} is flat") from None
        if len(value) != tokens:
            decoder = hasattr(example.get("labels"), "__len__") and len(example["labels"]) == len(value)
            hint = ': of an encoder–decoder, pass of="labels"' if decoder else ""
            raise ValueError(f"{name} must have a row for each of the {tokens} tokens of {who}, not {len(value)}{hint}")
        if len(set(widths[-1])) > 1:
            value = pad_sequence(_of_one_type([_typed(row, dtype) for row in value]), True, padding)
        found.append(_typed(value, dtype))
    if widths[0] != widths[1]:
        at, ids, logprobs = next((i, a, b) for i, (a, b) in enumerate(zip(*widths, strict=True)) if a != b)
        where = f"{logprobs} for {ids}: token {at} of {who}"
        raise ValueError(f"teacher_logprobs must have a column for each of teacher_ids, not {where}")
    return found


def _typed(values: Any, dtype: torch.dtype) -> Tensor:
    """As a tensor, of the type that it has; of `dtype`, where a list cannot say it: of nothing, or of whole numbers."""
    found = torch.as_tensor(values)
    unsaid = found.numel() == 0 or not (isinstance(values, Tensor) or found.is_floating_point())
    return found.to(dtype) if unsaid else found


def _of_one_type(rows: Sequence[Tensor]) -> list[Tensor]:
    """That of all, so that which comes first does not matter."""
    common = reduce(torch.promote_types, {row.dtype for row in rows if row.numel()} or {rows[0].dtype})
    return [row.to(common) for row in rows]


def _positions(example: Batch, index: int, tokens: int) -> Tensor:
    found = torch.as_tensor(example["position_ids"])
    if found.shape != (tokens,):
        raise ValueError(
            f"position_ids must have one for each of the {tokens} tokens of example {index}, not {tuple(found.shape)}"
        )
    return found


def _places(batch: Batch, examples: list[Any], tokens: list[Tensor], of: str) -> list[tuple[int, int]]:
    """Row and column of the batch where the tokens of each example begin."""
    ids, lengths = batch[of], [len(own) for own in tokens]
    rows, length = ids.shape
    if rows == 1 and length == sum(lengths):
        sides = [[(0, sum(lengths[:i])) for i in range(len(lengths))]]
    elif rows == len(examples) and max(lengths) <= length:
        sides = [[(i, 0) for i in range(rows)], [(i, length - n) for i, n in enumerate(lengths)]]
    else:
        raise ValueError(
            f"the collator made {rows} rows of {length} tokens out of {len(examples)} examples of up to "
            f"{max(lengths)}: where the teacher's columns belong cannot be told"
        )
    mask = batch.get("attention_mask") if of == "input_ids" else None
    mask = mask != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else None

    def agreement(places: list[tuple[int, int]]) -> tuple[int, int]:
        """Of this many tokens ids, and of so many places the attention mask, are the examples'."""
        same_ids = same_mask = 0
        for example, own, (row, start) in zip(examples, tokens, places, strict=True):
            here = slice(start, start + len(own))
            same_ids += int((ids[row, here] == own).sum())
            if mask is not None:
                attended = torch.zeros_like(mask[row])
                attended[here] = torch.as_tensor(example.get("attention_mask", torch.ones_like(own))) != 0
                same_mask += int((attended == mask[row]).sum())
        return same_ids, same_mask

    found = [agreement(places) for places in sides]
    best = max(range(len(sides)), key=lambda side: sum(found[side]))
    if 2 * found[best][0] < sum(lengths):  # fewer than masking leaves
        raise ValueError(
            f"the collator's {of} are not the examples': where the teacher's columns belong cannot be told"
        )
    return sides[best]


def _placed(rows: Sequence[Tensor], places: list[tuple[int, int]], shape: torch.Size, padding: float) -> Tensor:
    rows = _of_one_type(rows)
    width = [max(row.shape[1] for row in rows)] if rows[0].dim() > 1 else []
    result = torch.full((*shape, *width), padding, dtype=rows[0].dtype)
    for values, (row, start) in zip(rows, places, strict=True):
        here = result[row, start : start + len(values)]
        (here[:, : values.shape[1]] if width else here).copy_(values)
    return result


def _add_positions(batch: Batch, positions: list[Tensor], places: list[tuple[int, int]]) -> None:
    batch["position_ids"] = _placed(positions, places, batch["input_ids"].shape, 0)
    mask = batch.get("attention_mask")
    if any(restarts(own).any() for own in positions) and isinstance(mask, Tensor) and mask.dim() == 2:
        del batch["attention_mask"]
        known = (mask != 0) & F.pad(mask[:, 1:] != 0, (0, 1))  # token i + 1, which row i is about, is no padding
        batch["teacher_ids"] = batch["teacher_ids"].masked_fill(~known[..., None], -1)
        if isinstance(batch.get("labels"), Tensor) and batch["labels"].shape == mask.shape:
            batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
