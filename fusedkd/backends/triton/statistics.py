"""The operator kd_statistics: what rows of logits say of themselves beside the loss.

    q = softmax(z/T), p = softmax(v/T_t)     entropy = log l − Σ q·(z − max z)/T, l = Σ e^{(z − max z)/T}
    log q_y = (z_y − max z)/T − log l         total variation = ½·Σ|p − q|

Two passes over a pair of rows, the second backwards over what the L2 cache holds; one program per row. Bytes per logit
in 16 bit: 8, of the student alone 4.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedkd.backends.layout import KernelId
from fusedkd.backends.schema import accumulation_dtype
from fusedkd.backends.statistics import STATISTICS
from fusedkd.backends.triton.choice import describe, layout
from fusedkd.backends.triton.cross_entropy import read_label
from fusedkd.backends.triton.kd_passes import pair, statistics_pass
from fusedkd.backends.triton.kd_row import Target, softmaxes
from fusedkd.backends.triton.layout import FORWARD_KL
from fusedkd.backends.triton.options import load_options, options_of
from fusedkd.backends.triton.row import (
    aligned,
    base_of,
    first_column,
    in_phase,
    locate,
    logits,
    phase_of,
    side_of,
    stride_of,
)

INTEGERS = ["ignore_index", "options_stride", "N", "L", "C", "student_o", "student_b", "student_l"]
INTEGERS += ["teacher_o", "teacher_b", "teacher_l"]
VECTORS = ["labels", "weights", "real_options", "found"]


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def kd_statistics_kernel(
    # [B, L, V], [B, L, C] (of no use unless OF_TEACHER), [N] or None, [N], float64 [OPTIONS] or [N, OPTIONS]
    student,
    teacher,
    labels,
    weights,
    real_options,
    found,  # A, [5, N]
    ignore_index: tl.int64,
    options_stride,
    N,
    L,
    C,
    student_o,
    student_b: tl.int64,
    student_l: tl.int64,
    teacher_o,
    teacher_b: tl.int64,
    teacher_l: tl.int64,
    OF_TEACHER: tl.constexpr,
    TRANSFORM: tl.constexpr,
    TEACHER_IN_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    A: tl.constexpr = found.dtype.element_ty
    i_row = tl.program_id(0)
    option = load_options(options_of(real_options, i_row, options_stride), A)
    selected = tl.load(weights + i_row) != 0
    label = read_label(labels, i_row, ignore_index, C, labels is not None)
    labelled = selected & label.counted & label.legal

    o_student = first_column(student_o, student_b, student_l, i_row, L)
    o_teacher = first_column(teacher_o, teacher_b, teacher_l, i_row, L)
    row = locate(phase_of(o_student), C, C, 0, 1, False, BLOCK)
    p_student = base_of(student, o_student, row.phase, True)
    p_teacher = base_of(teacher, o_teacher, row.phase, TEACHER_IN_PHASE)
    z = side_of(p_student, row, C, selected, option.softcap, option.scale)
    v = side_of(p_teacher, row, C, selected & OF_TEACHER, option.teacher_softcap, option.teacher_scale)
    nowhere = tl.full((), -1, tl.int32)
    target = Target(column=nowhere, excluded=nowhere, z=tl.full((), 0, A))
    sums, _ = statistics_pass(
        row, z, v, None, target, selected, 0, option, FORWARD_KL, False, TRANSFORM, False, BLOCK, GROUP
    )
    s = softmaxes(sums, option)

    of_student = tl.full((), 0, A)  # Σ q·(z − max z)
    of_teacher = of_student
    apart = of_student
    for ENDS in tl.static_range(1, -1, -1):
        n_blocks = tl.where(selected, row.n_ends if ENDS else row.n_body, 0)
        b_s = tl.zeros([1 if ENDS else BLOCK // GROUP], A)
        b_t = b_s
        b_apart = b_s
        for i in range(n_blocks):
            b = pair(n_blocks - 1 - i, row, z, v, TRANSFORM, "evict_first", ENDS, BLOCK, GROUP)
            b_x = b.student - s.base_s
            b_q = tl.exp2(b_x * s.k_s) * s.r_s
            b_s += tl.sum(tl.where(b_q == 0, 0.0, b_q * b_x), 1)
            if OF_TEACHER:
                b_y = b.teacher - s.base_t
                b_p = tl.exp2(b_y * s.k_t) * s.r_t
                b_t += tl.sum(tl.where(b_p == 0, 0.0, b_p * b_y), 1)
                b_apart += tl.sum(tl.abs(b_p - b_q), 1)
        of_student += tl.sum(b_s)
        of_teacher += tl.sum(b_t)
        apart += tl.sum(b_apart)

    y = row.phase + label.column
    empty = sums.student_rest == -1  # all of them −∞, which is no distribution
    p_found = found + i_row
    stride = tl.cast(N, tl.int64)
    entropy = tl.where(empty, float("nan"), s.log_s - s.c_s * of_student)
    tl.store(p_found, tl.where(selected, entropy, 0.0))
    z_y = logits(z, y, labelled, A, TRANSFORM, "")[0]
    logprob = tl.where(empty, float("nan"), s.c_s * (z_y - s.base_s) - s.log_s)
    tl.store(p_found + 2 * stride, tl.where(labelled, logprob, 0.0))
    if OF_TEACHER:
        tl.store(p_found + stride, tl.where(selected, s.log_t - s.c_t * of_teacher, 0.0))
        v_y = logits(v, y, labelled, A, TRANSFORM, "")[0]
        tl.store(p_found + 3 * stride, tl.where(labelled, s.c_t * (v_y - s.base_t) - s.log_t, 0.0))
        tl.store(p_found + 4 * stride, tl.where(selected, tl.where(empty, float("nan"), 0.5 * apart), 0.0))
    else:
        tl.store(p_found + stride, 0.0)
        tl.store(p_found + 3 * stride, 0.0)
        tl.store(p_found + 4 * stride, 0.0)


def kd_statistics(
    *,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    options: Tensor,
    transform: bool,
    of_teacher: bool,
    columns: int,
    ignore_index: int,
) -> Tensor:
    """The operator of :mod:`fusedkd.backends.schema`."""
    B, L, _ = student.shape
    found = student.new_empty((len(STATISTICS), B * L), dtype=accumulation_dtype(student.dtype))
    teacher = teacher if of_teacher else student
    logits_of_student, at_student = aligned(student)
    logits_of_teacher, at_teacher = aligned(teacher)
    teacher_in_phase = in_phase(at_teacher, at_student, B, L)
    blocks = layout(
        student.dtype,
        columns,
        KernelId.FORWARD_KL,
        teacher=teacher.dtype,
        transform=transform,
        ce=False,
        in_phase=teacher_in_phase,
        hip=describe(student.device).hip,
    )
    if B * L > 0:
        with torch.cuda.device_of(student):
            kd_statistics_kernel[(B * L,)](
                logits_of_student,
                logits_of_teacher,
                labels,
                row_weights,
                options,
                found,
                ignore_index,
                stride_of(options),
                B * L,
                L,
                columns,
                *at_student,
                *at_teacher,
                OF_TEACHER=of_teacher,
                TRANSFORM=transform,
                TEACHER_IN_PHASE=teacher_in_phase,
                **blocks,
            )
    return found
