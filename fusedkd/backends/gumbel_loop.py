"""Straight-through samples from hidden states, in tiles of rows: what :func:`fusedkd.gumbel_rows` runs.

    z = x·Wᵀ + b                [R, V] float32, R rows at a time
    ids, statistics             by gumbel_forward; z is not kept

and in backward, where G_m are the gradients of the rows ``(R, E_m)`` of each table

    z = x·Wᵀ + b                again, and the noise again, from its seed
    r = Σ_m G_m·E_mᵀ            [R, V] float32: ∂loss/∂y of the relaxed one-hot rows y
    g = y·(r − Σ y·r)/T         by gumbel_backward, over z
    ∂x = g·W, ∂W += gᵀ·x, ∂b += Σ g

The products are those of :mod:`fusedkd.backends.products`: 2·N·V·H operations forward, 2·N·V·(3·H + Σ E_m) backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from fusedkd.backends import products
from fusedkd.backends.schema import accumulation_dtype, gradients_like, ids_and_stats

ops = torch.ops.fusedkd


def gumbel_ids(
    *,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    temperature: Tensor,
    tile: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The operator of :mod:`fusedkd.backends.schema`, on any device."""
    ids, stats = ids_and_stats(hidden, len(hidden), accumulation_dtype(dtype))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head, tiles = weight.to(dtype), _tiles(hidden, tile)
        for part in _parts(hidden, tile):
            logits = _logits(hidden[part].to(dtype), head, bias, tiles)
            found = ops.gumbel_forward(
                logits=logits.unsqueeze(0), seed=seed, temperature=temperature, first_row=part.start
            )
            ids[part], stats[part] = found
    return ids, stats


def gumbel_gradients(
    *,
    upstreams: Sequence[Tensor],
    tables: Sequence[Tensor],
    ids: Tensor,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    temperature: Tensor,
    tile: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of :mod:`fusedkd.backends.schema`, on any device."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head, tiles = weight.to(dtype), _tiles(hidden, tile)
        gradients = _, d_weight, d_bias = gradients_like(hidden.to(dtype), head, wanted)
        unit = temperature.new_ones(())
        if dtype == torch.float16:
            unit = _unit(upstreams, tables, temperature)
        d_bias.zero_()
        if len(hidden) == 0:
            d_weight.zero_()
        for part in _parts(hidden, tile):
            x = hidden[part].to(dtype)
            g, slopes = _logits(x, head, bias, tiles), tiles.get("slopes", len(head), accumulation_dtype(dtype))
            for i, (upstream, table) in enumerate(zip(upstreams, tables, strict=True)):
                products.project(upstream[part], table, None, slopes, add=i > 0)
            ops.gumbel_backward(
                logits=g.unsqueeze(0),
                slopes=slopes[: len(x)].unsqueeze(0),
                ids=ids[part],
                stats=stats[part],
                seed=seed,
                temperature=temperature,
                scale=unit / temperature,
                first_row=part.start,
            )
            products.take(g, x, head, gradients, part, part.start > 0, tiles)
        if dtype == torch.float16:
            for each in gradients:
                each.div_(unit)
    return gradients


def _parts(hidden: Tensor, tile: int) -> Iterator[slice]:
    """Tiles of equal height, of at most so many rows."""
    count = len(hidden)
    size = -(-count // max(1, -(-count // tile)))
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + size, count))


def _tiles(hidden: Tensor, tile: int) -> products.Tiles:
    return products.Tiles(min(tile, len(hidden)), hidden)


def _logits(x: Tensor, head: Tensor, bias: Tensor | None, tiles: products.Tiles) -> Tensor:
    """In the accumulation type: with less, noise would be rounded away."""
    return products.project(x, head, bias, tiles.get("logits", len(head), accumulation_dtype(x.dtype)))


def _unit(upstreams: Sequence[Tensor], tables: Sequence[Tensor], temperature: Tensor) -> Tensor:
    """For the gradient of the logits, which float16 then has room for: no column of it exceeds 2·max|r|/T, nor r the
    sum over tables of the longest gradient of a row times the longest row of the table. Scaling by it rounds nothing.
    """
    reach = reduce(torch.add, [_longest(g) * _longest(e) for g, e in zip(upstreams, tables, strict=True)])
    reach = 2 * reach / temperature
    return products.float16_unit(reach)


def _longest(rows: Tensor) -> Tensor:
    """The norm of the longest row, 0 of nothing."""
    return rows.float().norm(dim=1).amax().double() if len(rows) else rows.new_zeros((), dtype=torch.float64)
