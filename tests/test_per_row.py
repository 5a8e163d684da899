"""Options of which each row has its own value: temperatures, the weight of the KD term, the coefficients of every
divergence, the weights of teachers. Row by row they are what a call with that row's numbers is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import describe, samples, top_k
from linear_cases import problem
from torch import Tensor
from truth import DTYPES, Term, Truth, assert_gradient, assert_value, kd_truth, pair, targets

from fusedkd import (
    DKD,
    JSD,
    LK,
    TAID,
    AdaptiveKL,
    AlphaBeta,
    AMiD,
    Jeffreys,
    LogitMSE,
    SkewKL,
    SkewReverseKL,
    ToDi,
    kd_loss,
    linear_kd_loss,
)
from fusedkd.backends.layout import OPTIONS
from fusedkd.divergences import Divergence

INF = torch.inf
N = 7
OWN: dict[str, Callable[[Any, Any], Any]] = {
    "forward_kl": lambda a, b: "forward_kl",
    "reverse_kl": lambda a, b: "reverse_kl",
    "jeffreys": lambda a, b: Jeffreys(a, b),
    "jsd": lambda a, b: JSD(a),
    "skew_kl": lambda a, b: SkewKL(a),
    "skew_reverse_kl": lambda a, b: SkewReverseKL(a),
    "alpha_beta": lambda a, b: AlphaBeta(a, b),
    "total_variation": lambda a, b: "total_variation",
    "logit_mse": lambda a, b: LogitMSE(0.5 + b),
    "dkd": lambda a, b: DKD(a, b),
    "taid": lambda a, b: TAID(a),
    "todi": lambda a, b: ToDi(b),
    "adaptive_kl": lambda a, b: AdaptiveKL(a),
    "amid": lambda a, b: AMiD(b, a),
    "lk": lambda a, b: LK(b),
    "nla": lambda a, b: "nla",
}
A = [0.5, 0.0, 1.0, 0.1, 0.9, 0.3, 1e-3]
"""The ends of JSD and of the skew divergences are other formulas."""
B = [1.0, 0.7, 0.0, 0.4, 1.2, 0.2, 0.9]
T = [1.0, 2.0, 4.0, 0.5, 3.0, 1.0, 8.0]
"""Of 1, 2 and 4 the exponentials of the cross-entropy are powers of the KD term's."""
WEIGHT = [0.5, 1.0, 0.0, 2.0, 0.25, 1.5, 0.1]
BOTH = {"ce_weight": 0.7, "label_smoothing": 0.1}
divergences = pytest.mark.parametrize("name", OWN)


class Rows(dict[str, Any]):
    """Options of which each row has its own: lists of numbers. ``whole()``: as tensors."""

    def whole(self, device: str, lead: tuple[int, ...] = (N,)) -> dict[str, Any]:
        def tensor(values: Any) -> Any:
            own = isinstance(values, list)
            return torch.tensor(values, dtype=torch.float64, device=device).view(lead) if own else values

        found = {name: tensor(x) for name, x in self.items() if name not in ("a", "b", "family")}
        if "family" in self:
            found["divergence"] = OWN[self["family"]](tensor(self["a"]), tensor(self["b"]))
        return found

    def row(self, i: int) -> dict[str, Any]:
        one = {name: x[i] if isinstance(x, list) else x for name, x in self.items()}
        if "family" in one:
            one["divergence"] = OWN[one.pop("family")](one.pop("a"), one.pop("b"))
        return one


def of(family: str, **more: Any) -> Rows:
    own = Rows(family=family, a=A, b=B, kd_weight=WEIGHT, **more)
    return own if family == "logit_mse" else Rows(own, temperature=T, teacher_temperature=T[::-1])


def truth_of(student: Tensor, teacher: Any, labels: Tensor | None, own: Rows, **options: Any) -> Truth:
    """Of all rows, one after the other; ``part(teacher, i)`` of lists and the like."""
    per_row = options.pop("reduction", "sum") == "none"
    parts = []
    for i in range(len(student)):
        y, one = None if labels is None else labels[i : i + 1], {"reduction": "none"} | options | own.row(i)
        if "kd_mask" in one:
            one["kd_mask"] = one["kd_mask"][i : i + 1]
        given = student[i : i + 1], row_of(teacher, i), y
        part = kd_truth(*given, **one)
        if one.get("kd_weight") == 0:  # the term is without its weight
            part = part._replace(kd=kd_truth(*given, **one | {"kd_weight": 1.0}).kd)
        parts.append(part)

    def together(terms: list[Term]) -> Term:
        return Term(*(torch.cat(x) if per_row else torch.cat(x).sum() for x in zip(*terms, strict=True)))

    loss, kd, ce = (together([p[k] for p in parts]) for k in range(3))
    free = torch.cat([torch.as_tensor(p.free).expand_as(p.gradient) for p in parts])
    return Truth(loss, kd, ce, *(torch.cat([p[k] for p in parts]) for k in (3, 4)), free)


