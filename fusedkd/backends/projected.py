"""The loss of hidden states behind a projection, in tiles of rows: what :func:`fusedkd.hidden_loss` runs where it is
given one.

    y = x·Wᵀ + b        [R, H_t] float32, R rows at a time
    g = ∂loss/∂y        by hidden_forward, over y; that of the teacher's side before, where it is wanted
    ∂x = g·W            [R, H_s]
    ∂W += gᵀ·x          [H_t, H_s] float32 over all tiles, the first of which writes

6·N·H_t·H_s operations in all: nothing is computed twice, and nothing of size N×H_t exists but the teacher's side and a
gradient that it is to have. The products and their rounding are those of linear_kd, and so is the gradient: of upstream
1, which backward only scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkd.backends import products
from fusedkd.backends.call import rows_of
from fusedkd.backends.composed import hidden_weights
from fusedkd.backends.linear_loop import selected
from fusedkd.backends.products import Tiles, row_bytes, tile_type
from fusedkd.backends.schema import projected_gradients_like

ops = torch.ops.fusedkd


def rows_per_tile(device: torch.device, columns: int, dtype: torch.dtype) -> int:
    """As many as the products want; on a CPU few enough for y to be in the cache when it is read again: 8 MB are within
    2 % of the fastest for H_t of 1024 and of 4096.
    """
    if device.type != "cpu":
        return 4096
    size = row_bytes(columns, tile_type(dtype, torch.float32))
    return max(256, min(2048, (8 << 20) // size))


def linear_hidden(*, hidden: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator of :mod:`fusedkd.backends.schema`, on any device."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _linear_hidden(hidden=hidden, **inputs)


def _linear_hidden(
    *,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: list[Tensor],
    mask: Tensor | None,
    normalizers: Tensor,
    upstream: Tensor | None,
    distance: int,
    normalize: int,
    per_row: bool,
    tile: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, grad = hidden.shape[0], any(wanted[:3])
    weights, normalizer = hidden_weights(mask, normalizers)
    active = places = None
    if weights is not None:
        active, places, _ = selected([weights], None, 0, None)
    if upstream is not None and active is not None:
        upstream = upstream.where(active, 0)
    head = weight.to(dtype)
    gradients = d_hidden, d_weight, d_bias, d_teacher = projected_gradients_like(hidden, weight, wanted)
    row_losses = hidden.new_empty(n, dtype=torch.promote_types(dtype, torch.float32))
    for each in (row_losses, d_hidden, d_teacher) if places is not None else ():  # the other rows
        each.zero_()
    if wanted[2]:
        d_bias.zero_()
    count = n if places is None else len(places)
    size = -(-count // max(1, -(-count // tile)))  # tiles of equal height
    tiles = Tiles(size, hidden)
    for start in range(0, count, max(1, size)):
        stop = min(start + size, count)
        part = slice(start, stop) if places is None else places[start:stop]
        x = hidden[part].to(dtype)
        if active is not None:  # what is in a row that is not selected must not reach ∂W, not even as 0·NaN
            x = torch.where(active[part].unsqueeze(1), x, 0)
        y = products.project(x, head, bias, tiles.get("student", head.shape[0], tile_type(dtype, torch.float32)))
        pieces = [rows_of(piece, part).view(1, stop - start, -1) for piece in teacher]
        given: dict[str, Any] = {"normalizer": normalizer, "layer_weights": normalizers[1:]}
        given |= {"distance": distance, "normalize": normalize}
        given["weights"] = None if weights is None else weights[part]
        factor = None if upstream is None else upstream[part].unsqueeze(1)
        if wanted[3]:  # distances are symmetric: those pieces as a student, against y
            whole = torch.cat([piece.to(y.dtype) for piece in pieces], -1)
            ops.hidden_forward(student=[whole], teacher=[y.unsqueeze(0)], gradient=[whole], **given)
            d_teacher[part] = whole[0] if factor is None else whole[0].mul_(factor)
        rows = y.unsqueeze(0)
        found, _ = ops.hidden_forward(student=[rows], teacher=pieces, gradient=[rows] if grad else [], **given)
        if size == n and places is None:
            row_losses = found[0]
        else:
            row_losses[part] = found[0]
        if grad:
            g = y if factor is None else y.mul_(factor)
            _pull_back(g, x, head, gradients, part, start > 0, tiles)
    if count == 0:
        d_weight.zero_()
    loss = row_losses if per_row else row_losses.sum().div_(normalizer)
    return loss, *gradients


def _pull_back(
    g: Tensor, x: Tensor, head: Tensor, gradients: Sequence[Tensor], part: slice | Tensor, add: bool, tiles: Tiles
) -> None:
    """∂x, ∂W and ∂b of a tile, those that have memory."""
    d_hidden, d_weight, d_bias, _ = gradients
    if len(d_bias):
        d_bias.add_(g.sum(0, dtype=d_bias.dtype))
    unit = None
    if x.dtype == torch.float16:
        unit = _unit(g)
        g = g.mul_(unit)
    g = products.operand(g, x.dtype, tiles)
    if d_hidden.dim() == 2:
        to = d_hidden[part] if isinstance(part, slice) else d_hidden.new_empty(len(part), head.shape[1])
        products.pull_back(g, head, to)
        to = to if unit is None else to.div_(unit)
        if not isinstance(part, slice):
            d_hidden[part] = to
    if d_weight.dim() < 2:
        return
    if unit is None:
        products.product(g.t(), x, d_weight, add=add)
    else:  # each tile has a unit of its own
        found = torch.empty_like(d_weight)
        products.product(g.t(), x, found)
        torch.div(found, unit, out=d_weight) if not add else d_weight.addcdiv_(found, unit)


def _unit(g: Tensor) -> Tensor:
    """In which float16 has room for a gradient: divided by the number of rows, and by the width, it would underflow."""
    largest = g.abs().amax()
    return products.float16_unit(largest.where(largest.isfinite(), 1)).clamp(2.0**-100, 2.0**100)
