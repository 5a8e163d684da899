"""Properties that hold for any input, by hypothesis; skipped where that is not installed, as on a bare GPU machine."""

from __future__ import annotations

import pytest
import torch
from families import DEFAULTS, PARAMETERS, at, samples, top_k
from test_definitions import defined
from truth import assert_value, check_kd, kd_truth, pair, targets

from fusedkd import cosine_hidden_loss, kd_loss
from fusedkd.backends.layout import KernelId
from fusedkd.divergences import Divergence

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

T = [0.5, 1.0, 2.0, 4.0, 20.0]
N, V = 12, 50
BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12)


@settings(max_examples=40, deadline=None)
@given(LOGITS, LOGITS, st.floats(0.25, 20), st.sampled_from(DEFAULTS + PARAMETERS))
def test_definitions(student: list[float], teacher: list[float], temperature: float, divergence: Divergence) -> None:
    """D ≥ 0 with a gradient that sums to 0; blind to the order of columns and, but for squared errors, to shifts."""
    n = min(len(student), len(teacher))
    z, v = (torch.tensor([x[:n]], dtype=torch.float64) / temperature for x in (student, teacher))
    y = torch.tensor([n // 2])
    value, gradient = defined(divergence, z, v, y)
    size = 1 + value.abs().item() + gradient.abs().max().item()
    noise = 1e-10 * size
    assert value >= -noise
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    permuted = defined(divergence, z[:, order], v[:, order], (order == n // 2).nonzero()[0])
    torch.testing.assert_close(permuted, (value, gradient[:, order]), atol=noise, rtol=1e-9)
    if divergence.kernel_id != KernelId.LOGIT_MSE:
        assert gradient.sum().abs() <= noise
        torch.testing.assert_close(defined(divergence, z + 3, v - 7, y)[0], value, atol=noise, rtol=1e-7)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_kd_loss(device: str, data: st.DataObject) -> None:
    """Any shape, divergence and options by the rule; and what a KL must be: ≥ 0, blind to shifts and to the order of
    columns, with a gradient that sums to 0 per row.
    """
    n, v = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 70))
    temperature, seed = data.draw(st.sampled_from(T)), data.draw(st.integers(0, 99))
    student, teacher = pair(n, v, device=device, noise=data.draw(st.sampled_from([0.1, 1.0, 5.0])), seed=seed)
    labels = targets(n, classes=v, device=device, ignored=None, seed=seed)
    smoothing = data.draw(st.sampled_from([0.0, 0.2]))
    options = at(data.draw(st.sampled_from(DEFAULTS + PARAMETERS)), temperature, label_smoothing=smoothing)
    check_kd(student, teacher, labels, **options, **BOTH)

    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, temperature=temperature, reduction="none")
    rows.sum().backward()
    assert (rows >= 0).all()
    assert leaf.grad.sum(-1).abs().max() <= 1e-6 * temperature * v**0.5
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed)).to(device)
    permuted = kd_loss(student[:, order], teacher[:, order], temperature=temperature, reduction="none")
    torch.testing.assert_close(permuted, rows.detach(), rtol=2e-5, atol=1e-8 * temperature**2)
    shifted = kd_loss(student + 4, teacher - 8, temperature=temperature, reduction="none")
    torch.testing.assert_close(shifted, rows.detach(), rtol=1e-4, atol=1e-6 * temperature**2)  # z + 4 is rounded


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_listed_teachers(device: str, data: st.DataObject) -> None:
    """Any K, tail, direction and temperature by the rule, in any order of the columns."""
    n, v = data.draw(st.integers(1, 5)), data.draw(st.integers(3, 70))
    k, seed = data.draw(st.integers(1, v - 1)), data.draw(st.integers(0, 99))
    student, logits = pair(n, v, device=device, noise=data.draw(st.sampled_from([0.1, 1.0, 5.0])), seed=seed)
    labels = targets(n, classes=v, device=device, ignored=None, seed=seed)
    kind = data.draw(st.sampled_from(["renormalize", "bucket", "ignore", "samples"]))
    temperature = data.draw(st.sampled_from(T))
    reverse = kind != "samples" and data.draw(st.booleans())
    teacher = samples(logits, k, seed) if kind == "samples" else top_k(logits.double(), k, kind, temperature)
    options = {"temperature": temperature, "divergence": "reverse_kl" if reverse else "forward_kl"}
    check_kd(student, teacher, labels, **options, **BOTH)
    check_kd(student, teacher, labels, **options, reduction="none", vacuous=True)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed)).to(device)
    values = list(vars(teacher).values())
    shuffled = type(teacher)(*(x[..., order] for x in values[:2]), *values[2:])
    rows, same = (kd_loss(student, x, reduction="none", **options) for x in (teacher, shuffled))
    torch.testing.assert_close(rows, same, rtol=1e-4, atol=2e-6 * temperature**2)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.booleans(), min_size=N, max_size=N), st.lists(st.booleans(), min_size=N, max_size=N))
def test_a_mask_is_as_good_as_dropping_rows(device: str, kd_rows: list[bool], ce_rows: list[bool]) -> None:
    student, teacher = pair(N, V, device=device)
    kd_on, ce_on = (torch.tensor(x, device=device) for x in (kd_rows, ce_rows))
    labels = torch.where(ce_on, targets(N, classes=V, device=device, ignored=None), -100)
    loss = kd_loss(student, teacher, labels, kd_mask=kd_on, temperature=2.0, **BOTH)
    dropped = kd_truth(student[kd_on], teacher[kd_on], kd_weight=0.5, temperature=2.0).loss
    dropped = dropped.plus(kd_truth(student[ce_on], teacher[ce_on], labels[ce_on], kd_weight=0.0, ce_weight=0.7).loss)
    assert_value(loss, dropped, vacuous=not any(kd_rows + ce_rows))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(2, 60), st.integers(0, 99))
def test_cosine(device: str, rows: int, hidden: int, seed: int) -> None:
    """In [0, 2], blind to the length of either vector, with a gradient at right angles to the student."""
    student, teacher = pair(rows, hidden, device=device, seed=seed)
    leaf = student.clone().requires_grad_()
    distance = cosine_hidden_loss(leaf, teacher, reduction="none")
    distance.sum().backward()
    assert ((distance >= 0) & (distance <= 2.00001)).all()
    longer = cosine_hidden_loss(2 * student, 8 * teacher, reduction="none")
    torch.testing.assert_close(longer, distance.detach(), rtol=1e-5, atol=1e-7)
    assert ((leaf.grad * student).sum(-1).abs() <= 1e-5).all()
