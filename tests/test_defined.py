"""Divergences that a user defines: in both losses they follow every rule, without a kernel of their own."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import linear_cases
import pytest
import torch
from families import top_k
from torch import Tensor
from truth import check_kd, kd_truth, pair, targets

import fusedkd
from fusedkd import Divergence, kd_loss, linear_kd_loss
from fusedkd.backends import defined


class Hellinger(Divergence):
    """½·Σ(√p − √q)²."""

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return 0.5 * ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)


class OwnKL(Divergence):
    """Forward KL, which has a kernel to compare with."""

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)


class OwnReverseKL(Divergence):
    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)


class AtLabel(Divergence):
    """−log q_y: cross-entropy at a temperature."""

    needs_labels = True

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


KINDS = pytest.mark.parametrize(("own", "kernel"), [(OwnKL(), "forward_kl"), (OwnReverseKL(), "reverse_kl")])


def compare(own: Divergence, kernel: str, student: Tensor, teacher: Any, labels: Tensor | None, **options: Any) -> None:
    """Value and gradient of the two by what the kernel is held to."""
    truth = kd_truth(student, teacher, labels, divergence=kernel, **options)
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf.mul(1), teacher, labels, divergence=own, inplace=inplace, **options)
        torch.testing.assert_close(loss.double().cpu(), truth.loss.value.to(torch.float64), rtol=1e-5, atol=1e-8)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        expected = truth.gradient.to(gradient.dtype)
        torch.testing.assert_close(
            gradient.cpu(), expected, rtol=1e-2 if gradient.dtype.itemsize == 2 else 1e-5, atol=1e-8
        )
        assert not expected.isfinite().all() or expected.any()


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_as_a_kernel_does(device: str, own: Divergence, kernel: str, dtype: torch.dtype, temperature: float) -> None:
    student, teacher = pair(3, 5, 33, device=device, dtype=dtype)
    labels = targets(3, 5, classes=33, device=device)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)).to(device)
    for options in (
        {},
        {"ce_weight": 0.3, "label_smoothing": 0.1, "kd_mask": mask > 0.3},
        {"kd_mask": mask, "reduction": "sum", "scale_by_t2": False},
        {"reduction": "none", "teacher_temperature": 1.5},
        {"logit_softcap": 5.0, "logit_scale": 0.7, "kd_normalizer": 7.0},
    ):
        compare(own, kernel, student, teacher, labels, temperature=temperature, **options)


@KINDS
def test_masked_columns(device: str, own: Divergence, kernel: str) -> None:
    """On one side, on both, and rows that are masked throughout; what is in a row without a term does not show."""
    student, teacher = pair(7, 33, device=device)
    student[0, 3] = teacher[1, 4] = -math.inf
    student[2, 5] = teacher[2, 5] = -math.inf
    student[3], teacher[4] = -math.inf, -math.inf
    student[5, 0] = teacher[5, 1] = math.nan
    labels = torch.tensor([1, 2, 3, 4, 5, -100, 6], device=device)
    truth = kd_truth(student, teacher, labels, divergence=kernel, reduction="none")
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, labels, divergence=own, reduction="none")
    torch.testing.assert_close(rows.double().cpu(), truth.loss.value.double(), rtol=1e-5, atol=1e-8)
    assert rows.isinf().any()
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    infinite = rows.isinf().cpu()
    assert not gradient[infinite].any()
    torch.testing.assert_close(gradient.double().cpu()[~infinite], truth.gradient[~infinite], rtol=1e-5, atol=1e-8)
    student[6, 1] = math.nan
    assert kd_loss(student, teacher, labels, divergence=own).isnan()


def test_padded_vocabularies(device: str) -> None:
    student, teacher = pair(5, 40, device=device)[0], pair(5, 33, device=device, seed=3)[1]
    labels = targets(5, classes=40, device=device)
    compare(OwnKL(), "forward_kl", student, teacher, labels, ce_weight=0.5, vocab_mismatch="truncate")


def test_labels(device: str) -> None:
    """Cross-entropy by another name, and rows whose label is ignored."""
    student, teacher = pair(6, 33, device=device)
    labels = targets(6, classes=33, device=device)
    labels[0] = -100
    leaf = student.clone().requires_grad_()
    found = kd_loss(leaf, teacher, labels, divergence=AtLabel())
    expected = torch.nn.functional.cross_entropy(leaf, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (found, expected)))
    with pytest.raises(ValueError, match="needs labels, which are None"):
        kd_loss(student, teacher, divergence=AtLabel())


def test_a_term_of_weight_0_reads_no_labels(device: str) -> None:
    """Alone, and of the first of two teachers; labels or none."""
    student, teacher = pair(6, 33, device=device)
    labels = targets(6, classes=33, device=device)
    for given in (labels, None):
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, teacher, given, divergence=AtLabel(), kd_weight=0)
        loss.backward()
        assert loss == 0
        assert not leaf.grad.any()
    both = kd_loss(student, [teacher, teacher], labels, divergence=AtLabel(), teacher_weights=[0, 1])
    torch.testing.assert_close(both, torch.nn.functional.cross_entropy(student, labels))


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_hidden_states(own: Divergence, kernel: str, dtype: torch.dtype, reduction: str, device: str) -> None:
    p = linear_cases.problem(5, dtype=dtype, device=device)
    found = []
    for divergence in (own, kernel):
        leaves = p.leaves()
        loss = leaves.loss(divergence=divergence, ce_weight=0.5, reduction=reduction, temperature=2.0)
        found.append((loss, leaves.gradients(loss, torch.ones_like(loss))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-7)
    for name, gradient in found[0][1].items():
        expected = found[1][1][name]
        assert expected.any()
        torch.testing.assert_close(gradient, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_one_tile_at_a_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are the same in any tile, and the definition never sees more than TILE logits."""
    student, teacher = pair(2, 9, 33, device=device)
    seen = []

    class Watched(Hellinger):
        def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
            seen.append(len(log_p))
            return super().definition(log_p, log_q, labels)

    whole = kd_loss(student[:, :-1], teacher[:, :-1], divergence=Hellinger(), reduction="none")
    monkeypatch.setattr(defined, "TILE", 3 * 33)
    torch.testing.assert_close(kd_loss(student[:, :-1], teacher[:, :-1], divergence=Watched(), reduction="none"), whole)
    assert max(seen) == 3
    expected = 0.5 * (student.softmax(-1).sqrt() - teacher.softmax(-1).sqrt()).square().sum(-1)[:, :-1]
    torch.testing.assert_close(whole, expected)


