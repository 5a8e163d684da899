"""DKD: what only a divergence with a target has. The rest of it is tested with the other divergences."""

from __future__ import annotations

import pytest
import torch
from families import at, describe
from truth import check_kd, pair, targets

from fusedkd import DKD, kd_loss

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}
INF = torch.inf
three_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=describe)


def test_dkd_splits_forward_kl(device: str) -> None:
    """KL(p‖q) = KL(b(p)‖b(q)) + (1 − p_y)·KL(p̂‖q̂) (arXiv:2203.08679, eq. 5)."""
    student, teacher = pair(6, 40, device=device)
    labels = targets(6, classes=40, device=device, ignored=None)
    target, others, whole = (
        kd_loss(student, teacher, labels, divergence=d, temperature=3.0, reduction="none").double()
        for d in (DKD(1.0, 0.0), DKD(0.0, 1.0), "forward_kl")
    )
    p = (teacher.double() / 3).softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(target + (1 - p) * others, whole, rtol=1e-5, atol=0)


@three_dtypes
@pytest.mark.parametrize("teacher_columns", [30, 40, 50])
def test_dkd_rows_without_a_target(device: str, dtype: torch.dtype, teacher_columns: int) -> None:
    """No label, or one past the common columns: no KD term, and not counted; the cross-entropy keeps the latter."""
    student, teacher = pair(6, 40, dtype=dtype, device=device, teacher_columns=teacher_columns)
    labels = torch.tensor([3, -100, 35, 0, 29, 39], device=device)
    mask = torch.tensor([1, 1, 1, 0, 1, 1], device=device)
    for kd_mask in (None, mask, mask * 0.7):
        for reduction in ("mean", "sum", "none"):
            options = {"kd_mask": kd_mask, "reduction": reduction, "vocab_mismatch": "truncate", **at(DKD(), 4.0)}
            check_kd(student, teacher, labels, **options)
            check_kd(student, teacher, labels, **options, **BOTH)


@three_dtypes
def test_dkd_of_confident_rows(device: str, dtype: torch.dtype) -> None:
    """1 − p_y without cancellation: the target has all but e^−30 of the mass, on one side or both."""
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    labels = targets(6, classes=40, device=device, ignored=None)
    for row, (s, t) in enumerate([(30, 30), (30, 0), (0, 30), (-30, -30), (-30, 30), (100, 90)]):
        student[row, labels[row]] += s
        teacher[row, labels[row]] += t
    check_kd(student, teacher, labels, **at(DKD(), 1.0), reduction="none")
    check_kd(student, teacher, labels, **at(DKD(1.0, 0.0), 1.0), reduction="none")


def test_dkd_with_masked_columns(device: str) -> None:
    student, teacher = pair(7, 12, device=device)
    labels = torch.full((7,), 4, device=device)
    student[0, 4] = teacher[0, 4] = -INF  # the target itself
    student[1, 4] = -INF
    teacher[2, 4] = -INF
    student[3, :4] = student[3, 5:] = -INF  # nothing beside the target
    teacher[4, :4] = teacher[4, 5:] = -INF
    student[5], teacher[5, :4], teacher[5, 5:] = -INF, -INF, -INF  # +inf by rule, though nothing but the target is left
    for d in (DKD(), DKD(1.0, 0.0), DKD(0.0, 1.0)):
        check_kd(student, teacher, labels, **at(d, 2.0), reduction="none")
