"""Launches of :mod:`fusedkd.backends.triton.kd_kernel`, for a teacher with logits."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton.language as tl
from torch import Tensor

from fusedkd.backends.layout import NEEDS_WEIGHT_SUM, KernelId
from fusedkd.backends.triton.call import Call
from fusedkd.backends.triton.choice import Case, choose, describe, layout
from fusedkd.backends.triton.kd_kernel import FINISH, STATISTICS, VALUES, WHOLE, kd_kernel
from fusedkd.backends.triton.rows import PARTIALS, aligned, in_phase


def launch(
    call: Call,
    stats: Tensor,
    row_losses: Tensor | None = None,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
    skip_if_one: bool = False,
) -> None:
    """With `row_losses`, values, statistics and, if it is given, the gradient; otherwise the gradient alone."""
    B, L, V = call.student.shape
    n, C, dtype, device = B * L, call.teacher.shape[2], call.student.dtype, describe(call.student.device)
    forward, measured = row_losses is not None, call.kernel_id in NEEDS_WEIGHT_SUM
    case = Case(n, V, C, dtype, call.teacher.dtype, call.kernel_id, call.transform, forward)
    kernel, parts = choose(case, device)
    if kernel == "cluster":
        done = torch.ops.fusedkd.kd_cluster(
            student=call.student,
            teacher=call.teacher,
            labels=call.labels,
            row_weights=call.row_weights,
            options=call.options,
            normalizers=call.normalizers,
            upstream=None if upstream is None else upstream.contiguous(),
            row_losses=row_losses,
            stats=stats,
            gradient=gradient,
            ignore_index=call.ignore_index,
            kernel_id=call.kernel_id,
            transform=call.transform,
            ce=call.ce,
            skip_if_one=skip_if_one,
        )
        if done:
            return
        kernel, parts = choose(case, device._replace(cluster=False))
    p_student, o_student = aligned(call.student)
    p_teacher, o_teacher = aligned(call.teacher)
    p_gradient, o_gradient = (None, o_student) if gradient is None else aligned(gradient)
    teacher_in_phase = in_phase(o_teacher, o_student, B, L)
    gradient_in_phase = in_phase(o_gradient, o_student, B, L)
    resident = kernel == "resident"
    blocks = layout(
        dtype,
        C if resident else V,
        call.kernel_id,
        teacher=call.teacher.dtype,
        resident=resident,
        transform=call.transform,
        ce=call.ce,
        in_phase=teacher_in_phase and gradient_in_phase,
        hip=device.hip,
    )
    partials = stats.new_empty(n, PARTIALS.value, parts) if forward and parts > 1 else None

    def stage(stage: tl.constexpr, parts: int, rows: Tensor | None, gradient: Tensor | None) -> None:
        kd_kernel[n, parts](
            p_student,
            p_teacher,
            call.labels if call.ce or call.kernel_id == KernelId.DKD else None,
            call.row_weights,
            call.options,
            call.normalizers,
            upstream,
            rows,
            stats,
            gradient,
            partials,
            call.ignore_index,
            upstream.stride(0) if upstream is not None and upstream.dim() else 0,
            parts if partials is None else partials.shape[2],
            L,
            V,
            C,
            *o_student,
            *o_teacher,
            *o_gradient,
            FORM=call.kernel_id,
            MEASURED=measured,
            CE=call.ce,
            TRANSFORM=call.transform,
            SURPLUS=C < V,
            RESCALE=skip_if_one,
            RESIDENT=resident,
            SPLIT=kernel == "split",
            STAGE=stage.value,
            TEACHER_IN_PHASE=teacher_in_phase,
            GRADIENT_IN_PHASE=gradient_in_phase,
            **blocks,
        )

    with torch.cuda.device_of(call.student):
        if partials is None:
            stage(WHOLE, parts, row_losses, p_gradient)
            return
        stage(STATISTICS, parts, None, None)
        stage(VALUES, parts, None, None if measured else p_gradient)
        writes = measured and gradient is not None
        stage(FINISH, parts if writes else 1, row_losses, p_gradient if writes else None)
