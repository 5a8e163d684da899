"""The numbers of every divergence, value and gradient, by the test rule: dtypes, vocabularies, temperatures, closeness,
offsets, −inf columns, underflow, ends of the parameters. Forward KL has more of its own in test_kd_loss.py,
DKD in test_dkd.py; what the options mean for a divergence is tested in test_divergence_rules.py.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from families import at, describe, divergences, families
from torch import Tensor
from truth import DTYPES, Term, assert_gradient, assert_value, check_kd, kd_truth, noise_for, pair, targets

from fusedkd import JSD, AlphaBeta, LogitMSE, SkewKL, SkewReverseKL, kd_loss
from fusedkd.backends.layout import FINITE_GRADIENT, KernelId
from fusedkd.divergences import Divergence

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}
INF = torch.inf
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=describe)
three_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=describe)


@families
@dtypes
@pytest.mark.parametrize("vocabulary", [2, 7, 513, pytest.param(30522, marks=pytest.mark.wide)])
def test_both_terms(device: str, divergence: Divergence, dtype: torch.dtype, vocabulary: int) -> None:
    student, teacher = pair(4, vocabulary, dtype=dtype, device=device)
    labels = targets(4, classes=vocabulary, device=device)
    check_kd(student, teacher, labels, **at(divergence, 2.0), **BOTH)


@divergences
@three_dtypes
def test_parameters(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = pair(6, 129, dtype=dtype, device=device)
    labels = targets(6, classes=129, device=device)
    check_kd(student, teacher, labels, **at(divergence, 1.0))
    check_kd(student, teacher, labels, **at(divergence, 3.0), reduction="none", upstream=torch.linspace(-2, 3, 6))


@families
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 20.0])
def test_temperatures(device: str, divergence: Divergence, temperature: float) -> None:
    student, teacher = pair(6, 300, device=device)
    labels = targets(6, classes=300, device=device)
    check_kd(student, teacher, labels, **at(divergence, temperature), **BOTH)
    check_kd(student, teacher, labels, **at(divergence, temperature, teacher_temperature=1.5), **BOTH)


# -------------------------------------------------- closeness


@divergences
@pytest.mark.parametrize("kl", [1.0, 1e-2, 1e-4, 1e-6])
def test_student_close_to_its_teacher(device: str, divergence: Divergence, kl: float) -> None:
    labels = targets(6, classes=700, device=device, ignored=None)
    for offset in (0.0, 1000.0, -1000.0):
        student, teacher = pair(6, 700, device=device, noise=noise_for(kl, 2.0), offset=offset)
        beyond = kl == 1e-6 and divergence.name == "jsd" and 0 < min(divergence.beta, 1 - divergence.beta) < 0.01
        check_kd(student, teacher, labels, **at(divergence, 2.0), reduction="none", vacuous=beyond)
        check_kd(student, teacher, labels, **at(divergence, 2.0), **BOTH)


@families
@pytest.mark.parametrize("kl", [1e-2, 1e-6])
def test_close_with_ones_own_offsets(device: str, divergence: Divergence, kl: float) -> None:
    """Softmax does not see a constant; the squared error does."""
    student, teacher = pair(6, 700, device=device, noise=noise_for(kl))
    student, teacher = student + 1000, teacher - 500
    check_kd(student, teacher, targets(6, classes=700, device=device), **at(divergence, 1.0), reduction="none")


@pytest.mark.wide
@families
@pytest.mark.parametrize("kl", [1e-2, 1e-6])
def test_close_at_full_width(device: str, divergence: Divergence, kl: float) -> None:
    student, teacher = pair(3, 50257, device=device, noise=noise_for(kl))
    check_kd(student, teacher, targets(3, classes=50257, device=device), **at(divergence, 1.0), reduction="none")


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=describe)
@pytest.mark.parametrize("kl", [1.0, 1e-3, 1e-6])
def test_close_in_16_bit(device: str, divergence: Divergence, dtype: torch.dtype, kl: float) -> None:
    labels = targets(6, classes=700, device=device, ignored=None)
    for offset in (0.0, 32.0, -32.0):
        student, teacher = pair(6, 700, dtype=dtype, device=device, noise=noise_for(kl), offset=offset)
        student[0, 0] = teacher[0, 0] + 0.5  # 16 bit round some pairs of rows to the same numbers
        check_kd(student, teacher, labels, **at(divergence, 2.0), **BOTH)
        check_kd(student, teacher, labels, **at(divergence, 1.0), reduction="none", upstream=torch.linspace(-2, 3, 6))


@families
@pytest.mark.parametrize("kl", [1.0, 1e-6])
def test_float64(device: str, divergence: Divergence, kl: float) -> None:
    student, teacher = pair(6, 300, dtype=torch.float64, device=device, noise=noise_for(kl))
    check_kd(student, teacher, targets(6, classes=300, device=device), **at(divergence, 2.0), reduction="none")


@divergences
def test_equal_logits(device: str, divergence: Divergence) -> None:
    """No negative value, and a gradient that is rounding noise at most."""
    teacher, _ = pair(6, 300, device=device)
    if isinstance(divergence, LogitMSE):
        divergence = LogitMSE()
    leaf, labels = teacher.clone().requires_grad_(), targets(6, classes=300, device=device, ignored=None)
    rows = kd_loss(leaf, teacher, labels, **at(divergence, 2.0), reduction="none")
    rows.sum().backward()
    assert rows.abs().max() <= 1e-11
    assert leaf.grad.norm(dim=-1).max() <= 1e-6


@divergences
def test_no_divergence_is_negative(device: str, divergence: Divergence) -> None:
    for noise in (3.0, 0.1, 1e-4):
        student, teacher = pair(8, 65, device=device, noise=noise)
        labels = targets(8, classes=65, device=device, ignored=None)
        assert (kd_loss(student, teacher, labels, **at(divergence, 1.0), reduction="none") > 0).all()


# -------------------------------------------------- far apart, underflow, −inf


@divergences
@three_dtypes
def test_far_apart(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """Logits whose differences leave exp's range: p or q underflows, p·δ does not, 0·∞ may not appear. The gradient of
    a bounded divergence dies out.
    """
    student, teacher = pair(6, 50, dtype=dtype, device=device)
    labels = targets(6, classes=50, device=device)
    for factor in (6, 60):
        z, v = factor * student, factor * teacher.flip(1)
        check_kd(z, v, labels, **at(divergence, 20.0), **BOTH)
        if factor == 60 and overflows(divergence) and dtype != torch.float64:
            never_nan(z, v, labels, divergence)
        else:
            check_kd(z, v, labels, **at(divergence, 1.0), reduction="none", vacuous=factor == 60)


def overflows(divergence: Divergence) -> bool:
    """αβ with a negative exponent: (p/q)^1.4 leaves float32."""
    return isinstance(divergence, AlphaBeta) and min(divergence.alpha, divergence.beta) < 0


def never_nan(student: Tensor, teacher: Tensor, labels: Tensor, divergence: Divergence) -> None:
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, labels, divergence=divergence, reduction="none")
    rows.sum().backward()
    assert not rows.isnan().any()
    assert not leaf.grad.isnan().any()


@divergences
@three_dtypes
def test_underflow_on_both_sides(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """exp of either is 0 where δ is not: the logarithms of a mixture must come from δ."""
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    student[:, 3:20] -= 300
    teacher[:, 3:20] -= 300
    student[1, 4:9] -= 200  # δ = 200
    teacher[2, 4:9] -= 200
    student[3, 1:], teacher[3, 1:] = -400, -300  # one column alone has all the mass
    student[4, 1:], teacher[4, :39] = -400, -300  # and not the same one
    labels = torch.tensor([0, 30, 5, 0, 0, -100], device=device)
    if overflows(divergence) and dtype != torch.float64:
        never_nan(student, teacher, labels, divergence)
        labels[[1, 2, 3, 4]] = -100
    truth = check_kd(student, teacher, labels, **at(divergence, 1.0), reduction="none")
    assert not truth.loss.value.isnan().any()
    check_kd(student, teacher, labels, **at(divergence, 1.0), **BOTH)


@divergences
@three_dtypes
def test_masked_columns(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """On both sides: they contribute nothing."""
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    student[0, 5] = teacher[0, 5] = -INF
    student[1, :20] = teacher[1, :20] = -INF  # a whole first half: maxima start at −inf
    student[2, 1:] = teacher[2, 1:] = -INF  # one column left, and not the label's
    teacher[3] = -INF  # not selected
    labels = torch.full((6,), 30, device=device)
    labels[2] = 0
    for reduction in ("mean", "none"):
        truth = check_kd(student, teacher, labels, **at(divergence, 2.0), reduction=reduction, **BOTH)
    assert truth.loss.value.isfinite().all()
    keep = [0, 1, 2, 3, 4, *range(6, 40)]
    fewer = kd_truth(student[:1, keep], teacher[:1, keep], labels[:1] - 1, **at(divergence, 2.0))
    if divergence.kernel_id != KernelId.LOGIT_MSE:  # which divides by all columns
        torch.testing.assert_close(
            kd_truth(student[:1], teacher[:1], labels[:1], **at(divergence, 2.0)).loss, fewer.loss
        )


INFINITE = {  # (where the student masks what the teacher does not, and the other way round)
    "forward_kl": (True, False),
    "reverse_kl": (False, True),
    "jeffreys": (True, True),
    "jsd": (False, False),
    "skew_kl": (False, False),
    "skew_reverse_kl": (False, False),
    "alpha_beta": (False, False),
    "total_variation": (False, False),
    "logit_mse": (True, True),
    "dkd": (True, False),
}


@divergences
@three_dtypes
def test_columns_that_one_side_masks(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """Infinite or not, the value is right, and the gradient finite: 0 where the divergence is infinite, but for forward
    KL and DKD.
    """
    student, teacher = pair(8, 40, dtype=dtype, device=device)
    student[0, 5] = -INF
    student[1, :20] = -INF
    teacher[2, 5] = -INF
    teacher[3, 1:] = -INF  # a one-hot
    student[4] = -INF
    student[5, 6], teacher[5, 7] = -INF, -INF
    student[6, 8], teacher[6, 8] = -INF, -1e4  # p underflows where q is 0
    labels = torch.full((8,), 30, device=device)
    labels[3] = 0
    rows = check_kd(student, teacher, labels, **at(divergence, 2.0), reduction="none").loss.value
    check_kd(student, teacher, labels, **at(divergence, 2.0), reduction="none", **BOTH)
    check_kd(student, teacher, labels, **at(divergence, 2.0))
    if not fields(divergence) or (divergence.name in ("jsd",) and divergence.beta == 0.5):
        without_q, without_p = INFINITE[divergence.name]
        assert rows[[0, 1]].isinf().tolist() == [without_q] * 2
        assert rows[[2, 3]].isinf().tolist() == [without_p] * 2


@families
def test_student_rows_that_are_all_masked(device: str, divergence: Divergence) -> None:
    """+inf, gradient 0, whatever the family makes of it; the other rows are what they were."""
    student, teacher = pair(4, 40, device=device)
    student[1] = -INF
    labels = torch.full((4,), 30, device=device)
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, labels, **at(divergence, 2.0), reduction="none")
    rows.sum().backward()
    assert rows.isinf().tolist() == [False, True, False, False]
    assert leaf.grad.any(-1).tolist() == [True, False, True, True]


def test_families_with_a_finite_gradient_where_they_are_infinite(device: str) -> None:
    assert set(FINITE_GRADIENT) == {KernelId.FORWARD_KL, KernelId.DKD}
    student, teacher = pair(2, 10, device=device)
    student[0, 3] = -INF
    labels = torch.tensor([5, 5], device=device)
    for divergence, finite in (("forward_kl", True), ("dkd", True), ("jeffreys", False), (AlphaBeta(1.0, 0.0), False)):
        leaf = student.clone().requires_grad_()
        rows = kd_loss(leaf, teacher, labels, divergence=divergence, reduction="none")
        rows.sum().backward()
        assert rows.isinf().tolist() == [True, False]
        assert leaf.grad.any(-1).tolist() == [finite, True]


# -------------------------------------------------- ends of the parameters


SAME = [
    (JSD(0.0), "forward_kl"),
    (JSD(1.0), "reverse_kl"),
    (SkewKL(0.0), "forward_kl"),
    (SkewReverseKL(0.0), "reverse_kl"),
    (SkewReverseKL(0.0, True), "reverse_kl"),
    (AlphaBeta(1.0, 0.0), "forward_kl"),
    (AlphaBeta(0.0, 1.0), "reverse_kl"),
]


@pytest.mark.parametrize(("divergence", "name"), SAME, ids=describe)
@pytest.mark.parametrize("factor", [1.0, 30.0, 500.0])
def test_ends_are_the_kls(device: str, divergence: Divergence, name: str, factor: float) -> None:
    """Also where q or p underflows, in float64 as well; only the rule's bounds are the family's own."""
    for dtype in (torch.float32, torch.float64):
        student, teacher = (factor * x for x in pair(6, 300, dtype=dtype, device=device))
        teacher = teacher.flip(-1) if factor > 1 else teacher
        truth, own = (kd_truth(student, teacher, divergence=d, reduction="none") for d in (name, divergence))
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, teacher, divergence=divergence, reduction="none")
        loss.sum().backward()
        assert_value(loss, Term(truth.loss.value, own.loss.tolerance))
        assert_gradient(leaf.grad, truth._replace(subtracted=own.subtracted), vacuous=name == "reverse_kl")


def values(student: Tensor, teacher: Tensor, *divergences: Divergence | str) -> list[Tensor]:
    return [kd_loss(student, teacher, divergence=d, reduction="none").double() for d in divergences]


def test_ends_are_approached(device: str) -> None:
    """JSD(β)/β and /(1 − β) become the KLs; skew and αβ do so themselves."""
    student, teacher = pair(6, 100, device=device)
    forward, reverse = values(student, teacher, "forward_kl", "reverse_kl")
    e = 1e-5
    low, high = values(student, teacher, JSD(e), JSD(1 - e))
    for near, end in (
        (low / e, forward),
        (high / e, reverse),
        *zip(values(student, teacher, SkewKL(e), AlphaBeta(1, e)), [forward] * 2, strict=True),
        *zip(values(student, teacher, SkewReverseKL(e), AlphaBeta(e, 1)), [reverse] * 2, strict=True),
    ):
        torch.testing.assert_close(near, end, rtol=2e-3, atol=0)


def test_symmetries(device: str) -> None:
    """Swapping the sides swaps the parameters."""
    z, v = pair(6, 100, device=device)
    for one, other in (
        ("forward_kl", "reverse_kl"),
        (JSD(0.3), JSD(0.7)),
        (SkewKL(0.2), SkewReverseKL(0.2)),
        (AlphaBeta(0.2, 0.7), AlphaBeta(0.7, 0.2)),
        ("total_variation", "total_variation"),
        ("jeffreys", "jeffreys"),
    ):
        torch.testing.assert_close(*values(z, v, one), *values(v, z, other), rtol=2e-5, atol=0)
    jeffreys, forward, reverse = values(z, v, "jeffreys", "forward_kl", "reverse_kl")
    torch.testing.assert_close(jeffreys, forward + reverse, rtol=2e-5, atol=0)


@families
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(0.5, 0.5), (1.0, 0.4), (0.4, 1.0), (2.0, 2.0)])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_masks_as_low_as_the_type_goes(
    device: str, divergence: Divergence, temperature: float, teacher_temperature: float, side: str
) -> None:
    """Columns at finfo.min, as masks often are: finite, so −inf's rules do not apply, and nothing may be NaN."""
    if not divergence.temperature_power:
        pytest.skip("squares of the lowest logits are infinite")
    student, teacher = pair(4, 40, device=device)
    for logits, masked in ((student, side != "teacher"), (teacher, side != "student")):
        if masked:
            logits[:, :5] = torch.finfo(torch.float32).min
    labels = torch.full((4,), 9, device=device)
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature, "divergence": divergence}
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    kd_loss(leaf, teacher, labels, **options).backward()
    kd_loss(exact, teacher.double(), labels, **options).backward()
    assert leaf.grad.isfinite().all()
    if side == "both":
        value, expected = kd_loss(leaf, teacher, labels, **options), kd_loss(exact, teacher.double(), labels, **options)
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


