"""linear_kd_loss between its arguments and its operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import arguments as check
from fusedkd.arguments import Real
from fusedkd.autograd import LinearKDLossFunction, LinearPlan
from fusedkd.linear import MOST_ROWS, LinearTeacher, row_bytes, tile_type
from fusedkd.prepared import KDTerms, Options, members, prepare, weighted

FEWEST_ROWS = 1024
"""Of a tile: below it the matrix products starve."""


class Tiles(NamedTuple):
    """What `linear_kd_loss` is told of them."""

    max_bytes: int
    dtype: torch.dtype
    max_rows: int | None

    def check(self) -> None:
        check.count("max_tile_bytes", self.max_bytes)
        check.count("max_rows", 1 if self.max_rows is None else self.max_rows)
        if self.dtype not in check.FLOATING:
            raise TypeError(f"tile_dtype must be float16, bfloat16, float32 or float64, not {self.dtype}")

    def rows(self, bytes_per_row: int, count: int) -> int:
        """Per tile, of `count` in all: at least 1, at most MOST_ROWS."""
        rows = max(1, min(MOST_ROWS, self.max_bytes // bytes_per_row))
        if rows < min(FEWEST_ROWS, count) and not torch.compiler.is_compiling():
            check.warn(
                f"max_tile_bytes={self.max_bytes} leaves {rows} rows per tile, and below {FEWEST_ROWS} "
                "the matrix products of linear_kd_loss are slow"
            )
        return rows


def tiled(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: Any,
    labels: Tensor | None,
    options: Options,
    teacher_weights: Sequence[Real] | None,
    tiles: Tiles,
) -> tuple[Tensor, KDTerms]:
    """:func:`fusedkd.linear_kd_loss` of (hidden states, weight, bias)."""
    hidden, weight, bias = student
    check.float_rows("student_hidden", hidden)
    check.head("student_", hidden, weight, bias)
    tiles.check()
    grad_mode, device = torch.is_grad_enabled(), hidden.device
    wanted = [grad_mode and x is not None and x.requires_grad for x in student]
    cast = check.autocast_dtype(device)
    dtype = hidden.dtype if cast is None or hidden.dtype == torch.float64 else cast  # as autocast does
    wish = tiles.dtype if hidden.is_cuda else torch.promote_types(tiles.dtype, torch.float32)
    lead, columns, count = hidden.shape[:-1], weight.shape[0], hidden.shape[:-1].numel()
    logits = hidden.new_empty(()).expand(*lead, columns)  # their shape, type and device
    teachers = members(teacher, teacher_weights, options.kd_weight)
    z_bytes, v_bytes, parts, used_labels = row_bytes(columns, tile_type(dtype, wish)), 0, [], None
    fields: list[Any] = []
    for member in teachers:
        options = options._replace(kd_weight=member.kd_weight)
        part = prepare(logits, member.teacher, labels, options)
        if part.kd:
            check.frozen("teacher", part.known.rows, any(x is not None and x.requires_grad for x in student))
        options = options._replace(ce_weight=0.0)  # the cross-entropy goes with the first
        rows = check.as_rows(part.known.rows, part.known.rows)[1]
        head, head_bias = part.known.head or (None, None)
        known = rows if head is None else rows.new_zeros(()).expand(1, count, 1)  # of a head, all rows count
        tensors = part.tensors(known)
        if not part.kd and part.known.ids is None:  # nothing reads it
            rows, head, head_bias = rows[..., :0], None, None
        if head is not None and cast is not None and head.dtype != torch.float64:
            rows, head = rows.to(cast), head.to(cast)
        of_tile = rows.dtype if head is None else tile_type(head.dtype, wish)
        v_bytes = max(v_bytes, row_bytes(part.known.columns if part.kd else 0, of_tile))
        used_labels = part.labels if used_labels is None else used_labels
        parts.append(part)
        fields.extend(LinearTeacher(rows, head, head_bias, part.known.ids, *tensors))
    bytes_per_row = z_bytes + v_bytes
    if any(wanted) and len(parts) > 1:
        bytes_per_row += z_bytes * min(len(parts) - 1, 2)  # a gradient per teacher, and their sum
    if any(wanted) and hidden.is_cuda and tile_type(dtype, wish) != dtype:
        bytes_per_row += row_bytes(columns, dtype)
    plan = LinearPlan(
        per_row=options.reduction == "none",
        wanted=wanted,
        ignore_index=options.ignore_index,
        forms=tuple([int(part.known.form) for part in parts]),
        transform=any([part.transform for part in parts]),
        ce=parts[0].ce,
        tile=tiles.rows(bytes_per_row, count),
        tile_dtype=wish,
        dtype=dtype,
        max_rows=tiles.max_rows,
    )
    flat = hidden.reshape(count, hidden.shape[-1])
    loss, kd, ce = LinearKDLossFunction.apply(flat, weight, bias, used_labels, plan, *fields)
    if plan.per_row:
        loss, kd, ce = loss.view(lead), kd.view(len(parts), *lead), ce.view(lead)
    kd = torch.stack([weighted(each, member.share) for each, member in zip(kd.unbind(), teachers, strict=True)])
    return loss, KDTerms(kd.sum(0), ce)
