"""The losses of hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import as_rows, pack
from fusedkd.backends.layout import COUNTED, HiddenDistance, HiddenNormalize
from fusedkd.backends.schema import accumulation_dtype
from fusedkd.checks import Real
from fusedkd.losses.common import gradient_in_forward, is_one, refuse_double_backward, save_for_backward
from fusedkd.losses.names import by_name
from fusedkd.losses.options import Reduction
from fusedkd.losses.pool import pooled, token_weights
from fusedkd.losses.projected import Projection, projected_rows_loss, projections
from fusedkd.reference.hidden import DistanceName, NormalizeName

ops = torch.ops.fusedkd


@by_name
def hidden_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor] | Sequence[Tensor | Sequence[Tensor]],
    mask: Tensor | None = None,
    *,
    distance: DistanceName = "mse",
    normalize: NormalizeName | None = None,
    projection: Tensor | Sequence[Tensor | None] | None = None,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    pool: Literal["mean"] | None = None,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
    layer_weights: Sequence[Real] | None = None,
    teacher_gradient: bool = False,
) -> Tensor:
    """Mean over the selected rows of a distance between the student's hidden states and the teacher's, of one layer or
    of several.

    ``normalize="l2"`` with ``distance="mse"`` is the loss of PKD (arXiv:1908.09355, eq. 7), CKD (arXiv:2012.06048) and
    RAIL-KD (arXiv:2109.10164), which is (2 − 2·cos)/H; ``"layer_norm"`` that of MobileBERT (arXiv:2004.02984, eq. 1);
    without either it is that of TinyBERT (arXiv:1909.10351, eq. 8). Each side is read once, nothing is gathered,
    concatenated or copied, and the gradient is taken in the forward call.

    Args:
        student: ``(*, H)``, float16, bfloat16, float32 or float64; last dimension contiguous. Or a list of M such
            tensors, the layers; then the loss is the sum of theirs, of shapes that may differ in H.
        teacher: ``(*, H)``, of any of these types, or a list of tensors ``(*, H_k)`` that count as their concatenation
            along H (CKD). For a list of student layers: a list of M of these.
        mask: ``(*)``. Bool or integer: non-zero selects; float: weights, 0 is not selected (its rows are not read).
            None: all rows. The same for all layers.
        distance: ``"mse"``, Σd²/H with d the difference of the rows; ``"smooth_l1"``, as in
            :func:`torch.nn.functional.smooth_l1_loss`, mean over H; ``"cosine"``, 1 − cos, with the ε of
            :func:`torch.nn.functional.cosine_embedding_loss`.
        normalize: what is done to each row first: ``"l2"``, x/√(Σx² + 1e-12), which the cosine does by itself;
            ``"layer_norm"``, :func:`torch.nn.functional.layer_norm` without weight and bias.
        projection: W, ``(H_t, H_s)``, as :attr:`torch.nn.Linear.weight`: the student's rows are x·Wᵀ + bias, which
            exist a tile of rows at a time (:mod:`fusedkd.backends.projected`). Of the student's type; under autocast of
            any. A list of layers shares it, as TinyBERT's do, or has a list of them, where None is none.
        bias: ``(H_t,)``, of the projection, likewise. Both get gradients.
        pool: ``"mean"``: the rows compared are the means over the selected tokens of each sequence, the second to last
            dimension, and the loss is one of ``(*)`` sequences ``(*, L, H)``. With a float mask the means are weighted.
            A sequence without a selected token counts as not selected. Means are taken by a product with the mask.
        reduction: ``"mean"`` over the selected rows (float masks: over the sum of weights; of pooled sequences: over
            their number), ``"sum"``, or ``"none"``: ``(*)``.
        normalizer: replaces the count under ``"mean"``: a number or a 0-d tensor.
        layer_weights: a number or 0-d tensor, ≥ 0, for each layer; 1 by default.
        teacher_gradient: whether the teacher gets a gradient too, where it requires one. It is computed in backward,
            and the pieces of a list are concatenated for it.

    Returns:
        float32 (float64 for float64 input): a scalar, or ``(*)`` under ``"none"``.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    compared = comparison(distance, normalize)
    check.reduction(reduction, normalizer=normalizer)
    check.flag("teacher_gradient", teacher_gradient)
    if pool not in (None, "mean"):
        raise ValueError(f"pool must be None or 'mean', not {pool!r}")
    layers, losses = _layers(student, teacher, layer_weights), []
    behind = list(zip(layers, projections(projection, bias, student), strict=True))
    for layer, projected in behind:
        _check_sides(*layer[:3], projected)
    if not teacher_gradient:
        trained = any([x.student.requires_grad or (p is not None and p.trained()) for x, p in behind])
        for name, piece in [(x.name("teacher"), y) for x in layers for y in x.teacher if y.requires_grad][:1]:
            check.frozen(name, piece, trained)  # one sentence for all layers
    for layer, projected in behind:
        x, pieces, selected = layer.student, layer.teacher, mask
        if not teacher_gradient:
            pieces = frozen(pieces)
        if pool is not None:
            x, pieces, selected = _pooled(layer.name("student"), x, pieces, mask)
        given = pieces, selected, compared, reduction, normalizer, layer.weight
        losses.append(rows_loss(x, *given) if projected is None else projected_rows_loss(x, projected, *given))
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)


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
    of hidden states): :func:`hidden_loss` with ``distance="cosine"``.

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
    _check_sides(student_hidden, [teacher_hidden], "_hidden")
    check.frozen("teacher_hidden", teacher_hidden, student_hidden.requires_grad, never=True)
    check.reduction(reduction, normalizer=normalizer)
    return rows_loss(student_hidden, frozen([teacher_hidden]), mask, COSINE, reduction, normalizer)