def test_a_row_as_low_as_the_type_goes(device: str) -> None:
    """It is uniform, whichever side it is on."""
    student, teacher = pair(2, 40, device=device)
    student[0] = torch.finfo(torch.float32).min
    for a, b in ((student, teacher), (teacher, student)):
        expected = kd_loss(a.double(), b.double(), reduction="none")
        torch.testing.assert_close(kd_loss(a, b, reduction="none").double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.uint8], ids=str)
def test_options_are_exact_in_any_dtype(device: str, dtype: torch.dtype) -> None:
    """T² of a tensor is not taken in 8 or 16 bits."""
    student, teacher = pair(3, 40, device=device)
    tensor = torch.tensor(20, dtype=dtype, device=device)
    expected = kd_loss(student, teacher, temperature=20.0)
    torch.testing.assert_close(kd_loss(student, teacher, temperature=tensor), expected)
    with pytest.raises(ValueError, match="temperature"):
        kd_loss(student, teacher, temperature=torch.tensor(1 + 1j))
    if dtype.is_floating_point:
        alpha = torch.tensor(0.1, dtype=dtype, device=device)
        actual = kd_loss(student, teacher, divergence=SkewReverseKL(alpha))
        torch.testing.assert_close(actual, kd_loss(student, teacher, divergence=SkewReverseKL(alpha.item())))
