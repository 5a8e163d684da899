"""One ``torch.autograd.Function`` per loss: which operator runs when, and what happens to the upstream gradient.

`early` (bf16, float32, float64 under ``mean`` and ``sum`` in eager mode): the forward call leaves the gradient for
upstream 1. The first backward rescales it in place, which is a launch that returns at once when the upstream is 1 and
otherwise recomputes from the logits; a second backward recomputes into fresh memory. Everything else takes the value
forward and the gradient backward. Either way the gradient is rounded once.

Where saved-tensor hooks are active (checkpoint, offloading), backward computes the gradient, except with `inplace`,
whose gradient is a saved tensor. Backward reads ``ctx.saved_tensors`` once: a checkpoint raises at a second read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd.arguments import readable
from fusedkd.linear import LinearTeacher

ops = torch.ops.fusedkd


class Plan(NamedTuple):
    """What is decided on the host before an operator starts."""

    grid: tuple[int, int]
    """(B, L): how the leading dimensions are seen as rows without a copy."""
    per_row: bool
    early: bool
    inplace: bool = False
    ignore_index: int = -100
    form: int = 0
    transform: bool = False
    ce: bool = False

    @property
    def flags(self) -> tuple[int, int, bool, bool]:
        return self.ignore_index, self.form, self.transform, self.ce


class KDLossFunction(torch.autograd.Function):
    """(loss, kd, ce, logits): the loss, its two terms for logging, and with ``inplace`` the overwritten logits (else
    None). ``ids``: the teacher is known at these columns alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        ids: Tensor | None,
        labels: Tensor | None,
        weights: Tensor,
        options: Tensor,
        normalizers: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        z = student.view(*plan.grid, student.shape[-1])
        known = (teacher,) if ids is None else (teacher, ids)
        arguments = (*known, labels, weights, options, normalizers, *plan.flags)
        ctx.plan, ctx.gradient = plan, None
        ctx.set_materialize_grads(False)
        if plan.inplace:
            rows, _ = (ops.kd_forward_ if ids is None else ops.topk_forward_)(z, *arguments)
            ctx.mark_dirty(student)
            ctx.save_for_backward(student)
            ctx.spent = False
        else:
            forward = ops.kd_forward if ids is None else ops.topk_forward
            rows, stats, gradient = forward(z, *arguments, plan.early)
            ctx.gradient = gradient if plan.early else None
            _save(ctx, student, teacher, ids, labels, weights, options, normalizers, stats)
        loss, kd, ce = ops.kd_terms(rows, options, normalizers, plan.per_row)
        ctx.mark_non_differentiable(kd, ce)
        return loss, kd, ce, student if plan.inplace else None

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, _kd: None, _ce: None, logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        if logits is not None:
            raise RuntimeError(
                "kd_loss(inplace=True) overwrote the student's logits with their gradient, "
                "but a gradient reaches these logits from another use of them"
            )
        unused = (None,) * 7
        if upstream is None:
            return None, *unused
        if ctx.plan.inplace:
            return _overwritten(ctx, upstream), *unused
        student, teacher, ids, *rest = ctx.saved_tensors
        z = student.view(*ctx.plan.grid, student.shape[-1])
        known = (teacher,) if ids is None else (teacher, ids)
        arguments = (upstream.contiguous(), z, *known, *rest, *ctx.plan.flags)
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None:
            (ops.kd_rescale_ if ids is None else ops.topk_rescale_)(gradient, *arguments)
        else:
            gradient = (ops.kd_backward if ids is None else ops.topk_backward)(*arguments)
        return gradient.view(student.shape), *unused


class LinearPlan(NamedTuple):
    """What is decided on the host of the loss from hidden states; from the third on, arguments of the operator."""

    per_row: bool
    wanted: list[bool]
    """The gradients of hidden states, weight and bias."""
    ignore_index: int
    forms: tuple[int, ...]
    transform: bool
    ce: bool
    tile: int
    tile_dtype: torch.dtype
    dtype: torch.dtype
    max_rows: int | None

    def run(
        self, inputs: tuple[Any, ...], teachers: Sequence[Any], upstream: Tensor | None, wanted: list[bool]
    ) -> list[Tensor]:
        """The operator. `teachers`: the fields of each :class:`~fusedkd.linear.LinearTeacher`, one after the other."""
        by_field = [list(teachers[i::TEACHER_FIELDS]) for i in range(TEACHER_FIELDS)]
        return ops.linear_kd(*inputs, *by_field, upstream, *self[2:], wanted)


