"""Properties that hold for any input, by hypothesis; skipped where that is not installed, as on a bare GPU machine."""

from __future__ import annotations

import pytest
import torch
from truth import assert_value, check_kd, kd_truth, pair, targets

from fusedkd import cosine_hidden_loss, definitions, kd_loss

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

T = [0.5, 1.0, 2.0, 4.0, 20.0]
N, V = 12, 50
BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12)


@given(LOGITS, LOGITS, st.floats(0.25, 20))
def test_forward_kl(student: list[float], teacher: list[float], temperature: float) -> None:
    n = min(len(student), len(teacher))
    z, v = (torch.tensor([x[:n]], dtype=torch.float64) for x in (student, teacher))
    value = definitions.forward_kl(z, v, temperature, temperature)
    gradient = definitions.forward_kl_gradient(z, v, temperature, temperature)
    assert value >= -1e-14
    assert gradient.sum().abs() <= 1e-14 * n / temperature
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(definitions.forward_kl(z[:, order], v[:, order], temperature, temperature), value)
    shifted = definitions.forward_kl(z + 3, v - 7, temperature, temperature)
    torch.testing.assert_close(shifted, value, atol=1e-12, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_kd_loss(device: str, data: st.DataObject) -> None:
    """Any shape and options by the rule; and what a KL must be: ≥ 0, blind to shifts and to the order of columns, with
    a gradient that sums to 0 per row.
    """
    n, v = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 70))
    temperature, seed = data.draw(st.sampled_from(T)), data.draw(st.integers(0, 99))
    student, teacher = pair(n, v, device=device, noise=data.draw(st.sampled_from([0.1, 1.0, 5.0])), seed=seed)
    labels = targets(n, classes=v, device=device, ignored=None, seed=seed)
    smoothing = data.draw(st.sampled_from([0.0, 0.2]))
    check_kd(student, teacher, labels, temperature=temperature, label_smoothing=smoothing, **BOTH)

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
