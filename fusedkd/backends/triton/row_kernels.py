"""Small kernels around the rows: which of them have a KD term, how many, and the sums of their losses."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import CE_WEIGHT, KD_WEIGHT
from fusedkd.backends.triton.math import INFINITY


@triton.jit(
    do_not_specialize=["ignore_index", "L", "C", "stride_b", "stride_l"],
    do_not_specialize_on_alignment=["teacher", "ids", "labels", "kd_mask", "weights"],
)
def kd_row_weights_kernel(
    teacher,  # [B, L, C]
    ids,  # [N, C] or None
    labels,  # [N] or None
    kd_mask,  # [N] or None
    weights,  # [N] float32
    ignore_index: tl.int64,
    L,
    C,
    stride_b: tl.int64,
    stride_l: tl.int64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    w = 1.0
    if kd_mask is not None:
        w = tl.load(kd_mask + row)
        w = w.to(tl.float32) if w.dtype.is_floating() else (w != 0).to(tl.float32)
    elif labels is not None:
        w = (tl.load(labels + row) != ignore_index).to(tl.float32)
    # An all −∞ teacher row is not selected. Almost always the first block decides.
    p_row = teacher + (row // L).to(tl.int64) * stride_b + (row % L).to(tl.int64) * stride_l
    end = tl.where(w != 0, C, 0)
    found = 0
    start = 0
    while (found == 0) & (start < end):
        o = start + tl.arange(0, BLOCK)
        b_known = tl.load(p_row + o, o < end, other=-INFINITY) != -INFINITY
        if ids is not None:
            b_known = b_known & (tl.load(ids + row.to(tl.int64) * C + o, o < end, other=-1) >= 0)
        found = tl.max(b_known.to(tl.int32), 0)
        start += BLOCK
    tl.store(weights + row, tl.where(found != 0, w, 0.0))


@triton.jit(
    do_not_specialize=["ignore_index", "N"],
    do_not_specialize_on_alignment=["weights", "labels", "normalizers", "counts"],
)
def kd_counts_kernel(
    weights,  # [N] float32
    labels,  # [N] or None
    normalizers,  # [2] float64 or None: those that are not counted
    counts,  # [2] float64
    ignore_index: tl.int64,
    N,
    SUM: tl.constexpr,  # the weights; otherwise how many are not 0
    BLOCK: tl.constexpr,
):
    """One program, so that the order of summation is always the same."""
    selected = tl.zeros([BLOCK], tl.float64)
    labelled = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_w = tl.load(weights + i, i < N, other=0.0)
        selected += b_w.to(tl.float64) if SUM else (b_w != 0).to(tl.float64)
        if labels is not None:
            labelled += tl.where(i < N, tl.load(labels + i, i < N, other=0) != ignore_index, False).to(tl.int32)
    n_kd = tl.sum(selected, 0)
    n_ce = tl.sum(labelled, 0).to(tl.float64)
    if normalizers is not None:
        n_kd = given_or(tl.load(normalizers), n_kd)
        n_ce = given_or(tl.load(normalizers + 1), n_ce)
    tl.store(counts, tl.where(n_kd <= 0, 1.0, n_kd))
    tl.store(counts + 1, tl.where(n_ce <= 0, 1.0, n_ce))


@triton.jit
def given_or(given, count):
    """COUNTED is minus infinity."""
    return tl.where(given == -INFINITY, count, given)


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["row_losses", "real_options", "normalizers", "loss", "terms"],
)
def kd_terms_kernel(
    row_losses,  # A, [2, N]
    real_options,  # float64 [16]
    normalizers,  # float64 [2]
    loss,  # A, [] or [N]
    terms,  # A, [2] or [2, N], or None
    N,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums: one program, in float64."""
    kd_weight = tl.load(real_options + KD_WEIGHT)
    ce_weight = tl.load(real_options + CE_WEIGHT)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PER_ROW:
        b_kd = tl.load(row_losses + i, i < N, other=0.0).to(tl.float64)
        b_ce = tl.load(row_losses + N + i, i < N, other=0.0).to(tl.float64)
    else:
        b_kd = tl.zeros([BLOCK], tl.float64)
        b_ce = b_kd
        for start in range(0, N, BLOCK):
            b_kd += tl.load(row_losses + start + i, start + i < N, other=0.0).to(tl.float64)
            b_ce += tl.load(row_losses + N + start + i, start + i < N, other=0.0).to(tl.float64)
        b_kd = tl.sum(b_kd, 0) / tl.load(normalizers)
        b_ce = tl.sum(b_ce, 0) / tl.load(normalizers + 1)
    b_loss = tl.where(kd_weight == 0, 0.0, kd_weight * b_kd) + tl.where(ce_weight == 0, 0.0, ce_weight * b_ce)
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
