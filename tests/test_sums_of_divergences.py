"""A list of divergences with weights: the weighted sum of the losses of each, in value, terms and gradient; products
with the heads once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import describe
from linear_cases import counted_products, problem
from torch import Tensor
from truth import operator_calls, pair, targets

from fusedkd import (
    DKD,
    JSD,
    Divergence,
    ForwardKL,
    Jeffreys,
    SkewKL,
    TeacherTopK,
    TotalVariation,
    kd_loss,
    linear_kd_loss,
)
from fusedkd.backends.layout import KernelId

N, V = 6, 301
BOTH = {"ce_weight": 0.7, "temperature": 2.0}
ROWS = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0])


class Squared(Divergence):
    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1)


SUMS: dict[str, list[tuple[Any, Any]]] = {
    "two": [(1.0, "forward_kl"), (0.5, TotalVariation())],
    "with labels": [(0.3, DKD()), (torch.tensor(0.5), JSD(0.2)), (2, "reverse_kl")],
    "one's own": [(0.5, Squared()), (1.0, "forward_kl")],
    "none of one": [(0.0, "forward_kl"), (1.0, "reverse_kl")],
    "one": [(0.5, "jsd")],
    "of KL alone": [(1.0, "forward_kl"), (torch.tensor(0.5), "reverse_kl"), (0.25, Jeffreys(0.5, 2.0))],
    "two mixtures": [(1.0, "jsd"), (0.5, SkewKL(0.3)), (0.25, "reverse_kl"), (0.5, "total_variation")],
}
sums = pytest.mark.parametrize("parts", SUMS.values(), ids=SUMS)


def found(student: Tensor, teacher: Any, labels: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaf = student.detach().clone().requires_grad_()
    loss, terms = kd_loss(leaf, teacher, labels, return_terms=True, **{**BOTH, **options})
    loss.sum().backward()
    return loss.detach(), *terms, leaf.grad


def added(
    student: Tensor,
    teacher: Any,
    labels: Tensor,
    parts: Sequence[tuple[Any, Any]],
    kd_weight: Any = 1.0,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The calls one by one; rows with weights of their own are per-row calls, averaged over their count."""
    total: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for i, (weight, divergence) in enumerate(parts):
        own = {"divergence": divergence, "kd_weight": kd_weight * weight, "ce_weight": 0.0 if i else 0.7}
        loss, kd, ce, gradient = found(student, teacher, labels, **{**options, **own})
        alone = found(student, teacher, labels, **{**options, **own, "kd_weight": 1.0, "ce_weight": 0.0})[0]
        kd = alone * weight
        total = [total[0] + loss, total[1] + kd, total[2] + (ce if i == 0 else 0), total[3] + gradient]
    return tuple(total)


@sums
@pytest.mark.parametrize(
    "options",
    [
        {"kd_weight": 0.5},
        {"kd_weight": 0.5, "reduction": "none"},
        {"scale_by_t2": False},
        {"temperature": torch.tensor(3.0), "teacher_temperature": 2.0},
        {"temperature": torch.tensor([1.0, 2.0, 4.0, 3.0, 0.5, 2.0]), "reduction": "none"},
    ],
    ids=lambda options: "-".join(options),
)
def test_it_is_the_sum(device: str, parts: list[tuple[Any, Any]], options: dict[str, Any]) -> None:
    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    whole = found(student, teacher, labels, divergence=parts, **options)
    torch.testing.assert_close(whole, added(student, teacher, labels, parts, **options), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("parts", "calls"),
    [
        ([(1.0, "forward_kl"), (0.5, "reverse_kl")], 1),
        ([(1.0, "forward_kl"), (0.5, "total_variation"), (0.5, "jsd"), (0.0, "dkd")], 2),
        ([(1.0, "jsd"), (0.5, "skew_kl")], 2),
        ([(1.0, "jsd"), (0.5, "alpha_beta"), (1.0, "reverse_kl")], 2),
    ],
    ids=str,
)
def test_what_one_kernel_sums_up(device: str, parts: list[tuple[float, str]], calls: int) -> None:
    student, teacher = pair(N, V, device=device)
    with operator_calls() as seen:
        kd_loss(student.requires_grad_(), teacher, targets(N, classes=V, device=device), divergence=parts)
    assert [name for name, _ in seen if name == "kd_loss"] == ["kd_loss"] * calls


class Squarely(TotalVariation):
    temperature_power = 2


class Labelled(ForwardKL):
    needs_labels = True


