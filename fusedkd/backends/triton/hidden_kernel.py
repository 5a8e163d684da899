"""Distances of hidden states, value and gradient in one launch, each row read once where registers hold it.

    x̂ = a·(x − μ), ŷ = b·(y − ν)     normalised: see csrc/cpu/hidden_rows.h, whose formulas these are
    d = x̂ − ŷ                         by FMA, without the rounding of x − μ: close rows lose nothing
    D = Σd²/H, Σhuber(d)/H, or ½·Σd² + ½·ε·(a² + b²)
    ∂D/∂x = k·a·(g − shift − pull·x̂)  g = d, or d within ±1

Moves 6 bytes per element of 16-bit input: x and y in, the gradient out. One program per row. HELD rows wait in
registers through the reductions until the gradient is written, as in fast layer-norm kernels (Apex, QuACK); longer ones
are read again for each pass, which L2 serves. The teacher's pieces are pointers, read side by side.

One launch has the rows of several layers, of one width, dtype and alignment: tuples of pointers, from which a program
picks its layer's. A stride is one number for all of them, or one for each, so that the usual layers, all alike, cost
three pointers to pick.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.hidden_columns import (
    NORM_EPSILON,
    VARIANCE_EPSILON,
    Pair,
    Scale,
    columns,
    difference,
    read,
    scales,
    slope,
    values,
)
from fusedkd.backends.triton.layout import (
    COSINE,
    HIDDEN_STATS,
    LAYER_NORM,
    MSE,
    NONE,
    PULL,
    SHIFT,
    STUDENT_FACTOR,
    STUDENT_MEAN,
    STUDENT_REST,
    TEACHER_FACTOR,
    TEACHER_MEAN,
    TEACHER_REST,
)
from fusedkd.backends.triton.row import number, pick

INTEGERS = ["upstream_stride", "N", "L", "H"]
VECTORS = ["weights", "normalizer", "layer_weights", "upstream", "row_losses", "stats"]


@triton.jit
def row_of(pointer, strides, side: tl.constexpr, each: tl.constexpr, j, b_row, l_row, MULTIPLE: tl.constexpr):
    """Where a row begins, on this side of layer j."""
    stride_b = number(strides, 2 * side * each, each, j)
    stride_l = number(strides, (2 * side + 1) * each, each, j)
    return pointer + (b_row * stride_b + l_row * stride_l) * MULTIPLE


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=VECTORS)
def hidden_kernel(
    # Inputs: of the layers of this launch [B, L, H]; [B, L, H_k], their first pieces, their second, …; [N] or None;
    # float64 [] and [layers]; A [] or [N] or None
    student,
    teacher,
    weights,
    normalizer,
    layer_weights,
    upstream,
    # Outputs: A [layers, N], or None in backward, where stats are an input; A [layers, N, HIDDEN_STATS]; as student, or
    # None
    row_losses,
    stats,
    gradient,
    # Sizes; those in elements are in units of MULTIPLE, of which Triton sees that accesses may be wide
    upstream_stride,
    N,
    L,
    H,
    # Tuples of numbers that are `unspecialized`
    strides,  # of student, pieces and gradient, by b and l; each of one for all layers, or one for each
    widths,  # of the pieces
    places,  # of the layers among those of vectors: of the first, which the others follow; or of each
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
    LAYERS: tl.constexpr = len(student)
    PIECES: tl.constexpr = len(widths)
    EACH: tl.constexpr = len(strides) // (2 * (1 + PIECES + (gradient is not None)))
    j = tl.program_id(0) // N
    i = (tl.program_id(0) % N).to(tl.int64)
    up = tl.full([], 1.0, A)
    if upstream is not None:
        up = tl.load(upstream + i * upstream_stride)
        if SKIP_IF_ONE and up == 1:
            return
    weight = tl.full([], 1.0, A)
    if weights is not None:
        weight = tl.load(weights + i).to(A)
    place = number(places, 0, len(places), j)
    if len(places) < LAYERS:
        place += j
    H = H * MULTIPLE
    l_row = i % L
    b_row = i // L
    i_row = place.to(tl.int64) * N + i
    p_stats = stats + i_row * HIDDEN_STATS
    p_gradient = gradient
    if gradient is not None:
        p_gradient = row_of(pick(gradient, 0, LAYERS, j), strides, 1 + PIECES, EACH, j, b_row, l_row, MULTIPLE)
    if weight == 0:  # not read
        if row_losses is not None:
            tl.store(row_losses + i_row, weight)
            tl.store(p_stats + tl.arange(0, HIDDEN_STATS), tl.zeros([HIDDEN_STATS], A))
        if gradient is not None:
            for start in range(0, H, BLOCK):
                o = start + tl.arange(0, BLOCK)
                tl.store(p_gradient + o, tl.zeros([BLOCK], p_gradient.dtype.element_ty), o < H)
        return
    weight *= tl.load(layer_weights + place).to(A)
    p_student = row_of(pick(student, 0, LAYERS, j), strides, 0, EACH, j, b_row, l_row, MULTIPLE)
    p_teacher = ()
    stops = ()
    stop = 0
    for k in tl.static_range(PIECES):
        piece = row_of(pick(teacher, k * LAYERS, LAYERS, j), strides, 1 + k, EACH, j, b_row, l_row, MULTIPLE)
        p_teacher = p_teacher + (piece - stop,)  # type: ignore[assignment]  # noqa: RUF005  no Triton
        stop += number(widths, k, 1, 0) * MULTIPLE
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
        tl.store(row_losses + i_row, weight * value)
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
