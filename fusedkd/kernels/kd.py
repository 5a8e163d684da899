"""The KD operators of :mod:`fusedkd.ops` on :mod:`fusedkd.kernels.kd_kernel`: outputs and launches. Nothing here waits
for the GPU.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedkd.kernels.kd_kernel import kd_kernel
from fusedkd.kernels.math import INFINITY
from fusedkd.kernels.rows import aligned, in_phase


@triton.jit(do_not_specialize=["ignore_index", "L", "C", "stride_b", "stride_l"])
def kd_row_weights_kernel(
    teacher,  # [B, L, C]
    labels,  # [N] or None
    kd_mask,  # [N] or None
    weights,  # [N] float32
    ignore_index: tl.int64,
    L,
    C,
    stride_b: tl.int64,
    stride_l: tl.int64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    w = 1.0
    if kd_mask is not None:
        w = tl.load(kd_mask + row)
        w = w.to(tl.float32) if w.dtype.is_floating() else (w != 0).to(tl.float32)
    elif labels is not None:
        w = (tl.load(labels + row) != ignore_index).to(tl.float32)
    # An all −∞ teacher row is not selected. Almost always the first block decides.
    p_row = teacher + (row // L).to(tl.int64) * stride_b + (row % L).to(tl.int64) * stride_l
    end = tl.where(w != 0, C, 0)
    found = 0
    start = 0
    while (found == 0) & (start < end):
        o = start + tl.arange(0, BLOCK)
        b_v = tl.load(p_row + o, o < end, other=-INFINITY)
        found = tl.max((b_v != -INFINITY).to(tl.int32), 0)
        start += BLOCK
    tl.store(weights + row, tl.where(found != 0, w, 0.0))


def block_options(dtype: torch.dtype, V: int, in_phase: bool = True, hip: bool = False) -> dict[str, int]:
    """Eight columns of a block per thread, groups of one 16-byte access of the student.

    Two blocks of 16 warps share an SM, no more, so that their row pairs are still in the L2 cache for the second pass.
    That takes at most 64 registers, which are enough where accesses are wide, but which ptxas does not keep to unasked.
    """
    wide = dtype == torch.float64
    block = min(max(triton.next_power_of_2(V), 512), 2048 if wide else 4096)
    options = {"BLOCK": block, "GROUP": 16 // dtype.itemsize, "num_warps": block // 8 // (64 if hip else 32)}
    return options if hip or wide else options | {"maxnreg": 64 if in_phase else 128}


def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    ignore_index: int,
    transform: bool,
    *,
    stats: Tensor,
    rows: Tensor | None = None,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
    rescale: bool = False,
) -> None:
    B, L, V = student.shape
    C = teacher.shape[2]
    if B * L == 0:
        return
    p_student, o_student = aligned(student)
    p_teacher, o_teacher = aligned(teacher)
    p_gradient, o_gradient = (None, o_student) if gradient is None else aligned(gradient)
    teacher_in_phase = in_phase(o_teacher, o_student, B, L)
    gradient_in_phase = in_phase(o_gradient, o_student, B, L)
    with torch.cuda.device_of(student):
        kd_kernel[(B * L,)](
            p_student,
            p_teacher,
            labels,
            weights,
            options,
            normalizers,
            upstream,
            rows,
            stats,
            p_gradient,
            ignore_index,
            upstream.stride(0) if upstream is not None and upstream.dim() else 0,
            L,
            V,
            C,
            *o_student,
            *o_teacher,
            *o_gradient,
            TRANSFORM=transform,
            SURPLUS=C < V,
            RESCALE=rescale,
            TEACHER_IN_PHASE=teacher_in_phase,
            GRADIENT_IN_PHASE=gradient_in_phase,
            **block_options(student.dtype, V, teacher_in_phase and gradient_in_phase, torch.version.hip is not None),
        )


def _rows_and_stats(student: Tensor) -> tuple[Tensor, Tensor]:
    n, dtype = student.shape[0] * student.shape[1], torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(2, n, dtype=dtype), student.new_empty(n, 6, dtype=dtype)


# -------------------------------------------------- the operators of fusedkd.ops


def kd_row_weights(teacher: Tensor, labels: Tensor | None, kd_mask: Tensor | None, ignore_index: int) -> Tensor:
    B, L, C = teacher.shape
    weights = teacher.new_empty(B * L, dtype=torch.float32)
    if B * L > 0:
        with torch.cuda.device_of(teacher):
            kd_row_weights_kernel[(B * L,)](
                teacher, labels, kd_mask, weights, ignore_index, L, C, *teacher.stride()[:2], BLOCK=128, num_warps=1
            )
    return weights


def kd_forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    ignore_index: int,
    transform: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, stats = _rows_and_stats(student)
    out = student.new_empty(student.shape) if gradient else None
    arguments = (student, teacher, labels, weights, options, normalizers, ignore_index, transform)
    _launch(*arguments, stats=stats, rows=rows, gradient=out)
    return rows, stats, student.new_empty(0) if out is None else out


def kd_forward_(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    ignore_index: int,
    transform: bool,
) -> tuple[Tensor, Tensor]:
    rows, stats = _rows_and_stats(student)
    arguments = (student, teacher, labels, weights, options, normalizers, ignore_index, transform)
    _launch(*arguments, stats=stats, rows=rows, gradient=student)
    return rows, stats


def kd_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    stats: Tensor,
    ignore_index: int,
    transform: bool,
) -> Tensor:
    gradient = student.new_empty(student.shape)
    arguments = (student, teacher, labels, weights, options, normalizers, ignore_index, transform)
    _launch(*arguments, stats=stats, upstream=upstream, gradient=gradient)
    return gradient


def kd_rescale_(
    gradient: Tensor,
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    stats: Tensor,
    ignore_index: int,
    transform: bool,
) -> None:
    arguments = (student, teacher, labels, weights, options, normalizers, ignore_index, transform)
    _launch(*arguments, stats=stats, upstream=upstream, gradient=gradient, rescale=True)
