"""Launches of the Triton kernels of logits, for `test_triton_launch.py`: a teacher with logits or of listed columns, a
split vocabulary, statistics of rows, and the small kernels beside them.
"""

from __future__ import annotations

from functools import partial

import torch
from launch_cases import BF16, F16, F32, F64, call, rows, vector
from operators import Inputs
from torch import Tensor

from fusedkd.backends.layout import OPTIONS, SHARD_STATS, STATS, KernelId, Stage, TopkKernelId
from fusedkd.backends.triton import launch
from fusedkd.backends.triton.kd_naive import kd_naive


def options_of(aligned: bool) -> Tensor:
    """That all rows share."""
    return vector(OPTIONS, F64, aligned)


def inputs_of(
    student: Tensor, teacher: Tensor, ids: Tensor | None, form: int, labels: bool, transform: bool, aligned: bool
) -> Inputs:
    n = student.shape[1]
    return {
        "student": student,
        "teacher": teacher,
        "ids": ids,
        "labels": vector(n, torch.int64, aligned) if labels else None,
        "row_weights": vector(n, F32, aligned),
        "options": options_of(aligned),
        "normalizers": vector(2, F64, aligned),
        "ignore_index": -100,
        "kernel_id": int(form),
        "transform": transform,
        "ce": labels,
    }


def launch_kd(
    operator: str,
    columns: int,
    form: KernelId = KernelId.FORWARD_KL,
    *,
    n: int = 300,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    surplus: int = 0,
    gap: int = 0,
    labels: bool = True,
    transform: bool = False,
    gradient: bool = True,
    upstream: str = "scalar",
    aligned: bool = True,
) -> None:
    """A teacher with logits, all of the options."""
    student, teacher = rows(n, columns, dtypes[0], gap), rows(n, columns - surplus, dtypes[1])
    exact = F64 if dtypes[0] == F64 else F32
    inputs = inputs_of(student, teacher, None, form, labels, transform, aligned)
    up = vector(1, exact, aligned).squeeze(0) if upstream == "scalar" else vector(n, exact, aligned)
    stats = vector(n * 8, exact, aligned).view(n, 8)
    call(operator, inputs, up, stats, gradient, launch)


def launch_statistics(
    columns: int = 50257,
    *,
    n: int = 300,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    gap: int = 0,
    labels: bool = True,
    transform: bool = False,
    of_teacher: bool = True,
    aligned: bool = True,
) -> None:
    launch.kd_statistics(
        student=rows(n, columns + gap, dtypes[0], gap),
        teacher=rows(n, columns, dtypes[1]),
        labels=vector(n, torch.int64, aligned) if labels else None,
        row_weights=vector(n, F32, aligned),
        options=options_of(aligned),
        transform=transform,
        of_teacher=of_teacher,
        columns=columns,
        ignore_index=-100,
    )


def launch_topk(
    operator: str,
    form: TopkKernelId,
    *,
    columns: int = 3000,
    k: int = 50,
    n: int = 300,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, F32),
    gap: int = 0,
    labels: bool = True,
    transform: bool = False,
    gradient: bool = True,
    aligned: bool = True,
) -> None:
    student, teacher = rows(n, columns, dtypes[0], gap), rows(n, k, dtypes[1])
    exact = F64 if dtypes[0] == F64 else F32
    ids = vector(n * k, torch.int64, aligned).view(n, k)
    inputs = inputs_of(student, teacher, ids, form, labels, transform, aligned)
    stats, up = vector(n * 8, exact, aligned).view(n, 8), vector(n, exact, aligned)
    call(operator, inputs, up, stats, gradient, launch)


def launch_shard(
    stage: Stage,
    form: KernelId | TopkKernelId = KernelId.FORWARD_KL,
    *,
    k: int | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    gap: int = 0,
    labels: bool = True,
    transform: bool = False,
    gradient: bool = True,
    upstream: bool = False,
    aligned: bool = True,
) -> None:
    n, columns, exact = 300, 16032, F64 if dtypes[0] == F64 else F32
    student, teacher = rows(n, columns, dtypes[0], gap), rows(n, k or columns, dtypes[1])
    ids = vector(n * k, torch.int64, aligned).view(n, k) if k else None
    stats = vector(n * (STATS + SHARD_STATS), exact, aligned).view(n, -1)
    launch.kd_shard(
        **inputs_of(student, teacher, ids, form, labels, transform, aligned),
        upstream=vector(n, exact, aligned) if upstream else None,
        stats=stats,
        gradient=torch.empty_like(student) if gradient else None,
        skip_if_one=upstream,
        stage=stage,
        offset=16032,
        vocabulary=128256,
    )