TEACHER_FIELDS = len(LinearTeacher._fields)


class LinearKDLossFunction(torch.autograd.Function):
    """(loss, kd of each teacher, ce). The forward call computes the gradients, in float32 and for upstream 1, unless it
    is ``per_row``; backward scales and rounds them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        plan: LinearPlan,
        *teachers: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = hidden, weight, bias, labels
        rows, *gradients = plan.run(inputs, teachers, None, [False] * 3 if plan.per_row else plan.wanted)
        ctx.plan = plan
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if plan.per_row:
            _save(ctx, *inputs, *teachers)
        else:
            ctx.save_for_backward(*gradients)
        found = []
        for i, each in enumerate(rows.unbind()):
            teacher = LinearTeacher(*teachers[i * TEACHER_FIELDS : (i + 1) * TEACHER_FIELDS])
            found.append(ops.kd_terms(each, teacher.options, teacher.normalizers, plan.per_row))
        loss, kd = torch.stack([terms[0] for terms in found]).sum(0), torch.stack([terms[1] for terms in found])
        ctx.mark_non_differentiable(kd, found[0][2])
        return loss, kd, found[0][2]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _kd: None, _ce: None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        none = (None,) * (2 + TEACHER_FIELDS * len(ctx.plan.forms))
        if upstream is None:
            return None, None, None, *none
        saved = ctx.saved_tensors
        if ctx.plan.per_row:
            _, *gradients = ctx.plan.run(saved[:4], saved[4:], upstream.contiguous(), ctx.plan.wanted)
            factor = None
        else:
            gradients, factor = saved, upstream
        typed = zip(gradients, ctx.dtypes, ctx.plan.wanted, strict=True)
        return *[_rounded(gradient, factor, dtype) if want else None for gradient, dtype, want in typed], *none


def _rounded(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient · factor in another type: one pass, one rounding."""
    if factor is None:
        return gradient.to(dtype)
    if torch.compiler.is_compiling() or gradient.dtype == dtype:
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


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
    gradient = student.detach()
    if not readable(upstream):
        gradient.mul_(upstream.view(1))  # a 0-d operand would first be rounded to the gradient's dtype
    elif upstream != 1:
        gradient.mul_(upstream)
    return gradient


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """``save_for_backward`` refuses what ``torch.inference_mode`` made, as it often did the teacher's logits: of that,
    an ordinary tensor on the same memory is saved. Not in compiled graphs, which save for themselves.
    """

    def ordinary(t: Tensor | None) -> Tensor | None:
        if t is None or torch.compiler.is_compiling() or not t.is_inference():
            return t
        return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())

    ctx.save_for_backward(*map(ordinary, tensors))


def _refuse_double_backward() -> None:
    """Autograd runs backward in grad mode for ``create_graph=True`` alone. ``once_differentiable`` would return a
    constant there, and a gradient penalty would vanish without a word.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("fusedkd's losses have no second derivative: backward was called with create_graph=True")


class CosineHiddenLossFunction(torch.autograd.Function):
    """The cosine loss: a scalar, or ``(N,)`` per row."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor | None, normalizer: Tensor, plan: Plan
    ) -> Tensor:
        x = student.view(*plan.grid, student.shape[-1])
        rows, stats, gradient = ops.cosine_forward(x, teacher, weights, normalizer, plan.early)
        ctx.plan, ctx.gradient = plan, gradient if plan.early else None
        _save(ctx, student, teacher, weights, normalizer, stats)
        return rows if plan.per_row else rows.sum() / normalizer.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        student, teacher, weights, normalizer, stats = ctx.saved_tensors
        x = student.view(*ctx.plan.grid, student.shape[-1])
        upstream, gradient, ctx.gradient = upstream.contiguous(), ctx.gradient, None
        if gradient is not None:
            ops.cosine_rescale_(gradient, upstream, x, teacher, weights, normalizer, stats)
        else:
            gradient = ops.cosine_backward(upstream, x, teacher, weights, normalizer, stats)
        return gradient.view(student.shape), None, None, None, None
