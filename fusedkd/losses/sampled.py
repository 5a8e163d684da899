"""Divergences from one token per row, where of the teacher no more is known than the token's log-probability."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.checks import Real
from fusedkd.losses.common import refuse_double_backward
from fusedkd.losses.kd import kd_loss
from fusedkd.losses.layer_inputs import row_weights, total
from fusedkd.losses.linear_kd import linear_kd_loss
from fusedkd.losses.names import by_name
from fusedkd.losses.options import Reduction
from fusedkd.teachers import TeacherHead

Estimator: TypeAlias = Literal["policy", "k1", "k2", "k3"]
ESTIMATORS = get_args(Estimator)


@by_name
def sampled_kl(student_logprob: Tensor, teacher_logprob: Tensor, *, estimator: Estimator = "policy") -> Tensor:
    """The estimate of KL(q‖p) in each row, from the log-probabilities log q and log p that student and teacher give the
    row's token y. With d = log q − log p, and y drawn from q, so that KL(q‖p) = E[d]:

    - ``"policy"``: value d, unbiased; gradient d·∇log q, unbiased: its mean is the gradient of KL(q‖p). The score
      function, a policy gradient with the advantage −d.
    - ``"k1"``: value d, unbiased; gradient ∇log q, whose mean is 0: it teaches nothing.
    - ``"k2"``: value d²/2, biased: its mean is E[d²]/2; gradient that of ``"policy"``, row by row.
    - ``"k3"``: value e^(−d) − 1 + d, unbiased, and at least 0 in each row; gradient (1 − p/q)·∇log q, biased: its mean
      is the gradient of the *forward* divergence KL(p‖q).

    (k1 to k3: J. Schulman, "Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html.) The gradients of k1
    and k3 are not those of the mean of their values, for y's own distribution moves with q: that part is the score
    function's, which back-propagation through a value does not see. Where y was not drawn from q, as in given text,
    none of this holds.

    Computed in float64 for each row, since k3 is a small difference of numbers near 1.

    Args:
        student_logprob: log q of the token, ``(*)``, of any floating-point type; gets the gradient.
        teacher_logprob: log p of it, ``(*)``; gets none.
        estimator: ``"policy"``, ``"k1"``, ``"k2"`` or ``"k3"``.

    Where the teacher gives the token no probability (log p = −inf) the value is +inf; the gradient is 1 for k1 and k3,
    as it is, and 0 for policy and k2, whose own is infinite. Where the student gives it none, the gradient is 0; where
    neither does, the value too.

    Returns:
        ``(*)``, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    _check_estimator(estimator)
    log_q = check.plain("student_logprob", student_logprob)
    if log_q.dtype not in check.FLOATING:
        raise TypeError(f"student_logprob must be floating point, not {log_q.dtype}")
    log_p = _checked_logprob(teacher_logprob, log_q.unsqueeze(-1), log_q.requires_grad).view(log_q.shape)
    return _Sampled.apply(log_q, log_p, estimator)  # type: ignore[no-any-return]


@by_name
def sampled_kl_loss(
    student_logits: Tensor,
    teacher_logprob: Tensor,
    labels: Tensor,
    *,
    estimator: Estimator = "policy",
    temperature: Real = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    logit_softcap: Real | None = None,
    logit_scale: Real | None = None,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
) -> Tensor:
    """:func:`sampled_kl` of logits: the reverse divergence from a teacher that scores tokens and gives nothing else.

    The tokens must be drawn from q = softmax(z/temperature), the whole of it, without top-k or top-p: the estimators
    are right for the student's own text alone. The log-probability of a label, its normaliser and its gradient are
    those of the fused cross-entropy; no probabilities exist.

    Args:
        student_logits: z, ``(*, V)``, float16, bfloat16, float32 or float64.
        teacher_logprob: log p of each row's label, ``(*)``, floating point, natural logarithm, of the teacher at this
            temperature; gets no gradient. Rows without a label are not read.
        labels: the tokens y, ``(*)``, int64, already shifted. Rows with `ignore_index` are left out.
        estimator: ``"policy"``, ``"k1"``, ``"k2"`` or ``"k3"``: :func:`sampled_kl` says what their values and
            gradients are.
        temperature: T > 0 of the student. There is no factor T².
        mask: ``(*)``, further rows to leave out. Bool or integer: non-zero selects; float: weights, 0 is not selected.
        logit_softcap, logit_scale: the student's logits are c·tanh(scale·z/c).
        reduction: ``"mean"`` over the selected rows (float masks: over the sum of weights), ``"sum"``, or ``"none"``:
            ``(*)``.
        normalizer: replaces the count under ``"mean"``: a number or a 0-d tensor. With the tokens of the whole
            optimiser step, on all ranks, accumulation and data parallelism are exact.

    Returns:
        float32 (float64 for float64 logits): a scalar, or ``(*)`` under ``"none"``.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    check.float_rows("student_logits", student_logits)
    given = _Given.of(teacher_logprob, labels, mask, ignore_index, student_logits)
    _check_options(estimator, temperature, reduction, normalizer)
    options = _at(temperature, logit_softcap, logit_scale) | {"ignore_index": ignore_index}
    log_q = _logprob(kd_loss, student_logits, student_logits.detach(), given.labels, **options)
    return given.reduced(log_q, estimator, reduction, normalizer)


@by_name
def linear_sampled_kl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_logprob: Tensor,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    estimator: Estimator = "policy",
    temperature: Real = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    logit_softcap: Real | None = None,
    logit_scale: Real | None = None,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
    max_tile_bytes: int | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """:func:`sampled_kl_loss` for logits student_hidden · student_weightᵀ + student_bias, which never exist but for a
    tile of rows, as in :func:`fusedkd.linear_kd_loss`: 8·N·V·H operations, for a row's logits are computed once for its
    log-probability and once more for the gradient.

    Args:
        student_hidden: ``(*, H)``, float16, bfloat16, float32 or float64.
        student_weight: ``(V, H)``, of that type; under autocast of any.
        student_bias: ``(V,)``.
        max_tile_bytes, max_rows: as for :func:`fusedkd.linear_kd_loss`.
        teacher_logprob, labels, …: as for :func:`sampled_kl_loss`.

    Returns, Raises: as :func:`sampled_kl_loss`.
    """
    check.float_rows("student_hidden", student_hidden)
    given = _Given.of(teacher_logprob, labels, mask, ignore_index, student_hidden)
    _check_options(estimator, temperature, reduction, normalizer)
    options = _at(temperature, logit_softcap, logit_scale) | {"ignore_index": ignore_index}
    options |= {"student_bias": student_bias, "max_tile_bytes": max_tile_bytes, "max_rows": max_rows}
    log_q = linear_logprob(student_hidden, student_weight, given.labels, **options)
    return given.reduced(log_q, estimator, reduction, normalizer)


def linear_logprob(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Of each row's label, ``(*)``, differentiable; 0 where there is none. `options` of :func:`linear_kd_loss`."""
    unread = TeacherHead(hidden.detach(), weight.detach())  # of a term whose weight is 0
    return _logprob(linear_kd_loss, hidden, weight, unread, labels, **options)


def _logprob(loss: Any, *arguments: Any, **options: Any) -> Tensor:
    return -loss(*arguments, kd_weight=0.0, ce_weight=1.0, reduction="none", **options)  # type: ignore[no-any-return]


def _at(temperature: Real, softcap: Real | None, scale: Real | None) -> dict[str, Any]:
    """The options under which the cross-entropy, always at temperature 1, is that of z/T."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return {"logit_softcap": softcap, "logit_scale": scale}
    return {
        "logit_softcap": None if softcap is None else softcap / temperature,
        "logit_scale": (1.0 if scale is None else scale) / temperature,
    }


def _check_options(estimator: str, temperature: Real, reduction: Any, normalizer: Real | None) -> None:
    _check_estimator(estimator)
    check.real("temperature", temperature, open_low=True)
    check.reduction(reduction, normalizer=normalizer)


def _check_estimator(estimator: Any) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}")


def _checked_logprob(teacher_logprob: Any, student: Tensor, student_needs_gradient: bool) -> Tensor:
    """``(N,)``, of the rows of `student`."""
    teacher_logprob = check.plain("teacher_logprob", teacher_logprob)
    if teacher_logprob.dtype not in check.FLOATING:
        raise TypeError(f"teacher_logprob must be floating point, not {teacher_logprob.dtype}")
    check.frozen("teacher_logprob", teacher_logprob, student_needs_gradient, never=True)
    rows: Any = check.row_vector("teacher_logprob", teacher_logprob.detach(), student)
    return rows  # type: ignore[no-any-return]


class _Given(NamedTuple):
    """Of the rows ``(*)``."""

    labels: Tensor
    """Those of selected rows, else `ignore_index`."""
    log_p: Tensor
    """The teacher's, 0 where the row is not selected."""
    mask: Tensor
    """``(N,)``: bool, or the weights."""

    @classmethod
    def of(cls, teacher_logprob: Tensor, labels: Tensor, mask: Tensor | None, ignore: int, student: Tensor) -> _Given:
        known = check.row_vector("labels", labels, student)
        if known is None:
            raise TypeError("labels must be the tokens, int64, not None")
        check.class_indices(labels)
        log_p = _checked_logprob(teacher_logprob, student, student.requires_grad)
        rows = check.row_vector("mask", mask, student)
        selected = known != ignore
        if rows is not None:
            selected = selected & (rows != 0)
        weights = torch.where(selected, rows, 0) if rows is not None and rows.is_floating_point() else selected
        log_p = torch.where(selected, log_p, 0)
        if check.readable(log_p) and log_p.numel() and log_p.max() > 1e-3:
            raise ValueError(f"teacher_logprob must be log-probabilities, at most 0, but one is {log_p.max().item():g}")
        return cls(torch.where(selected, known, ignore).view(labels.shape), log_p.view(labels.shape), weights)

    def reduced(self, log_q: Tensor, estimator: str, reduction: str, normalizer: Real | None) -> Tensor:
        losses: Tensor = _Sampled.apply(log_q, self.log_p, estimator)  # 0 where neither side has a log-probability
        weights, divisor = row_weights(self.mask, log_q.unsqueeze(-1), normalizer if reduction == "mean" else 1.0)
        if self.mask.is_floating_point() and weights is not None:
            weights = weights.view(losses.shape)
            losses = torch.where(weights != 0, weights * losses, 0)
        return losses if reduction == "none" else total(losses, divisor)


class _Sampled(torch.autograd.Function):
    """Value and slope, the derivative by log q, of each row."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, estimator: str) -> Tensor:
        dtype = torch.promote_types(log_q.dtype, torch.float32)
        q, p = log_q.detach().double(), log_p.double()
        d = torch.where((q == -torch.inf) & (p == -torch.inf), 0, q - p)
        ratio = torch.expm1(-d)  # p/q − 1
        value = {"k2": d * d / 2, "k3": torch.where(d == -torch.inf, torch.inf, ratio + d)}.get(estimator, d)
        slope = {"k1": torch.ones_like(d), "k3": -ratio}.get(estimator, d).to(dtype)
        ctx.save_for_backward(torch.where(slope.isinf() | (q == -torch.inf), 0, slope))
        ctx.dtype = log_q.dtype
        return value.to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        refuse_double_backward()
        (slope,) = ctx.saved_tensors
        return (upstream * slope).to(ctx.dtype), None, None
