"""Softmax statistics: running over the blocks of a row, of the whole row, stored, and merged from parts of a row.

A thread keeps the columns of its group in a running maximum and sum of their own (Milakov & Gimelshein 2018,
arXiv:1805.02867), so that no loop over blocks has a barrier; the groups are merged once, at the end.
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
    total: Any
    """Σ e^{(x − top)/T}."""
    total_1: Any
    """Σ e^{x − top}, for the cross-entropy; otherwise 0."""


class Stats(NamedTuple):
    """Of a row: the first six of :class:`fusedkd.backends.layout.Stat`."""

    student_max: Any
    student_sum: Any
    other_max: Any
    other_sum: Any
    ce_max: Any
    ce_sum: Any


MAX_PARTS = tl.constexpr(64)
"""Of a split row."""


@triton.jit
def nothing(GROUPS: tl.constexpr, A: tl.constexpr):
    zero = tl.zeros([GROUPS], A)
    return Running(top=tl.full([GROUPS], -INFINITY, A), total=zero, total_1=zero)


@triton.jit
def no_stats(A: tl.constexpr):
    zero = tl.full((), 0, A)
    return Stats(student_max=zero, student_sum=zero, other_max=zero, other_sum=zero, ce_max=zero, ce_sum=zero)


@triton.jit
def accumulate(seen, b, k, power, AT_ONE: tl.constexpr):
    """Take a block b [G, n] into `seen`; k = log2(e)/T; AT_ONE: with Σ e^{x − top}."""
    top = tl.maximum(seen.top, tl.max(b, 1))
    base = finite_or_zero(top)
    shift = seen.top - base
    x = b - base[:, None]
    decay = tl.exp2(shift * k)
    e = tl.exp2(x * k)
    total_1 = seen.total_1
    if AT_ONE:
        total_1 = total_1 * exp_at_one(decay, shift, power) + tl.sum(exp_at_one(e, x, power), 1)
    return Running(top=top, total=seen.total * decay + tl.sum(e, 1), total_1=total_1)


@triton.jit
def merge(seen, k):
    """The states of G groups → that of one, [1]."""
    top = tl.max(seen.top, 0, keep_dims=True)
    shift = seen.top - finite_or_zero(top)
    total = tl.sum(seen.total * tl.exp2(shift * k), 0, keep_dims=True)
    total_1 = tl.sum(seen.total_1 * tl.exp2(shift * LOG2E), 0, keep_dims=True)
    return Running(top=top, total=total, total_1=total_1)


@triton.jit
def put(p_stats, stride, stats):
    """Store the statistics, `stride` apart."""
    tl.store(p_stats + STUDENT_MAX * stride, stats.student_max)
    tl.store(p_stats + STUDENT_SUM * stride, stats.student_sum)
    tl.store(p_stats + OTHER_MAX * stride, stats.other_max)
    tl.store(p_stats + OTHER_SUM * stride, stats.other_sum)
    tl.store(p_stats + CE_MAX * stride, stats.ce_max)
    tl.store(p_stats + CE_SUM * stride, stats.ce_sum)


@triton.jit
def take(p_stats):
    return Stats(
        student_max=tl.load(p_stats + STUDENT_MAX),
        student_sum=tl.load(p_stats + STUDENT_SUM),
        other_max=tl.load(p_stats + OTHER_MAX),
        other_sum=tl.load(p_stats + OTHER_SUM),
        ce_max=tl.load(p_stats + CE_MAX),
        ce_sum=tl.load(p_stats + CE_SUM),
    )


@triton.jit
def merged(p_partials, parts, option):
    """The statistics of a row from those of its parts, which `put` left with a stride of `parts`."""
    k_s = exponent_scale(option.temperature)
    k_t = exponent_scale(option.teacher_temperature)
    student_max, student_sum = _merged(p_partials + STUDENT_MAX * parts, p_partials + STUDENT_SUM * parts, parts, k_s)
    other_max, other_sum = _merged(p_partials + OTHER_MAX * parts, p_partials + OTHER_SUM * parts, parts, k_t)
    ce_max, ce_sum = _merged(p_partials + CE_MAX * parts, p_partials + CE_SUM * parts, parts, LOG2E)
    return Stats(
        student_max=student_max,
        student_sum=student_sum,
        other_max=other_max,
        other_sum=other_sum,
        ce_max=ce_max,
        ce_sum=ce_sum,
    )


@triton.jit
def _merged(p_tops, p_sums, parts, k):
    i = tl.arange(0, MAX_PARTS)
    tops = tl.load(p_tops + i, i < parts, other=-INFINITY)
    sums = tl.load(p_sums + i, i < parts, other=0.0)
    top = tl.max(tops, 0)
    return top, tl.sum(sums * tl.exp2((tops - finite_or_zero(top)) * k), 0)


@triton.jit
def total_of_parts(p_sums, parts):
    """One sum over the whole row from those over its parts."""
    i = tl.arange(0, MAX_PARTS)
    return tl.sum(tl.load(p_sums + i, i < parts, other=0.0), 0)
