"""The KD loss from hidden states, in tiles of rows: what :func:`fusedkd.linear_kd_loss` runs.

    z = x·Wᵀ + b        [R, V_s] float32, R rows at a time; likewise the teacher's logits from its own hidden states
    g = ∂loss/∂z        by the kernels of kd_loss, over z
    ∂x = g·W            [R, H_s]
    ∂W += gᵀ·x          [V_s, H_s] float32 over all tiles, the first of which writes

6·N·V_s·H_s + 2·N·V_t·H_t operations in all: nothing is computed twice, and nothing of size N×V exists. A teacher that
gets a gradient has g and the two products after it of its own, from the same logits, 4·N·V_t·H_t more. The gradient is
that of upstream 1, as in kd_loss, and backward only scales it. (The loop is that of QuACK's chunked linear
cross-entropy; why the rows per tile matter, and not the number of tiles: Liger-Kernel's pull request 1472; why ∂W adds
up in float32: 1391.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd.backends import block, products
from fusedkd.backends.block import Flags, TeacherRows
from fusedkd.backends.call import of_part, rows_of
from fusedkd.backends.layout import NORMALIZERS, Option
from fusedkd.backends.products import Tiles, float16_unit, own_product, tile_type
from fusedkd.backends.schema import accumulation_dtype, linear_gradients_like, unit_shape
from fusedkd.backends.shard import Shard
from fusedkd.backends.statistics import STATISTICS

ops = torch.ops.fusedkd

MOST_ROWS = 4096
"""Of a tile: more gain nothing."""


class TileSize(NamedTuple):
    """What is best where nobody said otherwise, and how few rows starve the products."""

    max_bytes: int
    fewest: int
    most: int


def tile_size(device: torch.device, operands: torch.dtype, wish: torch.dtype) -> TileSize:
    """On a CPU what a tile holds should be in the cache still when it is read again, and each row more is one that the
    packing of the head is shared by: 256 rows are fastest, 128 cost 5 % more, 64 a quarter (H of 256 to 2048, V of
    30522 to 128256).
    """
    if device.type != "cpu":
        return TileSize(4 << 30, 1024, MOST_ROWS)
    own = own_product(operands, tile_type(operands, wish))
    return TileSize(48 << 20, 128, 256) if own else TileSize(4 << 30, 1024, 1024)


def linear_kd(
    *,
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
    exchanged: Sequence[Tensor | None],
    slopes: Sequence[Tensor],
    upstream: Tensor | None,
    ignore_index: int,
    kernel_ids: Sequence[int],
    exchanged_kernel_ids: Sequence[int],
    transform: bool,
    ce: bool,
    tile: int,
    tile_dtype: torch.dtype,
    dtype: torch.dtype,
    max_rows: int | None,
    wanted: Sequence[bool],
    statistics: Sequence[bool],
    common: int,
    shard: Shard | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """The operator of :mod:`fusedkd.backends.schema`, on any device. With a `shard` of the vocabulary, which no
    operator can be given, the gradient of the hidden states is the sum over the ranks, on each of them.
    """
    calls = row_weights, options, normalizers, kernel_ids, exchanged, exchanged_kernel_ids
    fields = zip(teachers, heads, biases, ids, *calls, strict=True)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _linear_kd(
            hidden=hidden,
            weight=weight,
            bias=bias,
            labels=labels,
            members=[TeacherRows(*each) for each in fields],
            slopes=slopes,
            upstream=upstream,
            flags=Flags(ignore_index=ignore_index, transform=transform, ce=ce, shard=shard),
            tile=tile,
            tile_dtype=tile_dtype,
            dtype=dtype,
            max_rows=max_rows,
            wanted=wanted,
            statistics=statistics,
            common=common,
        )


def _linear_kd(
    *,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    members: list[TeacherRows],
    slopes: Sequence[Tensor],
    upstream: Tensor | None,
    flags: Flags,
    tile: int,
    tile_dtype: torch.dtype,
    dtype: torch.dtype,
    max_rows: int | None,
    wanted: Sequence[bool],
    statistics: Sequence[bool],
    common: int,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    n, grad = hidden.shape[0], any(wanted[:3])
    row_weights = [each.row_weights for each in members]
    active, places, overflow = selected(row_weights, labels if flags.ce else None, flags.ignore_index, max_rows)
    if overflow is not None:
        members = [t._replace(normalizers=torch.where(overflow, torch.nan, t.normalizers)) for t in members]
    gradients = linear_gradients_like(hidden, weight, [t.rows for t in members], [t.head for t in members], wanted)
    sides = [gradients[i : i + 3] for i in range(0, len(gradients), 3)]
    others = [any(wanted[i + 3 : i + 6]) for i in range(0, 3 * len(members), 3)]
    members = [t if want else t._replace(exchanged=None) for t, want in zip(members, others, strict=True)]
    unit = hidden.new_empty(unit_shape(slopes, wanted), dtype=torch.float64)
    if unit.dim() == 0:
        unit, members, upstream = in_range(members, slopes, upstream)
    hidden, head = hidden.to(dtype), weight.to(dtype)
    row_losses = hidden.new_empty(len(members), 2, n, dtype=torch.promote_types(dtype, torch.float32))
    its_statistics = row_losses.new_zeros(len(STATISTICS), n) if statistics[0] else row_losses.new_empty(0)
    count = n if places is None else len(places)
    size = -(-count // max(1, -(-count // tile)))  # tiles of equal height
    for d_hidden, d_weight, d_bias in sides:
        if len(d_bias):
            d_bias.zero_()
        if places is not None:  # the other rows
            d_hidden.zero_()
        if count == 0:
            d_weight.zero_()
    if places is not None:
        row_losses.zero_()
    tiles = Tiles(size, hidden)
    for start in range(0, count, max(1, size)):
        stop = min(start + size, count)
        part = slice(start, stop) if places is None else places[start:stop]
        x, y = hidden[part], None if labels is None else labels[part]
        if active is not None:  # what is in a row without a term must not reach ∂W, not even as 0·NaN
            x = torch.where(active[part].unsqueeze(1), x, 0)
        z = products.project(x, head, bias, tiles.get("student", head.shape[0], tile_type(dtype, tile_dtype)))
        of_tile, g = _TeacherTiles(members, part, z, tiles, tile_dtype), None
        if statistics[0]:
            found = _statistics(z, y, members[0], part, of_tile, flags, of_teacher=statistics[1], columns=common)
            its_statistics[:, part] = found
        if grad:  # a teacher's gradient needs the logits
            g = tiles.get("student's gradient", head.shape[0], z.dtype)[: len(z)] if any(others) else z
        found, _ = block.forward(z.unsqueeze(0), y, of_tile, flags, None if g is None else g.unsqueeze(0))
        if size == n and places is None:
            row_losses = found
        else:
            row_losses[:, :, part] = found
        of_sides = [(g, x, head), *map(of_tile.gradient, range(len(members)))]
        for (g, x, head_of_side), side in zip(of_sides, sides, strict=False):
            if g is None:
                continue
            if upstream is not None:
                g.mul_(upstream[part].unsqueeze(1))
            if head_of_side is None:
                side[0][part] = g
            else:
                products.take(g, x, head_of_side, side, part, start > 0, tiles)
    if flags.shard is not None and wanted[0]:
        torch.distributed.all_reduce(gradients[0], group=flags.shard.group)
    if overflow is not None:
        row_losses = torch.where(overflow, torch.nan, row_losses)
    return row_losses, gradients, unit, its_statistics


def _statistics(
    z: Tensor,
    labels: Tensor | None,
    first: TeacherRows,
    part: slice | Tensor,
    of_tile: Sequence[TeacherRows],
    flags: Flags,
    *,
    of_teacher: bool,
    columns: int,
) -> Tensor:
    """The operator kd_statistics of a tile."""
    return ops.kd_statistics(  # type: ignore[no-any-return]
        student=z.unsqueeze(0),
        teacher=of_tile[0].rows if of_teacher else z.unsqueeze(0),
        labels=labels,
        row_weights=first.row_weights[part],
        options=of_part(first.options, part),
        transform=flags.transform,
        of_teacher=of_teacher,
        columns=columns,
        ignore_index=flags.ignore_index,
    )


class _TeacherTiles(Sequence[TeacherRows]):
    """The teachers' rows of one tile, made when they are asked for: their logits share memory, but for those over which
    a teacher's gradient is written.
    """

    def __init__(
        self, members: list[TeacherRows], part: slice | Tensor, student: Tensor, tiles: Tiles, dtype: torch.dtype
    ):
        self.members, self.part, self.student, self.tiles, self.dtype = members, part, student, tiles, dtype
        self.made: dict[int, TeacherRows] = {}
        self.projected: tuple[TeacherRows, Tensor] | None = None
        """The teacher whose logits lie in the memory that they share, and these."""

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: Any) -> Any:
        t = self.members[i]
        if i in self.made and t.exchanged is not None:  # in memory of its own
            return self.made[i]
        rows = rows_of(t.rows, self.part) if t.rows.shape[2] else self.student  # unread
        role = "teacher" if t.exchanged is None else f"teacher {i}"
        if t.head is not None and t.exchanged is None and self.projected is not None and _same(self.projected[0], t):
            rows = self.projected[1]
        elif t.head is not None:
            to = tile_type(t.head.dtype, self.dtype)
            rows = products.project(rows, t.head, t.bias, self.tiles.get(role, t.head.shape[0], to))
            self.projected = (t, rows) if t.exchanged is None else self.projected
        elif t.exchanged is not None:
            tile = self.tiles.get(role, rows.shape[1], accumulation_dtype(rows.dtype))
            rows = tile[: len(rows)].copy_(rows)
        rows = rows.unsqueeze(0)
        self.made[i] = t._replace(
            rows=rows,
            ids=None if t.ids is None else t.ids[self.part],
            row_weights=t.row_weights[self.part],
            options=of_part(t.options, self.part),
            exchanged=None if t.exchanged is None else of_part(t.exchanged, self.part),
            gradient=None if t.exchanged is None else rows,
        )
        return self.made[i]

    def gradient(self, i: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """That of a teacher's logits, if it gets one, and the hidden states and the head of which they were made."""
        t, made = self.members[i], self.made[i]
        if made.gradient is None:
            return None, t.rows, t.head
        x = t.rows
        if t.head is not None:  # what is in a row without the term must not reach ∂W
            x = torch.where(made.row_weights.unsqueeze(1) != 0, rows_of(t.rows, self.part), 0)
        return made.gradient[0], x, t.head


