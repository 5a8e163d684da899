"""What happens between a loss and its gradients: upstream gradients, repeated backward, float16, grad mode, autocast,
and which operators run for it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from truth import DTYPES, assert_gradient, assert_value, check_kd, kd_truth, operator_calls, pair, targets

from fusedkd import cosine_hidden_loss, kd_loss

OPTIONS = {"kd_weight": 0.5, "ce_weight": 0.7, "temperature": 2.0}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def batch(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return *pair(3, 4, 70, dtype=dtype, device=device), targets(3, 4, classes=70, device=device)


@dtypes
@pytest.mark.parametrize("upstream", [0.37, -3.0, 1e-3, 1e4])
def test_the_upstream_gradient_is_folded_in_with_one_rounding(device: str, dtype: torch.dtype, upstream: float) -> None:
    student, teacher, labels = batch(device, dtype)
    check_kd(student, teacher, labels, upstream=upstream, **OPTIONS)
    check_kd(student, teacher, labels, upstream=upstream, reduction="sum", **OPTIONS)


def test_no_upstream_gradient(device: str) -> None:
    student, teacher, labels = batch(device)
    leaf = student.requires_grad_()
    (0 * kd_loss(leaf, teacher, labels, **OPTIONS)).backward()
    assert not leaf.grad.any()


@dtypes
@pytest.mark.parametrize("upstreams", [(1.0, 3.0), (3.0, 1.0), (1.0, 1.0)])
def test_backward_again(device: str, dtype: torch.dtype, upstreams: tuple[float, float]) -> None:
    """Into fresh memory: what the first backward handed out stays what it is."""
    student, teacher, labels = batch(device, dtype)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, labels, **OPTIONS)
    gradients = [torch.autograd.grad(loss, leaf, torch.tensor(u).to(loss), retain_graph=True)[0] for u in upstreams]
    for gradient, upstream in zip(gradients, upstreams, strict=True):
        assert_gradient(gradient, kd_truth(student, teacher, labels, upstream=upstream, **OPTIONS))


def test_gradients_accumulate(device: str) -> None:
    student, teacher, labels = batch(device)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, labels, **OPTIONS)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    assert_gradient(leaf.grad, kd_truth(student, teacher, labels, upstream=3.0, **OPTIONS))


@pytest.mark.wide
def test_float16_with_a_loss_scale(device: str) -> None:
    """The mean over 4096 rows alone is below what float16 resolves; times 2^14 it is not."""
    student, teacher = pair(4096, 64, dtype=torch.float16, device=device, noise=0.1)
    truth = check_kd(student, teacher, upstream=2.0**14)
    unscaled = truth.gradient / 2**14
    assert (unscaled.to(torch.float16).double() - unscaled).norm() > 0.01 * unscaled.norm()


@dtypes
def test_double_backward_raises(device: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(device, dtype)
    leaf = student.requires_grad_()
    for reduction in ("mean", "none"):
        loss = kd_loss(leaf, teacher, labels, reduction=reduction, **OPTIONS)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss.sum(), leaf, create_graph=True)


def test_the_teacher_gets_no_gradient(device: str) -> None:
    student, teacher, labels = batch(device)
    teacher.requires_grad_()
    with pytest.warns(UserWarning, match="teacher requires a gradient, but gets none") as told:
        kd_loss(student.requires_grad_(), teacher, labels, **OPTIONS).backward()
    assert told[0].filename == __file__
    assert teacher.grad is None
    assert student.grad.any()
    with torch.no_grad():
        assert not kd_loss(student.detach(), teacher, labels, **OPTIONS).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_from_inference_mode(device: str, reduction: str) -> None:
    """Whose tensors autograd refuses to save; labels and masks come from there as well."""
    student, teacher, labels = batch(device)
    expected = student.clone().requires_grad_()
    leaf = student.clone().requires_grad_()
    options = {**OPTIONS, "reduction": reduction}

    def gradients(leaf: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> list[Tensor]:
        kd = kd_loss(leaf[:, :-1], teacher[:, :-1], labels[:, 1:], **options).sum()
        loss = 3 * (kd + cosine_hidden_loss(leaf, teacher, mask))
        return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]

    with torch.inference_mode():
        inferred = [x.clone() for x in (teacher, labels, (labels > 3).float())]
    assert all(x.is_inference() for x in inferred)
    ordinary = gradients(expected, teacher, labels, (labels > 3).float())
    assert all(torch.equal(a, b) for a, b in zip(gradients(leaf, *inferred), ordinary, strict=True))
    assert ordinary[0].norm() > 0.01


def test_only_what_is_needed_is_computed(device: str) -> None:
    student, teacher, labels = batch(device)
    leaf = student.clone().requires_grad_()

    def forwards(**options) -> list[bool]:
        with operator_calls() as calls:
            kd_loss(options.pop("student", leaf), teacher, labels, **OPTIONS, **options)
        return [arguments["gradient"] is not None for name, arguments in calls if name == "kd_loss"]

    assert forwards() == [True]
    assert forwards(student=student) == [False]
    assert forwards(reduction="none") == [False]
    assert forwards(student=student.half().requires_grad_()) == [False]
    with torch.no_grad():
        assert forwards() == [False]
        assert forwards(student=leaf * 1, inplace=True) == [False]
    with torch.inference_mode():
        assert forwards() == [False]


@pytest.mark.parametrize(
    ("dtype", "reduction", "skipped"),
    [
        (torch.float32, "mean", [False]),
        (torch.bfloat16, "sum", [False]),
        (torch.float16, "mean", [False, False]),
        (torch.float32, "none", [False, False]),
    ],
    ids=str,
)
def test_operators_of_two_backward_calls(device: str, dtype: torch.dtype, reduction: str, skipped: list[bool]) -> None:
    student, teacher, labels = batch(device, dtype)
    loss = kd_loss(student.requires_grad_(), teacher, labels, reduction=reduction, **OPTIONS).sum()
    with operator_calls() as calls:
        loss.backward(retain_graph=True)
        loss.backward()
    if device != "cpu" and len(skipped) == 1:
        skipped = [True, *skipped]  # a GPU's upstream gradient is read there
    assert [(name, arguments["skip_if_one"]) for name, arguments in calls] == [("kd_backward", x) for x in skipped]


def test_terms_that_weigh_nothing_are_not_computed(device: str) -> None:
    student, teacher, labels = batch(device)
    with operator_calls() as calls:
        kd_loss(student, teacher, labels, kd_weight=0.0, ce_weight=1.0)
        kd_loss(student, teacher, labels)
    assert [name for name, _ in calls] == ["kd_loss"] * 2
    assert [x["kd"] for _, x in calls] == [False, True]  # whether the teacher is looked at
    assert [x["ce"] or x["needs_labels"] for _, x in calls] == [True, False]  # whether a kernel is given the labels


def test_autocast(device: str) -> None:
    """Inside the region as outside: 16-bit operands, float32 loss, gradients in the dtype of their input."""
    x, teacher, labels = batch(device)
    weight = (0.3 * pair(70, 70, device=device, seed=9)[0]).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        student = x @ weight
        student.retain_grad()
        inside = kd_loss(student, teacher.bfloat16(), labels, **OPTIONS)
        hidden = cosine_hidden_loss(student, teacher)
    assert student.dtype == torch.bfloat16
    assert inside.dtype == hidden.dtype == torch.float32
    assert torch.equal(inside, kd_loss(student, teacher.bfloat16(), labels, **OPTIONS))
    inside.backward()
    assert student.grad.dtype == torch.bfloat16
    assert_gradient(student.grad, kd_truth(student, teacher.bfloat16(), labels, **OPTIONS))
    assert weight.grad.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        assert_value(kd_loss(x, teacher, labels, **OPTIONS), kd_truth(x, teacher, labels, **OPTIONS).loss)


@dtypes
def test_deterministic(device: str, dtype: torch.dtype) -> None:
    def run() -> tuple[Tensor, ...]:
        student, teacher, labels = batch(device, dtype)
        leaf = student.requires_grad_()
        loss, terms = kd_loss(leaf, teacher, labels, return_terms=True, **OPTIONS)
        return loss, *terms, torch.autograd.grad(loss, leaf)[0], cosine_hidden_loss(leaf, teacher).detach()

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
