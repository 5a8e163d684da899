"""The losses of hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import as_rows, pack
from fusedkd.backends.layout import COUNTED
from fusedkd.checks import Real
from fusedkd.losses.common import gradient_in_forward, is_one, refuse_double_backward, save_for_backward
from fusedkd.losses.names import by_name
from fusedkd.losses.options import Reduction

ops = torch.ops.fusedkd


@by_name
def cosine_hidden_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
) -> Tensor:
    """Mean of 1 − cos(student, teacher) over the selected rows (DistilBERT, arXiv:1910.01108, §3: aligns the directions
    of hidden states).

    Equal in value and gradient to :func:`torch.nn.functional.cosine_embedding_loss` with target 1 on the selected rows,
    ε included, but without its cancellation when the two are close. Nothing is gathered or copied.

    Args:
        student_hidden, teacher_hidden: ``(*, H)`` each, float16, bfloat16, float32 or float64; last dimension
            contiguous. The teacher never receives a gradient.
        mask: ``(*)``. Bool or integer: non-zero selects; float: weights, 0 is not selected (its rows are not read).
            None: all rows.
        reduction: ``"mean"`` over the selected rows (float masks: over the sum of weights), ``"sum"``, or ``"none"``:
            ``(*)``.
        normalizer: replaces the count under ``"mean"``: a number or a 0-d tensor.

    Returns:
        float32 (float64 for float64 input): a scalar, or ``(*)`` under ``"none"``.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    check.float_rows("student_hidden", student_hidden)
    check.float_rows("teacher_hidden", teacher_hidden, like=student_hidden)
    if student_hidden.shape[-1] != teacher_hidden.shape[-1]:
        raise ValueError(
            f"student_hidden and teacher_hidden must have the same last dimension, not {student_hidden.shape[-1]} and "
            f"{teacher_hidden.shape[-1]}: project one of them first"
        )
    check.frozen("teacher_hidden", teacher_hidden, student_hidden.requires_grad)
    check.reduction(reduction, normalizer=normalizer)
    flat_mask = check.row_vector("mask", mask, student_hidden)
    student, (teacher,), grid = as_rows(student_hidden, teacher_hidden)
    rows: Real = grid[0] * grid[1]
    given: Real = (rows if flat_mask is None else COUNTED) if normalizer is None else normalizer
    plan = Plan(
        grid=grid, per_row=reduction == "none", gradient_in_forward=gradient_in_forward(student, reduction == "none")
    )
    normalizers = pack([given if reduction == "mean" else 1.0, 1.0], student.device)
    if torch.compiler.is_compiling() or (student.requires_grad and torch.is_grad_enabled()):
        loss: Tensor = CosineHiddenLossFunction.apply(student, teacher, flat_mask, normalizers, plan)
    else:
        loss, *_ = plan.loss(student, teacher, flat_mask, normalizers, None)
    return loss.view(student_hidden.shape[:-1]) if plan.per_row else loss


class Plan(NamedTuple):
    """What is decided on the host before an operator starts."""

    grid: tuple[int, int]
    """(B, L): how the leading dimensions are seen as rows without a copy."""
    per_row: bool
    gradient_in_forward: bool

    def loss(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None, normalizers: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operator."""
        shape = (*self.grid, student.shape[-1])
        return ops.cosine_loss(  # type: ignore[no-any-return]
            student=student.view(shape),
            teacher=teacher,
            mask=mask,
            normalizers=normalizers,
            gradient=None if gradient is None else gradient.view(shape),
            per_row=self.per_row,
        )


class CosineHiddenLossFunction(torch.autograd.Function):
    """The cosine loss: a scalar, or ``(N,)`` per row."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, normalizers: Tensor, plan: Plan
    ) -> Tensor:
        gradient = None
        if plan.gradient_in_forward:
            gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        loss, weights, normalizer, stats = plan.loss(student, teacher, mask, normalizers, gradient)
        ctx.plan, ctx.gradient = plan, gradient
        save_for_backward(ctx, student, teacher, None if mask is None else weights, normalizer, stats)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None and is_one(upstream):
            return gradient, None, None, None, None
        student, teacher, weights, normalizer, stats = ctx.saved_tensors
        shape = (*ctx.plan.grid, student.shape[-1])
        in_forward = gradient is not None
        if gradient is None:
            gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        ops.cosine_backward(
            upstream=upstream.contiguous(),
            student=student.view(shape),
            teacher=teacher,
            weights=weights,
            normalizer=normalizer,
            stats=stats,
            gradient=gradient.view(shape),
            skip_if_one=in_forward,
        )
        return gradient, None, None, None, None
