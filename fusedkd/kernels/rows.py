"""Walking rows of logits that start anywhere: which columns a block touches, their softmax statistics, and the aligned
addresses that both are counted from. Odd vocabularies (30522, 50257, 119547) get the 16-byte accesses of even ones.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from fusedkd.kernels.math import INFINITY, LOG2E, cap_and_scale, exp_at_one, finite_or_zero

UNIT = tl.constexpr(16)
"""Columns. Block loops start on a multiple of it, counted from a 16-byte aligned address, wherever the row starts."""


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
