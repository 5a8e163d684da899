"""The columns of one row of hidden states, of both sides, for :mod:`fusedkd.backends.triton.hidden_kernel`: reading
them, and sums over them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import COSINE, MSE, SMOOTH_L1
from fusedkd.backends.triton.math import INFINITY

NORM_EPSILON = tl.constexpr(1e-12)
VARIANCE_EPSILON = tl.constexpr(1e-5)


class Scale(NamedTuple):
    """x̂ = factor·(x − mean − rest)."""

    factor: Any
    mean: Any
    rest: Any


class Pair(NamedTuple):
    """A row of both sides."""

    student: Any
    teacher: Any
    """A tuple: where column 0 of the whole row would lie in front of each piece."""
    stops: Any
    """And the column at which it ends."""
    H: Any
    x: Any
    """All columns, if they are held."""
    y: Any


@triton.jit
def read(student, teacher, stops, H, start, A: tl.constexpr, BLOCK: tl.constexpr):
    """Columns from `start` of both sides, 0 beyond the row."""
    o = start + tl.arange(0, BLOCK)
    x = tl.load(student + o, o < H, other=0.0).to(A)
    y = tl.load(teacher[0] + o, o < stops[0], other=0.0).to(A)
    for k in tl.static_range(1, len(stops)):
        m = (o >= stops[k - 1]) & (o < stops[k])
        y = tl.where(m, tl.load(teacher[k] + o, m, other=0.0).to(A), y)
    return x, y


@triton.jit
def columns(row, start, HELD: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    x = row.x
    y = row.y
    if not HELD:
        x, y = read(row.student, row.teacher, row.stops, row.H, start, A, BLOCK)
    return x, y


@triton.jit
def means(row, HELD: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """Of both sides, near enough for what is left to be summed without cancellation. They never overflow."""
    share = 1.0 / row.H.to(A)
    of_x = tl.zeros([BLOCK], A)
    of_y = tl.zeros([BLOCK], A)
    for start in range(0, 1 if HELD else row.H, BLOCK):
        x, y = columns(row, start, HELD, A, BLOCK)
        of_x += x * share
        of_y += y * share
    return tl.sum(of_x, 0), tl.sum(of_y, 0)


@triton.jit
def squares(
    row, mean_x, mean_y, far_x, far_y, CENTRED: tl.constexpr, HELD: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of far·(x − mean) and of its square, and the same of y."""
    s_x = tl.zeros([BLOCK], A)
    s_y = tl.zeros([BLOCK], A)
    s_xx = tl.zeros([BLOCK], A)
    s_yy = tl.zeros([BLOCK], A)
    for start in range(0, 1 if HELD else row.H, BLOCK):
        x, y = columns(row, start, HELD, A, BLOCK)
        x *= far_x
        y *= far_y
        if CENTRED:
            m = start + tl.arange(0, BLOCK) < row.H
            x = tl.where(m, x - far_x * mean_x, 0.0)
            y = tl.where(m, y - far_y * mean_y, 0.0)
            s_x += x
            s_y += y
        s_xx += x * x
        s_yy += y * y
    sum_x = tl.zeros([], A)
    sum_y = tl.zeros([], A)
    if CENTRED:
        sum_x = tl.sum(s_x, 0)
        sum_y = tl.sum(s_y, 0)
    return sum_x, sum_y, tl.sum(s_xx, 0), tl.sum(s_yy, 0)


@triton.jit
def scale_of(mean, total, squares, far, H, DISTANCE: tl.constexpr, CENTRED: tl.constexpr):
    """From the sums about the mean; and factor² times what is added to the squares that the cosine divides by. (far²
    may be 0.)
    """
    rest = tl.zeros_like(mean)
    added = NORM_EPSILON * far * far
    if CENTRED:
        rest = total / H / far
        squares = tl.maximum(squares - total * (total / H), squares * 0.0)  # of NaN: NaN
        variance = squares / H + VARIANCE_EPSILON * far * far
        added = NORM_EPSILON * variance
        if DISTANCE != COSINE:
            squares = variance
    factor = far / tl.sqrt(squares + added if DISTANCE == COSINE or not CENTRED else squares)
    return Scale(factor=factor, mean=mean, rest=rest), added * (factor / far) * (factor / far)


