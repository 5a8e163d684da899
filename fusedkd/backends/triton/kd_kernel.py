"""Knowledge distillation from logits: a divergence of :mod:`fusedkd.backends.triton.divergences` and cross-entropy,
values and gradient, in two or three sweeps over each row.

Row i has student logits z [V] and teacher logits v [C], C ≤ V: the KD term lives on the first C columns, CE on all V.

    q = softmax(z/T_s), p = softmax(v/T_t), q₁ = softmax(z)                     δ = log p − log q
    D = Σ value(p, q, δ), every value ≥ 0; w(p, q, δ), W = Σ w                  CE = log Σ e^z − z_y  (and smoothing)
    ∂/∂z = A_kd·(w − q·W) + A_ce·(q₁ − (1 − ε)·1_y − ε/V)                       A: weight · scale · upstream / rows

δ is never a difference of two log-sum-exps: δ = c_s·((v − z) − (max v − max z)) + (c_t − c_s)·(v − max v) −
log(l_t/l_s), c = 1/T, where sides that are far apart are first reduced by their maxima. The logarithm needs no care:
what is the same for all columns moves D in second order only, since Σ(p − q) = 0.

Sweep 1 takes the maxima and sums (max, l = Σ e^{(x − max)/T}) of both sides. Sweep 2 runs backwards over the row, while
its end is still in the L2 cache, and takes D, and writes the gradient if W is known beforehand (0 for forward KL).
Otherwise it takes W, and a third sweep, forwards again, writes the gradient. DKD sets the label's column apart: for the
sweeps both sides mask it, and what it has to itself is scalar.

Bytes per logit in 16 bit: 4 for each sweep and 2 for the gradient, 10 or 14, of which sweep 1 alone comes from memory
while all resident row pairs fit into L2 (V up to about 32 K). RESIDENT keeps the row pair in registers instead: 6,
whatever the divergence. A gradient from stored statistics is the last sweep alone: 6.

One program per row, no barrier inside a loop: in sweep 1 each group of columns that one thread holds has a running
maximum of its own (Milakov & Gimelshein 2018, arXiv:1805.02867; the groups are merged once). SPLIT divides the row
among the programs of the grid's second dimension, where there are fewer rows than processors: a launch per STAGE, each
of which merges what the one before it left, always in the same order. The reversed second sweep is that of llm.c's
fused_classifier, the loss with its gradient in the forward call that of Liger (arXiv:2410.10989).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.divergences import divergence, dkd_target
from fusedkd.backends.triton.layout import (
    CE_WEIGHT,
    COEFFICIENTS,
    DKD,
    KD_SCALE,
    KD_WEIGHT,
    LABEL_SMOOTHING,
    LOGIT_MSE,
    OWN,
    SCALE,
    SOFTCAP,
    STATS,
    STUDENT_MAX,
    TEACHER_SCALE,
    TEACHER_SOFTCAP,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
    WEIGHT_SUM,
)
from fusedkd.backends.triton.math import INFINITY, LOG2E, exp_at_one, finite_or_zero, log, reciprocal_or_zero
from fusedkd.backends.triton.rows import (
    PARTIALS,
    UNIT,
    accumulate,
    logits,
    merge,
    merged,
    pair,
    put,
    share,
    take,
    total,
)

INTEGERS = ["ignore_index", "upstream_stride", "parts", "L", "V", "C", "student_o", "student_b", "student_l"]
INTEGERS += ["teacher_o", "teacher_b", "teacher_l", "gradient_o", "gradient_b", "gradient_l"]
VECTORS = ["labels", "weights", "real_options", "normalizers", "upstream", "rows", "stats", "partials"]

LOWEST = tl.constexpr(-1e20)
"""Of v − max v in δ: times c_t − c_s, a mask as low as float32 goes would be −∞, though both sides are finite."""

WHOLE, STATISTICS, VALUES, FINISH = (tl.constexpr(i) for i in range(4))
"""STAGE. WHOLE: all that is asked for in one launch. The others, of a split row, follow one another; VALUES writes the
gradient too if W is known beforehand, FINISH otherwise, and the rows.
"""


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def kd_kernel(
    # Inputs: [B, L, V], [B, L, C], [N] or None, [N]; float64 [16] and [2]; A, [N] or [] or None (1)
    student,
    teacher,
    labels,
    weights,
    real_options,
    normalizers,
    upstream,
    # Outputs: A, [2, N], or None but where D is taken; A, [N, 8]; [B, L, V] or None, may be `student`
    rows,
    stats,
    gradient,
    # From stage to stage: A, [N, PARTIALS, parts], or None
    partials,
    # Sizes; first element and strides, in elements. Never specialised, nor is where a vector starts: one binary serves
    # every shape and every slice. The three pointers to logits are always aligned (`aligned`).
    ignore_index: tl.int64,
    upstream_stride,
    parts,
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
    FORM: tl.constexpr,
    MEASURED: tl.constexpr,  # the gradient waits for W
    CE: tl.constexpr,
    TRANSFORM: tl.constexpr,  # soft-cap or scale the logits
    SURPLUS: tl.constexpr,  # C < V
    RESCALE: tl.constexpr,  # the gradient is right if the upstream is 1
    RESIDENT: tl.constexpr,  # one block holds the row: it is read once
    SPLIT: tl.constexpr,
    STAGE: tl.constexpr,
    TEACHER_IN_PHASE: tl.constexpr,  # rows start at the same column modulo UNIT as the student's
    GRADIENT_IN_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    FIRST: tl.constexpr = STAGE == STATISTICS or (STAGE == WHOLE and rows is not None)
    VALUE: tl.constexpr = STAGE == VALUES or (STAGE == WHOLE and rows is not None)
    TARGET: tl.constexpr = FORM == DKD
    POLICIES: tl.constexpr = ("evict_last", "evict_first")
    row = tl.program_id(0)
    part = tl.program_id(1)
    p_stats = stats + row.to(tl.int64) * STATS
    if SPLIT and STAGE != WHOLE:
        p_partials = partials + row.to(tl.int64) * PARTIALS * parts

    up = 1.0
    if upstream is not None:
        up = tl.load(upstream + row.to(tl.int64) * upstream_stride)
        if RESCALE and up == 1:
            return

    # Options. k turns a difference of logits into an exponent of 2.
    temperature = tl.load(real_options + TEMPERATURE).to(A)
    c_s = 1.0 / temperature
    c_t = 1.0 / tl.load(real_options + TEACHER_TEMPERATURE).to(A)
    k_s = c_s * LOG2E
    k_t = c_t * LOG2E
    power = tl.where((temperature == 1) | (temperature == 2) | (temperature == 4), temperature, 0).to(tl.int32)
    kd_scale = tl.load(real_options + KD_SCALE).to(A)
    epsilon = tl.load(real_options + LABEL_SMOOTHING).to(A)
    cap_s = tl.load(real_options + SOFTCAP).to(A)
    scale_s = tl.load(real_options + SCALE).to(A)
    cap_t = tl.load(real_options + TEACHER_SOFTCAP).to(A)
    scale_t = tl.load(real_options + TEACHER_SCALE).to(A)
    transforms = cap_t, scale_t, cap_s, scale_s
    a0 = tl.load(real_options + COEFFICIENTS).to(A)
    a1 = tl.load(real_options + COEFFICIENTS + 1).to(A)
    a2 = tl.load(real_options + COEFFICIENTS + 2).to(A)
    a3 = tl.load(real_options + COEFFICIENTS + 3).to(A)

    # Which terms the row has. A side that no term needs is not read: its logits count as −∞.
    w = tl.load(weights + row).to(A)
    has_kd = w != 0
    y = tl.full((), 0, tl.int64)
    counted = has_kd & False
    legal = counted
    if CE or TARGET:
        y = tl.load(labels + row)
        legal = (y >= 0) & (y < V)
    if CE:
        counted = y != ignore_index
    has_ce = counted & legal
    active = has_kd | has_ce
    target = legal & (y < C)  # a column that DKD can set apart
    broken = counted & (legal == 0)
    defined = has_kd & (broken == 0)
    if TARGET:
        defined = defined & target

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
    places = p_teacher, p_student, phase, head, body, V, stop_v, body_v, stop_z, body_z
    first_body, n_body = share(tl.cdiv(tl.maximum(body - head, 0), BLOCK), part, parts, SPLIT)
    first_ends, n_ends = share(tl.cdiv(head + phase + V - body, BLOCK // 8), part, parts, SPLIT)

    # The label's logits, before anything overwrites them
    o_label = (tl.where(has_ce | target, y, -1) + phase).to(tl.int32)
    z_y = 0.0
    if TARGET or (CE and (FIRST or STAGE != WHOLE)):
        if STAGE != WHOLE and not FIRST:
            z_y = tl.load(p_partials + 9 * parts)
        else:
            z_y = logits(p_student, phase + y, has_ce | (active & target), cap_s, scale_s, A, TRANSFORM, "")[0]
    if TARGET:
        o_target = (tl.where(target, y, -1) + phase).to(tl.int32)
        v_y = logits(p_teacher, phase + y, has_kd & target, cap_t, scale_t, A, TRANSFORM, "")[0]
        v_y = tl.where(v_y == INFINITY, float("nan"), v_y)  # lest it look like a sure label
        z_y = tl.where(z_y == INFINITY, float("nan"), z_y)
        z_target = tl.where(target, z_y, -INFINITY)
    from_y = finite_or_zero(z_y)

    if RESIDENT:
        o_0, m_0, v_0, z_0, slope_0 = pair(0, places, transforms, A, TRANSFORM, "evict_first", False, BLOCK, GROUP)
        o_1, m_1, v_1, z_1, slope_1 = pair(0, places, transforms, A, TRANSFORM, "evict_first", True, BLOCK, GROUP)

    # Sweep 1
    top_s = tl.full((), 0, A)
    sum_s = top_s
    top_t = top_s
    sum_t = top_s
    top_1 = top_s
    sum_1 = top_s
    shifted = top_s  # Σ (z − z_y), for label smoothing
    if FIRST and (CE or FORM != LOGIT_MSE):
        tops_s = tl.full([BLOCK // GROUP], -INFINITY, A)
        tops_t = tops_s
        sums_s = tl.zeros([BLOCK // GROUP], A)
        sums_t = sums_s
        sums_1 = sums_s
        top_x = tl.full([1], -INFINITY, A)  # for CE: the columns of which KD knows nothing
        sum_x = tl.zeros([1], A)
        for ENDS in tl.static_range(2):
            n_blocks = 1 if RESIDENT else tl.where(active, n_ends if ENDS else n_body, 0)
            b_shifted = tl.zeros([1 if ENDS else BLOCK // GROUP], A)
            for i in range(n_blocks):
                if RESIDENT:
                    o, m, b_v, b_z = (o_1, m_1, v_1, z_1) if ENDS else (o_0, m_0, v_0, z_0)
                else:
                    i_block = i + (first_ends if ENDS else first_body)
                    o, m, b_v, b_z, b_slope = pair(
                        i_block, places, transforms, A, TRANSFORM, "evict_last", ENDS, BLOCK, GROUP
                    )
                if CE and epsilon != 0:
                    b_shifted += tl.sum(tl.where(m & (o < stop_z), b_z - from_y, 0.0), 1)
                if TARGET:
                    b_v = tl.where(o == o_target, -INFINITY, b_v)
                    b_z = tl.where(o == o_target, -INFINITY, b_z)
                tops_t, sums_t = accumulate(tops_t, sums_t, sums_t, b_v, k_t, power, False)[:2]
                if SURPLUS and ENDS:
                    if CE:
                        b_x = tl.where(o < stop_common, -INFINITY, b_z)
                        top_x, sum_x = accumulate(top_x, sum_x, sum_x, b_x, LOG2E, power, False)[:2]
                    b_z = tl.where(o < stop_common, b_z, -INFINITY)
                tops_s, sums_s, sums_1 = accumulate(tops_s, sums_s, sums_1, b_z, k_s, power, CE)
            tops_t, sums_t = merge(tops_t, sums_t, sums_t, k_t)[:2]
            tops_s, sums_s, sums_1 = merge(tops_s, sums_s, sums_1, k_s)
            shifted += tl.sum(b_shifted)
        top_s = tl.max(tops_s)
        top_t = tl.max(tops_t)
        top_1 = tl.maximum(top_s, tl.max(top_x))
        if TARGET:
            z_here = tl.where(part == 0, z_target, -INFINITY)
            top_1 = tl.maximum(top_1, z_here)
        base_1 = finite_or_zero(top_1)
        sum_s = tl.sum(sums_s)
        sum_t = tl.sum(sums_t)
        sum_1 = tl.sum(sums_1) * tl.exp2((top_s - base_1) * LOG2E)
        sum_1 += tl.sum(sum_x * tl.exp2((top_x - base_1) * LOG2E))
        if TARGET:
            sum_1 += tl.exp2((z_here - base_1) * LOG2E)
    if STAGE == STATISTICS:
        put(p_partials + part, parts, (top_s, sum_s, top_t, sum_t, top_1, sum_1))
        tl.store(p_partials + 8 * parts + part, shifted)
        if part == 0:
            tl.store(p_partials + 9 * parts, z_y)
        return
    elif STAGE == VALUES:
        top_s, sum_s = merged(p_partials, parts, k_s)
        top_t, sum_t = merged(p_partials + 2 * parts, parts, k_t)
        top_1, sum_1 = merged(p_partials + 4 * parts, parts, LOG2E)
    elif not FIRST:
        top_s, sum_s, top_t, sum_t, top_1, sum_1 = take(p_stats + STUDENT_MAX)
    if (FIRST or STAGE == VALUES) and part == 0:
        put(p_stats, 1, (top_s, sum_s, top_t, sum_t, top_1, sum_1))
        tl.store(p_stats + WEIGHT_SUM, 0.0)
        tl.store(p_stats + OWN, 0.0)

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
    empty = (sum_s == 0) | (sum_t == 0)
    log_ratio = tl.where(empty, 0.0, log(sum_t / sum_s))
    log_s = log(sum_s)
    log_t = log(sum_t)

    # The label against the rest
    masked = top_s == -INFINITY  # all logits of the student's
    binary = 0.0
    pull = 0.0
    if TARGET:
        low = tl.maximum(v_y - base_t, LOWEST)
        h = c_s * ((v_y - near_t) - (z_y - near_s) - gap) + (c_t - c_s) * low - log_ratio
        x_p = c_t * (v_y - base_t) - log_t
        x_q = c_s * (z_y - base_s) - log_s
        binary, pull = dkd_target(x_p, x_q, tl.where(empty, INFINITY, h))
        a1 = tl.where(empty, 0.0, a1)
        masked = masked & (z_target == -INFINITY)

    # Coefficients of the gradient: 0 for a term the row does not have, or that is infinite for want of student logits
    a_kd = up * tl.load(real_options + KD_WEIGHT).to(A) * kd_scale * w * c_s / tl.load(normalizers).to(A)
    a_kd = tl.where(defined & (masked == 0), a_kd, 0.0)
    a_ce = up * tl.load(real_options + CE_WEIGHT).to(A) / tl.load(normalizers + 1).to(A)
    a_ce = tl.where(has_ce & (top_1 != -INFINITY), a_ce, 0.0)
    a_other = a_ce * epsilon / V
    a_label = a_ce * (1.0 - epsilon) + a_other
    if TARGET:
        pull = tl.where(a_kd == 0, 0.0, a0 * pull)
        a_label -= tl.where(a_ce == 0, 0.0, a_ce * tl.exp2((z_target - base_1) * LOG2E) * r_1) + a_kd * pull

    # Sweeps 2 and 3
    D = tl.full((), 0, A)
    W = D
    if STAGE == FINISH:
        D = total(p_partials + 6 * parts, parts)
        W = total(p_partials + 7 * parts, parts)
        shifted = total(p_partials + 8 * parts, parts)
    elif MEASURED and not VALUE:
        W = tl.load(p_stats + WEIGHT_SUM)
    for LAST in tl.static_range(2):
        no_kd = (a_kd == 0) | (W == INFINITY)  # 0, whatever the columns hold
        for ENDS in tl.static_range(1, -1, -1):
            n_blocks = 1 if RESIDENT else (n_ends if ENDS else n_body)
            if not ((VALUE and LAST != MEASURED) or (LAST and gradient is not None)):
                n_blocks = 0
            b_D = tl.zeros([1 if ENDS else BLOCK // GROUP], A)
            b_W = b_D
            for i in range(n_blocks):
                if RESIDENT:
                    o, m, b_v, b_z, b_slope = (o_1, m_1, v_1, z_1, slope_1) if ENDS else (o_0, m_0, v_0, z_0, slope_0)
                else:
                    i_block = n_blocks - 1 - i if VALUE and LAST != MEASURED else i
                    i_block += first_ends if ENDS else first_body
                    o, m, b_v, b_z, b_slope = pair(
                        i_block, places, transforms, A, TRANSFORM, POLICIES[LAST], ENDS, BLOCK, GROUP
                    )
                if TARGET:
                    b_v = tl.where(o == o_target, -INFINITY, b_v)
                    b_z = tl.where(o == o_target, -INFINITY, b_z)
                if SURPLUS and ENDS:
                    b_surplus = tl.exp2((tl.where(o < stop_common, -INFINITY, b_z) - base_1) * LOG2E) * r_1
                    b_z = tl.where(o < stop_common, b_z, -INFINITY)
                b_x = b_z - base_s
                b_y = b_v - base_t
                b_e = tl.exp2(b_x * k_s)
                b_q = b_e * r_s
                b_p = tl.exp2(b_y * k_t) * r_t
                b_low = tl.maximum(b_y, LOWEST)
                b_delta = c_s * ((b_v - near_t) - (b_z - near_s) - gap) + (c_t - c_s) * b_low - log_ratio
                if MEASURED:  # forward KL, and DKD, take ∞ − ∞ for the nothing that it is
                    b_delta = tl.where(b_v == -INFINITY, tl.where(b_z == -INFINITY, 0.0, -INFINITY), b_delta)
                b_log_p = c_t * b_y - log_t
                b_log_q = c_s * b_x - log_s
                b_value, b_w = divergence(b_z, b_v, b_p, b_q, b_delta, b_log_p, b_log_q, a0, a1, a2, a3, C, FORM)
                if VALUE and LAST != MEASURED:
                    b_D += tl.sum(b_value, 1)
                    if MEASURED and FORM != LOGIT_MSE:
                        b_W += tl.sum(b_w, 1)
                if LAST and gradient is not None:
                    if TARGET:
                        b_w -= b_q * pull
                    elif MEASURED and FORM != LOGIT_MSE:
                        b_w -= b_q * W
                    b_g = tl.where(no_kd, 0.0, a_kd * b_w)
                    if SURPLUS and ENDS:
                        b_g = tl.where(o < stop_common, b_g, 0.0)
                    if CE:
                        b_q1 = exp_at_one(b_e, b_x, power) * b_1
                        if SURPLUS and ENDS:
                            b_q1 += b_surplus
                        b_g += tl.where(a_ce == 0, 0.0, a_ce * b_q1)
                    if CE or TARGET:
                        b_g -= tl.where(o == o_label, a_label, a_other)
                    if TRANSFORM:
                        b_g *= b_slope
                    if (
                        ENDS and stats.dtype.element_ty == tl.float64
                    ):  # two warps hold each column: in place, both must have read it
                        tl.debug_barrier()
                    tl.store(p_gradient + o, b_g.to(gradient.dtype.element_ty), m, eviction_policy="evict_first")
            D += tl.sum(b_D)
            W += tl.sum(b_W)
        if MEASURED and LAST == 0 and (STAGE == FINISH or (STAGE == WHOLE and VALUE)):
            D = tl.where(masked, INFINITY, D)
            W = tl.where(tl.abs(D) < INFINITY, W, D)  # NaN too: the gradient shows what the value does
            if part == 0:
                tl.store(p_stats + WEIGHT_SUM, W)

    if STAGE == VALUES:
        tl.store(p_partials + 6 * parts + part, D)
        tl.store(p_partials + 7 * parts + part, W)
    if rows is not None and part == 0:
        if TARGET:
            binary = tl.where((a0 == 0) & (binary == INFINITY), 0.0, a0 * binary)  # NaN shows even so
            D = tl.where(masked, INFINITY, D + binary)
            D = tl.where(target, D, float("nan"))
        D = tl.where(D < 0, 0.0, D)
        tl.store(rows + row, tl.where(has_kd, kd_scale * w * D, 0.0))
        ce = top_1 - z_y
        if CE and epsilon != 0:
            ce = tl.where(epsilon == 1, 0.0, (1.0 - epsilon) * ce) + epsilon * ((top_1 - from_y) - shifted / V)
        ce = tl.where(top_1 == -INFINITY, INFINITY, log(sum_1) + ce)
        ce = tl.where(has_ce, ce, tl.where(counted, float("nan"), 0.0))
        tl.store(rows + tl.num_programs(0) + row, ce)
