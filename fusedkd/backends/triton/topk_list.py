"""The list of a row, the K columns at which the teacher is known: p and log p there, and what the divergences of
:mod:`fusedkd.backends.triton.topk_kernel` make of them. In float64, whose digits 1 − Σp and δ need: K columns of V.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import (
    BUCKET,
    BUCKET_REVERSE,
    IGNORE_REVERSE,
    RENORMALIZE,
    RENORMALIZE_REVERSE,
    SAMPLES,
)
from fusedkd.backends.triton.math import INFINITY, finite_or_zero, reciprocal_or_zero
from fusedkd.reference.sparse import MOST_LOST

LOST = tl.constexpr(MOST_LOST)


class List(NamedTuple):
    p_ids: Any
    ids: Any
    """[BLOCK_K], as all of the list: columns, −1 for padding, if `legal`."""
    m: Any
    """Which of them are columns; none in a row without KD term."""
    n: Any
    """K, or 0 for a row without KD term."""
    legal: Any
    """Whether all ids are columns or padding."""
    kd: Any
    """Whether the row has a KD term, and that a value."""
    offset: Any
    """Of the row's first column, in what the ids count."""


class Known(NamedTuple):
    """The teacher on the list, [BLOCK_K]."""

    p: Any
    log_p: Any
    mass: Any
    """Σp."""
    tail: Any
    """r_t, of the forms that have one."""


class Slope(NamedTuple):
    value: Any
    """D."""
    listed: Any
    """∂D/∂s on the list, [BLOCK_K]."""
    rest: Any
    """Off the list, over e^((z − max of these columns)/T)."""


@triton.jit
def read_list(ids, i_row, selected, K, V, BLOCK_K: tl.constexpr):
    i_k = tl.arange(0, BLOCK_K)
    p_ids = ids + i_row.to(tl.int64) * K + i_k
    b_id = tl.load(p_ids, i_k < tl.where(selected, K, 0), other=-1)
    legal = tl.max(((b_id < -1) | (b_id >= V)).to(tl.int32), 0) == 0
    n = tl.where(selected & legal, K, 0)
    m = (b_id >= 0) & (i_k < n)
    return List(p_ids=p_ids, ids=b_id.to(tl.int32), m=m, n=n, legal=legal, kd=selected & legal, offset=0)


@triton.jit
def read_teacher(p_teacher, listed, stats, sharpening, KERNEL_ID: tl.constexpr, BLOCK_K: tl.constexpr):
    """p_teacher: of the row's first log-probability, or weight; sharpening: T_lp/T."""
    R: tl.constexpr = tl.float64
    p_known = p_teacher + tl.arange(0, BLOCK_K)
    if KERNEL_ID == SAMPLES:
        b_y = tl.load(p_known, listed.m, other=0.0).to(R)
        b_p = b_y
    else:
        b_y = tl.load(p_known, listed.m, other=-INFINITY).to(R)
        if (KERNEL_ID == RENORMALIZE) | (KERNEL_ID == RENORMALIZE_REVERSE):
            b_y = (b_y - finite_or_zero(tl.max(b_y, 0))) * sharpening
            b_y -= tl.log(tl.sum(tl.exp(b_y), 0))
        b_p = tl.exp(b_y)
    mass = tl.sum(b_p, 0)
    r_t = mass * 0.0
    if (KERNEL_ID == BUCKET) | (KERNEL_ID == BUCKET_REVERSE):
        r_t = teachers_tail(b_p, b_y, mass, stats.other_rest != -1, p_teacher.dtype.element_ty)
        share = 1.0 / (mass + r_t)
        b_p *= share
        b_y += tl.log(share)
        r_t *= share
    return Known(p=b_p, log_p=b_y, mass=mass, tail=r_t)


