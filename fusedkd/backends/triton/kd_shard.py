"""One rank's columns of a vocabulary that is split over processes (:mod:`fusedkd.backends.shard`): the passes of
`kd_kernel.py`, each a launch of its own, for between them the statistics are merged with those of the other ranks.

Bytes per logit in 16 bit: 4 for the statistics, 4 for the values, and 6 for the gradient, which comes with the values
where it waits for nothing: 10 or 14.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.cross_entropy import Label, read_label
from fusedkd.backends.triton.kd_passes import columns_pass, statistics_pass
from fusedkd.backends.triton.kd_row import (
    Target,
    all_masked,
    excluded_label,
    gradient_of,
    needs_label,
    softmaxes,
    target_of,
    terms_of,
)
from fusedkd.backends.triton.layout import (
    COLUMNS,
    DKD,
    GAP,
    GRADIENT,
    LABEL_STUDENT,
    LABEL_TEACHER,
    LOGIT_MSE,
    OWN,
    SHARD_STATS,
    STATISTICS,
    STATS,
    VALUE,
    VALUES,
    WEIGHT,
    WEIGHT_SUM,
)
from fusedkd.backends.triton.math import INFINITY, finite_or_zero
from fusedkd.backends.triton.options import load_coefficients, load_options, load_weights, options_of
from fusedkd.backends.triton.row import base_of, first_column, locate, logits, phase_of, side_of
from fusedkd.backends.triton.softmax import no_stats, put, take

INTEGERS = ["ignore_index", "offset", "vocabulary", "upstream_stride", "L", "V", "student_o", "student_b", "student_l"]
INTEGERS += ["teacher_o", "teacher_b", "teacher_l", "gradient_o", "gradient_b", "gradient_l", "options_stride"]
VECTORS = ["labels", "weights", "real_options", "normalizers", "upstream", "stats"]

FAR = tl.constexpr(1 << 30)
"""The column of a label that another rank has: beyond any row."""


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def kd_shard_kernel(
    # [B, L, V], [B, L, V], [N] or None, [N]; float64 [OPTIONS] and [2]; A, [N] or [], or None (1)
    student,
    teacher,
    labels,
    weights,
    real_options,
    normalizers,
    upstream,
    # A, [N, STATS + SHARD_STATS]: an output of STATISTICS; VALUES adds its own; [B, L, V] or None, may be `student`
    stats,
    gradient,
    ignore_index: tl.int64,
    options_stride,  # from row to row, 0 where all share their options
    offset,  # columns of the ranks before
    vocabulary,  # columns of all ranks
    upstream_stride,
    L,
    V,
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
    SKIP_IF_ONE: tl.constexpr,  # the gradient is right if the upstream is 1
    STAGE: tl.constexpr,
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
    p_stats = stats + i_row.to(tl.int64) * (STATS + SHARD_STATS)
    p_shard = p_stats + STATS
    option = load_options(real_options, A)
    given = read_label(labels, i_row, ignore_index, vocabulary, CE)
    column = given.column - offset
    here = given.legal & (column >= 0) & (column < V)
    label = Label(column=tl.where(here, column, FAR), counted=given.counted, legal=given.legal)
    term = terms_of(tl.load(weights + i_row).to(A), label, FAR + 1, EXCLUDES_LABEL)

    o_student = first_column(student_o, student_b, student_l, i_row, L)
    o_teacher = first_column(teacher_o, teacher_b, teacher_l, i_row, L)
    o_gradient = first_column(gradient_o, gradient_b, gradient_l, i_row, L)
    row = locate(phase_of(o_student), V, V, 0, 1, False, BLOCK, vocabulary)
    p_student = base_of(student, o_student, row.phase, True)
    p_teacher = base_of(teacher, o_teacher, row.phase, TEACHER_IN_PHASE)
    z = side_of(p_student, row, V, term.active, option.softcap, option.scale)
    v = side_of(p_teacher, row, V, term.kd, option.teacher_softcap, option.teacher_scale)
    p_gradient = None
    if gradient is not None:
        p_gradient = base_of(gradient, o_gradient, row.phase, GRADIENT_IN_PHASE)

    if STAGE == STATISTICS:
        z_y = tl.full((), 0, A)
        v_y = z_y
        if CE or EXCLUDES_LABEL:
            m_y = here & needs_label(term, EXCLUDES_LABEL)
            z_y = tl.where(m_y, logits(z, row.phase + label.column, m_y, A, TRANSFORM, "")[0], 0.0)
        if EXCLUDES_LABEL:
            m_y = here & term.kd & term.target
            v_y = tl.where(m_y, logits(v, row.phase + label.column, m_y, A, TRANSFORM, "")[0], 0.0)
        target = target_of(label, term, z_y, row.phase, EXCLUDES_LABEL)
        own = Target(column=target.column, excluded=tl.where(here, target.excluded, -1), z=target.z)
        found = no_stats(A)
        gap = tl.full((), 0, A)
        if CE or KERNEL_ID != LOGIT_MSE:
            found, shifted = statistics_pass(
                row, z, v, None, own, term.active, 0, option, KERNEL_ID, CE, TRANSFORM, False, BLOCK, GROUP
            )
            gap = V * (found.ce_max - finite_or_zero(own.z)) - shifted
            gap = tl.where(shifted == -INFINITY, INFINITY, gap)
        put(p_stats, 1, found)
        tl.store(p_stats + WEIGHT_SUM, 0.0)
        tl.store(p_stats + OWN, 0.0)
        tl.store(p_shard + LABEL_STUDENT, z_y)
        tl.store(p_shard + LABEL_TEACHER, v_y)
        tl.store(p_shard + GAP, tl.where(option.label_smoothing != 0, gap, 0.0))
        tl.store(p_shard + COLUMNS, V.to(A))
        return

    found = take(p_stats)
    target = target_of(label, term, tl.load(p_shard + LABEL_STUDENT), row.phase, EXCLUDES_LABEL)
    term_weights = load_weights(real_options, A)
    a = load_coefficients(real_options, A)
    s = softmaxes(found, option)
    D_y = tl.full((), 0, A)
    centre = D_y
    if STAGE == GRADIENT:
        centre = tl.load(p_stats + WEIGHT_SUM)
    if EXCLUDES_LABEL:
        a, D_y, centre = excluded_label(a, tl.load(p_shard + LABEL_TEACHER), target, s)
    slope = gradient_of(up, term, target, found, s, centre, term_weights, normalizers, vocabulary, CE)
    D, W = columns_pass(
        row, z, v, p_gradient, None, target, s, a, slope,
        KERNEL_ID, NEEDS_WEIGHT_SUM, STAGE == VALUES, CE, TRANSFORM, False, BLOCK, GROUP,
    )  # fmt: skip
    if STAGE == VALUES:
        D = tl.where(all_masked(found, target), INFINITY, D + tl.where(here, D_y, 0.0))
        if EXCLUDES_LABEL:
            D = tl.where(term.target, D, float("nan"))
        tl.store(p_shard + VALUE, tl.where(term.kd, D, 0.0))
        tl.store(p_shard + WEIGHT, tl.where(term.kd, W, 0.0))
