"""hidden_loss with a projection under torch.compile, torch.library.opcheck, autocast, inference mode; and what it
refuses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import fresh_compiler, graph  # noqa: F401
from projection_cases import H_S, H_T, Given, assert_gradients, given, truth
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from truth import float64, operator_calls

from fusedkd import hidden_loss

reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


def step(
    student: Tensor, projection: Tensor, bias: Tensor | None, teacher: Any, mask: Tensor, **options: Any
) -> Tensor:
    return hidden_loss(student, teacher, mask, projection=projection, bias=bias, **options)


def masked(p: Given) -> Tensor:
    return torch.arange(p.student[..., 0].numel(), device=p.student.device).view(p.student.shape[:-1]) % 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@reductions
def test_one_graph(device: str, dtype: torch.dtype, reduction: str) -> None:
    p = given(3, 7, dtype=dtype, device=device)
    expected, leaves = truth(p, masked(p), normalize="l2", reduction=reduction, upstream=0.5), p.leaves("teacher")
    loss = graph(step)(*leaves, masked(p), normalize="l2", reduction=reduction)
    assert ((float64(loss) - expected.loss).abs() <= expected.tolerance).all()
    assert_gradients(leaves.gradients(loss, 0.5), p, expected)


def test_one_graph_of_pieces_means_and_a_teachers_gradient(device: str) -> None:
    p = given(3, 7, device=device, dtype=torch.float64)
    options: dict[str, Any] = {"pool": "mean", "teacher_gradient": True, "normalizer": torch.tensor(4, device=device)}
    found = []
    for function in (step, graph(step)):
        leaves = p.leaves()
        pieces = [*leaves.teacher.split([5, H_T - 5], -1)]
        loss = function(*leaves._replace(teacher=[piece.contiguous() for piece in pieces]), masked(p), **options)
        found.append([loss.detach(), *leaves.gradients(loss).values()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)


def test_other_numbers_of_rows(device: str) -> None:
    """One graph for all of them."""
    compiled = graph(step, dynamic=True)
    for n in (5, 9, 30):
        p = given(n, device=device)
        expected, leaves = truth(p, masked(p)), p.leaves("teacher")
        with torch.compiler.set_stance("default" if n == 5 else "fail_on_recompile"):
            assert_gradients(leaves.gradients(compiled(*leaves, masked(p))), p, expected)


def test_fake_tensors(device: str) -> None:
    p = given(3, 7, dtype=torch.bfloat16, device=device)
    with FakeTensorMode() as mode:
        x, w, t = (mode.from_tensor(each) for each in (p.student, p.projection, p.teacher))
        x.requires_grad_(), w.requires_grad_()
        hidden_loss(x, t, projection=w).backward()
    for each in (x, w):
        assert (each.grad.shape, each.grad.dtype) == (each.shape, torch.bfloat16)


def test_opcheck(device: str) -> None:
    cases: list[tuple[Given, dict[str, Any]]] = [
        (given(3, 7, device=device), {}),
        (given(3, 7, dtype=torch.bfloat16, device=device, bias=False), {"reduction": "none", "distance": "cosine"}),
        (given(7, dtype=torch.float16, device=device), {"reduction": "sum", "normalize": "l2"}),
    ]
    found = []
    for p, options in cases:
        for mask in (None, masked(p)):
            leaves = p.leaves()
            with operator_calls() as calls:
                step(*leaves, mask, teacher_gradient=True, **options).sum().backward()
            found += [arguments for name, arguments in calls if name == "linear_hidden"]
    assert len(found) == 8
    for arguments in found:
        torch.library.opcheck(
            torch.ops.fusedkd.linear_hidden.default, (), tree_map_only(Tensor, Tensor.detach, arguments)
        )


@reductions
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(device: str, hidden_dtype: torch.dtype, reduction: str) -> None:
    """Operands in bfloat16, whatever they come as; the teacher as it is; each gradient in the dtype of its input."""
    p = given(3, 7, device=device)
    cast = p._replace(student=p.student.bfloat16(), projection=p.projection.bfloat16())
    expected = truth(cast._replace(bias=p.bias), reduction=reduction)
    p = p._replace(student=p.student.to(hidden_dtype))
    leaves = p.leaves("teacher")
    with torch.autocast(device, torch.bfloat16):
        loss = leaves.loss(reduction=reduction)
    assert loss.dtype == torch.float32
    assert ((float64(loss) - expected.loss).abs() <= 2e-5 * expected.loss).all()
    assert_gradients(leaves.gradients(loss), p, expected, dtype=torch.bfloat16)


@reductions
def test_a_teacher_from_inference_mode(device: str, reduction: str) -> None:
    p = given(3, 7, device=device)
    leaves = p.leaves("teacher")
    with torch.inference_mode():
        teacher, mask = p.teacher.clone(), masked(p).clone()
    loss = leaves._replace(teacher=teacher).loss(mask, reduction=reduction)
    assert_gradients(leaves.gradients(loss), p, truth(p, masked(p), reduction=reduction))


@pytest.mark.parametrize("trained", ["projection", "bias"])
def test_a_student_whose_projection_alone_is_trained(trained: str) -> None:
    leaves = given(3, 7).leaves(*{"student", "projection", "bias"} - {trained})
    with pytest.warns(UserWarning, match="the teacher requires a gradient, but gets none"):
        assert leaves.loss().requires_grad
    with pytest.raises(ValueError, match="the student does not: are the two swapped"):
        leaves._replace(**{trained: getattr(leaves, trained).detach()}).loss()


X, W, B, T = torch.zeros(3, H_S), torch.zeros(H_T, H_S), torch.zeros(H_T), torch.zeros(3, H_T)
REFUSED: list[tuple[Any, Any, dict[str, Any], str]] = [
    (X, T, {"projection": W.t()}, r"projection must have the shape \(33, 24\), .* not \(24, 33\)"),
    (X, T, {"projection": W, "bias": B[1:]}, r"bias must have the shape \(33,\), .* not \(32,\)"),
    (X, T, {"projection": W.double()}, "projection must be torch.float32 .* not torch.float64"),
    (X, T, {"projection": torch.nn.Linear(1, 1)}, "projection must be a tensor, not Linear: pass its .weight"),
    (X, T, {"projection": [W]}, "projection must be a tensor, as student is, not a list of 1"),
    ([X, X], [T, T], {"projection": [W]}, "projection must be a list of 2, one for each layer, not a list of 1"),
    ([X, X], [T, T], {"projection": [W, W.t()]}, r"projection\[1\] must have the shape"),
    ([X, X], [T, X], {"projection": [W, None], "bias": B}, r"bias is given, but no projection\[1\]"),
    (X, X, {"bias": B}, "bias is given, but no projection that it belongs to"),
    (X, T, {}, "same last dimension, not 24 and 33: pass a projection"),
]


@pytest.mark.parametrize(("student", "teacher", "options", "message"), REFUSED, ids=[m[:30] for *_, m in REFUSED])
def test_refused(student: Any, teacher: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        hidden_loss(student, teacher, **options)
