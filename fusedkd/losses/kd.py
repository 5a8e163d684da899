"""The KD loss from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fusedkd import checks as check
from fusedkd import teachers
from fusedkd.backends import block
from fusedkd.backends.block import Flags, TeacherRows
from fusedkd.backends.call import as_rows
from fusedkd.divergences import Divergence
from fusedkd.losses import vocabulary
from fusedkd.losses.common import (
    gradient_in_forward,
    loss_and_terms,
    refuse_double_backward,
    save_for_backward,
    save_teachers,
    saved_teachers,
)
from fusedkd.losses.inplace import overwritable
from fusedkd.losses.options import DEFAULTS, KDOptions, KDTerms, members, prepare, weighted, with_options

Teacher: TypeAlias = teachers.Teacher
Teachers: TypeAlias = Teacher | Sequence[Teacher]


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_terms: Literal[False] = False,
    **options: Unpack[KDOptions],
) -> Tensor: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_terms: Literal[True],
    **options: Unpack[KDOptions],
) -> tuple[Tensor, KDTerms]: ...


@with_options
def kd_loss(
    student_logits: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_terms: bool = False,
    **options: Unpack[KDOptions],
) -> Tensor | tuple[Tensor, KDTerms]:
    r"""kd_weight · T^k · D(teacher, student) + ce_weight · CE(student, labels), and its gradient, in one fused call.

    With p = softmax(v/T) of the teacher and q = softmax(z/T) of the student, ``forward_kl`` is D = KL(p‖q) with k = 2
    (Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, §2): the gradient is kd_weight · T
    · (q − p), plus ce_weight · (softmax(z) − 1_y). The other divergences are listed, with their sources, in
    :mod:`fusedkd.divergences`. No probability tensor is materialised; the gradient is computed in float32 and rounded
    once.

    Args:
        student_logits: z, ``(*, V_s)``, float16, bfloat16, float32 or float64; last dimension contiguous, other strides
            free.
        teacher: logits v, ``(*, V_t)``, of any of these dtypes; a :class:`~fusedkd.TeacherLogits`; a
            :class:`~fusedkd.TeacherHead`, whose logits are then computed whole; a few columns per row,
            :class:`~fusedkd.TeacherTopK` or :class:`~fusedkd.TeacherSamples`; or a list of these. Never receives a
            gradient, and is warned of where it requires one. Where V_t differs from V_s (padded heads) the common
            prefix is distilled and counts as the whole distribution; the student's surplus columns keep their
            cross-entropy.
        labels: class indices ``(*)``, int64, already shifted for causal models. Rows with ``ignore_index`` carry no
            cross-entropy, and without a `kd_mask` no KD term. Labels alone add no cross-entropy: `ce_weight` does.
        {options}
        inplace: lets the gradient overwrite the student's logits, which must be neither a leaf nor a view, nor share
            memory with the teacher, unless row by row (``student_logits.detach()``). Ignored under ``torch.compile``,
            with grad mode off, and where the gradient is computed in backward (float16, ``"none"``, a list of
            teachers). One backward only; an upstream gradient other than 1 rounds a second time.
        return_terms: also return :class:`KDTerms`.

    Under ``torch.compile`` a teacher from ``torch.inference_mode`` cannot be saved for backward, which is PyTorch's
    rule: run it under ``torch.no_grad``. Where hooks of saved tensors are active (non-reentrant checkpoints,
    offloading) the gradient is computed in backward.

    Real-valued options take a number or a 0-d tensor without gradient. A schedule given as tensors on the logits'
    device recompiles nothing and waits for nothing; numbers are copied to a GPU once per set of values, which waits for
    the copy. Do not overwrite the teacher's logits before backward.

    Returns:
        float32 (float64 for float64 logits): a scalar, or ``(*)`` under ``"none"``; with ``return_terms`` the pair
        (loss, terms).

    Raises:
        ValueError, TypeError: before any kernel starts, naming the argument, what it was and what it must be. On a GPU
            a label out of range makes that row's loss NaN and its gradient 0 instead.
    """
    asked: KDOptions = {**DEFAULTS, **options}
    shard = None
    if vocabulary.is_split(asked, student_logits):
        if torch.compiler.is_compiling():
            more = {"inplace": inplace, "return_terms": return_terms, **options}
            return vocabulary.eagerly(kd_loss, student_logits, teacher, labels, **more)
        student_logits, teacher, shard = vocabulary.split_logits(student_logits, teacher, asked, inplace)
    check.float_rows("student_logits", student_logits)
    parts = [
        (prepare(student_logits, member.teacher, labels, member.options, shard), member.weight)
        for member in members(teacher, asked)
    ]
    first = parts[0][0]
    for part, _ in parts:
        if part.kd:
            check.frozen("teacher", part.known.rows, student_logits.requires_grad)
    student = student_logits
    if len(parts) > 1 and student.dtype in (torch.float16, torch.bfloat16):
        student = student.float()  # so that the gradients add up in float32 and are rounded once
    student, rows, grid = as_rows(student, *[part.known.logits() for part, _ in parts])
    reduction = first.options["reduction"]
    inplace = inplace and len(parts) == 1
    in_forward = gradient_in_forward(student, reduction, inplace)
    if inplace and in_forward:
        overwritable(student_logits, teacher=rows[0], ids=first.known.ids, labels=first.labels)
    plan = Plan(
        grid=grid,
        per_row=reduction == "none",
        gradient_in_forward=in_forward,
        inplace=inplace and in_forward,
        families=tuple([part.family for part, _ in parts]),
        flags=Flags(
            ignore_index=first.options["ignore_index"],
            transform=any([part.transform for part, _ in parts]),
            ce=first.ce,
            shard=shard,
        ),
    )
    given = [field for (part, _), each in zip(parts, rows, strict=True) for field in part.teacher_rows(each)]
    loss, kd, ce, _ = KDLossFunction.apply(student, first.labels, plan, *given)
    terms = [weighted(each, weight) for each, (_, weight) in zip(kd.unbind(), parts, strict=True)]
    kd = terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)
    if reduction == "none":
        loss, kd, ce = (term.view(student_logits.shape[:-1]) for term in (loss, kd, ce))
    return (loss, KDTerms(kd, ce)) if return_terms else loss


class Plan(NamedTuple):
    """What is decided on the host before an operator starts."""

    grid: tuple[int, int]
    """(B, L): how the leading dimensions are seen as rows without a copy."""
    per_row: bool
    gradient_in_forward: bool
    inplace: bool
    families: tuple[Divergence, ...]
    """Alive until backward: a divergence without a kernel is known by its number only."""
    flags: Flags


class KDLossFunction(torch.autograd.Function):
    """(loss, kd of each teacher, ce, logits): the loss, its terms for logging, and with ``inplace`` the overwritten
    logits (else None). The teachers come as their fields, one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, labels: Tensor | None, plan: Plan, *fields: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        teachers = TeacherRows.unflatten(fields)
        z = student.view(*plan.grid, student.shape[-1])
        gradient = z if plan.inplace else z.new_empty(z.shape) if plan.gradient_in_forward else None
        row_losses, stats = block.forward(z, labels, teachers, plan.flags, gradient)
        ctx.plan, ctx.gradient, ctx.spent = plan, None if plan.inplace else gradient, False
        ctx.set_materialize_grads(False)
        if plan.inplace:
            ctx.mark_dirty(student)
            save_for_backward(ctx, student)
        else:
            save_teachers(ctx, teachers, student, labels, *stats)
        loss, kd, ce = loss_and_terms(row_losses, teachers, plan.per_row)
        ctx.mark_non_differentiable(kd, ce)
        return loss, kd, ce, student if plan.inplace else None

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, _kd: None, _ce: None, logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if logits is not None:
            raise RuntimeError(
                "kd_loss(inplace=True) overwrote the student's logits with their gradient, "
                "but a gradient reaches these logits from another use of them"
            )
        unused = (None,) * (len(ctx.needs_input_grad) - 1)
        if upstream is None:
            return None, *unused
        if ctx.plan.inplace:
            return _overwritten(ctx, upstream), *unused
        count = len(ctx.kernel_ids)
        teachers, (student, labels, *stats) = saved_teachers(ctx, 2 + count)
        z, upstream = student.view(*ctx.plan.grid, student.shape[-1]), upstream.contiguous()
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = block.backward(upstream, z, labels, teachers, stats, ctx.plan.flags)
        else:
            block.rescale_(gradient, upstream, z, labels, teachers, stats, ctx.plan.flags)
        return gradient.view(student.shape), *unused


def _overwritten(ctx: Any, upstream: Tensor) -> Tensor:
    """The gradient that lies where the logits were; an upstream other than 1 costs a second rounding here, the logits
    being gone.
    """
    if ctx.spent:
        raise RuntimeError(
            "kd_loss(inplace=True) supports one backward: the gradient was handed over where the logits were"
        )
    ctx.spent = True
    (student,) = ctx.saved_tensors
    gradient: Tensor = student.detach()
    if not check.readable(upstream):
        gradient.mul_(upstream.view(1))  # a 0-d operand would first be rounded to the gradient's dtype
    elif upstream != 1:
        gradient.mul_(upstream)
    return gradient
