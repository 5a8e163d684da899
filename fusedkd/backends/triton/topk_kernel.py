"""Knowledge distillation from a teacher known at K ≤ 1024 columns of each row, and cross-entropy: `topk_forward_kernel`
takes values and gradient in two passes over the student's row, `topk_backward_kernel` the gradient from the statistics
that forward left, in one.

Row i has student logits z [V], q = softmax(z/T), and on the list of ids y [K] the teacher's log-probabilities, or its
weights ω: p = e^y, or e^(y·T_lp/T) over its sum on the list; δ = log p − log q; q' = q over its sum on the list. Off
the list r_s = Σq; r_t is the teacher's tail, |1 − Σp| or what rounding leaves open of it, and with it p is over
Σp + r_t (fusedkd/reference/sparse.py). excess(p, q, δ) = p·δ + q − p ≥ 0 (`divergences.py`).

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
rest·e^((z − max)/T) and the cross-entropy's part (`cross_entropy.py`); after a barrier the columns of the list are
overwritten. Their values were computed between the passes (`topk_list.py`).

Bytes per logit in 16 bit: 2 in pass 1, 2 + 2 in pass 2, and V/8 bytes of marks where there are any. A value without
gradient is pass 1 alone; RENORMALIZE_REVERSE without cross-entropy only writes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.cross_entropy import cross_entropy, read_label
from fusedkd.backends.triton.last import leave_row, sum_rows
from fusedkd.backends.triton.layout import COEFFICIENTS, OWN, STATS, TEACHER_TEMPERATURE, TEMPERATURE, WEIGHT_SUM
from fusedkd.backends.triton.math import INFINITY
from fusedkd.backends.triton.options import exponent_scale, load_options, load_weights, options_of
from fusedkd.backends.triton.row import base_of, first_column, locate, logits, phase_of, side_of
from fusedkd.backends.triton.softmax import put, take
from fusedkd.backends.triton.topk_list import divergence, read_list, read_teacher
from fusedkd.backends.triton.topk_passes import gradient_pass, statistics_pass

INTEGERS = ["ignore_index", "upstream_stride", "marks_stride", "L", "V", "K", "student_o", "student_b", "student_l"]
INTEGERS += ["teacher_b", "teacher_l", "gradient_o", "gradient_b", "gradient_l", "options_stride"]
VECTORS = ["teacher", "ids", "labels", "weights", "real_options", "normalizers", "upstream", "row_losses", "stats"]
VECTORS += ["marks", "loss", "terms", "ticket"]


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def topk_forward_kernel(
    # Inputs: [B, L, V], [B, L, K], [N, K], [N] or None (no cross-entropy), [N]; float64 [OPTIONS] and [2]
    student,
    teacher,
    ids,
    labels,
    weights,
    real_options,
    normalizers,
    # Outputs: A, [2, N]; A, [N, 8]; [B, L, V] or None, may be `student`
    row_losses,
    stats,
    gradient,
    # The loss, unless it is None (`last.py`): A, [] or [N]; [2] or [2, N], or None; int32 [1]
    loss,
    terms,
    ticket,
    marks,  # int32 [N, marks_stride], to be filled: a bit per column. None where no r_s is needed
    # Sizes; first element and strides, in elements. Never specialised: one binary serves every shape
    ignore_index: tl.int64,
    options_stride,  # from row to row, 0 where all share their options
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
    KERNEL_ID: tl.constexpr,
    TRANSFORM: tl.constexpr,  # soft-cap or scale the student's logits
    PER_ROW: tl.constexpr,  # the loss is
    GRADIENT_IN_PHASE: tl.constexpr,  # rows start at the same column modulo UNIT as the student's
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    R: tl.constexpr = tl.float64
    CE: tl.constexpr = labels is not None
    i_row = tl.program_id(0)
    real_options = options_of(real_options, i_row, options_stride)
    option = load_options(real_options, A)
    k = exponent_scale(tl.load(real_options + TEMPERATURE)).to(A)
    label = read_label(labels, i_row, ignore_index, V, CE)
    weight = tl.load(weights + i_row)
    listed = read_list(ids, i_row, weight != 0, K, V, BLOCK_K)
    has_ce = label.counted & label.legal

    o_student = first_column(student_o, student_b, student_l, i_row, L)
    o_gradient = first_column(gradient_o, gradient_b, gradient_l, i_row, L)
    row = locate(phase_of(o_student), V, V, 0, 1, False, BLOCK)
    p_student = base_of(student, o_student, row.phase, True)
    p_teacher = teacher + first_column(0, teacher_b, teacher_l, i_row, L)
    z = side_of(p_student, row, V, listed.kd | has_ce, option.softcap, option.scale)

    # Pass 1, kept in L2 for pass 2
    z_y = tl.full((), 0, A)
    if CE:
        z_y = logits(z, row.phase + label.column, has_ce, A, TRANSFORM, "")[0]
    p_marks = None
    if marks is not None:
        p_marks = marks + i_row.to(tl.int64) * marks_stride
    found, shifted = statistics_pass(
        row, z, listed, p_marks, z_y, k, option, KERNEL_ID, CE, TRANSFORM, BLOCK, GROUP
    )  # fmt: skip
    p_stats = stats + i_row.to(tl.int64) * STATS
    put(p_stats, 1, found)
    tl.store(p_stats + WEIGHT_SUM, 0.0)
    tl.store(p_stats + OWN, z_y)
    term_weights = load_weights(real_options, R)

    # The list, before pass 2 may overwrite the student's logits
    b_z, b_slope = logits(z, row.phase + listed.ids, listed.m, A, TRANSFORM, "")
    temperature = tl.load(real_options + TEMPERATURE)
    sharpening = tl.load(real_options + COEFFICIENTS) / tl.load(real_options + TEACHER_TEMPERATURE)
    known = read_teacher(p_teacher, listed, found, sharpening, KERNEL_ID, BLOCK_K)
    slope = divergence(
        b_z, known, listed, p_teacher, ids, i_row, found, temperature, K, KERNEL_ID, gradient is not None
    )  # fmt: skip

    value = tl.where(found.student_rest == -1, INFINITY, slope.value)
    value = tl.where(listed.legal, value, float("nan"))
    has_kd = (weight != 0) & (term_weights.kd_scale != 0)
    kd = tl.where(has_kd, term_weights.kd_scale * weight.to(R) * value, 0.0)
    ce = tl.full((), 0, R)
    if CE:
        ce = cross_entropy(label, z_y.to(R), shifted.to(R), found.ce_max.to(R), found.ce_rest.to(R), term_weights, V)
    leave_row(kd.to(A), ce.to(A), row_losses, loss, terms, real_options, PER_ROW)

    # Pass 2
    if gradient is not None:
        p_gradient = base_of(gradient, o_gradient, row.phase, GRADIENT_IN_PHASE)
        gradient_pass(
            row, z, p_gradient, listed, b_z, b_slope, slope, found, z_y, label, weight, 1.0, k, option, real_options,
            normalizers, KERNEL_ID, CE, TRANSFORM, BLOCK, GROUP,
        )  # fmt: skip
    if loss is not None and not PER_ROW:
        sum_rows(row_losses, loss, terms, ticket, real_options, normalizers)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def topk_backward_kernel(
    # As above; `stats` is an input
    student,
    teacher,
    ids,
    labels,
    weights,
    real_options,
    normalizers,
    upstream,  # A, [N] or []
    stats,
    gradient,
    ignore_index: tl.int64,
    options_stride,
    upstream_stride,
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
    KERNEL_ID: tl.constexpr,
    TRANSFORM: tl.constexpr,
    SKIP_IF_ONE: tl.constexpr,  # the gradient is right if the upstream is 1
    GRADIENT_IN_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    CE: tl.constexpr = labels is not None
    i_row = tl.program_id(0)
    real_options = options_of(real_options, i_row, options_stride)
    up = tl.load(upstream + i_row.to(tl.int64) * upstream_stride)
    if SKIP_IF_ONE and up == 1:
        return
    option = load_options(real_options, A)
    k = exponent_scale(tl.load(real_options + TEMPERATURE)).to(A)
    label = read_label(labels, i_row, ignore_index, V, CE)
    weight = tl.load(weights + i_row)
    listed = read_list(ids, i_row, weight != 0, K, V, BLOCK_K)

    o_student = first_column(student_o, student_b, student_l, i_row, L)
    o_gradient = first_column(gradient_o, gradient_b, gradient_l, i_row, L)
    row = locate(phase_of(o_student), V, V, 0, 1, False, BLOCK)
    p_student = base_of(student, o_student, row.phase, True)
    p_teacher = teacher + first_column(0, teacher_b, teacher_l, i_row, L)
    p_gradient = base_of(gradient, o_gradient, row.phase, GRADIENT_IN_PHASE)
    active = listed.kd | (label.counted & label.legal)
    z = side_of(p_student, row, V, active, option.softcap, option.scale)

    p_stats = stats + i_row.to(tl.int64) * STATS
    found = take(p_stats)
    b_z, b_slope = logits(z, row.phase + listed.ids, listed.m, A, TRANSFORM, "")
    temperature = tl.load(real_options + TEMPERATURE)
    sharpening = tl.load(real_options + COEFFICIENTS) / tl.load(real_options + TEACHER_TEMPERATURE)
    known = read_teacher(p_teacher, listed, found, sharpening, KERNEL_ID, BLOCK_K)
    slope = divergence(b_z, known, listed, p_teacher, ids, i_row, found, temperature, K, KERNEL_ID, True)
    z_y = tl.load(p_stats + OWN)
    gradient_pass(
        row, z, p_gradient, listed, b_z, b_slope, slope, found, z_y, label, weight, up, k, option, real_options,
        normalizers, KERNEL_ID, CE, TRANSFORM, BLOCK, GROUP,
    )  # fmt: skip
