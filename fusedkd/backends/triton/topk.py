"""Launches of :mod:`fusedkd.backends.triton.topk_kernel`, for a teacher known at K columns."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
from torch import Tensor

from fusedkd.backends.call import Call
from fusedkd.backends.layout import Stage, TopkKernelId
from fusedkd.backends.triton.choice import FUSED
from fusedkd.backends.triton.result import NO_RESULT, Result
from fusedkd.backends.triton.row import UNIT, aligned, in_phase, stride_of, upstream_of
from fusedkd.backends.triton.topk_kernel import topk_backward_kernel, topk_forward_kernel
from fusedkd.backends.triton.topk_shard import topk_shard_kernel

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


def launch_shard(call: Call, stats: Tensor, gradient: Tensor | None, **place: Any) -> None:
    """A stage of one rank's columns of a vocabulary; `place`: what the kernel is told of both, and of the upstream."""
    rows, given = call.student.shape[0] * call.student.shape[1], _given(call, stats, gradient)
    with torch.cuda.device_of(call.student):
        marks, words = _marks(call) if place["STAGE"] == Stage.STATISTICS else (None, 0)
        topk_shard_kernel[(rows,)](**given, **place, marks=marks, marks_stride=words)


def launch(
    call: Call,
    stats: Tensor,
    row_losses: Tensor | None = None,
    result: Result = NO_RESULT,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
    skip_if_one: bool = False,
) -> bool:
    """With `row_losses`, values, statistics and, if it is given, the gradient; otherwise the gradient alone. Whether
    `result` is there.
    """
    B, L, _ = call.student.shape
    given = _given(call, stats, gradient)
    with torch.cuda.device_of(call.student):
        if row_losses is None:
            assert upstream is not None
            topk_backward_kernel[(B * L,)](**given, **upstream_of(upstream, skip_if_one))
            return False
        marks, words = _marks(call)
        of_forward = {"row_losses": row_losses, "marks": marks, "marks_stride": words} | result._asdict()
        topk_forward_kernel[(B * L,)](**given, **of_forward)
    return result.loss is not None


def _marks(call: Call) -> tuple[Tensor | None, int]:
    """Memory for a bit per column of each row, in so many words, where the kernel needs them."""
    if call.kernel_id not in MARKED:
        return None, 0
    B, L, V = call.student.shape
    words = triton.cdiv(V + UNIT.value, 1024) * 32  # rows on cache lines of their own
    return call.student.new_empty(B * L, words, dtype=torch.int32), words


def _given(call: Call, stats: Tensor, gradient: Tensor | None) -> dict[str, Any]:
    """What all kernels are given."""
    B, L, V = call.student.shape
    K = call.teacher.shape[2]
    student, (student_o, student_b, student_l) = aligned(call.student)
    to, (gradient_o, gradient_b, gradient_l) = (None, (0, 0, 0)) if gradient is None else aligned(gradient)
    at_student, at_gradient = (student_o, student_b, student_l), (gradient_o, gradient_b, gradient_l)
    gradient_in_phase = gradient is None or in_phase(at_gradient, at_student, B, L)
    return {
        "student": student,
        "teacher": call.teacher,
        "ids": call.ids,
        "labels": call.labels if call.ce else None,
        "weights": call.row_weights,
        "real_options": call.options,
        "normalizers": call.normalizers,
        "stats": stats,
        "gradient": to,
        "ignore_index": call.ignore_index,
        "options_stride": stride_of(call.options),
        "L": L,
        "V": V,
        "K": K,
        "student_o": student_o,
        "student_b": student_b,
        "student_l": student_l,
        "teacher_b": call.teacher.stride(0),
        "teacher_l": call.teacher.stride(1),
        "gradient_o": gradient_o,
        "gradient_b": gradient_b,
        "gradient_l": gradient_l,
        "KERNEL_ID": int(call.kernel_id),
        "TRANSFORM": call.transform,
        "GRADIENT_IN_PHASE": gradient_in_phase,
        **block_options(call.student.dtype, V, K, gradient_in_phase, torch.version.hip is not None),
    }
