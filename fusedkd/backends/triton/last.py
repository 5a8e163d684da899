"""Sums over all programs of a launch by the last of them to finish, always in the same order: the counts of rows, and
the loss. What a program leaves is exchanged, and read by an addition of 0, both of its bits: what another processor
wrote is then read where it lies, in L2. (The scheme is that of split sums in CUDA's threadFenceReduction sample.)
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import CE_WEIGHT, KD_WEIGHT


@triton.jit
def leave(values, kd, ce):
    """kd and ce, in the program's place of values [2, programs]."""
    INTEGER: tl.constexpr = tl.int64 if values.dtype.element_ty == tl.float64 else tl.int32
    to = values.to(tl.pointer_type(INTEGER), bitcast=True) + tl.program_id(0)
    tl.atomic_xchg(to, kd.to(values.dtype.element_ty).to(INTEGER, bitcast=True), sem="relaxed")
    tl.atomic_xchg(to + tl.num_programs(0), ce.to(values.dtype.element_ty).to(INTEGER, bitcast=True), sem="relaxed")


@triton.jit
def is_last(ticket):
    """Whether all others have left theirs. `ticket`: int32, 0, and again when the launch is done."""
    done = tl.atomic_add(ticket, 1, sem="acq_rel") + 1  # after `leave`, by the same thread
    if done == tl.num_programs(0):
        tl.atomic_xchg(ticket, 0, sem="relaxed")
    return done == tl.num_programs(0)


@triton.jit(noinline=True)
def totals(values, BLOCK: tl.constexpr):
    """Both sums in float64, by the last program. A call: inlined, it takes registers from the loops over a row."""
    INTEGER: tl.constexpr = tl.int64 if values.dtype.element_ty == tl.float64 else tl.int32
    programs = tl.num_programs(0)
    bits = values.to(tl.pointer_type(INTEGER), bitcast=True)
    b_kd = tl.zeros([BLOCK], tl.float64)
    b_ce = b_kd
    zero = tl.zeros([BLOCK], INTEGER)
    for start in range(0, programs, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < programs
        b_kd += kept(bits + o, zero, m).to(values.dtype.element_ty, bitcast=True)
        b_ce += kept(bits + programs + o, zero, m).to(values.dtype.element_ty, bitcast=True)
    return tl.sum(b_kd, 0), tl.sum(b_ce, 0)


@triton.jit
def kept(bits, zero, m):
    """What other programs left there."""
    return tl.where(m, tl.atomic_add(bits, zero, m, sem="relaxed"), 0)


@triton.jit
def weighted_sum(kd, ce, real_options):
    """Of both terms, float64; one whose weight is 0 adds 0."""
    kd_weight = tl.load(real_options + KD_WEIGHT)
    ce_weight = tl.load(real_options + CE_WEIGHT)
    return tl.where(kd_weight == 0, 0.0, kd_weight * kd) + tl.where(ce_weight == 0, 0.0, ce_weight * ce)


@triton.jit
def leave_row(kd, ce, row_losses, loss, terms, real_options, PER_ROW: tl.constexpr):
    """The row losses of a program's row, and the loss if it is one per row. Without `loss`, `kd_terms_kernel` makes it
    of them.
    """
    i_row = tl.program_id(0)
    rows = tl.num_programs(0)
    if loss is None:
        tl.store(row_losses + i_row, kd)
        tl.store(row_losses + rows + i_row, ce)
    elif PER_ROW:
        tl.store(loss + i_row, weighted_sum(kd, ce, real_options))
        if terms is not None:
            tl.store(terms + i_row, kd)
            tl.store(terms + rows + i_row, ce)
    else:
        leave(row_losses, kd, ce)


@triton.jit
def sum_rows(row_losses, loss, terms, ticket, real_options, normalizers):
    """The loss of all rows, by the last program, at a kernel's end."""
    if is_last(ticket):
        kd, ce = totals(row_losses, 512)
        kd /= tl.load(normalizers)
        ce /= tl.load(normalizers + 1)
        tl.store(loss, weighted_sum(kd, ce, real_options))
        if terms is not None:
            tl.store(terms, kd)
            tl.store(terms + 1, ce)
