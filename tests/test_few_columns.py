"""Rows of few columns, which the C++ kernels put into the lanes of vectors: every number of columns and of rows in a
vector, and nothing that crosses from one lane into another. On each instruction set: test_cpu_instruction_sets.py.
"""

from __future__ import annotations

import pytest
import torch
from cpu_cases import INF, NAN, assert_guards, before_a_fault, guarded, identical, kd_inputs, kd_operators
from families import at, families
from operators import forward, forward_
from torch import Tensor
from truth import DTYPES, between_nans, check_kd, pair, targets

from fusedkd.backends.dispatch import serving
from fusedkd.backends.layout import KernelId
from fusedkd.divergences import Divergence

if serving["kd_forward", "CPU"][0] != "C++":
    pytest.skip("fusedkd._C does not serve the CPU", allow_module_level=True)

WIDEST = 256  # LANE_COLUMNS of csrc/cpu/call.h
BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@families
def test_every_width(divergence: Divergence) -> None:
    for columns in (*range(2, 20), 24, 31, 32, 33, 40, WIDEST, WIDEST + 1):
        student, teacher = (between_nans(x) for x in pair(1, 19, columns, seed=columns))
        check_kd(student, teacher, targets(1, 19, classes=columns), **at(divergence, 2.0, **BOTH))


@families
@dtypes
def test_every_type(divergence: Divergence, dtype: torch.dtype) -> None:
    for columns, surplus, temperature in ((2, 0, 1.0), (9, 2, 3.0), (33, 0, 4.0)):
        student, teacher = pair(2, 13, columns, dtype=dtype, teacher_dtype=torch.float32)
        options = at(divergence, temperature, label_smoothing=0.1, z_loss_weight=1e-3, reduction="none", **BOTH)
        options["kd_mask"] = torch.tensor([2.0, 0.0] * 13).view(2, 13)
        options["upstream"] = torch.linspace(-1, 2, 26).view(2, 13)
        labels = targets(2, 13, classes=columns - surplus)
        check_kd(student, teacher[..., : columns - surplus], labels, vocab_mismatch="truncate", **options)
        check_kd(student, teacher, labels, logit_softcap=8.0, logit_scale=1.5, **options)


@families
@dtypes
def test_rows_know_nothing_of_each_other(divergence: Divergence, dtype: torch.dtype) -> None:
    """To the last bit: alone, among others, among rows that are broken, masked or not selected."""
    student, teacher = pair(1, 33, 7, dtype=dtype)
    labels, weights = targets(33, classes=7), torch.ones(33)
    alone = []
    for i in range(33):
        one = slice(i, i + 1)
        alone.append(forward(kd_inputs(student[:, one], teacher[:, one], labels[one], weights[one], divergence)))
    student[0, 1], teacher[0, 4], student[0, 7, 2], student[0, 10], teacher[0, 13] = NAN, NAN, INF, -INF, -INF
    student[0, 16, 3], teacher[0, 19, 3], weights[22], labels[25] = -INF, -INF, 0, 7
    rows, stats, gradient = forward(kd_inputs(student, teacher, labels, weights, divergence))
    for i in set(range(33)) - set(range(1, 26, 3)):
        row_losses, row_stats, row_gradient = alone[i]
        assert identical(rows[:, i], row_losses[:, 0])
        assert identical(stats[i], row_stats[0])
        assert identical(gradient[0, i], row_gradient[0, 0])


@families
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 40])
def test_operators_agree(divergence: Divergence, columns: int) -> None:
    """Backward with forward, in place with a copy; nothing outside of a row is read or written."""
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = pair(1, 5, columns, dtype=dtype)
        kd_operators(kd_inputs(guarded(student), guarded(teacher), targets(5, classes=columns), None, divergence))
        expected = forward(kd_inputs(student, teacher, None, None, divergence))[2]
        inside: Tensor = before_a_fault(student)
        if divergence.kernel_id != KernelId.DKD:
            forward_(kd_inputs(inside, before_a_fault(teacher), None, None, divergence))
            assert identical(inside, expected)
        outside = guarded(student)
        forward_(kd_inputs(outside, teacher, targets(5, classes=columns), None, divergence))
        assert_guards(outside)
