"""Sums over all programs of a launch by the last of them to finish, always in the same order. What a program leaves is
exchanged, and read by an addition of 0, both of its bits: what another processor wrote is then read where it lies, in
L2. (The scheme is that of CUDA's threadFenceReduction sample.)
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def is_last(values, kd, ce, ticket):
    """Leave kd and ce in the program's place of values [2, programs]; whether all others have done so. `ticket`: int32,
    0, and again when the launch is done.
    """
    INTEGER: tl.constexpr = tl.int64 if values.dtype.element_ty == tl.float64 else tl.int32
    programs = tl.num_programs(0)
    to = values.to(tl.pointer_type(INTEGER), bitcast=True) + tl.program_id(0)
    tl.atomic_xchg(to, kd.to(values.dtype.element_ty).to(INTEGER, bitcast=True))
    tl.atomic_xchg(to + programs, ce.to(values.dtype.element_ty).to(INTEGER, bitcast=True))
    done = tl.atomic_add(ticket, 1, sem="acq_rel") + 1
    if done == programs:
        tl.atomic_xchg(ticket, 0)
    return done == programs


@triton.jit
def totals(values, BLOCK: tl.constexpr):
    """Both sums in float64, by the last program."""
    INTEGER: tl.constexpr = tl.int64 if values.dtype.element_ty == tl.float64 else tl.int32
    programs = tl.num_programs(0)
    bits = values.to(tl.pointer_type(INTEGER), bitcast=True)
    b_kd = tl.zeros([BLOCK], tl.float64)
    b_ce = b_kd
    zero = tl.zeros([BLOCK], INTEGER)
    for start in range(0, programs, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < programs
        b_kd += tl.where(m, tl.atomic_add(bits + o, zero, m), 0).to(values.dtype.element_ty, bitcast=True)
        b_ce += tl.where(m, tl.atomic_add(bits + programs + o, zero, m), 0).to(values.dtype.element_ty, bitcast=True)
    return tl.sum(b_kd, 0), tl.sum(b_ce, 0)
