"""One block of student logits, any number of teachers, one gradient. :func:`fusedkd.kd_loss` is one block,
:func:`fusedkd.linear_kd_loss` a block for each tile of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusedkd.backends import composed, gathered, shard
from fusedkd.backends.call import made
from fusedkd.backends.layout import FIRST_DEFINED
from fusedkd.backends.schema import accumulation_dtype
from fusedkd.backends.shard import Shard

ops = torch.ops.fusedkd

both_on: frozenset[str] = frozenset()
"""Types of devices that have the operator kd_both: :mod:`fusedkd.backends.dispatch` knows."""


class TeacherRows(NamedTuple):
    """What the operators are given of one teacher."""

    rows: Tensor
    """``(B, L, C)``: logits, or with ids log-probabilities or weights; with a head, its hidden states. Without columns
    where nothing reads them."""
    head: Tensor | None
    bias: Tensor | None
    ids: Tensor | None
    row_weights: Tensor
    options: Tensor
    normalizers: Tensor
    kernel_id: int
    exchanged: Tensor | None = None
    """Of a teacher that gets a gradient: the options with the sides exchanged, of the call whose student it is."""
    exchanged_kernel_id: int = -1
    gradient: Tensor | None = None
    """Where the teacher's goes; it may be the memory of its rows."""


class WholeTeacher(NamedTuple):
    """What the operator kd_loss is given of one teacher, whose rows it selects itself."""

    rows: Tensor
    """``(B, L, C)``: logits, or with ids log-probabilities or weights."""
    ids: Tensor | None
    kd_mask: Tensor | None
    options: Tensor
    """Or, with `given`, the recipe of options and normalisers (:func:`fusedkd.backends.call.recipe`)."""
    normalizers: Tensor | None
    given: Tensor | None
    kernel_id: int
    kd: bool
    needs_labels: bool


OfTeacher = TypeVar("OfTeacher", TeacherRows, WholeTeacher)


def unflatten(kind: type[OfTeacher], values: Sequence[Any]) -> list[OfTeacher]:
    """Teachers from their fields, one after the other, as ``torch.autograd.Function`` wants its tensors."""
    size = len(kind._fields)
    return [kind(*values[start : start + size]) for start in range(0, len(values), size)]


class Flags(NamedTuple):
    """The structure of a call, the same for all teachers."""

    ignore_index: int
    transform: bool
    """Soft-cap or scale the logits of either side."""
    ce: bool
    """The first teacher's call has the cross-entropy."""
    shard: Shard | None = None
    """Of a vocabulary that is split over processes; None: the columns are all there are."""


