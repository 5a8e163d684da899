"""cosine_hidden_loss by the test rule, and against torch.nn.functional.cosine_embedding_loss on the selected rows."""

from __future__ import annotations

import pytest
import torch
from test_kd_loss import STRIDED
from torch.nn import functional as F
from truth import DTYPES, assert_gradient, assert_value, check_cosine, cosine_truth, operator_calls, pair

from fusedkd import cosine_hidden_loss

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("hidden", [1, 5, 64, 767, 768, 4097])
def test_sizes(device: str, dtype: torch.dtype, hidden: int) -> None:
    student, teacher = pair(3, 5, hidden, dtype=dtype, device=device)
    if hidden == 1:
        student.abs_(), teacher.abs_().neg_()
        check_cosine(student, teacher, reduction="none", vacuous=True)  # 1 − cos is 2, its gradient 0
        return
    check_cosine(student, teacher)
    check_cosine(student, teacher, reduction="none", upstream=torch.linspace(-2, 2, 15).view(3, 5))


@dtypes
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_teacher_of_another_dtype(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = pair(4, 65, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    if teacher_dtype == torch.float64:
        teacher = teacher.float().double()  # what a float32 kernel can see of it
    check_cosine(student, teacher)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_torch_on_the_selected_rows(device: str, masked: bool, reduction: str) -> None:
    student, teacher = pair(4, 6, 48, dtype=torch.float64, device=device)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)).to(device) > 0.4 if masked else None
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    x, y = (t.flatten(0, 1) if mask is None else t[mask] for t in (theirs, teacher))
    expected = F.cosine_embedding_loss(x, y, torch.ones(len(x), device=device), reduction=reduction)
    actual = cosine_hidden_loss(ours, teacher, mask, reduction=reduction)
    (3 * expected).backward()
    (3 * actual).backward()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    assert theirs.grad.norm() > 0.01


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_student_close_to_its_teacher(device: str, dtype: torch.dtype, noise: float) -> None:
    """1 − cos computed as such has no digit left at noise 1e-4: ours keeps its relative error, and its gradient."""
    student, teacher = pair(6, 768, dtype=dtype, device=device, noise=noise)
    truth = check_cosine(student, teacher, reduction="none")
    assert truth.loss.value.mean() < noise**2
    check_cosine(student, teacher)


def test_close_in_bfloat16(device: str) -> None:
    student, teacher = pair(6, 768, dtype=torch.bfloat16, device=device, noise=1e-2)
    check_cosine(student, teacher, reduction="none")


def test_equal_and_opposite(device: str) -> None:
    x = pair(3, 64, device=device)[0]
    assert cosine_hidden_loss(x, x.clone(), reduction="none").abs().max() <= 1e-12
    torch.testing.assert_close(cosine_hidden_loss(x, -3 * x), torch.tensor(2.0, device=device))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1e6])
def test_scale(device: str, scale: float) -> None:
    """ε = 1e-12 beside Σx²: near it vectors shrink towards distance 1, as torch's do."""
    student, teacher = pair(4, 32, device=device)
    check_cosine(scale * student, teacher, reduction="none")
    check_cosine(scale * student, scale * teacher, reduction="none")


FAR = [(torch.bfloat16, 1e30), (torch.float32, 1e19), (torch.float32, 1e20), (torch.float32, 3e36)]
FAR += [(torch.float64, 1e155), (torch.float64, 1e200), (torch.float64, 1e306)]


@pytest.mark.parametrize(("dtype", "scale"), FAR, ids=str)
@pytest.mark.parametrize("hidden", [48, 77, 4097])
def test_squares_that_overflow(device: str, dtype: torch.dtype, scale: float, hidden: int) -> None:
    """On either side and on both. The gradient is as small as the student's rows are large."""
    student, teacher = (x.to(dtype) for x in pair(4, hidden, dtype=torch.float64, device=device))
    for large in ((1, scale), (scale, 1), (scale, scale)):
        x, y = large[0] * student, large[1] * teacher
        truth = check_cosine(x, y, reduction="none", upstream=torch.tensor(large[0], dtype=torch.float64))
        assert ((truth.loss.value > 0.01) & (truth.loss.value < 1)).all()
        check_cosine(x, y, vacuous=scale > 1e100)  # squares of what is so small are 0
    student[0], teacher[1] = scale * student[0], scale * teacher[1]
    check_cosine(student, teacher)


@pytest.mark.parametrize("scale", [1e-25, 1e-38, 1e-44])
def test_squares_that_underflow(device: str, scale: float) -> None:
    """ε is all there is: the distance is 1, and the gradient that of −x·y/√ε‖y‖."""
    student, teacher = pair(4, 48, device=device)
    rows = check_cosine(scale * student, teacher, reduction="none").loss.value
    torch.testing.assert_close(rows, torch.ones(4, dtype=torch.float64))
    check_cosine(scale * student, scale * teacher, reduction="none", vacuous=scale < 1e-30)
    check_cosine(student, scale * teacher, reduction="none", vacuous=True)
    check_cosine(scale * student, 1e30 * teacher, reduction="none")


def test_zero_vectors(device: str) -> None:
    student, teacher = pair(4, 32, device=device)
    student[0], teacher[1] = 0, 0
    student[2] = teacher[2] = 0
    rows = check_cosine(student, teacher, reduction="none").loss.value
    torch.testing.assert_close(rows[:3], torch.ones(3, dtype=torch.float64))
    check_cosine(student, teacher)


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_masks(device: str, kind: str, reduction: str, dtype: torch.dtype) -> None:
    student, teacher = pair(3, 4, 40, dtype=dtype, device=device)
    on = (torch.arange(12, device=device) % 3 != 1).view(3, 4)
    student[0, 1], teacher[1, 0] = torch.nan, torch.inf  # unselected rows are not read
    mask = {"bool": on, "int": -2 * on.int(), "float": on * torch.linspace(0.25, 3, 12, device=device).view(3, 4)}[kind]
    check_cosine(student, teacher, mask, reduction=reduction)


def test_no_selected_row(device: str) -> None:
    student, teacher = pair(4, 16, device=device)
    leaf = student.requires_grad_()
    loss = cosine_hidden_loss(leaf, teacher, torch.zeros(4, device=device))
    assert loss == 0
    loss.backward()
    assert leaf.grad.shape == student.shape
    assert not leaf.grad.any()


def test_not_a_number_shows(device: str) -> None:
    student, teacher = pair(4, 16, device=device)
    student[1, 3], teacher[2, 15] = torch.nan, torch.nan
    assert cosine_hidden_loss(student, teacher, reduction="none").isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides(device: str, layout, dtype: torch.dtype) -> None:
    student, teacher = (layout(x) for x in pair(3, 4, 77, dtype=dtype, device=device))
    mask = torch.arange(student.shape[:-1].numel(), device=device).view(student.shape[:-1]) % 5
    check_cosine(student, teacher, mask)
    check_cosine(student.contiguous(), teacher, mask)
    check_cosine(student, teacher.contiguous(), reduction="none")


def test_normalizer_makes_accumulation_exact(device: str) -> None:
    student, teacher = pair(8, 24, device=device)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], device=device)
    whole = cosine_truth(student, teacher, mask)
    leaf, losses = student.clone().requires_grad_(), []
    for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
        loss = cosine_hidden_loss(leaf[rows], teacher[rows], mask[rows], normalizer=mask.sum())
        loss.backward()
        losses.append(loss.detach())
    assert_value(torch.stack(losses).sum(), whole.loss)
    assert_gradient(leaf.grad, whole)
    check_cosine(student, teacher, mask, normalizer=3.5)


@pytest.mark.parametrize("upstream", [1.0, -0.37, 1024.0])
@dtypes
def test_upstream(device: str, dtype: torch.dtype, upstream: float) -> None:
    student, teacher = pair(5, 33, dtype=dtype, device=device)
    check_cosine(student, teacher, upstream=upstream)


def test_backward_twice_and_double_backward(device: str) -> None:
    student, teacher = pair(5, 33, device=device)
    leaf = student.requires_grad_()
    loss = cosine_hidden_loss(leaf, teacher)
    first, second = (torch.autograd.grad(k * loss, leaf, retain_graph=True)[0] for k in (1, 3))
    torch.testing.assert_close(second, 3 * first)
    assert first.norm() > 1e-3
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_no_gradient_unless_asked(device: str) -> None:
    student, teacher = pair(5, 33, device=device)
    with operator_calls() as calls:
        cosine_hidden_loss(student, teacher)
        with torch.no_grad():
            cosine_hidden_loss(student.clone().requires_grad_(), teacher)
    assert [(name, arguments["gradient"]) for name, arguments in calls] == [("cosine_loss", None)] * 2
