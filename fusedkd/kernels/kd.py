"""The KD operators of :mod:`fusedkd.ops` on :mod:`fusedkd.kernels.kd_kernel`: outputs and launches. Nothing here waits
for the GPU. A forward call is four launches: weights, their counts, the rows (three for split ones), the terms.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedkd.divergences import Form
from fusedkd.kernels.choice import FUSED, Case, choose, describe, layout
from fusedkd.kernels.divergences import MEASURED
from fusedkd.kernels.kd_kernel import FINISH, STATISTICS, VALUES, WHOLE, kd_kernel
from fusedkd.kernels.math import INFINITY
from fusedkd.kernels.rows import PARTIALS, aligned, in_phase


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


@triton.jit(do_not_specialize=["ignore_index", "N"], do_not_specialize_on_alignment=["weights", "labels", "counts"])
def kd_counts_kernel(
    weights,  # [N] float32
    labels,  # [N] or None
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
    tl.store(counts, tl.where(n_kd <= 0, 1.0, n_kd))
    tl.store(counts + 1, tl.where(n_ce <= 0, 1.0, n_ce))


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["rows", "real_options", "normalizers", "loss", "kd", "ce"],
)
def kd_terms_kernel(
    rows,  # A, [2, N]
    real_options,  # float64 [16]
    normalizers,  # float64 [2]
    loss,  # A, [] or [N], as the two below
    kd,
    ce,
    N,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums: one program, in float64."""
    kd_weight = tl.load(real_options + 3)
    ce_weight = tl.load(real_options + 4)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PER_ROW:
        b_kd = tl.load(rows + i, i < N, other=0.0).to(tl.float64)
        b_ce = tl.load(rows + N + i, i < N, other=0.0).to(tl.float64)
    else:
        b_kd = tl.zeros([BLOCK], tl.float64)
        b_ce = b_kd
        for start in range(0, N, BLOCK):
            b_kd += tl.load(rows + start + i, start + i < N, other=0.0).to(tl.float64)
            b_ce += tl.load(rows + N + start + i, start + i < N, other=0.0).to(tl.float64)
        b_kd = tl.sum(b_kd, 0) / tl.load(normalizers)
        b_ce = tl.sum(b_ce, 0) / tl.load(normalizers + 1)
    b_loss = tl.where(kd_weight == 0, 0.0, kd_weight * b_kd) + tl.where(ce_weight == 0, 0.0, ce_weight * b_ce)
    if PER_ROW:
        tl.store(loss + i, b_loss, i < N)
        tl.store(kd + i, b_kd, i < N)
        tl.store(ce + i, b_ce, i < N)
    else:
        tl.store(loss, b_loss)
        tl.store(kd, b_kd)
        tl.store(ce, b_ce)


