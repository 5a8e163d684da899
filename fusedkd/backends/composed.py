"""The operators kd_loss and hidden_loss of a backend in Python, made of its other operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import made, pack
from fusedkd.backends.layout import TopkKernelId

Operator = Callable[..., Any]

ops = torch.ops.fusedkd


def in_turn(forward: Operator, sums: Operator) -> Operator:
    """(loss, statistics) by kd_forward and kd_terms."""

    def forward_loss(
        *, gradient: Tensor | None, terms: Tensor | None, per_row: bool, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        row_losses, stats = forward(**inputs, gradient=gradient)
        given = {"options": inputs["options"], "normalizers": inputs["normalizers"]}
        return sums(**given, row_losses=row_losses, terms=terms, per_row=per_row), stats

    return forward_loss


def whole_loss(row_weights: Operator, forward_loss: Operator) -> Operator:
    """kd_row_weights, and what computes loss and statistics after it."""

    def kd_loss(
        *,
        student: Tensor,
        teacher: Tensor,
        ids: Tensor | None,
        labels: Tensor | None,
        kd_mask: Tensor | None,
        options: Tensor,
        normalizers: Tensor | None,
        given: Tensor | None = None,
        gradient: Tensor | None,
        terms: Tensor | None,
        ignore_index: int,
        kernel_id: int,
        transform: bool,
        kd: bool,
        ce: bool,
        needs_labels: bool,
        per_row: bool,
        checked: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        labels_read = ce or needs_labels
        if checked and student.is_cpu:
            check.class_range(labels, student.shape[2] if labels_read else check.ANY_CLASS, ignore_index)
            if ids is not None:
                check.listed_values(ids, teacher.flatten(0, 1), student.shape[2], kernel_id == TopkKernelId.SAMPLES)
        rows = {"teacher": teacher, "ids": ids, "ignore_index": ignore_index}
        of_sums = {"normalizers": normalizers if given is None else options, "given": given}
        weights, normalizers = row_weights(**rows, labels=labels, kd_mask=kd_mask, kd=kd, **of_sums)
        divisors, options = made(normalizers, options, given)
        loss, stats = forward_loss(
            **rows,
            student=student,
            labels=labels if labels_read else None,
            row_weights=weights,
            options=options,
            normalizers=divisors,
            gradient=gradient,
            kernel_id=kernel_id,
            transform=transform,
            ce=ce,
            terms=terms,
            per_row=per_row,
        )
        return loss, weights, normalizers, stats

    return kd_loss


def hidden_loss(
    *,
    student: list[Tensor],
    teacher: list[Tensor],
    mask: Tensor | None,
    normalizers: Tensor,
    gradient: list[Tensor],
    distance: int,
    normalize: int,
    per_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, normalizer = hidden_weights(mask, normalizers)
    row_losses, stats = ops.hidden_forward(
        student=student,
        teacher=teacher,
        weights=weights,
        normalizer=normalizer,
        layer_weights=normalizers[1:],
        gradient=gradient,
        distance=distance,
        normalize=normalize,
    )
    if not per_row:
        loss = row_losses.sum().div_(normalizer)
    else:
        loss = row_losses[0] if len(student) == 1 else row_losses.sum(0)
    return loss, row_losses.new_empty(0, dtype=torch.float32) if weights is None else weights, normalizer, stats


def hidden_weights(mask: Tensor | None, normalizers: Tensor) -> tuple[Tensor | None, Tensor]:
    """What hidden_forward is given of the mask and of the `normalizers` of hidden_loss: the weights of the rows, or
    None for 1, and the normaliser.
    """
    if mask is None:
        given = normalizers[0]
        return None, torch.where(given <= 0, 1, given)
    every_row = pack([0.0], mask.device).expand(1, len(mask), 1)
    weights, counts = ops.kd_row_weights(
        teacher=every_row, ids=None, labels=None, kd_mask=mask, normalizers=normalizers[:2], ignore_index=0, kd=True
    )
    return weights, counts[0]
