"""What the options of kd_loss mean for every divergence: rows, normalisers, T^k, upstream gradients, soft-caps, padded
vocabularies, parameters as tensors, inplace, several teachers. Values and gradients by the test rule.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from families import at, describe, divergences, families
from torch import Tensor
from truth import assert_gradient, assert_value, check_kd, kd_truth, operator_calls, pair, targets

from fusedkd import TeacherLogits, kd_loss
from fusedkd.backends.layout import KernelId
from fusedkd.divergences import FAMILIES, Divergence

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}
N, V = 9, 45
three_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=describe)
POWERS = {"total_variation": 1, "logit_mse": 0}


def batch(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *pair(3, 3, V, dtype=dtype, device=device, **options), targets(3, 3, classes=V, device=device)


@families
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks(device: str, divergence: Divergence, reduction: str) -> None:
    student, teacher, labels = batch(device)
    labels[0] = 5
    on = (torch.arange(N, device=device) % 3 != 1).view(3, 3)
    for mask in (on, 2 * on.int(), on * torch.linspace(0.25, 2, N, device=device).view(3, 3)):
        check_kd(student, teacher, labels, kd_mask=mask, reduction=reduction, **at(divergence, 2.0), **BOTH)


@families
def test_rows_that_are_not_selected_are_not_read(device: str, divergence: Divergence) -> None:
    student, teacher, labels = batch(device)
    student.view(N, V)[2], teacher.view(N, V)[5] = torch.nan, torch.inf  # whose labels are ignored
    check_kd(student, teacher, labels, **at(divergence, 2.0), **BOTH)
    truth = check_kd(student, teacher, labels, **at(divergence, 2.0), reduction="none", **BOTH)
    teacher[0, 1, 3] = torch.nan
    rows = kd_loss(student, teacher, labels, **at(divergence, 2.0), reduction="none", **BOTH)
    assert rows.isnan().flatten().tolist() == [i == 1 for i in range(N)]
    others = torch.arange(N) != 1
    kept = truth.loss._replace(
        value=truth.loss.value.flatten()[others], tolerance=truth.loss.tolerance.flatten()[others]
    )
    assert_value(rows.flatten()[others.to(device)], kept)


@families
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_shows(device: str, divergence: Divergence, bad: float) -> None:
    for side in (0, 1):
        for column in (0, 20, V - 1):
            logits = list(pair(3, V, device=device))
            logits[side][1, column] = bad
            labels = torch.full((3,), 7, device=device)
            rows = kd_loss(*logits, labels, **at(divergence, 2.0), reduction="none")
            assert rows.isfinite().tolist() == [True, False, True]


# kd_weight and ce_weight as tensors: no backend may take a weight of 0 for a constant.
@pytest.mark.parametrize("sides", ["s", "t"])
@families
def test_a_row_of_nan_is_no_masked_row(device: str, divergence: Divergence, sides: str) -> None:
    """Its maximum may be that of no column at all, but not its loss."""
    student, teacher = pair(3, V, device=device)
    (student if sides == "s" else teacher)[1] = torch.nan
    labels = torch.full((3,), 7, device=device)
    for ce_weight in (0.0, 0.7):
        leaf = student.clone().requires_grad_()
        rows = kd_loss(leaf, teacher, labels, ce_weight=ce_weight, **at(divergence, 2.0, reduction="none"))
        assert rows.isnan().tolist() == [False, True, False]
        (gradient,) = torch.autograd.grad(rows.sum(), leaf)
        assert gradient.isnan().any(-1).tolist() == [False, True, False]


@families
@pytest.mark.parametrize("weights", [(0.5, 0.7), (0.5, 0.0), (0.0, 0.7)], ids=str)
def test_where_not_a_number_shows(device: str, divergence: Divergence, weights: tuple[float, float]) -> None:
    """NaN and +inf make the terms that read them NaN, and the gradient of these on all of their columns: common ones
    for KD, the student's for CE. A term of weight 0 adds nothing. Squared differences of logits have no softmax: NaN
    stays in its column, and +inf on one side makes D infinite, the gradient 0.
    """
    label, common, mse = 7, V - 4, divergence.kernel_id == KernelId.LOGIT_MSE
    broken = [(torch.nan, "s", 20), (torch.nan, "t", 20), (torch.nan, "t", label), (torch.nan, "st", label)]
    broken += [(torch.inf, "s", label), (torch.inf, "t", 20), (torch.inf, "t", label), (torch.inf, "st", 20)]
    broken += [(torch.nan, "s", common), (1.0, "s", 3)]  # beside the KD term, and not at all
    student, teacher = pair(len(broken), V, device=device, teacher_columns=common)
    for i, (bad, sides, column) in enumerate(broken):
        for side, logits in (("s", student), ("t", teacher)):
            if side in sides:
                logits[i, column] = bad
    labels = torch.full((len(broken),), label, device=device)
    kd_weight, ce_weight = (torch.tensor(w, device=device) for w in weights)
    leaf, options = student.requires_grad_(), at(divergence, 2.0, reduction="none")
    rows = kd_loss(leaf, teacher, labels, kd_weight=kd_weight, ce_weight=ce_weight, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    for i, (bad, sides, column) in enumerate(broken):
        infinite = mse and bad == torch.inf and len(sides) == 1
        kd = weights[0] > 0 and bad != 1 and column < common
        ce = weights[1] > 0 and bad != 1 and "s" in sides
        nan = torch.zeros(V, dtype=torch.bool)
        nan[(slice(column, column + 1) if mse else slice(common)) if kd and not infinite else slice(0)] = True
        nan |= torch.tensor(ce)
        assert rows[i].isnan() == bool(nan.any()), f"{rows[i]} of {broken[i]}"
        assert rows[i].isfinite() == (not (kd or ce)), f"{rows[i]} of {broken[i]}"
        assert gradient[i].isnan().tolist() == nan.tolist(), f"{gradient[i]} of {broken[i]}"
        assert not gradient[i].isinf().any()
        if not nan.any() and not infinite:
            assert gradient[i, :common].any()


@families
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_logits_far_from_zero(device: str, divergence: Divergence, ce_weight: float) -> None:
    """Where e^z overflows or underflows, on both sides or on one."""
    student, teacher = pair(8, V, device=device)
    offsets = torch.tensor([100.0, -100.0, 1000.0, -1000.0], device=device).unsqueeze(-1)
    student += offsets.repeat(2, 1)
    teacher[:4] += offsets
    labels = torch.arange(8, device=device)
    check_kd(student, teacher, labels, ce_weight=ce_weight, reduction="none", **at(divergence, 2.0))


@families
def test_no_selected_row(device: str, divergence: Divergence) -> None:
    student, teacher, labels = batch(device)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, torch.full_like(labels, -100), **at(divergence, 2.0), **BOTH)
    assert loss == 0
    loss.backward()
    assert not leaf.grad.any()


@families
def test_normalizers(device: str, divergence: Divergence) -> None:
    student, teacher, labels = batch(device)
    normalizer = torch.tensor(5.5, device=device)
    check_kd(student, teacher, labels, kd_normalizer=37, ce_normalizer=normalizer, **at(divergence, 2.0), **BOTH)


@families
def test_powers_of_the_temperature(device: str, divergence: Divergence) -> None:
    """T² for the KLs, T for total variation, 1 without a softmax; False leaves D itself."""
    student, teacher, labels = batch(device)
    options = {**at(divergence, 3.0), "reduction": "sum"}
    check_kd(student, teacher, labels, scale_by_t2=False, **options)
    plain, scaled = (kd_loss(student, teacher, labels, scale_by_t2=x, **options) for x in (False, True))
    factor = 3.0 ** POWERS.get(divergence.name, 2)
    torch.testing.assert_close(scaled, factor * plain, rtol=1e-6, atol=0)


@families
@three_dtypes
@pytest.mark.parametrize("upstream", [0.37, -3.0, 1e3])
def test_upstream(device: str, divergence: Divergence, dtype: torch.dtype, upstream: float) -> None:
    student, teacher, labels = batch(device, dtype)
    check_kd(student, teacher, labels, upstream=upstream, **at(divergence, 2.0), **BOTH)


@families
def test_upstream_per_row(device: str, divergence: Divergence) -> None:
    student, teacher, labels = batch(device)
    upstream = torch.linspace(-1, 2, N).view(3, 3)
    upstream[1, 1] = 0
    gradient = check_kd(student, teacher, labels, reduction="none", upstream=upstream, **at(divergence, 2.0)).gradient
    assert not gradient[1, 1].any()


@divergences
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=describe)
def test_backward_again(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(device, dtype)
    leaf, options = student.requires_grad_(), {**at(divergence, 2.0), **BOTH}
    loss = kd_loss(leaf, teacher, labels, **options)
    for upstream in (1.0, 3.0):
        (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(upstream).to(loss), retain_graph=True)
        assert_gradient(gradient, kd_truth(student, teacher, labels, upstream=upstream, **options))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=describe)
def test_inplace(device: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """The same bits where the logits were."""
    student, teacher, labels = batch(device, dtype)
    leaf, options = student.requires_grad_(), {**at(divergence, 2.0), **BOTH}
    expected = kd_loss(leaf, teacher, labels, **options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    overwritten = leaf * 1
    loss = kd_loss(overwritten, teacher, labels, inplace=True, **options)
    assert torch.equal(loss, expected)
    assert torch.equal(overwritten.detach(), gradient)
    assert gradient.norm() > 1e-3


@families
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_softcap_and_scale(device: str, divergence: Divergence, temperature: float) -> None:
    student, teacher, labels = batch(device)
    student[0, 0, 4] = teacher[0, 0, 4] = -torch.inf  # stays −inf through the cap
    labels[0, 0] = 5
    form = TeacherLogits(teacher, softcap=6.0, scale=1.5)
    options = {**at(divergence, temperature), **BOTH}
    check_kd(student, teacher, labels, logit_softcap=5.0, **options)
    check_kd(student, form, labels, logit_scale=0.25, **options)
    check_kd(student, form, labels, logit_softcap=7.0, logit_scale=0.5, **options)


@families
@pytest.mark.parametrize("teacher_columns", [V - 7, V + 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)
def test_padded_vocabularies(device: str, divergence: Divergence, dtype: torch.dtype, teacher_columns: int) -> None:
    student, teacher, labels = batch(device, dtype, teacher_columns=teacher_columns)
    student[0, 1, V - 7 :] += 60  # the largest logit of the row lies in the surplus
    labels[0, 0] = V - 1
    cut: dict[str, Any] = {"vocab_mismatch": "truncate"}
    check_kd(student, teacher, labels, **at(divergence, 2.0), **cut, **BOTH)
    check_kd(student, teacher, labels, label_smoothing=0.1, **at(divergence, 3.0), reduction="none", **cut, **BOTH)
    gradient = check_kd(student, teacher, labels, **at(divergence, 2.0), **cut).gradient
    assert not gradient[..., teacher_columns:].any()


@families
def test_strides(device: str, divergence: Divergence) -> None:
    """Tokens shifted by one, with NaN around: a stray read shows."""
    student, teacher, labels = batch(device)
    wide = torch.full((3, 4, V + 3), torch.nan, device=device)
    z, v = wide.clone()[:, :-1, :V], wide.clone()[:, 1:, 3:]
    z.copy_(student)
    v.copy_(teacher)
    check_kd(z, v, labels, **at(divergence, 2.0), **BOTH)


@divergences
def test_parameters_as_tensors(device: str, divergence: Divergence) -> None:
    """To the bit what the numbers give."""
    student, teacher, labels = batch(device)
    leaf = student.requires_grad_()
    results = []
    for family in (divergence, of_tensors(divergence, device)):
        loss = kd_loss(leaf, teacher, labels, **at(family, 2.0), **BOTH)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].norm() > 1e-3


def of_tensors(x: Any, device: str) -> Any:
    if isinstance(x, Divergence):
        return type(x)(**{each.name: of_tensors(getattr(x, each.name), device) for each in fields(x)})
    if isinstance(x, tuple):
        return tuple(of_tensors(value, device) for value in x)
    return torch.tensor(x, dtype=torch.float64, device=device) if isinstance(x, float) else x


@families
def test_names(device: str, divergence: Divergence) -> None:
    """A name is the family with its defaults."""
    student, teacher, labels = batch(device)
    assert FAMILIES[divergence.name] is type(divergence)
    options = at(divergence, 2.0)
    by_name = kd_loss(student, teacher, labels, **{**options, "divergence": divergence.name})
    assert torch.equal(by_name, kd_loss(student, teacher, labels, **options))
    assert by_name > 0


@families
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_operators_of_one_loss(device: str, divergence: Divergence, ce_weight: float) -> None:
    """One call, whose kernel is given the labels only where something needs them; a GPU looks at the upstream gradient
    in another.
    """
    student, teacher, labels = batch(device)
    leaf = student.requires_grad_()
    with operator_calls() as calls:
        loss = kd_loss(leaf, teacher, labels, ce_weight=ce_weight, **at(divergence, 2.0))
        loss.backward()
    (name, arguments), *later = calls
    assert name == "kd_loss"
    assert [(name, more["skip_if_one"]) for name, more in later] == [("kd_backward", True)] * (device != "cpu")
    assert (arguments["ce"], arguments["needs_labels"]) == (ce_weight > 0, divergence.kernel_id == KernelId.DKD)
    assert arguments["kernel_id"] == divergence.kernel_id


@families
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_teachers(device: str, divergence: Divergence, reduction: str) -> None:
    student, first, labels = batch(device)
    second = TeacherLogits(pair(3, 3, V, device=device, seed=5)[1], softcap=8.0)
    options = {**at(divergence, 2.0), **BOTH, "reduction": reduction}
    check_kd(student, [first, second], labels, **options)
    check_kd(student, [first, second], labels, teacher_weights=[0.25, 2.0], **options)
