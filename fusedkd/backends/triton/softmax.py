"""Softmax statistics: running over the blocks of a row, of the whole row, stored, and merged from parts of a row.

A thread keeps the columns of its group in a running maximum and sum of their own (Milakov & Gimelshein 2018,
arXiv:1805.02867), so that no loop over blocks has a barrier; the groups are merged once, at the end.

A sum is kept less 1, its `rest`: the columns that equal the maximum are counted, the others summed. In a sure row,
whose maximum is far above the others, a float32 sum has a 1 and no digits left for the others, which are all its loss.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import (
    CE_MAX,
    CE_SUM,
    OTHER_MAX,
    OTHER_SUM,
    STUDENT_MAX,
    STUDENT_SUM,
)
from fusedkd.backends.triton.math import INFINITY, LOG2E, exp_at_one, finite_or_zero
from fusedkd.backends.triton.options import exponent_scale


class Running(NamedTuple):
    """Of the columns seen so far, per group of columns, [G]."""

    top: Any
    """Maximum; −∞ of none."""
    rest: Any
    """Σ e^{(x − top)/T} − 1; −1 of no columns."""
    rest_1: Any
    """Σ e^{x − top} − 1, for the cross-entropy."""


class Stats(NamedTuple):
    """Of a row: the first six of :class:`fusedkd.backends.layout.Stat`, the sums less 1."""

    student_max: Any
    student_rest: Any
    other_max: Any
    other_rest: Any
    ce_max: Any
    ce_rest: Any


MAX_PARTS = tl.constexpr(64)
"""Of a split row."""


@triton.jit
def nothing(GROUPS: tl.constexpr, A: tl.constexpr):
    none = tl.full([GROUPS], -1, A)
    return Running(top=tl.full([GROUPS], -INFINITY, A), rest=none, rest_1=none)


@triton.jit
def no_stats(A: tl.constexpr):
    zero = tl.full((), 0, A)
    return Stats(student_max=zero, student_rest=zero, other_max=zero, other_rest=zero, ce_max=zero, ce_rest=zero)


@triton.jit
def accumulate(seen, b, k, power, AT_ONE: tl.constexpr, FIRST: tl.constexpr = False):
    """Take a block b [G, n] into `seen`; k = log2(e)/T; AT_ONE: with Σ e^{x − top}; FIRST: `seen` is `nothing`."""
    top = tl.max(b, 1) if FIRST else tl.maximum(seen.top, tl.max(b, 1))
    base = finite_or_zero(top)
    x = b - base[:, None]
    at_top = x == 0
    shift = seen.top - base
    rises = shift != 0
    more = tl.sum(tl.where(at_top, 1.0, 0.0), 1) - (1.0 if FIRST else tl.where(rises, 1.0, 0.0))
    x = tl.where(at_top, -INFINITY, x)
    e = tl.exp2(x * k)
    decay = tl.exp2(shift * k)
    rest_1 = seen.rest_1
    if AT_ONE:
        decay_1 = exp_at_one(decay, shift, power)
        rest_1 = tl.sum(exp_at_one(e, x, power), 1) + more
        if not FIRST:
            rest_1 += seen.rest_1 * decay_1 + tl.where(rises, decay_1, 0.0)
    rest = tl.sum(e, 1) + more
    if not FIRST:
        rest += seen.rest * decay + tl.where(rises, decay, 0.0)
    return Running(top=top, rest=rest, rest_1=rest_1)


@triton.jit
def merge(seen, k):
    """The states of G groups → that of one, [1]."""
    top, rest = merge_rests(seen.top, seen.rest, k)
    _, rest_1 = merge_rests(seen.top, seen.rest_1, LOG2E)
    return Running(top=top, rest=rest, rest_1=rest_1)


@triton.jit
def merge_rests(tops, rests, k):
    """Maximum and rest of a whole, [1], from those of its parts, [G]."""
    top = tl.max(tops, 0, keep_dims=True)
    base = finite_or_zero(top)
    at_top = tops == base
    n = tl.sum(tl.where(at_top, 1.0, 0.0).to(rests.dtype), 0, keep_dims=True)
    rest = tl.sum(tl.where(at_top, rests, (rests + 1.0) * tl.exp2((tops - base) * k)), 0, keep_dims=True)
    return top, rest + (n - 1.0)


@triton.jit
def join(top_a, rest_a, top_b, rest_b, k):
    """Maximum and rest of two sets of columns."""
    top = tl.maximum(top_a, top_b)
    base = finite_or_zero(top)
    a = tl.where(top_a == base, rest_a + 1.0, (rest_a + 1.0) * tl.exp2((top_a - base) * k))
    b = tl.where(top_b == base, rest_b + 1.0, (rest_b + 1.0) * tl.exp2((top_b - base) * k))
    # The one with the maximum keeps its rest, and the other is added to it. If neither has it, both are empty, or one
    # is NaN.
    rest = tl.where(top_a == base, rest_a + b, tl.where(top_b == base, rest_b + a, a + b - 1.0))
    return top, rest


@triton.jit
def rest_of(b, k):
    """Maximum and rest of a few columns, [n]."""
    top = tl.max(b, 0)
    base = finite_or_zero(top)
    at_top = b == base
    n = tl.sum(tl.where(at_top, 1.0, 0.0).to(b.dtype), 0)
    return top, tl.sum(tl.exp2(tl.where(at_top, -INFINITY, b - base) * k), 0) + (n - 1.0)


@triton.jit
def put(p_stats, stride, stats):
    """Store the statistics, `stride` apart."""
    tl.store(p_stats + STUDENT_MAX * stride, stats.student_max)
    tl.store(p_stats + STUDENT_SUM * stride, stats.student_rest)
    tl.store(p_stats + OTHER_MAX * stride, stats.other_max)
    tl.store(p_stats + OTHER_SUM * stride, stats.other_rest)
    tl.store(p_stats + CE_MAX * stride, stats.ce_max)
    tl.store(p_stats + CE_SUM * stride, stats.ce_rest)


@triton.jit
def take(p_stats):
    return Stats(
        student_max=tl.load(p_stats + STUDENT_MAX),
        student_rest=tl.load(p_stats + STUDENT_SUM),
        other_max=tl.load(p_stats + OTHER_MAX),
        other_rest=tl.load(p_stats + OTHER_SUM),
        ce_max=tl.load(p_stats + CE_MAX),
        ce_rest=tl.load(p_stats + CE_SUM),
    )


@triton.jit
def merged(p_partials, parts, option):
    """The statistics of a row from those of its parts, which `put` left with a stride of `parts`."""
    k_s = exponent_scale(option.temperature)
    k_t = exponent_scale(option.teacher_temperature)
    student_max, student_rest = _merged(p_partials + STUDENT_MAX * parts, p_partials + STUDENT_SUM * parts, parts, k_s)
    other_max, other_rest = _merged(p_partials + OTHER_MAX * parts, p_partials + OTHER_SUM * parts, parts, k_t)
    ce_max, ce_rest = _merged(p_partials + CE_MAX * parts, p_partials + CE_SUM * parts, parts, LOG2E)
    return Stats(
        student_max=student_max,
        student_rest=student_rest,
        other_max=other_max,
        other_rest=other_rest,
        ce_max=ce_max,
        ce_rest=ce_rest,
    )


@triton.jit
def _merged(p_tops, p_rests, parts, k):
    i = tl.arange(0, MAX_PARTS)
    tops = tl.load(p_tops + i, i < parts, other=-INFINITY)
    rests = tl.load(p_rests + i, i < parts, other=-1.0)
    top, rest = merge_rests(tops, rests, k)
    return tl.max(top), tl.sum(rest)


@triton.jit
def total_of_parts(p_sums, parts):
    """One sum over the whole row from those over its parts."""
    i = tl.arange(0, MAX_PARTS)
    return tl.sum(tl.load(p_sums + i, i < parts, other=0.0), 0)
