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
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fusedkd.divergences import Form
from fusedkd.ops import Option
from fusedkd.slopes import BOUNDS, SPARSE_BOUNDS
from fusedkd.sparse import SparseForm

ops = torch.ops.fusedkd

ALIGNMENT = 64
"""Elements between the rows of a tile are a multiple of this, whatever V is: what matrix units want."""
MOST_ROWS = 4096
"""Of a tile: more gain nothing. On a CPU a quarter does as well (benchmarks/results/cpu-linear.json)."""
FLOAT16_TOP = 8192.0
"""Of 65504: an eighth, because some bounds of `slopes.py` hold for usual rows only."""
PANEL = 8192
"""Rows of a 16-bit weight that the CPU converts to float32 at a time."""

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]


class LinearTeacher(NamedTuple):
    """What the operator is given of each teacher."""

    rows: Tensor
    """``(B, L, C)``: hidden states where there is a head, else what the operators of kd_loss call the teacher; without
    columns where nothing reads them."""
    head: Tensor | None
    bias: Tensor | None
    ids: Tensor | None
    row_weights: Tensor
    options: Tensor
    normalizers: Tensor

    def tile(self, part: slice | Tensor) -> Tensor:
        """Some of its rows: a view where they are one slice in memory too, else a copy."""
        B, L, _ = self.rows.shape
        if B == 1 or L == 1 or self.rows.stride(0) == L * self.rows.stride(1):
            return self.rows.flatten(0, 1)[part]
        i = part if isinstance(part, Tensor) else torch.arange(part.start, part.stop, device=self.rows.device)
        return self.rows[i // L, i % L]


def tile_type(operands: torch.dtype, wish: torch.dtype) -> torch.dtype:
    """Of logits: what PyTorch's products can give, which is the operands' type, or float32 from 16 bits."""
    return wish if wish == operands else torch.promote_types(operands, torch.float32)


def row_bytes(columns: int, dtype: torch.dtype) -> int:
    return _aligned(columns) * dtype.itemsize


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
    dtype: torch.dtype,
    max_rows: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of :mod:`fusedkd.ops`, on any device."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        n, gradient = hidden.shape[0], any(wanted)
        active, places, overflow = _selected(row_weights, labels if ce else None, ignore_index, max_rows)
        if overflow is not None:
            normalizers = [torch.where(overflow, torch.nan, each) for each in normalizers]
        unit = None
        fields = zip(teachers, heads, biases, ids, row_weights, options, normalizers, strict=True)
        members = [LinearTeacher(*each) for each in fields]
        if dtype == torch.float16 and gradient:
            unit, members, upstream = _in_range(members, forms, weight.shape[0], upstream)
        hidden, head = hidden.to(dtype), weight.to(dtype)
        rows = hidden.new_zeros(len(members), 2, n, dtype=torch.promote_types(dtype, torch.float32))
        gradients = d_hidden, d_weight, d_bias = gradients_like(hidden, weight, wanted)
        count = n if places is None else len(places)
        size = -(-count // max(1, -(-count // tile)))  # tiles of equal height
        tiles = _Tiles(size, hidden)
        for start in range(0, count, max(1, size)):
            stop = min(start + size, count)
            part = slice(start, stop) if places is None else places[start:stop]
            x, y = hidden[part], None if labels is None else labels[part]
            if active is not None:  # what is in a row without a term must not reach ∂W, not even as 0·NaN
                x = torch.where(active[part].unsqueeze(1), x, 0)
            z = _project(x, head, bias, tiles.get("student", head.shape[0], tile_type(dtype, tile_dtype)))
            others: Tensor | None = None  # gradients of all teachers but the first, which comes last and over z
            for i in reversed(range(len(members))):
                t = members[i]
                if t.rows.shape[2] == 0 and i > 0:
                    continue
                v = t.tile(part) if t.rows.shape[2] else z  # unread
                if t.head is not None:
                    to = tile_type(t.head.dtype, tile_dtype)
                    v = _project(v, t.head, t.bias, tiles.get("teacher", t.head.shape[0], to))
                known = (v.unsqueeze(0),) if t.ids is None else (v.unsqueeze(0), t.ids[part])
                flags = ignore_index, forms[i], transform, ce and i == 0
                arguments = (z.unsqueeze(0), *known, y, t.row_weights[part], t.options, t.normalizers, *flags)
                if gradient and i == 0:
                    rows[i][:, part], _ = (ops.kd_forward_ if t.ids is None else ops.topk_forward_)(*arguments)
                else:
                    forward = ops.kd_forward if t.ids is None else ops.topk_forward
                    rows[i][:, part], _, found = forward(*arguments, gradient)
                    if gradient:
                        others = found.squeeze(0) if others is None else others.add_(found.squeeze(0))
                    del found
                del v, known, arguments
            if not gradient:
                continue
            g = z if others is None else z.add_(others)
            if upstream is not None:
                g.mul_(upstream[part].unsqueeze(1))
            if wanted[2]:
                d_bias.add_(g.sum(0, dtype=d_bias.dtype))
            g = _operand(g, dtype, tiles)
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


def gradients_like(hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> Gradients:
    """Memory for the three gradients, empty where one is not wanted: float32, in which those of the head add up over
    the tiles and all of them wait for the upstream gradient, so that each is rounded once.
    """
    total = torch.promote_types(hidden.dtype, torch.float32)
    d_hidden = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=total)
    d_weight = weight.new_empty(weight.shape if wanted[1] else 0, dtype=total)
    d_bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=total)
    return d_hidden, d_weight, d_bias


class _Tiles:
    """Memory that is used again for every tile, and by one teacher after the other."""

    def __init__(self, rows: int, like: Tensor):
        self.rows, self.like = rows, like
        self.made: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, role: str, columns: int, dtype: torch.dtype) -> Tensor:
        if (role, dtype) not in self.made or self.made[role, dtype].shape[1] < columns:
            self.made.pop((role, dtype), None)  # before the wider one is made
            self.made[role, dtype] = self.like.new_empty(self.rows, _aligned(columns), dtype=dtype)
        return self.made[role, dtype][:, :columns]


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
    members: list[LinearTeacher], forms: Sequence[int], columns: int, upstream: Tensor | None
) -> tuple[Tensor, list[LinearTeacher], Tensor | None]:
    """A unit for gradients that float16 has room for, and normalisers and upstream gradient in it: those of the logits
    are then FLOAT16_TOP at most, where divided by the number of rows they would underflow.
    """
    reach = torch.stack([_reach(*each, columns) for each in zip(members, forms, strict=True)]).sum()
    unit = FLOAT16_TOP / torch.where(reach > 0, reach, 1)
    scaled = [each._replace(normalizers=each.normalizers / unit) for each in members]
    if upstream is None:
        return unit, scaled, None
    top = _largest(upstream).to(unit.dtype)
    top = torch.where(top > 0, top, 1)
    return unit / top, scaled, upstream / top.to(upstream.dtype)