def row_of(teacher: Any, i: int) -> Any:
    if isinstance(teacher, Tensor):
        return teacher[i : i + 1]
    if isinstance(teacher, list):
        return [row_of(each, i) for each in teacher]
    parts = {name: x[i : i + 1] if isinstance(x, Tensor) else x for name, x in vars(teacher).items()}
    return type(teacher)(**parts)


def check(student: Tensor, teacher: Any, labels: Tensor | None, own: Rows, **options: Any) -> None:
    options = {"reduction": "sum"} | options
    truth = truth_of(student, teacher, labels, own, **options)
    leaf = student.detach().requires_grad_()
    loss, terms = kd_loss(leaf, teacher, labels, return_terms=True, **options, **own.whole(str(student.device)))
    for actual, expected in zip((loss, *terms), truth, strict=False):
        assert_value(actual, expected, vacuous=expected is not truth.loss)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert_gradient(gradient, truth, vacuous=True)


# -------------------------------------------------- numbers


@divergences
@pytest.mark.parametrize("columns", [61, 301])
def test_every_family(device: str, name: str, columns: int) -> None:
    """Of few columns, and of more than the lanes of a CPU take."""
    student, teacher = pair(N, columns, device=device)
    labels = targets(N, classes=columns, device=device, ignored=None if name == "dkd" else -100)
    check(student, teacher, labels, of(name), **BOTH)
    check(student, teacher, labels, of(name), reduction="none", scale_by_t2=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=describe)
def test_types_and_surplus_columns(device: str, dtype: torch.dtype) -> None:
    student, teacher = pair(N, 130, dtype=dtype, device=device, teacher_columns=120)
    labels, mask = targets(N, classes=130, device=device), torch.tensor([1, 0.5, 1, 0, 2, 1, 1.0], device=device)
    check(student, teacher, labels, of("jsd"), kd_mask=mask, logit_softcap=20.0, **BOTH)


def test_the_same_in_all_rows_is_one_number(device: str) -> None:
    student, teacher = pair(N, 301, device=device)
    labels = targets(N, classes=301, device=device)
    number = {"divergence": JSD(0.3), "temperature": 2.0, "kd_weight": 0.5, "ce_weight": 1.0}
    rows = torch.ones(N, device=device)
    own = {"divergence": JSD(0.3 * rows), "temperature": 2 * rows, "kd_weight": 0.5 * rows, "ce_weight": 1.0}
    found = []
    for options in (number, own):
        leaf = student.clone().requires_grad_()
        loss, terms = kd_loss(leaf, teacher, labels, return_terms=True, **options)  # the mean over its own counts
        loss.backward()
        found.append((loss.detach(), *terms, leaf.grad))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_shapes_and_upstream(device: str, reduction: Any) -> None:
    """(3, 2) rows that are a slice; the weight is none of the count; backward once more with another upstream."""
    student, teacher = (x[:, 1:] for x in pair(3, 3, 301, device=device))
    labels, beta = targets(3, 2, classes=301, device=device), torch.linspace(0, 1, 6, device=device).view(3, 2)
    weight = torch.tensor([[1.0, 0], [0.5, 2], [1, 1]], device=device)
    leaf = student.detach().clone().requires_grad_()
    loss = kd_loss(
        leaf, teacher, labels, divergence=JSD(beta), kd_weight=weight, temperature=1 + beta, reduction=reduction
    )
    upstream = torch.randn(loss.shape, device=device)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
    rows = torch.empty(3, 2, dtype=torch.float64)
    expected = torch.empty(3, 2, 301, dtype=torch.float64)
    counted = (labels != -100).double().cpu()
    for i in range(6):
        b, t = i // 2, i % 2
        x = student[b, t].detach().double().requires_grad_()
        rows[b, t] = each = (
            counted[b, t]
            * weight[b, t].item()
            * kd_loss(
                x, teacher[b, t].double(), divergence=JSD(float(beta[b, t])), temperature=float(1 + beta[b, t])
            ).cpu()
        )
        up = upstream[b, t].item() if reduction == "none" else upstream.item() / counted.sum()
        expected[b, t] = torch.autograd.grad(each, x)[0].cpu() * up
    torch.testing.assert_close(gradient.double().cpu(), expected, rtol=1e-4, atol=1e-7)
    truth = rows.detach() if reduction == "none" else rows.detach().sum() / counted.sum()
    torch.testing.assert_close(loss.detach().double().cpu(), truth, rtol=1e-5, atol=1e-7)


