"""The KD operators of :mod:`fusedkd.backends.schema` on Triton: outputs and launches. Nothing here waits for the GPU. A
forward call is four launches: weights, their counts, the rows (three for split ones), the terms.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
from torch import Tensor

from fusedkd.backends.call import Call
from fusedkd.backends.composed import whole_loss
from fusedkd.backends.layout import Stat
from fusedkd.backends.schema import losses_and_stats
from fusedkd.backends.triton import kd, topk
from fusedkd.backends.triton.choice import FUSED
from fusedkd.backends.triton.row_kernels import kd_counts_kernel, kd_row_weights_kernel, kd_terms_kernel


def kd_row_weights(
    teacher: Tensor,
    ids: Tensor | None,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    normalizers: Tensor | None,
    ignore_index: int,
    kd: bool,
) -> tuple[Tensor, Tensor]:
    B, L, C = teacher.shape
    weights = teacher.new_empty(B * L, dtype=torch.float32) if kd else teacher.new_zeros(B * L, dtype=torch.float32)
    counts = teacher.new_empty(2, dtype=torch.float64)
    summed = kd_mask is not None and kd_mask.is_floating_point()
    with torch.cuda.device_of(teacher):
        if kd and B * L > 0:
            strides = teacher.stride()[:2]
            kd_row_weights_kernel[(B * L,)](
                teacher, ids, labels, kd_mask, weights, ignore_index, L, C, *strides, BLOCK=128, num_warps=1, **FUSED
            )
        sizes = ignore_index, B * L
        kd_counts_kernel[(1,)](
            weights, labels, normalizers, counts, *sizes, SUM=summed, BLOCK=8192, num_warps=16, **FUSED
        )
    return weights, counts


def kd_terms(row_losses: Tensor, options: Tensor, normalizers: Tensor, terms: Tensor | None, per_row: bool) -> Tensor:
    n = row_losses.shape[1]
    loss = row_losses.new_empty((n,) if per_row else ())
    programs = triton.cdiv(n, 2048) if per_row else 1
    if programs > 0:
        with torch.cuda.device_of(row_losses):
            kd_terms_kernel[(programs,)](
                row_losses, options, normalizers, loss, terms, n, PER_ROW=per_row, BLOCK=2048, num_warps=16, **FUSED
            )
    return loss


def kd_forward(*, gradient: Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor]:
    call = Call(**inputs)
    row_losses, stats = losses_and_stats(call.student, 2, len(Stat))
    _launch(call, stats, row_losses=row_losses, gradient=gradient)
    return row_losses, stats


def kd_backward(*, upstream: Tensor, stats: Tensor, gradient: Tensor, skip_if_one: bool, **inputs: Any) -> None:
    _launch(Call(**inputs), stats, upstream=upstream, gradient=gradient, skip_if_one=skip_if_one)


kd_loss = whole_loss(kd_row_weights, kd_forward, kd_terms)


def _launch(call: Call, stats: Tensor, **outputs: Any) -> None:
    if call.student.shape[0] * call.student.shape[1] > 0:
        (kd if call.ids is None else topk).launch(call, stats, **outputs)
