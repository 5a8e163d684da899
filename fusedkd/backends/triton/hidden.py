"""The launch of the kernel for hidden states."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
from torch import Tensor

from fusedkd.backends.composed import hidden_loss as hidden_loss
from fusedkd.backends.layout import HIDDEN_STATS, HiddenDistance, HiddenNormalize
from fusedkd.backends.schema import losses_and_stats
from fusedkd.backends.triton.choice import FUSED, PROCESSOR_REGISTERS
from fusedkd.backends.triton.hidden_kernel import hidden_kernel
from fusedkd.backends.triton.row import upstream_of

HELD_COLUMNS = 8192
"""Of both sides, in the registers of 512 threads: 16 of each side. More are read again for each pass."""
LOOPED_COLUMNS = 2048
"""Of a step of such a pass. Of so many threads, a processor has registers for three programs or more."""
WIDE = 8
"""Elements of an access of 16 bytes, where all rows allow one."""


def layout(wide: bool, columns: int, dtype: torch.dtype, hip: bool, distance: int, normalize: int) -> dict[str, Any]:
    """BLOCK and warps: 8 columns of each side for a thread, 16 of the longest. Not of smooth L1 after layer norm, whose
    sums are most: Triton 3.9 spills.
    """
    many_sums = distance == HiddenDistance.SMOOTH_L1 and normalize == HiddenNormalize.LAYER_NORM
    held = columns <= HELD_COLUMNS // (2 if dtype == torch.float64 or many_sums else 1)
    block = max(triton.next_power_of_2(columns), 64) if held else LOOPED_COLUMNS
    warps = min(max(block // 8 // 32, 1), 16)
    options = {"HELD": held, "BLOCK": block, "num_warps": max(warps // 2, 1) if hip else warps} | FUSED
    if hip or wide:
        return options
    return options | {"maxnreg": min(PROCESSOR_REGISTERS // (32 * warps), 255)}  # or ptxas spills for one more program


def hidden_forward(
    *,
    student: Tensor,
    teacher: list[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
    gradient: Tensor | None,
    distance: int,
    normalize: int,
) -> tuple[Tensor, Tensor]:
    row_losses, stats = losses_and_stats(student, None, HIDDEN_STATS)
    sides: dict[str, Any] = {"student": student, "teacher": teacher, "weights": weights, "normalizer": normalizer}
    kind: dict[str, Any] = {"DISTANCE": distance, "NORMALIZE": normalize}
    _launch(**sides, row_losses=row_losses, stats=stats, gradient=gradient, **upstream_of(None, False), **kind)
    return row_losses, stats


def hidden_backward(
    *,
    upstream: Tensor,
    student: Tensor,
    teacher: list[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
    stats: Tensor,
    gradient: Tensor,
    distance: int,
    normalize: int,
    skip_if_one: bool,
) -> None:
    sides: dict[str, Any] = {"student": student, "teacher": teacher, "weights": weights, "normalizer": normalizer}
    kind: dict[str, Any] = {"DISTANCE": distance, "NORMALIZE": normalize}
    _launch(**sides, row_losses=None, stats=stats, gradient=gradient, **upstream_of(upstream, skip_if_one), **kind)


def _launch(*, student: Tensor, teacher: list[Tensor], stats: Tensor, gradient: Tensor | None, **given: Any) -> None:
    B, L, _ = student.shape
    if B * L == 0:
        return
    rows = [student, *teacher, *([] if gradient is None else [gradient])]
    sizes = [(t.shape[2], *t.stride()[:2]) for t in rows]
    unit = WIDE if all([size % WIDE == 0 for each in sizes for size in each]) else 1
    (H, *of_student), *of_pieces = [[size // unit for size in each] for each in sizes]
    of_gradient = of_pieces.pop()[1:] if gradient is not None else (0, 0)
    widths, teacher_b, teacher_l = (tuple(column) for column in zip(*of_pieces, strict=True))
    with torch.cuda.device_of(student):
        hidden_kernel[(B * L,)](
            student=student,
            teacher=tuple(teacher),
            stats=stats,
            gradient=gradient,
            L=L,
            H=H,
            student_b=of_student[0],
            student_l=of_student[1],
            teacher_b=teacher_b,
            teacher_l=teacher_l,
            widths=widths,
            gradient_b=of_gradient[0],
            gradient_l=of_gradient[1],
            MULTIPLE=unit,
            **given,
            **layout(
                unit == WIDE,
                student.shape[2],
                stats.dtype,
                torch.version.hip is not None,
                given["DISTANCE"],
                given["NORMALIZE"],
            ),
        )
