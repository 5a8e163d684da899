"""The gradient of a KD loss with respect to the teacher, which some methods need (MATE-KD, arXiv:2105.05912: a
generator that maximises the divergence, through teacher and student).

D(p, q) as a function of the teacher's logits is another divergence with the two sides exchanged: forward KL becomes
reverse KL (`Divergence.exchanged`). So the gradient is that of a second call of the same losses, in which the teacher
is the student, with the rows, the normaliser and T^k of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import as_rows
from fusedkd.losses.common import refuse_double_backward
from fusedkd.losses.options import KDOptions
from fusedkd.losses.rules import Member, Prepared
from fusedkd.teachers import TeacherHead, TeacherLogits

Side = TeacherLogits | TeacherHead


def with_teacher_gradient(
    loss: Tensor, student: Side, asked: Sequence[Member], parts: Sequence[Prepared], **tiling: Any
) -> Tensor:
    """The loss, whose backward reaches the teachers as well.

    Args:
        student: the student's logits, or its hidden states and head, with soft-cap and scale.
        tiling: what `linear_kd_loss` is told of its tiles.
    """
    for member, part in zip(asked, parts, strict=True):
        teacher = TeacherLogits(member.teacher) if isinstance(member.teacher, Tensor) else member.teacher
        if not isinstance(teacher, Side):
            raise TypeError(
                "teacher_gradient needs a teacher of logits or a TeacherHead, not a "
                f"{type(teacher).__name__}, which has no logits that a gradient could reach"
            )
        if part.rules.kd and any(x.requires_grad for x in _tensors(teacher)):
            loss = _Carry.apply(loss, _exchanged(student, teacher, part, tiling))
    return loss


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


def _exchanged(student: Side, teacher: Side, part: Prepared, tiling: dict[str, Any]) -> Tensor:
    """The KD term with the sides exchanged, differentiable in the teacher alone."""
    from fusedkd.losses.kd import kd_loss  # these two call this module
    from fusedkd.losses.linear_kd import linear_kd_loss

    rules, of_loss = part.rules, part.rules.options
    known, lead = part.known, part.known.rows.shape[:-1]
    like = known.rows.detach() if known.head is None else known.rows.new_zeros(()).expand(*lead, 1)  # all rows count
    rows = part.teacher_rows(as_rows(like, like)[1][0])
    weight, divergence = rules.family.exchanged()
    power = rules.family.temperature_power
    scale = check.exact(rules.temperatures[0]) ** power if of_loss["scale_by_t2"] else 1.0
    options: KDOptions = {
        "divergence": divergence,
        "temperature": rules.temperatures[1],
        "teacher_temperature": rules.temperatures[0],
        "scale_by_t2": False,
        "kd_weight": check.exact(of_loss["kd_weight"]) * scale * weight,
        "kd_mask": rows.row_weights.view(lead),
        "reduction": of_loss["reduction"],
        "kd_normalizer": rows.normalizers[0] if of_loss["reduction"] == "mean" else None,
        "logit_softcap": teacher.softcap,
        "logit_scale": teacher.scale,
        "vocab_mismatch": "truncate",
        "ignore_index": of_loss["ignore_index"],
    }
    labels = part.labels.view(lead) if rules.needs_labels and part.labels is not None else None
    fixed = type(student)(**{name: _detached(value) for name, value in vars(student).items()})
    if isinstance(teacher, TeacherLogits):
        return kd_loss(teacher.logits, fixed, labels, **options)
    return linear_kd_loss(teacher.hidden, teacher.weight, fixed, labels, student_bias=teacher.bias, **tiling, **options)


def _tensors(side: Side) -> list[Tensor]:
    return [value for value in vars(side).values() if isinstance(value, Tensor)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class _Carry(torch.autograd.Function):
    """The first of two losses, whose backward reaches both. (A sum would be NaN where one is infinite.)"""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, other: Tensor) -> Tensor:
        ctx.dtypes = loss.dtype, other.dtype
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        refuse_double_backward()
        own, other = ctx.dtypes
        return upstream.to(own), upstream.to(other)
