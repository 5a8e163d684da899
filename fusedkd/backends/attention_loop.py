"""Attention maps against each other from queries and keys, some rows of some heads at a time.

    z, t = Q_s·K_sᵀ, Q_t·K_tᵀ   [pairs, R, keys] of R queries
    g = ∂loss/∂z                by the kernels of kd_loss, over z
    ∂Q_s = g·K_s                [pairs, R, d]
    ∂K_s += gᵀ·Q_s              [pairs, keys, d] float32 over the tiles

A batch entry and one of its heads, a pair, are the problem of :mod:`fusedkd.backends.linear_loop` with keys for a head,
whose products serve here too: 8·L·L·d operations a pair where both sides have d columns, and nothing of size L × L.
What the scores are multiplied by, 1/√d, is the temperature of the kernels. Keys of padding and, under a causal mask,
those after a query are −inf on both sides, which adds nothing. Those that no query of a tile sees are left out where
the host knows of them: on a CPU, and after the last query of a causal tile. Where a CPU has products of our own,
csrc/cpu/attention.cpp does the same, a pair for each thread; the loop is for all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd.backends import block
from fusedkd.backends.block import Flags, TeacherRows
from fusedkd.backends.layout import FIRST_DEFINED, KernelId, Option
from fusedkd.backends.linear_loop import in_range
from fusedkd.backends.products import aligned, own_product, product
from fusedkd.backends.schema import attention_memory
from fusedkd.backends.slopes import bound_of

ops = torch.ops.fusedkd

CPU_TILE, GPU_TILE = 2 << 20, 512 << 20
"""Bytes of both sides' scores: what a CPU's caches hold, and not fewer, for products of few rows are slow."""
FEWEST = 16
"""Rows of a tile, however many keys there are."""
FEWEST_CAUSAL = 64
"""Of a tile with fewer than it has room for, so that keys after all of its queries can be left out."""

FLAGS = Flags(ignore_index=-100, transform=False, ce=False)


def attention(
    *,
    student_q: Tensor,
    student_k: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor | None,
    rows: Tensor | None,
    keys: Tensor | None,
    options: Tensor,
    normalizers: Tensor,
    upstream: Tensor | None,
    kernel_id: int,
    causal: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of :mod:`fusedkd.backends.schema`, on any device."""
    row_losses, d_q, d_k = found = attention_memory(student_q, student_k, wanted)
    to_q = d_q if wanted[0] else None
    to_k = to_q if student_k is None else d_k if wanted[1] else None
    student = student_q, student_q if student_k is None else student_k
    theirs = teacher_q, teacher_q if teacher_k is None else teacher_k
    if _is_compiled((*student, *theirs), kernel_id) and ops.attention_pairs(
        student_q=student[0],
        student_k=student[1],
        teacher_q=theirs[0],
        teacher_k=theirs[1],
        rows=rows,
        keys=keys,
        options=options,
        normalizers=normalizers,
        upstream=upstream,
        row_losses=row_losses,
        d_q=to_q,
        d_k=to_k,
        kernel_id=kernel_id,
        causal=causal,
    ):
        return found
    for each in found:
        each.zero_()
    B, heads, L, _ = student_q.shape
    weights = student_q.new_ones((), dtype=torch.float32) if rows is None else rows.float()[:, None]
    teacher = TeacherRows(teacher_q, None, None, None, weights.expand(B, heads, L), options, normalizers, kernel_id)
    unit = None
    if student_q.dtype == torch.float16 and student_q.is_cuda and any(wanted):
        slope = bound_of(teacher, options[Option.COEFFICIENTS :].unbind(), L)
        unit, (teacher,), upstream = in_range([teacher], [slope], upstream)
    call = _Call(student, theirs, rows, keys, causal, upstream)
    with torch.no_grad(), torch.autocast(student_q.device.type, enabled=False):
        tiles = _Tiles(student_q)
        for group in _groups(call, tiles.scores):
            _run(call, group, teacher, tiles, row_losses, to_q, to_k)
        if unit is not None:
            for each in (d_q, d_k):
                each.div_(unit)
    return found