def launch_weights(
    mask: torch.dtype | None, labels: bool, ids: bool, given: bool = False, aligned: bool = True, tensors: bool = False
) -> None:
    n, c = 300, 40
    listed = vector(n * c, torch.int64, aligned).view(n, c) if ids else None
    y = vector(n, torch.int64, aligned) if labels else None
    kd_mask = None if mask is None else vector(n, mask, aligned)
    normalizers = vector(54 if tensors else 2, F64, aligned) if given else None
    launch.kd_row_weights(
        rows(n, c, BF16),
        listed,
        y,
        kd_mask,
        normalizers,
        -100,
        kd=True,
        given=vector(1, F32, aligned) if tensors else None,
    )


def launch_terms(dtype: torch.dtype, per_row: bool, terms: bool = True, aligned: bool = True) -> None:
    loss_rows = vector(2 * 300, dtype, aligned).view(2, 300)
    to = vector(600 if per_row else 2, dtype, aligned) if terms else None
    launch.kd_terms(loss_rows, vector(OPTIONS, F64, aligned), vector(2, F64, aligned), to, per_row)


def launch_unit(aligned: bool = True) -> None:
    weights, slope = vector(300, F32, aligned), vector(1, F64, aligned).view(())
    launch.linear_unit([weights], [vector(OPTIONS, F64, aligned)], [vector(2, F64, aligned)], [slope])


def launch_naive(dtype: torch.dtype) -> None:
    student, teacher = rows(300, 3000, dtype)[0], rows(300, 3000, dtype)[0]
    kd_naive(student, teacher, vector(300, torch.int64), temperature=2.0, kd_weight=0.5, ce_weight=0.5)


