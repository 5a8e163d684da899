"""Rows that are all but sure, as language models' are: one column far above the others, anywhere in the row, of either
side or of both. What is left of the sum beside it is all that the loss is made of.
"""

from __future__ import annotations

from typing import Any

import linear_cases
import pytest
import torch
from families import at, describe, families, samples, top_k
from torch import Tensor
from torch.nn import functional as F
from truth import check_kd, float64, kd_truth

from fusedkd import kd_loss
from fusedkd.divergences import Divergence

pytestmark = pytest.mark.wide


V = 2600
PLACES = (0, 700, 2047, 2048, V - 1)
MARGINS = ((10, 10), (16, 13), (24, 30), (20, 60), (60, 60), (60, 20), (0, 20), (20, 0), (60, 0))
"""By how much the column is above the mean of student and teacher; 0: it is not."""
three_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=describe)


def sure(*margins: tuple[int, int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Student, teacher and the sure column, a row for each pair of margins at each place."""
    generator = torch.Generator().manual_seed(len(margins))
    place = torch.tensor(PLACES).repeat_interleave(len(margins))
    sides = []
    for each in zip(*margins, strict=True):
        margin = torch.tensor(each, dtype=torch.float32).repeat(len(PLACES)).unsqueeze(1)
        logits = torch.randn(len(place), V, generator=generator)
        on = F.one_hot(place, V).bool() & (margin > 0)
        sides.append(torch.where(on, margin, logits).to(device, dtype))
    return *sides, place.to(device)


@families
@three_dtypes
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_by_the_rule(device: str, divergence: Divergence, dtype: torch.dtype, temperature: float) -> None:
    student, teacher, place = sure(*MARGINS, device=device, dtype=dtype)
    options = at(divergence, temperature, reduction="none")
    check_kd(student, teacher, place, **options)
    check_kd(student, teacher, place, **options, kd_weight=0.5, ce_weight=0.7)
    check_kd(student, teacher, (place + 1) % V, **options, kd_weight=0.5, ce_weight=0.7)


@three_dtypes
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_z_loss(device: str, dtype: torch.dtype, temperature: float) -> None:
    """Beside the loss of a sure label, whose gradient is next to nothing."""
    student, teacher, place = sure(*MARGINS, device=device, dtype=dtype)
    for known in (teacher, top_k(teacher.double(), 8, "renormalize")):
        for weight in (1e-30, 1e-4):
            options: dict[str, Any] = {"temperature": temperature, "reduction": "none", "z_loss_weight": weight}
            check_kd(student, known, place, **options, kd_weight=0.5, ce_weight=0.7)


@pytest.mark.parametrize("kind", ["renormalize", "bucket", "ignore", "samples"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_listed_teachers(device: str, kind: str, divergence: str) -> None:
    if kind == "samples" and divergence == "reverse_kl":
        pytest.skip("they estimate forward KL alone")
    student, teacher, place = sure((10, 10), (24, 13), (0, 13), (60, 0), (13, 30), device=device)
    listed = samples(teacher, 8) if kind == "samples" else top_k(teacher.double(), 8, kind)
    options = {"divergence": divergence, "reduction": "none"}
    check_kd(student, listed, place, **options, ce_weight=0.7)
    check_kd(student, listed, (place + 1) % V, **options, ce_weight=0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=describe)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
def test_cross_entropy_keeps_its_sign(device: str, dtype: torch.dtype, temperature: float) -> None:
    """It is positive, to a tenth of what it is, and lowered by raising the label's logit: beside KD as alone."""
    student, teacher, place = sure((10, 10), (16, 20), (24, 30), (30, 30), device=device, dtype=dtype)
    truth = kd_truth(student, teacher, place, kd_weight=0.0, ce_weight=1.0, reduction="none")
    for kd_weight in (0.0, 1e-30):
        leaf = student.clone().requires_grad_()
        options = {"temperature": temperature, "kd_weight": kd_weight, "ce_weight": 1.0, "reduction": "none"}
        rows = kd_loss(leaf, teacher, place, **options)
        torch.testing.assert_close(float64(rows), truth.ce.value, rtol=0.1, atol=0)
        (gradient,) = torch.autograd.grad(rows.sum(), leaf)
        at_label, expected = (float64(x).gather(1, place.unsqueeze(1).cpu()) for x in (gradient, truth.gradient))
        assert (at_label <= 1e-25).all()
        if dtype != torch.float16:  # has no number so small
            torch.testing.assert_close(at_label, expected, rtol=0.1, atol=1e-25)


def eager(student: Tensor, teacher: Tensor, labels: Tensor, t: float, kd: float, ce: float) -> Tensor:
    log_q, log_p = ((x / t).log_softmax(-1) for x in (student, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") * t**2
    return kd * kl + ce * F.cross_entropy(student, labels, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)
@pytest.mark.parametrize("margins", [(10, 10), (13, 16), (16, 13), (24, 30), (30, 24)])
@pytest.mark.parametrize(("kd", "ce", "temperature"), [(1, 0, 1.0), (1, 0, 2.0), (0, 1, 1.0), (0.5, 0.5, 2.0)])
def test_more_accurate_than_eager(
    dtype: torch.dtype, margins: tuple[int, int], kd: float, ce: float, temperature: float
) -> None:
    """The gradient of a batch, in which roundings even out. On the CPU: the Triton kernels' 2^(x·log₂e/T), of a product
    rounded to float32, is off by the same 1e-7 in every row; where no row is sure enough, that is on a par with eager.
    """
    student, teacher, place = sure(*[margins] * 8, dtype=dtype)
    options: dict[str, Any] = {"kd_weight": kd, "ce_weight": ce, "temperature": temperature, "reduction": "sum"}
    truth = kd_truth(student, teacher, place, **options).gradient
    errors = []
    for loss in (
        lambda z: kd_loss(z, teacher, place, **options),
        lambda z: eager(z, teacher, place, temperature, kd, ce),
    ):
        leaf = student.clone().requires_grad_()
        errors.append((float64(torch.autograd.grad(loss(leaf), leaf)[0]) - truth).norm() / truth.norm())
    assert errors[0] <= errors[1], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)
@pytest.mark.parametrize("place", [0, 2300])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_linear(device: str, dtype: torch.dtype, place: int, divergence: str) -> None:
    """A bias makes the column sure."""
    p = linear_cases.problem(9, columns=(V, V), dtype=dtype, device=device)
    for bias, margin in ((p.bias, 24), (p.teacher.bias, 30)):
        bias[place] += margin
    p.labels[:4] = place
    linear_cases.check_linear(p, divergence=divergence, ce_weight=0.7)
