"""Knowledge distillation from logits: forward KL and cross-entropy, values and gradient, in two passes over each row.

Row i has student logits z [V] and teacher logits v [C], C ≤ V: the KD term lives on the first C columns, CE on all V.

    q = softmax(z/T_s), p = softmax(v/T_t), q₁ = softmax(z)                     δ = log p − log q
    D = Σ p·δ = Σ [q − p + p·δ] = Σ p·δ²·φ(δ),  φ = (e^−δ − 1 + δ)/δ²           CE = log Σ e^z − z_y  (and smoothing)
    ∂/∂z = A_kd·(q − p) + A_ce·(q₁ − (1 − ε)·1_y − ε/V)                         A: weight · scale · upstream / rows

Every term of the middle sums is ≥ 0, so that D keeps its relative precision down to D = 0, and δ is never a difference
of two log-sum-exps: δ = c_s·((v − z) − (max v − max z)) + (c_t − c_s)·(v − max v) − log(l_t/l_s), c = 1/T, where
sides that are far apart are first reduced by their maxima. The logarithm needs no care: what is the same for all
columns moves D in second order only, since Σ(p − q) = 0.

Pass 1 takes the maxima and sums (max, l = Σ e^{(x − max)/T}) of both sides; pass 2 runs backwards over the row, while
its end is still in the L2 cache, and takes D and the gradient in one sweep. Bytes per logit in 16 bit: 2 + 2 in pass 1,
2 + 2 + 2 in pass 2: 10, of which the four reads of pass 2 come from L2 while all resident row pairs fit there (V up to
about 32 K). A gradient from stored statistics is pass 2 alone: 6.

One program per row, no barrier inside a loop: in pass 1 each group of columns that one thread holds has a running
maximum of its own (Milakov & Gimelshein 2018, arXiv:1805.02867; the groups are merged once). The reversed second pass
is that of llm.c's fused_classifier, the loss with its gradient in the forward call that of Liger (arXiv:2410.10989).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.kernels.math import (
    INFINITY,
    LOG2E,
    divergence_factor,
    exp_at_one,
    finite_or_zero,
    log,
    reciprocal_or_zero,
)
from fusedkd.kernels.rows import UNIT, accumulate, columns, logits, merge

INTEGERS = ["ignore_index", "upstream_stride", "L", "V", "C", "student_o", "student_b", "student_l"]
INTEGERS += ["teacher_o", "teacher_b", "teacher_l", "gradient_o", "gradient_b", "gradient_l"]


@triton.jit(do_not_specialize=INTEGERS)
def kd_kernel(
    # Inputs: [B, L, V], [B, L, C], [N] or None, [N]; float64 [10] and [2]; A, [N] or [] or None (1)
    student,
    teacher,
    labels,
    weights,
    options,
    normalizers,
    upstream,
    # Outputs: A, [2, N], or None where the statistics are already known; A, [N, 6]; [B, L, V] or None, may be `student`
    rows,
    stats,
    gradient,
    # Sizes; first element and strides, in elements. Never specialised: one binary serves every shape
    ignore_index: tl.int64,
    upstream_stride,
    L,
    V,
    C,
    student_o,
    student_b: tl.int64,
    student_l: tl.int64,
    teacher_o,
    teacher_b: tl.int64,
    teacher_l: tl.int64,
    gradient_o,
    gradient_b: tl.int64,
    gradient_l: tl.int64,
    # Structure
    TRANSFORM: tl.constexpr,  # soft-cap or scale the logits
    SURPLUS: tl.constexpr,  # C < V
    RESCALE: tl.constexpr,  # the gradient is right if the upstream is 1
    TEACHER_IN_PHASE: tl.constexpr,  # rows start at the same column modulo UNIT as the student's
    GRADIENT_IN_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    FORWARD: tl.constexpr = rows is not None
    LABELS: tl.constexpr = labels is not None
    row = tl.program_id(0)

    up = 1.0
    if upstream is not None:
        up = tl.load(upstream + row.to(tl.int64) * upstream_stride)
        if RESCALE and up == 1:
            return

    # Options. k turns a difference of logits into an exponent of 2.
    temperature = tl.load(options).to(A)
    c_s = 1.0 / temperature
    c_t = 1.0 / tl.load(options + 1).to(A)
    k_s = c_s * LOG2E
    k_t = c_t * LOG2E
    power = tl.where((temperature == 1) | (temperature == 2) | (temperature == 4), temperature, 0).to(tl.int32)
    kd_scale = tl.load(options + 2).to(A)
    epsilon = tl.load(options + 5).to(A)
    cap_s = tl.load(options + 6).to(A)
    scale_s = tl.load(options + 7).to(A)
    cap_t = tl.load(options + 8).to(A)
    scale_t = tl.load(options + 9).to(A)

    # Which terms the row has. A side that no term needs is not read: its logits count as −∞.
    w = tl.load(weights + row).to(A)
    has_kd = w != 0
    y = tl.full((), 0, tl.int64)
    counted = has_kd & False
    legal = counted
    if LABELS:
        y = tl.load(labels + row)
        counted = y != ignore_index
        legal = (y >= 0) & (y < V)
    has_ce = counted & legal
    active = has_kd | has_ce

    # The row, as seen from the aligned address below it
    i_b = (row // L).to(tl.int64)
    i_l = (row % L).to(tl.int64)
    o_student = student_o + i_b * student_b + i_l * student_l
    o_teacher = teacher_o + i_b * teacher_b + i_l * teacher_l
    phase = (o_student % UNIT).to(tl.int32)
    p_student = student + o_student // UNIT * UNIT
    p_teacher = teacher + (o_teacher // UNIT * UNIT if TEACHER_IN_PHASE else o_teacher - phase)
    if gradient is not None:
        o_gradient = gradient_o + i_b * gradient_b + i_l * gradient_l
        p_gradient = gradient + (o_gradient // UNIT * UNIT if GRADIENT_IN_PHASE else o_gradient - phase)
    head = (phase + UNIT - 1) // UNIT * UNIT
    body = (phase + C) // UNIT * UNIT
    stop_common = phase + C
    stop_v = tl.where(has_kd, stop_common, 0)
    stop_z = tl.where(active, phase + V, 0)
    body_v = tl.where(has_kd, body, 0)
    body_z = tl.where(active, body, 0)
    n_body = tl.cdiv(tl.maximum(body - head, 0), BLOCK)
    n_ends = tl.cdiv(head + phase + V - body, BLOCK // 8)

    if FORWARD:
        # Pass 1: kept in L2 for pass 2
        top_s = tl.full([BLOCK // GROUP], -INFINITY, A)
        top_t = top_s
        sum_s = tl.zeros([BLOCK // GROUP], A)
        sum_t = sum_s
        sum_1 = sum_s
        top_x = tl.full([1], -INFINITY, A)  # the surplus columns, for CE
        sum_x = tl.zeros([1], A)
        for ENDS in tl.static_range(2):
            n_blocks = tl.where(active, n_ends if ENDS else n_body, 0)
            for i_block in range(n_blocks):
                o, m = columns(i_block, phase, head, body, V, ENDS, BLOCK, GROUP)
                b_v = logits(
                    p_teacher, o, m & (o < (stop_v if ENDS else body_v)), cap_t, scale_t, A, TRANSFORM, "evict_last"
                )[0]
                b_z = logits(
                    p_student, o, m & (o < (stop_z if ENDS else body_z)), cap_s, scale_s, A, TRANSFORM, "evict_last"
                )[0]
                top_t, sum_t = accumulate(top_t, sum_t, sum_t, b_v, k_t, power, False)[:2]
                if SURPLUS and ENDS:
                    if LABELS:
                        b_x = tl.where(o < stop_common, -INFINITY, b_z)
                        top_x, sum_x = accumulate(top_x, sum_x, sum_x, b_x, LOG2E, power, False)[:2]
                    b_z = tl.where(o < stop_common, b_z, -INFINITY)
                top_s, sum_s, sum_1 = accumulate(top_s, sum_s, sum_1, b_z, k_s, power, LABELS)
            top_t, sum_t = merge(top_t, sum_t, sum_t, k_t)[:2]
            top_s, sum_s, sum_1 = merge(top_s, sum_s, sum_1, k_s)
        top_s = tl.max(top_s)
        top_t = tl.max(top_t)
        top_1 = tl.maximum(top_s, tl.max(top_x))
        base_1 = finite_or_zero(top_1)
        sum_s = tl.sum(sum_s)
        sum_t = tl.sum(sum_t)
        sum_1 = tl.sum(sum_1) * tl.exp2((top_s - base_1) * LOG2E)
        sum_1 += tl.sum(sum_x * tl.exp2((top_x - base_1) * LOG2E))
        p_stats = stats + row.to(tl.int64) * 6
        tl.store(p_stats, top_s)
        tl.store(p_stats + 1, sum_s)
        tl.store(p_stats + 2, top_t)
        tl.store(p_stats + 3, sum_t)
        tl.store(p_stats + 4, top_1)
        tl.store(p_stats + 5, sum_1)
    else:
        p_stats = stats + row.to(tl.int64) * 6
        top_s = tl.load(p_stats)
        sum_s = tl.load(p_stats + 1)
        top_t = tl.load(p_stats + 2)
        sum_t = tl.load(p_stats + 3)
        top_1 = tl.load(p_stats + 4)
        sum_1 = tl.load(p_stats + 5)

    base_s = finite_or_zero(top_s)
    base_t = finite_or_zero(top_t)
    base_1 = finite_or_zero(top_1)
    r_s = reciprocal_or_zero(sum_s)
    r_t = reciprocal_or_zero(sum_t)
    r_1 = reciprocal_or_zero(sum_1)
    b_1 = r_1 * tl.exp2((top_s - base_1) * LOG2E)  # from e^{z − max over the common columns} to q₁
    # δ = c_s·((v − near_t) − (z − near_s) − gap) + (c_t − c_s)·(v − max v) − log_ratio
    far = tl.abs(base_t - base_s) > 16
    near_s = tl.where(far, base_s, 0.0)
    near_t = tl.where(far, base_t, 0.0)
    gap = tl.where(far, 0.0, base_t - base_s)
    log_ratio = tl.where((sum_s == 0) | (sum_t == 0), 0.0, log(sum_t / sum_s))

    # Coefficients of the gradient: 0 for a term the row does not have, or that is infinite for want of student logits
    broken = counted & (legal == 0)
    n_kd = tl.load(normalizers).to(A)
    a_kd = up * tl.load(options + 3).to(A) * kd_scale * w * c_s / n_kd
    a_kd = tl.where(has_kd & (broken == 0) & (top_s != -INFINITY), a_kd, 0.0)
    a_ce = up * tl.load(options + 4).to(A) / tl.load(normalizers + 1).to(A)
    a_ce = tl.where(has_ce & (top_1 != -INFINITY), a_ce, 0.0)
    a_other = a_ce * epsilon / V
    a_label = a_ce * (1.0 - epsilon) + a_other

    z_y = 0.0
    if FORWARD and LABELS:  # before pass 2, which may overwrite it
        z_y = logits(p_student, phase + y, has_ce, cap_s, scale_s, A, TRANSFORM, "")[0]
    o_label = (tl.where(has_ce, y, -1) + phase).to(tl.int32)

    # Pass 2, backwards
    divergence = tl.zeros([1], A)
    shifted = tl.zeros([1], A)  # Σ (z − max), for label smoothing
    for ENDS in tl.static_range(1, -1, -1):
        n_blocks = n_ends if ENDS else n_body
        b_divergence = tl.zeros([1 if ENDS else BLOCK // GROUP], A)
        b_shifted = b_divergence
        for i in range(n_blocks):
            o, m = columns(n_blocks - 1 - i, phase, head, body, V, ENDS, BLOCK, GROUP)
            b_v = logits(
                p_teacher, o, m & (o < (stop_v if ENDS else body_v)), cap_t, scale_t, A, TRANSFORM, "evict_first"
            )[0]
            b_z, b_slope = logits(
                p_student, o, m & (o < (stop_z if ENDS else body_z)), cap_s, scale_s, A, TRANSFORM, "evict_first"
            )
            b_x = b_z - base_s
            if FORWARD and LABELS and epsilon != 0:
                b_shifted += tl.sum(tl.where(m & (o < stop_z), b_x, 0.0), 1)
            if SURPLUS and ENDS:
                b_surplus = tl.exp2((tl.where(o < stop_common, -INFINITY, b_z) - base_1) * LOG2E) * r_1
                b_z = tl.where(o < stop_common, b_z, -INFINITY)
                b_x = tl.where(o < stop_common, b_x, -INFINITY)
            b_e = tl.exp2(b_x * k_s)
            b_p = tl.exp2((b_v - base_t) * k_t) * r_t
            b_d = b_e * r_s - b_p  # q − p
            if FORWARD:
                b_delta = c_s * ((b_v - near_t) - (b_z - near_s) - gap) + (c_t - c_s) * (b_v - base_t) - log_ratio
                # p·δ. δ is −∞ or NaN where the teacher masks the column: 0. It is +∞ where only the student does, and
                # so must be the product, even if p underflows; no other δ is below −1024 with p > 0.
                b_pd = tl.where(b_delta > -1024, (b_p + 1.2e-38) * b_delta, 0.0)
                b_near = b_pd * b_delta * divergence_factor(b_delta)
                b_divergence += tl.sum(tl.where(tl.abs(b_delta) < 0.5, b_near, b_d + b_pd), 1)
            if gradient is not None:
                b_g = a_kd * b_d
                if LABELS:
                    b_q1 = exp_at_one(b_e, b_x, power) * b_1
                    if SURPLUS and ENDS:
                        b_q1 += b_surplus
                    b_g += a_ce * b_q1 - tl.where(o == o_label, a_label, a_other)
                if TRANSFORM:
                    b_g *= b_slope
                tl.store(p_gradient + o, b_g.to(gradient.dtype.element_ty), m, eviction_policy="evict_first")
        divergence += tl.sum(b_divergence)
        shifted += tl.sum(b_shifted)

    if FORWARD:
        divergence = tl.sum(divergence)
        divergence = tl.where(divergence < 0, 0.0, divergence)
        tl.store(rows + row, tl.where(has_kd, kd_scale * w * divergence, 0.0))
        ce = top_1 - z_y
        if LABELS and epsilon != 0:
            ce = (1.0 - epsilon) * ce + epsilon * ((top_1 - base_s) - tl.sum(shifted) / V)
        ce = tl.where(top_1 == -INFINITY, INFINITY, log(sum_1) + ce)
        ce = tl.where(has_ce, ce, tl.where(counted, float("nan"), 0.0))
        tl.store(rows + tl.num_programs(0) + row, ce)
