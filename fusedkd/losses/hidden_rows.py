"""The loss of rows of hidden states, of one layer or of several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import as_rows, pack
from fusedkd.backends.layout import COUNTED, HiddenDistance, HiddenNormalize
from fusedkd.backends.schema import accumulation_dtype, by_layer
from fusedkd.checks import Real
from fusedkd.losses.common import gradient_in_forward, is_one, refuse_double_backward, save_for_backward
from fusedkd.losses.options import Reduction

ops = torch.ops.fusedkd


class Layer(NamedTuple):
    """A pair of hidden states that are compared."""

    student: Tensor
    """``(*, H)``."""
    teacher: list[Tensor]
    """Its pieces ``(*, H_k)``."""
    of: str = ""
    """In error messages: ``[3]`` of a list, or nothing."""
    weight: Real = 1.0

    def name(self, side: str) -> str:
        return side + self.of

    def frozen(self) -> Layer:
        """The same with a teacher that requires no gradient."""
        if not any([piece.requires_grad for piece in self.teacher]):
            return self
        return self._replace(teacher=[piece.detach() if piece.requires_grad else piece for piece in self.teacher])


class Comparison(NamedTuple):
    """What the operators are told of distance and normalisation."""

    distance: HiddenDistance
    normalize: HiddenNormalize


def rows_loss(
    layers: Sequence[Layer],
    mask: Tensor | None,
    compared: Comparison,
    reduction: Reduction,
    normalizer: Real | None,
) -> Tensor:
    """The weighted sum of the losses of layers whose arguments are checked, and whose students have one leading shape,
    type and device. Pieces of the teacher that require a gradient get one.
    """
    lead, device = layers[0].student.shape[:-1], layers[0].student.device
    flat_mask = check.row_vector("mask", mask, layers[0].student)
    grad = torch.is_grad_enabled()
    trained = grad and any([layer.student.requires_grad for layer in layers])
    taught = grad and any([piece.requires_grad for layer in layers for piece in layer.teacher])
    students: list[Tensor] = []
    teachers: list[Tensor] = []
    grids = []
    for layer in layers:
        student, pieces = layer.student, layer.teacher
        if taught:  # `as_rows` detaches: of contiguous tensors, rows are views that autograd knows
            student, pieces = student.contiguous(), [piece.contiguous() for piece in pieces]
        student, rows, grid = as_rows(student, *pieces)
        if taught:
            rows = [piece.view(*grid, piece.shape[-1]) for piece in pieces]
        students.append(student)
        teachers += rows
        grids.append(grid)
    per_row = reduction == "none"
    plan = Plan(
        grids=grids,
        per_row=per_row,
        gradient_in_forward=trained and any([gradient_in_forward(x, per_row) for x in students]),
        compared=compared,
    )
    given = divisor(reduction, normalizer, lead.numel(), flat_mask)
    factors = pack([given, *[layer.weight for layer in layers]], device)
    if trained or taught or torch.compiler.is_compiling():
        loss: Tensor = HiddenLossFunction.apply(plan, flat_mask, factors, *students, *teachers)
    else:
        loss, *_ = plan.loss(students, teachers, flat_mask, factors, [])
    return loss.view(lead) if per_row else loss


def divisor(reduction: Reduction, normalizer: Real | None, rows: int, mask: Tensor | None) -> Real:
    """What the sum over so many rows is divided by, or COUNTED."""
    if reduction != "mean":
        return 1.0
    return (rows if mask is None else COUNTED) if normalizer is None else normalizer


class Plan(NamedTuple):
    """What is decided on the host before an operator starts."""

    grids: list[tuple[int, int]]
    """(B, L) of each layer: how the leading dimensions are seen as rows without a copy."""
    per_row: bool
    gradient_in_forward: bool
    compared: Comparison

    def rows(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        return [x.view(*grid, x.shape[-1]) for x, grid in zip(hidden, self.grids, strict=True)]

    def memory(self, student: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
        """For the gradients of the layers, without elements where none is wanted."""
        sides = zip(student, wanted, strict=True)
        return [
            torch.empty_like(x, memory_format=torch.contiguous_format) if want else x.new_empty(*x.shape[:-1], 0)
            for x, want in sides
        ]

    def loss(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        mask: Tensor | None,
        normalizers: Tensor,
        gradient: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operator."""
        return ops.hidden_loss(  # type: ignore[no-any-return]
            student=self.rows(student),
            teacher=list(teacher),
            mask=mask,
            normalizers=normalizers,
            gradient=self.rows(gradient) if gradient else [],
            distance=self.compared.distance,
            normalize=self.compared.normalize,
            per_row=self.per_row,
        )


