"""One row of all M + K layers per program: the losses over several layers (:mod:`fusedkd.reference.layers`).

A row of a layer is one block. It comes from memory once; the loops over pairs of layers find it in L1 or L2. Layers
come as tuples of pointers, from which a loop picks one: the code does not grow with M·K. Products of layers are made in
float64: attention has no scale that would make the rounding of a large ⟨s, t⟩ harmless.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.math import INFINITY
from fusedkd.backends.triton.row import first_column, pick

INTEGERS = ["L", "N", "M", "K", "upstream_stride"]
VECTORS = ["weights", "normalizer", "buckets", "factors", "upstream", "losses"]


@triton.jit
def layer(layers, i):
    """The pointer to layer i."""
    return pick(layers, 0, len(layers), i)


@triton.jit
def row_weight(weights, i_row):
    w = tl.full([], 1.0, tl.float32)
    if weights is not None:
        w = tl.load(weights + i_row)
    return w


@triton.jit
def entry(b, o, i):
    """Element i of a block whose offsets are o."""
    return tl.sum(tl.where(o == i, b, 0.0), 0)


@triton.jit
def products(b_x, bucket, teacher, o_t, m, o_k, K):
    """⟨x, t_k⟩ in float64 of the layers of a bucket, one per entry of o_k."""
    b_d = tl.zeros(o_k.shape, tl.float64)
    b_x = b_x.to(tl.float64)
    for k in range(K):
        if tl.load(bucket + k) != 0:
            b_t = tl.load(layer(teacher, k) + o_t, m, other=0.0).to(tl.float64)
            b_d = tl.where(o_k == k, tl.sum(b_x * b_t, 0), b_d)
    return b_d


@triton.jit
def mixture(b, factors, bucket, teacher, o_t, m, o_k, K, A: tl.constexpr):
    """b + Σ_k factor_k·t_k over a bucket."""
    for k in range(K):
        if tl.load(bucket + k) != 0:
            b += entry(factors, o_k, k) * tl.load(layer(teacher, k) + o_t, m, other=0.0).to(A)
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
    M,
    K,
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
    m = o < tl.where(w != 0, H, 0)  # rows that are not selected are not read
    o_s = first_column(0, student_b, student_l, i_row, L) + o
    o_t = first_column(0, teacher_b, teacher_l, i_row, L) + o
    scale = tl.where(w != 0, w / tl.load(normalizer) * up, 0.0).to(A)
    per_column = tl.full([], 2.0, A) / H

    loss = tl.zeros([], A)
    for j in range(M):
        b_s = tl.load(layer(student, j) + o_s, m, other=0.0).to(A)  # [BLOCK]
        bucket = buckets + j * K
        b_in = tl.load(bucket + o_k, o_k < K, other=0.0) != 0  # [LAYERS]
        b_d = tl.where(b_in, products(b_s, bucket, teacher, o_t, m, o_k, K), -INFINITY)
        b_a = tl.exp(b_d - tl.max(b_d, 0))  # α, in float64: what its sum is away from 1 would be a part of r
        b_a = b_a / tl.sum(b_a, 0)
        b_r = mixture(b_s, (-b_a).to(A), bucket, teacher, o_t, m, o_k, K, A)
        loss += tl.sum(b_r * b_r, 0)
        if gradient is not None or sums is not None:
            b_u = products(b_r, bucket, teacher, o_t, m, o_k, K)
            b_u -= tl.sum(b_a * b_u, 0)
            b_e = (-2.0 * b_a * b_u / H).to(A)  # 0 outside of the bucket
            at = (j * N + i_row) * H + o
            if gradient is not None:
                b_g = scale * mixture(per_column * b_r, b_e, bucket, teacher, o_t, m, o_k, K, A)
                tl.store(gradient + at, b_g, m_row)
            if sums is not None:
                for k in range(K):
                    to = sums + (k * N + i_row) * H + o  # of this program alone
                    b_g = scale * (entry(b_e, o_k, k) * b_s - entry(b_a.to(A), o_k, k) * per_column * b_r)
                    b_g = tl.where(tl.load(bucket + k) != 0, b_g, 0.0)
                    tl.store(to, tl.load(to, o < tl.where(j > 0, H, 0), other=0.0) + b_g, m_row)
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
    M,
    K,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = losses.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)
    w = row_weight(weights, i_row)
    o = tl.arange(0, BLOCK)
    m = o < tl.where(w != 0, H, 0)
    o_s = first_column(0, student_b, student_l, i_row, L) + o
    o_t = first_column(0, teacher_b, teacher_l, i_row, L) + o
    for j in range(M):
        b_s = tl.load(layer(student, j) + o_s, m, other=0.0).to(A)
        for k in range(K):
            b = b_s - tl.load(layer(teacher, k) + o_t, m, other=0.0).to(A)
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
    M,
    K,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    w = row_weight(weights, i_row)
    o = tl.arange(0, BLOCK)
    m_row = o < H
    m = o < tl.where(w != 0, H, 0)
    o_s = first_column(0, student_b, student_l, i_row, L) + o
    o_t = first_column(0, teacher_b, teacher_l, i_row, L) + o
    scale = w / tl.load(normalizer) * 2.0 / H
    for j in range(M):
        b_s = tl.load(layer(student, j) + o_s, m, other=0.0).to(A)
        b_g = tl.zeros([BLOCK], A)
        for k in range(K):
            f = (tl.load(factors + j * K + k) * scale).to(A)
            b_g += f * (b_s - tl.load(layer(teacher, k) + o_t, m, other=0.0).to(A))
        tl.store(gradient + (j * N + i_row) * H + o, tl.where(m, b_g, 0.0), m_row)
