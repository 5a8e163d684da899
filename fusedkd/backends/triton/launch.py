"""The KD operators of :mod:`fusedkd.backends.schema` on Triton: outputs and launches. Nothing here waits for the GPU. A
forward call is three launches: weights and their counts, the rows (three for split ones), the terms.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fusedkd.backends.call import Call
from fusedkd.backends.composed import in_turn, whole_loss
from fusedkd.backends.layout import Stat
from fusedkd.backends.schema import losses_and_stats, weights_and_counts
from fusedkd.backends.triton import kd, topk
from fusedkd.backends.triton.choice import FUSED
from fusedkd.backends.triton.row import upstream_of
from fusedkd.backends.triton.row_kernels import kd_row_weights_kernel, kd_terms_kernel


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
    weights, counts = weights_and_counts(teacher)
    programs = max(1, triton.cdiv(B * L, ROWS))
    with torch.cuda.device_of(teacher):
        kd_row_weights_kernel[(programs,)](
            teacher,
            ids,
            labels,
            kd_mask,
            normalizers,
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


def ticket(device: torch.device) -> Tensor:
    """The counter of the programs that are done, 0 between launches: one for each stream, for launches of one follow
    each other; and one of its own for a launch in a CUDA graph, which is replayed anywhere.
    """
    if device.type != "cuda":
        return _ticket(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _ticket(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _ticket(device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int32, device=device)


ROWS = 32
"""Of a program of `kd_row_weights_kernel`, whose warps look at a cache line of each at a time."""


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


kd_loss = whole_loss(kd_row_weights, in_turn(kd_forward, kd_terms))


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


def _launch(call: Call, stats: Tensor, **outputs: Any) -> None:
    if call.student.shape[0] * call.student.shape[1] > 0:
        (kd if call.ids is None else topk).launch(call, stats, **outputs)
