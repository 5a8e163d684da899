"""The families without a kernel: their definitions in `fusedkd.reference` against the papers' formulas by central
differences, in float64, with what the papers hold constant held constant; the losses against these by the rule of
`truth.py`; and what theory says of them.
"""

from __future__ import annotations

from typing import Any

import linear_cases
import pytest
import torch
from families import DEFINED, defined_families, describe, parameters
from torch import Tensor
from truth import check_kd, kd_truth, pair, targets

import fusedkd
from fusedkd import LK, NLA, TAID, AdaptiveKL, AMiD, Jeffreys, SkewKL, SkewReverseKL, ToDi, kd_loss
from fusedkd.divergences import FAMILIES, WITH_KERNEL, Divergence
from fusedkd.reference import defined as reference
from fusedkd.reference.divergences import Rows
from fusedkd.reference.softmax import log_softmax

INF = torch.inf
NAMED = [family() for name, family in FAMILIES.items() if name not in WITH_KERNEL]
named = pytest.mark.parametrize("divergence", NAMED, ids=describe)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def published(z: Tensor, z0: Tensor, v: Tensor, d: Any) -> Tensor:
    """In probabilities; what is constant is made of z0."""
    p, q, q0 = v.softmax(-1), z.softmax(-1), z0.softmax(-1)
    if d.name == "taid":
        return kl((d.t * v + (1 - d.t) * z0).softmax(-1), q)
    if d.name == "todi":
        u = 1 / (1 + (q0 / p) ** d.beta)
        return (u * p * (p / q).log() + (1 - u) * q * (q / p).log()).sum(-1)
    if d.name == "adaptive_kl":
        order = p.argsort(-1, descending=True)
        head = torch.zeros_like(p, dtype=torch.bool)
        for row, columns in enumerate(order.tolist()):
            for i, column in enumerate(columns):
                head[row, column] = i == 0 or p[row, columns[: i + 1]].sum() <= d.head
        gap = (p - q0).abs()
        in_head, in_tail = ((gap * x).sum(-1) for x in (head, ~head))
        return (in_head * kl(p, q) + in_tail * kl(q, p)) / (in_head + in_tail)
    if d.name == "amid":
        e = (1 - d.alpha) / 2
        r = p**d.share * q ** (1 - d.share) if e == 0 else (d.share * p**e + (1 - d.share) * q**e) ** (1 / e)
        return kl(q if d.reverse else p, r / r.sum(-1, keepdim=True))
    accepted, accepted0 = (torch.minimum(p, x).sum(-1) for x in (q, q0))
    if d.name == "lk":
        u = (-d.decay * accepted0).exp()
        return u * kl(p, q) + (1 - u) * 0.5 * (p - q).abs().sum(-1)
    return -accepted.log()


