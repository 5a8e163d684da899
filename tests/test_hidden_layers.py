"""hidden_loss of a list of layers, which is one operator call: each layer by the test rule against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from truth import INTERPRETED, Truth, assert_gradient, assert_value, between_nans, hidden_truth, operator_calls, pair

from fusedkd import hidden_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
KIND: Any = {"distance": "smooth_l1", "normalize": "layer_norm"}
L2: Any = {"distance": "mse", "normalize": "l2"}


def layers_of(*widths: int, dtype: torch.dtype = F32, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    sides = [pair(2, 5, width, dtype=dtype, device=device, seed=seed) for seed, width in enumerate(widths)]
    return [x for x, _ in sides], [y for _, y in sides]


def check_layers(
    students: list[Tensor],
    teachers: list[Tensor],
    mask: Tensor | None = None,
    *,
    weights: list[Any] | None = None,
    upstream: float = 1.0,
    given: list[Any] | None = None,
    **options: Any,
) -> list[Truth]:
    """Sum of the values, and each gradient; `given`: the teacher's side as it is passed."""
    factors = [1.0] * len(students) if weights is None else [float(w) for w in weights]
    truths = [
        hidden_truth(x, y, mask, upstream=upstream * f, **options)
        for x, y, f in zip(students, teachers, factors, strict=True)
    ]
    leaves = [x.detach().requires_grad_() for x in students]
    loss = hidden_loss(leaves, teachers if given is None else given, mask, layer_weights=weights, **options)
    whole = truths[0].loss * factors[0]
    for truth, factor in zip(truths[1:], factors[1:], strict=True):
        whole = whole.plus(truth.loss * factor)
    assert_value(loss, whole)
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    for gradient, truth, factor in zip(gradients, truths, factors, strict=True):
        assert_gradient(gradient, truth, vacuous=factor == 0)
    return truths


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_unequal_widths_masks_weights_upstream(device: str, dtype: torch.dtype, reduction: str) -> None:
    """Two groups of a width each, which alternate."""
    students, teachers = layers_of(48, 33, 48, 33, 48, dtype=dtype, device=device)
    mask = torch.arange(10, device=device).view(2, 5) % 4 / 2
    students[1][0, 0], teachers[2][0, 4] = torch.nan, torch.inf  # unselected
    weights = [0.5, torch.tensor(2.0, device=device), 0, torch.tensor(3, device=device), 1]
    for kind, upstream in ((KIND, 512.0), (L2, -300.0)):
        check_layers(students, teachers, mask, weights=weights, upstream=upstream, reduction=reduction, **kind)
    check_layers(students, teachers, mask != 0, reduction=reduction, upstream=512.0, distance="cosine")


def test_one_call_for_all_layers() -> None:
    students, teachers = layers_of(24, 24, 16)
    leaves = [x.requires_grad_() for x in students]
    with operator_calls() as calls:
        (3 * hidden_loss(leaves, teachers, pool="mean")).backward()
        hidden_loss([x.detach() for x in students], teachers)
    assert [name for name, _ in calls if name.startswith("hidden")].count("hidden_loss") == 2
    assert [name for name, _ in calls].count("hidden_backward") == 1


def test_pieces_and_views_of_one_tensor(device: str) -> None:
    """Layers that are views of one (M, B, L, H), of hidden states without their first token, and contiguous ones."""
    stacked, teachers = (torch.stack(x) for x in layers_of(40, 40, 40, 40, device=device))
    sliced = torch.stack(list(stacked), 2)  # (B, L, M, H)
    ways = [list(stacked), list(sliced.unbind(2)), [stacked[0], *sliced.unbind(2)[1:3], between_nans(stacked[3])]]
    for students in ways:
        given = [[y[..., :7], y[..., 7:]] for y in teachers]
        check_layers(students, list(teachers), given=given, **KIND)
        check_layers([x[:, 1:] for x in students], [y[:, 1:] for y in teachers], **L2)
    some = [
        [teachers[0][..., :8], teachers[0][..., 8:]],
        teachers[1],
        teachers[2],
        [y for y in teachers[3].split(10, -1)],
    ]
    check_layers(list(stacked), list(teachers), given=some, **KIND)