def _is_compiled(operands: tuple[Tensor, ...], kernel_id: int) -> bool:
    """Whether there is a kernel to ask for all of it."""
    key = operands[0].device.type.upper()
    return (
        kernel_id < FIRST_DEFINED
        and all(x.dtype != torch.float64 for x in operands)
        and torch._C._dispatch_has_kernel_for_dispatch_key("fusedkd::attention_pairs", key)
    )


class _Call(NamedTuple):
    """Queries and keys of both sides ``(B, heads, L, d)``, and which count."""

    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]
    rows: Tensor | None
    """``(B, L)`` bool."""
    keys: Tensor | None
    causal: bool
    upstream: Tensor | None
    """``(B, heads, L)``"""


class _Group(NamedTuple):
    """Pairs whose scores share a tile: some heads of one batch entry, or all heads of several."""

    batch: slice
    heads: slice
    rows: tuple[int, int]
    """From the first query that counts to behind the last."""
    keys: tuple[int, int]
    holes: bool
    """Some within these do not count."""

    def of(self, x: Tensor) -> Tensor:
        """From ``(B, heads, L, …)`` to ``(pairs, L, …)``: a view where a group is part of one batch entry."""
        return x[self.batch, self.heads].flatten(0, 1)

    def of_keys(self, counted: Tensor, heads: int) -> Tensor:
        """``(pairs, L)`` from ``(B, L)``."""
        return counted[self.batch, None].expand(-1, len(range(*self.heads.indices(heads))), -1).flatten(0, 1)


