"""`inplace`: the gradient lies where the student's logits were, and never a wrong one in silence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from truth import assert_gradient, assert_value, kd_truth, operator_calls, pair, targets

from fusedkd import TeacherLogits, TeacherTopK, kd_loss
from fusedkd.divergences import WITH_KERNEL

OPTIONS = {"kd_weight": 0.5, "ce_weight": 0.7, "temperature": 2.0}
inplace_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)


def batch(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return *pair(3, 4, 70, dtype=dtype, device=device), targets(3, 4, classes=70, device=device)


@inplace_dtypes
def test_inplace(device: str, dtype: torch.dtype) -> None:
    """The gradient lies where the logits were, and is the one of inplace=False to the bit."""
    values, teacher, labels = batch(device, dtype)
    leaf = values.requires_grad_()
    student = leaf * 1
    truth = kd_truth(values, teacher, labels, **OPTIONS)
    handed: list[int] = []
    student.register_hook(lambda gradient: handed.append(gradient.data_ptr()))
    loss, terms = kd_loss(student, teacher, labels, inplace=True, return_terms=True, **OPTIONS)
    assert_value(loss, truth.loss)
    assert_value(terms.kd, truth.kd)
    assert_gradient(student.detach(), truth)
    loss.backward()
    assert handed == [student.data_ptr()]
    assert_gradient(leaf.grad, truth)
    (expected,) = torch.autograd.grad(kd_loss(leaf, teacher, labels, **OPTIONS), leaf)
    assert torch.equal(leaf.grad, expected)


@inplace_dtypes
def test_inplace_with_an_upstream_gradient(device: str, dtype: torch.dtype) -> None:
    values, teacher, labels = batch(device, dtype)
    leaf = values.requires_grad_()
    (one,) = torch.autograd.grad(kd_loss(leaf, teacher, labels, **OPTIONS), leaf)
    loss = kd_loss(leaf * 1, teacher, labels, inplace=True, **OPTIONS)
    (0.3 * loss).backward()
    assert torch.equal(leaf.grad, (one.to(loss.dtype) * 0.3).to(dtype))  # the documented second rounding, no third


def test_inplace_after_a_matrix_product(device: str) -> None:
    """As a model uses it: the product's backward needs its operands, not its result."""
    hidden = pair(3, 4, 16, device=device)[0].requires_grad_()
    weight = (0.3 * pair(70, 16, device=device, seed=4)[0]).requires_grad_()
    _, teacher, labels = batch(device)
    gradients = []
    for inplace in (False, True):
        loss = kd_loss(hidden @ weight.T, teacher, labels, inplace=inplace, **OPTIONS)
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gradients[0][1].norm() > 1e-3


def test_inplace_refuses_what_it_cannot_overwrite(device: str) -> None:
    values, teacher, labels = batch(device)
    leaf = values.requires_grad_()
    before = leaf.detach().clone()
    for student, reason in [(leaf, "leaf"), ((leaf * 1)[:, :], "view"), ((leaf * 1).view(leaf.shape), "view")]:
        with pytest.raises(ValueError, match=f"inplace=True.*{reason}"):
            kd_loss(student, teacher, labels, inplace=True, **OPTIONS)
    scattered = leaf.transpose(0, 1) * 1
    with pytest.raises(ValueError, match="contiguous"):
        kd_loss(scattered, teacher.transpose(0, 1), labels.T, inplace=True, **OPTIONS)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize(
    "case", ["one layer's", "flipped", "shifted", "shared by chance", "narrow", "logprobs", "labels"]
)
def test_inplace_refuses_memory_that_a_kernel_reads(device: str, case: str) -> None:
    """Early exits of one tensor: the last layer's rows would be overwritten while they teach the others."""
    leaf, (_, teacher, labels) = batch(device)[0].requires_grad_(), batch(device)
    student = leaf * 1
    seen = student.detach()
    form, name = {
        "one layer's": (seen[-1:].expand_as(seen), "teacher"),
        "flipped": (seen.as_strided((3, 4, 70), (70, 210, 1)), "teacher"),
        "shifted": (seen.as_strided((3, 4, 69), (280, 70, 1), 1), "teacher"),
        "shared by chance": (seen.view(torch.int32).view(torch.float32)[:1].expand_as(seen), "teacher"),
        "narrow": (TeacherLogits(seen.view(torch.bfloat16)[..., :70]), "teacher"),
        "logprobs": (TeacherTopK(torch.arange(70, device=device).expand(3, 4, 70), seen), "teacher"),
        "labels": (teacher, "labels"),
    }[case]
    if case == "labels":
        labels = seen.view(torch.int64).flatten()[:12].view(3, 4).zero_()
    elif case == "logprobs":
        seen.copy_(seen.log_softmax(-1))
    before = student.detach().clone()
    with operator_calls() as calls, pytest.raises(ValueError, match=rf"inplace=True would overwrite the {name}.*clone"):
        kd_loss(student, form, labels, inplace=True, **OPTIONS)
    assert not calls
    assert torch.equal(student, before)