def test_a_list_of_teachers(device: str) -> None:
    student, teacher = pair(4, 33, device=device)
    other = pair(4, 33, device=device, seed=5)[1]
    options: dict[str, Any] = {"ce_weight": 0.5, "labels": targets(4, classes=33, device=device)}
    found = [kd_loss(student, [teacher, other], divergence=d, **options) for d in (OwnKL(), "forward_kl")]
    torch.testing.assert_close(*found)


def test_compiled(device: str) -> None:
    student, teacher = pair(4, 33, device=device)
    own = Hellinger()
    leaf = student.clone().requires_grad_()
    loss = torch.compile(lambda z: kd_loss(z, teacher, divergence=own))(leaf)
    expected = kd_loss(leaf, teacher, divergence=own)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (loss, expected)))


def test_objects_come_and_go(device: str) -> None:
    """A divergence made for one call is alive until its backward, and forgotten afterwards; a copy is another one."""
    student, teacher = pair(4, 33, device=device)
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, divergence=Hellinger(), reduction="none")
    gc.collect()
    rows.sum().backward()
    before = len(defined._defined)
    del rows
    gc.collect()
    assert len(defined._defined) < before or before == 0
    own = Hellinger()
    kd_loss(student, teacher, divergence=own)
    assert defined.number(copy.deepcopy(own)) != defined.number(own)


def test_mistakes(device: str) -> None:
    student, teacher = pair(4, 33, device=device)

    class Scalar(Divergence):
        def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
            return log_q.sum()

    with pytest.raises(ValueError, match=r"definition of Scalar must return one value per row, shape \(4,\), not \(\)"):
        kd_loss(student, teacher, divergence=Scalar())
    topk = fusedkd.TeacherTopK(torch.zeros(4, 1, dtype=torch.int64, device=device), torch.zeros(4, 1, device=device))
    with pytest.raises(
        ValueError, match="TeacherTopK cannot serve Hellinger: it needs the teacher's logits, unless its class"
    ):
        kd_loss(student, topk, divergence=Hellinger())


@pytest.mark.parametrize("weight", [1e-4, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_z_loss(device: str, dtype: torch.dtype, weight: float) -> None:
    """As PyTorch's autograd has it, beside KD and alone, with label smoothing, and from hidden states."""
    student, teacher = pair(6, 33, device=device, dtype=dtype)
    labels = targets(6, classes=33, device=device)
    labels[1] = -100
    for options in (
        {"kd_weight": 0.0},
        {"kd_weight": 0.5, "temperature": 2.0, "label_smoothing": 0.1},
        {"kd_weight": 0.5, "temperature": 3.0, "divergence": "reverse_kl", "reduction": "none"},
        {"kd_weight": 0.5, "logit_softcap": 4.0},
    ):
        check_kd(student, teacher, labels, ce_weight=0.7, z_loss_weight=weight, **options)
        if "divergence" not in options and "logit_softcap" not in options:
            listed = top_k(teacher.double(), 5)
            check_kd(student, listed, labels, ce_weight=0.7, z_loss_weight=weight, **options)
    leaf = student.double().requires_grad_()
    found = kd_loss(leaf, teacher, labels, kd_weight=0.0, ce_weight=1.0, z_loss_weight=weight)
    lse = leaf.logsumexp(-1)[labels != -100]
    expected = torch.nn.functional.cross_entropy(leaf, labels) + weight * lse.square().mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (found, expected)))


def test_z_loss_from_hidden_states(device: str) -> None:
    p = linear_cases.problem(5, dtype=torch.float32, device=device)
    linear_cases.check_linear(p, ce_weight=0.7, z_loss_weight=0.1)
    assert linear_kd_loss(p.hidden, p.weight, p.teacher, p.labels, ce_weight=1.0, z_loss_weight=0.1) > linear_kd_loss(
        p.hidden, p.weight, p.teacher, p.labels, ce_weight=1.0
    )