def _groups(call: _Call, scores: int) -> Iterator[_Group]:
    """The groups of all pairs, for tiles of so many scores of each side."""
    B, heads, L, _ = call.student[0].shape
    everything = (0, L)
    masked = call.rows is not None or call.keys is not None
    pairs = max(1, scores // max(1, L * L))
    if pairs > heads and B > 1:
        several = pairs // heads
        for i in range(0, B, several):
            yield _Group(slice(i, i + several), slice(0, heads), everything, everything, masked)
        return
    known = masked and not call.student[0].is_cuda
    spans = zip(_spans(call.rows, B, L), _spans(call.keys, B, L), strict=True) if known else None
    for i in range(B):
        rows, keys, holes = everything, everything, masked
        if spans is not None:
            (rows, row_holes), (keys, key_holes) = next(spans)
            holes = row_holes or key_holes
        for j in range(0, heads, pairs):
            yield _Group(slice(i, i + 1), slice(j, min(j + pairs, heads)), rows, keys, holes)


def _spans(counted: Tensor | None, batch: int, length: int) -> list[tuple[tuple[int, int], bool]]:
    """((first, behind the last), whether one between does not count) of each batch entry."""
    if counted is None:
        return [((0, length), False)] * batch
    place = torch.arange(length)
    first = torch.where(counted, place, length).amin(1)
    last = torch.where(counted, place + 1, 0).amax(1)
    holes = counted.sum(1) != last - first
    return list(zip(zip(first.tolist(), last.tolist(), strict=True), holes.tolist(), strict=True))


class _Tiles:
    """How large they are, and memory that every tile uses again."""

    def __init__(self, like: Tensor):
        self.like, self.dtype = like, torch.promote_types(like.dtype, torch.float32)
        self.scores = (GPU_TILE if like.is_cuda else CPU_TILE) // (2 * self.dtype.itemsize)
        self.made: dict[str, Tensor] = {}

    def rows(self, pairs: int, queries: int, keys: int, causal: bool) -> int:
        """Of tiles of equal height."""
        most = max(FEWEST, self.scores // (pairs * keys))
        if causal:  # smaller tiles leave out more
            most = min(most, max(FEWEST_CAUSAL, queries // 8))
        return -(-queries // -(-queries // most))

    def get(self, role: str, dtype: torch.dtype, most: int, pairs: int, rows: int, columns: int) -> Tensor:
        """Memory for one of a group's tiles, of which the largest has `most` scores."""
        width = self.width(columns)
        if role not in self.made or self.made[role].numel() < most:
            self.made.pop(role, None)  # before the larger one is made
            self.made[role] = self.like.new_empty(most, dtype=dtype)
        tile = self.made[role][: pairs * rows * width].view(pairs, rows, width)
        return tile if width == columns else tile[..., :columns]

    def width(self, columns: int) -> int:
        """What a row takes."""
        return aligned(columns) if self.like.is_cuda else columns


def _run(
    call: _Call,
    group: _Group,
    teacher: TeacherRows,
    tiles: _Tiles,
    row_losses: Tensor,
    d_q: Tensor | None,
    d_k: Tensor | None,
) -> None:
    """Row losses and gradients of a group."""
    heads, L = call.student[0].shape[1:3]
    (first, last), (left, right) = group.rows, group.keys
    if first >= last or left >= right:
        return
    q, k, t_q, t_k = (_operand(group.of(x), tiles.dtype) for x in (*call.student, *call.teacher))
    hidden = None
    if group.holes and call.keys is not None:
        counted = group.of_keys(call.keys, heads)
        hidden = ~counted.unsqueeze(1)
        k = torch.where(counted.unsqueeze(2), k, 0)  # what does not count may be NaN, and 0·NaN is not 0
    if group.holes and call.rows is not None:
        q = torch.where(group.of_keys(call.rows, heads).unsqueeze(2), q, 0)
    weights, losses = group.of(teacher.row_weights), row_losses[group.batch, group.heads]
    upstream = None if call.upstream is None else group.of(call.upstream).unsqueeze(2)
    to_q, to_k = (None if x is None else group.of(x) for x in (d_q, d_k))
    grad = d_q is not None or d_k is not None
    size = tiles.rows(len(q), last - first, right - left, call.causal)
    most = len(q) * size * tiles.width(right - left)
    for start in range(first, last, size):
        part = slice(start, min(start + size, last))
        seen = slice(left, min(right, part.stop) if call.causal else right)
        shape = len(q), part.stop - part.start, seen.stop - seen.start
        if shape[2] <= 0:
            continue
        z, t = (tiles.get(role, tiles.dtype, most, *shape) for role in ("student", "teacher"))
        for tile, queries, its_keys in ((z, q, k), (t, t_q, t_k)):
            product(queries[:, part], its_keys[:, seen].transpose(1, 2), tile)
            if hidden is not None:
                tile.masked_fill_(hidden[..., seen], -torch.inf)
            if call.causal:
                _hide_later(tile, part, seen)
        of_tile = teacher._replace(
            rows=t, row_weights=weights[:, part].flatten().contiguous(), options=_options(teacher, shape[2], L)
        )
        found, _ = block.forward(z, None, [of_tile], FLAGS, z if grad else None)
        losses[..., part] = found[0, 0].view(*losses.shape[:2], shape[1])
        if not grad:
            continue
        if upstream is not None:
            z.mul_(upstream[:, part])
        g = tiles.get("gradient", k.dtype, most, *shape).copy_(z) if z.is_cuda and k.dtype != z.dtype else z
        if to_q is not None:
            product(g, k[:, seen], to_q[:, part], add=True)
        if to_k is not None:
            product(g.transpose(1, 2), q[:, part], to_k[:, seen], add=True)


def _hide_later(tile: Tensor, part: slice, seen: slice) -> None:
    """−inf where a key comes after the query."""
    first = max(seen.start, part.start + 1)
    if first < seen.stop:
        corner = tile[..., first - seen.start :]
        later = torch.ones(corner.shape[1:], dtype=torch.bool, device=tile.device).triu(part.start - first + 1)
        corner.masked_fill_(later, -torch.inf)


def _options(teacher: TeacherRows, columns: int, length: int) -> Tensor:
    """The squared error is a mean over all keys, whether or not a tile has them."""
    if teacher.kernel_id != KernelId.LOGIT_MSE or columns == length:
        return teacher.options
    options = teacher.options.clone()
    options[Option.KD_SCALE].mul_(columns / length)
    return options


def _operand(x: Tensor, result: torch.dtype) -> Tensor:
    """As the products read it."""
    return x if x.is_cuda or own_product(x.dtype, result) else x.to(result)