LONG, SHORT = 50257, 3000  # of few rows, the long ones are split
WHOLE = {
    "forward": partial(launch_kd, "forward", LONG),
    "no labels": partial(launch_kd, "forward", 10_000, labels=False, transform=True),
    "no gradient": partial(launch_kd, "forward", LONG, KernelId.DKD, gradient=False),
    "in place": partial(launch_kd, "forward_", LONG, KernelId.JEFFREYS, labels=False),
    "backward": partial(launch_kd, "backward", SHORT, KernelId.ALPHA_BETA, upstream="rows"),
    "backward, few rows": partial(launch_kd, "backward", SHORT, n=6, labels=False),
    "rescale": partial(launch_kd, "rescale_", LONG, KernelId.TOTAL_VARIATION, dtypes=(F32, BF16)),
    "everything": partial(launch_kd, "forward", LONG, surplus=13, gap=1, transform=True, dtypes=(F16, F32)),
    "float64": partial(launch_kd, "forward", SHORT, dtypes=(F64, F64)),
    "unaligned": partial(launch_kd, "backward", LONG, upstream="rows", aligned=False),
}
RESIDENT = {
    "forward": partial(launch_kd, "forward", SHORT),
    "no labels, 16 bits": partial(launch_kd, "forward", SHORT, KernelId.TOTAL_VARIATION, surplus=128, labels=False),
    "no labels": partial(launch_kd, "forward", 1000, KernelId.LOGIT_MSE, labels=False, dtypes=(F32, F32)),
    "no gradient": partial(launch_kd, "forward", 2000, KernelId.MIXTURE, gradient=False),
    "in place": partial(launch_kd, "forward_", SHORT, KernelId.TOTAL_VARIATION),
    "out of phase": partial(launch_kd, "forward", SHORT, gap=1, surplus=5),
    "transform": partial(launch_kd, "forward", SHORT, transform=True),
    "unaligned": partial(launch_kd, "forward", SHORT, aligned=False),
}
SPLIT = {
    "forward": partial(launch_kd, "forward", LONG, n=6),
    "no labels": partial(launch_kd, "forward", LONG, KernelId.LOGIT_MSE, n=6, labels=False),
    "no gradient": partial(launch_kd, "forward", LONG, n=6, gradient=False),
    "in place": partial(launch_kd, "forward_", LONG, KernelId.TOTAL_VARIATION, n=6),
    "backward": partial(launch_kd, "backward", LONG, n=6),
    "rescale": partial(launch_kd, "rescale_", LONG, KernelId.DKD, n=6, surplus=7, gap=1),
    "unaligned": partial(launch_kd, "forward", LONG, n=6, dtypes=(F32, F32), aligned=False),
}
TOPK = {form.name.lower(): partial(launch_topk, "forward", form) for form in TopkKernelId} | {
    "no labels": partial(launch_topk, "forward", TopkKernelId.BUCKET, labels=False),
    "no gradient": partial(launch_topk, "forward", TopkKernelId.RENORMALIZE, gradient=False, dtypes=(F16, BF16)),
    "in place": partial(launch_topk, "forward_", TopkKernelId.IGNORE, k=1000, transform=True),
    "backward": partial(launch_topk, "backward", TopkKernelId.SAMPLES, dtypes=(F32, F32)),
    "rescale": partial(launch_topk, "rescale_", TopkKernelId.BUCKET_REVERSE, gap=1),
    "float64": partial(launch_topk, "forward", TopkKernelId.BUCKET, dtypes=(F64, F64), k=7),
    "unaligned": partial(launch_topk, "forward", TopkKernelId.BUCKET, aligned=False),
}
SHARD = {
    "statistics": partial(launch_shard, Stage.STATISTICS, gradient=False),
    "values and gradient": partial(launch_shard, Stage.VALUES),
    "values": partial(launch_shard, Stage.VALUES, KernelId.MIXTURE, gradient=False, transform=True),
    "gradient": partial(launch_shard, Stage.GRADIENT, KernelId.DKD, upstream=True, gap=1),
    "float64": partial(launch_shard, Stage.VALUES, dtypes=(F64, F64)),
    "unaligned": partial(launch_shard, Stage.GRADIENT, KernelId.JEFFREYS, aligned=False),
    "top-k statistics": partial(launch_shard, Stage.STATISTICS, TopkKernelId.BUCKET, k=50, gradient=False),
    "top-k values": partial(launch_shard, Stage.VALUES, TopkKernelId.IGNORE, k=50),
    "top-k gradient": partial(launch_shard, Stage.GRADIENT, TopkKernelId.BUCKET_REVERSE, k=200, upstream=True),
}
STATISTICS = {
    "both sides": launch_statistics,
    "of the student": partial(launch_statistics, labels=False, of_teacher=False),
    "everything": partial(launch_statistics, dtypes=(F16, F32), gap=1, transform=True),
    "float64": partial(launch_statistics, SHORT, dtypes=(F64, F64)),
    "few columns": partial(launch_statistics, 2, n=6),
    "unaligned": partial(launch_statistics, aligned=False),
}
SMALL = {
    "weights by labels": partial(launch_weights, None, labels=True, ids=False),
    "weights by a mask": partial(launch_weights, torch.bool, labels=True, ids=False),
    "weights themselves": partial(launch_weights, F32, labels=False, ids=True),
    "weights, given normalizers": partial(launch_weights, torch.bool, labels=True, ids=False, given=True),
    "weights, unaligned": partial(
        launch_weights, torch.bool, labels=True, ids=True, given=True, aligned=False, tensors=True
    ),
    "weights, options": partial(launch_weights, torch.bool, labels=True, ids=False, given=True, tensors=True),
    "unit": launch_unit,
    "unit, unaligned": partial(launch_unit, aligned=False),
    "naive": partial(launch_naive, BF16),
    "terms": partial(launch_terms, F32, per_row=False),
    "no terms": partial(launch_terms, F32, per_row=False, terms=False),
    "terms per row": partial(launch_terms, F64, per_row=True),
    "terms, unaligned": partial(launch_terms, F32, per_row=True, aligned=False),
}
