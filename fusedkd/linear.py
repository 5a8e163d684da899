"""The KD loss from hidden states, in tiles of rows: what :func:`fusedkd.linear_kd_loss` runs.

    z = x·Wᵀ + b        [R, V_s] float32, R rows at a time; likewise the teacher's logits from its own hidden states
    g = ∂loss/∂z        by the kernels of kd_loss, over z
    ∂x = g·W            [R, H_s]
    ∂W += gᵀ·x          [V_s, H_s] float32 over all tiles, the first of which writes

Every product is PyTorch's own, 6·N·V_s·H_s + 2·N·V_t·H_t operations in all: nothing is computed twice, and nothing of
size N×V exists. The gradient is that of upstream 1, as in kd_loss, and backward only scales it. (The loop is that of
QuACK's chunked linear cross-entropy; why the rows per tile matter, and not the number of tiles: Liger-Kernel's pull
request 1472; why ∂W adds up in float32: 1391.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

ops = torch.ops.fusedkd

ALIGNMENT = 64
"""Elements between the rows of a tile are a multiple of this, whatever V is: what matrix units want."""
MOST_ROWS = 4096
"""Of a tile: more gain nothing."""
FLOAT16_TOP = 1024.0
"""Of 65504: what families other than forward KL can exceed their weights by is left to spare."""
PANEL = 8192
"""Rows of a 16-bit weight that the CPU converts to float32 at a time."""


def tile_rows(max_tile_bytes: int, widths: Sequence[int], dtype: torch.dtype) -> int:
    """How many rows of tiles this wide fit into so many bytes: at least 1, at most MOST_ROWS."""
    return max(1, min(MOST_ROWS, max_tile_bytes // (dtype.itemsize * sum(map(_aligned, widths)))))


def linear_kd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    teachers: Sequence[Tensor],
    heads: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    ids: Sequence[Tensor | None],
    row_weights: Sequence[Tensor],
    options: Sequence[Tensor],
    normalizers: Sequence[Tensor],
    upstream: Tensor | None,
    ignore_index: int,
    forms: Sequence[int],
    transform: bool,
    ce: bool,
    tile: int,
    tile_dtype: torch.dtype,
    max_rows: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of :mod:`fusedkd.ops`, on any device."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        gradient = any(wanted)
        unit = None
        if hidden.dtype == torch.float16 and gradient:
            unit, normalizers, upstream = _in_range(options, normalizers, upstream)
        active, places, overflow = _selected(row_weights, labels if ce else None, ignore_index, max_rows)
        n, m, head = hidden.shape[0], len(teachers), weight.to(hidden.dtype)
        rows = hidden.new_zeros(m, 2, n, dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradients = d_hidden, d_weight, d_bias = gradients_like(hidden, weight, wanted)
        count = n if places is None else len(places)
        size = -(-count // max(1, -(-count // tile)))  # tiles of equal height
        z_tile = _tile(size, head, tile_dtype)
        v_tiles = [None if w is None else _tile(size, w, tile_dtype) for w in heads]
        rounds = hidden.is_cuda and gradient and hidden.dtype != tile_dtype
        g_tile = _tile(size, head, hidden.dtype) if rounds else None
        for start in range(0, count, max(1, size)):
            part = slice(start, start + size) if places is None else places[start : start + size]
            x = hidden[part]
            if active is not None:  # what is in a row without a term must not reach ∂W, not even as 0·NaN
                x = torch.where(active[part].unsqueeze(1), x, 0)
            z = _project(x, head, bias, z_tile)
            g = None
            for i in reversed(range(m)):  # the first, to which the cross-entropy belongs, comes last: over z
                t = teachers[i][part]
                w, v_tile, listed = heads[i], v_tiles[i], ids[i]
                if w is not None and v_tile is not None:
                    t = _project(t, w, biases[i], v_tile)
                known = (t.unsqueeze(0),) if listed is None else (t.unsqueeze(0), listed[part])
                y = None if labels is None else labels[part]
                flags = ignore_index, forms[i], transform, ce and i == 0
                arguments = (z.unsqueeze(0), *known, y, row_weights[i][part], options[i], normalizers[i], *flags)
                if gradient and i == 0:
                    rows[i][:, part], _ = (ops.kd_forward_ if listed is None else ops.topk_forward_)(*arguments)
                    g = z if g is None else z.add_(g)
                else:
                    forward = ops.kd_forward if listed is None else ops.topk_forward
                    rows[i][:, part], _, found = forward(*arguments, gradient)
                    g = found.squeeze(0) if g is None else g.add_(found.squeeze(0))
            if not gradient or g is None:
                continue
            if upstream is not None:
                g.mul_(upstream[part].unsqueeze(1) if upstream.dim() else upstream)
            if wanted[2]:
                d_bias.add_(g.sum(0, dtype=d_bias.dtype))
            if g_tile is not None:
                g = g_tile[: len(g)].copy_(g)  # rounded for the matrix units
            if wanted[0]:
                d_hidden[part] = _pull_back(g, head, d_hidden.dtype)
            if wanted[1]:
                _product(g.t(), x, d_weight, add=start > 0)
        if wanted[1] and count == 0:
            d_weight.zero_()
        if overflow is not None:
            rows = torch.where(overflow, torch.nan, rows)
        if unit is not None:
            for each in gradients:
                each.div_(unit)
        return rows, *gradients


Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]


def gradients_like(hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> Gradients:
    """Memory for the three gradients, empty where one is not wanted: float32, in which those of the head add up over
    the tiles and all of them wait for the upstream gradient, so that each is rounded once.
    """
    total = torch.promote_types(hidden.dtype, torch.float32)
    d_hidden = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=total)
    d_weight = weight.new_empty(weight.shape if wanted[1] else 0, dtype=total)
    d_bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=total)
    return d_hidden, d_weight, d_bias


def _selected(
    row_weights: Sequence[Tensor], labels: Tensor | None, ignore_index: int, max_rows: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(which rows have a term, the places of those that are projected, whether they are more than `max_rows`); None for
    all rows, and for what cannot be. On a GPU, where their number is not known to the host, `max_rows` are projected.
    """
    active = torch.stack([w != 0 for w in row_weights]).any(0)
    if labels is not None:
        active = active | (labels != ignore_index)
    if not active.is_cuda:
        places = active.nonzero().squeeze(1)
        return None, None if len(places) == len(active) else places, None
    if max_rows is None or len(active) <= max_rows:
        return active, None, None
    return active, active.logical_not().argsort(stable=True)[:max_rows], active.sum() > max_rows


