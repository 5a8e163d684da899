"""The estimators of one token per row, by exact enumeration: Σ_y q(y)·k(y) and Σ_y q(y)·∇k(y) in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedkd
from fusedkd import kd_loss, linear_sampled_kl_loss, sampled_kl, sampled_kl_loss

V, H, ROWS = 9, 5, 4
ESTIMATORS = ("policy", "k1", "k2", "k3")


def sides(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a student and log-probabilities of a teacher, ``(V,)`` float64."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(V, generator=draw, dtype=torch.float64) for _ in range(2))
    return student, teacher.log_softmax(-1)


def enumerated(estimator: str, student: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The means of value and gradient over y ~ q."""
    leaf = student.expand(V, V).clone().requires_grad_()  # row y is about token y
    rows = sampled_kl_loss(leaf, log_p, torch.arange(V), estimator=estimator, reduction="none")
    q = student.softmax(-1)
    (gradient,) = torch.autograd.grad(rows, leaf, q)
    return (q * rows.detach()).sum(), gradient.sum(0)


def kl(divergence: str, student: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf[None], log_p[None], divergence=divergence)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_values_and_gradients_are_what_the_table_says() -> None:
    student, log_p = sides()
    reverse, reverse_gradient = kl("reverse_kl", student, log_p)
    _, forward_gradient = kl("forward_kl", student, log_p)
    q = student.softmax(-1)
    squares = (q * (student.log_softmax(-1) - log_p) ** 2).sum() / 2
    truth = {
        "policy": (reverse, reverse_gradient),
        "k1": (reverse, torch.zeros(V, dtype=torch.float64)),
        "k2": (squares, reverse_gradient),
        "k3": (reverse, forward_gradient),
    }
    assert reverse > 0.5
    assert (squares - reverse).abs() > 0.1
    assert (forward_gradient - reverse_gradient).norm() > 0.1
    for estimator, (value, gradient) in truth.items():
        found = enumerated(estimator, student, log_p)
        torch.testing.assert_close(found, (value, gradient), rtol=1e-12, atol=1e-14, msg=estimator)


def test_k3_is_never_negative_and_right_near_the_teacher() -> None:
    for d in (1e-3, -1e-3, 1e-5, 3.0, -3.0):
        log_q = torch.tensor(-1.0, dtype=torch.float64)
        log_p = log_q - d
        exact = d * d / 2 - d**3 / 6 + d**4 / 24 if abs(d) < 0.1 else torch.tensor(-d).double().expm1().item() + d
        assert sampled_kl(log_q, log_p, estimator="k3").item() == pytest.approx(exact, rel=1e-4)


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((2, ROWS, H), (V, H), (V,)))
    labels = torch.randint(V, (2, ROWS), generator=draw)
    labels[0, :2] = -100
    teacher = -torch.rand(2, ROWS, generator=draw, dtype=torch.float64) * 4
    teacher[0, 0] = torch.nan  # has no label: not read
    found = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "teacher": teacher}
    return {name: x if name == "labels" else x.to(dtype) for name, x in found.items()}


