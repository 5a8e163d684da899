"""layer_attention_loss and pairwise_layer_mse by the test rule, and against what the papers' codes write in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_truth import attention_truth, check_attention, check_distances, some_layers, table_of
from test_kd_loss import STRIDED
from torch import Tensor
from torch.nn import functional as F
from truth import DTYPES, EMULATED, INTERPRETED, assert_gradient, assert_value, operator_calls

from fusedkd import layer_attention_loss, layer_maps, pairwise_layer_mse
from fusedkd.reference import layers

F16, BF16, F32, F64 = DTYPES
FEW = EMULATED or INTERPRETED
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [(1, 1, 1), (1, 5, 64), (3, 2, 77), (4, 12, 768), (5, 3, 1003)]
sizes = pytest.mark.parametrize(("M", "K", "H"), SIZES[:3] if FEW else SIZES)


def eager_alp(student: list[Tensor], teacher: list[Tensor], buckets: Any = None) -> Tensor:
    """ALP-KD as one writes it, per row."""
    s, t = torch.stack(student), torch.stack(teacher)
    scores = torch.einsum("j...h,k...h->...jk", s, t)
    scores = scores.masked_fill(~table_of(buckets, len(s), len(t)).to(s.device), -torch.inf)
    mixed = torch.einsum("...jk,k...h->j...h", scores.softmax(-1), t)
    return (s - mixed).square().mean(-1).sum(0)


# -------------------------------------------------- layer_attention_loss


@pytest.mark.parametrize("buckets", [None, [[0, 2], [1, 4], [3]]], ids=["all", "buckets"])
def test_definition_is_what_one_writes(buckets: Any) -> None:
    student, teacher = ([x.requires_grad_() for x in side] for side in some_layers(3, 5, 4, 6, dtype=F64))
    expected = eager_alp(student, teacher, buckets)
    x, y = torch.stack(student).detach(), torch.stack(teacher).detach()
    value, of_student, of_teacher = layers.layer_attention(x, y, table_of(buckets, 3, 5))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    found = torch.autograd.grad(expected.sum(), [*student, *teacher])
    torch.testing.assert_close(torch.cat([of_student, of_teacher]), torch.stack(found), rtol=1e-10, atol=1e-14)


@sizes
@dtypes
def test_sizes(device: str, dtype: torch.dtype, M: int, K: int, H: int) -> None:
    student, teacher = some_layers(M, K, 2, 3, H, dtype=dtype, device=device)
    check_attention(student, teacher)
    check_attention(student, teacher, reduction="none", upstream=torch.linspace(-2, 2, 6).view(2, 3))


def test_many_layers(device: str) -> None:
    student, teacher = some_layers(*((3, 17) if FEW else (24, 24)), 2, 40, device=device)
    check_attention(student, teacher, teacher_gradient=True)


@dtypes
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_teacher_of_another_dtype(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = some_layers(3, 5, 4, 33, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    if teacher_dtype == F64 and dtype != F64:
        check_attention(student, [x.float().double() for x in teacher])  # what a float32 kernel can see of it
    else:
        check_attention(student, teacher, teacher_gradient=True, buckets=layer_maps.overlap(1, 4) * 3)


@dtypes
def test_gradient_of_the_teacher(device: str, dtype: torch.dtype) -> None:
    """Also through the attention; for each upstream, whether it was computed in the forward call or not."""
    student, teacher = some_layers(3, 5, 2, 3, 48, dtype=dtype, device=device)
    for options in ({}, {"upstream": -0.3}, {"reduction": "none", "upstream": torch.linspace(0.1, 2, 6).view(2, 3)}):
        check_attention(student, teacher, teacher_gradient=True, **options)
    check_attention(student, teacher, teacher_gradient=True, buckets=[[0], [4, 1], [2, 3]])


def test_teacher_alone(device: str) -> None:
    student, teacher = some_layers(2, 3, 4, 16, device=device)
    _, truth = attention_truth(student, teacher)
    leaves = [x.requires_grad_() for x in teacher]
    found = torch.autograd.grad(layer_attention_loss(student, leaves, teacher_gradient=True), leaves)
    assert_gradient(torch.stack(found), truth)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_student_close_to_its_teacher(device: str, dtype: torch.dtype, noise: float) -> None:
    student, teacher = some_layers(3, 4, 3, 96, dtype=dtype, noise=noise, device=device)
    apart = [teacher[0], *(-x for x in teacher[1:])]  # so that attention settles on one
    truth = check_attention([student[0]], apart)
    assert truth.loss.value < 2 * noise**2
    check_attention(student, teacher)


@pytest.mark.parametrize("spread", [0.01, 8.0])
def test_scores_of_any_size(device: str, spread: float) -> None:
    """⟨s, t⟩ from 0.01 to 50000, with differences of the order of 1 between layers: rounded to float32, they would
    leave the attention three digits.
    """
    student, teacher = some_layers(2, 4, 3, 768, spread=spread, noise=0.02, device=device)
    close = [teacher[0] + (x - teacher[0]) * (1 / 300 if spread > 1 else 1) for x in teacher]
    check_attention(student, close)
    x, y = (torch.stack(side).double().cpu() for side in (student, close))
    assert layers.attention(x, y, torch.ones(2, 4, dtype=torch.bool)).amax() < 0.99 or spread < 1


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_masks(device: str, kind: str, reduction: str, dtype: torch.dtype) -> None:
    student, teacher = some_layers(3, 4, 3, 4, 40, dtype=dtype, device=device)
    on = (torch.arange(12, device=device) % 3 != 1).view(3, 4)
    student[1][0, 1], teacher[2][1, 0], teacher[0][0, 1] = torch.nan, torch.inf, torch.nan  # rows that are not read
    mask = {"bool": on, "int": -2 * on.int(), "float": on * torch.linspace(0.25, 3, 12, device=device).view(3, 4)}[kind]
    check_attention(student, teacher, mask, reduction=reduction, teacher_gradient=True)


def test_no_selected_row(device: str) -> None:
    student, teacher = some_layers(2, 3, 4, 16, device=device)
    leaves = [x.requires_grad_() for x in (*student, *teacher)]
    none = torch.zeros(4, device=device)
    for loss in (
        layer_attention_loss(leaves[:2], leaves[2:], none, teacher_gradient=True),
        pairwise_layer_mse(leaves[:2], leaves[2:], none, teacher_gradient=True).sum(),
    ):
        assert loss == 0
        assert not any(x.any() for x in torch.autograd.grad(loss, leaves))


def test_not_a_number_shows(device: str) -> None:
    student, teacher = some_layers(2, 3, 4, 16, device=device)
    student[1][1, 3], teacher[2][2, 15] = torch.nan, torch.nan
    assert layer_attention_loss(student, teacher, reduction="none").isnan().tolist() == [False, True, True, False]
    assert pairwise_layer_mse(student, teacher).isnan().tolist() == [[False, False, True], [True] * 3]
    assert not layer_attention_loss(student[:1], teacher, buckets=[[0, 1]], reduction="none").isnan().any()


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_strides(device: str, layout: Any, dtype: torch.dtype) -> None:
    student, teacher = ([layout(x) for x in side] for side in some_layers(2, 3, 3, 4, 77, dtype=dtype, device=device))
    mask = torch.arange(student[0].shape[:-1].numel(), device=device).view(student[0].shape[:-1]) % 5
    check_attention(student, teacher, mask, teacher_gradient=True)
    check_attention([student[0], student[1].contiguous()], [teacher[0], *(x.contiguous() for x in teacher[1:])])
    check_distances(student, teacher, mask)


def test_stacked_layers_are_the_same(device: str) -> None:
    """Their gradient is one tensor."""
    sides = [[x.requires_grad_() for x in side] for side in some_layers(3, 4, 2, 5, 24, device=device)]
    whole = [torch.stack(side).detach().requires_grad_() for side in sides]
    factors = torch.rand(3, 4, device=device)
    for loss in (
        lambda s, t: layer_attention_loss(s, t, teacher_gradient=True),
        lambda s, t: (pairwise_layer_mse(s, t, teacher_gradient=True) * factors).sum(),
    ):
        one, other = loss(*sides), loss(*whole)
        assert torch.equal(one, other)
        found = torch.autograd.grad(one, [*sides[0], *sides[1]])
        expected = torch.autograd.grad(other, whole)
        assert torch.equal(torch.stack(found), torch.cat(expected))
        assert expected[1].any()


@pytest.mark.parametrize("upstream", [1.0, -0.37, 1024.0])
@dtypes
def test_upstream(device: str, dtype: torch.dtype, upstream: float) -> None:
    student, teacher = some_layers(2, 3, 5, 33, dtype=dtype, device=device)
    check_attention(student, teacher, upstream=upstream)


def test_normalizer_makes_accumulation_exact(device: str) -> None:
    student, teacher = some_layers(2, 3, 8, 24, device=device)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], device=device)
    truth, _ = attention_truth(student, teacher, mask)
    leaves, losses, distances = [x.requires_grad_() for x in student], [], []
    for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
        parts = [x[rows] for x in leaves], [x[rows] for x in teacher], mask[rows]
        loss = layer_attention_loss(*parts, normalizer=mask.sum())
        loss.backward()
        losses.append(loss.detach())
        distances.append(pairwise_layer_mse(*parts, normalizer=mask.sum()).detach())
    assert_value(torch.stack(losses).sum(), truth.loss)
    assert_gradient(torch.stack([x.grad for x in leaves]), truth)
    whole = pairwise_layer_mse(student, teacher, mask)
    torch.testing.assert_close(torch.stack(distances).sum(0), whole.detach(), rtol=1e-6, atol=0)
    check_attention(student, teacher, mask, normalizer=3.5)


def test_backward_twice_and_double_backward(device: str) -> None:
    student, teacher = some_layers(2, 3, 5, 33, device=device)
    leaves = [x.requires_grad_() for x in student]
    for loss in (layer_attention_loss(leaves, teacher), pairwise_layer_mse(leaves, teacher).sum()):
        first, second = (torch.autograd.grad(k * loss, leaves, retain_graph=True)[1] for k in (1, 3))
        torch.testing.assert_close(second, 3 * first)
        assert first.norm() > 1e-3
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, leaves, create_graph=True)


def test_no_gradient_unless_asked(device: str) -> None:
    student, teacher = some_layers(2, 3, 5, 33, device=device)
    leaves = [x.clone().requires_grad_() for x in student]
    with operator_calls() as calls:
        layer_attention_loss(student, teacher)
        with torch.no_grad():
            layer_attention_loss(leaves, teacher)
            pairwise_layer_mse(leaves, teacher)
    assert [(name, arguments.get("gradient")) for name, arguments in calls if "weights" in arguments] == [
        ("layer_attention", None),
        ("layer_attention", None),
        ("layer_distances", None),
    ]


def test_a_teacher_that_requires_a_gradient_is_told(device: str) -> None:
    student, teacher = some_layers(2, 3, 5, 33, device=device)
    leaves = [x.requires_grad_() for x in student]
    teacher[1].requires_grad_()
    with pytest.warns(UserWarning, match="teacher layer requires a gradient, but gets none"):
        loss = layer_attention_loss(leaves, teacher)
    assert torch.autograd.grad(loss, [*leaves, teacher[1]], allow_unused=True)[2] is None


# -------------------------------------------------- pairwise_layer_mse


@sizes
@dtypes
def test_distances(device: str, dtype: torch.dtype, M: int, K: int, H: int) -> None:
    student, teacher = some_layers(M, K, 2, 3, H, dtype=dtype, device=device)
    check_distances(student, teacher, teacher_gradient=True)


def test_distances_of_many_layers_and_rows(device: str) -> None:
    student, teacher = some_layers(*((5, 9) if FEW else (24, 23)), *((7, 20) if FEW else (5, 70, 20)), device=device)
    check_distances(student, teacher)


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_distances_of_layers_that_nearly_agree(device: str, noise: float) -> None:
    """By |s|² + |t|² − 2⟨s, t⟩ the smallest of them would be rounding alone."""
    student, teacher = some_layers(3, 6, 8, 96, noise=noise, device=device)
    assert check_distances(student, teacher).min() < 2 * noise**2


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
def test_distances_of_selected_rows(device: str, kind: str) -> None:
    student, teacher = some_layers(3, 4, 3, 4, 40, device=device)
    on = (torch.arange(12, device=device) % 3 != 1).view(3, 4)
    student[1][0, 1], teacher[2][1, 0] = torch.nan, torch.inf
    mask = {"bool": on, "int": -2 * on.int(), "float": on * torch.linspace(0.25, 3, 12, device=device).view(3, 4)}[kind]
    check_distances(student, teacher, mask, teacher_gradient=True)
    check_distances(student, teacher, mask, normalizer=2.5)


def test_distances_are_bert_emds(device: str) -> None:
    """Σ F·D with MSE_mean of every pair, as its code loops over them; F, a flow, is a constant."""
    student, teacher = some_layers(3, 4, 2, 5, 24, dtype=F64, device=device)
    ours, theirs = ([x.clone().requires_grad_() for x in student] for _ in range(2))
    flow = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=F64).to(device)
    expected = sum(flow[j, k] * F.mse_loss(s, t) for j, s in enumerate(theirs) for k, t in enumerate(teacher))
    actual = (flow * pairwise_layer_mse(ours, teacher)).sum()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    found, truth = (torch.autograd.grad(loss, x) for loss, x in ((actual, ours), (expected, theirs)))
    torch.testing.assert_close(torch.stack(found), torch.stack(truth), rtol=1e-10, atol=1e-14)


@pytest.mark.skipif(EMULATED, reason="one thread")
def test_distances_do_not_depend_on_threads(device: str) -> None:
    student, teacher = some_layers(2, 3, 300, 17, device=device)
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.append(pairwise_layer_mse(student, teacher))
        torch.set_num_threads(before)
    assert torch.equal(*found)


# -------------------------------------------------- compiled


@pytest.mark.skipif(FEW, reason="nothing to compile for")
def test_compiled_layers(device: str) -> None:
    student, teacher = some_layers(2, 3, 4, 24, device=device)
    on = torch.tensor([1, 0, 1, 1], device=device)
    truth, of_teacher = attention_truth(student, teacher, on, buckets=[[0, 1], [2]])
    leaves = [x.requires_grad_() for x in (*student, *teacher)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def losses(s: list[Tensor], t: list[Tensor]) -> tuple[Tensor, Tensor]:
        return (
            layer_attention_loss(s, t, on, buckets=[[0, 1], [2]], teacher_gradient=True),
            pairwise_layer_mse(s, t, on, teacher_gradient=True),
        )

    loss, distances = losses(leaves[:2], leaves[2:])
    assert_value(loss, truth.loss)
    found = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_gradient(torch.stack(found[:2]), truth)
    assert_gradient(torch.stack(found[2:]), of_teacher)
    expected = pairwise_layer_mse(leaves[:2], leaves[2:], on, teacher_gradient=True)
    torch.testing.assert_close(distances, expected)
    for got, wanted in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (distances, expected)), strict=True):
        torch.testing.assert_close(got, wanted)


# -------------------------------------------------- mistakes

S, T = some_layers(2, 3, 2, 4, 6)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_layers": None}, TypeError, "student_layers must be a tensor .layers.*NoneType"),
    ({"student_layers": []}, TypeError, "student_layers must .*an empty sequence"),
    ({"student_layers": [S[0], None]}, TypeError, r"student_layers\[1\] must be a tensor"),
    ({"student_layers": [S[0], S[1].double()]}, ValueError, r"student_layers must have one type.*float64"),
    ({"student_layers": [S[0], S[1][:1]]}, ValueError, r"student_layers\[1\] must have the student's leading shape"),
    ({"student_layers": S[0][0, 0]}, ValueError, "student_layers must be .layers, .*at least one"),
    ({"teacher_layers": [T[0], T[1].int()]}, TypeError, r"teacher_layers\[1\] must be float16"),
    ({"teacher_layers": [x[:1] for x in T]}, ValueError, r"teacher_layers\[0\] must have the student's leading shape"),
    ({"teacher_layers": torch.stack(T)[:, :1]}, ValueError, "teacher_layers.* must have the student's leading shape"),
    ({"teacher_layers": [x[..., :5] for x in T]}, ValueError, r"not 6 and 5.*torch.nn.Linear\(6, 5\).*projection"),
    ({"mask": S[0][0, :, 0]}, ValueError, "mask must have"),
    ({"normalizer": -1}, ValueError, "normalizer must be at least 0"),
    ({"teacher_gradient": "yes"}, TypeError, "teacher_gradient must be True or False"),
]
BUCKETS: list[tuple[Any, type[Exception], str]] = [
    ([[0]], ValueError, "one entry for each of the 2 student layers, not 1"),
    ([[0], []], ValueError, r"buckets\[1\] must name at least one"),
    ([0, 1], TypeError, r"buckets\[0\] must be a list of positions in the teacher layers, not 0"),
    ([[0], [3]], ValueError, r"buckets\[1\] must hold positions in the 3 teacher layers, 0 to 2, not 3"),
    ([[0.5], [1]], TypeError, r"buckets\[0\] must hold integers, not float"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    for loss in (layer_attention_loss, pairwise_layer_mse):
        with operator_calls() as calls, pytest.raises(error, match=message):
            loss(**{"student_layers": S, "teacher_layers": T, **change})
        assert not calls


@pytest.mark.parametrize(("buckets", "error", "message"), BUCKETS, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_buckets(buckets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_attention_loss(S, T, buckets=buckets)
    with pytest.raises(ValueError, match="reduction must be"):
        layer_attention_loss(S, T, reduction="batchmean")
