"""Distances of hidden states, value and gradient in one launch, each row read once where registers hold it.

    x̂ = a·(x − μ), ŷ = b·(y − ν)     normalised: see csrc/cpu/hidden_rows.h, whose formulas these are
    d = x̂ − ŷ                         by FMA, without the rounding of x − μ: close rows lose nothing
    D = Σd²/H, Σhuber(d)/H, or ½·Σd² + ½·ε·(a² + b²)
    ∂D/∂x = k·a·(g − shift − pull·x̂)  g = d, or d within ±1

Moves 6 bytes per element of 16-bit input: x and y in, the gradient out. One program per row. HELD rows wait in
registers through the reductions until the gradient is written, as in fast layer-norm kernels (Apex, QuACK); longer ones
are read again for each pass, which L2 serves. The teacher's pieces are a tuple of pointers, read side by side.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import (
    COSINE,
    HIDDEN_STATS,
    LAYER_NORM,
    MSE,
    NONE,
    PULL,
    SHIFT,
    SMOOTH_L1,
    STUDENT_FACTOR,
    STUDENT_MEAN,
    STUDENT_REST,
    TEACHER_FACTOR,
    TEACHER_MEAN,
    TEACHER_REST,
)
from fusedkd.backends.triton.math import INFINITY

NORM_EPSILON = tl.constexpr(1e-12)
VARIANCE_EPSILON = tl.constexpr(1e-5)
INTEGERS = ["upstream_stride", "L", "H", "student_b", "student_l", "teacher_b", "teacher_l", "widths"]
INTEGERS += ["gradient_b", "gradient_l"]
VECTORS = ["weights", "normalizer", "upstream", "row_losses", "stats"]


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


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def hidden_kernel(
    # Inputs: [B, L, H], a tuple of [B, L, H_k], [N] or None, float64 [], A [] or [N] or None
    student,
    teacher,
    weights,
    normalizer,
    upstream,
    # Outputs: A [N], or None in backward, where stats are an input; A [N, HIDDEN_STATS]; [B, L, H] or None
    row_losses,
    stats,
    gradient,
    # Sizes and strides; those in elements are in units of MULTIPLE, of which Triton sees that accesses may be wide
    upstream_stride,
    L,
    H,
    student_b: tl.int64,
    student_l: tl.int64,
    teacher_b,  # as the pieces
    teacher_l,
    widths,
    gradient_b: tl.int64,
    gradient_l: tl.int64,
    DISTANCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SKIP_IF_ONE: tl.constexpr,  # the gradient is right if the upstream is 1
    MULTIPLE: tl.constexpr,
    HELD: tl.constexpr,  # BLOCK ≥ H
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = stats.dtype.element_ty
    CENTRED: tl.constexpr = NORMALIZE == LAYER_NORM
    SCALED: tl.constexpr = DISTANCE == COSINE or NORMALIZE != NONE
    i = tl.program_id(0).to(tl.int64)
    up = tl.full([], 1.0, A)
    if upstream is not None:
        up = tl.load(upstream + i * upstream_stride)
        if SKIP_IF_ONE and up == 1:
            return
    weight = tl.full([], 1.0, A)
    if weights is not None:
        weight = tl.load(weights + i).to(A)
    H = H * MULTIPLE
    l_row = i % L
    b_row = i // L
    p_stats = stats + i * HIDDEN_STATS
    p_gradient = gradient
    if gradient is not None:
        p_gradient += (b_row * gradient_b + l_row * gradient_l) * MULTIPLE
    if weight == 0:  # not read
        if row_losses is not None:
            tl.store(row_losses + i, weight)
            tl.store(p_stats + tl.arange(0, HIDDEN_STATS), tl.zeros([HIDDEN_STATS], A))
        if gradient is not None:
            for start in range(0, H, BLOCK):
                o = start + tl.arange(0, BLOCK)
                tl.store(p_gradient + o, tl.zeros([BLOCK], gradient.dtype.element_ty), o < H)
        return
    p_student = student + (b_row * student_b + l_row * student_l) * MULTIPLE
    p_teacher = ()
    stops = ()
    stop = 0
    for k in tl.static_range(len(teacher)):
        o_piece = (b_row * teacher_b[k] + l_row * teacher_l[k]) * MULTIPLE
        p_teacher = p_teacher + (teacher[k] + o_piece - stop,)  # type: ignore[assignment]  # noqa: RUF005  no Triton
        stop += widths[k] * MULTIPLE
        stops = stops + (stop,)  # type: ignore[assignment]  # noqa: RUF005
    held_x = None
    held_y = None
    if HELD:
        held_x, held_y = read(p_student, p_teacher, stops, H, 0, A, BLOCK)
    row = Pair(student=p_student, teacher=p_teacher, stops=stops, H=H, x=held_x, y=held_y)
    share = 1.0 / H.to(A)
    zero = tl.zeros([], A)
    if row_losses is not None:
        a = Scale(factor=zero + 1.0, mean=zero, rest=zero)
        b = a
        left = zero
        if SCALED:
            a, b, left = scales(row, DISTANCE, CENTRED, HELD, A, BLOCK)
        value, pull, shift = values(row, a, b, share, DISTANCE, CENTRED, HELD, A, BLOCK, SCALED)
        if DISTANCE == COSINE:
            value = 0.5 * (value + left)
            pull = value + (NORM_EPSILON * share * (value - 1.0) if CENTRED else zero)
        elif SCALED and DISTANCE == MSE:
            EPSILON: tl.constexpr = VARIANCE_EPSILON if CENTRED else NORM_EPSILON
            pull = 0.5 * (value if CENTRED else value * H.to(A))
            pull += 0.5 * EPSILON * (b.factor * b.factor - a.factor * a.factor)
        elif CENTRED:
            pull *= share
            shift *= share
        tl.store(row_losses + i, weight * value)
        tl.store(p_stats + STUDENT_FACTOR, a.factor)
        tl.store(p_stats + STUDENT_MEAN, a.mean)
        tl.store(p_stats + STUDENT_REST, a.rest)
        tl.store(p_stats + TEACHER_FACTOR, b.factor)
        tl.store(p_stats + TEACHER_MEAN, b.mean)
        tl.store(p_stats + TEACHER_REST, b.rest)
        tl.store(p_stats + SHIFT, shift if CENTRED else zero)
        tl.store(p_stats + PULL, pull)
    else:
        a = Scale(
            factor=tl.load(p_stats + STUDENT_FACTOR),
            mean=tl.load(p_stats + STUDENT_MEAN),
            rest=tl.load(p_stats + STUDENT_REST),
        )
        b = Scale(
            factor=tl.load(p_stats + TEACHER_FACTOR),
            mean=tl.load(p_stats + TEACHER_MEAN),
            rest=tl.load(p_stats + TEACHER_REST),
        )
        shift = tl.load(p_stats + SHIFT)
        pull = tl.load(p_stats + PULL)
    if gradient is not None:
        times = up * (weight / tl.load(normalizer).to(A))
        if DISTANCE != COSINE:
            times *= share * (2.0 if DISTANCE == MSE else 1.0)
        c = a.factor * times
        for start in range(0, 1 if HELD else H, BLOCK):
            x, y = columns(row, start, HELD, A, BLOCK)
            g = slope(difference(x, y, a, b, SCALED, CENTRED), DISTANCE)
            if SCALED:
                g -= a.factor * (x - a.mean - a.rest) * pull + shift
            o = start + tl.arange(0, BLOCK)
            tl.store(p_gradient + o, c * g, o < H)
