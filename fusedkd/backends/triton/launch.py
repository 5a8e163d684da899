"""The KD operators of :mod:`fusedkd.backends.schema` on Triton: outputs and launches. Nothing here waits for the GPU. A
forward call is two launches: weights and their counts; the rows and the loss (three for split ones; and one more for
the loss of what `kd_cluster` answers).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fusedkd.backends import linear_loop, products
from fusedkd.backends.call import Call
from fusedkd.backends.composed import whole_loss
from fusedkd.backends.layout import NORMALIZERS, Stat
from fusedkd.backends.schema import losses_and_stats, weights_and_counts
from fusedkd.backends.triton import kd, topk
from fusedkd.backends.triton.choice import FUSED
from fusedkd.backends.triton.result import NO_RESULT, Result, ticket
from fusedkd.backends.triton.row import stride_of, upstream_of
from fusedkd.backends.triton.row_kernels import kd_row_weights_kernel, kd_terms_kernel, linear_unit_kernel
from fusedkd.backends.triton.statistics import kd_statistics as kd_statistics


def kd_row_weights(
    teacher: Tensor,
    ids: Tensor | None,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    normalizers: Tensor | None,
    ignore_index: int,
    kd: bool,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, L, C = teacher.shape
    weights, counts = weights_and_counts(teacher, given)
    programs = max(1, triton.cdiv(B * L, ROWS))
    with torch.cuda.device_of(teacher):
        kd_row_weights_kernel[(programs,)](
            teacher,
            ids,
            labels,
            kd_mask,
            normalizers,
            given,
            weights,
            counts,
            teacher.new_empty(2, programs, dtype=torch.float64),
            ticket(teacher.device),
            ignore_index,
            B * L,
            max(L, 1),  # by which is divided
            C,
            *teacher.stride()[:2],
            KD=kd,
            ROWS=ROWS,
            BLOCK=64,
            num_warps=4,
            **FUSED,
        )
    return weights, counts


SUMMED_ROWS = 2048
"""Of which the last program to finish makes the loss. The losses of more rows it would add up for longer than another
launch takes, which is nothing beside so many rows.
"""
ROWS = 32
"""Of a program of `kd_row_weights_kernel`, whose warps look at a cache line of each at a time."""


def kd_terms(row_losses: Tensor, options: Tensor, normalizers: Tensor, terms: Tensor | None, per_row: bool) -> Tensor:
    n = row_losses.shape[1]
    loss = row_losses.new_empty((n,) if per_row else ())
    programs = triton.cdiv(n, 2048) if per_row else 1
    if programs > 0:
        with torch.cuda.device_of(row_losses):
            kd_terms_kernel[(programs,)](
                *(row_losses, options, normalizers, loss, terms, n, stride_of(options)),
                PER_ROW=per_row,
                BLOCK=2048,
                num_warps=16,
                **FUSED,
            )
    return loss


def linear_unit(
    row_weights: Sequence[Tensor], options: Sequence[Tensor], normalizers: Sequence[Tensor], slopes: Sequence[Tensor]
) -> Tensor:
    """Of one teacher, as most often; of several, or where rows have options of their own, by PyTorch."""
    if len(row_weights) > 1 or options[0].dim() == 2:
        return linear_loop.linear_unit(row_weights, options, normalizers, slopes)
    weights = row_weights[0].flatten().contiguous()  # of attention they are repeated
    found = weights.new_empty(1 + NORMALIZERS, dtype=torch.float64)
    with torch.cuda.device_of(weights):
        linear_unit_kernel[(1,)](
            *(weights, *options, *normalizers, *slopes, found, len(weights)),
            TOP=products.FLOAT16_TOP,
            BLOCK=2048,
            num_warps=16,
            **FUSED,
        )
    return found


def kd_forward(*, gradient: Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor]:
    call = Call(**inputs)
    row_losses, stats = losses_and_stats(call.student, 2, len(Stat))
    _launch(call, stats, row_losses=row_losses, gradient=gradient)
    return row_losses, stats


def forward_loss(
    *, gradient: Tensor | None, terms: Tensor | None, per_row: bool, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """kd_forward and kd_terms, if possible in one launch."""
    call = Call(**inputs)
    row_losses, stats = losses_and_stats(call.student, 2, len(Stat))
    loss = row_losses.new_empty((row_losses.shape[1],) if per_row else ())
    result = NO_RESULT
    shared = call.options.dim() == 1  # else a sum takes the weight of each row
    if per_row or (shared and row_losses.shape[1] <= SUMMED_ROWS):
        result = Result(loss, terms, None if per_row else ticket(loss.device), per_row)
    if _launch(call, stats, row_losses=row_losses, result=result, gradient=gradient):
        return loss, stats
    return kd_terms(row_losses, call.options, call.normalizers, terms, per_row), stats


def kd_backward(*, upstream: Tensor, stats: Tensor, gradient: Tensor, skip_if_one: bool, **inputs: Any) -> None:
    _launch(Call(**inputs), stats, upstream=upstream, gradient=gradient, skip_if_one=skip_if_one)


kd_loss = whole_loss(kd_row_weights, forward_loss)


def kd_shard(
    *,
    upstream: Tensor | None,
    stats: Tensor,
    gradient: Tensor | None,
    skip_if_one: bool,
    stage: int,
    offset: int,
    vocabulary: int,
    **inputs: Any,
) -> None:
    call = Call(**inputs)
    if call.student.shape[0] * call.student.shape[1] > 0:
        place = {"offset": offset, "vocabulary": vocabulary, "STAGE": stage} | upstream_of(upstream, skip_if_one)
        (kd if call.ids is None else topk).launch_shard(call, stats, gradient, **place)


def _launch(call: Call, stats: Tensor, **outputs: Any) -> bool:
    if call.student.shape[0] * call.student.shape[1] == 0:
        return False
    return (kd if call.ids is None else topk).launch(call, stats, **outputs)