def test_a_layer_that_is_not_finite(device: str) -> None:
    """Shows in the loss and in its own gradient alone."""
    students, teachers = layers_of(24, 24, 24, device=device)
    students[1][0, 2, 3], teachers[1][1, 1] = torch.nan, -torch.inf
    leaves = [x.requires_grad_() for x in students]
    loss = hidden_loss(leaves, teachers, **L2)
    assert not loss.isfinite()
    loss.backward()
    for i in (0, 2):
        assert_gradient(leaves[i].grad, hidden_truth(students[i], teachers[i], **L2))
    rows = hidden_loss(students, teachers, reduction="none", **L2)
    assert rows.isfinite().flatten().logical_not().nonzero().flatten().tolist() == [2, 6]


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_frozen_and_shared_layers(device: str, dtype: torch.dtype) -> None:
    (a, b, c), teachers = layers_of(32, 32, 32, dtype=dtype, device=device)
    x, z = a.requires_grad_(), c.requires_grad_()
    hidden_loss([x, b, x, z], [*teachers, teachers[0]], layer_weights=[1, 1, 2, 1], reduction="sum", **KIND).backward()
    assert b.grad is None
    assert_gradient(z.grad, hidden_truth(c, teachers[0], reduction="sum", **KIND))
    first, second = (hidden_truth(a, y, reduction="sum", **KIND) for y in (teachers[0], teachers[2]))
    twice = first.gradient + 2 * second.gradient
    bound = {F16: 2e-3, F32: 2e-6}[dtype] * twice.norm()
    assert (x.grad.cpu().double() - twice).norm() < bound


def test_accumulation_second_backward_and_no_second_derivative(device: str) -> None:
    students, teachers = layers_of(24, 20, 24, device=device)
    mask = torch.arange(10, device=device).view(2, 5) % 3
    leaves = [x.clone().requires_grad_() for x in students]
    for rows in (slice(0, 2), slice(2, 5)):
        parts = [x[:, rows] for x in leaves], [y[:, rows] for y in teachers]
        hidden_loss(*parts, mask[:, rows], normalizer=(mask != 0).sum(), **L2).backward()
    for leaf, teacher in zip(leaves, teachers, strict=True):
        assert_gradient(leaf.grad, hidden_truth(leaf, teacher, mask, **L2))
    loss = hidden_loss(leaves, teachers, mask, **L2)
    first, second = (torch.autograd.grad(k * loss, leaves, retain_graph=True) for k in (1, 3))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, 3 * a)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_nothing_selected(device: str) -> None:
    students, teachers = layers_of(24, 24, device=device)
    leaves = [x.requires_grad_() for x in students]
    loss = hidden_loss(leaves, teachers, torch.zeros(2, 5, device=device), layer_weights=[1, 2])
    loss.backward()
    assert loss == 0
    assert not any(leaf.grad.any() for leaf in leaves)
    assert hidden_loss([x[:0] for x in students], [y[:0] for y in teachers]) == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_some_teachers(device: str, reduction: str) -> None:
    """Of layers whose types and widths differ, beside those of the layers one by one."""
    students, teachers = layers_of(24, 24, 16, 24, dtype=F64, device=device)
    teachers[3] = teachers[3].float()
    mask, weights = torch.arange(10, device=device).view(2, 5) % 3, [1, 0.5, 2, 3]
    options: Any = {"teacher_gradient": True, "reduction": reduction, **KIND}
    found = []
    for together in (True, False):
        x = [each.clone().requires_grad_() for each in students]
        y = [each.clone().requires_grad_(i != 1) for i, each in enumerate(teachers)]
        pieces: list[Any] = [[y[0][..., :7], y[0][..., 7:]], *y[1:]]
        if together:
            loss = hidden_loss(x, pieces, mask, layer_weights=weights, **options)
        else:
            sides = zip(weights, x, pieces, strict=True)
            loss = torch.stack([w * hidden_loss(a, b, mask, **options) for w, a, b in sides]).sum(0)
        factors = torch.linspace(0.5, 2, loss.numel(), dtype=F64, device=loss.device).view(loss.shape)
        leaves = [*x, *(each for each in y if each.requires_grad)]
        found.append([loss, *torch.autograd.grad((factors * loss).sum(), leaves)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert theirs.norm() > 1e-6


def test_layers_whose_lengths_differ(device: str) -> None:
    """Each has its own mean; they are no rows of one call."""
    (a, b), (c, d) = layers_of(24, 24, device=device)
    b, d = b[:, :3], d[:, :3]
    torch.testing.assert_close(hidden_loss([a, b], [c, d]), hidden_loss(a, c) + hidden_loss(b, d))
    both = hidden_loss([a, b.double()], [c, d])
    torch.testing.assert_close(both, (hidden_loss(a, c) + hidden_loss(b, d)).double())


@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
def test_compile_fullgraph() -> None:
    students, teachers = layers_of(24, 24, 16)
    mask, weights = torch.arange(10).view(2, 5) % 3, [1.0, torch.tensor(0.5), 2.0]
    results = []
    for function in (hidden_loss, torch.compile(hidden_loss, fullgraph=True)):
        leaves = [x.clone().requires_grad_(i != 1) for i, x in enumerate(students)]
        given = [teachers[0], [teachers[1][..., :9], teachers[1][..., 9:]], teachers[2]]
        loss = function(leaves, given, mask, layer_weights=weights, **KIND)
        results.append([loss, *torch.autograd.grad(2 * loss, [leaves[0], leaves[2]])])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
