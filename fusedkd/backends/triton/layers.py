"""Launches of :mod:`fusedkd.backends.triton.layers_kernel`: the operators ``layer_*`` on Triton."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedkd.backends import eager
from fusedkd.backends.schema import accumulation_dtype, layers_like
from fusedkd.backends.triton.choice import FUSED, PROCESSOR_REGISTERS
from fusedkd.backends.triton.layers_kernel import (
    layer_attention_kernel,
    layer_distances_backward_kernel,
    layer_distances_kernel,
)
from fusedkd.backends.triton.row import upstream_of

COLUMNS = 16384
"""What the threads of a program hold a few rows of; half of it in float64. Larger rows are left to the definitions."""
ATTENTION_COLUMNS = 8192
"""The same for attention, whose products are made in float64."""


def layer_attention(
    upstream: Tensor | None,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
    buckets: Tensor,
    gradient: Tensor | None,
    teacher_gradient: Tensor | None,
    skip_if_one: bool,
) -> Tensor:
    if _too_wide(student[0], ATTENTION_COLUMNS):
        more = (weights, normalizer, buckets, gradient, teacher_gradient, skip_if_one)
        return eager.layer_attention(upstream, student, teacher, *more)
    A = accumulation_dtype(student[0].dtype)
    losses = student[0].new_empty(student[0].shape[0] * student[0].shape[1], dtype=A)
    sums = teacher_gradient
    if teacher_gradient is not None and teacher_gradient.dtype != A:
        sums = teacher_gradient.to(A)  # with skip_if_one, it is right already
    K = len(teacher)
    _launch(
        layer_attention_kernel,
        student,
        teacher,
        weights=weights,
        normalizer=normalizer,
        buckets=buckets,
        losses=losses,
        gradient=gradient,
        sums=sums,
        N=len(losses),
        LAYERS=triton.next_power_of_2(K),
        **upstream_of(upstream, skip_if_one),
    )
    if teacher_gradient is not None and sums is not None and sums is not teacher_gradient:
        teacher_gradient.copy_(sums)
    return losses


def layer_distances(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor | None, normalizer: Tensor
) -> Tensor:
    if _too_wide(student[0]):
        return eager.layer_distances(student, teacher, weights, normalizer)
    A = accumulation_dtype(student[0].dtype)
    rows = student[0].shape[0] * student[0].shape[1]
    losses = student[0].new_empty((rows, len(student), len(teacher)), dtype=A)
    _launch(layer_distances_kernel, student, teacher, weights=weights, losses=losses)
    return losses.sum(0, dtype=torch.float64).div_(normalizer).to(A)


def layer_distances_backward(
    upstream: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
) -> Tensor:
    if _too_wide(student[0]):
        return eager.layer_distances_backward(upstream, student, teacher, weights, normalizer)
    gradient = layers_like(student)
    _launch(
        layer_distances_backward_kernel,
        student,
        teacher,
        weights=weights,
        normalizer=normalizer,
        factors=upstream,
        gradient=gradient,
        N=student[0].shape[0] * student[0].shape[1],
        A=tl.float64 if student[0].dtype == torch.float64 else tl.float32,
    )
    return gradient


def _too_wide(layer: Tensor, columns: int = COLUMNS) -> bool:
    """Half of it, too, where accesses are narrow."""
    H = layer.shape[2]
    return columns // (2 if layer.dtype == torch.float64 else 1) // (2 if H % 16 else 1) < H


def _launch(kernel: Any, student: Sequence[Tensor], teacher: Sequence[Tensor], **given: Any) -> None:
    """A program per row."""
    B, L, H = student[0].shape
    if B * L == 0:
        return
    student, teacher = _alike(student), _alike(teacher)
    block = max(16, triton.next_power_of_2(H))
    with torch.cuda.device_of(student[0]):
        kernel[(B * L,)](
            student=student,
            teacher=teacher,
            L=L,
            H=H,
            student_b=student[0].stride(0),
            student_l=student[0].stride(1),
            teacher_b=teacher[0].stride(0),
            teacher_l=teacher[0].stride(1),
            M=len(student),
            K=len(teacher),
            BLOCK=block,
            **given,
            **layout(block, student[0].dtype, torch.version.hip is not None),
        )


def layout(block: int, dtype: torch.dtype, hip: bool) -> dict[str, Any]:
    """Warps: 16 columns for a thread, in float64 4, as long as 16 warps hold the row; of AMD's, twice as wide, 8 warps.
    And the registers that there are for them: ptxas would rather spill than leave room for fewer programs.
    """
    warps = max(min(block // (128 if dtype == torch.float64 else 512), 16), 1)
    if hip:
        return {"num_warps": max(warps // 2, 1)} | FUSED
    return {"num_warps": warps, "maxnreg": min(PROCESSOR_REGISTERS // (32 * warps), 255)} | FUSED


def _alike(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """With the same strides: a kernel is told of one layer's."""
    if all([layer.stride() == layers[0].stride() for layer in layers]):
        return tuple(layers)
    return tuple([layer.contiguous() for layer in layers])
