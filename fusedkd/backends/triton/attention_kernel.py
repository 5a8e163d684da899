"""Attention maps against each other, of which only a tile exists at a time, in registers.

    z, t = Q_s·K_sᵀ, Q_t·K_tᵀ          [queries, keys] of a pair, one head of one batch entry
    forward KL   Σ_j p·φ(δ)             ∂/∂z = (q − p)/T       p, q of the row, δ = log p − log q
    logit MSE    Σ_j (z − a·t)²/L       ∂/∂z = 2(z − a·t)/L
    ∂Q_s = g·K_s,  ∂K_s = gᵀ·Q_s        g = ∂loss/∂z

statistics  a tile of queries per program, over the keys: maximum and sum of both softmaxes of a row, 16 bytes
queries     the same again, now that both sums are known: row losses, free of cancellation, and ∂Q_s
keys        a tile of keys per program, over the queries: ∂K_s

The tiles are made anew each time, as in flash attention (Dao 2023, arXiv:2307.08691), whose division of the work this
is: nobody adds to what another program writes, so results do not depend on the order of programs. The squared error
has no statistics. StreamKL (arXiv:2606.20005) streams the same loss.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.divergences import forward_kl, logit_difference
from fusedkd.backends.triton.kd_row import LOWEST, delta_of, softmaxes
from fusedkd.backends.triton.layout import FORWARD_KL, LOGIT_MSE
from fusedkd.backends.triton.math import INFINITY
from fusedkd.backends.triton.options import exponent_scale, load_coefficients, load_options, load_weights
from fusedkd.backends.triton.row import number
from fusedkd.backends.triton.softmax import Stats, accumulate, nothing

INTEGERS = ["L", "heads", "pairs"]
VECTORS = ["rows", "keys", "real_options", "normalizers", "upstream", "stats", "row_losses"]


class Pair(NamedTuple):
    """One head of one batch entry, and which of its tiles a program has."""

    i: Any
    b: Any
    h: Any
    first: Any
    """Query or key of the tile."""


class Side(NamedTuple):
    """Rows of queries or of keys of a pair."""

    pointer: Any
    stride: Any


@triton.jit
def pair_of(L, heads, BLOCK: tl.constexpr):
    tiles = tl.cdiv(L, BLOCK)
    i = (tl.program_id(0) // tiles).to(tl.int64)
    return Pair(i=i, b=i // heads, h=i % heads, first=tl.program_id(0) % tiles * BLOCK)


@triton.jit
def side_of(x, strides, at, MULTIPLE: tl.constexpr):
    """Of x, [B, heads, L, d]; strides are in units of MULTIPLE, of which Triton sees that accesses may be wide."""
    o = (at.b * number(strides, 0, 1, 0) + at.h * number(strides, 1, 1, 0)) * MULTIPLE
    return Side(pointer=x + o, stride=tl.cast(number(strides, 2, 1, 0), tl.int64) * MULTIPLE)


@triton.jit
def read(side, o, m, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows o, [n, WIDTH], 0 where they do not count and behind the D columns there are."""
    o_d = tl.arange(0, WIDTH)[None, :]
    m_tile = m[:, None]
    if D < WIDTH:
        m_tile = m_tile & (o_d < D)
    return tl.load(side.pointer + o[:, None] * side.stride + o_d, m_tile, other=0.0)


