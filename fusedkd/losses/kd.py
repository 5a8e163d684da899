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
from fusedkd.backends.block import Flags, TeacherRows, WholeTeacher
from fusedkd.backends.call import as_rows
from fusedkd.backends.schema import accumulation_dtype
from fusedkd.backends.statistics import Statistic
from fusedkd.divergences import Divergence
from fusedkd.losses import vocabulary
from fusedkd.losses.common import distinct, gradient_in_forward, is_one, refuse_double_backward, save_for_backward
from fusedkd.losses.inplace import overwritable
from fusedkd.losses.members import members, refuse_statistics
from fusedkd.losses.options import (
    KDOptions,
    KDTerms,
    KDTermsAndStatistics,
    by_statistic,
    checked_statistics,
    logged,
    with_options,
)
from fusedkd.losses.rules import Prepared, prepare
from fusedkd.losses.teacher_gradient import kd_of_both_sides, refuse_listed, wants_teacher_gradient

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


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_terms: Literal[True],
    statistics: Sequence[Statistic],
    **options: Unpack[KDOptions],
) -> tuple[Tensor, KDTermsAndStatistics]: ...


@with_options
def kd_loss(
    student_logits: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_terms: bool = False,
    statistics: Sequence[Statistic] = (),
    **options: Unpack[KDOptions],
) -> Tensor | tuple[Tensor, KDTerms | KDTermsAndStatistics]:
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
            :class:`~fusedkd.TeacherTopK` or :class:`~fusedkd.TeacherSamples`; or a list of these. Receives a gradient
            with `teacher_gradient` alone; a warning tells where it requires one. Where V_t differs from V_s (padded
            heads) the common prefix is distilled and counts as the whole distribution; the student's surplus columns
            keep their cross-entropy.
        labels: class indices ``(*)``, int64, already shifted for causal models. Rows with ``ignore_index`` carry no
            cross-entropy, and without a `kd_mask` no KD term. Labels alone add no cross-entropy: `ce_weight` does.
        {options}
        inplace: lets the gradient overwrite the student's logits, which must be neither a leaf nor a view, nor share
            memory with the teacher, unless row by row (``student_logits.detach()``). Ignored under ``torch.compile``,
            with grad mode off, where the gradient is computed in backward (float16, ``"none"``), and of several
            teachers, or divergences that no one kernel sums up. One backward only; an upstream gradient other than 1
            rounds a second time.
        return_terms: also return :class:`KDTerms`.
        statistics: names of tensors ``(*)`` that the terms then have as well, as :class:`KDTermsAndStatistics`,
            detached, in float32 (float64 for float64 logits): ``student_entropy``, ``teacher_entropy``, in nats;
            ``student_logprob``, ``teacher_logprob``, of the label; ``total_variation``, ½·Σ|p − q|. All are of p and q,
            the softmaxes at the loss's temperatures. 0 in rows that the KD term does not select, and, of
            log-probabilities, in those without a label.

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
    check.flag("inplace", inplace)
    shard = None
    split = vocabulary.is_split(options, student_logits)
    teacher_gradient = wants_teacher_gradient(options, split, inplace)
    wanted = checked_statistics(statistics, return_terms, split)
    if split:
        if torch.compiler.is_compiling():
            more = {"inplace": inplace, "return_terms": return_terms, "statistics": statistics, **options}
            return vocabulary.eagerly(kd_loss, student_logits, teacher, labels, **more)
        student_logits, teacher, shard = vocabulary.split_logits(student_logits, teacher, options, inplace)
    check.float_rows("student_logits", student_logits)
    kd_mask = options.pop("kd_mask", None)
    asked = members(teacher, options)
    parts = [prepare(student_logits, member.teacher, labels, kd_mask, member.rules, shard) for member in asked]
    if shard is not None and check.readable(student_logits):
        for part in parts:
            part.check_values(shard.columns)
    first = parts[0]
    refuse_statistics(statistics, asked, first)
    for part in parts:
        if part.rules.kd and not teacher_gradient:
            check.frozen("teacher", part.known.rows, student_logits.requires_grad)
    student = student_logits
    if len(parts) > 1 and student.dtype in (torch.float16, torch.bfloat16):
        student = student.float()  # so that the gradients add up in float32 and are rounded once
    if teacher_gradient:
        refuse_listed(asked)
    logits = [part.known.logits(differentiable=teacher_gradient) for part in parts[:1]]
    for part, member in zip(parts[1:], asked[1:], strict=True):  # the same teacher's are made once
        made = len(logits) > member.first
        logits.append(logits[member.first] if made else part.known.logits(differentiable=teacher_gradient))
    student, rows, grid = as_rows(student, *logits)
    flags = first.flags
    if len(parts) > 1:
        flags = flags._replace(transform=any([part.flags.transform for part in parts]))
    inplace = inplace and len(parts) == 1
    in_forward = gradient_in_forward(student, first.rules.per_row, inplace)
    if inplace and in_forward:
        overwritable(student_logits, teacher=rows[0], ids=first.known.ids, labels=first.labels)
    plan = Plan(
        grid=grid,
        per_row=first.rules.per_row,
        gradient_in_forward=in_forward,
        inplace=inplace and in_forward,
        return_terms=return_terms,
        checked=check.readable(student) and shard is None,
        labels_read=first.rules.labels_read or any([part.rules.labels_read for part in parts]),
        families=[part.family for part in parts],
        flags=flags,
    )
    told = (
        _statistics(student.view(*grid, student.shape[-1]), first, rows[0], of_teacher=wanted[1]) if wanted[0] else None
    )
    if teacher_gradient and any([part.rules.kd and x.requires_grad for part, x in zip(parts, logits, strict=True)]):
        loss, terms = kd_of_both_sides(student, parts, logits, rows, plan)
    else:
        loss, terms = _kd_of_student(student, parts, rows, plan)
    if plan.per_row:
        loss = loss.view(student_logits.shape[:-1])
        terms = None if terms is None else terms.view(len(parts), 2, *student_logits.shape[:-1])
    if terms is None:
        return loss
    found = {} if told is None else by_statistic(told, statistics, student_logits.shape[:-1])
    return loss, logged(terms, [member.weight for member in asked], found)


