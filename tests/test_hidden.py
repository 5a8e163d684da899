"""hidden_loss by the test rule: every distance of rows normalised in every way."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from test_kd_loss import STRIDED
from torch.nn import functional as F
from truth import DTYPES, INTERPRETED, assert_gradient, assert_value, check_hidden, hidden_truth, operator_calls, pair

from fusedkd import cosine_hidden_loss, hidden_loss
from fusedkd.reference.hidden import hidden_distance

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KINDS = [
    {"distance": d, "normalize": n} for d, n in product(("mse", "smooth_l1", "cosine"), (None, "l2", "layer_norm"))
]
NORMALISED = [kind for kind in KINDS if kind["normalize"] or kind["distance"] == "cosine"]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda x: "-".join(map(str, x.values())))
COSINE: Any = {"distance": "cosine"}
fused = pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds the product of x·y + z")


@kinds
@dtypes
@pytest.mark.parametrize("hidden", [1, 5, 64, 767, 768, pytest.param(4100, marks=pytest.mark.wide)])
def test_sizes(device: str, dtype: torch.dtype, hidden: int, kind: dict[str, Any]) -> None:
    student, teacher = pair(3, 5, hidden, dtype=dtype, device=device)
    if hidden == 1 and kind in NORMALISED:
        student.abs_(), teacher.abs_().neg_()
        check_hidden(student, teacher, reduction="none", vacuous=True, **kind)  # normalised, rows are ±1 or 0
        return
    scale = 16.0 * hidden  # of a loss in float16
    check_hidden(student, teacher, upstream=scale, **kind)
    check_hidden(student, teacher, reduction="none", upstream=torch.linspace(-scale, scale, 15).view(3, 5), **kind)
    if hidden > 1:
        check_hidden(student, teacher, pieces=3, upstream=scale, **kind)


@pytest.mark.wide
@kinds
def test_rows_that_nothing_holds(device: str, kind: dict[str, Any]) -> None:
    student, teacher = pair(2, 9001, dtype=torch.bfloat16, device=device)
    check_hidden(student, teacher, pieces=2, **kind)


@dtypes
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_teacher_of_another_dtype(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = pair(4, 65, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    if teacher_dtype == torch.float64:
        teacher = teacher.float().double()  # what a float32 kernel can see of it
    for kind in KINDS[4:]:
        check_hidden(student, teacher, **kind)


@fused
@kinds
@pytest.mark.parametrize(("noise", "offset"), [(1e-2, 0.0), (1e-3, 0.0), (1e-5, 0.0), (1.0, 1000.0), (1e-2, -1000.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_close_and_far_from_zero(
    device: str, dtype: torch.dtype, noise: float, offset: float, kind: dict[str, Any]
) -> None:
    """A distance that is a difference of sums has no digit left there: ours keeps its relative error."""
    student, teacher = pair(6, 768, dtype=dtype, device=device, noise=noise, offset=offset)
    small = noise < 1e-4 and dtype == torch.float64  # beside what float64 is held to
    truth = check_hidden(student, teacher, reduction="none", vacuous=small, **kind)
    assert truth.loss.value.mean() < 1.2 * noise**2
    check_hidden(student, teacher, vacuous=small, **kind)
    tiny = noise < 1e-4 and kind["normalize"] == "layer_norm"  # beside what 1e-5 makes of variances 9 and 1
    if kind in NORMALISED and not tiny:
        check_hidden(3 * student, teacher, reduction="none", vacuous=small, **kind)


@kinds
def test_close_in_bfloat16(device: str, kind: dict[str, Any]) -> None:
    student, teacher = pair(6, 768, dtype=torch.bfloat16, device=device, noise=1e-2)
    check_hidden(student, teacher, reduction="none", **kind)


def test_equal_and_opposite(device: str) -> None:
    x = pair(3, 64, device=device)[0]
    for kind in KINDS:
        assert hidden_loss(x, x.clone(), reduction="none", **kind).abs().max() <= 1e-12
    torch.testing.assert_close(cosine_hidden_loss(x, -3 * x), torch.tensor(2.0, device=device))


@kinds
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1e6])
def test_scale(device: str, scale: float, kind: dict[str, Any]) -> None:
    """Near ε rows shrink: torch's cosine and layer norm do so too."""
    student, teacher = pair(4, 32, device=device)
    check_hidden(scale * student, teacher, reduction="none", **kind)
    check_hidden(scale * student, scale * teacher, reduction="none", vacuous=scale < 1e-3, **kind)


