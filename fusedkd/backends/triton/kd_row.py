"""What a pair of rows, student and teacher, needs once, all of it scalars: which terms it has, its softmaxes, the label
that DKD sets apart, and the coefficients of its gradient.

δ = log p − log q is never a difference of two log-sum-exps: δ = c_s·((v − z) − (max v − max z)) + (c_t − c_s)·(v −
max v) − log(l_t/l_s), c = 1/T, where sides that are far apart are first reduced by their maxima. The logarithm needs no
care: what is the same for all columns moves D in second order only, since Σ(p − q) = 0.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.cross_entropy import cross_entropy_gradient
from fusedkd.backends.triton.divergences import dkd_target
from fusedkd.backends.triton.math import INFINITY, LOG2E, finite_or_zero, log, log1p, reciprocal_or_zero
from fusedkd.backends.triton.options import Coefficients, exponent_scale, power_of

LOWEST = tl.constexpr(-1e20)
"""Of v − max v in δ: times c_t − c_s, a mask as low as float32 goes would be −∞, though both sides are finite."""


class Terms(NamedTuple):
    """Which terms of the loss a row has. A side that no term needs is not read: its logits count as −∞."""

    weight: Any
    """Of the KD term, 0 for none."""
    kd: Any
    ce: Any
    active: Any
    """Either."""
    target: Any
    """Whether the label is a column that both sides have, which DKD can set apart."""
    finite: Any
    """Whether the KD term has a gradient: its row has no label out of range, and what DKD needs."""


class Target(NamedTuple):
    """The label as the passes need it: offset −1 for none."""

    column: Any
    """Of which the cross-entropy is."""
    excluded: Any
    """That DKD sets apart."""
    z: Any
    """The student's logit."""


class Softmaxes(NamedTuple):
    """What makes probabilities, and δ, of the logits of a row."""

    c_s: Any
    c_t: Any
    k_s: Any
    k_t: Any
    base_s: Any
    base_t: Any
    near_s: Any
    near_t: Any
    gap: Any
    log_ratio: Any
    log_s: Any
    log_t: Any
    r_s: Any
    r_t: Any
    base_1: Any
    r_1: Any
    from_student: Any
    """From e^{z − max over the common columns} to q₁."""
    power: Any
    empty: Any
    """Whether a side has no column."""


class Gradient(NamedTuple):
    """Coefficients of ∂loss/∂z = kd·(w − q·centre) + that of the cross-entropy."""

    kd: Any
    centre: Any
    ce: Any


@triton.jit
def terms_of(weight, label, C, EXCLUDES_LABEL: tl.constexpr):
    kd = weight != 0
    ce = label.counted & label.legal
    target = label.legal & (label.column < C)
    finite = kd & ((label.counted & (label.legal == 0)) == 0)
    if EXCLUDES_LABEL:
        finite = finite & target
    return Terms(weight=weight, kd=kd, ce=ce, active=kd | ce, target=target, finite=finite)


@triton.jit
def needs_label(term, EXCLUDES_LABEL: tl.constexpr):
    """Whether the label's logit is needed."""
    return term.ce | (term.active & term.target) if EXCLUDES_LABEL else term.ce


@triton.jit
def target_of(label, term, z_y, phase, EXCLUDES_LABEL: tl.constexpr):
    excluded = tl.full((), -1, tl.int32)
    if EXCLUDES_LABEL:
        z_y = tl.where(z_y == INFINITY, float("nan"), z_y)  # lest it look like a sure label
        excluded = tl.where(term.target, label.column + phase, -1).to(tl.int32)
    return Target(column=tl.where(term.ce, label.column + phase, -1).to(tl.int32), excluded=excluded, z=z_y)


