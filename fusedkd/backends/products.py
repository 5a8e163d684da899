"""The matrix products of the losses that make logits or hidden states a tile of rows at a time, and the memory of those
tiles. The products are PyTorch's own or, on a CPU with AVX-512, those of csrc/cpu/product.cpp, because PyTorch has none
of 16-bit operands with a float32 result there; they round a gradient to the operands' type, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ops = torch.ops.fusedkd

ALIGNMENT = 64
"""Elements between the rows of a tile are a multiple of this, whatever V is: what matrix units want."""
PANEL = 8192
"""Rows of a 16-bit weight that the CPU converts to float32 at a time, where it has no product of 16 bits."""
FLOAT16_TOP = 8192.0
"""Of 65504: an eighth, because some bounds of `slopes.py` hold for usual rows only."""
own_products: frozenset[torch.dtype] = frozenset()
"""Types that csrc/cpu/product.cpp multiplies on this processor: :mod:`fusedkd.backends.dispatch` asks it."""


def tile_type(operands: torch.dtype, wish: torch.dtype) -> torch.dtype:
    """Of logits: what PyTorch's products can give, which is the operands' type, or float32 from 16 bits."""
    return wish if wish == operands else torch.promote_types(operands, torch.float32)


def own_product(operands: torch.dtype, result: torch.dtype) -> bool:
    """Whether products on a CPU are those of csrc/cpu/product.cpp. ∂z, float32, counts as the other operand's type."""
    return operands in own_products and result == torch.float32


def row_bytes(columns: int, dtype: torch.dtype) -> int:
    return aligned(columns) * dtype.itemsize


class Tiles:
    """Memory that is used again for every tile, and by one teacher after the other."""

    def __init__(self, rows: int, like: Tensor):
        self.rows, self.like = rows, like
        self.made: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, role: str, columns: int, dtype: torch.dtype) -> Tensor:
        if (role, dtype) not in self.made or self.made[role, dtype].shape[1] < columns:
            self.made.pop((role, dtype), None)  # before the wider one is made
            self.made[role, dtype] = self.like.new_empty(self.rows, aligned(columns), dtype=dtype)
        return self.made[role, dtype][:, :columns]


def operand(g: Tensor, dtype: torch.dtype, tiles: Tiles) -> Tensor:
    """∂z as the products read it: on a GPU rounded to their type, for the matrix units."""
    return tiles.get("gradient", g.shape[1], dtype)[: len(g)].copy_(g) if g.is_cuda and g.dtype != dtype else g


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False, bias: Tensor | None = None) -> None:
    """out = a·b + bias, or out += a·b, of matrices or pairs of them. Every product of the losses is made here."""
    if not a.is_cuda and own_product(b.dtype, out.dtype):
        a = a if a.dtype == b.dtype else a.to(out.dtype)
        bias = None if bias is None else bias.float().contiguous()
        ops.product(a=_unit_stride(a), b=_unit_stride(b), bias=bias, out=out, add=add)
        return
    options: dict[str, Any] = {}
    if a.is_cuda and a.dtype != out.dtype:  # 16-bit operands, float32 result
        options = {"out_dtype": out.dtype}
    else:
        a, b = a.to(out.dtype), b.to(out.dtype)
    multiply, accumulate = (torch.mm, torch.addmm) if a.dim() == 2 else (torch.bmm, torch.baddbmm)
    if add:
        accumulate(out, a, b, **options, out=out)
    else:
        multiply(a, b, **options, out=out)
    if bias is not None:
        out.add_(bias)


def _unit_stride(x: Tensor) -> Tensor:
    return x if 1 in x.stride()[-2:] else x.contiguous()


def project(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tensor, add: bool = False) -> Tensor:
    """x·weightᵀ + bias in the first rows of the tile, or `add` it to what is there."""
    out = tile[: len(x)]
    if x.is_cuda or x.dtype == out.dtype or own_product(x.dtype, out.dtype):
        product(x, weight.t(), out, add=add, bias=bias)
        return out
    x = x.to(out.dtype)
    for panel, part in zip(weight.split(PANEL), out.split(PANEL, 1), strict=True):
        product(x, panel.t(), part, add=add)
    return out if bias is None else out.add_(bias)


def pull_back(g: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out = g·weight."""
    if g.is_cuda or g.dtype == weight.dtype or own_product(weight.dtype, out.dtype):
        product(g, weight, out)
        return out
    for i, (panel, part) in enumerate(zip(weight.split(PANEL), g.split(PANEL, 1), strict=True)):
        product(part, panel, out, add=i > 0)
    return out


def take(
    g: Tensor, x: Tensor, head: Tensor, gradients: Sequence[Tensor], part: slice | Tensor, add: bool, tiles: Tiles
) -> None:
    """∂x, ∂W and ∂b of a tile of rows from ∂z: those that have memory. The last two add up over the tiles, if `add`."""
    d_hidden, d_weight, d_bias = gradients
    if len(d_bias):
        d_bias.add_(g.sum(0, dtype=d_bias.dtype))
    g = operand(g, head.dtype, tiles)
    if d_hidden.dim() == 2:
        if isinstance(part, slice):
            pull_back(g, head, d_hidden[part])
        else:
            d_hidden[part] = pull_back(g, head, d_hidden.new_empty(len(part), head.shape[1]))
    if d_weight.dim() == 2:
        product(g.t(), x, d_weight, add=add)


def float16_unit(reach: Tensor) -> Tensor:
    """A power of two, by which scaling rounds nothing, that brings values of at most `reach` to FLOAT16_TOP."""
    return (FLOAT16_TOP / torch.where(reach > 0, reach, 1)).log2().floor().exp2()


def aligned(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT
