"""contrastive_hidden_loss against what CILDA and CoDIR write in PyTorch, in float64 on the selected rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from truth import INTERPRETED, operator_calls, pair

from fusedkd import contrastive_hidden_loss
from fusedkd.reference.layers import info_nce

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def truth(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    negatives: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: str | None = "l2",
    reduction: str = "mean",
    normalizer: Any = None,
    upstream: Any = 1.0,
) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64."""
    leaf = student.detach().double().cpu().requires_grad_()
    on = torch.ones(student.shape[:-1]) if mask is None else mask.cpu()
    w = on.double() if on.is_floating_point() else (on != 0).double()
    x, y = leaf[w != 0], teacher.double().cpu()[w != 0]
    bank = None if negatives is None else negatives.double().cpu()
    if normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        bank = None if bank is None else F.normalize(bank, dim=-1)
    if bank is None:
        losses = info_nce(x, y, torch.arange(len(x)), temperature)
    else:
        scores = torch.cat([(x * y).sum(-1, keepdim=True), x @ bank.T], -1) / temperature
        losses = F.cross_entropy(scores, torch.zeros(len(x), dtype=torch.int64), reduction="none")
    rows = torch.zeros_like(w).masked_scatter(w != 0, losses * w[w != 0])
    count = w.sum() if normalizer is None else normalizer
    loss = rows if reduction == "none" else rows.sum() / (count if reduction == "mean" else 1)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.as_tensor(upstream, dtype=F64).expand_as(loss))
    return loss.detach(), gradient


def check(
    student: Tensor, teacher: Tensor, tolerance: float | None = None, upstream: Any = 1.0, **options: Any
) -> None:
    expected, gradient = truth(student, teacher, upstream=upstream, **options)
    leaf = student.detach().requires_grad_()
    loss = contrastive_hidden_loss(leaf, teacher, **options)
    assert loss.dtype == (F64 if student.dtype == F64 else F32)
    (found,) = torch.autograd.grad(loss, leaf, torch.as_tensor(upstream).to(loss).expand_as(loss))
    assert found.dtype == student.dtype
    if tolerance is None:
        tolerance = {F64: 1e-12, F32: 2e-5, BF16: 2e-2, F16: 4e-3}[student.dtype]
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert (found.double().cpu() - gradient).norm() <= tolerance * gradient.norm()
    assert gradient.norm() > 0


def bank(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(like)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("negatives", [0, 13])
@pytest.mark.parametrize("normalize", ["l2", None])
def test_values_and_gradients(device: str, dtype: torch.dtype, negatives: int, normalize: str | None) -> None:
    student, teacher = pair(2, 5, 24, dtype=dtype, device=device)
    memory = bank(negatives, 24, teacher) if negatives else None
    options: dict[str, Any] = {"negatives": memory, "normalize": normalize, "temperature": 0.2 if normalize else 8.0}
    check(student, teacher, **options)
    check(student, teacher, reduction="none", upstream=torch.linspace(-1, 2, 10).view(2, 5), **options)


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("negatives", [0, 7])
def test_masks(device: str, kind: str, reduction: str, negatives: int) -> None:
    """Rows that are not selected are not read, and are nobody's negatives."""
    student, teacher = pair(3, 4, 16, device=device)
    on = (torch.arange(12, device=device) % 3 != 1).view(3, 4)
    student[0, 1], teacher[1, 0], teacher[0, 1] = torch.nan, torch.inf, torch.nan
    mask = {"bool": on, "int": -2 * on.int(), "float": on * torch.linspace(0.25, 3, 12, device=device).view(3, 4)}[kind]
    memory = bank(negatives, 16, teacher) if negatives else None
    check(student, teacher, mask=mask, reduction=reduction, negatives=memory, temperature=0.3)


@pytest.mark.parametrize("negatives", [0, 7])
def test_normalizer(device: str, negatives: int) -> None:
    student, teacher = pair(6, 16, device=device)
    memory = bank(negatives, 16, teacher) if negatives else None
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    for normalizer in (2.5, torch.tensor(3, device=device)):
        check(student, teacher, mask=mask, negatives=memory, normalizer=normalizer, temperature=0.3, upstream=-0.3)


@pytest.mark.parametrize("negatives", [0, 7])
def test_a_student_that_is_told_apart(device: str, negatives: int) -> None:
    """The loss of rows that agree with their teacher's is e^(l − p): it has digits where l and p have."""
    _, teacher = pair(6, 64, device=device)
    student = teacher + 0.01 * bank(6, 64, teacher)
    memory = bank(negatives, 64, teacher) if negatives else None
    expected, _ = truth(student, teacher, temperature=0.07, negatives=memory, reduction="none")
    found = contrastive_hidden_loss(student, teacher, negatives=memory, reduction="none")
    assert expected.max() < 1e-2
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=1e-7)


