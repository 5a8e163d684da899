"""A vocabulary that is split over processes, where no kernel serves a shard: each rank gathers the logits of some rows
from the others, computes whole rows, and keeps the gradient of its own columns. Right for anything that computes whole
rows, a user's own divergence among it; but all logits cross, N × V of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends import eager
from fusedkd.backends.call import of_part, rows_of
from fusedkd.backends.layout import FIRST_DEFINED, STATS
from fusedkd.backends.schema import losses_and_stats
from fusedkd.backends.shard import Shard, gathered, same_split

ops = torch.ops.fusedkd

TILE = 1 << 22
"""Logits of a side at a time."""


def kd_forward(inputs: dict[str, Any], shard: Shard, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`fusedkd.backends.shard.kd_forward`; of the statistics nothing is used."""
    kernel_id = inputs["kernel_id"]
    what = (
        "a divergence without a kernel"
        if kernel_id >= FIRST_DEFINED
        else f"what serves {inputs['student'].device} here"
    )
    check.warn(
        f"vocab_group: {what} has no kernel of a shard, so that the logits of all ranks are gathered in each call"
    )
    operator = ops.defined_forward if kernel_id >= FIRST_DEFINED else ops.kd_forward
    row_losses, stats = losses_and_stats(inputs["student"], 2, STATS)
    to = None if gradient is None else gradient.view(-1, gradient.shape[-1])
    for part, whole in _tiles(inputs, shard):
        found = None if to is None else whole["student"].new_empty(whole["student"].shape)
        row_losses[:, part], _ = operator(**whole, gradient=found)
        if to is not None and found is not None:
            to[part, : shard.own] = found[0, :, shard.offset : shard.offset + shard.own]
            to[part, shard.own :] = 0
    return row_losses, stats.zero_()


def kd_backward(
    inputs: dict[str, Any], shard: Shard, *, upstream: Tensor, stats: Tensor, gradient: Tensor, skip_if_one: bool
) -> None:
    if eager.skipped(upstream, skip_if_one):
        return
    operator = ops.defined_backward if inputs["kernel_id"] >= FIRST_DEFINED else ops.kd_backward
    to = gradient.view(-1, gradient.shape[-1])
    for part, whole in _tiles(inputs, shard):
        _, state = (
            ops.kd_forward(**whole, gradient=None) if inputs["kernel_id"] < FIRST_DEFINED else (None, stats[part])
        )
        found = whole["student"].new_empty(whole["student"].shape)
        its_upstream = upstream[part] if upstream.dim() else upstream
        operator(**whole, upstream=its_upstream, stats=state, gradient=found, skip_if_one=False)
        to[part, : shard.own] = found[0, :, shard.offset : shard.offset + shard.own]
        to[part, shard.own :] = 0


def _tiles(inputs: dict[str, Any], shard: Shard) -> Iterator[tuple[slice, dict[str, Any]]]:
    """(rows, what is given of them), with the columns of all ranks."""
    student, labels, ids = inputs["student"], inputs["labels"], inputs["ids"]
    rows, step = student.shape[0] * student.shape[1], max(1, TILE // shard.columns)
    sizes = gathered(torch.tensor([shard.own], device=student.device), shard.group).flatten().tolist()
    same_split(sum(sizes), shard)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        teacher = rows_of(inputs["teacher"], part)
        of_rows = {
            "student": _whole(rows_of(student, part), shard, sizes),
            "teacher": _whole(teacher, shard, sizes) if ids is None else teacher.unsqueeze(0),
            "ids": None if ids is None else ids[part],
            "labels": None if labels is None else labels[part],
            "row_weights": inputs["row_weights"][part],
            "options": of_part(inputs["options"], part),
        }
        yield part, inputs | of_rows


def _whole(own: Tensor, shard: Shard, sizes: list[int]) -> Tensor:
    """``(1, R, V)`` from the columns of the ranks."""
    padded = own.new_zeros(own.shape[0], max(sizes))
    padded[:, : shard.own] = own[:, : shard.own]
    parts = gathered(padded, shard.group)
    return torch.cat([each[:, :size] for each, size in zip(parts, sizes, strict=True)], 1).unsqueeze(0)
