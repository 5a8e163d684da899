"""How many rows `linear_kd_loss` and `gumbel_rows` have in a tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusedkd import checks as check
from fusedkd.backends.block import TeacherRows
from fusedkd.backends.linear_loop import MOST_ROWS, TileSize
from fusedkd.backends.products import row_bytes, tile_type
from fusedkd.losses.rules import Prepared


class Tiles(NamedTuple):
    """What `linear_kd_loss` is told of them."""

    max_bytes: int | None
    dtype: torch.dtype
    max_rows: int | None

    def check(self) -> None:
        check.count("max_tile_bytes", 1 if self.max_bytes is None else self.max_bytes)
        check.count("max_rows", 1 if self.max_rows is None else self.max_rows)
        if self.dtype not in check.FLOATING:
            raise TypeError(f"tile_dtype must be float16, bfloat16, float32 or float64, not {self.dtype}")

    def rows(self, bytes_per_row: int, count: int, size: TileSize) -> int:
        """Per tile, of `count` in all: at least 1, at most MOST_ROWS."""
        if self.max_bytes is None:
            return max(size.fewest, min(size.most, size.max_bytes // bytes_per_row))
        rows = max(1, min(MOST_ROWS, self.max_bytes // bytes_per_row))
        if rows < min(size.fewest, count) and not torch.compiler.is_compiling():
            check.warn(
                f"max_tile_bytes={self.max_bytes} leaves {rows} rows per tile, and below {size.fewest} "
                "the matrix products are slow"
            )
        return rows


def bytes_per_row(
    columns: int,
    dtype: torch.dtype,
    tile_dtype: torch.dtype,
    parts: Sequence[Prepared],
    given: Sequence[TeacherRows],
    wanted: Sequence[bool],
    *,
    read_again: bool,
) -> int:
    """Of all tiles that exist at the same time, or that are `read_again`, which a cache should hold: the student's
    logits are not, where its gradient has a tile of its own.
    """
    student = row_bytes(columns, tile_type(dtype, tile_dtype))
    teacher = more = 0  # one after the other, but for those that get a gradient
    for part, each in zip(parts, given, strict=True):
        of_tile = each.rows.dtype if each.head is None else tile_type(each.head.dtype, tile_dtype)
        of_teacher = part.known.columns if part.flags.shard is None or part.known.ids is not None else columns
        if each.exchanged is None:
            teacher = max(teacher, row_bytes(of_teacher if part.rules.kd else 0, of_tile))
        else:
            more += row_bytes(of_teacher, torch.promote_types(of_tile, torch.float32) if each.head is None else of_tile)
    total = student + teacher + more
    if any(wanted[:3]) and more and not read_again:  # the student's gradient is not written over its logits
        total += student
    if any(wanted) and len(given) > 1:
        total += student * min(len(given) - 1, 2)  # a gradient per teacher, and their sum
    if any(wanted) and given[0].row_weights.is_cuda and tile_type(dtype, tile_dtype) != dtype:
        total += row_bytes(columns, dtype)
    return total
