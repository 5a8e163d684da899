"""One rank's columns of a vocabulary that is split over processes, with a teacher known at K columns of all of it: the
passes of `topk_kernel.py`, each a launch of its own, for between them the statistics are merged with those of the other
ranks (:mod:`fusedkd.backends.shard`). Every rank reads the whole list; of its columns, each rank has its own.

Bytes per logit in 16 bit: 2 for the statistics, 2 + 2 for the gradient; the values read the list alone.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.cross_entropy import Label, read_label
from fusedkd.backends.triton.kd_shard import FAR
from fusedkd.backends.triton.layout import (
    BUCKET,
    BUCKET_REVERSE,
    COEFFICIENTS,
    COLUMNS,
    GAP,
    IGNORE_REVERSE,
    LABEL_STUDENT,
    LABEL_TEACHER,
    OTHER_SUM,
    OWN,
    RENORMALIZE,
    RENORMALIZE_REVERSE,
    SAMPLES,
    SHARD_STATS,
    STATISTICS,
    STATS,
    STUDENT_SUM,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
    VALUE,
    VALUES,
    WEIGHT,
    WEIGHT_SUM,
)
from fusedkd.backends.triton.math import INFINITY, finite_or_zero, reciprocal_or_zero
from fusedkd.backends.triton.options import exponent_scale, load_options, options_of
from fusedkd.backends.triton.row import base_of, first_column, locate, logits, phase_of, side_of
from fusedkd.backends.triton.softmax import Stats, put, take
from fusedkd.backends.triton.topk_list import List, Slope, excess, read_list, read_teacher, summed_samples, tail
from fusedkd.backends.triton.topk_passes import gradient_pass, statistics_pass

INTEGERS = ["ignore_index", "offset", "vocabulary", "upstream_stride", "marks_stride", "L", "V", "K", "student_o"]
INTEGERS += ["student_b", "student_l", "teacher_b", "teacher_l", "gradient_o", "gradient_b", "gradient_l"]
INTEGERS += ["options_stride"]
VECTORS = ["teacher", "ids", "labels", "weights", "real_options", "normalizers", "upstream", "stats", "marks"]


class OfList(NamedTuple):
    value: Any
    """What the own columns of the list add to D, [BLOCK_K]; 0 for the others."""
    weight: Any
    """w of these."""
    q: Any
    beside: Any
    """What the columns off the list add to D, of all ranks."""
    q_c: Any
    """q = q_c·e^((z − max)/T) off the list."""
    ratio: Any
    """log r_s − log r_t."""


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def topk_shard_kernel(
    # [B, L, V], [B, L, K], [N, K], [N] or None, [N]; float64 [OPTIONS] and [2]; A, [N] or [], or None (1)
    student,
    teacher,
    ids,
    labels,
    weights,
    real_options,
    normalizers,
    upstream,
    # A, [N, STATS + SHARD_STATS]: an output of STATISTICS; VALUES adds its own; [B, L, V] or None, may be `student`
    stats,
    gradient,
    marks,  # int32 [N, marks_stride], to be filled: a bit per column; for STATISTICS where an r_s is needed, else None
    ignore_index: tl.int64,
    options_stride,  # from row to row, 0 where all share their options
    offset,  # columns of the ranks before
    vocabulary,  # columns of all ranks
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
    KERNEL_ID: tl.constexpr,
    TRANSFORM: tl.constexpr,
    SKIP_IF_ONE: tl.constexpr,
    STAGE: tl.constexpr,
    GRADIENT_IN_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    R: tl.constexpr = tl.float64
    CE: tl.constexpr = labels is not None
    i_row = tl.program_id(0)
    real_options = options_of(real_options, i_row, options_stride)
    up = 1.0
    if upstream is not None:
        up = tl.load(upstream + i_row.to(tl.int64) * upstream_stride)
        if SKIP_IF_ONE and up == 1:
            return
    option = load_options(real_options, A)
    temperature = tl.load(real_options + TEMPERATURE)
    k = exponent_scale(temperature).to(A)
    given = read_label(labels, i_row, ignore_index, vocabulary, CE)
    column = given.column - offset
    here = given.legal & (column >= 0) & (column < V)
    label = Label(column=tl.where(here, column, FAR), counted=given.counted, legal=given.legal)
    weight = tl.load(weights + i_row)
    listed = read_list(ids, i_row, weight != 0, K, vocabulary, BLOCK_K)
    b_column = listed.ids - offset
    m_own = listed.m & (b_column >= 0) & (b_column < V)
    own = List(
        p_ids=listed.p_ids, ids=tl.where(m_own, b_column, -1), m=m_own, n=listed.n, legal=listed.legal, kd=listed.kd,
        offset=offset,
    )  # fmt: skip
    has_ce = label.counted & label.legal

    o_student = first_column(student_o, student_b, student_l, i_row, L)
    row = locate(phase_of(o_student), V, V, 0, 1, False, BLOCK, vocabulary)
    p_student = base_of(student, o_student, row.phase, True)
    p_teacher = teacher + first_column(0, teacher_b, teacher_l, i_row, L)
    z = side_of(p_student, row, V, listed.kd | has_ce, option.softcap, option.scale)
    p_stats = stats + i_row.to(tl.int64) * (STATS + SHARD_STATS)
    p_shard = p_stats + STATS

    if STAGE == STATISTICS:
        z_y = tl.full((), 0, A)
        if CE:
            z_y = tl.where(here, logits(z, row.phase + label.column, here & has_ce, A, TRANSFORM, "")[0], 0.0)
        p_marks = None
        if marks is not None:
            p_marks = marks + i_row.to(tl.int64) * marks_stride
        found, shifted = statistics_pass(
            row, z, own, p_marks, z_y, k, option, KERNEL_ID, CE, TRANSFORM, BLOCK, GROUP
        )  # fmt: skip
        put(p_stats, 1, found)
        put_in_two(p_stats + STUDENT_SUM, p_stats + WEIGHT_SUM, found.student_rest)
        put_in_two(p_stats + OTHER_SUM, p_stats + OWN, found.other_rest)
        gap = V * (found.ce_max - finite_or_zero(z_y)) - shifted
        gap = tl.where(shifted == -INFINITY, INFINITY, gap)
        tl.store(p_shard + LABEL_STUDENT, z_y)
        tl.store(p_shard + LABEL_TEACHER, 0.0)
        tl.store(p_shard + GAP, tl.where(option.label_smoothing != 0, gap, 0.0))
        tl.store(p_shard + COLUMNS, V.to(A))
        return

    kept = take(p_stats)
    found = Stats(
        student_max=kept.student_max,
        student_rest=(kept.student_rest.to(R) - 1.0) + tl.load(p_stats + WEIGHT_SUM).to(R),
        other_max=kept.other_max,
        other_rest=(kept.other_rest.to(R) - 1.0) + tl.load(p_stats + OWN).to(R),
        ce_max=kept.ce_max,
        ce_rest=kept.ce_rest,
    )
    b_z, b_slope = logits(z, row.phase + own.ids, own.m, A, TRANSFORM, "")
    sharpening = tl.load(real_options + COEFFICIENTS) / tl.load(real_options + TEACHER_TEMPERATURE)
    known = read_teacher(p_teacher, listed, found, sharpening, KERNEL_ID, BLOCK_K)
    of = of_list(b_z, known, own, listed, p_teacher, ids, i_row, found, temperature, K, KERNEL_ID)
    if STAGE == VALUES:
        value = tl.sum(of.value, 0) + tl.where(offset == 0, of.beside, 0.0)
        value = tl.where(found.student_rest == -1, INFINITY, value)
        value = tl.where(listed.legal, value, float("nan"))
        tl.store(p_shard + VALUE, tl.where(weight != 0, value, 0.0).to(A))
        tl.store(p_shard + WEIGHT, tl.sum(of.weight, 0).to(A))
    if gradient is not None:
        value = tl.load(p_shard + VALUE).to(R)
        rest, pull = off_list(of, known, found, value, tl.load(p_shard + WEIGHT).to(R), KERNEL_ID)
        b_d = tl.where(of.q == 0, of.weight, of.weight - of.q * pull)
        slope = Slope(value=value, listed=b_d, rest=rest)
        o_gradient = first_column(gradient_o, gradient_b, gradient_l, i_row, L)
        p_gradient = base_of(gradient, o_gradient, row.phase, GRADIENT_IN_PHASE)
        z_y = tl.load(p_shard + LABEL_STUDENT)
        gradient_pass(
            row, z, p_gradient, own, b_z, b_slope, slope, found, z_y, label, weight, up, k, option, real_options,
            normalizers, KERNEL_ID, CE, TRANSFORM, BLOCK, GROUP,
        )  # fmt: skip


@triton.jit
def put_in_two(p_sum, p_lost, rest):
    """1 + rest, and what its type rounds off."""
    whole = 1.0 + rest
    tl.store(p_sum, whole)
    tl.store(p_lost, rest - (whole - 1.0))


@triton.jit
def of_list(
    b_z, known, own, listed, p_teacher, ids, i_row, stats, temperature, K, KERNEL_ID: tl.constexpr
):  # fmt: skip
    """`topk_list.divergence` of the own columns."""
    R: tl.constexpr = tl.float64
    b_x = b_z.to(R)
    c = 1.0 / temperature
    top = finite_or_zero(stats.student_max)
    total = 1.0 + stats.student_rest
    down = (stats.other_max.to(R) - top) * c
    log_l = tl.log(tl.where(total == 0, 1.0, total))
    q_c = tl.exp(down - log_l)
    log_rs = down + tl.log(1.0 + stats.other_rest) - log_l
    b_lq = (b_x - top) * c - log_l
    b_q = tl.exp(b_lq)
    b_p = known.p
    b_delta = known.log_p - b_lq
    beside = 0.0 * q_c
    ratio = beside
    if (KERNEL_ID == BUCKET) | (KERNEL_ID == BUCKET_REVERSE):
        ratio = log_rs - tl.log(known.tail)
    if (KERNEL_ID == RENORMALIZE) | (KERNEL_ID == BUCKET):
        b_value = excess(b_p, b_q, b_delta)
        b_w = b_q - b_p
        beside = tl.exp(log_rs)
        if KERNEL_ID == BUCKET:
            beside = tail(known.tail, beside, -ratio)
    elif (KERNEL_ID == RENORMALIZE_REVERSE) | (KERNEL_ID == BUCKET_REVERSE):
        b_value = excess(b_q, b_p, -b_delta)
        b_w = tl.where(b_q == 0, 0.0, -b_q * b_delta)
        if KERNEL_ID == BUCKET_REVERSE:
            beside = tail(tl.exp(log_rs), known.tail, ratio)
    elif KERNEL_ID == IGNORE_REVERSE:
        b_qd = tl.where(b_x == -INFINITY, 0.0, b_q * b_delta)
        b_value = -b_qd
        b_w = b_q - b_qd
    else:
        if KERNEL_ID == SAMPLES:
            b_delta = -b_lq
        b_term = tl.where(b_x == -INFINITY, INFINITY, b_p * b_delta)
        b_value = tl.where(known.log_p == (0 if KERNEL_ID == SAMPLES else -INFINITY), 0.0, b_term)
        if KERNEL_ID == SAMPLES:
            b_p = summed_samples(p_teacher, ids, i_row, listed, K)
        b_w = known.mass * b_q - b_p
    return OfList(
        value=tl.where(own.m, b_value, 0.0),
        weight=tl.where(own.m, b_w, 0.0),
        q=tl.where(own.m, b_q, 0.0),
        beside=beside,
        q_c=q_c,
        ratio=ratio,
    )


@triton.jit
def off_list(of, known, stats, value, weight, KERNEL_ID: tl.constexpr):
    """∂D/∂s off the list, over e^((z − max)/T), and W: on the list it is w − q·W; from D and Σw of all ranks."""
    pull = 0.0 * of.q_c
    rest = of.q_c
    if KERNEL_ID == BUCKET:
        rest = of.q_c - known.tail * reciprocal_or_zero(stats.other_rest)
    elif KERNEL_ID == RENORMALIZE_REVERSE:
        rest = pull
        pull = value
    elif KERNEL_ID == BUCKET_REVERSE:
        rest = tl.where(stats.other_rest == -1, 0.0, (of.ratio - value) * of.q_c)
        pull = value
    elif KERNEL_ID == IGNORE_REVERSE:
        rest = -weight * of.q_c
        pull = weight
    elif KERNEL_ID != RENORMALIZE:
        rest = known.mass * of.q_c
    return rest, pull
