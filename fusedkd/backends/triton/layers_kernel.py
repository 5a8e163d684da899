"""One row of all M + K layers per program: the losses over several layers (:mod:`fusedkd.reference.layers`).

A row of a layer is one block. It comes from memory once; the loops over pairs of layers find it in L1 or L2. Layers come
as tuples of pointers, from which a loop picks one: the code does not grow with M·K. Sums that an exponential or a
difference of sums follows are made in float64: attention has no scale that would make the rounding of a large ⟨s, t⟩
harmless.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.math import INFINITY
from fusedkd.backends.triton.row import first_column

INTEGERS = ["L", "N", "upstream_stride"]
VECTORS = ["weights", "normalizer", "buckets", "factors", "upstream", "losses"]


@triton.jit
def layer(layers, i, COUNT: tl.constexpr):
    """The pointer to layer i."""
    p = layers[0]
    for j in tl.static_range(1, COUNT):
        p = tl.where(i == j, layers[j], p)
    return p


@triton.jit
def row_weight(weights, i_row):
    w = 1.0
    if weights is not None:
        w = tl.load(weights + i_row)
    return w


@triton.jit
def entry(b, o, i):
    """Element i of a block whose offsets are o."""
    return tl.sum(tl.where(o == i, b, 0.0), 0)


@triton.jit
def products(b_x, teacher, o_t, m, o_k, K: tl.constexpr, A: tl.constexpr):
    """⟨x, t_k⟩ in float64, one per entry of o_k."""
    b_d = tl.zeros(o_k.shape, tl.float64)
    for k in range(K):
        b_t = tl.load(layer(teacher, k, K) + o_t, m, other=0.0).to(A)
        b_d = tl.where(o_k == k, tl.sum((b_x * b_t).to(tl.float64), 0), b_d)
    return b_d


@triton.jit
def mixture(b, factors, teacher, o_t, m, o_k, K: tl.constexpr, A: tl.constexpr):
    """b + Σ_k factor_k·t_k."""
    for k in range(K):
        b_t = tl.load(layer(teacher, k, K) + o_t, m, other=0.0).to(A)
        b += entry(factors, o_k, k) * b_t
    return b


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def layer_attention_kernel(
    student,  # M pointers to [B, L, H]
    teacher,  # K
    weights,  # [N] float32, or None
    normalizer,  # [] float64
    buckets,  # [M, K] float64
    upstream,  # [] or [N], or None
    losses,  # A, [N]
    gradient,  # [M, N, H] or None
    sums,  # A, [K, N, H] or None: the teacher's gradient
    N: tl.int64,
    L,
    H,
    student_b: tl.int64,
    student_l: tl.int64,
    teacher_b: tl.int64,
    teacher_l: tl.int64,
    upstream_stride,
    SKIP_IF_ONE: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    LAYERS: tl.constexpr,  # K, up to a power of two
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = losses.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)
    up = 1.0
    if upstream is not None:
        up = tl.load(upstream + i_row * upstream_stride)
        if SKIP_IF_ONE and up == 1:
            return
    w = row_weight(weights, i_row)
    o = tl.arange(0, BLOCK)
    o_k = tl.arange(0, LAYERS)
    m_row = o < H
    m = m_row & (w != 0)  # rows that are not selected are not read
    o_s = first_column(0, student_b, student_l, i_row, L) + o
    o_t = first_column(0, teacher_b, teacher_l, i_row, L) + o
    scale = tl.where(w != 0, w / tl.load(normalizer) * up, 0.0).to(A)
    per_column = (2.0 / H).to(A)

    loss = tl.zeros([], A)
    for j in range(M):
        b_s = tl.load(layer(student, j, M) + o_s, m, other=0.0).to(A)  # [BLOCK]
        b_in = tl.load(buckets + j * K + o_k, o_k < K, other=0.0) != 0  # [LAYERS]
        b_d = tl.where(b_in, products(b_s, teacher, o_t, m, o_k, K, A), -INFINITY)
        b_a = tl.exp((b_d - tl.max(b_d, 0)).to(A))
        b_a = b_a / tl.sum(b_a, 0)
        b_r = mixture(b_s, -b_a, teacher, o_t, m, o_k, K, A)
        loss += tl.sum(b_r * b_r, 0)
        if gradient is not None or sums is not None:
            b_u = products(b_r, teacher, o_t, m, o_k, K, A)
            b_u = tl.where(b_in, b_u - tl.sum(tl.where(b_in, b_a.to(tl.float64) * b_u, 0.0), 0), 0.0)
            b_e = -per_column * b_a * b_u.to(A)
            at = (j * N + i_row) * H + o
            if gradient is not None:
                b_g = scale * mixture(per_column * b_r, b_e, teacher, o_t, m, o_k, K, A)
                tl.store(gradient + at, b_g, m_row)
            if sums is not None:
                for k in range(K):
                    to = sums + (k * N + i_row) * H + o  # of this program alone
                    b_g = scale * (entry(b_e, o_k, k) * b_s - entry(b_a, o_k, k) * per_column * b_r)
                    tl.store(to, tl.load(to, m_row & (j > 0), other=0.0) + b_g, m_row)
    tl.store(losses + i_row, tl.where(w != 0, w * loss / H, 0.0))


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def layer_distances_kernel(
    student,  # M pointers to [B, L, H]
    teacher,  # K
    weights,  # [N] float32, or None
    losses,  # A, [N, M, K]: the weighted mean squared differences of a row
    L,
    H,
    student_b: tl.int64,
    student_l: tl.int64,
    teacher_b: tl.int64,
    teacher_l: tl.int64,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = losses.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)
    w = row_weight(weights, i_row)
    o = tl.arange(0, BLOCK)
    m = (o < H) & (w != 0)
    o_s = first_column(0, student_b, student_l, i_row, L) + o
    o_t = first_column(0, teacher_b, teacher_l, i_row, L) + o
    for j in range(M):
        b_s = tl.load(layer(student, j, M) + o_s, m, other=0.0).to(A)
        for k in range(K):
            b = b_s - tl.load(layer(teacher, k, K) + o_t, m, other=0.0).to(A)
            tl.store(losses + (i_row * M + j) * K + k, tl.where(w != 0, w * tl.sum(b * b, 0) / H, 0.0))


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def layer_distances_backward_kernel(
    student,  # M pointers to [B, L, H]
    teacher,  # K
    weights,  # [N] float32, or None
    normalizer,  # [] float64
    factors,  # [M, K] float64: the upstream
    gradient,  # [M, N, H]
    N: tl.int64,
    L,
    H,
    student_b: tl.int64,
    student_l: tl.int64,
    teacher_b: tl.int64,
    teacher_l: tl.int64,
    M: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    w = row_weight(weights, i_row)
    o = tl.arange(0, BLOCK)
    m_row = o < H
    m = m_row & (w != 0)
    o_s = first_column(0, student_b, student_l, i_row, L) + o
    o_t = first_column(0, teacher_b, teacher_l, i_row, L) + o
    scale = w / tl.load(normalizer) * (2.0 / H)
    for j in range(M):
        b_s = tl.load(layer(student, j, M) + o_s, m, other=0.0).to(A)
        b_g = tl.zeros([BLOCK], A)
        for k in range(K):
            f = (tl.load(factors + j * K + k) * scale).to(A)
            b_g += f * (b_s - tl.load(layer(teacher, k, K) + o_t, m, other=0.0).to(A))
        tl.store(gradient + (j * N + i_row) * H + o, tl.where(m, b_g, 0.0), m_row)