def frozen(teacher: list[Tensor]) -> list[Tensor]:
    """The same, of which none requires a gradient."""
    return [piece.detach() if piece.requires_grad else piece for piece in teacher]


class Comparison(NamedTuple):
    """What the operators are told of distance and normalisation."""

    distance: HiddenDistance
    normalize: HiddenNormalize


COSINE = Comparison(HiddenDistance.COSINE, HiddenNormalize.NONE)


def comparison(distance: str, normalize: str | None) -> Comparison:
    if distance not in get_args(DistanceName):
        raise ValueError(f"distance must be one of {get_args(DistanceName)}, not {distance!r}")
    if normalize is not None and normalize not in get_args(NormalizeName):
        raise ValueError(f"normalize must be None or one of {get_args(NormalizeName)}, not {normalize!r}")
    return Comparison(HiddenDistance[distance.upper()], HiddenNormalize[(normalize or "none").upper()])


class _Layer(NamedTuple):
    student: Tensor
    teacher: list[Tensor]
    of: str
    """In error messages: ``[3]`` of a list, or nothing."""
    weight: Real

    def name(self, side: str) -> str:
        return side + self.of


def _layers(student: Any, teacher: Any, weights: Sequence[Real] | None) -> list[_Layer]:
    """The pairs of hidden states that are compared."""
    if not isinstance(student, list | tuple):
        if weights is not None:
            raise ValueError("layer_weights are given, but student is one tensor, not a list of layers")
        return [_Layer(student, _pieces(teacher, ""), "", 1.0)]
    if not isinstance(teacher, list | tuple) or len(teacher) != len(student) or not student:
        got = f"{len(teacher)} layers" if isinstance(teacher, list | tuple) else type(teacher).__name__
        raise ValueError(
            f"teacher must be a list of as many layers as student, at least one, but these are {len(student)} layers "
            f"and {got}"
        )
    if weights is not None and not isinstance(weights, list | tuple):
        raise TypeError(f"layer_weights must be a list of numbers or 0-d tensors, not {type(weights).__name__}")
    if weights is not None and len(weights) != len(student):
        raise ValueError(f"layer_weights must be one for each of {len(student)} layers, not {len(weights)}")
    for i, weight in enumerate(weights or ()):
        check.real(f"layer_weights[{i}]", weight)
    given = [1.0] * len(student) if weights is None else weights
    sides = zip(student, teacher, given, strict=True)
    return [_Layer(x, _pieces(y, f"[{i}]"), f"[{i}]", weight) for i, (x, y, weight) in enumerate(sides)]


def _pieces(teacher: Any, of: str) -> list[Tensor]:
    if not isinstance(teacher, list | tuple):
        return [teacher]
    if not teacher:
        raise ValueError(f"teacher{of} must be a tensor or a list of at least one, but the list is empty")
    return list(teacher)


def _check_sides(student: Tensor, teacher: list[Tensor], of: str, projection: Projection | None = None) -> None:
    check.float_rows(f"student{of}", student, hidden=True)
    for i, piece in enumerate(teacher):
        check.float_rows(f"teacher{of}[{i}]" if len(teacher) > 1 else f"teacher{of}", piece, student, hidden=True)
    columns = [piece.shape[-1] for piece in teacher]
    if projection is not None:
        projection.check(student, sum(columns))
    elif student.shape[-1] != sum(columns):
        theirs = columns[0] if len(columns) == 1 else f"{sum(columns)}, the sum of {columns}"
        raise ValueError(
            f"student{of} and teacher{of} must have the same last dimension, not {student.shape[-1]} and {theirs}: "
            "pass a projection"
        )


