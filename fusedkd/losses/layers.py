"""The losses over several layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import as_rows
from fusedkd.checks import Real
from fusedkd.losses.common import gradient_in_forward, is_one, refuse_double_backward, save_for_backward
from fusedkd.losses.layer_inputs import Layers, Sides, bucket_table, total
from fusedkd.losses.names import by_name
from fusedkd.losses.options import Reduction

ops = torch.ops.fusedkd


@by_name
def layer_attention_loss(
    student_layers: Layers,
    teacher_layers: Layers,
    mask: Tensor | None = None,
    *,
    buckets: Sequence[Sequence[int]] | None = None,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
    teacher_gradient: bool = False,
) -> Tensor:
    """Each student layer against a mixture of teacher layers, which attention makes (ALP-KD, arXiv:2012.14022, §3): for
    each row and each student layer s_j, α_j = softmax over the teacher layers t_k of its bucket of ⟨s_j, t_k⟩,
    c_j = Σ_k α_jk t_k, and the loss is Σ_j mean over H of (s_j − c_j)²: a sum over the student's layers, by `reduction`
    over the rows.

    The gradient goes through the attention as well. Each layer is read from memory once; nothing is kept but the
    gradient, in the forward call already, except for float16, per row and under ``torch.compile``.

    Args:
        student_layers: ``(M, *, H)``, or a sequence of M tensors ``(*, H)``, such as ``hidden_states[1:]``: float16,
            bfloat16, float32 or float64, of one type; last dimension contiguous.
        teacher_layers: the same with K layers, of any such type.
        mask: ``(*)``. Bool or integer: non-zero selects; float: weights, 0 is not selected (its rows are not read).
            None: all rows.
        buckets: for each student layer the positions in `teacher_layers` that it attends to, such as
            :func:`fusedkd.layer_maps.regular` for a `teacher_layers` that is the whole ``hidden_states``. None: all.
        reduction: ``"mean"`` over the selected rows (float masks: over the sum of weights), ``"sum"``, or ``"none"``:
            ``(*)``.
        normalizer: replaces the count under ``"mean"``: a number or a 0-d tensor.
        teacher_gradient: also gives the teacher's layers their gradient. Otherwise they get none.

    Returns:
        float32 (float64 for float64 student layers): a scalar, or ``(*)`` under ``"none"``.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    sides = Sides.of(student_layers, teacher_layers, teacher_gradient)
    check.reduction(reduction, normalizer=normalizer)
    table = bucket_table(buckets, sides.counts, sides.first.device)
    per_row = reduction == "none"
    weights, divisor = sides.rows(mask, normalizer if reduction == "mean" else 1.0)
    plan = Plan(sides.stacked, len(sides.student), sides.wanted, per_row)
    if torch.compiler.is_compiling() or any(sides.wanted):
        loss: Tensor = LayerAttentionFunction.apply(plan, weights, divisor, table, *sides.student, *sides.teacher)
    else:
        loss = plan.loss(sides.student, sides.teacher, weights, divisor, table, None, None)
    return loss.view(sides.first.shape[:-1]) if per_row else loss


@by_name
def pairwise_layer_mse(
    student_layers: Layers,
    teacher_layers: Layers,
    mask: Tensor | None = None,
    *,
    normalizer: Real | None = None,
    teacher_gradient: bool = False,
) -> Tensor:
    """The mean squared difference of every student layer and every teacher layer, ``(M, K)``: the distances D of
    BERT-EMD (arXiv:2010.06133, §3.2), whose loss is Σ F·D with the flow F of a transport problem.

    D_jk is the mean over H and over the selected rows of (s_j − t_k)². The M + K layers are read once each for all
    M·K distances, and once more for the gradient. Differences are taken directly: |s|² + |t|² − 2⟨s, t⟩ has no
    digits left for layers that nearly agree. Sums are deterministic.

    Args:
        student_layers, teacher_layers, mask, normalizer, teacher_gradient: as for :func:`layer_attention_loss`.

    Returns:
        ``(M, K)``, float32 (float64 for float64 student layers).

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    sides = Sides.of(student_layers, teacher_layers, teacher_gradient)
    check.reduction("mean", normalizer=normalizer)
    weights, divisor = sides.rows(mask, normalizer)
    plan = Plan(sides.stacked, len(sides.student), sides.wanted, per_row=False)
    if torch.compiler.is_compiling() or any(sides.wanted):
        return LayerDistancesFunction.apply(plan, weights, divisor, *sides.student, *sides.teacher)  # type: ignore[no-any-return]
    return plan.distances(sides.student, sides.teacher, weights, divisor)


class Plan(NamedTuple):
    """What is decided on the host before an operator starts."""

    stacked: tuple[bool, bool]
    student: int
    """How many tensors are the student's; the others are the teacher's."""
    wanted: tuple[bool, bool]
    per_row: bool

    def layers(self, tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Both sides as ``(B, L, H)`` in one grid."""
        sides = tensors[: self.student], tensors[self.student :]
        student, teacher = (
            list(side[0].unbind() if stacked else side) for side, stacked in zip(sides, self.stacked, strict=True)
        )
        first, others, grid = as_rows(student[0], *student[1:], *teacher)
        rows = [first.detach().view(*grid, first.shape[-1]), *others]
        return {"student": rows[: len(student)], "teacher": rows[len(student) :]}

    def buffers(self, rows: dict[str, list[Tensor]]) -> dict[str, Tensor | None]:
        """Memory for the gradients that are wanted."""
        made = [
            side[0].new_empty((len(side), *side[0].shape)) if want else None
            for side, want in zip(rows.values(), self.wanted, strict=True)
        ]
        return {"gradient": made[0], "teacher_gradient": made[1]}

    def gradients(self, tensors: Sequence[Tensor], student: Tensor | None, teacher: Tensor | None) -> list[Any]:
        """For each of the tensors, from those of all layers of a side."""
        given: list[Any] = []
        for side, stacked, gradient in zip(
            (tensors[: self.student], tensors[self.student :]), self.stacked, (student, teacher), strict=True
        ):
            parts = [gradient] if stacked else [None] * len(side) if gradient is None else gradient.unbind()
            given += [None if part is None else part.view(t.shape) for part, t in zip(parts, side, strict=True)]
        return given

    def loss(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        weights: Tensor | None,
        normalizer: Tensor,
        buckets: Tensor,
        gradient: Tensor | None,
        teacher_gradient: Tensor | None,
    ) -> Tensor:
        """Of layer_attention_loss, without a graph."""
        rows = self.layers((*student, *teacher))
        row_losses = _attention(None, rows, weights, normalizer, buckets, gradient, teacher_gradient)
        return row_losses if self.per_row else total(row_losses, normalizer)

    def distances(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor | None, normalizer: Tensor
    ) -> Tensor:
        """Of pairwise_layer_mse."""
        rows = self.layers((*student, *teacher))
        return ops.layer_distances(**rows, weights=weights, normalizer=normalizer)  # type: ignore[no-any-return]


