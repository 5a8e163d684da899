"""The passes over a pair of rows, student and teacher, of which the kernels of :mod:`fusedkd.backends.triton.kd_kernel`
consist: `statistics_pass`, and `columns_pass` for values, for the gradient, or for both at once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.cross_entropy import add_cross_entropy, scaled
from fusedkd.backends.triton.divergences import divergence
from fusedkd.backends.triton.kd_row import LOWEST, delta_of
from fusedkd.backends.triton.layout import DKD, LOGIT_MSE
from fusedkd.backends.triton.math import INFINITY, LOG2E, exp_at_one, finite_or_zero
from fusedkd.backends.triton.options import exponent_scale, power_of
from fusedkd.backends.triton.row import columns, logits, readable
from fusedkd.backends.triton.softmax import Stats, accumulate, join, merge, nothing


class Pair(NamedTuple):
    """A block of both sides, [G, n]."""

    o: Any
    """Offsets."""
    m: Any
    """Which of them are in the row."""
    teacher: Any
    student: Any
    slope: Any
    """Of the student's soft-cap and scale."""


class Resident(NamedTuple):
    """All of a row, where it stays in registers."""

    body: Any
    ends: Any


@triton.jit
def pair(
    i_block,
    row,
    student,
    teacher,
    TRANSFORM: tl.constexpr,
    POLICY: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    A: tl.constexpr = student.scale.dtype
    o, m = columns(i_block, row, ENDS, BLOCK, GROUP)
    m_teacher = readable(teacher, o, m, ENDS)
    m_student = readable(student, o, m, ENDS)
    b_teacher = logits(teacher, o, m_teacher, A, TRANSFORM, POLICY)[0]
    b_student, b_slope = logits(student, o, m_student, A, TRANSFORM, POLICY)
    return Pair(o=o, m=m, teacher=b_teacher, student=b_student, slope=b_slope)


@triton.jit
def statistics_pass(
    row,
    student,
    teacher,
    resident,  # or None
    target,
    active,
    part,
    option,
    KERNEL_ID: tl.constexpr,
    CE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    SURPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The statistics of this part of the row, and its Σ (z − z_y) if labels are smoothed."""
    A: tl.constexpr = option.temperature.dtype
    EXCLUDES_LABEL: tl.constexpr = KERNEL_ID == DKD
    common = row.phase + row.C
    k_s = exponent_scale(option.temperature)
    k_t = exponent_scale(option.teacher_temperature)
    power = power_of(option.temperature)
    from_y = finite_or_zero(target.z)
    of_student = nothing(BLOCK // GROUP, A)
    of_teacher = nothing(BLOCK // GROUP, A)
    of_surplus = nothing(1, A)  # for CE: the columns of which KD knows nothing
    shifted = tl.full((), 0, A)
    for ENDS in tl.static_range(2):
        n_blocks = 1 if resident is not None else tl.where(active, row.n_ends if ENDS else row.n_body, 0)
        b_shifted = tl.zeros([1 if ENDS else BLOCK // GROUP], A)
        for i in range(n_blocks):
            if resident is not None:
                b = resident.ends if ENDS else resident.body
            else:
                i_block = i + (row.first_ends if ENDS else row.first_body)
                b = pair(i_block, row, student, teacher, TRANSFORM, "evict_last", ENDS, BLOCK, GROUP)
            b_v = b.teacher
            b_z = b.student
            if CE and option.label_smoothing != 0:
                b_shifted += tl.sum(tl.where(b.m & (b.o < student.stop), b_z - from_y, 0.0), 1)
            if EXCLUDES_LABEL:
                b_v = tl.where(b.o == target.excluded, -INFINITY, b_v)
                b_z = tl.where(b.o == target.excluded, -INFINITY, b_z)
            of_teacher = accumulate(of_teacher, b_v, k_t, power, False, FIRST=resident is not None and not ENDS)
            if SURPLUS and ENDS:
                if CE:
                    b_x = tl.where(b.o < common, -INFINITY, b_z)
                    of_surplus = accumulate(of_surplus, b_x, LOG2E, power, False)
                b_z = tl.where(b.o < common, b_z, -INFINITY)
            of_student = accumulate(of_student, b_z, k_s, power, CE, FIRST=resident is not None and not ENDS)
        of_teacher = merge(of_teacher, k_t)
        of_student = merge(of_student, k_s)
        shifted += tl.sum(b_shifted)

    student_max = tl.max(of_student.top)
    ce_max = student_max
    ce_rest = tl.sum(of_student.rest_1)
    if SURPLUS and CE:
        ce_max, ce_rest = join(ce_max, ce_rest, tl.max(of_surplus.top), tl.sum(of_surplus.rest), LOG2E)
    if EXCLUDES_LABEL:
        z_target = tl.where((target.excluded >= 0) & (part == 0), target.z, -INFINITY)
        ce_max, ce_rest = join(ce_max, ce_rest, z_target, tl.where(z_target == -INFINITY, -1.0, 0.0), LOG2E)
    found = Stats(
        student_max=student_max,
        student_rest=tl.sum(of_student.rest),
        other_max=tl.max(of_teacher.top),
        other_rest=tl.sum(of_teacher.rest),
        ce_max=ce_max,
        ce_rest=ce_rest,
    )
    return found, shifted


@triton.jit
def columns_pass(
    row,
    student,
    teacher,
    p_gradient,  # of the row, or None if the gradient is not wanted
    resident,
    target,
    s,  # Softmaxes
    a,  # Coefficients
    gradient,  # Gradient, of no use to values
    KERNEL_ID: tl.constexpr,
    NEEDS_WEIGHT_SUM: tl.constexpr,
    VALUE: tl.constexpr,
    CE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    SURPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes the gradient, if it is wanted. VALUE: returns (D, W) of this part of the row, and walks backwards, while
    the row's end is still in the L2 cache.
    """
    A: tl.constexpr = s.c_s.dtype
    EXCLUDES_LABEL: tl.constexpr = KERNEL_ID == DKD
    GRADIENT: tl.constexpr = p_gradient is not None
    WEIGHS: tl.constexpr = NEEDS_WEIGHT_SUM and KERNEL_ID != LOGIT_MSE
    POLICY: tl.constexpr = "evict_first" if GRADIENT or not NEEDS_WEIGHT_SUM else "evict_last"
    common = row.phase + row.C  # offset at which the common columns end
    if GRADIENT and CE:  # from e^z less the maximum of the common columns, or of all, to q·q₁
        of_common = scaled(gradient.ce.q, s.from_student)
        of_surplus = scaled(gradient.ce.q, s.r_1)
    D = tl.full((), 0, A)
    W = D
    for ENDS in tl.static_range(1, -1, -1):
        n_blocks = 1 if resident is not None else (row.n_ends if ENDS else row.n_body)
        b_D = tl.zeros([1 if ENDS else BLOCK // GROUP], A)
        b_W = b_D
        for i in range(n_blocks):
            if resident is not None:
                b = resident.ends if ENDS else resident.body
            else:
                i_block = n_blocks - 1 - i if VALUE else i
                i_block += row.first_ends if ENDS else row.first_body
                b = pair(i_block, row, student, teacher, TRANSFORM, POLICY, ENDS, BLOCK, GROUP)
            b_v = b.teacher
            b_z = b.student
            if EXCLUDES_LABEL:
                b_v = tl.where(b.o == target.excluded, -INFINITY, b_v)
                b_z = tl.where(b.o == target.excluded, -INFINITY, b_z)
            if SURPLUS and ENDS:
                b_surplus = tl.exp2((tl.where(b.o < common, -INFINITY, b_z) - s.base_1) * LOG2E)
                b_z = tl.where(b.o < common, b_z, -INFINITY)
            b_x = b_z - s.base_s
            b_y = b_v - s.base_t
            b_e = tl.exp2(b_x * s.k_s)
            b_q = b_e * s.r_s
            b_p = tl.exp2(b_y * s.k_t) * s.r_t
            b_delta = delta_of(b_v, b_z, tl.maximum(b_y, LOWEST), s)
            if NEEDS_WEIGHT_SUM:  # a column that both sides mask is ∞ − ∞, which the other forms multiply by p = 0
                b_delta = tl.where(b_v == -INFINITY, tl.where(b_z == -INFINITY, 0.0, -INFINITY), b_delta)
            b_log_p = s.c_t * b_y - s.log_t
            b_log_q = s.c_s * b_x - s.log_s
            b_value, b_w = divergence(b_z, b_v, b_p, b_q, b_delta, b_log_p, b_log_q, a, row.columns, KERNEL_ID)
            if VALUE:
                b_D += tl.sum(b_value, 1)
                if WEIGHS:
                    b_W += tl.sum(b_w, 1)
            if GRADIENT:
                if WEIGHS or EXCLUDES_LABEL:
                    b_w -= b_q * gradient.centre
                b_g = tl.where(gradient.kd == 0, 0.0, gradient.kd * b_w)  # 0, whatever the columns hold
                if SURPLUS and ENDS:
                    b_g = tl.where(b.o < common, b_g, 0.0)
                if CE:
                    b_q1 = scaled(of_common, exp_at_one(b_e, b_x, s.power))
                    if SURPLUS and ENDS:
                        b_q1 += scaled(of_surplus, b_surplus)
                    b_g = add_cross_entropy(b_g, b_q1, b.o, target.column, gradient.ce)
                if EXCLUDES_LABEL:
                    b_g += tl.where(b.o == target.excluded, gradient.kd * gradient.centre, 0.0)
                if TRANSFORM:
                    b_g *= b.slope
                if ENDS and s.c_s.dtype == tl.float64:
                    tl.debug_barrier()  # two warps hold each column: in place, both must have read it
                tl.store(p_gradient + b.o, b_g.to(p_gradient.dtype.element_ty), b.m, eviction_policy="evict_first")
        D += tl.sum(b_D)
        W += tl.sum(b_W)
    return D, W
