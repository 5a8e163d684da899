"""The passes over a student's row of which the kernels of :mod:`fusedkd.backends.triton.topk_kernel` consist."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.cross_entropy import CEGradient, add_cross_entropy, cross_entropy_gradient, scaled
from fusedkd.backends.triton.layout import BUCKET_REVERSE, IGNORE_REVERSE, RENORMALIZE_REVERSE, TEMPERATURE
from fusedkd.backends.triton.math import INFINITY, LOG2E, exp_at_one, finite_or_zero, reciprocal_or_zero
from fusedkd.backends.triton.options import load_weights, power_of
from fusedkd.backends.triton.row import columns, logits, readable
from fusedkd.backends.triton.softmax import Stats, accumulate, join, merge, nothing, rest_of


@triton.jit
def statistics_pass(
    row,
    z,
    listed,
    p_marks,  # of the row, or None
    z_y,
    k,
    option,
    KERNEL_ID: tl.constexpr,
    CE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The statistics of the row, `other`: of the columns off the list if there are marks, else of all; and
    Σ (z − z_y) if labels are smoothed.
    """
    A: tl.constexpr = option.temperature.dtype
    MARKS: tl.constexpr = p_marks is not None
    power = power_of(option.temperature)
    smoothed = option.label_smoothing != 0
    seen = nothing(BLOCK // GROUP, A)
    shifted = tl.zeros([1], A)
    if MARKS:
        words = tl.cdiv(row.phase + row.V, 32)
        for start in range(0, words, BLOCK // 8):
            i_word = start + tl.arange(0, BLOCK // 8)
            tl.store(p_marks + i_word, tl.zeros([BLOCK // 8], tl.int32), i_word < words)
        tl.debug_barrier()
        o_id = tl.where(listed.m, row.phase + listed.ids, 0).to(tl.int32)
        tl.atomic_or(p_marks + o_id // 32, 1 << (o_id % 32), listed.m, sem="relaxed")
        tl.debug_barrier()
    if CE or KERNEL_ID != RENORMALIZE_REVERSE:
        for ENDS in tl.static_range(2):
            n_blocks = tl.where(z.stop > 0, row.n_ends if ENDS else row.n_body, 0)
            b_shifted = tl.zeros([1 if ENDS else BLOCK // GROUP], A)
            for i_block in range(n_blocks):
                o, m = columns(i_block, row, ENDS, BLOCK, GROUP)
                m = readable(z, o, m, ENDS)
                b = logits(z, o, m, A, TRANSFORM, "evict_last")[0]
                if CE and smoothed:
                    b_shifted += tl.sum(tl.where(m, b - finite_or_zero(z_y), 0.0), 1)
                if MARKS:
                    if ENDS:
                        b_marks = tl.load(p_marks + o // 32, m, other=0, cache_modifier=".cg")
                    else:  # a group of columns lies in one word
                        o_group = row.head + i_block * BLOCK + tl.arange(0, BLOCK // GROUP) * GROUP
                        b_marks = tl.load(p_marks + o_group // 32, o_group < row.body, other=0, cache_modifier=".cg")
                        b_marks = b_marks[:, None]
                    b = tl.where(((b_marks >> (o % 32)) & 1) != 0, -INFINITY, b)
                seen = accumulate(seen, b, k, power, CE)
            seen = merge(seen, k)
            shifted += tl.sum(b_shifted)
    top_c = tl.max(seen.top)
    rest_c = tl.sum(seen.rest)
    top = top_c
    rest = rest_c
    ce_max = top_c
    ce_rest = tl.sum(seen.rest_1)
    if MARKS or KERNEL_ID == RENORMALIZE_REVERSE:  # and of the list
        b_z = logits(z, row.phase + listed.ids, listed.m, A, TRANSFORM, "")[0]
        top, rest = rest_of(b_z, k)
        if MARKS:
            top, rest = join(top_c, rest_c, top, rest, k)
            if CE:
                top_k, rest_k = rest_of(b_z, LOG2E)
                ce_max, ce_rest = join(top_c, ce_rest, top_k, rest_k, LOG2E)
    found = Stats(
        student_max=top,
        student_rest=rest,
        other_max=top_c,
        other_rest=rest_c,
        ce_max=ce_max,
        ce_rest=ce_rest,
    )
    return found, tl.sum(shifted)


@triton.jit
def gradient_pass(
    row,
    z,
    p_gradient,
    listed,
    b_z,  # [BLOCK_K]: logits of the list, and the slope of their soft-cap and scale
    b_slope_k,
    slope,
    found,
    z_y,
    label,
    weight,
    up,
    k,
    option,
    real_options,
    normalizers,
    KERNEL_ID: tl.constexpr,
    CE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of the row, backwards; then that of the columns of the list, in their place."""
    A: tl.constexpr = option.temperature.dtype
    R: tl.constexpr = tl.float64
    term_weights = load_weights(real_options, R)
    temperature = tl.load(real_options + TEMPERATURE)
    REVERSE: tl.constexpr = (
        (KERNEL_ID == RENORMALIZE_REVERSE) | (KERNEL_ID == BUCKET_REVERSE) | (KERNEL_ID == IGNORE_REVERSE)
    )
    # Coefficients: 0 for a term that the row does not have, or that is infinite
    broken = (label.counted & (label.legal == 0)) | ((weight != 0) & (listed.legal == 0))
    finite = listed.kd & (found.student_rest != -1) & (broken == 0)
    if REVERSE:
        finite = finite & (slope.value != INFINITY)
    a_kd = up * term_weights.kd_weight * term_weights.kd_scale * weight / temperature / tl.load(normalizers)
    a_kd = tl.where(finite, a_kd, 0.0)
    has_ce = label.counted & label.legal & (broken == 0)
    b_d = tl.where(a_kd == 0, 0.0, a_kd * slope.listed)
    if CE:
        a_ce = tl.where(has_ce, up * term_weights.ce_weight / tl.load(normalizers + 1), 0.0)
        ce_max = found.ce_max.to(R)
        ce_rest = found.ce_rest.to(R)
        ce = cross_entropy_gradient(a_ce, z_y.to(R), ce_max, ce_rest, term_weights, V=row.columns)
        b_e1 = tl.exp(b_z.to(R) - finite_or_zero(ce_max))
        b_q1 = scaled(scaled(ce.q, reciprocal_or_zero(ce_rest)), b_e1)
        b_d = add_cross_entropy(b_d, b_q1, listed.ids, tl.where(has_ce, label.column, -1), ce)
    b_d = b_d.to(A)
    if TRANSFORM:
        b_d *= b_slope_k

    tl.debug_barrier()  # in place, no column may be written before every warp has read the list
    power = power_of(option.temperature)
    rest = tl.where(a_kd == 0, 0.0, a_kd * slope.rest).to(A)
    base_c = finite_or_zero(found.other_max)
    if CE:
        of_row = CEGradient(q=ce.q.to(A), other=ce.other.to(A), label=ce.label.to(A))
        from_c = reciprocal_or_zero(found.ce_rest) * tl.exp2((base_c - finite_or_zero(found.ce_max)) * LOG2E)
        from_c = scaled(of_row.q, from_c)  # from e^(z − top_c) to q·q₁
        o_label = tl.where(has_ce, row.phase + label.column, -1).to(tl.int32)
    for ENDS in tl.static_range(1, -1, -1):
        n_blocks = row.n_ends if ENDS else row.n_body
        for i in range(n_blocks):
            o, m = columns(n_blocks - 1 - i, row, ENDS, BLOCK, GROUP)
            b_g = tl.zeros(o.shape, A)
            if CE or KERNEL_ID != RENORMALIZE_REVERSE:
                b, b_slope = logits(z, o, readable(z, o, m, ENDS), A, TRANSFORM, "evict_first")
                b -= base_c
                b_e = tl.exp2(b * k)
                b_g = tl.where(rest == 0, 0.0, rest * b_e)  # 0, whatever the column holds
                if CE:
                    b_g = add_cross_entropy(b_g, scaled(from_c, exp_at_one(b_e, b, power)), o, o_label, of_row)
                if TRANSFORM:
                    b_g *= b_slope
            tl.store(p_gradient + o, b_g.to(p_gradient.dtype.element_ty), m, eviction_policy="evict_first")
    tl.debug_barrier()
    b_id = tl.load(listed.p_ids, listed.m, other=0) - listed.offset
    tl.store(p_gradient + row.phase + b_id, b_d.to(p_gradient.dtype.element_ty), listed.m)
