"""The losses between attention maps that exist: of models that return these alone."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.checks import Real
from fusedkd.divergences import Divergence, DivergenceName
from fusedkd.losses.attention import check_softmax, selected
from fusedkd.losses.kd import kd_loss
from fusedkd.losses.names import by_name
from fusedkd.losses.options import Reduction

MapForm: TypeAlias = Literal["probabilities", "scores"]


@by_name
def attention_kl_from_maps(
    student_maps: Tensor,
    teacher_maps: Tensor,
    mask: Tensor | None = None,
    *,
    form: MapForm = "probabilities",
    divergence: DivergenceName | Divergence = "forward_kl",
    padded_queries: bool = False,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
) -> Tensor:
    """:func:`attention_kl_loss` of attention maps that a model returns, through :func:`kd_loss`.

    Args:
        student_maps, teacher_maps: ``(B, heads, L, L)``, float16, bfloat16, float32 or float64; last dimension
            contiguous. The teacher's get no gradient.
        mask: ``(B, L)``, bool or integer, as of :func:`attention_kl_loss`.
        form: ``"probabilities"``, after the softmax, as transformers returns them; rows that dropout left with another
            sum than 1 are divided by it. ``"scores"``, before it, with −inf for what is not seen.
        divergence, padded_queries, reduction, normalizer: as of :func:`attention_kl_loss`.

    Returns, Raises:
        As :func:`attention_kl_loss`.
    """
    check_softmax(divergence)
    if form not in ("probabilities", "scores"):
        raise ValueError(f"form must be 'probabilities' or 'scores', not {form!r}")
    check.reduction(reduction, normalizer=normalizer)
    nothing = 0.0 if form == "probabilities" else -torch.inf
    student, teacher, rows = _seen(student_maps, teacher_maps, mask, padded_queries, nothing)
    if form == "probabilities":
        student, teacher = _log(student), _log(teacher)
    return kd_loss(
        student,
        teacher,
        kd_mask=rows,
        divergence=divergence,
        reduction=reduction,
        kd_normalizer=_of_heads(normalizer, student),
    )


@by_name
def attention_mse_from_maps(
    student_maps: Tensor,
    teacher_maps: Tensor,
    mask: Tensor | None = None,
    *,
    padded_queries: bool = False,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
) -> Tensor:
    """:func:`attention_mse_loss` of the scores that a model returns, through :func:`kd_loss`.

    Args:
        student_maps, teacher_maps: ``(B, heads, L, L)`` scores, −inf where a key is not seen. TinyBERT's models return
            those of padding 10,000 lower instead; with the `mask` they are not read.
        mask, padded_queries, reduction, normalizer: as of :func:`attention_mse_loss`.

    Returns, Raises:
        As :func:`attention_mse_loss`.
    """
    check.reduction(reduction, normalizer=normalizer)
    student, teacher, rows = _seen(student_maps, teacher_maps, mask, padded_queries, -torch.inf)
    if normalizer is None and rows is None and reduction == "mean":  # all rows, those that see no key too
        normalizer = student.shape[0] * student.shape[2]
    return kd_loss(
        student,
        teacher,
        kd_mask=rows,
        divergence="logit_mse",
        reduction=reduction,
        kd_normalizer=_of_heads(normalizer, student),
    )


def _seen(
    student: Tensor, teacher: Tensor, mask: Tensor | None, padded_queries: bool, nothing: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both maps without the keys of padding, and the rows that count, ``(B, heads, L)`` bool or None."""
    for name, x in (("student_maps", student), ("teacher_maps", teacher)):
        check.float_rows(name, x)
        if x.dim() != 4 or x.shape[2] != x.shape[3]:
            raise ValueError(f"{name} must have the shape (B, heads, L, L), not {tuple(x.shape)}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_maps must have the shape of student_maps {tuple(student.shape)}, not {tuple(teacher.shape)}"
        )
    check.flag("padded_queries", padded_queries)
    rows, keys = selected(mask, student, padded_queries)
    if keys is not None:
        hidden = ~keys[:, None, None, :]
        student, teacher = (x.masked_fill(hidden, nothing) for x in (student, teacher))
    return student, teacher, None if rows is None else rows[:, None].expand(student.shape[:3])


def _log(probabilities: Tensor) -> Tensor:
    """−inf of 0, without the NaN of its gradient."""
    some = probabilities > 0
    return torch.where(some, probabilities, 1).log().masked_fill(~some, -torch.inf)


def _of_heads(normalizer: Real | None, maps: Tensor) -> Real | None:
    return None if normalizer is None else check.exact(normalizer) * maps.shape[1]