def _same(one: TeacherRows, other: TeacherRows) -> bool:
    """Whether two calls are of one teacher, with another divergence."""
    return one.rows is other.rows and one.head is other.head and one.bias is other.bias


def selected(
    row_weights: Sequence[Tensor], labels: Tensor | None, ignore_index: int, max_rows: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(which rows have a term, the places of those that are projected, whether they are more than `max_rows`). The
    first two are None for all rows, the last where it cannot happen. On a GPU, where their number is not known to the
    host, `max_rows` are projected.
    """
    terms = [w != 0 for w in row_weights] + ([] if labels is None else [labels != ignore_index])
    active = reduce(torch.logical_or, terms)
    if not active.is_cuda:
        places = active.nonzero().squeeze(1)
        return None, None if len(places) == len(active) else places, None
    if max_rows is None or len(active) <= max_rows:
        return active, None, None
    return active, active.logical_not().argsort(stable=True)[:max_rows], active.sum() > max_rows


def in_range(
    members: list[TeacherRows], slopes: Sequence[Tensor], upstream: Tensor | None
) -> tuple[Tensor, list[TeacherRows], Tensor | None]:
    """A unit for gradients that float16 has room for, and normalisers and upstream gradient in it: those of the logits
    are then FLOAT16_TOP at most, where divided by the number of rows they would underflow.
    """
    calls = members + [t._replace(options=t.exchanged) for t in members if t.exchanged is not None]
    given = {name: [getattr(each, name) for each in calls] for name in ("row_weights", "options", "normalizers")}
    unit, *scaled = ops.linear_unit(**given, slopes=slopes).split([1, *[NORMALIZERS] * len(calls)])
    unit, members = unit.view(()), [t._replace(normalizers=n) for t, n in zip(members, scaled, strict=False)]
    if upstream is None:
        return unit, members, None
    top = power_above(upstream)
    return unit / top, members, upstream / top.to(upstream.dtype)


def power_above(upstream: Tensor) -> Tensor:
    """The power of two that no |upstream| exceeds, ``()`` float64; 1 where all are 0."""
    top = _largest(upstream).double()
    return torch.where(top > 0, top, 1).log2().ceil().exp2()


def linear_unit(
    row_weights: Sequence[Tensor], options: Sequence[Tensor], normalizers: Sequence[Tensor], slopes: Sequence[Tensor]
) -> Tensor:
    """The operator, by PyTorch."""
    reach = torch.stack(list(map(_reach, row_weights, options, normalizers, slopes))).sum()
    unit = float16_unit(reach)
    return torch.cat([unit.view(1), *[each / unit for each in normalizers]])


def _reach(row_weights: Tensor, option: Tensor, normalizers: Tensor, slope: Tensor) -> Tensor:
    """What no column of the gradient of a teacher's terms exceeds."""
    n_kd, n_ce = normalizers
    of_row = option[..., Option.KD_WEIGHT] * option[..., Option.KD_SCALE] / option[..., Option.TEMPERATURE]
    if option.dim() == 2:
        of_row, option, row_weights = row_weights.double() * of_row, option[0], row_weights.new_ones(())
    kd_weight, ce_weight = _largest(row_weights) * _largest(of_row), option[Option.CE_WEIGHT]
    terms = (kd_weight, slope / n_kd), (ce_weight, 1 / n_ce)
    kd, ce = (torch.where(weight == 0, 0, weight * each).abs() for weight, each in terms)
    return (kd + ce) * option[Option.SCALE]  # a soft-cap's slope is 1 at most


def _largest(x: Tensor) -> Tensor:
    """max |x|, 0 of nothing."""
    return x.abs().amax() if x.numel() else x.new_zeros(())