class HiddenLossFunction(torch.autograd.Function):
    """A loss of hidden states: a scalar, or ``(N,)`` per row."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Any) -> Tensor:  # two parameters: see losses/common.py
        mask, normalizers, *sides = tensors
        layers = len(plan.grids)
        student, teacher, gradient = sides[:layers], sides[layers:], []
        if plan.gradient_in_forward:
            gradient = plan.memory(student, ctx.needs_input_grad[3 : 3 + layers])
        loss, weights, normalizer, stats = plan.loss(student, teacher, mask, normalizers, gradient)
        ctx.plan, ctx.gradient = plan, gradient
        save_for_backward(ctx, None if mask is None else weights, normalizer, normalizers, stats, *sides)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        plan: Plan = ctx.plan
        layers = len(plan.grids)
        wanted, taught = ctx.needs_input_grad[3 : 3 + layers], ctx.needs_input_grad[3 + layers :]
        gradient, ctx.gradient = ctx.gradient, []
        of_teacher: list[Tensor | None] = [None] * len(taught)
        again = any(wanted) and not (gradient and is_one(upstream))
        if again or any(taught):
            weights, normalizer, normalizers, stats, *sides = ctx.saved_tensors
            student, teacher = plan.rows(sides[:layers]), sides[layers:]
            given = {"weights": weights, "normalizer": normalizer, "upstream": upstream.contiguous()}
            given |= plan.compared._asdict()
            layer_weights = normalizers[1:]
            if again:
                in_forward = bool(gradient)
                gradient = gradient or plan.memory(sides[:layers], wanted)
                more = {"student": student, "teacher": teacher, "layer_weights": layer_weights, "stats": stats}
                ops.hidden_backward(**given, **more, gradient=plan.rows(gradient), skip_if_one=in_forward)
            if any(taught):
                of_teacher = teacher_gradients(student, teacher, taught, layer_weights, given)
        of_student = [g if want else None for g, want in zip(gradient or [None] * layers, wanted, strict=True)]
        return None, None, None, *of_student, *of_teacher


def teacher_gradients(
    student: list[Tensor], teacher: list[Tensor], wanted: Sequence[bool], layer_weights: Tensor, given: dict[str, Any]
) -> list[Tensor | None]:
    """Of each piece ``(B, L, H_k)`` that is wanted: distances are symmetric, so they are a student's against this
    student. The pieces of a layer are concatenated for it.
    """
    layers, flags = list(by_layer(student, teacher)), iter(wanted)
    needed = [any([next(flags) for _ in pieces]) for _, pieces in layers]
    wholes = {
        j: pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1) for j, (_, pieces) in enumerate(layers) if needed[j]
    }
    gradients = {j: torch.empty_like(x, memory_format=torch.contiguous_format) for j, x in wholes.items()}
    upstream = given.pop("upstream")
    for dtype in dict.fromkeys([whole.dtype for whole in wholes.values()]):
        alike = [j for j, whole in wholes.items() if whole.dtype == dtype]
        given["student"], given["teacher"] = [wholes[j] for j in alike], [student[j] for j in alike]
        every = len(alike) == len(layers)
        given["layer_weights"] = layer_weights if every else torch.stack([layer_weights[j] for j in alike])
        _, stats = ops.hidden_forward(**given, gradient=[])
        more = {"stats": stats, "gradient": [gradients[j] for j in alike], "skip_if_one": False}
        ops.hidden_backward(**given, **more, upstream=upstream.to(accumulation_dtype(dtype)))
    found: list[Tensor | None] = []
    for j, (_, pieces) in enumerate(layers):
        parts = (
            gradients[j].split([piece.shape[-1] for piece in pieces], -1) if j in gradients else [None] * len(pieces)
        )
        found += [part if part is None else part.to(piece.dtype) for part, piece in zip(parts, pieces, strict=True)]
    return found
