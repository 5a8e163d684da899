"""Launches of :mod:`fusedkd.backends.triton.kd_kernel`, for a teacher with logits."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
from torch import Tensor

from fusedkd.backends.call import Call
from fusedkd.backends.layout import NEEDS_WEIGHT_SUM, KernelId
from fusedkd.backends.triton.choice import Case, choose, describe, layout
from fusedkd.backends.triton.kd_kernel import (
    FINISH,
    PARTIALS,
    STATISTICS,
    VALUES,
    WHOLE,
    kd_backward_kernel,
    kd_forward_kernel,
)
from fusedkd.backends.triton.kd_shard import kd_shard_kernel
from fusedkd.backends.triton.result import NO_RESULT, Result
from fusedkd.backends.triton.row import aligned, in_phase, stride_of, upstream_of


def launch(
    call: Call,
    stats: Tensor,
    row_losses: Tensor | None = None,
    result: Result = NO_RESULT,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
    skip_if_one: bool = False,
) -> bool:
    """With `row_losses`, values, statistics and, if it is given, the gradient; otherwise the gradient alone. Whether
    `result` is there.
    """
    B, L, V = call.student.shape
    device = describe(call.student.device)
    case = Case(
        rows=B * L,
        V=V,
        C=call.teacher.shape[2],
        student=call.student.dtype,
        teacher=call.teacher.dtype,
        kernel_id=call.kernel_id,
        transform=call.transform,
        forward=row_losses is not None,
        own_options=call.options.dim() == 2,
    )
    kernel, parts = choose(case, device)
    if kernel == "cluster":
        if _cluster(call, stats, row_losses, upstream, gradient, skip_if_one):
            return False
        kernel, parts = choose(case, device._replace(cluster=False))
    given = _given(call, stats, gradient, parts, kernel == "resident", device.hip)
    with torch.cuda.device_of(call.student):
        if row_losses is None:
            _backward(given, upstream, skip_if_one, grid=(case.rows, parts))
        elif kernel == "split":
            _split_forward(given, row_losses, result, rows=case.rows, parts=parts)
        else:
            kd_forward_kernel[case.rows, 1](
                **given,
                row_losses=row_losses,
                **result._asdict(),
                partials=None,
                RESIDENT=kernel == "resident",
                STAGE=WHOLE.value,
            )
    return result.loss is not None


def launch_shard(call: Call, stats: Tensor, gradient: Tensor | None, **place: Any) -> None:
    """A stage of one rank's columns of a vocabulary; `place`: what the kernel is told of both, and of the upstream."""
    hip = describe(call.student.device).hip
    given = _given(call, stats, gradient, parts=1, resident=False, hip=hip)
    for of_whole in ("parts", "C", "SURPLUS", "SPLIT"):
        del given[of_whole]
    with torch.cuda.device_of(call.student):
        kd_shard_kernel[(call.student.shape[0] * call.student.shape[1],)](**given, **place)


def _backward(given: dict[str, Any], upstream: Tensor | None, skip_if_one: bool, grid: tuple[int, int]) -> None:
    kd_backward_kernel[grid](**given, **upstream_of(upstream, skip_if_one))


def _split_forward(given: dict[str, Any], row_losses: Tensor, result: Result, rows: int, parts: int) -> None:
    """Stage by stage: see `kd_kernel.STATISTICS`."""
    given |= {"row_losses": row_losses, "partials": row_losses.new_empty(rows, PARTIALS.value, parts)}
    waits = given["NEEDS_WEIGHT_SUM"] and given["gradient"] is not None
    early = None if waits else given["gradient"]
    for stage, programs, gradient in ((STATISTICS, parts, None), (VALUES, parts, early), (FINISH, 1, None)):
        of_stage = {"gradient": gradient} | (result if stage is FINISH else NO_RESULT)._asdict()
        kd_forward_kernel[rows, programs](**given | of_stage, RESIDENT=False, STAGE=stage.value)
    if waits:
        del given["row_losses"], given["partials"]
        _backward(given, upstream=None, skip_if_one=False, grid=(rows, parts))


def _given(call: Call, stats: Tensor, gradient: Tensor | None, parts: int, resident: bool, hip: bool) -> dict[str, Any]:
    """What both kernels are given."""
    B, L, V = call.student.shape
    C = call.teacher.shape[2]
    student, at_student = aligned(call.student)
    teacher, at_teacher = aligned(call.teacher)
    to, at_gradient = (None, at_student) if gradient is None else aligned(gradient)
    teacher_in_phase = in_phase(at_teacher, at_student, B, L)
    gradient_in_phase = in_phase(at_gradient, at_student, B, L)
    blocks = layout(
        call.student.dtype,
        C if resident else V,
        call.kernel_id,
        teacher=call.teacher.dtype,
        resident=resident,
        transform=call.transform,
        surplus=V > C,
        ce=call.ce,
        in_phase=teacher_in_phase and gradient_in_phase,
        hip=hip,
    )
    return {
        "student": student,
        "teacher": teacher,
        "labels": call.labels if call.ce or call.kernel_id == KernelId.DKD else None,
        "weights": call.row_weights,
        "real_options": call.options,
        "normalizers": call.normalizers,
        "stats": stats,
        "gradient": to,
        "ignore_index": call.ignore_index,
        "options_stride": stride_of(call.options),
        "parts": parts,
        "L": L,
        "V": V,
        "C": C,
        **_places("student", at_student),
        **_places("teacher", at_teacher),
        **_places("gradient", at_gradient),
        "KERNEL_ID": int(call.kernel_id),
        "NEEDS_WEIGHT_SUM": call.kernel_id in NEEDS_WEIGHT_SUM,
        "CE": call.ce,
        "TRANSFORM": call.transform,
        "SURPLUS": C < V,
        "SPLIT": parts > 1,
        "TEACHER_IN_PHASE": teacher_in_phase,
        "GRADIENT_IN_PHASE": gradient_in_phase,
        **blocks,
    }


def _places(name: str, at: tuple[int, ...]) -> dict[str, int]:
    return dict(zip((f"{name}_o", f"{name}_b", f"{name}_l"), at, strict=True))


def _cluster(
    call: Call,
    stats: Tensor,
    row_losses: Tensor | None,
    upstream: Tensor | None,
    gradient: Tensor | None,
    skip_if_one: bool,
) -> bool:
    """Whether the device has room for a row in a cluster, which then has answered the call."""
    done: bool = torch.ops.fusedkd.kd_cluster(
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
    return done