def _pooled(
    name: str, student: Tensor, teacher: list[Tensor], mask: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The means of both sides ``(*, H)``, and which sequences have one ``(*)``."""
    if student.dim() < 2:
        raise ValueError(f"pool='mean' needs sequences (*, L, H), but the shape of {name} is {tuple(student.shape)}")
    check.row_vector("mask", mask, student)
    shares, selected = token_weights(student, mask)
    return pooled(student, shares), [pooled(piece, shares) for piece in teacher], selected


def rows_loss(
    student: Tensor,
    teacher: list[Tensor],
    mask: Tensor | None,
    compared: Comparison,
    reduction: Reduction,
    normalizer: Real | None,
    weight: Real = 1.0,
) -> Tensor:
    """`weight` times the loss of arguments that are checked: hidden states ``(*, H)``, and pieces of the teacher's, of
    which those that require a gradient get one.
    """
    flat_mask = check.row_vector("mask", mask, student)
    taught = torch.is_grad_enabled() and any([piece.requires_grad for piece in teacher])
    if taught:  # `as_rows` detaches: of contiguous tensors, rows are views that autograd knows
        student, teacher = student.contiguous(), [piece.contiguous() for piece in teacher]
    student, rows, grid = as_rows(student, *teacher)
    if taught:
        rows = [piece.view(*grid, piece.shape[-1]) for piece in teacher]
    count: Real = grid[0] * grid[1]
    given: Real = (count if flat_mask is None else COUNTED) if normalizer is None else normalizer
    plan = Plan(
        grid=grid,
        per_row=reduction == "none",
        gradient_in_forward=gradient_in_forward(student, reduction == "none"),
        compared=compared,
    )
    divisors = pack([given, weight] if reduction == "mean" else [1.0, 1.0 if plan.per_row else weight], student.device)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (student.requires_grad or taught)):
        loss: Tensor = HiddenLossFunction.apply(plan, flat_mask, divisors, student, *rows)
    else:
        loss, *_ = plan.loss(student, rows, flat_mask, divisors, None)
    if not plan.per_row:
        return loss
    loss = loss.view(student.shape[:-1])
    return loss if not isinstance(weight, Tensor) and weight == 1 else loss * weight


class Plan(NamedTuple):
    """What is decided on the host before an operator starts."""

    grid: tuple[int, int]
    """(B, L): how the leading dimensions are seen as rows without a copy."""
    per_row: bool
    gradient_in_forward: bool
    compared: Comparison

    def rows(self, hidden: Tensor) -> Tensor:
        return hidden.view(*self.grid, hidden.shape[-1])

    def loss(
        self, student: Tensor, teacher: list[Tensor], mask: Tensor | None, normalizers: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operator."""
        return ops.hidden_loss(  # type: ignore[no-any-return]
            student=self.rows(student),
            teacher=teacher,
            mask=mask,
            normalizers=normalizers,
            gradient=None if gradient is None else self.rows(gradient),
            distance=self.compared.distance,
            normalize=self.compared.normalize,
            per_row=self.per_row,
        )


class HiddenLossFunction(torch.autograd.Function):
    """A loss of hidden states: a scalar, or ``(N,)`` per row."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Any) -> Tensor:  # two parameters: see losses/common.py
        mask, normalizers, student, *teacher = tensors
        gradient = None
        if plan.gradient_in_forward:
            gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        loss, weights, normalizer, stats = plan.loss(student, teacher, mask, normalizers, gradient)
        ctx.plan, ctx.gradient = plan, gradient
        save_for_backward(ctx, student, None if mask is None else weights, normalizer, stats, *teacher)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        gradient, ctx.gradient = ctx.gradient, None
        unused = (None,) * 3
        of_student, of_teacher = ctx.needs_input_grad[3], any(ctx.needs_input_grad[4:])
        if gradient is not None and not of_teacher and is_one(upstream):
            return *unused, gradient, *[None] * (len(ctx.needs_input_grad) - 4)
        student, weights, normalizer, stats, *teacher = ctx.saved_tensors
        plan: Plan = ctx.plan
        given = {"weights": weights, "normalizer": normalizer, "upstream": upstream.contiguous()}
        given |= plan.compared._asdict()
        if of_student and not (gradient is not None and is_one(upstream)):
            in_forward = gradient is not None
            if gradient is None:
                gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
            sides = {"student": plan.rows(student), "teacher": teacher, "gradient": plan.rows(gradient)}
            ops.hidden_backward(**given, **sides, stats=stats, skip_if_one=in_forward)
        found = teacher_gradients(plan.rows(student), teacher, given) if of_teacher else [None] * len(teacher)
        return *unused, gradient, *found


def teacher_gradients(student: Tensor, teacher: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    """Of each piece ``(B, L, H_k)``: distances are symmetric, so they are a student's against this student."""
    whole = teacher[0] if len(teacher) == 1 else torch.cat(teacher, -1)
    given = given | {"student": whole, "teacher": [student]}
    upstream = given.pop("upstream").to(accumulation_dtype(whole.dtype))
    _, stats = ops.hidden_forward(**given, gradient=None)
    gradient = torch.empty_like(whole, memory_format=torch.contiguous_format)
    ops.hidden_backward(**given, upstream=upstream, stats=stats, gradient=gradient, skip_if_one=False)
    parts = gradient.split([piece.shape[-1] for piece in teacher], -1)
    return [part.to(piece.dtype) for part, piece in zip(parts, teacher, strict=True)]