@triton.jit
def write(to, o, m, b, ADD: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows o of a gradient; ADD: to what is there."""
    o_d = tl.arange(0, WIDTH)[None, :]
    p = to + o[:, None] * D + o_d
    m_tile = m[:, None] & (o_d < D)
    if ADD:
        b += tl.load(p, m_tile, other=0.0)
    tl.store(p, b, m_tile)


@triton.jit
def counted(mask, o, at, L):
    """Which of the rows o there are, and are selected by the mask, [B, L] or None."""
    m = o < L
    if mask is not None:
        m = tl.load(mask + at.b * L + o, m, other=0) != 0
    return m


@triton.jit
def product(a, b):
    """In float32, of float32 operands without tf32: their scores are held to what float32 products leave open."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def scores(q, k, seen):
    """Of queries and keys, a tile; −∞ where a key is not seen."""
    return tl.where(seen, product(q, k.T), -INFINITY)


@triton.jit
def visible(o_q, o_k, m_k, CAUSAL: tl.constexpr):
    """Which keys, a row, are seen by which queries, a column."""
    return m_k & (o_k <= o_q) if CAUSAL else m_k


@triton.jit
def statistics_of(stats, o, m, N):
    """Of rows o, as :class:`fusedkd.backends.triton.softmax.Stats` has them; without a softmax, of no use."""
    top = tl.zeros(o.shape, tl.float32)
    rest = top
    other_top = top
    other_rest = top
    if stats is not None:
        top = tl.load(stats + o, m, other=0.0)
        rest = tl.load(stats + N + o, m, other=0.0)
        other_top = tl.load(stats + 2 * N + o, m, other=0.0)
        other_rest = tl.load(stats + 3 * N + o, m, other=0.0)
    return Stats(
        student_max=top, student_rest=rest, other_max=other_top, other_rest=other_rest, ce_max=top, ce_rest=rest
    )


@triton.jit
def factors_of(stats, upstream, o, m, unit):
    """What the slopes of rows o are multiplied by: 0 of rows without a gradient."""
    b = tl.zeros(o.shape, tl.float32) + unit
    if upstream is not None:
        b *= tl.load(upstream + o, m, other=0.0)
    return tl.where(m & (stats.student_rest != -1), b, 0.0)


@triton.jit
def unit_of(real_options, normalizers, L, KERNEL_ID: tl.constexpr, UNIT: tl.constexpr):
    """What slopes are multiplied by, UNIT to 2·UNIT, and their products with queries or keys then: together, what
    `values_and_slopes` leaves out. So g, which is rounded, is ∂loss/∂score times a power of two.
    """
    w = load_weights(real_options, tl.float32)
    common = w.kd_weight / tl.load(normalizers).to(tl.float32)
    if KERNEL_ID == LOGIT_MSE:
        common *= 2.0 / L
        after = tl.sqrt(w.kd_scale)
    else:
        common *= w.kd_scale
        after = 1.0 / load_options(real_options, tl.float32).temperature
    power = tl.exp2(tl.floor(tl.log2(common))) / UNIT
    return common / power, power * after


@triton.jit
def values_and_slopes(z, v, s, root, a, KERNEL_ID: tl.constexpr):
    """Of a tile of scores, −∞ where they are not seen: of the KL, value and q − p; of the squared error, the square and
    the difference that it is of, both times `root`, the student's scale.
    """
    if KERNEL_ID == LOGIT_MSE:
        d = root * logit_difference(z, v, a.a0)
        return d * d, d
    else:
        tl.static_assert(KERNEL_ID == FORWARD_KL)
        x = z - s.base_s
        y = v - s.base_t
        q = tl.exp2(x * s.k_s) * s.r_s
        p = tl.exp2(y * s.k_t) * s.r_t
        return forward_kl(p, q, delta_of(v, z, tl.maximum(y, LOWEST), s))


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def attention_statistics_kernel(
    student_q,  # [B, heads, L, D]
    student_k,
    teacher_q,  # [B, heads, L, TEACHER_D]
    teacher_k,
    rows,  # bool [B, L], or None: the queries that count
    keys,  # likewise
    real_options,  # float64 [OPTIONS]
    stats,  # float32 [4, B·heads·L]: maximum and rest of the student's rows, and of the teacher's
    L,
    heads,
    pairs,
    student_strides,
    key_strides,
    teacher_strides,
    teacher_key_strides,
    CAUSAL: tl.constexpr,
    MULTIPLE: tl.constexpr,
    D: tl.constexpr,
    TEACHER_D: tl.constexpr,
    WIDTH: tl.constexpr,  # D, up to a power of two
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = pair_of(L, heads, ROWS)
    o_q = at.first + tl.arange(0, ROWS)
    m_q = counted(rows, o_q, at, L)
    b_q = read(side_of(student_q, student_strides, at, MULTIPLE), o_q, m_q, D, WIDTH)
    b_tq = read(side_of(teacher_q, teacher_strides, at, MULTIPLE), o_q, m_q, TEACHER_D, TEACHER_WIDTH)
    of_keys = side_of(student_k, key_strides, at, MULTIPLE)
    of_teacher_keys = side_of(teacher_k, teacher_key_strides, at, MULTIPLE)
    option = load_options(real_options, tl.float32)
    k_s = exponent_scale(option.temperature)
    k_t = exponent_scale(option.teacher_temperature)
    of_student = nothing(ROWS, tl.float32)
    of_teacher = nothing(ROWS, tl.float32)
    stop = tl.minimum(at.first + ROWS, L) if CAUSAL else L
    stop = tl.where(tl.max(m_q.to(tl.int32), 0) != 0, stop, 0)
    for start in range(0, stop, COLUMNS):
        o_k = start + tl.arange(0, COLUMNS)
        m_k = counted(keys, o_k, at, L)
        seen = visible(o_q[:, None], o_k[None, :], m_k[None, :], CAUSAL)
        b_k = read(of_keys, o_k, m_k, D, WIDTH)
        of_student = accumulate(of_student, scores(b_q, b_k, seen), k_s, 0, False)
        b_k = read(of_teacher_keys, o_k, m_k, TEACHER_D, TEACHER_WIDTH)
        of_teacher = accumulate(of_teacher, scores(b_tq, b_k, seen), k_t, 0, False)
    N = pairs.to(tl.int64) * L
    o = at.i * L + o_q
    there = o_q < L
    tl.store(stats + o, of_student.top, there)
    tl.store(stats + N + o, of_student.rest, there)
    tl.store(stats + 2 * N + o, of_teacher.top, there)
    tl.store(stats + 3 * N + o, of_teacher.rest, there)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def attention_queries_kernel(
    student_q,
    student_k,
    teacher_q,
    teacher_k,
    rows,
    keys,
    real_options,
    normalizers,  # float64 [2]
    upstream,  # float32 [B·heads·L], or None
    stats,  # or None
    row_losses,  # float32 [B·heads·L]
    d_q,  # float32 [B, heads, L, D], or None
    L,
    heads,
    pairs,
    student_strides,
    key_strides,
    teacher_strides,
    teacher_key_strides,
    KERNEL_ID: tl.constexpr,
    UNIT: tl.constexpr,  # what slopes may be multiplied by, for their type to have room and digits
    CAUSAL: tl.constexpr,
    MULTIPLE: tl.constexpr,
    D: tl.constexpr,
    TEACHER_D: tl.constexpr,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = pair_of(L, heads, ROWS)
    o_q = at.first + tl.arange(0, ROWS)
    m_q = counted(rows, o_q, at, L)
    b_q = read(side_of(student_q, student_strides, at, MULTIPLE), o_q, m_q, D, WIDTH)
    b_tq = read(side_of(teacher_q, teacher_strides, at, MULTIPLE), o_q, m_q, TEACHER_D, TEACHER_WIDTH)
    of_keys = side_of(student_k, key_strides, at, MULTIPLE)
    of_teacher_keys = side_of(teacher_k, teacher_key_strides, at, MULTIPLE)
    a = load_coefficients(real_options, tl.float32)
    kd_scale = load_weights(real_options, tl.float32).kd_scale
    o = at.i * L + o_q
    of_rows = statistics_of(stats, o[:, None], m_q[:, None], pairs.to(tl.int64) * L)
    s = softmaxes(of_rows, load_options(real_options, tl.float32))
    b_loss = tl.zeros([ROWS], tl.float32)
    if d_q is not None:
        unit, after = unit_of(real_options, normalizers, L, KERNEL_ID, UNIT)
        b_factor = factors_of(of_rows, upstream, o[:, None], m_q[:, None], unit)
        b_dq = tl.zeros([ROWS, WIDTH], tl.float32)
    stop = tl.minimum(at.first + ROWS, L) if CAUSAL else L
    stop = tl.where(tl.max(m_q.to(tl.int32), 0) != 0, stop, 0)
    for start in range(0, stop, COLUMNS):
        o_k = start + tl.arange(0, COLUMNS)
        m_k = counted(keys, o_k, at, L)
        seen = visible(o_q[:, None], o_k[None, :], m_k[None, :], CAUSAL)
        b_tk = read(of_teacher_keys, o_k, m_k, TEACHER_D, TEACHER_WIDTH)
        b_v = scores(b_tq, b_tk, seen)
        b_k = read(of_keys, o_k, m_k, D, WIDTH)
        b_z = scores(b_q, b_k, seen)
        b_value, b_w = values_and_slopes(b_z, b_v, s, tl.sqrt(kd_scale), a, KERNEL_ID)
        b_loss += tl.sum(b_value, 1)
        if d_q is not None:
            b_g = tl.where(b_factor == 0, 0.0, b_factor * b_w)  # 0, whatever the scores are
            b_dq += product(b_g.to(b_k.dtype), b_k)
    b_loss *= 1.0 / L if KERNEL_ID == LOGIT_MSE else kd_scale
    tl.store(row_losses + o, tl.where(m_q, b_loss, 0.0), o_q < L)
    if d_q is not None:
        write(d_q, o, o_q < L, b_dq * after, False, D, WIDTH)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def attention_keys_kernel(
    student_q,
    student_k,
    teacher_q,
    teacher_k,
    rows,
    keys,
    real_options,
    normalizers,
    upstream,
    stats,
    d_k,  # float32 [B, heads, L, D]
    L,
    heads,
    pairs,
    student_strides,
    key_strides,
    teacher_strides,
    teacher_key_strides,
    KERNEL_ID: tl.constexpr,
    UNIT: tl.constexpr,
    ADD: tl.constexpr,  # the keys are the queries, whose gradient is there already
    CAUSAL: tl.constexpr,
    MULTIPLE: tl.constexpr,
    D: tl.constexpr,
    TEACHER_D: tl.constexpr,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # of queries, of a step
    COLUMNS: tl.constexpr,  # of keys, of the program
):
    at = pair_of(L, heads, COLUMNS)
    o_k = at.first + tl.arange(0, COLUMNS)
    m_k = counted(keys, o_k, at, L)
    b_k = read(side_of(student_k, key_strides, at, MULTIPLE), o_k, m_k, D, WIDTH)
    b_tk = read(side_of(teacher_k, teacher_key_strides, at, MULTIPLE), o_k, m_k, TEACHER_D, TEACHER_WIDTH)
    of_queries = side_of(student_q, student_strides, at, MULTIPLE)
    of_teacher_queries = side_of(teacher_q, teacher_strides, at, MULTIPLE)
    a = load_coefficients(real_options, tl.float32)
    option = load_options(real_options, tl.float32)
    root = tl.sqrt(load_weights(real_options, tl.float32).kd_scale)
    unit, after = unit_of(real_options, normalizers, L, KERNEL_ID, UNIT)
    b_dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    stop = tl.where(tl.max(m_k.to(tl.int32), 0) != 0, L, 0)
    for start in range(at.first // ROWS * ROWS if CAUSAL else 0, stop, ROWS):
        o_q = start + tl.arange(0, ROWS)
        m_q = counted(rows, o_q, at, L)
        seen = visible(o_q[:, None], o_k[None, :], m_k[None, :], CAUSAL)
        o = at.i * L + o_q
        of_rows = statistics_of(stats, o[:, None], m_q[:, None], pairs.to(tl.int64) * L)
        s = softmaxes(of_rows, option)
        b_factor = factors_of(of_rows, upstream, o[:, None], m_q[:, None], unit)
        b_tq = read(of_teacher_queries, o_q, m_q, TEACHER_D, TEACHER_WIDTH)
        b_v = scores(b_tq, b_tk, seen)
        b_q = read(of_queries, o_q, m_q, D, WIDTH)
        b_z = scores(b_q, b_k, seen)
        _, b_w = values_and_slopes(b_z, b_v, s, root, a, KERNEL_ID)
        b_g = tl.where(b_factor == 0, 0.0, b_factor * b_w)
        b_dk += product(b_g.to(b_q.dtype).T, b_q)
    write(d_k, at.i * L + o_k, o_k < L, b_dk * after, ADD, D, WIDTH)
