"""What a teacher that is a function says of a batch: its answers checked, as columns of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.offline import COLUMNS, PADDING, Batch
from fusedkd.teachers import TeacherTopK

LOGPROB = "teacher_logprob"
"""Of a batch, ``(B, L)``: in row i the teacher's log-probability of token i + 1."""
ROWS_PER_TILE = 1024


def columns(teacher: Callable[..., Any], batch: Batch, attended: Tensor, kd: KDConfig) -> Batch:
    """The batch with the teacher's own columns: of ``teacher(input_ids, attention_mask)``."""
    ids = batch["input_ids"]
    found = teacher(ids, attended.long())
    if isinstance(found, TeacherTopK):
        for name in ("tail", "logprobs_temperature"):
            if getattr(found, name) != getattr(kd, name):
                both = f"{name}={getattr(found, name)!r}, but kd has {name}={getattr(kd, name)!r}"
                raise ValueError(f"teacher returned a TeacherTopK with {both}: make them the same")
        found = {"teacher_ids": found.ids, "teacher_logprobs": found.logprobs}
    if not isinstance(found, Mapping) or any(name not in found for name in COLUMNS):
        what = f"with {', '.join(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
        raise TypeError(
            f"teacher must return a TeacherTopK or a dict with {' and '.join(COLUMNS)}, (B, L, K) each, not {what}; "
            "with estimator= the tokens' log-probabilities, with student_top_k= those of the ids that it is given"
        )
    width = len(torch.as_tensor(found["teacher_ids"]).shape) and torch.as_tensor(found["teacher_ids"]).shape[-1]
    made = {name: _tensor(found[name], name, (*ids.shape, width), ids.device) for name in COLUMNS}
    return batch | {"teacher_ids": made["teacher_ids"].long(), "teacher_logprobs": made["teacher_logprobs"]}


def logprob(teacher: Callable[..., Any], batch: Batch, attended: Tensor) -> Batch:
    """The batch with the teacher's log-probabilities of its tokens."""
    ids = batch["input_ids"]
    return batch | {LOGPROB: _tensor(teacher(ids, attended.long()), "what teacher returned", ids.shape, ids.device)}


def of_candidates(teacher: Callable[..., Any], batch: Batch, attended: Tensor, candidates: Tensor) -> Batch:
    """The batch with columns for `candidates` ``(B, L, K)``, of ``teacher(input_ids, attention_mask, candidates)``."""
    ids = batch["input_ids"]
    found = teacher(ids, attended.long(), candidates)
    logprobs = _tensor(found, "what teacher returned", candidates.shape, ids.device)
    return batch | {"teacher_ids": candidates, "teacher_logprobs": logprobs.masked_fill(candidates < 0, PADDING[1])}


def _tensor(found: Any, name: str, shape: Any, device: torch.device) -> Tensor:
    try:
        values = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor of the shape {tuple(shape)}, not {type(found).__name__}") from error
    if values.shape != torch.Size(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, a row for each token, not {tuple(values.shape)}")
    return values.detach().to(device)


@torch.no_grad()
def best(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, k: int) -> Tensor:
    """The k largest columns of hidden · weightᵀ + bias in the selected `rows`, ``(*, k)``, −1 in others; a tile of rows
    at a time. A soft-cap and a scale do not change their order.
    """
    found = torch.full((*rows.shape, min(k, len(weight))), -1, dtype=torch.int64, device=hidden.device)
    tiles = hidden[rows].split(ROWS_PER_TILE)
    if len(tiles[0]):
        logits = (torch.nn.functional.linear(tile, weight, bias) for tile in tiles)
        found[rows] = torch.cat([tile.topk(found.shape[-1], -1).indices for tile in logits])
    return found
