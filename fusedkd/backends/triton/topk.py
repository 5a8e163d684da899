"""Launches of :mod:`fusedkd.backends.triton.topk_kernel`, for a teacher known at K columns."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
from torch import Tensor

from fusedkd.backends.layout import TopkKernelId
from fusedkd.backends.triton.call import Call
from fusedkd.backends.triton.choice import FUSED
from fusedkd.backends.triton.rows import UNIT, aligned, in_phase
from fusedkd.backends.triton.topk_kernel import topk_kernel

MARKED = (TopkKernelId.RENORMALIZE, TopkKernelId.BUCKET, TopkKernelId.BUCKET_REVERSE)
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


def launch(
    call: Call,
    stats: Tensor,
    row_losses: Tensor | None = None,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
    skip_if_one: bool = False,
) -> None:
    """With `row_losses`, values, statistics and, if it is given, the gradient; otherwise the gradient alone."""
    B, L, V = call.student.shape
    K = call.teacher.shape[2]
    p_student, o_student = aligned(call.student)
    p_gradient, o_gradient = (None, o_student) if gradient is None else aligned(gradient)
    gradient_in_phase = in_phase(o_gradient, o_student, B, L)
    marks, words = None, 0
    if row_losses is not None and call.kernel_id in MARKED:
        words = triton.cdiv(V + UNIT.value, 1024) * 32  # rows on cache lines of their own
        marks = call.student.new_zeros(B * L, words, dtype=torch.int32)
    with torch.cuda.device_of(call.student):
        topk_kernel[(B * L,)](
            p_student,
            call.teacher,
            call.ids,
            call.labels if call.ce else None,
            call.row_weights,
            call.options,
            call.normalizers,
            upstream,
            row_losses,
            stats,
            p_gradient,
            marks,
            call.ignore_index,
            upstream.stride(0) if upstream is not None and upstream.dim() else 0,
            words,
            L,
            V,
            K,
            *o_student,
            *call.teacher.stride()[:2],
            *o_gradient,
            FORM=call.kernel_id,
            TRANSFORM=call.transform,
            RESCALE=skip_if_one,
            GRADIENT_IN_PHASE=gradient_in_phase,
            **block_options(call.student.dtype, V, K, gradient_in_phase, torch.version.hip is not None),
        )
