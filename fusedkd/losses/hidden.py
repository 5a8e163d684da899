"""The losses of hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import as_rows, real_tensor
from fusedkd.checks import Real
from fusedkd.losses.common import gradient_in_forward, refuse_double_backward, save_for_backward
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
    weights = None
    if flat_mask is not None:
        weights = flat_mask.to(torch.float32) if flat_mask.is_floating_point() else (flat_mask != 0).to(torch.float32)
    count: Real = 1.0
    if reduction == "mean":
        default: Real = grid[0] * grid[1] if weights is None else _count(weights, flat_mask)
        count = default if normalizer is None else normalizer
    divisor = real_tensor(count, student.device)
    divisor = torch.where(divisor <= 0, 1, divisor)
    plan = Plan(
        grid=grid, per_row=reduction == "none", gradient_in_forward=gradient_in_forward(student, reduction == "none")
    )
    loss: Tensor = CosineHiddenLossFunction.apply(student, teacher, weights, divisor, plan)
    return loss.view(student_hidden.shape[:-1]) if reduction == "none" else loss


class Plan(NamedTuple):
    """What is decided on the host before an operator starts."""

    grid: tuple[int, int]
    """(B, L): how the leading dimensions are seen as rows without a copy."""
    per_row: bool
    gradient_in_forward: bool


class CosineHiddenLossFunction(torch.autograd.Function):
    """The cosine loss: a scalar, or ``(N,)`` per row."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor | None, normalizer: Tensor, plan: Plan
    ) -> Tensor:
        x = student.view(*plan.grid, student.shape[-1])
        gradient = x.new_empty(x.shape) if plan.gradient_in_forward else None
        row_losses, stats = ops.cosine_forward(
            student=x, teacher=teacher, weights=weights, normalizer=normalizer, gradient=gradient
        )
        ctx.plan, ctx.gradient = plan, gradient
        save_for_backward(ctx, student, teacher, weights, normalizer, stats)
        loss: Tensor = row_losses if plan.per_row else row_losses.sum() / normalizer.to(row_losses.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        student, teacher, weights, normalizer, stats = ctx.saved_tensors
        x = student.view(*ctx.plan.grid, student.shape[-1])
        gradient, ctx.gradient = ctx.gradient, None
        in_forward = gradient is not None
        if gradient is None:
            gradient = x.new_empty(x.shape)
        ops.cosine_backward(
            upstream=upstream.contiguous(),
            student=x,
            teacher=teacher,
            weights=weights,
            normalizer=normalizer,
            stats=stats,
            gradient=gradient,
            skip_if_one=in_forward,
        )
        return gradient.view(student.shape), None, None, None, None


def _count(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Selected rows, counted in int64; for a float mask the sum of its weights."""
    return weights.sum() if mask is not None and mask.is_floating_point() else (weights != 0).sum()