def test_inplace_with_options_in_the_memory_that_it_overwrites(device: str) -> None:
    """Weights and real options are copied before a kernel starts."""
    values, teacher, labels = batch(device)
    leaf = values.abs().add(0.5).requires_grad_()

    def loss(student: Tensor, **options: bool) -> Tensor:
        seen = student.detach().flatten()
        return kd_loss(
            student,
            teacher,
            labels,
            kd_mask=seen[:12].view(3, 4),
            temperature=seen[13],
            kd_normalizer=seen[14],
            **options,
        )

    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    loss(leaf * 1, inplace=True).backward()
    assert torch.equal(leaf.grad, expected)
    assert expected.any()


@pytest.mark.parametrize("divergence", WITH_KERNEL)
@inplace_dtypes
def test_inplace_with_its_own_logits_as_teacher(device: str, dtype: torch.dtype, divergence: str) -> None:
    """Row by row the same memory, sharpened or cut: each column is read before it is overwritten."""
    values, _, labels = batch(device, dtype)
    leaf = values.requires_grad_()
    softmax = {} if divergence == "logit_mse" else {"temperature": 2.0, "teacher_temperature": 0.7}
    options = {"ce_weight": 0.7, "divergence": divergence, **softmax}
    for columns, scale in ((70, 1.0), (65, 1.5)):
        apart = TeacherLogits(values.detach()[..., :columns].clone(), scale=scale)
        (expected,) = torch.autograd.grad(kd_loss(leaf, apart, labels, **options), leaf)
        student = leaf * 1
        own = TeacherLogits(student.detach()[..., :columns], scale=scale)
        kd_loss(student, own, labels, inplace=True, **options).backward()
        assert torch.equal(leaf.grad, expected)
        assert expected.any()
        leaf.grad = None


@pytest.mark.parametrize("use", ["used after", "view used after", "value saved before"])
def test_inplace_never_gives_a_wrong_gradient_in_silence(device: str, use: str) -> None:
    values, teacher, labels = batch(device)
    student = values.requires_grad_() * 1
    view, squares = student[:, 1:], student.square()
    loss = kd_loss(student, teacher, labels, inplace=True, **OPTIONS)
    other = {"used after": student, "view used after": view, "value saved before": squares}[use]
    with pytest.raises(RuntimeError, match="inplace"):
        (loss + other.sum()).backward()


def test_inplace_beside_a_use_that_needs_no_values(device: str) -> None:
    """A sum taken before: both gradients arrive."""
    values, teacher, labels = batch(device)
    leaf = values.clone().requires_grad_()
    student = leaf * 1
    total = student.sum()
    (kd_loss(student, teacher, labels, inplace=True, **OPTIONS) + total).backward()
    expected = kd_truth(values, teacher, labels, **OPTIONS).gradient + 1
    torch.testing.assert_close(leaf.grad.double().cpu(), expected, rtol=1e-6, atol=1e-7)


def test_inplace_backward_twice_raises(device: str) -> None:
    values, teacher, labels = batch(device)
    loss = kd_loss(values.requires_grad_() * 1, teacher, labels, inplace=True, **OPTIONS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def test_inplace_is_ignored_where_nothing_may_be_overwritten(device: str) -> None:
    values, teacher, labels = batch(device)
    leaf = values.clone().requires_grad_()
    with torch.no_grad():
        kd_loss(leaf, teacher, labels, inplace=True, **OPTIONS)
    assert torch.equal(leaf, values)
    plain = values.clone()
    kd_loss(plain, teacher, labels, inplace=True, **OPTIONS)
    assert torch.equal(plain, values)
    cases = [(torch.float16, teacher, "mean"), (torch.float32, teacher, "none"), (torch.float32, [teacher] * 2, "mean")]
    for dtype, form, reduction in cases:
        student = leaf.to(dtype) * 1
        kd_loss(student, form, labels, inplace=True, reduction=reduction, **OPTIONS).sum().backward()
        assert torch.equal(student, values.to(dtype))


def test_inplace_of_divergences_that_one_kernel_sums_up(device: str) -> None:
    """It is ignored of others."""
    values, teacher, labels = batch(device)
    leaf, kl = values.clone().requires_grad_(), (1.0, "forward_kl")
    for divergence, written in (([kl, (0.5, "jsd")], True), ([kl, (0.5, "alpha_beta")], False)):
        options = {"divergence": divergence, **OPTIONS}
        student = leaf * 1
        (gradient,) = torch.autograd.grad(kd_loss(student, teacher, labels, inplace=True, **options), leaf)
        (expected,) = torch.autograd.grad(kd_loss(leaf, teacher, labels, **options), leaf)
        assert torch.equal(gradient, expected)
        assert torch.equal(student, expected if written else values)