class Forward(Divergence):
    kernel_id = KernelId.JEFFREYS

    def coefficients(self) -> tuple[float]:
        return (1.0,)

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("own", [Squarely(), Labelled(), Forward()], ids=describe)
def test_another_class_on_a_kernel_of_ours(device: str, own: Divergence) -> None:
    """Its T^k, its rows, its coefficients, and what it is with the sides exchanged."""
    sides = [x.requires_grad_() for x in pair(N, V, device=device)]
    options = {"temperature": 2.0, "kd_mask": torch.ones(N, device=device), "teacher_gradient": True}
    parts = [(0.5, own), (1.0, "reverse_kl"), (0.25, "total_variation")]
    results = []
    for calls in ([parts], [[part] for part in parts]):
        losses = [kd_loss(*sides, targets(N, classes=V, device=device), divergence=d, **options) for d in calls]
        loss = sum(losses, torch.zeros((), device=device))
        results.append((loss.detach(), *torch.autograd.grad(loss, sides)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_weights_of_each_row(device: str) -> None:
    """An adaptive KL: a row's mixture of forward and reverse, and its own β."""
    student, teacher = pair(N, V, device=device)
    labels, own = targets(N, classes=V, device=device), ROWS.to(device)
    parts = [(own, JSD(own / 2)), (1 - own / 2, "reverse_kl")]
    whole = found(student, teacher, labels, divergence=parts, reduction="none")
    torch.testing.assert_close(whole, added(student, teacher, labels, parts, reduction="none"), rtol=1e-5, atol=1e-7)
    mean = found(student, teacher, labels, divergence=parts)
    counted = (labels != -100).sum()
    for k in range(3):
        torch.testing.assert_close(mean[k], whole[k].sum() / counted)
    torch.testing.assert_close(mean[3], whole[3] / counted, rtol=1e-5, atol=1e-8)


def test_of_several_teachers(device: str) -> None:
    student, teacher = pair(N, V, device=device)
    labels, others = targets(N, classes=V, device=device), [teacher, teacher.flip(-1)]
    parts, weights = SUMS["two"], [0.25, 0.75]
    whole = found(student, others, labels, divergence=parts, teacher_weights=weights)
    one = [added(student, t, labels, [(w * x, d) for x, d in parts]) for t, w in zip(others, weights, strict=True)]
    ce = found(student, teacher, labels, kd_weight=0.0)
    for k in (1, 3):
        torch.testing.assert_close(whole[k], one[0][k] + one[1][k] - (ce[k] if k == 3 else 0), rtol=1e-5, atol=1e-7)


def test_of_16_bit_logits_the_gradient_is_rounded_once(device: str) -> None:
    student, teacher = pair(N, V, dtype=torch.bfloat16, device=device)
    labels = targets(N, classes=V, device=device)
    whole = found(student, teacher, labels, divergence=SUMS["two"])[3]
    exact = added(student.float(), teacher, labels, SUMS["two"])[3]
    torch.testing.assert_close(whole, exact.bfloat16(), rtol=8e-3, atol=1e-9)


def test_a_list_of_columns(device: str) -> None:
    student, logits = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    logprobs, ids = (logits / 2).log_softmax(-1).topk(8, -1)
    teacher = TeacherTopK(ids, logprobs, logprobs_temperature=2.0)
    parts = [(0.5, "forward_kl"), (0.5, "reverse_kl")]
    whole = found(student, teacher, labels, divergence=parts)
    torch.testing.assert_close(whole, added(student, teacher, labels, parts), rtol=1e-5, atol=1e-7)


# -------------------------------------------------- from hidden states


def test_products_are_those_of_one_divergence(device: str) -> None:
    given = problem(40, sizes=(8, 8), columns=(101, 101), device=device)
    sums = [(1.0, "forward_kl"), (0.5, TotalVariation()), (0.2, JSD(0.1))]
    losses, counts, gradients = [], [], []
    for divergence in ("forward_kl", sums):
        p = given.leaves()
        with counted_products() as calls:
            loss = p.loss(divergence=divergence, **BOTH)
            gradients.append(p.gradients(loss))
        counts.append(len(calls))
        losses.append(loss.detach())
    assert counts[0] == counts[1] > 0
    p = given.leaves()
    ce = [0.7, 0.0, 0.0]
    parts = [
        p.loss(divergence=d, kd_weight=w, temperature=2.0, ce_weight=c) for (w, d), c in zip(sums, ce, strict=True)
    ]
    torch.testing.assert_close(losses[1], sum(x.detach() for x in parts), rtol=1e-5, atol=1e-6)
    for name, gradient in p.gradients(sum(parts)).items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_two_teachers_with_two_divergences_each(device: str) -> None:
    given = problem(20, sizes=(8, 8), columns=(101, 101), device=device)
    given = given._replace(teacher=[given.teacher, type(given.teacher)(given.teacher.hidden, given.teacher.weight)])
    counts = []
    for divergence in ("forward_kl", SUMS["two"]):
        p = given.leaves()
        with counted_products() as calls:
            loss = p.loss(divergence=divergence, **BOTH)
            p.gradients(loss)
        counts.append(len(calls))
    assert counts[0] == counts[1]
    parts = [
        given._replace(teacher=t).loss(divergence=d, kd_weight=0.5 * w, temperature=2.0, ce_weight=0.0)
        for t in given.teacher
        for w, d in SUMS["two"]
    ]
    ce = given._replace(teacher=given.teacher[0]).loss(kd_weight=0.0, ce_weight=0.7)
    torch.testing.assert_close(loss.detach(), sum(parts) + ce, rtol=1e-5, atol=1e-6)


def test_the_number_0_as_weight_computes_nothing(device: str) -> None:
    """Whatever the other weights of that member are: numbers, tensors, or one for each row."""
    student, teacher = pair(N, V, device=device)
    broken = torch.full_like(teacher, torch.nan)
    some, each = torch.ones((), device=device), torch.ones(N, device=device)
    for weight in (some, each):
        options: dict[str, Any] = {"divergence": [(weight, "jsd")], "return_terms": True}
        loss, terms = kd_loss(student, [broken, teacher], teacher_weights=[0.0, 1.0], **options)
        torch.testing.assert_close(loss, kd_loss(student, teacher, divergence="jsd"), rtol=1e-6, atol=1e-7)
        loss, terms = kd_loss(student, broken, kd_weight=0.0, **options)
        assert loss == 0
        assert terms.kd == 0


@pytest.mark.parametrize("whole", [False, True])
def test_rows_whose_weights_are_all_0_are_not_read(device: str, whole: bool) -> None:
    student, teacher = pair(N, V, device=device)
    student[0, 3], student[1] = torch.nan, -torch.inf
    zero = torch.zeros(N, device=device)
    zero[2:] = 1.0
    weights = [zero, zero * 0.5]
    if whole:
        weights = [torch.zeros((), device=device)] * 2
    leaf = student.requires_grad_()
    for last in ("reverse_kl", "total_variation", "jsd"):
        parts = list(zip(weights, ("forward_kl", last), strict=True))
        loss = kd_loss(leaf, teacher, divergence=parts, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert not loss[:2].any()
        assert not gradient[:2].any()
        assert loss[2:].isfinite().all()
        assert loss[2:].any() != whole


def test_statistics_are_of_the_rows_of_the_first_divergence(device: str) -> None:
    """Whatever is summed up with what."""
    student, teacher = pair(N, V, device=device)
    labels, mask = targets(N, classes=V, device=device), torch.ones(N, device=device)
    for parts in ([(1.0, "dkd"), (1.0, "forward_kl")], [(1.0, "dkd"), (1.0, "forward_kl"), (1.0, "reverse_kl")]):
        given = {"divergence": parts, "kd_mask": mask, "return_terms": True, "statistics": ["student_entropy"]}
        _, terms = kd_loss(student, teacher, labels, **given)
        assert torch.equal(terms.statistics["student_entropy"] == 0, labels == -100)


# -------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("divergence", "error", "message"),
    [
        ([], ValueError, "divergence is an empty list"),
        (["forward_kl"], TypeError, r"must hold pairs \(weight, divergence\), but one is 'forward_kl'"),
        ([("forward_kl", 1.0)], TypeError, r"must hold pairs \(weight, divergence\)"),
        ([(1.0, "kl")], ValueError, "divergence must be a Divergence or one of"),
        ([(-1.0, "forward_kl")], ValueError, "the weight of a divergence must be at least 0"),
        (
            [(1.0, "jsd"), (torch.ones(2), "forward_kl")],
            ValueError,
            r"the weight of a teacher or divergence must have .* \(2,\)",
        ),
        ([(1.0, "reverse_kl"), (torch.ones(2), "forward_kl")], ValueError, r"the weight of a teacher or .* \(2,\)"),
        ([(1.0, JSD(torch.ones(2) / 2)), (1.0, "forward_kl")], ValueError, r"divergence.beta must have .* \(2,\)"),
        ([(torch.ones(N), "jsd"), (torch.ones(2), "forward_kl")], ValueError, r"the weight of a teacher or .* \(2,\)"),
        ([(torch.ones(2), "forward_kl")], ValueError, r"the weight of a teacher or .* \(2,\)"),
        ([(1.0, "logit_mse")], ValueError, "temperature must be 1 for logit_mse"),
    ],
)
def test_mistakes(divergence: Any, error: type[Exception], message: str) -> None:
    student, teacher = pair(N, V)
    with pytest.raises(error, match=message):
        kd_loss(student, teacher, divergence=divergence, temperature=2.0)
    with pytest.raises(error, match=message):
        linear_kd_loss(torch.ones(N, 4), torch.ones(V, 4), teacher, divergence=divergence, temperature=2.0)
