"""The launch of the kernel for hidden states."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fusedkd.backends.composed import hidden_loss as hidden_loss
from fusedkd.backends.layout import HiddenDistance, HiddenNormalize
from fusedkd.backends.schema import by_layer, layers_and_stats
from fusedkd.backends.triton.choice import FUSED, PROCESSOR_REGISTERS
from fusedkd.backends.triton.hidden_kernel import hidden_kernel
from fusedkd.backends.triton.row import unspecialized, upstream_of

HELD_COLUMNS = 8192
"""Of both sides, in the registers of 512 threads: 16 of each side. More are read again for each pass."""
LOOPED_COLUMNS = 2048
"""Of a step of such a pass. Of so many threads, a processor has registers for three programs or more."""
MOST_ROWS = 96
"""Pointers of a launch: 32 layers with a gradient. With two strides each, half of what a kernel is given at most."""
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
    student: list[Tensor],
    teacher: list[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
    layer_weights: Tensor,
    gradient: list[Tensor],
    distance: int,
    normalize: int,
) -> tuple[Tensor, Tensor]:
    row_losses, stats = layers_and_stats(student)
    _launch(
        _groups(student, teacher, gradient),
        weights=weights,
        normalizer=normalizer,
        layer_weights=layer_weights,
        row_losses=row_losses,
        stats=stats,
        DISTANCE=distance,
        NORMALIZE=normalize,
        **upstream_of(None, False),
    )
    return row_losses, stats


def hidden_backward(
    *,
    upstream: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
    layer_weights: Tensor,
    stats: Tensor,
    gradient: list[Tensor],
    distance: int,
    normalize: int,
    skip_if_one: bool,
) -> None:
    _launch(
        [group for group in _groups(student, teacher, gradient) if group.gradient],
        weights=weights,
        normalizer=normalizer,
        layer_weights=layer_weights,
        row_losses=None,
        stats=stats,
        DISTANCE=distance,
        NORMALIZE=normalize,
        **upstream_of(upstream, skip_if_one),
    )


class _Group(NamedTuple):
    """Layers of one launch."""

    places: list[int]
    """Among all layers."""
    rows: list[list[Tensor]]
    """Of each: the student's, those of the pieces, and the gradient if there is one."""
    gradient: bool
    unit: int
    """Their sizes and strides are multiples of it."""


def _groups(student: list[Tensor], teacher: list[Tensor], gradient: list[Tensor]) -> list[_Group]:
    """Layers of one shape, type and alignment, and with as many strides as a launch has room for."""
    found: dict[Any, _Group] = {}
    for j, (x, pieces) in enumerate(by_layer(student, teacher)):
        written = bool(gradient) and gradient[j].numel() > 0
        rows = [x, *pieces, *([gradient[j]] if written else [])]
        unit = WIDE if all([n % WIDE == 0 for t in rows for n in (t.shape[2], *_strides(t))]) else 1
        kind: Any = (x.shape, written, unit, *[(t.shape[2], t.dtype, t.data_ptr() % 16 == 0) for t in rows])
        if kind in found and len(found[kind].rows) * len(rows) > MOST_ROWS - len(rows):
            found[kind, j] = found.pop(kind)
        group = found.setdefault(kind, _Group([], [], written, unit))
        group.places.append(j)
        group.rows.append(rows)
    return list(found.values())


def _strides(rows: Tensor) -> tuple[int, int]:
    """By b and l; 0 where nothing is behind the first, so that a large number there compiles nothing."""
    return (rows.stride(0) if rows.shape[0] > 1 else 0), (rows.stride(1) if rows.shape[1] > 1 else 0)


def _launch(groups: list[_Group], **given: Any) -> None:
    for places, layers, written, unit in groups:
        first = layers[0][0]
        B, L, H = first.shape
        if B * L == 0:
            continue
        sides = list(zip(*layers, strict=True))  # student, pieces and gradient, each of all layers
        strides = [[_strides(t)[k] // unit for t in side] for side in sides for k in range(2)]
        if all([len(set(each)) == 1 for each in strides]):
            strides = [each[:1] for each in strides]
        pieces = sides[1:-1] if written else sides[1:]
        follow = places == list(range(places[0], places[0] + len(places)))
        kind = given["DISTANCE"], given["NORMALIZE"]
        with torch.cuda.device_of(first):
            hidden_kernel[(len(layers) * B * L,)](
                student=sides[0],
                teacher=tuple(chain.from_iterable(pieces)),
                gradient=sides[-1] if written else None,
                N=B * L,
                L=L,
                H=H // unit,
                strides=unspecialized(chain.from_iterable(strides)),
                widths=unspecialized([piece[0].shape[2] // unit for piece in pieces]),
                places=unspecialized(places[:1] if follow else places),
                MULTIPLE=unit,
                **given,
                **layout(unit == WIDE, H, given["stats"].dtype, torch.version.hip is not None, *kind),
            )
