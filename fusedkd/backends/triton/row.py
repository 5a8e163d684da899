"""Walking rows of logits that start anywhere: which columns a block touches, and the aligned addresses that they are
counted from. Odd vocabularies (30522, 50257, 119547) get the 16-byte accesses of even ones.

A row is seen from the 16-byte boundary at or below its first column, `phase` columns before it. Its body, [head, body),
is whole vectors; its ends are the columns before and after the body. Triton turns a load into a wide one where it can
prove the alignment, which is why both are loops of their own.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fusedkd.backends.triton.math import INFINITY, cap_and_scale

UNIT = tl.constexpr(16)
"""Columns. Block loops start on a multiple of it, counted from a 16-byte aligned address, wherever the row starts."""


class Row(NamedTuple):
    """Columns are counted from the aligned address: the row is [phase, phase + V)."""

    phase: Any
    V: Any
    C: Any
    """Columns that both sides have, which the body consists of."""
    columns: Any
    """Of all shards of the vocabulary that both sides have; C where there is one."""
    head: Any
    body: Any
    first_body: Any
    """The blocks of the body that this program has: the first, and how many."""
    n_body: Any
    first_ends: Any
    n_ends: Any


class Side(NamedTuple):
    """Logits of one side, the student's or the teacher's."""

    pointer: Any
    """The aligned address."""
    stop: Any
    """Where they end; 0 for a side that no term of the row needs: its logits are not read, and count as −∞."""
    edge: Any
    """The same of the body, a whole number of vectors."""
    softcap: Any
    scale: Any


def unspecialized(numbers: Iterable[int]) -> tuple[int, ...]:
    """For a tuple among a kernel's arguments: of a number there that is 1 or a multiple of 16, Triton compiles a kernel
    of its own, for do_not_specialize does not reach it. These are odd, and at least 3; `number` reads them.
    """
    return tuple([2 * n + 3 for n in numbers])


@triton.jit
def pick(values, first: tl.constexpr, count: tl.constexpr, i):
    """Of `count` values of a tuple, from `first` on, the one at i."""
    found = values[first]
    for k in tl.static_range(1, count):
        found = tl.where(i == k, values[first + k], found)
    return found


@triton.jit
def number(numbers, first: tl.constexpr, count: tl.constexpr, i):
    """The same of numbers that are `unspecialized`."""
    return (pick(numbers, first, count, i) - 3) >> 1


@triton.jit
def first_column(o, stride_b, stride_l, i_row, L):
    """Of a row, in elements from the tensor's pointer."""
    return o + (i_row // L).to(tl.int64) * stride_b + (i_row % L).to(tl.int64) * stride_l


@triton.jit
def phase_of(o):
    return (o % UNIT).to(tl.int32)


@triton.jit
def base_of(pointer, o, phase, IN_PHASE: tl.constexpr):
    """The address `phase` columns before first column o; IN_PHASE: it is a multiple of UNIT, which Triton sees."""
    return pointer + (o // UNIT * UNIT if IN_PHASE else o - phase)


@triton.jit
def locate(phase, V, C, part, parts, SPLIT: tl.constexpr, BLOCK: tl.constexpr, columns=None):
    """A row whose body has the C columns that both sides have; of its blocks, those of a part."""
    head = (phase + UNIT - 1) // UNIT * UNIT
    body = (phase + C) // UNIT * UNIT
    first_body, n_body = share(tl.cdiv(tl.maximum(body - head, 0), BLOCK), part, parts, SPLIT)
    first_ends, n_ends = share(tl.cdiv(head + phase + V - body, BLOCK // 8), part, parts, SPLIT)
    return Row(
        phase=phase,
        V=V,
        C=C,
        columns=C if columns is None else columns,
        head=head,
        body=body,
        first_body=first_body,
        n_body=n_body,
        first_ends=first_ends,
        n_ends=n_ends,
    )


@triton.jit
def share(n, part, parts, SPLIT: tl.constexpr):
    """The blocks of n that fall to a part of the row: the first, and how many."""
    first = 0
    if SPLIT:
        each = tl.cdiv(n, parts)
        first = part * each
        n = tl.maximum(tl.minimum(each, n - first), 0)
    return first, n


@triton.jit
def side_of(pointer, row, n, needed, softcap, scale):
    """n columns of the row, if a term needs them."""
    return Side(
        pointer=pointer,
        stop=tl.where(needed, row.phase + n, 0),
        edge=tl.where(needed, row.body, 0),
        softcap=softcap,
        scale=scale,
    )


@triton.jit
def columns(i_block, row, ENDS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Offsets of a block, and which of them are in the row.

    The body: [BLOCK/GROUP, GROUP], 16-byte accesses. The ends, the student's columns without a teacher among them: one
    column per thread, [1, BLOCK/8].
    """
    if ENDS:
        i = i_block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        o = tl.where(i < row.head, i, i - row.head + row.body)
        m = (o >= row.phase) & (o < row.phase + row.V) & ((i >= row.head) | (o < row.body))
    else:
        i = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        o = row.head + i_block * BLOCK + i
        m = o < row.body
    return o, m


@triton.jit
def readable(side, o, m, ENDS: tl.constexpr):
    """Which of a block's columns a side has."""
    return m & (o < (side.stop if ENDS else side.edge))


@triton.jit
def logits(side, o, m, A: tl.constexpr, TRANSFORM: tl.constexpr, POLICY: tl.constexpr):
    """Logits, −∞ where masked, soft-capped and scaled; and the derivative of that."""
    b = tl.load(side.pointer + o, m, other=-INFINITY, eviction_policy=POLICY).to(A)
    slope = b
    if TRANSFORM:
        b, slope = cap_and_scale(b, side.softcap, side.scale)
    return b, slope


def upstream_of(upstream: Tensor | None, skip_if_one: bool) -> dict[str, Any]:
    """What a kernel is given of the upstream gradient, ``()`` or ``(N,)``; None: 1."""
    stride = upstream.stride(0) if upstream is not None and upstream.dim() else 0
    return {"upstream": upstream, "upstream_stride": stride, "SKIP_IF_ONE": skip_if_one}


def stride_of(options: Tensor) -> int:
    """From the real options of a row to those of the next, 0 where all rows share them."""
    return options.stride(0) if options.dim() == 2 else 0


def aligned(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x from the 16-byte boundary at or below its first element, for Triton to see that accesses may be wide; and its
    first element and strides from there.
    """
    first = x.data_ptr() % 16 // x.element_size()
    if 0 < first <= x.storage_offset():
        return x.as_strided((1,), (1,), x.storage_offset() - first), (first, *x.stride()[:2])
    return x, (0, *x.stride()[:2])


def in_phase(x: tuple[int, ...], y: tuple[int, ...], B: int, L: int) -> bool:
    """Whether every row of x starts at the same column modulo UNIT as that of y."""
    return all((a - b) % UNIT.value == 0 for a, b, n in zip(x, y, (2, B, L), strict=True) if n > 1)
