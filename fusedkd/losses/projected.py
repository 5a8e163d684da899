"""The losses of hidden states behind a projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import as_rows, pack
from fusedkd.backends.projected import rows_per_tile
from fusedkd.checks import Real
from fusedkd.losses.common import refuse_double_backward, rounded, save_for_backward
from fusedkd.losses.hidden_rows import Layer, divisor
from fusedkd.losses.options import Reduction

ops = torch.ops.fusedkd


class Projection(NamedTuple):
    """Of a layer's student."""

    weight: Tensor
    bias: Tensor | None
    weight_name: str
    bias_name: str

    def trained(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def check(self, student: Tensor, columns: int) -> None:
        """That it takes these hidden states to so many columns. Its type is theirs, or any under autocast, which casts
        it.
        """
        shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        shapes[self.weight_name] = self.weight, (columns, student.shape[-1])
        if self.bias is not None:
            shapes[self.bias_name] = (self.bias, (columns,))
        cast = check.autocast_dtype(student.device) is not None
        for name, (tensor, shape) in shapes.items():
            check.plain(name, tensor)
            if tensor.dtype not in check.FLOATING or (tensor.dtype != student.dtype and not cast):
                raise TypeError(f"{name} must be {student.dtype} like the student's hidden states, not {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must have the shape {shape}, from the student's last dimension to the teacher's, "
                    f"not {tuple(tensor.shape)}"
                )
            if tensor.device != student.device:
                raise ValueError(f"{name} must be on the student's device {student.device}, not on {tensor.device}")


def projections(weight: Any, bias: Any, student: Any) -> list[Projection | None]:
    """That of each layer: one that all share, or those of a list, where None is none."""
    many = isinstance(student, list | tuple)
    layers = len(student) if many else 1
    given = []
    for name, value in (("projection", weight), ("bias", bias)):
        if not isinstance(value, list | tuple):
            given.append([(value, name)] * layers)
        elif not many or len(value) != layers:
            wanted = f"a list of {layers}, one for each layer," if many else "a tensor, as student is,"
            raise ValueError(f"{name} must be {wanted} not a list of {len(value)}")
        else:
            given.append([(each, f"{name}[{i}]") for i, each in enumerate(value)])
    found: list[Projection | None] = []
    for (w, weight_name), (b, bias_name) in zip(*given, strict=True):
        if w is None and b is not None:
            raise ValueError(f"{bias_name} is given, but no {weight_name} that it belongs to")
        found.append(None if w is None else Projection(w, b, weight_name, bias_name))
    return found


def projected_rows_loss(
    layer: Layer,
    projection: Projection,
    mask: Tensor | None,
    compared: tuple[int, int],
    reduction: Reduction,
    normalizer: Real | None,
) -> Tensor:
    """`rows_loss` of :mod:`fusedkd.losses.hidden_rows` for a layer whose student is projected first."""
    student, teacher = layer.student, layer.teacher
    flat_mask = check.row_vector("mask", mask, student)
    lead = student.shape[:-1]
    count, per_row = lead.numel(), reduction == "none"
    grad = torch.is_grad_enabled()
    operands = student, projection.weight, projection.bias
    taught = grad and any([piece.requires_grad for piece in teacher])
    cast = None if student.dtype == torch.float64 else check.autocast_dtype(student.device)
    factors = pack([divisor(reduction, normalizer, count, flat_mask), layer.weight], student.device)
    # means of 16-bit hidden states are float32
    dtype = torch.promote_types(student.dtype, projection.weight.dtype) if cast is None else cast
    plan = ProjectedPlan(
        per_row=per_row,
        wanted=[*[grad and x is not None and x.requires_grad for x in operands], taught],
        compared=compared,
        tile=rows_per_tile(student.device, len(projection.weight), dtype),
        dtype=dtype,
    )
    # `as_rows` detaches, and sees more shapes without a copy
    rows = [p.reshape(1, count, p.shape[-1]) if taught else as_rows(p, p)[1][0] for p in teacher]
    flat = student.reshape(count, student.shape[-1])
    loss: Tensor = ProjectedLossFunction.apply(
        plan, flat_mask, factors, flat, projection.weight, projection.bias, *rows
    )
    return loss.view(lead) if per_row else loss


class ProjectedPlan(NamedTuple):
    """What is decided on the host before the operator starts."""

    per_row: bool
    wanted: list[bool]
    """The gradients of hidden states, projection, bias and teacher."""
    compared: tuple[int, int]
    """Distance and normalisation."""
    tile: int
    dtype: torch.dtype

    def run(
        self,
        mask: Tensor | None,
        normalizers: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *teacher: Tensor,
        upstream: Tensor | None,
        wanted: list[bool],
    ) -> tuple[Tensor, ...]:
        """The operator: loss and gradients."""
        distance, normalize = self.compared
        return ops.linear_hidden(  # type: ignore[no-any-return]
            hidden=hidden,
            weight=weight,
            bias=bias,
            teacher=list(teacher),
            mask=mask,
            normalizers=normalizers,
            upstream=upstream,
            distance=distance,
            normalize=normalize,
            per_row=self.per_row,
            tile=self.tile,
            dtype=self.dtype,
            wanted=wanted,
        )


class ProjectedLossFunction(torch.autograd.Function):
    """A loss of hidden states: a scalar, or ``(N,)`` per row. The forward call computes the gradients, in float32 and
    for upstream 1, unless it is ``per_row``; backward scales and rounds them.
    """

    @staticmethod
    def forward(ctx: Any, plan: ProjectedPlan, *inputs: Any) -> Tensor:  # two parameters: see losses/common.py
        _, _, hidden, weight, bias, *teacher = inputs
        ctx.plan = plan
        ctx.like = [None if x is None else (x.shape[-1], x.dtype) for x in (hidden, weight, bias, *teacher)]
        loss, *gradients = plan.run(*inputs, upstream=None, wanted=[False] * 4 if plan.per_row else plan.wanted)
        save_for_backward(ctx, *(inputs if plan.per_row else gradients))
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        plan: ProjectedPlan = ctx.plan
        factor = None
        if plan.per_row:
            found = plan.run(*ctx.saved_tensors, upstream=upstream.contiguous(), wanted=plan.wanted)
            *of_student, of_teacher = found[1:]
        else:
            (*of_student, of_teacher), factor = ctx.saved_tensors, upstream
        typed = zip(of_student, ctx.like[:3], plan.wanted, strict=False)
        rounds = [rounded(gradient, factor, like[1]) if want else None for gradient, like, want in typed]
        return None, None, None, *rounds, *_pieces(of_teacher, ctx.like[3:], factor, ctx.needs_input_grad[6:])


def _pieces(
    gradient: Tensor, like: Sequence[tuple[int, torch.dtype]], factor: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of each piece of the teacher ``(1, N, H_k)``."""
    if not any(needed):
        return [None] * len(like)
    parts = gradient.split([columns for columns, _ in like], -1)
    typed = zip(parts, like, needed, strict=True)
    return [rounded(part, factor, to[1]).unsqueeze(0) if need else None for part, to, need in typed]
