"""The operator kd_loss of a backend in Python, made of its other operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.layout import TopkKernelId

Operator = Callable[..., Any]


def whole_loss(row_weights: Operator, forward: Operator, sums: Operator) -> Operator:
    """kd_row_weights, kd_forward and kd_terms, one after the other."""

    def kd_loss(
        *,
        student: Tensor,
        teacher: Tensor,
        ids: Tensor | None,
        labels: Tensor | None,
        kd_mask: Tensor | None,
        options: Tensor,
        normalizers: Tensor | None,
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
        weights, normalizers = row_weights(**rows, labels=labels, kd_mask=kd_mask, normalizers=normalizers, kd=kd)
        row_losses, stats = forward(
            **rows,
            student=student,
            labels=labels if labels_read else None,
            row_weights=weights,
            options=options,
            normalizers=normalizers,
            gradient=gradient,
            kernel_id=kernel_id,
            transform=transform,
            ce=ce,
        )
        loss = sums(row_losses=row_losses, options=options, normalizers=normalizers, terms=terms, per_row=per_row)
        return loss, weights, normalizers, stats

    return kd_loss
