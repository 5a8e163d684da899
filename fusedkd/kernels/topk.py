"""The operators for teachers known at K columns (:mod:`fusedkd.ops`) on :mod:`fusedkd.kernels.topk_kernel`: outputs and
launches. Nothing here waits for the GPU.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
from torch import Tensor

from fusedkd.kernels.choice import FUSED
from fusedkd.kernels.rows import UNIT, aligned, in_phase
from fusedkd.kernels.topk_kernel import topk_kernel
from fusedkd.sparse import SparseForm

MARKED = (SparseForm.RENORMALIZE, SparseForm.BUCKET, SparseForm.BUCKET_REVERSE)
"""The forms whose value or gradient needs the sum over the columns off the list."""


def block_options(dtype: torch.dtype, V: int, K: int, in_phase: bool = True, hip: bool = False) -> dict[str, Any]:
    """Eight columns of a block per thread, groups of one 16-byte access of the student; at most two columns of the list
    per thread.

    Three blocks of 8 warps share an SM, so that some read while others are at their lists, and their rows are still in
    the L2 cache for the second pass. That takes at most 80 registers, which long lists, and a gradient out of step with
    the student, do not fit into.
    """
    wide, block_k = dtype == torch.float64, max(triton.next_power_of_2(K), 16)
    block = min(max(triton.next_power_of_2(V), 512), 2048 if block_k <= 512 or wide else 4096)
    options = {"BLOCK": block, "GROUP": 16 // dtype.itemsize, "BLOCK_K": block_k} | FUSED
    options["num_warps"] = max(block // 256, block_k // 64) // (2 if hip else 1)
    return options if hip or wide else options | {"maxnreg": 80 if in_phase and block_k <= 512 else 128}


def _launch(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    ignore_index: int,
    form: int,
    transform: bool,
    ce: bool,
    *,
    stats: Tensor,
    rows: Tensor | None = None,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
    rescale: bool = False,
) -> None:
    B, L, V = student.shape
    K = teacher.shape[2]
    if B * L == 0:
        return
    p_student, o_student = aligned(student)
    p_gradient, o_gradient = (None, o_student) if gradient is None else aligned(gradient)
    gradient_in_phase = in_phase(o_gradient, o_student, B, L)
    marks, words = None, 0
    if rows is not None and form in MARKED:
        words = triton.cdiv(V + UNIT.value, 1024) * 32  # rows on cache lines of their own
        marks = student.new_zeros(B * L, words, dtype=torch.int32)
    with torch.cuda.device_of(student):
        topk_kernel[(B * L,)](
            p_student,
            teacher,
            ids,
            labels if ce else None,
            weights,
            options,
            normalizers,
            upstream,
            rows,
            stats,
            p_gradient,
            marks,
            ignore_index,
            upstream.stride(0) if upstream is not None and upstream.dim() else 0,
            words,
            L,
            V,
            K,
            *o_student,
            *teacher.stride()[:2],
            *o_gradient,
            FORM=form,
            TRANSFORM=transform,
            RESCALE=rescale,
            GRADIENT_IN_PHASE=gradient_in_phase,
            **block_options(student.dtype, V, K, gradient_in_phase, torch.version.hip is not None),
        )


def _rows_and_stats(student: Tensor) -> tuple[Tensor, Tensor]:
    n, dtype = student.shape[0] * student.shape[1], torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(2, n, dtype=dtype), student.new_empty(n, 8, dtype=dtype)


# -------------------------------------------------- the operators of fusedkd.ops


def topk_forward(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, stats = _rows_and_stats(student)
    gradient = student.new_empty(student.shape) if arguments[-1] else None
    _launch(student, *arguments[:-1], stats=stats, rows=rows, gradient=gradient)
    return rows, stats, student.new_empty(0) if gradient is None else gradient


def topk_forward_(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows, stats = _rows_and_stats(student)
    _launch(student, *arguments, stats=stats, rows=rows, gradient=student)
    return rows, stats


def topk_backward(upstream: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    gradient = student.new_empty(student.shape)
    _launch(student, *arguments[:6], *arguments[7:], stats=arguments[6], upstream=upstream, gradient=gradient)
    return gradient


def topk_rescale_(gradient: Tensor, upstream: Tensor, student: Tensor, *arguments: Any) -> None:
    _launch(
        student, *arguments[:6], *arguments[7:], stats=arguments[6], upstream=upstream, gradient=gradient, rescale=True
    )