def test_a_weight_of_0_leaves_an_infinite_row_out(device: str) -> None:
    student, teacher = pair(2, 301, device=device)
    student[1, :100] = -INF
    own = torch.tensor([1.0, 0], device=device)
    for divergence in ("forward_kl", "jsd"):
        for options in ({"kd_weight": own}, {"teacher_weights": [own, 0.0]}):
            leaf = student.clone().requires_grad_()
            both = [teacher, teacher] if "teacher_weights" in options else teacher
            loss, terms = kd_loss(leaf, both, divergence=divergence, reduction="sum", return_terms=True, **options)
            loss.backward()
            alone = kd_loss(student[:1], teacher[:1], divergence=divergence)
            torch.testing.assert_close(loss.detach(), alone)
            assert not leaf.grad[1].any()
            assert leaf.grad[0].any()
            if "teacher_weights" in options:
                torch.testing.assert_close(terms.kd, alone)


# -------------------------------------------------- teachers


@pytest.mark.parametrize("kind", ["renormalize", "bucket", "ignore", "samples"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_teachers_of_few_columns(device: str, kind: str, divergence: str) -> None:
    """Of tails that cannot be re-tempered, the temperature of the list is every row's."""
    if (kind, divergence) == ("samples", "reverse_kl"):
        return
    student, logits = pair(N, 61, device=device)
    labels = targets(N, classes=61, device=device)
    own = Rows(kd_weight=WEIGHT)
    if kind == "renormalize":
        own = Rows(own, temperature=T, teacher_temperature=T[::-1])
    teacher = samples(logits, 8) if kind == "samples" else top_k(logits, 8, kind)
    check(student, teacher, labels, own, divergence=divergence, **BOTH)


def test_teachers_of_each_row(device: str) -> None:
    """A row's teacher is the one whose weight there is 1; weights that are numbers are of all rows."""
    student, first = pair(N, 301, device=device)
    second = first.flip(-1)
    labels = targets(N, classes=301, device=device)
    route = [1.0, 0.0, 0.0, 1.0, 0.5, 1.0, 0.0]
    leaf = student.clone().requires_grad_()
    weights = [torch.tensor(route, device=device), torch.tensor([1 - x for x in route], device=device)]
    given = {"temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.7, "reduction": "sum"}
    loss, terms = kd_loss(leaf, [first, second], labels, teacher_weights=weights, return_terms=True, **given)
    parts = [
        kd_truth(student[i : i + 1], [first[i : i + 1], second[i : i + 1]], labels[i : i + 1],
                 teacher_weights=[route[i], 1 - route[i]], **given)
        for i in range(N)
    ]  # fmt: skip
    for actual, k in ((loss, 0), (terms.kd, 1), (terms.ce, 2)):
        assert_value(actual, Term(*(sum(p[k][j] for p in parts) for j in range(2))), vacuous=True)
    (gradient,) = torch.autograd.grad(loss, leaf)
    truth = parts[0]._replace(**{x: torch.cat([getattr(p, x) for p in parts]) for x in ("gradient", "subtracted")})
    assert_gradient(gradient, truth)


@divergences
def test_a_gradient_for_the_teacher(device: str, name: str) -> None:
    student, teacher = (x.double() for x in pair(N, 301, device=device))
    labels, own = targets(N, classes=301, device=device, ignored=None), of(name)
    teacher = teacher.requires_grad_()
    loss = kd_loss(student, teacher, labels, teacher_gradient=True, reduction="sum", **own.whole(device))
    (gradient,) = torch.autograd.grad(loss, teacher)
    for i in range(N):
        v, y = teacher[i : i + 1].detach().requires_grad_(), labels[i : i + 1]
        one = kd_loss(student[i : i + 1], v, y, teacher_gradient=True, **{**own.row(i), "kd_weight": 1.0})
        (one,) = torch.autograd.grad(one, v)
        one *= WEIGHT[i]
        torch.testing.assert_close(gradient[i : i + 1], one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "both_renormalized"])
@pytest.mark.parametrize("name", ["jeffreys", "jsd", "alpha_beta", "taid", "amid", "lk"])
def test_listed_teachers_of_any_divergence(device: str, name: str, tail: str) -> None:
    """From logits and from hidden states, as row by row."""
    student, logits = (x.double() for x in pair(N, 33, device=device))
    own = Rows(family=name, a=A, b=B, kd_weight=WEIGHT, temperature=2.0)
    teacher, leaf = top_k(logits, 5, tail, 2.0), student.requires_grad_()
    eye = torch.eye(33, dtype=torch.float64, device=device)
    losses = [
        kd_loss(leaf, teacher, reduction="none", **own.whole(device)),
        linear_kd_loss(leaf, eye, teacher, reduction="none", **own.whole(device)),
        torch.cat([kd_loss(leaf[i : i + 1], row_of(teacher, i), reduction="none", **own.row(i)) for i in range(N)]),
    ]
    found = [(x, torch.autograd.grad(x.sum(), leaf)[0]) for x in losses]
    for each in found[:2]:
        torch.testing.assert_close(each, found[2], rtol=1e-10, atol=1e-13)


class Hellinger(Divergence):
    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return 0.5 * ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)


def test_a_divergence_of_ones_own(device: str) -> None:
    student, teacher = (x.double() for x in pair(N, 61, device=device))
    leaf, T_rows, weight = (
        student.clone().requires_grad_(),
        torch.tensor(T, device=device),
        torch.tensor(WEIGHT, device=device),
    )
    loss = kd_loss(leaf, teacher, divergence=Hellinger(), temperature=T_rows, kd_weight=weight, reduction="none")
    loss.sum().backward()
    for i in range(N):
        x = student[i : i + 1].clone().requires_grad_()
        one = kd_loss(x, teacher[i : i + 1], divergence=Hellinger(), temperature=T[i], reduction="sum")
        one.backward()
        torch.testing.assert_close(loss[i].detach(), WEIGHT[i] * one.detach(), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(leaf.grad[i], WEIGHT[i] * x.grad[0], rtol=1e-6, atol=1e-12)


# -------------------------------------------------- from hidden states


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=describe)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states(device: str, dtype: torch.dtype, reduction: Any) -> None:
    """Tiles have the options of their rows; float16 a unit that leaves room for the largest of them."""
    given = problem(N, sizes=(8, 8), columns=(101, 101), dtype=dtype, device=device)
    own = of("jsd").whole(device)
    found = []
    for loss in ("linear", "whole"):
        p = given.leaves()
        if loss == "linear":
            with pytest.warns(UserWarning, match="matrix products are slow"):
                value, terms = p.loss(reduction=reduction, return_terms=True, max_tile_bytes=6464, **own, **BOTH)
        else:
            p = p._replace(**{k: x.detach().double().requires_grad_() for k, x in p.operands.items()})
            z = torch.nn.functional.linear(p.hidden, p.weight, p.bias)
            head = [x if x is None else x.double() for x in (p.teacher.hidden, p.teacher.weight, p.teacher.bias)]
            v = torch.nn.functional.linear(*head)
            value, terms = kd_loss(z, v, p.labels, reduction=reduction, return_terms=True, **own, **BOTH)
        gradients = torch.autograd.grad(value.sum(), list(p.operands.values()))
        found.append([x.double() for x in (value.detach(), *terms, *gradients)])
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(*found, **tolerance)


# -------------------------------------------------- a split vocabulary


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "dkd"])
def test_shards(device: str, name: str) -> None:
    from test_shards import ROWS, case, inputs_of
    from test_shards import check as check_shards

    own = {k: x[:ROWS] if isinstance(x, list) else x for k, x in of(name).items()}
    inputs = inputs_of(*case(device), **Rows(own).whole(device, (ROWS,)))
    assert inputs["options"].shape == (ROWS, OPTIONS)
    check_shards(inputs, (100, 200))