def _attention(
    upstream: Tensor | None,
    rows: dict[str, list[Tensor]],
    weights: Tensor | None,
    normalizer: Tensor,
    buckets: Tensor,
    gradient: Tensor | None,
    teacher_gradient: Tensor | None,
    skip_if_one: bool = False,
) -> Tensor:
    """The operator, which in a compiled graph has something to write to: :func:`fusedkd.backends.block.loss_of`."""
    if gradient is None and teacher_gradient is None and torch.compiler.is_compiling():
        gradient = rows["student"][0].new_empty((len(rows["student"]), *rows["student"][0].shape))
    return ops.layer_attention(  # type: ignore[no-any-return]
        upstream=upstream,
        **rows,
        weights=weights,
        normalizer=normalizer,
        buckets=buckets,
        gradient=gradient,
        teacher_gradient=teacher_gradient,
        skip_if_one=skip_if_one,
    )


class LayerAttentionFunction(torch.autograd.Function):
    """A scalar, or ``(N,)`` per row."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Any) -> Tensor:  # two parameters: see losses/common.py
        weights, normalizer, buckets, *tensors = inputs
        rows = plan.layers(tensors)
        asked = next((t for t in tensors if t.requires_grad), tensors[0])
        with torch.enable_grad():
            at_once = gradient_in_forward(asked, plan.per_row) and rows["teacher"][0].dtype != torch.float16
        buffers = plan.buffers(rows) if at_once else {"gradient": None, "teacher_gradient": None}
        row_losses = _attention(None, rows, weights, normalizer, buckets, **buffers)
        ctx.plan, ctx.buffers = plan, buffers if at_once else None
        save_for_backward(ctx, weights, normalizer, buckets, *tensors)
        return row_losses if plan.per_row else total(row_losses, normalizer)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        plan, buffers, ctx.buffers = ctx.plan, ctx.buffers, None
        weights, normalizer, buckets, *tensors = ctx.saved_tensors
        if buffers is None or not is_one(upstream):
            rows = plan.layers(tensors)
            in_forward = buffers is not None
            buffers = buffers or plan.buffers(rows)
            _attention(upstream.contiguous(), rows, weights, normalizer, buckets, **buffers, skip_if_one=in_forward)
        return None, None, None, None, *plan.gradients(tensors, *buffers.values())


class LayerDistancesFunction(torch.autograd.Function):
    """``(M, K)``."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Any) -> Tensor:  # two parameters: see losses/common.py
        weights, normalizer, *tensors = inputs
        ctx.plan = plan
        save_for_backward(ctx, weights, normalizer, *tensors)
        return plan.distances(tensors[: plan.student], tensors[plan.student :], weights, normalizer)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        plan = ctx.plan
        weights, normalizer, *tensors = ctx.saved_tensors
        rows, found = plan.layers(tensors), []
        for want, ours, theirs, up in zip(
            plan.wanted, ("student", "teacher"), ("teacher", "student"), (upstream, upstream.T), strict=True
        ):
            given = {"student": rows[ours], "teacher": rows[theirs], "weights": weights, "normalizer": normalizer}
            found.append(ops.layer_distances_backward(upstream=up.double().contiguous(), **given) if want else None)
        return None, None, None, *plan.gradients(tensors, *found)
