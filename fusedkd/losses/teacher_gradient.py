"""The gradient of a KD loss with respect to the teacher, which some methods need (MATE-KD, arXiv:2105.05912: a
generator that maximises the divergence, through teacher and student).

D(p, q) as a function of the teacher's logits is another divergence with the two sides exchanged: forward KL becomes
reverse KL (`Divergence.exchanged`). So the gradient is that of a call in which the teacher is the student, with the
rows, the normaliser and T^k of the first. :func:`fusedkd.backends.block.forward` makes both calls as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends import block, defined
from fusedkd.backends.block import Flags, TeacherRows
from fusedkd.backends.call import pack
from fusedkd.backends.layout import OPTIONS, Option
from fusedkd.backends.schema import accumulation_dtype
from fusedkd.divergences import Divergence
from fusedkd.losses.common import (
    distinct,
    gradient_in_forward,
    is_one,
    refuse_double_backward,
    save_teachers,
    saved_teachers,
)
from fusedkd.losses.members import Member
from fusedkd.losses.options import KDOptions
from fusedkd.losses.rules import Prepared
from fusedkd.teachers import TeacherHead, TeacherLogits

if TYPE_CHECKING:
    from fusedkd.losses.kd import Plan

SIDES = (
    (Option.TEMPERATURE, Option.TEACHER_TEMPERATURE),
    (Option.SOFTCAP, Option.TEACHER_SOFTCAP),
    (Option.SCALE, Option.TEACHER_SCALE),
)
"""Options of the student and of the teacher."""


def wants_teacher_gradient(options: KDOptions, split: bool, inplace: bool = False) -> bool:
    """Whether the teacher's gradient is wanted, and can be had."""
    wanted = options.pop("teacher_gradient", False)
    check.flag("teacher_gradient", wanted)
    if wanted and split:
        raise ValueError("teacher_gradient is not available for a split vocabulary: gather the logits first")
    if wanted and inplace:
        raise ValueError(
            "teacher_gradient and inplace exclude each other: the teacher's gradient needs the student's logits"
        )
    return wanted and torch.is_grad_enabled()


def refuse_listed(asked: Sequence[Member]) -> None:
    """Teachers without logits."""
    for member in asked:
        if not isinstance(member.teacher, Tensor | TeacherLogits | TeacherHead):
            raise TypeError(
                "teacher_gradient needs a teacher of logits or a TeacherHead, not a "
                f"{type(member.teacher).__name__}, to which no gradient goes back"
            )


def exchanged(part: Prepared, teacher: TeacherRows) -> tuple[TeacherRows, Divergence]:
    """The teacher with what its gradient takes, and the divergence of the exchanged call, to be kept alive."""
    rules, given = part.rules, part.rules.options
    weight, divergence = rules.family.exchanged()
    coefficients = divergence.coefficients()
    values = rules.real_options(part.known)
    for own, other in SIDES:
        values[own.value], values[other.value] = values[other.value], values[own.value]
    values[Option.KD_SCALE.value] = rules.kd_scale()
    values[Option.KD_WEIGHT.value] = check.exact(given["kd_weight"]) * weight
    for option in (Option.CE_WEIGHT, Option.LABEL_SMOOTHING, Option.Z_LOSS_WEIGHT):
        values[option.value] = 0.0
    rest = OPTIONS - Option.COEFFICIENTS.value - len(coefficients)
    values[Option.COEFFICIENTS.value :] = [*coefficients, *[0.0] * rest]
    kernel_id = defined.number(divergence) if divergence.kernel_id is None else int(divergence.kernel_id)
    options = pack(values, teacher.options.device)
    return teacher._replace(exchanged=options, exchanged_kernel_id=kernel_id), divergence


class BothPlan(NamedTuple):
    """What is decided on the host before an operator starts."""

    grid: tuple[int, int]
    """(B, L): how the leading dimensions are seen as rows without a copy."""
    per_row: bool
    gradient_in_forward: bool
    return_terms: bool
    wanted: list[bool]
    """The gradients of the student's logits and of each teacher's."""
    families: list[Divergence]
    """Alive until backward: a divergence without a kernel is known by its number only."""
    flags: Flags