def _in_range(
    options: Sequence[Tensor], normalizers: Sequence[Tensor], upstream: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """A unit for gradients that float16 has room for, and normalisers and upstream gradient in it: those of the logits
    are then about FLOAT16_TOP at most, where divided by the number of rows they would underflow.
    """
    temperature, _, kd_scale, kd_weight, ce_weight = torch.stack([*options], 1)[:5]  # of each teacher
    reach = (kd_weight * kd_scale / temperature + ce_weight).sum()
    unit = torch.stack([*normalizers]).min() * FLOAT16_TOP / torch.where(reach > 0, reach, 1)
    scaled = [each / unit for each in normalizers]
    if upstream is None:
        return unit, scaled, None
    top = upstream.abs().max().to(unit.dtype) if upstream.numel() else torch.ones_like(unit)
    top = torch.where(top > 0, top, 1)
    return unit / top, scaled, upstream / top.to(upstream.dtype)


# -------------------------------------------------- products


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (+)= a·b. Every product of the loss is made here."""
    if a.is_cuda and a.dtype != out.dtype:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tensor) -> Tensor:
    """x·weightᵀ + bias, in the first rows of the tile."""
    out = tile[: len(x)]
    x = x.to(weight.dtype)
    if x.is_cuda or x.dtype == out.dtype:
        _product(x, weight.t(), out)
    else:
        x = x.to(out.dtype)
        for panel, part in zip(weight.split(PANEL), out.split(PANEL, 1), strict=True):
            _product(x, panel.t(), part)
    return out if bias is None else out.add_(bias)


def _pull_back(g: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """g·weight."""
    if g.is_cuda or g.dtype == weight.dtype:
        out = g.new_empty(len(g), weight.shape[1], dtype=dtype)
        _product(g, weight, out)
        return out
    out = g.new_zeros(len(g), weight.shape[1])
    for panel, part in zip(weight.split(PANEL), g.split(PANEL, 1), strict=True):
        _product(part, panel, out, add=True)
    return out.to(dtype)


def _aligned(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT


def _tile(rows: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    columns = weight.shape[0]
    return weight.new_empty(rows, _aligned(columns), dtype=dtype)[:, :columns]


def linear_rescale_(gradient: Tensor, upstream: Tensor) -> None:
    """gradient ·= upstream, on the CPU."""
    if upstream != 1:
        gradient.mul_(upstream)