class Call(NamedTuple):
    """What every operator is given, from the student on, without the statistics."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    weights: Tensor
    options: Tensor
    normalizers: Tensor
    ignore_index: int
    form: int
    transform: bool
    ce: bool

    def launch(
        self,
        stats: Tensor,
        rows: Tensor | None = None,
        upstream: Tensor | None = None,
        gradient: Tensor | None = None,
        rescale: bool = False,
    ) -> None:
        """With `rows`, values, statistics and, if it is given, the gradient; otherwise the gradient alone."""
        B, L, V = self.student.shape
        n, C, dtype, device = B * L, self.teacher.shape[2], self.student.dtype, describe(self.student.device)
        if n == 0:
            return
        forward, measured = rows is not None, self.form in MEASURED
        case = Case(n, V, C, dtype, self.teacher.dtype, self.form, self.transform, forward)
        kernel, parts = choose(case, device)
        tail = self.ignore_index, self.form, self.transform, self.ce
        if kernel == "cluster":
            up = None if upstream is None else upstream.contiguous()
            if torch.ops.fusedkd.kd_cluster(*self[:6], up, rows, stats, gradient, *tail, rescale):
                return
            kernel, parts = choose(case, device._replace(cluster=False))
        p_student, o_student = aligned(self.student)
        p_teacher, o_teacher = aligned(self.teacher)
        p_gradient, o_gradient = (None, o_student) if gradient is None else aligned(gradient)
        teacher_in_phase = in_phase(o_teacher, o_student, B, L)
        gradient_in_phase = in_phase(o_gradient, o_student, B, L)
        resident = kernel == "resident"
        blocks = layout(
            dtype,
            C if resident else V,
            self.form,
            teacher=self.teacher.dtype,
            resident=resident,
            transform=self.transform,
            ce=self.ce,
            in_phase=teacher_in_phase and gradient_in_phase,
            hip=device.hip,
        )
        partials = stats.new_empty(n, PARTIALS.value, parts) if forward and parts > 1 else None

        def stage(stage: tl.constexpr, parts: int, rows: Tensor | None, gradient: Tensor | None) -> None:
            kd_kernel[n, parts](
                p_student,
                p_teacher,
                self.labels if self.ce or self.form == Form.DKD else None,
                self.weights,
                self.options,
                self.normalizers,
                upstream,
                rows,
                stats,
                gradient,
                partials,
                self.ignore_index,
                upstream.stride(0) if upstream is not None and upstream.dim() else 0,
                parts if partials is None else partials.shape[2],
                L,
                V,
                C,
                *o_student,
                *o_teacher,
                *o_gradient,
                FORM=self.form,
                MEASURED=measured,
                CE=self.ce,
                TRANSFORM=self.transform,
                SURPLUS=C < V,
                RESCALE=rescale,
                RESIDENT=resident,
                SPLIT=kernel == "split",
                STAGE=stage.value,
                TEACHER_IN_PHASE=teacher_in_phase,
                GRADIENT_IN_PHASE=gradient_in_phase,
                **blocks,
            )

        with torch.cuda.device_of(self.student):
            if partials is None:
                stage(WHOLE, parts, rows, p_gradient)
                return
            stage(STATISTICS, parts, None, None)
            stage(VALUES, parts, None, None if measured else p_gradient)
            writes = measured and gradient is not None
            stage(FINISH, parts if writes else 1, rows, p_gradient if writes else None)

    def rows_and_stats(self) -> tuple[Tensor, Tensor]:
        n = self.student.shape[0] * self.student.shape[1]
        dtype = torch.float64 if self.student.dtype == torch.float64 else torch.float32
        return self.student.new_empty(2, n, dtype=dtype), self.student.new_empty(n, 8, dtype=dtype)


# -------------------------------------------------- the operators of fusedkd.ops


def kd_row_weights(
    teacher: Tensor, ids: Tensor | None, labels: Tensor | None, kd_mask: Tensor | None, ignore_index: int, kd: bool
) -> tuple[Tensor, Tensor]:
    B, L, C = teacher.shape
    weights = teacher.new_empty(B * L, dtype=torch.float32) if kd else teacher.new_zeros(B * L, dtype=torch.float32)
    counts = teacher.new_empty(2, dtype=torch.float64)
    summed = kd_mask is not None and kd_mask.is_floating_point()
    with torch.cuda.device_of(teacher):
        if kd and B * L > 0:
            strides = teacher.stride()[:2]
            kd_row_weights_kernel[(B * L,)](
                teacher, ids, labels, kd_mask, weights, ignore_index, L, C, *strides, BLOCK=128, num_warps=1, **FUSED
            )
        sizes = ignore_index, B * L
        kd_counts_kernel[(1,)](weights, labels, counts, *sizes, SUM=summed, BLOCK=8192, num_warps=16, **FUSED)
    return weights, counts


def kd_terms(rows: Tensor, options: Tensor, normalizers: Tensor, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    n = rows.shape[1]
    shape = (n,) if per_row else ()
    loss, kd, ce = (rows.new_empty(shape) for _ in range(3))
    programs = triton.cdiv(n, 2048) if per_row else 1
    if programs > 0:
        with torch.cuda.device_of(rows):
            kd_terms_kernel[(programs,)](
                rows, options, normalizers, loss, kd, ce, n, PER_ROW=per_row, BLOCK=2048, num_warps=16, **FUSED
            )
    return loss, kd, ce


def kd_forward(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(student, *arguments[:-1])
    rows, stats = call.rows_and_stats()
    gradient = student.new_empty(student.shape) if arguments[-1] else None
    call.launch(stats, rows, gradient=gradient)
    return rows, stats, student.new_empty(0) if gradient is None else gradient


def kd_forward_(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(student, *arguments)
    rows, stats = call.rows_and_stats()
    call.launch(stats, rows, gradient=student)
    return rows, stats


def kd_backward(upstream: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    gradient = student.new_empty(student.shape)
    call, stats = Call(student, *arguments[:5], *arguments[6:]), arguments[5]
    call.launch(stats, upstream=upstream, gradient=gradient)
    return gradient


def kd_rescale_(gradient: Tensor, upstream: Tensor, student: Tensor, *arguments: Any) -> None:
    call, stats = Call(student, *arguments[:5], *arguments[6:]), arguments[5]
    call.launch(stats, upstream=upstream, gradient=gradient, rescale=True)