def _reach(teacher: LinearTeacher, form: int, columns: int) -> Tensor:
    """What no column of the gradient of its terms exceeds."""
    option, (n_kd, n_ce) = teacher.options, teacher.normalizers
    bound = BOUNDS[Form(form)] if teacher.ids is None else SPARSE_BOUNDS[SparseForm(form)]
    slope = bound(option[Option.COEFFICIENTS :].unbind(), columns) * _largest(teacher.row_weights)
    slope = slope * option[Option.KD_SCALE] / option[Option.TEMPERATURE]
    if teacher.ids is not None and form == SparseForm.SAMPLES:
        slope = slope * _largest(torch.where(teacher.ids >= 0, teacher.rows.flatten(0, 1), 0).sum(1))
    terms = (option[Option.KD_WEIGHT], slope / n_kd), (option[Option.CE_WEIGHT], 1 / n_ce)
    kd, ce = (torch.where(weight == 0, 0, weight * each).abs() for weight, each in terms)
    return (kd + ce) * option[Option.SCALE]  # a soft-cap's slope is 1 at most


def _largest(x: Tensor) -> Tensor:
    """max |x|, 0 of nothing."""
    return x.abs().amax() if x.numel() else x.new_zeros(())


# -------------------------------------------------- products


def _operand(g: Tensor, dtype: torch.dtype, tiles: _Tiles) -> Tensor:
    """∂z as the products read it: on a GPU rounded to their type, for the matrix units."""
    return tiles.get("gradient", g.shape[1], dtype)[: len(g)].copy_(g) if g.is_cuda and g.dtype != dtype else g


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (+)= a·b. Every product of the loss is made here."""
    if a.is_cuda and a.dtype != out.dtype:  # 16-bit operands, float32 result
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
