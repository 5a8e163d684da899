"""The losses between attention maps: bad arguments, torch.compile, opcheck, autocast, saved-tensor hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import attention_truth, check, maps, padding
from compiled import fresh_compiler, graph  # noqa: F401
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from truth import operator_calls

import fusedkd
from fusedkd import attention_kl_from_maps, attention_kl_loss, attention_mse_from_maps, attention_mse_loss
from fusedkd.backends import attention_loop
from fusedkd.backends.layout import OPTIONS

M = maps(2, 3, 5, 4)
X = torch.rand(2, 3, 5, 5)
MASK = torch.ones(2, 5, dtype=torch.int64)
LOSSES = pytest.mark.parametrize("loss", [attention_kl_loss, attention_mse_loss])

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_q": [1.0]}, TypeError, "student_q must be a tensor, not list"),
    ({"student_q": M.student_q.long()}, TypeError, "student_q must be float16.*int64"),
    ({"student_q": M.student_q[0]}, ValueError, r"student_q must have the shape \(B, heads, L, d\), not \(3, 5, 4\)"),
    ({"teacher_k": M.teacher_k.mT.contiguous().mT}, ValueError, "teacher_k must be contiguous in its last dimension"),
    ({"student_k": M.student_k[:, :1]}, ValueError, r"student_k must have the shape of student_q .*: repeat the heads"),
    (
        {"teacher_k": M.teacher_k[..., :2]},
        ValueError,
        r"teacher_k must have the shape of teacher_q \(2, 3, 5, 4\), not",
    ),
    ({"student_k": M.student_k.double()}, TypeError, "student_k must be torch.float32 like student_q, not torch.fl"),
    (
        {"teacher_q": M.teacher_q.to("meta")},
        ValueError,
        "teacher_q must be on the device of student_q cpu, not on meta",
    ),
    (
        {"teacher_q": M.teacher_q[:, :, :4], "teacher_k": M.teacher_k[:, :, :4]},
        ValueError,
        r"teacher_q must have the batch size and length of student_q \(2, 5\), not \(2, 4\)",
    ),
    (
        {"teacher_q": M.teacher_q[:, :2], "teacher_k": M.teacher_k[:, :2]},
        ValueError,
        "teacher_q must have the 3 heads of student_q, not 2: relation_heads",
    ),
    ({"relation_heads": 5}, ValueError, "relation_heads must divide the 3 · 4 = 12 columns of the student, but is 5"),
    ({"relation_heads": 0}, ValueError, "relation_heads must be at least 1, not 0"),
    ({"relation_heads": 2.0}, TypeError, "relation_heads must be an integer, not float"),
    ({"student_scale": 0.0}, ValueError, "student_scale must be above 0"),
    ({"teacher_scale": "0.5"}, TypeError, "teacher_scale must be a number"),
    ({"mask": MASK[:, :4]}, ValueError, r"mask must have the shape \(B, L\) = \(2, 5\), not \(2, 4\)"),
    ({"mask": MASK[:, None, None]}, ValueError, r"mask must have the shape \(B, L\)"),
    ({"mask": MASK.float()}, TypeError, "mask must be bool or integer.*not torch.float32: neither weights nor what is"),
    ({"mask": MASK.to("meta")}, ValueError, "mask must be on the device of student_q cpu, not on meta"),
    ({"mask": MASK.tolist()}, TypeError, "mask must be a tensor, not list"),
    ({"causal": "yes"}, TypeError, "causal must be True or False, not 'yes'"),
    ({"padded_queries": 2}, TypeError, "padded_queries must be True or False, not 2"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be 'mean', 'sum' or 'none', not 'batchmean'"),
    ({"reduction": "sum", "normalizer": 3}, ValueError, "normalizer replaces the row count of reduction='mean'"),
    ({"attention_mask": MASK}, TypeError, r"has no option attention_mask \(mask\?\)"),
]


@LOSSES
@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[f"{i}" for i in range(len(ERRORS))])
def test_bad_arguments(loss: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with operator_calls() as calls, pytest.raises(error, match=message):
        loss(**{**M._asdict(), **change})
    assert not calls


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        ("dkd", "divergence must not be dkd: it needs labels"),
        ("logit_mse", "divergence must not be logit_mse: attention_mse_loss"),
        ("kl", "divergence"),
    ],
)
def test_divergences_of_no_map(divergence: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_kl_loss(*M, divergence=divergence)
    with pytest.raises(ValueError, match=message):
        attention_kl_from_maps(X, X, divergence=divergence)


@pytest.mark.parametrize("loss", [attention_kl_from_maps, attention_mse_from_maps])
def test_bad_maps(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"student_maps must have the shape \(B, heads, L, L\), not \(2, 3, 5, 4\)"):
        loss(X[..., :4], X)
    with pytest.raises(ValueError, match=r"teacher_maps must have the shape of student_maps \(2, 3, 5, 5\), not"):
        loss(X, X[:1])
    with pytest.raises(ValueError, match=r"mask must have the shape \(B, L\)"):
        loss(X, X, MASK[:1])
    with pytest.raises(ValueError, match="form must be 'probabilities' or 'scores', not 'logs'"):
        attention_kl_from_maps(X, X, form="logs")  # type: ignore[arg-type]


def test_a_teacher_that_requires_a_gradient() -> None:
    q, k, t_q, t_k = (x.clone().requires_grad_() for x in M)
    with pytest.raises(ValueError, match=r"the teacher_q requires a gradient and the student does not: .*swapped"):
        attention_kl_loss(M.student_q, M.student_k, t_q, t_k)
    with pytest.warns(UserWarning, match="the teacher_k requires a gradient, but gets none.*or detach it$"):
        attention_kl_loss(q, k, M.teacher_q, t_k)  # and no word of an option that it does not have


def test_a_definition_serves_as_divergence() -> None:
    class Squared(fusedkd.Divergence):
        def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
            return (log_p.exp() - log_q.exp()).square().sum(-1)

    q, k = (x.clone().requires_grad_() for x in M[:2])
    ours = attention_kl_loss(q, k, *M[2:], MASK, divergence=Squared(), causal=True)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    s, t = ((x @ y.mT / 2).masked_fill(later, -torch.inf).softmax(-1) for x, y in ((q, k), M[2:]))
    theirs = (s - t).square().sum(-1).mean()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (q, k)), torch.autograd.grad(theirs, (q, k)), strict=True):
        torch.testing.assert_close(a, b)


# -------------------------------------------------- how PyTorch runs them


@LOSSES
@pytest.mark.parametrize("options", [{}, {"causal": True, "relation_heads": 2}, {"reduction": "none"}], ids=str)
def test_one_graph(loss: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    m, mask = maps(2, 3, 9, 4), padding("right", 2, 9)
    monkeypatch.setattr(fusedkd, loss.__name__, graph(loss))
    check(m, mask, mse=loss is attention_mse_loss, upstream=2.0, **options)


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_loop, "CPU_TILE", 2000)
    q, k, *teacher = (x.bfloat16() for x in maps(2, 3, 9, 4))
    mask = padding("right", 2, 9)
    with operator_calls() as calls:
        attention_kl_loss(q.requires_grad_(), k.requires_grad_(), *teacher, relation_heads=2)
        attention_mse_loss(q, q, *teacher, mask, causal=True, reduction="none").sum().backward()
    found = [arguments for name, arguments in calls if name == "attention"]
    assert len(found) == 3
    for arguments in found:
        detached = {n: x.detach() if isinstance(x, Tensor) else x for n, x in arguments.items()}
        torch.library.opcheck(torch.ops.fusedkd.attention.default, (), detached)


@LOSSES
def test_autocast_casts_both_sides(loss: Any) -> None:
    q, k = (x.clone().requires_grad_() for x in M[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(q, k, *M[2:])
    assert value.dtype == torch.float32
    expected = attention_truth(type(M)(*(x.bfloat16() for x in M)), mse=loss is attention_mse_loss)
    assert (value - expected.loss.value).abs() <= expected.loss.tolerance
    for gradient, truth in zip(torch.autograd.grad(value, (q, k)), expected.gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - truth).norm() / truth.norm() < 5e-3


@LOSSES
def test_under_hooks_of_saved_tensors(loss: Any) -> None:
    """A checkpoint keeps no gradient; the gradient is that without one."""
    q, k = (x.clone().requires_grad_() for x in M[:2])
    expected = torch.autograd.grad(3 * loss(q, k, *M[2:], MASK), (q, k))
    found = torch.autograd.grad(3 * checkpoint(loss, q, k, *M[2:], MASK, use_reentrant=False), (q, k))
    with torch.autograd.graph.save_on_cpu():
        more = torch.autograd.grad(3 * loss(q, k, *M[2:], MASK), (q, k))
    for a, b, c in zip(expected, found, more, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@LOSSES
def test_inference_mode(loss: Any) -> None:
    with torch.inference_mode():
        teacher = [x.clone() for x in M[2:]]
        inside = loss(*M)
    q, k = (x.clone().requires_grad_() for x in M[:2])
    outside = loss(q, k, *teacher)
    assert torch.equal(inside, outside)
    outside.backward()
    assert q.grad is not None


def test_no_tensor_of_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator inside gets or gives has at most the tile's bytes, beside queries, keys and gradients."""
    monkeypatch.setattr(attention_loop, "_is_compiled", lambda operands, kernel_id: False)
    monkeypatch.setattr(attention_loop, "CPU_TILE", 1 << 16)
    m = maps(1, 2, 512, 8)
    q, k = (x.requires_grad_() for x in m[:2])
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))
            return result

    attention_kl_loss(*m[:2], *m[2:]).backward()
    with Sizes():
        attention_loop.attention(
            student_q=q.detach(),
            student_k=k.detach(),
            teacher_q=m.teacher_q,
            teacher_k=m.teacher_k,
            rows=None,
            keys=None,
            options=torch.ones(OPTIONS, dtype=torch.float64),
            normalizers=torch.ones(2, dtype=torch.float64),
            upstream=None,
            kernel_id=0,
            causal=False,
            wanted=[True, True],
        )
    assert max(largest) <= max((1 << 16) // 4, q.numel())