@torch.no_grad()
def _statistics(student: Tensor, part: Prepared, rows: Tensor, *, of_teacher: bool) -> Tensor:
    """The operator kd_statistics, before the gradient may overwrite the logits."""
    teacher = part.teacher_rows(rows)
    return torch.ops.fusedkd.kd_statistics(  # type: ignore[no-any-return]
        student=student.detach(),
        teacher=rows,
        labels=part.labels,
        row_weights=teacher.row_weights,
        options=teacher.options,
        transform=part.flags.transform,
        of_teacher=of_teacher,
        columns=part.common(student.shape[2]),
        ignore_index=part.flags.ignore_index,
    )


def _kd_of_student(
    student: Tensor, parts: Sequence[Prepared], rows: Sequence[Tensor], plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """(loss, terms or None), differentiable in the student's logits."""
    labels = parts[0].labels
    given: list[Any] = [part.whole_teacher(each) for part, each in zip(parts, rows, strict=True)]
    try:
        if torch.compiler.is_compiling():  # a compiled graph sees tensors among the arguments alone
            fields = distinct([field for each in given for field in each])
            loss, terms, _ = KDLossFunction.apply(student, labels, plan, *fields)
        elif student.requires_grad and torch.is_grad_enabled():  # fewer arguments take less time
            loss, terms, _ = KDLossFunction.apply(student, labels, plan, given)
        else:
            loss, terms, _, _ = plan.run(student, labels, given)
    except RuntimeError:
        if plan.checked:
            for part in parts:
                part.check_values(student.shape[-1])
        raise
    return loss, terms


class Plan(NamedTuple):
    """What is decided on the host before an operator starts."""

    grid: tuple[int, int]
    """(B, L): how the leading dimensions are seen as rows without a copy."""
    per_row: bool
    gradient_in_forward: bool
    inplace: bool
    return_terms: bool
    checked: bool
    """The operator looks at what labels and lists hold."""
    labels_read: bool
    """By a kernel."""
    families: list[Divergence]
    """Alive until backward: a divergence without a kernel is known by its number only."""
    flags: Flags

    def run(
        self, student: Tensor, labels: Tensor | None, teachers: list[WholeTeacher]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """(loss, terms or None, gradient unless it is the student's memory, what `block.whole_loss` found)."""
        shape = (*self.grid, student.shape[-1])
        z = student.view(shape)
        gradient = to = terms = None
        if self.inplace:
            to = z
        elif self.gradient_in_forward:
            gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
            to = gradient.view(shape)
        if self.return_terms:
            per_teacher = (2, z.shape[0] * z.shape[1]) if self.per_row else (2,)
            terms = z.new_empty((len(teachers), *per_teacher), dtype=accumulation_dtype(z.dtype))
        loss, found = block.whole_loss(
            z, labels, teachers, self.flags, to, terms, per_row=self.per_row, checked=self.checked
        )
        return loss, terms, gradient, found


class KDLossFunction(torch.autograd.Function):
    """(loss, terms ``(teachers, 2, …)`` for logging or None, logits): with ``inplace`` the overwritten logits, else
    None. The teachers come as a list, or as their fields, one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, labels: Tensor | None, plan: Plan, *fields: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        given: list[WholeTeacher] = fields[0] if len(fields) == 1 else block.unflatten(WholeTeacher, fields)
        loss, terms, gradient, found = plan.run(student, labels, given)
        ctx.plan, ctx.gradient, ctx.spent = plan, gradient, False
        ctx.set_materialize_grads(False)
        if plan.inplace:
            ctx.mark_dirty(student)
            save_for_backward(ctx, student)
            return loss, terms, student
        of_teachers = [x for t, more in zip(given, found, strict=True) for x in (t.rows, t.ids, *more)]
        save_for_backward(ctx, student, labels if plan.labels_read else None, *of_teachers)
        ctx.kernel_ids = [t.kernel_id for t in given]
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        return loss, terms, None

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _terms: None, logits: Tensor | None) -> tuple[Tensor | None, ...]:
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
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None and is_one(upstream):
            return gradient, *unused
        student, labels, *of_teachers = ctx.saved_tensors
        teachers, stats = [], []
        for i, kernel_id in enumerate(ctx.kernel_ids):
            rows, ids, row_weights, options, normalizers, its_stats = of_teachers[6 * i : 6 * i + 6]
            teachers.append(TeacherRows(rows, None, None, ids, row_weights, options, normalizers, kernel_id))
            stats.append(its_stats)
        z, upstream = student.view(*ctx.plan.grid, student.shape[-1]), upstream.contiguous()
        if gradient is None:
            gradient = block.backward(upstream, z, labels, teachers, stats, ctx.plan.flags)
        else:
            block.rescale_(gradient.view(z.shape), upstream, z, labels, teachers, stats, ctx.plan.flags)
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
