"""Small kernels around the rows: which of them have a KD term, how many, and the sums of their losses."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.last import is_last, leave, totals, weighted_sum
from fusedkd.backends.triton.layout import CE_WEIGHT, KD_SCALE, KD_WEIGHT, NORMALIZERS, OPTIONS, SCALE, TEMPERATURE
from fusedkd.backends.triton.math import INFINITY


@triton.jit(
    do_not_specialize=["ignore_index", "N", "L", "C", "stride_b", "stride_l"],
    do_not_specialize_on_alignment=[
        "teacher", "ids", "labels", "kd_mask", "normalizers", "given", "weights", "counts", "partials", "ticket",
    ],
)  # fmt: skip
def kd_row_weights_kernel(
    teacher,  # [B, L, C]
    ids,  # [N, C] or None
    labels,  # [N] or None
    kd_mask,  # [N] or None
    normalizers,  # [2] float64 or None: those that are not counted; or with `given` the recipe, [3, 20]
    given,  # real options and normalisers that are tensors, or None
    weights,  # [N] float32
    counts,  # [2] float64; with `given` [20]: the options after them
    partials,  # float64 [2, programs]: what each program has counted
    ticket,  # int32 [1]: 0, and again when the launch is done
    ignore_index: tl.int64,
    N,
    L,
    C,
    stride_b: tl.int64,
    stride_l: tl.int64,
    KD: tl.constexpr,  # otherwise no row has a KD term
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows each. The last program to finish adds up what all have counted, always in the same order."""
    i_program = tl.program_id(0)
    i = i_program * ROWS + tl.arange(0, ROWS)  # [ROWS], as all vectors below
    m_row = i < N
    labelled = tl.zeros([ROWS], tl.int1)
    if labels is not None:
        labelled = m_row & (tl.load(labels + i, m_row, other=0) != ignore_index)
    b_w = tl.zeros([ROWS], tl.float32)
    if KD:
        if kd_mask is not None:
            b_mask = tl.load(kd_mask + i, m_row, other=0)
            b_w = b_mask.to(tl.float32) if b_mask.dtype.is_floating() else (b_mask != 0).to(tl.float32)
        elif labels is not None:
            b_w = labelled.to(tl.float32)
        else:
            b_w = m_row.to(tl.float32)
        # An all −∞ teacher row is not selected. Almost always the first block decides.
        o_row = (i // L).to(tl.int64) * stride_b + (i % L).to(tl.int64) * stride_l
        found = (b_w == 0).to(tl.int32)
        start = 0
        while (tl.min(found, 0) == 0) & (start < C):
            o = start + tl.arange(0, BLOCK)
            m = (found == 0)[:, None] & (o < C)[None, :]
            b_known = tl.load(teacher + o_row[:, None] + o[None, :], m, other=-INFINITY) != -INFINITY
            if ids is not None:
                b_known = b_known & (tl.load(ids + i.to(tl.int64)[:, None] * C + o[None, :], m, other=-1) >= 0)
            found = tl.maximum(found, tl.max(b_known.to(tl.int32), 1))
            start += BLOCK
        b_w = tl.where(found != 0, b_w, 0.0)
    tl.store(weights + i, b_w, m_row)

    SUM: tl.constexpr = kd_mask is not None and kd_mask.dtype.element_ty.is_floating()
    n_kd = tl.sum(b_w.to(tl.float64) if SUM else (b_w != 0).to(tl.float64), 0)
    n_ce = tl.sum(labelled.to(tl.float64), 0)
    leave(partials, n_kd, n_ce)
    if is_last(ticket):
        n_kd, n_ce = totals(partials, 512)
        if given is not None:
            n_kd, n_ce = pack_given(normalizers, given, counts, n_kd, n_ce)
        elif normalizers is not None:
            n_kd = given_or(tl.load(normalizers), n_kd)
            n_ce = given_or(tl.load(normalizers + 1), n_ce)
        tl.store(counts, tl.where(n_kd <= 0, 1.0, n_kd))
        tl.store(counts + 1, tl.where(n_ce <= 0, 1.0, n_ce))


@triton.jit
def pack_given(recipe, given, values, n_kd, n_ce):
    """The real options, into `values`, by :func:`fusedkd.backends.call.recipe`; returns the normalisers."""
    VALUES: tl.constexpr = NORMALIZERS + OPTIONS
    i = tl.arange(0, 32)
    m = i < VALUES
    b_place = tl.load(recipe + VALUES + i, m, other=-1.0).to(tl.int32)
    b_power = tl.load(recipe + 2 * VALUES + i, m, other=1.0)
    b_given = tl.load(given + b_place, b_place >= 0, other=0.0).to(tl.float64)
    b_given = tl.where(b_power == 2, b_given * b_given, b_given)
    b = tl.where(b_place >= 0, b_given, tl.load(recipe + i, m, other=0.0))
    tl.store(values + i, b, m & (i >= NORMALIZERS))
    n_kd = given_or(tl.sum(tl.where(i == 0, b, 0.0), 0), n_kd)
    n_ce = given_or(tl.sum(tl.where(i == 1, b, 0.0), 0), n_ce)
    return n_kd, n_ce


@triton.jit
def given_or(given, count):
    """COUNTED is minus infinity."""
    return tl.where(given == -INFINITY, count, given)


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["weights", "real_options", "normalizers", "slope", "found"],
)
def linear_unit_kernel(
    weights,  # [N] float32
    real_options,  # float64 [OPTIONS]
    normalizers,  # float64 [2]
    slope,  # float64 []
    found,  # float64 [3]: the unit, and the normalisers in it
    N,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`fusedkd.backends.linear_loop.linear_unit`, by one program."""
    b_top = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_top = tl.maximum(b_top, tl.abs(tl.load(weights + i, i < N, other=0.0)))
    n_kd = tl.load(normalizers)
    n_ce = tl.load(normalizers + 1)
    kd = tl.load(slope) * tl.max(b_top, 0) * tl.load(real_options + KD_SCALE) / tl.load(real_options + TEMPERATURE)
    reach = tl.abs(weighted_sum(kd / n_kd, 0.0, real_options)) + tl.abs(weighted_sum(0.0, 1.0 / n_ce, real_options))
    reach *= tl.load(real_options + SCALE)
    room = TOP / tl.where(reach > 0, reach, 1.0)
    unit = (room.to(tl.int64, bitcast=True) >> 52 << 52).to(tl.float64, bitcast=True)  # the power of 2 below
    tl.store(found, unit)
    tl.store(found + 1, n_kd / unit)
    tl.store(found + 2, n_ce / unit)


@triton.jit
def weighted_of(b_kd, real_options, i, options_stride, m):
    """Row losses times the weights of the rows; one whose weight is 0 adds 0."""
    b_weight = tl.load(real_options + i.to(tl.int64) * options_stride + KD_WEIGHT, m, other=0.0)
    return tl.where(b_weight == 0, 0.0, b_weight * b_kd)


@triton.jit(
    do_not_specialize=["N", "options_stride"],
    do_not_specialize_on_alignment=["row_losses", "real_options", "normalizers", "loss", "terms"],
)
def kd_terms_kernel(
    row_losses,  # A, [2, N]
    real_options,  # float64 [OPTIONS] or [N, OPTIONS]
    normalizers,  # float64 [2]
    loss,  # A, [] or [N]
    terms,  # A, [2] or [2, N], or None
    N,
    options_stride,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums: one program, in float64."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PER_ROW:
        b_kd = tl.load(row_losses + i, i < N, other=0.0).to(tl.float64)
        b_ce = tl.load(row_losses + N + i, i < N, other=0.0).to(tl.float64)
        b_weighted = weighted_of(b_kd, real_options, i, options_stride, i < N)
    else:
        b_kd = tl.zeros([BLOCK], tl.float64)
        b_ce = b_kd
        b_weighted = b_kd
        for start in range(0, N, BLOCK):
            b_x = tl.load(row_losses + start + i, start + i < N, other=0.0).to(tl.float64)
            b_kd += b_x
            b_weighted += weighted_of(b_x, real_options, start + i, options_stride, start + i < N)
            b_ce += tl.load(row_losses + N + start + i, start + i < N, other=0.0).to(tl.float64)
        b_kd = tl.sum(b_kd, 0) / tl.load(normalizers)
        b_weighted = tl.sum(b_weighted, 0) / tl.load(normalizers)
        b_ce = tl.sum(b_ce, 0) / tl.load(normalizers + 1)
    ce_weight = tl.load(real_options + CE_WEIGHT)
    b_loss = b_weighted + tl.where(ce_weight == 0, 0.0, ce_weight * b_ce)
    if PER_ROW:
        tl.store(loss + i, b_loss, i < N)
        if terms is not None:
            tl.store(terms + i, b_kd, i < N)
            tl.store(terms + N + i, b_ce, i < N)
    else:
        tl.store(loss, b_loss)
        if terms is not None:
            tl.store(terms, b_kd)
            tl.store(terms + 1, b_ce)
