"""Knowledge distillation from a teacher known at K ≤ 1024 columns of each row, and cross-entropy, values and gradient,
in two passes over the student's row.

Row i has student logits z [V], q = softmax(z/T), and on the list of ids y [K] the teacher's log-probabilities, or its
weights ω: p = e^y, or e^(y·T_lp/T) over its sum on the list; δ = log p − log q; q' = q over its sum on the list. Off
the list r_s = Σq; r_t is the teacher's tail, |1 − Σp| or what rounding leaves open of it, and with it p is over
Σp + r_t (fusedkd/sparse.py). excess(p, q, δ) = p·δ + q − p ≥ 0 (kernels/divergences.py).

                       D                                                   ∂D/∂s on the list       off it, over q
  RENORMALIZE          Σ excess(p, q, δ) + r_s                             q − p                   1
  RENORMALIZE_REVERSE  Σ excess(q', p, −δ)                                 q'·(−δ − D)             0
  BUCKET               Σ excess(p, q, δ) + excess(r_t, r_s, ·)             q − p                   1 − r_t/r_s
  BUCKET_REVERSE       Σ excess(q, p, −δ) + excess(r_s, r_t, ·)            q·(−δ − D)              log(r_s/r_t) − D
  IGNORE               Σ p·δ                                               (Σp)·q − p              Σp
  IGNORE_REVERSE       Σ −q·δ, with W = Σ q·(1 − δ)                        q·(1 − δ − W)           −W
  SAMPLES              Σ −ω·log q                                          (Σω)·q − ω              Σω

Pass 1 takes maximum and sum of the row. The forms with r_s sum only the columns off the list, for 1 − Σq has no digits
left of a small tail: a bit per column, set by the program itself, says which these are. Pass 2 writes
rest·e^((z − max)/T) and the cross-entropy's part (kernels/kd_kernel.py); after a barrier the columns of the list are
overwritten. Their values were computed between the passes, in float64, whose digits 1 − Σp and δ need: K columns of V.

Bytes per logit in 16 bit: 2 in pass 1, 2 + 2 in pass 2, and V/8 bytes of marks where there are any. A value without
gradient is pass 1 alone; RENORMALIZE_REVERSE without cross-entropy only writes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import (
    BUCKET,
    BUCKET_REVERSE,
    CE_MAX,
    CE_SUM,
    CE_WEIGHT,
    COEFFICIENTS,
    IGNORE_REVERSE,
    KD_SCALE,
    KD_WEIGHT,
    LABEL_SMOOTHING,
    OTHER_MAX,
    OTHER_SUM,
    OWN,
    RENORMALIZE,
    RENORMALIZE_REVERSE,
    SAMPLES,
    SCALE,
    SOFTCAP,
    STATS,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
    WEIGHT_SUM,
)
from fusedkd.backends.triton.math import INFINITY, LOG2E, exp_at_one, finite_or_zero, reciprocal_or_zero
from fusedkd.backends.triton.rows import UNIT, accumulate, columns, logits, merge
from fusedkd.reference.sparse import MOST_LOST

LOST = tl.constexpr(MOST_LOST)

INTEGERS = ["ignore_index", "upstream_stride", "marks_stride", "L", "V", "K", "student_o", "student_b", "student_l"]
INTEGERS += ["teacher_b", "teacher_l", "gradient_o", "gradient_b", "gradient_l"]
VECTORS = ["teacher", "ids", "labels", "weights", "real_options", "normalizers", "upstream", "rows", "stats", "marks"]


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def topk_kernel(
    # Inputs: [B, L, V], [B, L, K], [N, K], [N] or None (no cross-entropy), [N]; float64 [16] and [2]; A, [N] or [] or
    # None (1)
    student,
    teacher,
    ids,
    labels,
    weights,
    real_options,
    normalizers,
    upstream,
    # Outputs: A, [2, N], or None where the statistics are already known; A, [N, 8]; [B, L, V] or None, may be `student`
    rows,
    stats,
    gradient,
    marks,  # int32 [N, marks_stride], zeros: a bit per column. None where no r_s is needed
    # Sizes; first element and strides, in elements. Never specialised: one binary serves every shape
    ignore_index: tl.int64,
    upstream_stride,
    marks_stride,
    L,
    V,
    K,
    student_o,
    student_b: tl.int64,
    student_l: tl.int64,
    teacher_b: tl.int64,
    teacher_l: tl.int64,
    gradient_o,
    gradient_b: tl.int64,
    gradient_l: tl.int64,
    # Structure
    FORM: tl.constexpr,
    TRANSFORM: tl.constexpr,  # soft-cap or scale the student's logits
    RESCALE: tl.constexpr,  # the gradient is right if the upstream is 1
    GRADIENT_IN_PHASE: tl.constexpr,  # rows start at the same column modulo UNIT as the student's
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    R: tl.constexpr = tl.float64
    FORWARD: tl.constexpr = rows is not None
    LABELS: tl.constexpr = labels is not None
    MARKS: tl.constexpr = marks is not None
    SWEEP: tl.constexpr = LABELS or FORM != RENORMALIZE_REVERSE
    REVERSE: tl.constexpr = (FORM == RENORMALIZE_REVERSE) | (FORM == BUCKET_REVERSE) | (FORM == IGNORE_REVERSE)
    row = tl.program_id(0)

    up = 1.0
    if upstream is not None:
        up = tl.load(upstream + row.to(tl.int64) * upstream_stride)
        if RESCALE and up == 1:
            return

    temperature = tl.load(real_options + TEMPERATURE)
    c = 1.0 / temperature
    k_s = (c * LOG2E).to(A)
    power = tl.where((temperature == 1) | (temperature == 2) | (temperature == 4), temperature, 0).to(tl.int32)
    kd_scale = tl.load(real_options + KD_SCALE)
    epsilon = tl.load(real_options + LABEL_SMOOTHING).to(A)
    cap = tl.load(real_options + SOFTCAP).to(A)
    scale = tl.load(real_options + SCALE).to(A)

    # The row, as seen from the aligned address below it
    i_b = (row // L).to(tl.int64)
    i_l = (row % L).to(tl.int64)
    o_student = student_o + i_b * student_b + i_l * student_l
    phase = (o_student % UNIT).to(tl.int32)
    p_student = student + o_student // UNIT * UNIT
    if gradient is not None:
        o_gradient = gradient_o + i_b * gradient_b + i_l * gradient_l
        p_gradient = gradient + (o_gradient // UNIT * UNIT if GRADIENT_IN_PHASE else o_gradient - phase)

    # Which terms the row has. What no term needs is not read: it counts as −∞.
    w = tl.load(weights + row).to(R)
    selected = w != 0
    i_k = tl.arange(0, BLOCK_K)
    p_ids = ids + row.to(tl.int64) * K + i_k
    b_id = tl.load(p_ids, i_k < tl.where(selected, K, 0), other=-1)  # [BLOCK_K], as all of the list
    legal_ids = tl.max(((b_id < -1) | (b_id >= V)).to(tl.int32), 0) == 0
    has_kd = selected & legal_ids
    n_k = tl.where(has_kd, K, 0)
    m_k = (b_id >= 0) & (i_k < n_k)
    y = tl.full((), 0, tl.int64)
    counted = selected & False
    legal = counted
    if LABELS:
        y = tl.load(labels + row)
        counted = y != ignore_index
        legal = (y >= 0) & (y < V)
    has_ce = counted & legal
    active = has_kd | has_ce

    head = (phase + UNIT - 1) // UNIT * UNIT
    body = (phase + V) // UNIT * UNIT
    stop_z = tl.where(active, phase + V, 0)
    body_z = tl.where(active, body, 0)
    n_body = tl.cdiv(tl.maximum(body - head, 0), BLOCK)
    n_ends = tl.cdiv(head + phase + V - body, BLOCK // 8)
    p_stats = stats + row.to(tl.int64) * STATS

    z_y = (c * 0).to(A)
    if LABELS:
        z_y = logits(p_student, phase + y, has_ce, cap, scale, A, TRANSFORM, "")[0]
    shifted = tl.zeros([1], A)  # Σ (z − z_y), for label smoothing
    if FORWARD:
        # Pass 1: kept in L2 for pass 2. `top_c`, `sum_c`: of the columns off the list, if there are marks, else of all
        top_c = tl.full([BLOCK // GROUP], -INFINITY, A)
        sum_c = tl.zeros([BLOCK // GROUP], A)
        sum_1 = sum_c
        if MARKS:
            p_marks = marks + row.to(tl.int64) * marks_stride
            o_id = tl.where(m_k, phase + b_id, 0).to(tl.int32)
            tl.atomic_or(p_marks + o_id // 32, 1 << (o_id % 32), m_k, sem="relaxed")
            tl.debug_barrier()
        if SWEEP:
            for ENDS in tl.static_range(2):
                n_blocks = tl.where(active, n_ends if ENDS else n_body, 0)
                b_shifted = tl.zeros([1 if ENDS else BLOCK // GROUP], A)
                for i_block in range(n_blocks):
                    o, m = columns(i_block, phase, head, body, V, ENDS, BLOCK, GROUP)
                    m &= o < (stop_z if ENDS else body_z)
                    b = logits(p_student, o, m, cap, scale, A, TRANSFORM, "evict_last")[0]
                    if LABELS and epsilon != 0:
                        b_shifted += tl.sum(tl.where(m, b - finite_or_zero(z_y), 0.0), 1)
                    if MARKS:
                        if ENDS:
                            b_marks = tl.load(p_marks + o // 32, m, other=0, cache_modifier=".cg")
                        else:  # a group of columns lies in one word
                            o_group = head + i_block * BLOCK + tl.arange(0, BLOCK // GROUP) * GROUP
                            b_marks = tl.load(p_marks + o_group // 32, o_group < body, other=0, cache_modifier=".cg")
                            b_marks = b_marks[:, None]
                        b = tl.where(((b_marks >> (o % 32)) & 1) != 0, -INFINITY, b)
                    top_c, sum_c, sum_1 = accumulate(top_c, sum_c, sum_1, b, k_s, power, LABELS)
                top_c, sum_c, sum_1 = merge(top_c, sum_c, sum_1, k_s)
                shifted += tl.sum(b_shifted)
        top_c = tl.max(top_c)
        sum_c = tl.sum(sum_c)
        sum_1 = tl.sum(sum_1)
        top = top_c
        total = sum_c
        top_1 = top_c
        if MARKS or FORM == RENORMALIZE_REVERSE:  # and of the list
            b_z = logits(p_student, phase + b_id, m_k, cap, scale, A, TRANSFORM, "")[0]
            top_k = tl.max(b_z, 0)
            if FORM == RENORMALIZE_REVERSE:
                top = top_k
                total = tl.sum(tl.exp2((b_z - finite_or_zero(top)) * k_s), 0)
            else:
                top = tl.maximum(top_c, top_k)
                base = finite_or_zero(top)
                total = sum_c * tl.exp2((top_c - base) * k_s) + tl.sum(tl.exp2((b_z - base) * k_s), 0)
                sum_1 = sum_1 * tl.exp2((top_c - base) * LOG2E) + tl.sum(tl.exp2((b_z - base) * LOG2E), 0)
                top_1 = top
        tl.store(p_stats + STUDENT_MAX, top)
        tl.store(p_stats + STUDENT_SUM, total)
        tl.store(p_stats + OTHER_MAX, top_c)
        tl.store(p_stats + OTHER_SUM, sum_c)
        tl.store(p_stats + CE_MAX, top_1)
        tl.store(p_stats + CE_SUM, sum_1)
        tl.store(p_stats + WEIGHT_SUM, 0.0)
        tl.store(p_stats + OWN, 0.0)
    else:
        top = tl.load(p_stats + STUDENT_MAX)
        total = tl.load(p_stats + STUDENT_SUM)
        top_c = tl.load(p_stats + OTHER_MAX)
        sum_c = tl.load(p_stats + OTHER_SUM)
        top_1 = tl.load(p_stats + CE_MAX)
        sum_1 = tl.load(p_stats + CE_SUM)

    # The list, before pass 2 may overwrite the student's logits: p and log p
    b_z, b_slope_k = logits(p_student, phase + b_id, m_k, cap, scale, A, TRANSFORM, "")
    b_x = b_z.to(R)
    p_teacher = teacher + i_b * teacher_b + i_l * teacher_l + i_k
    if FORM == SAMPLES:
        b_y = tl.load(p_teacher, m_k, other=0.0).to(R)
        b_p = b_y
    else:
        b_y = tl.load(p_teacher, m_k, other=-INFINITY).to(R)
        if (FORM == RENORMALIZE) | (FORM == RENORMALIZE_REVERSE):
            b_y = (b_y - finite_or_zero(tl.max(b_y, 0))) * (
                tl.load(real_options + COEFFICIENTS) / tl.load(real_options + TEACHER_TEMPERATURE)
            )
            b_y -= tl.log(tl.sum(tl.exp(b_y), 0))
        b_p = tl.exp(b_y)
    mass = tl.sum(b_p, 0)
    r_t = mass * 0.0
    if (FORM == BUCKET) | (FORM == BUCKET_REVERSE):
        r_t = teachers_tail(b_p, b_y, mass, sum_c != 0, teacher.dtype.element_ty)
        share = 1.0 / (mass + r_t)
        b_p *= share
        b_y += tl.log(share)
        r_t *= share

    # q, D, and ∂D/∂s; off it, ∂D/∂s = rest·e^((z − top_c)/T), and q = q_c·e^((z − top_c)/T)
    dead = total == 0
    base_c = finite_or_zero(top_c)
    base_1 = finite_or_zero(top_1)
    down = (top_c.to(R) - finite_or_zero(top)) * c
    log_l = tl.log(tl.where(dead, 1.0, total).to(R))
    q_c = tl.exp(down - log_l)
    log_rs = down + tl.log(sum_c.to(R)) - log_l
    b_lq = (b_x - finite_or_zero(top)) * c - log_l
    b_q = tl.exp(b_lq)
    b_delta = b_y - b_lq
    if (FORM == RENORMALIZE) | (FORM == BUCKET):
        divergence = tl.sum(excess(b_p, b_q, b_delta), 0)
        if FORM == RENORMALIZE:
            divergence += tl.exp(log_rs)
            b_d = b_q - b_p
            rest = q_c
        else:
            divergence += tail(r_t, tl.exp(log_rs), tl.log(r_t) - log_rs)
            b_d = b_q - b_p
            rest = q_c - r_t * reciprocal_or_zero(sum_c.to(R))
    elif (FORM == RENORMALIZE_REVERSE) | (FORM == BUCKET_REVERSE):
        divergence = tl.sum(excess(b_q, b_p, -b_delta), 0)
        rest = 0.0 * q_c
        if FORM == BUCKET_REVERSE:
            ratio = log_rs - tl.log(r_t)
            divergence += tail(tl.exp(log_rs), r_t, ratio)
            rest = tl.where(sum_c == 0, 0.0, (ratio - divergence) * q_c)
        b_d = tl.where(b_q == 0, 0.0, b_q * (-b_delta - divergence))
    elif FORM == IGNORE_REVERSE:
        b_qd = tl.where(b_x == -INFINITY, 0.0, b_q * b_delta)
        divergence = -tl.sum(b_qd, 0)
        pull = tl.sum(b_q - b_qd, 0)
        b_d = b_q - b_qd - b_q * pull
        rest = -pull * q_c
    else:
        if FORM == SAMPLES:
            b_delta = -b_lq
        b_term = tl.where(b_x == -INFINITY, INFINITY, b_p * b_delta)
        divergence = tl.sum(tl.where(b_y == (0 if FORM == SAMPLES else -INFINITY), 0.0, b_term), 0)
        if FORM == SAMPLES and gradient is not None:  # columns drawn more than once: each holds the sum
            b_p = b_p * 0.0
            for j in range(0, n_k, 4):
                i_j = j + tl.arange(0, 4)
                m_j = i_j < n_k
                b_j = tl.load(ids + row.to(tl.int64) * K + i_j, m_j, other=-1)
                b_w = tl.load(teacher + i_b * teacher_b + i_l * teacher_l + i_j, m_j & (b_j >= 0), other=0.0)
                b_p += tl.sum(tl.where(b_id[:, None] == b_j[None, :], b_w.to(R)[None, :], 0.0), 1)
        b_d = mass * b_q - b_p
        rest = mass * q_c

    # Coefficients of the gradient: 0 for a term the row does not have, or that is infinite (see above)
    broken = (counted & (legal == 0)) | (selected & (legal_ids == 0))
    finite = (dead == 0) & (broken == 0)
    if REVERSE:
        finite = finite & (divergence != INFINITY)
    a_kd = up * tl.load(real_options + KD_WEIGHT) * kd_scale * w * c / tl.load(normalizers)
    a_kd = tl.where(has_kd & finite, a_kd, 0.0)
    a_ce = up * tl.load(real_options + CE_WEIGHT) / tl.load(normalizers + 1)
    a_ce = tl.where(has_ce & (broken == 0) & (top_1 != -INFINITY), a_ce, 0.0)

    if FORWARD:
        divergence = tl.where(dead, INFINITY, divergence)
        divergence = tl.where(legal_ids, divergence, float("nan"))
        tl.store(rows + row, tl.where(selected, kd_scale * w * divergence, 0.0).to(A))
        ce = top_1.to(R) - z_y
        if LABELS and epsilon != 0:
            rise = top_1.to(R) - finite_or_zero(z_y) - tl.sum(shifted).to(R) / V
            ce = tl.where(epsilon == 1, 0.0, (1.0 - epsilon) * ce) + epsilon * rise
        ce = tl.where(top_1 == -INFINITY, INFINITY, tl.log(sum_1.to(R)) + ce)
        ce = tl.where(has_ce, ce, tl.where(counted, float("nan"), 0.0))
        tl.store(rows + tl.num_programs(0) + row, ce.to(A))

    if gradient is not None:
        b_d = tl.where(a_kd == 0, 0.0, a_kd * b_d)
        if LABELS:
            b_q1 = tl.exp(b_x - base_1) * reciprocal_or_zero(sum_1.to(R))
            b_target = tl.where(b_id == y, 1.0 - epsilon, 0.0) + epsilon / V
            b_d += tl.where(a_ce == 0, 0.0, a_ce * (b_q1 - b_target))
        b_d = b_d.to(A)
        if TRANSFORM:
            b_d *= b_slope_k

        # Pass 2, backwards. In place, it may not begin before every warp has read the list.
        tl.debug_barrier()
        rest = tl.where(a_kd == 0, 0.0, a_kd * rest).to(A)
        a_ce = a_ce.to(A)
        a_other = a_ce * epsilon / V
        a_label = a_ce * (1.0 - epsilon) + a_other
        b_1 = reciprocal_or_zero(sum_1) * tl.exp2((base_c - base_1) * LOG2E)  # from e^(z − top_c) to q₁
        o_label = (tl.where(has_ce, y, -1) + phase).to(tl.int32)
        for ENDS in tl.static_range(1, -1, -1):
            n_blocks = n_ends if ENDS else n_body
            for i in range(n_blocks):
                o, m = columns(n_blocks - 1 - i, phase, head, body, V, ENDS, BLOCK, GROUP)
                b_g = tl.zeros(o.shape, A)
                if SWEEP:
                    b, b_slope = logits(
                        p_student, o, m & (o < (stop_z if ENDS else body_z)), cap, scale, A, TRANSFORM, "evict_first"
                    )
                    b -= base_c
                    b_e = tl.exp2(b * k_s)
                    b_g = tl.where(rest == 0, 0.0, rest * b_e)  # 0, whatever the column holds
                    if LABELS:
                        b_g += tl.where(a_ce == 0, 0.0, a_ce * (exp_at_one(b_e, b, power) * b_1))
                        b_g -= tl.where(o == o_label, a_label, a_other)
                    if TRANSFORM:
                        b_g *= b_slope
                tl.store(p_gradient + o, b_g.to(gradient.dtype.element_ty), m, eviction_policy="evict_first")
        tl.debug_barrier()
        b_id = tl.load(p_ids, m_k, other=0)
        tl.store(p_gradient + phase + b_id, b_d.to(gradient.dtype.element_ty), m_k)


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
    """|1 − Σp|, at least what rounding leaves open of it (fusedkd/sparse.py); dtype: of the log-probabilities."""
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
