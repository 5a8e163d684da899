"""The KD operators of Triton for a teacher known at K columns against the definitions in float64. Not collected by
itself: `test_topk_kernels.py` runs it under the interpreter (TRITON_INTERPRET=1 python -m pytest
tests/triton_topk_operators.py).

The interpreter rounds bfloat16 towards zero, which no GPU does: its cast is replaced by PyTorch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import operators
import pytest
import torch
import triton.language as tl
from topk_cases import CANCELLING, Case, case, check, inputs_of
from topk_rules import (
    broken_logits,
    labels_out_of_range,
    masked_columns,
    near_convergence,
    no_column,
    repeated_samples,
    rounded_tails,
    tails_out_of_reach,
    unselected_rows,
    whole_vocabulary,
)
from triton.runtime import interpreter

from fusedkd.backends.layout import OPTIONS, TopkKernelId
from fusedkd.backends.triton import launch

truncating = interpreter._convert_float


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
    if (source, target) != (tl.float32, tl.bfloat16):
        return truncating(data, source, target, mode)
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = convert
forms = pytest.mark.parametrize("form", TopkKernelId, ids=lambda form: form.name.lower())


@pytest.mark.parametrize("form", [TopkKernelId.BUCKET_REVERSE, TopkKernelId.IGNORE])
def test_all_four(form: TopkKernelId) -> None:
    check(launch, form, case(form, 257, 9, temperature=2.0), torch.bfloat16, temperature=2.0, all_four=True)


@forms
def test_options(form: TopkKernelId) -> None:
    dtype = torch.float16 if form % 2 else torch.bfloat16
    check(launch, form, case(form, 127, 20), dtype, temperature=3.0, transform=(8.0, 1.5), smoothing=0.1)


@pytest.mark.parametrize("form", [*TopkKernelId][::2])
def test_masked_columns(form: TopkKernelId) -> None:
    masked_columns(launch, form)


@pytest.mark.parametrize("form", [form for form in TopkKernelId if form not in CANCELLING])
def test_near_convergence(form: TopkKernelId) -> None:
    near_convergence(launch, form)


@pytest.mark.parametrize("form", [TopkKernelId.BUCKET, TopkKernelId.BUCKET_REVERSE])
def test_tails(form: TopkKernelId) -> None:
    tails_out_of_reach(launch, form)
    rounded_tails(launch, form)
    whole_vocabulary(launch, form)


@pytest.mark.parametrize("rule", [no_column, labels_out_of_range, unselected_rows, broken_logits])
def test_rules_of_a_row(rule: Any) -> None:
    rule(launch, TopkKernelId.BUCKET_REVERSE)


def test_repeated_samples() -> None:
    repeated_samples(launch, TopkKernelId.SAMPLES)


def test_temperatures() -> None:
    form = TopkKernelId.RENORMALIZE
    check(launch, form, case(form, 40, 5), temperature=2.0, teacher_temperature=1.5, logprobs_temperature=3.0)
    check(launch, form, case(form, 40, 5), temperature=4.0, labels=None)


@pytest.mark.parametrize("form", [TopkKernelId.RENORMALIZE_REVERSE, TopkKernelId.BUCKET, TopkKernelId.SAMPLES])
def test_z_loss(form: TopkKernelId) -> None:
    check(launch, form, case(form, 40, 5), temperature=2.0, z_loss=0.3)
    check(launch, form, case(form, 40, 5), z_loss=1e-2, smoothing=0.1, transform=(8.0, 1.5))


def test_two_blocks_and_their_marks() -> None:
    check(launch, TopkKernelId.BUCKET, case(TopkKernelId.BUCKET, 4200, 70))


def test_float64_and_a_long_list() -> None:
    check(launch, TopkKernelId.BUCKET_REVERSE, case(TopkKernelId.BUCKET_REVERSE, 127, 100), torch.float64)


def test_no_rows() -> None:
    empty, w = torch.empty(0, 3, 7), torch.empty(0)
    ids, n = torch.empty(0, 7, dtype=torch.int64), torch.ones(2).double()
    inputs = inputs_of(TopkKernelId.RENORMALIZE, Case(empty, empty, ids), None, w, torch.ones(OPTIONS).double(), n)
    rows, stats, gradient = operators.forward(inputs, ops=launch)
    assert (rows.shape, stats.shape, gradient.shape) == ((2, 0), (0, 8), (0, 3, 7))


def test_a_term_of_weight_zero_adds_nothing() -> None:
    """Whatever the columns hold that it reads: here, off the list."""
    form = TopkKernelId.RENORMALIZE_REVERSE
    student, teacher, ids = case(form, 40, 5)
    student[0, 0, next(i for i in range(40) if i not in ids[0])] = torch.nan
    ones = dict.fromkeys(("temperature", "teacher_temperature", "kd_scale", "kd_weight", "scale", "teacher_scale"), 1.0)
    options = operators.options_tensor([1.0], **ones)
    rows = torch.arange(len(ids)), torch.ones(len(ids)), options, torch.ones(2).double()
    inputs = inputs_of(form, Case(student, teacher.nan_to_num(0), ids), *rows)
    _, _, gradient = operators.forward(inputs, ops=launch)
    assert gradient[0, 0].isfinite().all()
    assert gradient[0, 0].any()