@triton.jit
def scales(
    row, DISTANCE: tl.constexpr, CENTRED: tl.constexpr, HELD: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    """Of both sides. Rows whose squares overflow are summed once more, scaled down."""
    H = row.H.to(A)
    mean_x = tl.zeros([], A)
    mean_y = tl.zeros([], A)
    if CENTRED:
        mean_x, mean_y = means(row, HELD, A, BLOCK)
    far_x = tl.full([], 1.0, A)
    far_y = tl.full([], 1.0, A)
    s_x, s_y, xx, yy = squares(row, mean_x, mean_y, far_x, far_y, CENTRED, HELD, A, BLOCK)
    if ((xx < INFINITY) & (yy < INFINITY)) == 0:
        FAR: tl.constexpr = 1.2621774483536189e-29 if tl.float32 == A else 1.9010815379079637e-211
        far_x = tl.where(xx < INFINITY, 1.0, FAR).to(A)
        far_y = tl.where(yy < INFINITY, 1.0, FAR).to(A)
        s_x, s_y, xx, yy = squares(row, mean_x, mean_y, far_x, far_y, CENTRED, HELD, A, BLOCK)
    a, left_x = scale_of(mean_x, s_x, xx, far_x, H, DISTANCE, CENTRED)
    b, left_y = scale_of(mean_y, s_y, yy, far_y, H, DISTANCE, CENTRED)
    return a, b, left_x + left_y


@triton.jit
def apart(x, y, a, b):
    """a·x − b·y without the rounding of the products, which would be all that is left of it near convergence."""
    by = b * y
    return tl.fma(a + tl.zeros_like(x), x, -by) - tl.fma(b + tl.zeros_like(y), y, -by)


@triton.jit
def lost(x, side):
    """To rounding, by x − mean (Knuth's two-sum), and the rest."""
    found = x - side.mean
    back = found - x
    return ((x - (found - back)) - (side.mean + back)) - side.rest


@triton.jit
def difference(x, y, a, b, SCALED: tl.constexpr, CENTRED: tl.constexpr):
    """x̂ − ŷ."""
    if not SCALED:
        d = x - y
    elif CENTRED:
        d = apart(x - a.mean, y - b.mean, a.factor, b.factor)
        d += a.factor * lost(x, a) - b.factor * lost(y, b)
    else:
        d = apart(x, y, a.factor, b.factor)
    return d


@triton.jit
def slope(d, DISTANCE: tl.constexpr):
    """g of d."""
    if DISTANCE == SMOOTH_L1:
        d = tl.where(d > 1, 1.0, tl.where(d < -1, -1.0, d))
    return d


@triton.jit
def values(
    row, a, b, share, DISTANCE: tl.constexpr, CENTRED: tl.constexpr, HELD: tl.constexpr, A: tl.constexpr,
    BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Σ of what the distance adds up, as a mean unless it is the cosine, Σ g·x̂ and Σ g."""
    total = tl.zeros([BLOCK], A)
    pull = tl.zeros([BLOCK], A)
    shift = tl.zeros([BLOCK], A)
    root = tl.sqrt(share)
    for start in range(0, 1 if HELD else row.H, BLOCK):
        x, y = columns(row, start, HELD, A, BLOCK)
        d = difference(x, y, a, b, SCALED, CENTRED)
        if CENTRED:
            d = tl.where(start + tl.arange(0, BLOCK) < row.H, d, 0.0)
        if DISTANCE == SMOOTH_L1:
            g = slope(d, DISTANCE)
            total += share * (g * (d - 0.5 * g))
            if SCALED:
                pull += g * (a.factor * (x - a.mean - a.rest))
                if CENTRED:
                    shift += g
        else:
            scaled = d if SCALED else d * root  # whose squares overflow where their mean does
            total += scaled * scaled
    value = tl.sum(total, 0)
    if SCALED and DISTANCE == MSE:
        value *= share
    sum_pull = tl.zeros([], A)
    sum_shift = tl.zeros([], A)
    if SCALED and DISTANCE == SMOOTH_L1:
        sum_pull = tl.sum(pull, 0)
        sum_shift = tl.sum(shift, 0)
    return value, sum_pull, sum_shift