FAR = [(torch.bfloat16, 1e30), (torch.float32, 1e19), (torch.float32, 1e20), (torch.float32, 3e36)]
FAR += [(torch.float64, 1e155), (torch.float64, 1e200), (torch.float64, 1e306)]


@pytest.mark.parametrize("kind", NORMALISED, ids=lambda x: "-".join(map(str, x.values())))
@pytest.mark.parametrize(("dtype", "scale"), FAR, ids=str)
@pytest.mark.parametrize("hidden", [48, 77])
def test_squares_that_overflow(
    device: str, dtype: torch.dtype, scale: float, hidden: int, kind: dict[str, Any]
) -> None:
    """On either side and on both. The gradient is as small as the student's rows are large."""
    student, teacher = (x.to(dtype) for x in pair(4, hidden, dtype=torch.float64, device=device))
    for large in ((1, scale), (scale, 1), (scale, scale)):
        x, y = large[0] * student, large[1] * teacher
        upstream = torch.tensor(large[0], dtype=torch.float64)
        truth = check_hidden(x, y, reduction="none", upstream=upstream, vacuous=scale > 1e100, **kind)
        assert ((truth.loss.value > 1e-4) & (truth.loss.value < 2)).all()
        check_hidden(x, y, vacuous=scale > 1e100, **kind)  # squares of what is so small are 0
    student[0], teacher[1] = scale * student[0], scale * teacher[1]
    check_hidden(student, teacher, **kind)


def test_mean_of_squares_whose_sum_overflows(device: str) -> None:
    student, teacher = pair(4, 768, device=device)
    for kind in KINDS[0], KINDS[3]:
        check_hidden(5e18 * student, teacher, reduction="none", **kind)


@pytest.mark.parametrize("scale", [1e-25, 1e-38, 1e-44])
def test_squares_that_underflow(device: str, scale: float) -> None:
    """ε is all there is: the distance is 1, and the gradient that of −x·y/√ε‖y‖."""
    student, teacher = pair(4, 48, device=device)
    rows = check_hidden(scale * student, teacher, reduction="none", **COSINE).loss.value
    torch.testing.assert_close(rows, torch.ones(4, dtype=torch.float64))
    check_hidden(scale * student, scale * teacher, reduction="none", vacuous=scale < 1e-30, **COSINE)
    check_hidden(student, scale * teacher, reduction="none", vacuous=True, **COSINE)
    check_hidden(scale * student, 1e30 * teacher, reduction="none", **COSINE)


@kinds
def test_zero_and_constant_rows(device: str, kind: dict[str, Any]) -> None:
    student, teacher = pair(5, 32, device=device)
    student[0], teacher[1] = 0, 0
    student[2] = teacher[2] = 0
    student[3] = 3
    rows = check_hidden(student, teacher, reduction="none", **kind).loss.value
    if kind["distance"] == "cosine":
        torch.testing.assert_close(rows[:3], torch.ones(3, dtype=torch.float64))
    check_hidden(student, teacher, **kind)


def test_a_first_column_far_from_the_mean(device: str) -> None:
    student, teacher = pair(4, 768, device=device)
    student[:, 0], teacher[:2, 0] = 300, -500
    for kind in KINDS[2::3]:
        check_hidden(student, teacher, reduction="none", **kind)


