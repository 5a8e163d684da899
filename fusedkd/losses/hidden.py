"""The losses of hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.layout import HiddenDistance, HiddenNormalize
from fusedkd.checks import Real
from fusedkd.losses.hidden_rows import Comparison, Layer, rows_loss
from fusedkd.losses.names import by_name
from fusedkd.losses.options import Reduction
from fusedkd.losses.pool import pooled, token_weights
from fusedkd.losses.projected import Projection, projected_rows_loss, projections
from fusedkd.reference.hidden import DistanceName, NormalizeName

Behind = tuple[Layer, Projection | None]
"""A layer, and what its student is projected by."""


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
    layers = _layers(student, teacher, layer_weights)
    behind = list(zip(layers, projections(projection, bias, student), strict=True))
    for layer, projected in behind:
        _check_sides(*layer[:3], projected)
    if not teacher_gradient:
        trained = any([x.student.requires_grad or (p is not None and p.trained()) for x, p in behind])
        for name, piece in [(x.name("teacher"), y) for x in layers for y in x.teacher if y.requires_grad][:1]:
            check.frozen(name, piece, trained)  # one sentence for all layers
        behind = [(layer.frozen(), projected) for layer, projected in behind]
    losses = []
    for alike in _in_one_call(behind):
        group, selected = [layer for layer, _ in alike], mask
        if pool is not None:
            group, selected = _pooled(group, mask)
        how = selected, compared, reduction, normalizer
        projected = alike[0][1]
        losses.append(rows_loss(group, *how) if projected is None else projected_rows_loss(group[0], projected, *how))
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
    return rows_loss([Layer(student_hidden, [teacher_hidden]).frozen()], mask, COSINE, reduction, normalizer)


COSINE = Comparison(HiddenDistance.COSINE, HiddenNormalize.NONE)


def comparison(distance: str, normalize: str | None) -> Comparison:
    if distance not in get_args(DistanceName):
        raise ValueError(f"distance must be one of {get_args(DistanceName)}, not {distance!r}")
    if normalize is not None and normalize not in get_args(NormalizeName):
        raise ValueError(f"normalize must be None or one of {get_args(NormalizeName)}, not {normalize!r}")
    return Comparison(HiddenDistance[distance.upper()], HiddenNormalize[(normalize or "none").upper()])


def _layers(student: Any, teacher: Any, weights: Sequence[Real] | None) -> list[Layer]:
    """The pairs of hidden states that are compared."""
    if not isinstance(student, list | tuple):
        if weights is not None:
            raise ValueError("layer_weights are given, but student is one tensor, not a list of layers")
        return [Layer(student, _pieces(teacher, ""))]
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
    return [Layer(x, _pieces(y, f"[{i}]"), f"[{i}]", weight) for i, (x, y, weight) in enumerate(sides)]


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


def _in_one_call(layers: list[Behind]) -> list[list[Behind]]:
    """The layers that one operator serves: without a projection, and alike but in their width."""
    calls: dict[Any, list[Behind]] = {}
    for i, (layer, projected) in enumerate(layers):
        x = layer.student
        key = i if projected is not None else (x.shape[:-1], x.dtype, x.device)
        calls.setdefault(key, []).append((layer, projected))
    return list(calls.values())


def _pooled(layers: list[Layer], mask: Tensor | None) -> tuple[list[Layer], Tensor]:
    """The means of both sides ``(*, H)`` of each layer, and which sequences have one ``(*)``."""
    first = layers[0].student
    if first.dim() < 2:
        name = layers[0].name("student")
        raise ValueError(f"pool='mean' needs sequences (*, L, H), but the shape of {name} is {tuple(first.shape)}")
    check.row_vector("mask", mask, first)
    shares, selected = token_weights(first, mask)
    means = [
        layer._replace(
            student=pooled(layer.student, shares), teacher=[pooled(piece, shares) for piece in layer.teacher]
        )
        for layer in layers
    ]
    return means, selected