def whole_loss(
    student: Tensor,
    labels: Tensor | None,
    teachers: Sequence[WholeTeacher],
    flags: Flags,
    gradient: Tensor | None,
    terms: Tensor | None,
    *,
    per_row: bool,
    checked: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """The loss of all teachers; row weights, real options, normalisers and statistics of each. `gradient` as in
    `forward`; `terms` ``(teachers, 2, …)``, unless it is None, gets those of each.
    """
    losses: list[Tensor] = []
    found = []
    others = None  # gradients of all teachers but the first
    for i in reversed(range(len(teachers))):
        rows, ids, kd_mask, options, normalizers, given, kernel_id, kd, needs_labels = teachers[i]
        to = gradient if i == 0 or gradient is None else torch.empty_like(gradient)
        loss, weights, divisors, stats = _whole_loss(flags.shard, kernel_id)(
            student=student,
            teacher=rows,
            ids=ids,
            labels=labels,
            kd_mask=kd_mask,
            options=options,
            normalizers=normalizers,
            given=given,
            gradient=to,
            terms=None if terms is None else terms[i],
            ignore_index=flags.ignore_index,
            kernel_id=kernel_id,
            transform=flags.transform,
            kd=kd,
            ce=flags.ce and i == 0,
            needs_labels=needs_labels,
            per_row=per_row,
            checked=checked,
        )
        losses.append(loss)
        divisors, options = made(divisors, options, given)
        found.append((weights, options, divisors, stats))
        if i > 0 and to is not None:
            others = to if others is None else others.add_(to)
    if len(losses) == 1:
        return loss, found
    if gradient is not None and others is not None:
        gradient.add_(others)
    return _total(losses[::-1]), found[::-1]


def _whole_loss(of: Shard | None, kernel_id: int) -> Any:
    """Who computes the loss of one teacher."""
    if of is None:
        return ops.kd_loss if kernel_id < FIRST_DEFINED else ops.defined_loss

    def forward(*, gradient: Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _sharded(inputs).kd_forward(inputs, of, gradient)
        return found

    return composed.whole_loss(partial(row_weights, of), composed.in_turn(forward, ops.kd_terms))


def row_weights(of: Shard | None, *, teacher: Tensor, ids: Tensor | None, kd: bool, **more: Any) -> Any:
    """The operator kd_row_weights, of a teacher whose columns other ranks may hold."""
    if of is not None and kd and ids is None:
        teacher = shard.known_rows(teacher, of)
    return ops.kd_row_weights(teacher=teacher, ids=ids, kd=kd, **more)


def loss_of(row_losses: Tensor, teachers: Sequence[TeacherRows], terms: Tensor | None, *, per_row: bool) -> Tensor:
    """The loss of row losses ``(teachers, 2, N)``; `terms` as in `whole_loss`.

    Inductor (torch 2.13) unpacks the result of an operator that returns one tensor and may write to another, if it is
    given none to write to: in a compiled graph there always is one.
    """
    if terms is None and torch.compiler.is_compiling():
        terms = row_losses.new_empty(row_losses.shape[: 2 + per_row])
    losses = [
        ops.kd_terms(
            row_losses=row_losses[i],
            options=t.options,
            normalizers=t.normalizers,
            terms=None if terms is None else terms[i],
            per_row=per_row,
        )
        for i, t in enumerate(teachers)
    ]
    return _total(losses)


def _total(losses: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, losses)


def forward(
    student: Tensor, labels: Tensor | None, teachers: Sequence[TeacherRows], flags: Flags, gradient: Tensor | None
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Row losses ``(teachers, 2, N)`` and the statistics of each teacher's call, and of the exchanged one if it has
    that. `gradient`, unless it is None, is overwritten with the gradient for upstream 1; it may be the student's own
    memory, for the first teacher comes last, unless a teacher gets a gradient. Each teacher is asked for once, so that
    they may be made on demand.
    """
    found: list[tuple[Tensor, ...]] = []
    others = None  # gradients of all teachers but the first
    for i in reversed(range(len(teachers))):
        to = None if gradient is None else gradient if i == 0 else torch.empty_like(gradient)
        found.append(_forward(student, labels, teachers[i], flags._replace(ce=flags.ce and i == 0), to))
        if i > 0 and to is not None:
            others = to if others is None else others.add_(to)
    if gradient is not None and others is not None:
        gradient.add_(others)
    found.reverse()
    losses = found[0][0].unsqueeze(0) if len(found) == 1 else torch.stack([losses for losses, *_ in found])
    return losses, [each[1:] for each in found]


def backward(
    upstream: Tensor,
    student: Tensor,
    labels: Tensor | None,
    teachers: Sequence[TeacherRows],
    stats: Sequence[Tensor],
    flags: Flags,
) -> Tensor:
    """The gradient times the upstream, ``()`` or ``(N,)``, from the logits and the statistics."""
    total = None
    for i, (teacher, each) in enumerate(zip(teachers, stats, strict=True)):
        gradient = student.new_empty(student.shape)
        inputs = _inputs(student, labels, teacher, flags._replace(ce=flags.ce and i == 0))
        _backward(teacher, inputs, flags, upstream=upstream, stats=each, gradient=gradient, skip_if_one=False)
        total = gradient if total is None else total + gradient
    assert total is not None
    return total


def rescale_(
    gradient: Tensor,
    upstream: Tensor,
    student: Tensor,
    labels: Tensor | None,
    teachers: Sequence[TeacherRows],
    stats: Sequence[Tensor],
    flags: Flags,
) -> None:
    """From the gradient for upstream 1 to that for this upstream: of one teacher again from the logits, so that it is
    rounded once; of several, whose gradient is in float32, a product.
    """
    if len(teachers) > 1:
        gradient.mul_(upstream)
        return
    inputs = _inputs(student, labels, teachers[0], flags)
    _backward(teachers[0], inputs, flags, upstream=upstream, stats=stats[0], gradient=gradient, skip_if_one=True)


def _forward(
    student: Tensor, labels: Tensor | None, teacher: TeacherRows, flags: Flags, gradient: Tensor | None
) -> tuple[Tensor, ...]:
    if teacher.exchanged is not None:
        return _forward_both(student, labels, teacher, flags, gradient)
    inputs = _inputs(student, labels, teacher, flags)
    if flags.shard is not None:
        return _sharded(inputs).kd_forward(inputs, flags.shard, gradient)
    operator = ops.defined_forward if teacher.kernel_id >= FIRST_DEFINED else ops.kd_forward
    found: tuple[Tensor, Tensor] = operator(**inputs, gradient=gradient)
    return found


def _forward_both(
    student: Tensor, labels: Tensor | None, teacher: TeacherRows, flags: Flags, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a teacher that gets a gradient: row by row where an operator does so, else by one call after the other."""
    kernels = teacher.kernel_id < FIRST_DEFINED and teacher.exchanged_kernel_id < FIRST_DEFINED
    alike = accumulation_dtype(student.dtype) == accumulation_dtype(teacher.rows.dtype)
    if kernels and alike and student.device.type in both_on:
        inputs = _inputs(student, labels, teacher, flags)
        del inputs["ids"]
        more = {"exchanged": teacher.exchanged, "exchanged_kernel_id": teacher.exchanged_kernel_id}
        return ops.kd_both(**inputs, **more, gradient=gradient, teacher_gradient=teacher.gradient)  # type: ignore
    row_losses, stats = _forward(student, labels, teacher._replace(exchanged=None), flags, gradient)
    _, others = _forward(*exchanged(student, labels, teacher, flags), teacher.gradient)
    return row_losses, stats, others


def exchanged(
    student: Tensor, labels: Tensor | None, teacher: TeacherRows, flags: Flags
) -> tuple[Tensor, Tensor | None, TeacherRows, Flags]:
    """The same of the call with the sides exchanged, whose gradient is the teacher's: D(p, q) as a function of the
    teacher's logits is another divergence (`Divergence.exchanged`) of the student's. Labels are for a `definition`.
    """
    assert teacher.exchanged is not None
    other = TeacherRows(
        rows=student[..., : teacher.rows.shape[2]],
        head=None,
        bias=None,
        ids=None,
        row_weights=teacher.row_weights,
        options=teacher.exchanged,
        normalizers=teacher.normalizers,
        kernel_id=teacher.exchanged_kernel_id,
    )
    return teacher.rows, labels if other.kernel_id >= FIRST_DEFINED else None, other, flags._replace(ce=False)


def _sharded(inputs: dict[str, Any]) -> Any:
    """Who serves a shard."""
    return shard if shard.has_kernel(inputs["kernel_id"], inputs["student"].device) else gathered


def _backward(teacher: TeacherRows, inputs: dict[str, Any], flags: Flags, **more: Any) -> None:
    if flags.shard is not None:
        return _sharded(inputs).kd_backward(inputs, flags.shard, **more)
    operator = ops.defined_backward if teacher.kernel_id >= FIRST_DEFINED else ops.kd_backward
    operator(**inputs, **more)


def _inputs(student: Tensor, labels: Tensor | None, teacher: TeacherRows, flags: Flags) -> dict[str, Any]:
    return {
        "student": student,
        "teacher": teacher.rows,
        "ids": teacher.ids,
        "labels": labels,
        "row_weights": teacher.row_weights,
        "options": teacher.options,
        "normalizers": teacher.normalizers,
        "kernel_id": teacher.kernel_id,
        "ignore_index": flags.ignore_index,
        "transform": flags.transform,
        "ce": flags.ce,
    }
