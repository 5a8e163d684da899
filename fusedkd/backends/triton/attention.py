"""Launches of :mod:`fusedkd.backends.triton.attention_kernel`: the operator ``attention_pairs`` on Triton."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fusedkd.backends.layout import KernelId
from fusedkd.backends.linear_loop import power_above
from fusedkd.backends.products import FLOAT16_TOP
from fusedkd.backends.triton.attention_kernel import (
    attention_keys_kernel,
    attention_queries_kernel,
    attention_statistics_kernel,
)
from fusedkd.backends.triton.choice import FUSED, PROCESSOR_REGISTERS
from fusedkd.backends.triton.row import unspecialized

KERNELS = KernelId.FORWARD_KL, KernelId.LOGIT_MSE
WIDE = 8
"""Elements of an access of 16 bytes, where all rows allow one."""
NARROWEST = 16
"""Columns that matrix units take."""
MSE_UNIT = 64.0
"""Of differences of scores in float16, which has room for those up to 500, and digits for those from 1e-6 on."""


class Tile(NamedTuple):
    """Queries and keys of a tile, and what a program has of a processor."""

    rows: int
    columns: int
    warps: int
    stages: int


TILES = {(2, 64): Tile(64, 32, 4, 2), (2, 128): Tile(32, 32, 4, 2), (4, 64): Tile(16, 16, 8, 2)}
"""By bytes of an element and columns of a head, of the side with more of each. Guesses, none of them measured: what
compiles without a spill and fits into the shared memory of every GPU since sm_80. Of float32, larger tiles spill 8 to
80 bytes a thread with Triton 3.9, and this one 8 where both sides are. Wider heads are left to the loop, as float64 and
the other divergences are: of 256 columns kernels spill, and of 128 those whose products are not tf32's.
"""


def tile_of(*operands: Tensor) -> Tile | None:
    """None where there is no kernel."""
    if any([x.dtype == torch.float64 for x in operands]):
        return None
    width = max(64, *[triton.next_power_of_2(x.shape[3]) for x in operands])
    return TILES.get((max([x.element_size() for x in operands]), width))


def layout(tile: Tile, D: int, teacher_D: int, hip: bool) -> dict[str, Any]:
    """Of the kernels: widths, tile, warps; and the registers there are, for ptxas would rather spill than leave room
    for fewer programs.
    """
    width, teacher_width = (max(NARROWEST, triton.next_power_of_2(d)) for d in (D, teacher_D))
    registers = {} if hip else {"maxnreg": min(PROCESSOR_REGISTERS // (32 * tile.warps), 255)}
    return {
        "D": D,
        "TEACHER_D": teacher_D,
        "WIDTH": width,
        "TEACHER_WIDTH": teacher_width,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "num_warps": tile.warps // 2 if hip else tile.warps,  # of twice as many threads there
        "num_stages": 1 if hip else tile.stages,
        **registers,
    } | FUSED


def attention_pairs(
    *,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    options: Tensor,
    normalizers: Tensor,
    upstream: Tensor | None,
    row_losses: Tensor,
    d_q: Tensor | None,
    d_k: Tensor | None,
    kernel_id: int,
    causal: bool,
) -> bool:
    operands = student_q, student_k, teacher_q, teacher_k
    tile = tile_of(*operands)
    if kernel_id not in KERNELS or tile is None:
        return False
    B, heads, L, D = student_q.shape
    if B * heads * L == 0:
        return True
    softmax, half = kernel_id == KernelId.FORWARD_KL, student_q.dtype == torch.float16
    top = None
    if half and upstream is not None:
        top = power_above(upstream)
        upstream = upstream / top
    stats = row_losses.new_empty(4, B * heads * L) if softmax else None
    strides = [x.stride()[:3] for x in operands]
    unit = WIDE if all([stride % WIDE == 0 for each in strides for stride in each]) else 1
    of_student, of_keys, of_teacher, of_teacher_keys = (unspecialized(n // unit for n in each) for each in strides)
    given: dict[str, Any] = {
        "student_q": student_q,
        "student_k": student_k,
        "teacher_q": teacher_q,
        "teacher_k": teacher_k,
        "rows": rows,
        "keys": keys,
        "real_options": options,
        "stats": stats,
        "L": L,
        "heads": heads,
        "pairs": B * heads,
        "student_strides": of_student,
        "key_strides": of_keys,
        "teacher_strides": of_teacher,
        "teacher_key_strides": of_teacher_keys,
        "CAUSAL": causal,
        "MULTIPLE": unit,
        **layout(tile, D, teacher_q.shape[3], torch.version.hip is not None),
    }
    gradient: dict[str, Any] = {
        "normalizers": normalizers,
        "upstream": upstream,
        "KERNEL_ID": kernel_id,
        "UNIT": (FLOAT16_TOP / 2 if softmax else MSE_UNIT) if half else 1.0,
    }
    queries, of_key_tiles = ((B * heads * triton.cdiv(L, given[name]),) for name in ("ROWS", "COLUMNS"))
    with torch.cuda.device_of(student_q):
        if softmax:
            attention_statistics_kernel[queries](**given)
        attention_queries_kernel[queries](row_losses=row_losses, d_q=d_q, **gradient, **given)
        if d_k is not None:
            attention_keys_kernel[of_key_tiles](d_k=d_k, ADD=d_k is d_q, **gradient, **given)
    if top is not None:
        for each in [d_q] if d_k is d_q else [d_q, d_k]:
            if each is not None:
                each.mul_(top)
    return True