@triton.jit
def softmaxes(stats, option):
    base_s = finite_or_zero(stats.student_max)
    base_t = finite_or_zero(stats.other_max)
    base_1 = finite_or_zero(stats.ce_max)
    r_s = reciprocal_or_zero(stats.student_rest)
    r_1 = reciprocal_or_zero(stats.ce_rest)
    far = tl.abs(base_t - base_s) > 16
    excess = (stats.other_rest - stats.student_rest) * r_s  # l_t/l_s − 1, all of whose digits two sure rows need
    log_ratio = tl.where(tl.abs(excess) < 0.5, log1p(excess), log((1.0 + stats.other_rest) * r_s))
    empty = (stats.student_rest == -1) | (stats.other_rest == -1)
    return Softmaxes(
        c_s=1.0 / option.temperature,
        c_t=1.0 / option.teacher_temperature,
        k_s=exponent_scale(option.temperature),
        k_t=exponent_scale(option.teacher_temperature),
        base_s=base_s,
        base_t=base_t,
        near_s=tl.where(far, base_s, 0.0),
        near_t=tl.where(far, base_t, 0.0),
        gap=tl.where(far, 0.0, base_t - base_s),
        log_ratio=tl.where(empty, 0.0, log_ratio),
        log_s=log1p(stats.student_rest),
        log_t=log1p(stats.other_rest),
        r_s=r_s,
        r_t=reciprocal_or_zero(stats.other_rest),
        base_1=base_1,
        r_1=r_1,
        from_student=r_1 * tl.exp2((stats.student_max - base_1) * LOG2E),
        power=power_of(option.temperature),
        empty=empty,
    )


@triton.jit
def delta_of(v, z, low, s):
    """δ of logits v and z; low: v − max v, bounded by LOWEST."""
    return s.c_s * ((v - s.near_t) - (z - s.near_s) - s.gap) + (s.c_t - s.c_s) * low - s.log_ratio


@triton.jit
def all_masked(stats, target):
    """Whether the student's logits of the KD term are all −∞: their sum is empty. (NaN has that maximum too.)"""
    return (stats.student_rest == -1) & ((target.excluded < 0) | (target.z == -INFINITY))


@triton.jit
def excluded_label(a, v_y, target, s):
    """The label against the rest, which DKD sets apart: a₀ times its value, and times q_y − p_y; and before them the
    coefficients, without that of the rest if there is none.
    """
    v_y = tl.where(v_y == INFINITY, float("nan"), v_y)
    h = delta_of(v_y, target.z, tl.maximum(v_y - s.base_t, LOWEST), s)
    x_p = s.c_t * (v_y - s.base_t) - s.log_t
    x_q = s.c_s * (target.z - s.base_s) - s.log_s
    value, pull = dkd_target(x_p, x_q, tl.where(s.empty, INFINITY, h))
    value = tl.where((a.a0 == 0) & (value == INFINITY), 0.0, a.a0 * value)  # NaN shows even so
    rest = Coefficients(
        a0=a.a0, a1=tl.where(s.empty, 0.0, a.a1), a2=a.a2, a3=a.a3, a4=a.a4, a5=a.a5, a6=a.a6
    )  # fmt: skip
    return rest, value, a.a0 * pull


@triton.jit
def gradient_of(up, term, target, stats, s, centre, weights, normalizers, V, CE: tl.constexpr):
    """Coefficients for upstream `up`: 0 for a term that the row does not have, or that is infinite."""
    A: tl.constexpr = s.c_s.dtype
    kd = up * weights.kd_weight * weights.kd_scale * term.weight * s.c_s / tl.load(normalizers).to(A)
    kd = tl.where(term.finite & (all_masked(stats, target) == 0) & (centre != INFINITY), kd, 0.0)
    ce = tl.full((), 0, A)
    if CE:
        ce = up * weights.ce_weight / tl.load(normalizers + 1).to(A)
        ce = tl.where(term.ce, ce, 0.0)
    return Gradient(
        kd=kd,
        centre=tl.where(kd == 0, 0.0, centre),
        ce=cross_entropy_gradient(ce, target.z, stats.ce_max, stats.ce_rest, weights, V),
    )