@kinds
@pytest.mark.parametrize("mask", ["bool", "int", "float"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_masks(device: str, mask: str, reduction: str, dtype: torch.dtype, kind: dict[str, Any]) -> None:
    student, teacher = pair(3, 4, 40, dtype=dtype, device=device)
    on = (torch.arange(12, device=device) % 3 != 1).view(3, 4)
    student[0, 1], teacher[1, 0] = torch.nan, torch.inf  # unselected rows are not read
    weights = {"bool": on, "int": -2 * on.int(), "float": on * torch.linspace(0.25, 3, 12, device=device).view(3, 4)}
    check_hidden(student, teacher, weights[mask], reduction=reduction, **kind)


@kinds
def test_no_selected_row(device: str, kind: dict[str, Any]) -> None:
    student, teacher = pair(4, 16, device=device)
    leaf = student.requires_grad_()
    loss = hidden_loss(leaf, teacher, torch.zeros(4, device=device), **kind)
    assert loss == 0
    loss.backward()
    assert leaf.grad.shape == student.shape
    assert not leaf.grad.any()


@kinds
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_shows(device: str, kind: dict[str, Any], bad: float) -> None:
    student, teacher = pair(4, 16, device=device)
    student[1, 3], teacher[2, 15] = bad, bad
    rows = hidden_loss(student, teacher, reduction="none", **kind)
    assert rows.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides(device: str, layout: Any, dtype: torch.dtype) -> None:
    student, teacher = (layout(x) for x in pair(3, 4, 77, dtype=dtype, device=device))
    mask = torch.arange(student.shape[:-1].numel(), device=device).view(student.shape[:-1]) % 5
    for kind in KINDS[2], KINDS[6]:
        check_hidden(student, teacher, mask, **kind)
        check_hidden(student.contiguous(), teacher, mask, **kind)
        check_hidden(student, teacher.contiguous(), reduction="none", **kind)


def test_normalizer_makes_accumulation_exact(device: str) -> None:
    student, teacher = pair(8, 24, device=device)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], device=device)
    for kind in KINDS[4:]:
        whole = hidden_truth(student, teacher, mask, **kind)
        leaf, losses = student.clone().requires_grad_(), []
        for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
            loss = hidden_loss(leaf[rows], teacher[rows], mask[rows], normalizer=mask.sum(), **kind)
            loss.backward()
            losses.append(loss.detach())
        assert_value(torch.stack(losses).sum(), whole.loss)
        assert_gradient(leaf.grad, whole)
        check_hidden(student, teacher, mask, normalizer=3.5, **kind)


@pytest.mark.parametrize("upstream", [1.0, -0.37, 1024.0])
@kinds
@dtypes
def test_upstream(device: str, dtype: torch.dtype, upstream: float, kind: dict[str, Any]) -> None:
    student, teacher = pair(5, 33, dtype=dtype, device=device)
    check_hidden(student, teacher, upstream=upstream, **kind)


def test_backward_twice_and_double_backward(device: str) -> None:
    student, teacher = pair(5, 33, device=device)
    leaf = student.requires_grad_()
    loss = hidden_loss(leaf, teacher, normalize="layer_norm")
    first, second = (torch.autograd.grad(k * loss, leaf, retain_graph=True)[0] for k in (1, 3))
    torch.testing.assert_close(second, 3 * first)
    assert first.norm() > 1e-3
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_no_gradient_unless_asked(device: str) -> None:
    student, teacher = pair(5, 33, device=device)
    with operator_calls() as calls:
        hidden_loss(student, teacher)
        with torch.no_grad():
            hidden_loss(student.clone().requires_grad_(), teacher)
    assert [arguments["gradient"] for name, arguments in calls if name == "hidden_loss"] == [[], []]


# -------------------------------------------------- PyTorch's expressions, in float64


def expression(x: torch.Tensor, y: torch.Tensor, kind: dict[str, Any]) -> torch.Tensor:
    """As the published codes write it, ``(N,)``."""
    if kind["normalize"] == "l2":
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    if kind["normalize"] == "layer_norm":
        x, y = F.layer_norm(x, x.shape[-1:]), F.layer_norm(y, y.shape[-1:])
    if kind["distance"] == "cosine":
        one = torch.ones(len(x), device=x.device)
        return F.cosine_embedding_loss(x, y, one, reduction="none")
    loss = F.mse_loss if kind["distance"] == "mse" else F.smooth_l1_loss
    return loss(x, y, reduction="none").mean(-1)


@kinds
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_torch_on_the_selected_rows(device: str, masked: bool, reduction: str, kind: dict[str, Any]) -> None:
    student, teacher = pair(4, 6, 48, dtype=torch.float64, device=device)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)).to(device) > 0.4 if masked else None
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    x, y = (t.flatten(0, 1) if mask is None else t[mask] for t in (theirs, teacher))
    rows = expression(x, y, kind)
    expected = rows.mean() if reduction == "mean" else rows.sum()
    actual = hidden_loss(ours, teacher, mask, reduction=reduction, **kind)
    (3 * expected).backward()
    (3 * actual).backward()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    assert theirs.grad.norm() > 1e-4


