"""Straight-through Gumbel-softmax, one program per row: the choice with the statistics of the row, and the gradient.

A step of COUNTERS counters of the noise has four words of each, and so four blocks of columns [COUNTERS]: `columns` of
a word. Maximum, its place and the sum of exponentials are kept per lane; they are merged once, after the loop. The
noise is `fusedkd.reference.gumbel.noise` to the last bit, for which these kernels are compiled without fused
multiply-adds.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import GUMBEL_STATS, NOISY_MAX, NOISY_SUM
from fusedkd.backends.triton.math import INFINITY, LOG2E, finite_or_zero
from fusedkd.reference import gumbel

GROUP = tl.constexpr(gumbel.GROUP)
LN2 = tl.constexpr(gumbel.LN2)
ROOT = tl.constexpr(gumbel.ROOT)
R0, R1, R2, R3, R4, R5, R6, R7 = (tl.constexpr(c) for c in gumbel.LOG_SERIES)


@triton.jit(
    do_not_specialize=["V", "stride", "first_row"],
    do_not_specialize_on_alignment=["logits", "ids", "stats", "seed", "temperature"],
)
def gumbel_forward_kernel(
    logits,  # [N, V]
    ids,  # [N]
    stats,  # [N, GUMBEL_STATS]
    seed,  # int64 []
    temperature,  # float64 []
    V,
    stride: tl.int64,
    first_row: tl.int64,
    COUNTERS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    A: tl.constexpr = logits.dtype.element_ty
    row = (first_row + i_row).to(tl.int32)
    key = tl.load(seed)
    scale = (1.0 / tl.load(temperature) * LOG2E).to(A)
    p_row = logits + i_row * stride
    b_best = tl.full([COUNTERS], -INFINITY, A)
    b_place = tl.zeros([COUNTERS], tl.int32)
    b_sum = tl.zeros([COUNTERS], A)
    b_max = tl.full([COUNTERS], -INFINITY, A)
    for start in range(0, V, 4 * COUNTERS):
        b_counter = start // 4 + tl.arange(0, COUNTERS)
        k0, k1, k2, k3 = tl.philox(key, b_counter, row, 0, 0)
        b_0, o_0, _ = noisy(p_row, k0, b_counter, 0, V)
        b_1, o_1, _ = noisy(p_row, k1, b_counter, 1, V)
        b_2, o_2, _ = noisy(p_row, k2, b_counter, 2, V)
        b_3, o_3, _ = noisy(p_row, k3, b_counter, 3, V)
        b_best, b_place = higher(b_best, b_place, b_0, o_0)
        b_best, b_place = higher(b_best, b_place, b_1, o_1)
        b_best, b_place = higher(b_best, b_place, b_2, o_2)
        b_best, b_place = higher(b_best, b_place, b_3, o_3)
        from_ = finite_or_zero(b_best)
        b_sum *= tl.exp2((b_max - from_) * scale)
        b_sum += tl.exp2((b_0 - from_) * scale) + tl.exp2((b_1 - from_) * scale)
        b_sum += tl.exp2((b_2 - from_) * scale) + tl.exp2((b_3 - from_) * scale)
        b_max = b_best
    top = tl.max(b_best, 0)
    total = tl.sum(b_sum * tl.exp2((b_best - finite_or_zero(top)) * scale), 0)
    place = tl.min(tl.where(b_best == top, b_place, V), 0)
    if total != total:  # a NaN is higher than all, the first of them; there is none if it is from +∞ − ∞
        first = V
        for start in range(0, V, 4 * COUNTERS):
            o = start + tl.arange(0, 4 * COUNTERS)
            b_z = tl.load(p_row + o, o < V, other=0.0)
            first = tl.minimum(first, tl.min(tl.where(b_z != b_z, o, V), 0))
        place = tl.where(first < V, first, place)
    tl.store(ids + i_row, place.to(tl.int64))
    tl.store(stats + i_row * GUMBEL_STATS + NOISY_MAX, top)
    tl.store(stats + i_row * GUMBEL_STATS + NOISY_SUM, total)


@triton.jit(
    do_not_specialize=["V", "stride", "slopes_stride", "first_row"],
    do_not_specialize_on_alignment=["logits", "slopes", "ids", "stats", "seed", "temperature", "scale"],
)
def gumbel_backward_kernel(
    logits,  # [N, V]: the gradient goes over them
    slopes,  # [N, V]
    ids,  # [N]
    stats,  # [N, GUMBEL_STATS]
    seed,  # int64 []
    temperature,  # float64 []
    scale,  # float64 []
    V,
    stride: tl.int64,
    slopes_stride: tl.int64,
    first_row: tl.int64,
    COUNTERS: tl.constexpr,
):
    """Pass 1 leaves y where the logits were, and pass 2 finds it in the cache. Slopes are seen from that of the choice,
    so that nothing is lost of a sure row, where Σ y·r is nearly that one.
    """
    i_row = tl.program_id(0).to(tl.int64)
    A: tl.constexpr = logits.dtype.element_ty
    row = (first_row + i_row).to(tl.int32)
    key = tl.load(seed)
    c = (1.0 / tl.load(temperature) * LOG2E).to(A)
    p_row = logits + i_row * stride
    p_slopes = slopes + i_row * slopes_stride
    top = tl.load(stats + i_row * GUMBEL_STATS + NOISY_MAX)
    share = 1.0 / tl.load(stats + i_row * GUMBEL_STATS + NOISY_SUM)
    chosen = tl.load(p_slopes + tl.load(ids + i_row))
    b_mean = tl.zeros([COUNTERS], A)
    for start in range(0, V, 4 * COUNTERS):
        b_counter = start // 4 + tl.arange(0, COUNTERS)
        k0, k1, k2, k3 = tl.philox(key, b_counter, row, 0, 0)
        b_mean += relax(p_row, p_slopes, k0, b_counter, 0, V, top, share, c, chosen)
        b_mean += relax(p_row, p_slopes, k1, b_counter, 1, V, top, share, c, chosen)
        b_mean += relax(p_row, p_slopes, k2, b_counter, 2, V, top, share, c, chosen)
        b_mean += relax(p_row, p_slopes, k3, b_counter, 3, V, top, share, c, chosen)
    mean = tl.sum(b_mean, 0)
    b_scale = tl.load(scale).to(A)
    tl.debug_barrier()  # other threads than wrote y read it
    for start in range(0, V, 4 * COUNTERS):
        o = start + tl.arange(0, 4 * COUNTERS)
        m = o < V
        b_y = tl.load(p_row + o, m, other=0.0)
        b_r = tl.load(p_slopes + o, m, other=0.0)
        tl.store(p_row + o, b_y * ((b_r - chosen) - mean) * b_scale, m)


@triton.jit
def relax(p_row, p_slopes, words, b_counter, WORD: tl.constexpr, V, top, share, c, chosen):
    """y of a block goes over its logits; y·(r − r_c) is returned."""
    b_x, o, m = noisy(p_row, words, b_counter, WORD, V)
    b_y = tl.exp2((b_x - top) * c) * share
    b_r = tl.load(p_slopes + o, m, other=0.0)
    tl.store(p_row + o, b_y, m)
    return tl.where(m, b_y * (b_r - chosen), 0.0)


@triton.jit
def noisy(p_row, words, b_counter, WORD: tl.constexpr, V):
    """Logits with noise of the columns that have one word of each counter, −∞ beside the row; the columns, and which of
    them are in the row.
    """
    o = b_counter // GROUP * (4 * GROUP) + WORD * GROUP + b_counter % GROUP
    m = o < V
    b_z = tl.load(p_row + o, m, other=-INFINITY)
    return b_z + noise(words).to(b_z.dtype), o, m


@triton.jit
def higher(b_best, b_place, b_x, o):
    """The higher of two per lane, and its column; of equals the first."""
    better = b_x > b_best
    return tl.where(better, b_x, b_best), tl.where(better, o, b_place)


@triton.jit
def noise(words):
    """−log(−log u), u = (k + ½)·2⁻³² for words k; near 1, u lacks the digits that 1 − u has."""
    b_e = -log_of(uniform(words), -uniform(words ^ 0xFFFFFFFF))
    return -log_of(b_e, b_e - 1.0)


@triton.jit
def uniform(words):
    return words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def log_of(u, less_one):
    """log u in float32, given u − 1, which is used for √½ ≤ u < √2: as in the reference, operation by operation."""
    above = u.to(tl.int32, bitcast=True) - ROOT
    exponent = above >> 23
    of_u = ((above & 0x7FFFFF) + ROOT).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(exponent == 0, less_one, of_u)
    square = f * f
    low = (f * R1 + R0) + square * (f * R3 + R2)
    high = (f * R5 + R4) + square * (f * R7 + R6)
    return exponent.to(tl.float32) * LN2 + (f + square * (low + square * square * high))