def defined(divergence: Divergence, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows = Rows(log_softmax(v), log_softmax(z), v, z, None)
    return getattr(reference, divergence.name)(rows, parameters(divergence))


@defined_families
def test_definition_is_the_published_formula(divergence: Divergence) -> None:
    z, v = pair(4, 7, dtype=torch.float64)
    value, gradient = defined(divergence, z, v)
    torch.testing.assert_close(value, published(z, z, v, divergence), rtol=1e-9, atol=1e-13)
    step = 1e-5
    steps = step * torch.eye(7, dtype=torch.float64).unsqueeze(1)  # each column in turn
    difference = (published(z + steps, z, v, divergence) - published(z - steps, z, v, divergence)) / (2 * step)
    torch.testing.assert_close(gradient, difference.T, rtol=1e-6, atol=1e-9)
    assert (gradient.norm() > 1e-3) != nothing(divergence)


def nothing(divergence: Any) -> bool:
    """Whether it is 0 whatever the rows."""
    return getattr(divergence, "t", 1) == 0 or getattr(divergence, "share", 0) == 1


@defined_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_losses(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = pair(3, 3, 33, dtype=dtype, device=device)
    labels = targets(3, 3, classes=33, device=device)
    weights = torch.linspace(0, 1, 9, device=device).view(3, 3)
    for options in (
        {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.7},
        {"temperature": 2.0, "teacher_temperature": 1.5, "reduction": "none", "kd_mask": weights},
    ):
        check_kd(student, teacher, labels, divergence=divergence, vacuous=nothing(divergence), upstream=0.3, **options)


@defined_families
def test_near_convergence_and_far_from_0(device: str, divergence: Divergence) -> None:
    """Where a student is all but its teacher, and logits lie around 1000."""
    for noise, offset in ((1e-3, 0.0), (1.0, 1000.0)):
        student, teacher = pair(5, 40, noise=noise, offset=offset, device=device)
        check_kd(student, teacher, divergence=divergence, temperature=2.0, reduction="none", vacuous=True)


@defined_families
def test_masked_columns(device: str, divergence: Divergence) -> None:
    student, teacher = pair(10, 40, device=device)
    student[0, 5] = -INF
    student[1, :20] = -INF
    teacher[2, 5] = -INF
    teacher[3, 1:] = -INF  # a one-hot
    student[4] = -INF
    student[5, 6], teacher[5, 7] = -INF, -INF
    student[6, :9], teacher[6, :9] = -INF, -INF
    teacher[7] = -INF  # not selected
    student[8, 2] = torch.nan  # nor this
    labels = torch.full((10,), 30, device=device)
    labels[8] = -100
    truth = check_kd(student, teacher, labels, divergence=divergence, temperature=2.0, reduction="none", vacuous=True)
    check_kd(student, teacher, labels, divergence=divergence, ce_weight=0.5, reduction="none", vacuous=True)
    infinite = truth.loss.value.isinf().tolist()
    assert infinite[4]
    assert not any(infinite[6:])
    if divergence in NAMED:
        expected = {"taid": 0, "todi": 3, "adaptive_kl": 3, "amid": 1, "lk": 1, "nla": 0}[divergence.name]
        assert infinite[:3] == [bool(expected & 1)] * 2 + [bool(expected & 2)]
    student[9, 1] = torch.nan
    assert kd_loss(student, teacher, labels, divergence=divergence).isnan()


def test_supports_that_do_not_meet(device: str) -> None:
    """Infinite, but for nothing and for mixtures that have what either side has."""
    student, teacher = pair(2, 8, device=device)
    student[0, :4], teacher[0, 4:] = -INF, -INF
    for divergence in DEFINED:
        truth = check_kd(student, teacher, divergence=divergence, reduction="none", vacuous=True)
        mixed = divergence.name == "amid" and divergence.alpha < 1 and divergence.share > 0
        assert truth.loss.value[0].isinf() != (nothing(divergence) or mixed), describe(divergence)


@named
def test_parameters_as_tensors(device: str, divergence: Divergence) -> None:
    student, teacher = pair(4, 33, device=device)
    leaf = student.requires_grad_()
    given = {k: x for k, x in vars(type(divergence)()).items()}
    tensors = {
        k: x if isinstance(x, bool) else torch.tensor(x, dtype=torch.float64, device=device) for k, x in given.items()
    }
    found = []
    for family in (type(divergence)(), type(divergence)(**tensors), divergence.name):
        loss = kd_loss(leaf, teacher, divergence=family, temperature=2.0)
        found.append((loss, *torch.autograd.grad(loss, leaf)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=0)


@named
def test_from_hidden_states(device: str, divergence: Divergence) -> None:
    p = linear_cases.problem(5, dtype=torch.float32, device=device)
    linear_cases.check_linear(p, divergence=divergence, ce_weight=0.5, temperature=2.0)


@named
def test_teacher_gradient(device: str, divergence: Divergence) -> None:
    """Of D with what is constant held constant, by central differences."""
    z, v = pair(3, 6, dtype=torch.float64, device=device)
    leaf = v.clone().requires_grad_()
    loss = kd_loss(z, leaf, divergence=divergence, reduction="sum", teacher_gradient=True)
    (found,) = torch.autograd.grad(loss, leaf)

    def value(v: Tensor) -> Tensor:
        if divergence.name == "taid":
            return published(z, z, v, divergence)
        p, q = v.softmax(-1), z.softmax(-1)
        if divergence.name == "todi":
            u = 1 / (1 + q / start)
            return (u * p * (p / q).log() + (1 - u) * q * (q / p).log()).sum(-1)
        if divergence.name == "adaptive_kl":
            u = ((published(z, z, v0, divergence) - kl(q, start)) / (kl(start, q) - kl(q, start))).detach()
            return u * kl(p, q) + (1 - u) * kl(q, p)
        if divergence.name == "lk":
            u = (-3 * torch.minimum(start, q).sum(-1)).exp()
            return u * kl(p, q) + (1 - u) * 0.5 * (p - q).abs().sum(-1)
        return published(z, z, v, divergence)

    v0 = v
    start = v.softmax(-1)
    steps = 1e-5 * torch.eye(6, dtype=torch.float64, device=device).unsqueeze(1)
    difference = (value(v + steps) - value(v - steps)) / 2e-5
    torch.testing.assert_close(found, difference.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TAID(1.0), "forward_kl"),
        (ToDi(0.0), Jeffreys(0.5, 0.5)),
        (AMiD(-1.0, 0.3), SkewKL(0.3)),
        (AMiD(-1.0, 0.3, True), SkewReverseKL(0.7)),
        (AMiD(1.0, 0.0), "forward_kl"),
        (AMiD(0.3, 0.0, True), None),
        (LK(0.0), "forward_kl"),
        (LK(1e4), "total_variation"),
    ],
    ids=describe,
)
def test_special_cases(device: str, one: Divergence, other: Any) -> None:
    student, teacher = pair(4, 33, dtype=torch.float64, device=device)
    leaf = student.requires_grad_()
    found = []
    for divergence in (one, other):
        loss = torch.zeros_like(leaf).sum() if divergence is None else kd_loss(leaf, teacher, divergence=divergence)
        found.append((loss, torch.autograd.grad(loss + 0 * leaf.sum(), leaf)[0]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-13)


def test_values_that_theory_knows(device: str) -> None:
    """ToDi at beta = 1 is Jeffreys' in value, not in gradient; −log a is that of 1 − TV; near agreement p^α and q^α are
    means alike, so that all of AMiD's are; the adaptive weight is a share.
    """
    student, teacher = pair(6, 33, dtype=torch.float64, device=device)
    leaf = student.requires_grad_()
    todi, jeffreys = (kd_loss(leaf, teacher, divergence=d) for d in ("todi", "jeffreys"))
    torch.testing.assert_close(todi, jeffreys)
    slopes = [torch.autograd.grad(x, leaf)[0] for x in (todi, jeffreys)]
    assert (slopes[0] - slopes[1]).norm() > 0.1 * slopes[1].norm()
    rows = {d: kd_loss(student, teacher, divergence=d, reduction="none") for d in ("nla", "total_variation")}
    torch.testing.assert_close(rows["nla"], -torch.log1p(-rows["total_variation"]))
    near = pair(6, 33, noise=1e-3, dtype=torch.float64, device=device)
    means = torch.stack([kd_loss(*near, divergence=AMiD(a, 0.4)) for a in (-3.0, -1.0, 0.5, 0.999999, 1.0, 3.0)])
    torch.testing.assert_close(means, means[-2].expand_as(means), rtol=1e-2, atol=0)
    share = [kd_loss(student, teacher, divergence=d, reduction="none") for d in ("forward_kl", "reverse_kl")]
    mixed = kd_loss(student, teacher, divergence=AdaptiveKL(), reduction="none")
    weight = (mixed - share[1]) / (share[0] - share[1])
    assert ((weight > 0) & (weight < 1)).all()


@named
@pytest.mark.parametrize("t", [8.0, 64.0])
def test_the_gradient_s_size_is_independent_of_the_temperature(device: str, divergence: Divergence, t: float) -> None:
    """What T^k is for: of high temperatures, where q is all but uniform. Of LK that of total variation is right."""
    student, teacher = pair(6, 33, dtype=torch.float64, device=device)
    leaf, sizes = student.requires_grad_(), []
    for temperature in (t, 2 * t):
        loss = kd_loss(leaf, teacher, divergence=divergence, temperature=temperature)
        sizes.append(torch.autograd.grad(loss, leaf)[0].norm())
    assert 0.85 < sizes[1] / sizes[0] < 1.15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TAID(1.5), "t must be at least 0 and at most 1, not 1.5"),
        (lambda: ToDi(-1), "beta must be at least 0"),
        (lambda: AdaptiveKL(2.0), "head must be at least 0 and at most 1"),
        (lambda: AMiD(share=-0.1), "share must be at least 0"),
        (lambda: LK(-1.0), "decay must be at least 0"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_of_taid(device: str) -> None:
    """The loop fills the tensor; from agreement with itself to the teacher."""
    student, teacher = pair(4, 33, device=device)
    t = torch.zeros((), device=device)
    loss = fusedkd.nn.KDLoss(divergence=TAID(t))
    found = []
    for value in (0.0, 0.5, 1.0):
        t.fill_(value)
        found.append(loss(student, teacher).item())
    assert abs(found[0]) < 1e-12 < found[1] < found[2]
    expected = kd_truth(student, teacher).loss.value.item()
    assert found[2] == pytest.approx(expected, rel=1e-6)
    assert NLA().name in FAMILIES


@pytest.mark.parametrize("divergence", [*NAMED, *(family() for family in WITH_KERNEL.values())], ids=describe)
def test_coefficients_of_rows(divergence: Divergence) -> None:
    """A definition takes those of each row in a column; so does that of the exchanged sides."""
    if type(divergence).definition is Divergence.definition or divergence.name == "logit_mse":
        return
    p, q = (x.log_softmax(-1) for x in pair(3, 8, dtype=torch.float64))
    y = torch.tensor([1, 0, 4])
    for family in (divergence, divergence.exchanged()[1]):
        if type(family).definition is Divergence.definition:
            continue
        columns = [torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64) * float(x) for x in family.coefficients()]
        found = family.having([x.unsqueeze(-1) for x in columns]).definition(p, q, y)
        for i in range(3):
            row = slice(i, i + 1)
            one = family.having([x[i] for x in columns]).definition(p[row], q[row], y[row])
            torch.testing.assert_close(found[row], one)