def test_pkd_and_ckd_are_the_cosine(device: str) -> None:
    """MSE of L2-normalised rows, a mean over elements, is (2 − 2·cos)/H; CKD's is the sum over elements, H times it."""
    student, teacher = pair(9, 48, dtype=torch.float64, device=device)
    cosine = cosine_hidden_loss(student, teacher)
    torch.testing.assert_close(hidden_loss(student, teacher, normalize="l2"), 2 * cosine / 48)
    ckd = (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum()
    torch.testing.assert_close(48 * hidden_loss(student, teacher, normalize="l2", reduction="sum"), ckd)


# -------------------------------------------------- layers, pieces, sequences, the teacher's gradient


def check_against(loss: Any, expression: Any, *leaves: torch.Tensor) -> None:
    """Two functions of the same float64 tensors: values and gradients."""
    given = [[x.clone().requires_grad_() for x in leaves] for _ in range(2)]
    actual, expected = loss(*given[0]), expression(*given[1])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    weights = torch.linspace(0.5, 2, actual.numel(), dtype=torch.float64, device=actual.device).view(actual.shape)
    found, truth = (torch.autograd.grad((weights * x).sum(), g) for x, g in ((actual, given[0]), (expected, given[1])))
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13)
        assert theirs.norm() > 1e-5


@kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layers(device: str, reduction: str, kind: dict[str, Any]) -> None:
    students = [*pair(2, 5, 24, dtype=torch.float64, device=device), *pair(2, 5, 16, dtype=torch.float64, seed=3)]
    a, b, c, d = (x.to(device) for x in students)
    mask = torch.arange(10, device=device).view(2, 5) % 3
    weights = [2.0, torch.tensor(0.25, device=device)]
    options = {"reduction": reduction, **kind}
    check_against(
        lambda x, y: hidden_loss([x, y], [b, [d[..., :5], d[..., 5:]]], mask, layer_weights=weights, **options),
        lambda x, y: 2 * hidden_loss(x, b, mask, **options) + 0.25 * hidden_loss(y, d, mask, **options),
        a,
        c,
    )


@kinds
@pytest.mark.parametrize("masked", [None, torch.int64, torch.float64], ids=str)
def test_pooled_sequences(device: str, masked: torch.dtype | None, kind: dict[str, Any]) -> None:
    """RAIL-KD's means of tokens; a sequence without one is left out."""
    student, teacher = pair(4, 5, 24, dtype=torch.float64, device=device)
    mask = None if masked is None else (torch.arange(20, device=device).view(4, 5) % 3).to(masked)
    if mask is not None:
        mask[2] = 0
        student[2, 3] = teacher[0, 0] = torch.nan  # of share 0
    w = torch.ones(4, 5, device=device) if mask is None else (mask if masked == torch.float64 else mask != 0)
    on = w.sum(-1) > 0

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (x.nan_to_num() * w.double().unsqueeze(-1)).sum(1)[on] / w.double().sum(-1)[on].unsqueeze(-1)

    check_against(
        lambda x: hidden_loss(x, teacher, mask, pool="mean", **kind),
        lambda x: hidden_distance(mean(x), mean(teacher), **kind).mean(),
        student,
    )


def test_means_over_tokens_under_autocast(device: str) -> None:
    """As outside: bfloat16 would round them, and lose what is left between two that are close."""
    student, teacher = pair(4, 5, 24, device=device)
    student = teacher + 1e-3 * student
    outside = hidden_loss(student, teacher, pool="mean")
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(hidden_loss(student, teacher, pool="mean"), outside)


@kinds
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_teachers_gradient(device: str, reduction: str, kind: dict[str, Any]) -> None:
    student, teacher = pair(2, 5, 24, dtype=torch.float64, device=device)
    mask = torch.arange(10, device=device).view(2, 5) % 3
    options: dict[str, Any] = {"reduction": reduction, "teacher_gradient": True, **kind}

    def truth(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        rows = expression(x.flatten(0, 1), torch.cat([y, z], -1).flatten(0, 1), kind) * (mask != 0).flatten()
        return rows.view(2, 5) if reduction == "none" else rows.sum() / (mask != 0).sum()

    check_against(
        lambda x, y, z: hidden_loss(x, [y, z], mask, **options), truth, student, teacher[..., :7], teacher[..., 7:]
    )


def test_a_teachers_gradient_is_asked_for(device: str) -> None:
    student, teacher = pair(5, 33, device=device)
    teacher.requires_grad_()
    with pytest.warns(UserWarning, match="teacher requires a gradient"):
        hidden_loss(student.requires_grad_(), teacher)
    with pytest.raises(ValueError, match="swapped"):
        hidden_loss(student.detach(), teacher)
    hidden_loss(student.detach(), teacher, teacher_gradient=True).backward()
    assert teacher.grad.norm() > 1e-3
    with pytest.warns(UserWarning, match=r"teacher\[0\] requires a gradient") as told:
        hidden_loss([student.detach(), student], [teacher, [teacher]])  # embeddings that are frozen, and a layer
    assert len(told) == 1
