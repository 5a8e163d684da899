"""The Gumbel operators of :mod:`fusedkd.backends.schema` on Triton: outputs and launches."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
from torch import Tensor

from fusedkd.backends.schema import ids_and_stats
from fusedkd.backends.triton.gumbel_kernel import gumbel_backward_kernel, gumbel_forward_kernel

OPTIONS = {"COUNTERS": 512, "num_warps": 8, "enable_fp_fusion": False}
"""Two counters of a thread, eight columns. Without fused multiply-adds: the noise is the same on every device."""


def gumbel_forward(logits: Tensor, seed: Tensor, temperature: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    _, rows, columns = logits.shape
    ids, stats = ids_and_stats(logits, rows, logits.dtype)
    if rows > 0:
        with torch.cuda.device_of(logits):
            gumbel_forward_kernel[(rows,)](
                logits, ids, stats, seed, temperature, columns, logits.stride(1), first_row, **OPTIONS
            )
    return ids, stats


def gumbel_backward(
    logits: Tensor,
    slopes: Tensor,
    ids: Tensor,
    stats: Tensor,
    seed: Tensor,
    temperature: Tensor,
    scale: Tensor,
    first_row: int,
) -> None:
    _, rows, columns = logits.shape
    if rows > 0:
        with torch.cuda.device_of(logits):
            gumbel_backward_kernel[(rows,)](
                logits,
                slopes,
                ids,
                stats,
                seed,
                temperature,
                scale,
                columns,
                logits.stride(1),
                slopes.stride(1),
                first_row,
                **OPTIONS,
            )