def test_no_selected_row(device: str) -> None:
    student, teacher = pair(4, 16, device=device)
    leaf, none = student.requires_grad_(), torch.zeros(4, dtype=torch.bool, device=device)
    for memory in (None, bank(3, 16, teacher)):
        loss = contrastive_hidden_loss(leaf, teacher, mask=none, negatives=memory)
        assert loss == 0
        assert not torch.autograd.grad(loss, leaf)[0].any()


def test_no_row(device: str) -> None:
    student, teacher = (x[:0] for x in pair(4, 16, device=device))
    for memory in (None, bank(3, 16, teacher)):
        for mask in (None, torch.ones(0, dtype=torch.bool, device=device)):
            leaf = student.detach().requires_grad_()
            loss = contrastive_hidden_loss(leaf, teacher, mask=mask, negatives=memory)
            assert loss == 0
            assert torch.autograd.grad(loss, leaf)[0].shape == (0, 16)


@pytest.mark.skipif(INTERPRETED, reason="one row more is a tile more")
def test_scores_exist_a_tile_at_a_time(device: str) -> None:
    """The head of linear_kd_loss is the teacher's rows; no operator is given anything of N × N."""
    student, teacher = pair(300, 8, device=device)
    with operator_calls() as calls:
        contrastive_hidden_loss(student.requires_grad_(), teacher).backward()
    assert [name for name, _ in calls if name.startswith("linear")] == ["linear_kd"]
    given = dict(calls)["linear_kd"]
    assert (given["weight"].shape, given["hidden"].shape) == ((300, 8), (300, 8))
    assert given["wanted"] == [True, False, False]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_one_row_has_nothing_to_be_told_from(device: str, dtype: torch.dtype) -> None:
    """Such as the last batch of an epoch: 0, as the softmax over one candidate says, without a gradient."""
    student, teacher = (x.to(dtype) for x in pair(1, 5, device=device))
    for mask in (None, torch.ones(1, device=device), torch.zeros(1, dtype=torch.bool, device=device)):
        for reduction in ("mean", "none"):
            leaf = student.detach().requires_grad_()
            loss = contrastive_hidden_loss(leaf, teacher, mask=mask, reduction=reduction)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            assert loss.shape == (() if reduction == "mean" else (1,))
            assert not loss.any()
            assert not gradient.any()


Z, V = pair(2, 3, 6)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"teacher": V[..., :5]},
        ValueError,
        r"student and teacher must have the same last dimension, not 6 and 5.*Linear",
    ),
    ({"teacher": V.double()}, TypeError, "teacher must be torch.float32 like the student, not torch.float64"),
    ({"teacher": V[:1]}, ValueError, "teacher must have the student's leading shape"),
    ({"negatives": V}, ValueError, r"negatives must be \(R, 6\)"),
    ({"negatives": V[0, :0]}, ValueError, r"negatives must be \(R, 6\) with R ≥ 1"),
    ({"negatives": V[0, :, :4]}, ValueError, "student and negatives must have the same last dimension, not 6 and 4"),
    ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
    ({"normalize": "layer_norm"}, ValueError, "normalize must be 'l2' or None"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be"),
    ({"reduction": "sum", "normalizer": 2}, ValueError, "normalizer .*reduction='sum'"),
    ({"mask": V[0, 0]}, ValueError, "mask must have"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with operator_calls() as calls, pytest.raises(error, match=message):
        contrastive_hidden_loss(**{"student": Z, "teacher": V, **change})
    assert not calls