@triton.jit
def divergence(
    b_z, known, listed, p_teacher, ids, i_row, stats, temperature, K, KERNEL_ID: tl.constexpr, GRADIENT: tl.constexpr
):
    """b_z: the student's logits on the list; stats: of the row, and of the columns off the list."""
    R: tl.constexpr = tl.float64
    b_x = b_z.to(R)
    c = 1.0 / temperature
    top = finite_or_zero(stats.student_max)
    total = 1.0 + stats.student_rest.to(R)
    rest_c = stats.other_rest.to(R)
    sum_c = 1.0 + rest_c
    down = (stats.other_max.to(R) - top) * c
    log_l = tl.log(tl.where(total == 0, 1.0, total))
    q_c = tl.exp(down - log_l)  # q = q_c·e^((z − max)/T) off the list
    log_rs = down + tl.log(sum_c) - log_l
    b_lq = (b_x - top) * c - log_l
    b_q = tl.exp(b_lq)
    b_p = known.p
    b_delta = known.log_p - b_lq
    if (KERNEL_ID == RENORMALIZE) | (KERNEL_ID == BUCKET):
        value = tl.sum(excess(b_p, b_q, b_delta), 0)
        b_d = b_q - b_p
        if KERNEL_ID == RENORMALIZE:
            value += tl.exp(log_rs)
            rest = q_c
        else:
            value += tail(known.tail, tl.exp(log_rs), tl.log(known.tail) - log_rs)
            rest = q_c - known.tail * reciprocal_or_zero(rest_c)
    elif (KERNEL_ID == RENORMALIZE_REVERSE) | (KERNEL_ID == BUCKET_REVERSE):
        value = tl.sum(excess(b_q, b_p, -b_delta), 0)
        rest = 0.0 * q_c
        if KERNEL_ID == BUCKET_REVERSE:
            ratio = log_rs - tl.log(known.tail)
            value += tail(tl.exp(log_rs), known.tail, ratio)
            rest = tl.where(sum_c == 0, 0.0, (ratio - value) * q_c)
        b_d = tl.where(b_q == 0, 0.0, b_q * (-b_delta - value))
    elif KERNEL_ID == IGNORE_REVERSE:
        b_qd = tl.where(b_x == -INFINITY, 0.0, b_q * b_delta)
        value = -tl.sum(b_qd, 0)
        pull = tl.sum(b_q - b_qd, 0)
        b_d = b_q - b_qd - b_q * pull
        rest = -pull * q_c
    else:
        if KERNEL_ID == SAMPLES:
            b_delta = -b_lq
        b_term = tl.where(b_x == -INFINITY, INFINITY, b_p * b_delta)
        value = tl.sum(tl.where(known.log_p == (0 if KERNEL_ID == SAMPLES else -INFINITY), 0.0, b_term), 0)
        if KERNEL_ID == SAMPLES and GRADIENT:
            b_p = summed_samples(p_teacher, ids, i_row, listed, K)
        b_d = known.mass * b_q - b_p
        rest = known.mass * q_c
    return Slope(value=value, listed=b_d, rest=rest)


@triton.jit
def summed_samples(p_teacher, ids, i_row, listed, K):
    """For each of the list, the weights of all that drew the same column: columns drawn twice hold the sum."""
    b_sum = listed.ids.to(tl.float64) * 0.0
    for j in range(0, listed.n, 4):
        i_j = j + tl.arange(0, 4)
        m_j = i_j < listed.n
        b_j = tl.load(ids + i_row.to(tl.int64) * K + i_j, m_j, other=-1)
        b_w = tl.load(p_teacher + i_j, m_j & (b_j >= 0), other=0.0).to(tl.float64)
        b_sum += tl.sum(tl.where(listed.ids[:, None] == b_j[None, :], b_w[None, :], 0.0), 1)
    return b_sum


@triton.jit
def excess(p, m, x):
    """p·φ(x), x = log(p/m), φ = e^−x − 1 + x ≥ 0, in float64, by products alone: m where p is 0; +∞ where m is and p is
    not, even if p underflows.
    """
    y = 1.0 + 0.0 * x
    for k in tl.static_range(14, 2, -1):
        y = 1.0 - x * (y * (1.0 / k))
    px = tl.where(x > -1024, (p + 1.2e-38) * x, 0.0)  # p is 0 below
    return tl.where(tl.abs(x) < 0.5, px * x * 0.5 * y, (m - p) + px)


@triton.jit
def teachers_tail(b_p, b_y, mass, possible, dtype: tl.constexpr):
    """|1 − Σp|, at least what rounding leaves open of it (`reference/sparse.py`); dtype: of the log-probabilities."""
    half: tl.constexpr = 2.0**-7 if dtype == tl.bfloat16 else 2.0**-10
    eps: tl.constexpr = 2.0**-52 if dtype == tl.float64 else 2.0**-23 if dtype == tl.float32 else half
    error = eps / 2 * tl.sum(tl.where(b_p == 0, 0.0, b_p * tl.abs(b_y)), 0)
    error += 2.0**-46 if dtype == tl.float64 else 2.0**-23
    left = 1.0 - mass
    return tl.where(possible, tl.maximum(tl.abs(left), error), tl.where(left <= LOST, 0.0, left))


@triton.jit
def tail(p, m, x):
    """excess of the residual classes, scalars."""
    return tl.sum(excess(tl.zeros([1], p.dtype) + p, m, x), 0)
