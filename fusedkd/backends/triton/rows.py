"""Walking rows of logits that start anywhere: which columns a block touches, their softmax statistics, and the aligned
addresses that both are counted from. Odd vocabularies (30522, 50257, 119547) get the 16-byte accesses of even ones.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from fusedkd.backends.triton.math import INFINITY, LOG2E, cap_and_scale, exp_at_one, finite_or_zero

UNIT = tl.constexpr(16)
"""Columns. Block loops start on a multiple of it, counted from a 16-byte aligned address, wherever the row starts."""

PARTIALS = tl.constexpr(10)
"""What each part of a split row leaves: the six statistics, D, W, Σ(z − z_y), and once the label's logit."""
MAX_PARTS = tl.constexpr(64)


@triton.jit
def columns(i_block, phase, head, body, V, ENDS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Offsets of a block from the aligned address ``phase`` columns before the row, and which of them to touch.

    The body, [head, body), is whole vectors: 16-byte accesses. The ends are the columns before and after it, the
    student's columns without a teacher among them: one column per thread.
    """
    if ENDS:
        i = i_block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]  # [1, BLOCK/8]
        o = tl.where(i < head, i, i - head + body)
        m = (o >= phase) & (o < phase + V) & ((i >= head) | (o < body))
    else:
        i = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK/GROUP, GROUP]
        o = head + i_block * BLOCK + i
        m = o < body
    return o, m


@triton.jit
def logits(p_row, o, m, cap, scale, A: tl.constexpr, TRANSFORM: tl.constexpr, POLICY: tl.constexpr):
    """Logits, −∞ where masked, soft-capped and scaled; and the derivative of that."""
    b = tl.load(p_row + o, m, other=-INFINITY, eviction_policy=POLICY).to(A)
    slope = b
    if TRANSFORM:
        b, slope = cap_and_scale(b, cap, scale)
    return b, slope


@triton.jit
def pair(
    i_block,
    places,
    transforms,
    A: tl.constexpr,
    TRANSFORM: tl.constexpr,
    POLICY: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A block of both sides: offsets, mask, teacher and student as `logits` gives them, and the student's derivative.

    Each side's logits end at `stop`, and in the body at `edge`, a whole number of vectors: 0 for a side not to be read.
    """
    p_teacher, p_student, phase, head, body, V, stop_t, edge_t, stop_s, edge_s = places
    cap_t, scale_t, cap_s, scale_s = transforms
    o, m = columns(i_block, phase, head, body, V, ENDS, BLOCK, GROUP)
    m_t = m & (o < (stop_t if ENDS else edge_t))
    m_s = m & (o < (stop_s if ENDS else edge_s))
    b_t = logits(p_teacher, o, m_t, cap_t, scale_t, A, TRANSFORM, POLICY)[0]
    b_s, b_slope = logits(p_student, o, m_s, cap_s, scale_s, A, TRANSFORM, POLICY)
    return o, m, b_t, b_s, b_slope


@triton.jit
def accumulate(top, total, total_1, b, k, power, AT_ONE: tl.constexpr):
    """Take a block [G, n] into the running state of G groups: maximum, Σ e^{(b − max)/T}, and Σ e^{b − max}."""
    new = tl.maximum(top, tl.max(b, 1))
    base = finite_or_zero(new)
    shift = top - base
    x = b - base[:, None]
    decay = tl.exp2(shift * k)
    e = tl.exp2(x * k)
    total = total * decay + tl.sum(e, 1)
    if AT_ONE:
        total_1 = total_1 * exp_at_one(decay, shift, power) + tl.sum(exp_at_one(e, x, power), 1)
    return new, total, total_1


@triton.jit
def merge(top, total, total_1, k):
    """The states of G groups → that of one, [1]."""
    new = tl.max(top, 0, keep_dims=True)
    shift = top - finite_or_zero(new)
    total = tl.sum(total * tl.exp2(shift * k), 0, keep_dims=True)
    total_1 = tl.sum(total_1 * tl.exp2(shift * LOG2E), 0, keep_dims=True)
    return new, total, total_1


@triton.jit
def put(p_state, stride, state):
    """Six statistics: maximum and sum of student, teacher, and student at T = 1."""
    for i in tl.static_range(6):
        tl.store(p_state + i * stride, state[i])


@triton.jit
def take(p_state):
    return (
        tl.load(p_state),
        tl.load(p_state + 1),
        tl.load(p_state + 2),
        tl.load(p_state + 3),
        tl.load(p_state + 4),
        tl.load(p_state + 5),
    )


@triton.jit
def share(n, part, parts, SPLIT: tl.constexpr):
    """The blocks of n that fall to a part of the row: the first, and how many."""
    first = 0
    if SPLIT:
        each = tl.cdiv(n, parts)
        first = part * each
        n = tl.maximum(tl.minimum(each, n - first), 0)
    return first, n


@triton.jit
def merged(p_tops, parts, k):
    """Maximum and Σ e^{(x − max)/T} of the whole row from those of its parts, [parts] each, one after the other."""
    i = tl.arange(0, MAX_PARTS)
    tops = tl.load(p_tops + i, i < parts, other=-INFINITY)
    top = tl.max(tops, 0)
    return top, tl.sum(tl.load(p_tops + parts + i, i < parts, other=0.0) * tl.exp2((tops - finite_or_zero(top)) * k), 0)


@triton.jit
def total(p_sums, parts):
    i = tl.arange(0, MAX_PARTS)
    return tl.sum(tl.load(p_sums + i, i < parts, other=0.0), 0)


def aligned(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x from the 16-byte boundary at or below its first element, for Triton to see that accesses may be wide; and its
    first element and strides from there.
    """
    first = x.data_ptr() % 16 // x.element_size()
    if 0 < first <= x.storage_offset():
        return x.as_strided((1,), (1,), x.storage_offset() - first), (first, *x.stride()[:2])
    return x, (0, *x.stride()[:2])


def in_phase(x: tuple[int, ...], y: tuple[int, ...], B: int, L: int) -> bool:
    """Whether every row of x starts at the same column modulo UNIT as that of y."""
    return all((a - b) % UNIT.value == 0 for a, b, n in zip(x, y, (2, B, L), strict=True) if n > 1)