def by_hand(logits: Tensor, given: dict[str, Any], estimator: str, weights: Tensor | None = None) -> Tensor:
    """Rows, by PyTorch's operators: the formulas of the table."""
    chosen = given["labels"] != -100
    log_q = logits.log_softmax(-1).gather(-1, given["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)[chosen]
    d = log_q - given["teacher"][chosen]
    rows = {"policy": d.detach() + d.detach() * (log_q - log_q.detach()), "k1": d, "k2": d**2 / 2}
    rows["k3"] = (-d).exp() - 1 + d
    return rows[estimator] * (1 if weights is None else weights[chosen])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("changed", [{}, {"temperature": 0.7}, {"temperature": 2.0, "logit_softcap": 3.0}])
def test_both_forms_are_the_formulas(estimator: str, changed: dict[str, Any]) -> None:
    given = batch()
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    z, cap = hidden @ weight.T + bias, changed.get("logit_softcap")
    z = z if cap is None else cap * (z / cap).tanh()
    expected = by_hand(z / changed.get("temperature", 1.0), given, estimator).mean()
    truth = torch.autograd.grad(expected, leaves)
    options = {"estimator": estimator, **changed}
    linear = linear_sampled_kl_loss(hidden, weight, given["teacher"], given["labels"], student_bias=bias, **options)
    logits = sampled_kl_loss(hidden @ weight.T + bias, given["teacher"], given["labels"], **options)
    for loss in (linear, logits):
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        for found, true in zip(torch.autograd.grad(loss, leaves), truth, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-10)


def test_masks_and_normalisers() -> None:
    given = batch()
    logits = given["hidden"] @ given["weight"].T
    arguments = logits, given["teacher"], given["labels"]
    rows = torch.zeros(2, ROWS, dtype=torch.float64)
    rows[given["labels"] != -100] = by_hand(logits, given, "k2")
    weights = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[1, 1] = 0
    chosen, bools = given["labels"] != -100, weights > 0.4

    def loss(**options: Any) -> Tensor:
        return sampled_kl_loss(*arguments, estimator="k2", **options)

    kept = chosen & bools
    for found, true in (
        (loss(reduction="none"), rows),
        (loss(reduction="sum"), rows.sum()),
        (loss(normalizer=7.0), rows.sum() / 7),
        (loss(normalizer=torch.tensor(7)), rows.sum() / 7),
        (loss(mask=bools), rows[kept].sum() / kept.sum()),
        (loss(mask=weights), (weights * rows).sum() / (weights * chosen).sum()),
        (loss(mask=weights, reduction="none"), weights * rows),
        (loss(mask=torch.zeros_like(bools)), torch.zeros((), dtype=torch.float64)),
    ):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-12)


def test_rows_that_are_left_out_get_no_gradient_and_show_nothing() -> None:
    given = batch()
    leaf = (given["hidden"] @ given["weight"].T).requires_grad_()
    mask = torch.ones(2, ROWS, dtype=torch.bool)
    mask[1, 2], given["teacher"][1, 2] = False, torch.inf
    loss = sampled_kl_loss(leaf, given["teacher"], given["labels"], mask=mask)
    loss.backward()
    out = (given["labels"] == -100) | ~mask
    assert loss.isfinite()
    assert (leaf.grad[out] == 0).all()
    assert (leaf.grad[~out] != 0).any(-1).all()
    none = sampled_kl_loss(leaf, given["teacher"], torch.full_like(given["labels"], -100))
    assert none == 0
    assert not torch.autograd.grad(none, leaf)[0].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tokens_without_probability(estimator: str) -> None:
    one, none = -1.0, -torch.inf
    log_q = torch.tensor([one, none, none], dtype=torch.float64, requires_grad=True)
    rows = sampled_kl(log_q, torch.tensor([none, one, none], dtype=torch.float64), estimator=estimator)
    assert rows[0] == torch.inf
    assert rows[1].isinf()
    assert rows[2] == 0
    slope = 1.0 if estimator in ("k1", "k3") else 0.0
    assert torch.autograd.grad(rows, log_q, torch.ones_like(rows))[0].tolist() == [slope, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sure_row(dtype: torch.dtype) -> None:
    """The token has the probability 1 − 1e-5, which 1 − Σ in float32 would lose."""
    logits = torch.zeros(1, V, dtype=dtype)
    logits[0, 0] = 13.625
    leaf = logits.clone().requires_grad_()
    given = torch.full((1,), -2e-5), torch.zeros(1, dtype=torch.int64)
    wide = logits.double().requires_grad_()
    loss, true = sampled_kl_loss(leaf, *given), sampled_kl_loss(wide, given[0].double(), given[1])
    assert loss.item() == pytest.approx(true.item(), rel=1e-3)
    found, expected = (torch.autograd.grad(x, y)[0].double() for x, y in ((loss, leaf), (true, wide)))
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_compiled() -> None:
    given = batch(torch.float32)
    arguments = given["hidden"] @ given["weight"].T, given["teacher"], given["labels"]
    found = [
        torch.autograd.grad(loss(leaf, *arguments[1:], estimator="k3"), leaf)[0]
        for loss in (sampled_kl_loss, torch.compile(sampled_kl_loss, fullgraph=True, backend="aot_eager"))
        for leaf in [arguments[0].clone().requires_grad_()]
    ]
    torch.testing.assert_close(*found)


LOGITS, TEACHER, LABELS = torch.zeros(2, V), torch.full((2,), -1.0), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: sampled_kl_loss(LOGITS, TEACHER, LABELS, estimator="k4"),
            ValueError,
            "estimator must be one of policy",
        ),
        (lambda: sampled_kl_loss(LOGITS, -TEACHER, LABELS), ValueError, "teacher_logprob must be log-prob.* one is 1"),
        (lambda: sampled_kl_loss(LOGITS, LOGITS, LABELS), ValueError, r"teacher_logprob must have .* \(2,\)"),
        (lambda: sampled_kl_loss(LOGITS, LABELS, LABELS), TypeError, "teacher_logprob must be floating point"),
        (lambda: sampled_kl_loss(LOGITS, TEACHER, TEACHER), TypeError, "labels must be int64"),
        (lambda: sampled_kl_loss(LOGITS, TEACHER, LABELS, temperature=0.0), ValueError, "temperature must be above 0"),
        (lambda: sampled_kl_loss(LOGITS, TEACHER, LABELS, kind="k1"), TypeError, "has no option kind"),
        (lambda: sampled_kl(LABELS, TEACHER), TypeError, "student_logprob must be floating point"),
        (lambda: fusedkd.sampled_kl(TEACHER, TEACHER.clone().requires_grad_()), ValueError, "are the two swapped"),
    ],
)
def test_mistakes_are_named(call: Callable[[], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


def test_no_second_derivative() -> None:
    log_q = torch.tensor([-1.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sampled_kl(log_q, torch.tensor([-2.0]))[0], log_q, create_graph=True)