def kd_of_both_sides(
    student: Tensor, parts: Sequence[Prepared], logits: Sequence[Tensor], rows: Sequence[Tensor], plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """(loss, terms or None) of `kd_loss`, differentiable in the `logits` of teachers that require a gradient, too.
    `rows`: these as ``(B, L, C)``.
    """
    if plan.checked:
        for part in parts:
            part.check_values(student.shape[-1])
    given, families = [], list(plan.families)
    leaves = [x if part.rules.kd and x.requires_grad else None for part, x in zip(parts, logits, strict=True)]
    for part, each, leaf in zip(parts, rows, leaves, strict=True):
        teacher = part.teacher_rows(each)
        if leaf is not None:
            teacher, family = exchanged(part, teacher)
            families.append(family)
        given.append(teacher)
    reached = [x for x in (student, *leaves) if x is not None and x.requires_grad]
    in_forward = all([gradient_in_forward(x, plan.per_row) for x in reached])
    both = BothPlan(
        grid=plan.grid,
        per_row=plan.per_row,
        gradient_in_forward=in_forward and student.numel() > 0,  # tensors of no rows are all at one address
        return_terms=plan.return_terms,
        wanted=[student.requires_grad, *[leaf is not None for leaf in leaves]],
        families=families,
        flags=plan.flags,
    )
    fields = distinct([*leaves, *[field for each in given for field in each]])
    loss, terms = BothSidesFunction.apply(student, parts[0].labels if plan.labels_read else None, both, *fields)
    return loss, terms


class BothSidesFunction(torch.autograd.Function):
    """(loss, terms ``(teachers, 2, …)`` for logging or None). After the plan come, of each teacher, the logits that get
    a gradient or None, and then all fields.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, labels: Tensor | None, plan: BothPlan, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        leaves, fields = tensors[: len(plan.wanted) - 1], tensors[len(plan.wanted) - 1 :]
        z, teachers = student.view(*plan.grid, student.shape[-1]), block.unflatten(TeacherRows, fields)
        of_call, gradients = teachers, None
        if plan.gradient_in_forward:
            sides = zip((z, *[t.rows for t in teachers]), plan.wanted, strict=True)
            gradients = [x.new_empty(x.shape) if want else None for x, want in sides]
            of_call = [t._replace(gradient=g) for t, g in zip(teachers, gradients[1:], strict=True)]
        row_losses, stats = block.forward(z, labels, of_call, plan.flags, None if gradients is None else gradients[0])
        ctx.gradients = gradients
        ctx.plan, ctx.shapes = plan, [student.shape, *[None if x is None else x.shape for x in leaves]]
        ctx.set_materialize_grads(False)
        of_sides = [each[0] for each in stats], [each[1] if len(each) > 1 else None for each in stats]
        save_teachers(ctx, teachers, student, labels, *of_sides[0], *of_sides[1])
        terms = None
        if plan.return_terms:
            terms = row_losses.new_empty(row_losses.shape[: 2 + plan.per_row])
            ctx.mark_non_differentiable(terms)
        return block.loss_of(row_losses, teachers, terms, per_row=plan.per_row), terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _terms: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        unused = (None,) * len(ctx.needs_input_grad)
        if upstream is None:
            return unused
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or not is_one(upstream):
            calls, in_forward = _calls(ctx), gradients is not None
            gradients = gradients if in_forward else [None] * len(calls)
            for i, call in enumerate(calls):
                if call is None:
                    continue
                its_upstream = upstream.to(accumulation_dtype(call[0].dtype)).contiguous()
                if in_forward:
                    block.rescale_(gradients[i], its_upstream, *call)
                else:
                    gradients[i] = block.backward(its_upstream, *call)
        found = [None if g is None else g.view(shape) for g, shape in zip(gradients, ctx.shapes, strict=True)]
        return found[0], None, None, *found[1:], *unused[2 + len(found) :]


def _calls(ctx: Any) -> list[Any]:
    """What `block.backward` is given for each gradient that is wanted, else None."""
    plan, count = ctx.plan, len(ctx.plan.wanted) - 1
    teachers, (student, labels, *stats) = saved_teachers(ctx, 2 + 2 * count)
    z = student.view(*plan.grid, student.shape[-1])
    calls: list[Any] = [(z, labels, teachers, stats[:count], plan.flags) if plan.wanted[0] else None]
    for teacher, want, its_stats in zip(teachers, plan.wanted[1:], stats[count:], strict=True):
        calls.append(None)
        if want:
            rows, its_labels, other, flags = block.exchanged(z, labels, teacher, plan.flags)
            calls[-1] = rows, its_labels, [other], [its_stats], flags
    return calls
