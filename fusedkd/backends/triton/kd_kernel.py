"""Knowledge distillation from logits: a divergence of :mod:`fusedkd.backends.triton.divergences` and cross-entropy.
`kd_forward_kernel` takes values and gradient in two or three passes over each row, `kd_backward_kernel` the gradient
from the statistics that forward left, in one.

Row i has student logits z [V] and teacher logits v [C], C ≤ V: the KD term lives on the first C columns, CE on all V.

    q = softmax(z/T_s), p = softmax(v/T_t), q₁ = softmax(z)                     δ = log p − log q
    D = Σ value(p, q, δ), every value ≥ 0; w(p, q, δ), W = Σ w                  CE: see `cross_entropy.py`
    ∂/∂z = A_kd·(w − q·W) + A_ce·(q₁ − (1 − ε)·1_y − ε/V)                       A: weight · scale · upstream / rows

Pass 1 takes the maxima and sums (max, l = Σ e^{(x − max)/T}) of both sides. Pass 2 runs backwards over the row, while
its end is still in the L2 cache, and takes D, and writes the gradient if W is known beforehand (0 for forward KL).
Otherwise it takes W, and pass 3, forwards again, writes the gradient. DKD excludes the label's column: both sides mask
it in every pass, and what it adds is scalar.

Bytes per logit in 16 bit: 4 for each pass and 2 for the gradient, 10 or 14, of which pass 1 alone comes from memory
while all resident row pairs fit into L2 (V up to about 32 K). RESIDENT keeps the row pair in registers instead: 6,
whatever the divergence. Backward: 6.

One program per row, no barrier inside a loop. SPLIT divides the row among the programs of the grid's second dimension,
where there are fewer rows than processors: a launch per STAGE, each of which merges what the one before it left, always
in the same order. The reversed pass 2 is that of llm.c's fused_classifier, the loss with its gradient in the forward
call that of Liger (arXiv:2410.10989). The same in 60 lines: `kd_naive.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.cross_entropy import cross_entropy, read_label
from fusedkd.backends.triton.kd_passes import Resident, columns_pass, pair, statistics_pass
from fusedkd.backends.triton.kd_row import (
    all_masked,
    excluded_label,
    gradient_of,
    needs_label,
    softmaxes,
    target_of,
    terms_of,
)
from fusedkd.backends.triton.last import leave_row, sum_rows
from fusedkd.backends.triton.layout import DKD, LOGIT_MSE, OWN, STATS, WEIGHT_SUM
from fusedkd.backends.triton.math import INFINITY
from fusedkd.backends.triton.options import load_coefficients, load_options, load_weights, options_of
from fusedkd.backends.triton.row import base_of, first_column, locate, logits, phase_of, side_of
from fusedkd.backends.triton.softmax import merged, no_stats, put, take, total_of_parts

INTEGERS = ["ignore_index", "upstream_stride", "parts", "L", "V", "C", "student_o", "student_b", "student_l"]
INTEGERS += ["teacher_o", "teacher_b", "teacher_l", "gradient_o", "gradient_b", "gradient_l", "options_stride"]
VECTORS = ["labels", "weights", "real_options", "normalizers", "upstream", "row_losses", "stats", "partials"]
VECTORS += ["loss", "terms", "ticket"]

WHOLE, STATISTICS, VALUES, FINISH = (tl.constexpr(i) for i in range(4))
"""STAGE. WHOLE: all that is asked for in one launch. The others, of a split row, follow one another: STATISTICS of each
part; VALUES of each part, and the gradient if W is known beforehand; FINISH, by one program per row, the row's losses.
Where the gradient waits for W, `kd_backward_kernel` comes last.
"""

VALUE_SUM = tl.constexpr(STATS.value)
SHIFTED_SUM = tl.constexpr(STATS.value + 1)
PARTIALS = tl.constexpr(STATS.value + 2)
"""What a part of a split row leaves: statistics as in :class:`fusedkd.backends.layout.Stat`, W among them, D, and
Σ (z − z_y).
"""


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def kd_forward_kernel(
    # Inputs: [B, L, V], [B, L, C], [N] or None, [N]; float64 [OPTIONS] and [2]
    student,
    teacher,
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
    # From stage to stage: A, [N, PARTIALS, parts], or None
    partials,
    # Sizes; first element and strides, in elements. Never specialised, nor is where a vector starts: one binary serves
    # every shape and every slice. The three pointers to logits are aligned (`aligned`).
    ignore_index: tl.int64,
    options_stride,  # from row to row, 0 where all share their options
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
    KERNEL_ID: tl.constexpr,
    NEEDS_WEIGHT_SUM: tl.constexpr,  # the gradient does, or waits for D: one more pass
    CE: tl.constexpr,
    TRANSFORM: tl.constexpr,  # soft-cap or scale the logits
    SURPLUS: tl.constexpr,  # C < V
    RESIDENT: tl.constexpr,  # BLOCK ≥ C
    SPLIT: tl.constexpr,
    STAGE: tl.constexpr,
    PER_ROW: tl.constexpr,  # the loss is
    TEACHER_IN_PHASE: tl.constexpr,  # rows start at the same column modulo UNIT as the student's
    GRADIENT_IN_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    EXCLUDES_LABEL: tl.constexpr = KERNEL_ID == DKD
    i_row = tl.program_id(0)
    real_options = options_of(real_options, i_row, options_stride)
    part = tl.program_id(1)
    p_stats = stats + i_row.to(tl.int64) * STATS
    if SPLIT:
        p_partials = partials + i_row.to(tl.int64) * PARTIALS * parts
    option = load_options(real_options, A)
    label = read_label(labels, i_row, ignore_index, V, CE)
    term = terms_of(tl.load(weights + i_row).to(A), label, C, EXCLUDES_LABEL)

    o_student = first_column(student_o, student_b, student_l, i_row, L)
    o_teacher = first_column(teacher_o, teacher_b, teacher_l, i_row, L)
    o_gradient = first_column(gradient_o, gradient_b, gradient_l, i_row, L)
    row = locate(phase_of(o_student), V, C, part, parts, SPLIT, BLOCK)
    p_student = base_of(student, o_student, row.phase, True)
    p_teacher = base_of(teacher, o_teacher, row.phase, TEACHER_IN_PHASE)
    z = side_of(p_student, row, V, term.active, option.softcap, option.scale)
    v = side_of(p_teacher, row, C, term.kd, option.teacher_softcap, option.teacher_scale)
    p_gradient = None
    if gradient is not None:
        p_gradient = base_of(gradient, o_gradient, row.phase, GRADIENT_IN_PHASE)

    # The label's logits, before anything overwrites them
    z_y = tl.full((), 0, A)
    v_y = z_y
    if STAGE >= VALUES:
        z_y = tl.load(p_stats + OWN)
    elif CE or EXCLUDES_LABEL:
        z_y = logits(z, row.phase + label.column, needs_label(term, EXCLUDES_LABEL), A, TRANSFORM, "")[0]
    if EXCLUDES_LABEL:
        v_y = logits(v, row.phase + label.column, term.kd & term.target, A, TRANSFORM, "")[0]
    target = target_of(label, term, z_y, row.phase, EXCLUDES_LABEL)
    resident = None
    if RESIDENT:
        resident = Resident(
            body=pair(0, row, z, v, TRANSFORM, "evict_first", False, BLOCK, GROUP),
            ends=pair(0, row, z, v, TRANSFORM, "evict_first", True, BLOCK, GROUP),
        )

    # Pass 1
    shifted = tl.full((), 0, A)
    if STAGE == VALUES:
        found = merged(p_partials, parts, option)
    elif STAGE == FINISH:
        found = take(p_stats)
        shifted = total_of_parts(p_partials + SHIFTED_SUM * parts, parts)
    elif CE or KERNEL_ID != LOGIT_MSE:
        found, shifted = statistics_pass(
            row, z, v, resident, target, term.active, part, option, KERNEL_ID, CE, TRANSFORM, SURPLUS, BLOCK, GROUP
        )
    else:
        found = no_stats(A)
    if STAGE == STATISTICS:
        put(p_partials + part, parts, found)
        tl.store(p_partials + SHIFTED_SUM * parts + part, shifted)
        if part == 0:
            tl.store(p_stats + OWN, z_y)
        return
    if STAGE == WHOLE:
        tl.store(p_stats + OWN, z_y)
    if STAGE != FINISH and part == 0:
        put(p_stats, 1, found)

    # Pass 2
    term_weights = load_weights(real_options, A)
    a = load_coefficients(real_options, A)
    s = softmaxes(found, option)
    D_y = tl.full((), 0, A)  # what the excluded label adds
    centre = D_y
    if EXCLUDES_LABEL:
        a, D_y, centre = excluded_label(a, v_y, target, s)
    if STAGE == FINISH:
        D = total_of_parts(p_partials + VALUE_SUM * parts, parts)
        W = total_of_parts(p_partials + WEIGHT_SUM * parts, parts)
    else:
        early = None if NEEDS_WEIGHT_SUM else p_gradient
        slope = gradient_of(1.0, term, target, found, s, centre, term_weights, normalizers, V, CE)
        D, W = columns_pass(
            row, z, v, early, resident, target, s, a, slope,
            KERNEL_ID, NEEDS_WEIGHT_SUM, True, CE, TRANSFORM, SURPLUS, BLOCK, GROUP,
        )  # fmt: skip
    if STAGE == VALUES:
        tl.store(p_partials + VALUE_SUM * parts + part, D)
        tl.store(p_partials + WEIGHT_SUM * parts + part, W)
        return
    D = tl.where(all_masked(found, target), INFINITY, D + D_y)
    if NEEDS_WEIGHT_SUM:
        W = tl.where(tl.abs(D) < INFINITY, W, D)  # NaN too: the gradient shows what the value does
    tl.store(p_stats + WEIGHT_SUM, W)

    # Pass 3
    if STAGE == WHOLE and NEEDS_WEIGHT_SUM and gradient is not None:
        slope = gradient_of(1.0, term, target, found, s, W, term_weights, normalizers, V, CE)
        columns_pass(
            row, z, v, p_gradient, resident, target, s, a, slope,
            KERNEL_ID, NEEDS_WEIGHT_SUM, False, CE, TRANSFORM, SURPLUS, BLOCK, GROUP,
        )  # fmt: skip

    if EXCLUDES_LABEL:
        D = tl.where(term.target, D, float("nan"))
    D = tl.where(D < 0, 0.0, D)
    D = tl.where(term.kd & (term_weights.kd_scale != 0), term_weights.kd_scale * term.weight * D, 0.0)
    ce = tl.full((), 0, A)
    if CE:
        ce = cross_entropy(label, z_y, shifted, found.ce_max, found.ce_rest, term_weights, V)
    leave_row(D, ce, row_losses, loss, terms, real_options, PER_ROW)
    if loss is not None and not PER_ROW:
        sum_rows(row_losses, loss, terms, ticket, real_options, normalizers)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def kd_backward_kernel(
    # As above; `stats` is an input
    student,
    teacher,
    labels,
    weights,
    real_options,
    normalizers,
    upstream,  # A, [N] or [], or None (1)
    stats,
    gradient,
    ignore_index: tl.int64,
    options_stride,
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
    KERNEL_ID: tl.constexpr,
    NEEDS_WEIGHT_SUM: tl.constexpr,
    CE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    SURPLUS: tl.constexpr,
    SKIP_IF_ONE: tl.constexpr,  # the gradient is right if the upstream is 1
    SPLIT: tl.constexpr,
    TEACHER_IN_PHASE: tl.constexpr,
    GRADIENT_IN_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    EXCLUDES_LABEL: tl.constexpr = KERNEL_ID == DKD
    i_row = tl.program_id(0)
    real_options = options_of(real_options, i_row, options_stride)
    up = 1.0
    if upstream is not None:
        up = tl.load(upstream + i_row.to(tl.int64) * upstream_stride)
        if SKIP_IF_ONE and up == 1:
            return
    p_stats = stats + i_row.to(tl.int64) * STATS
    found = take(p_stats)
    option = load_options(real_options, A)
    label = read_label(labels, i_row, ignore_index, V, CE)
    term = terms_of(tl.load(weights + i_row).to(A), label, C, EXCLUDES_LABEL)

    o_student = first_column(student_o, student_b, student_l, i_row, L)
    o_teacher = first_column(teacher_o, teacher_b, teacher_l, i_row, L)
    o_gradient = first_column(gradient_o, gradient_b, gradient_l, i_row, L)
    row = locate(phase_of(o_student), V, C, tl.program_id(1), parts, SPLIT, BLOCK)
    p_student = base_of(student, o_student, row.phase, True)
    p_teacher = base_of(teacher, o_teacher, row.phase, TEACHER_IN_PHASE)
    p_gradient = base_of(gradient, o_gradient, row.phase, GRADIENT_IN_PHASE)
    z = side_of(p_student, row, V, term.active, option.softcap, option.scale)
    v = side_of(p_teacher, row, C, term.kd, option.teacher_softcap, option.teacher_scale)

    term_weights = load_weights(real_options, A)
    a = load_coefficients(real_options, A)
    s = softmaxes(found, option)
    target = target_of(label, term, tl.load(p_stats + OWN), row.phase, EXCLUDES_LABEL)
    centre = tl.load(p_stats + WEIGHT_SUM)
    if EXCLUDES_LABEL:
        v_y = logits(v, row.phase + label.column, term.kd & term.target, A, TRANSFORM, "")[0]
        a, _, centre = excluded_label(a, v_y, target, s)
    slope = gradient_of(up, term, target, found, s, centre, term_weights, normalizers, V, CE)
    columns_pass(
        row, z, v, p_gradient, None, target, s, a, slope,
        KERNEL_ID, NEEDS_WEIGHT_SUM, False, CE, TRANSFORM, SURPLUS, BLOCK, GROUP,
    )  # fmt: skip
