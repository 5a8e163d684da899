"""How ``teacher_gradient=True`` does its work: both sides together or one after the other, by tiles, nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import counted_products, small_tiles
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusedkd import TeacherHead, TeacherLogits, kd_loss, linear_kd_loss
from fusedkd.backends import block
from fusedkd.divergences import WITH_KERNEL

N, H, V = 14, 9, 300  # V: more columns than the CPU takes in lanes

Gradients = list[Tensor]


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape) + seed)
    return (scale * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype).requires_grad_()


def heads(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states, weight and bias of the student and of the teacher."""
    return (
        [leaf(N, H, dtype=dtype), leaf(V, H, dtype=dtype), leaf(V, dtype=dtype)],
        [leaf(N, H + 3, dtype=dtype), leaf(V, H + 3, dtype=dtype, seed=1), leaf(V, dtype=dtype, seed=1)],
    )


def kl(z: Tensor, v: Tensor, T: float = 1.0, T_t: float = 1.0) -> Tensor:
    """T²·KL(p‖q) of each row."""
    log_p, log_q = (v / T_t).log_softmax(-1), (z / T).log_softmax(-1)
    return T * T * (log_p.exp() * (log_p - log_q)).sum(-1)


def exact(loss: Callable[..., Tensor], *leaves: Tensor) -> Gradients:
    """In float64."""
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    return list(torch.autograd.grad(loss(*doubles), doubles, allow_unused=True))


def assert_near(found: Any, expected: Any, error: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).norm() < error * other.double().norm()


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_together_as_one_after_the_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as a second call with the sides exchanged gives it. Surplus columns, transforms, upstream."""
    z, v, labels = leaf(N, V), leaf(N, V - 20, seed=1), torch.randint(V - 20, (N,))
    T, T_t = (1.0, 1.0) if name == "logit_mse" else (2.0, 1.5)
    divergence = WITH_KERNEL[name]()
    weight, other = divergence.exchanged()
    options: dict[str, Any] = {"scale_by_t2": False, "reduction": "sum"}
    given: dict[str, Any] = {**options, "temperature": T, "teacher_temperature": T_t, "logit_softcap": 5.0}
    given |= {"divergence": divergence, "teacher_gradient": True, "ce_weight": 0.5}
    found = []
    for devices in (block.both_on, frozenset[str]()):
        monkeypatch.setattr(block, "both_on", devices)
        loss = kd_loss(z, TeacherLogits(v, scale=0.9), labels, **given)
        found.append(torch.autograd.grad(0.5 * loss, [z, v]))
    assert_near(found[0], found[1], 1e-6)
    fixed = TeacherLogits(z.detach()[:, : V - 20], softcap=5.0)
    options |= {"temperature": T_t, "teacher_temperature": T, "kd_weight": weight, "logit_scale": 0.9}
    second = kd_loss(v, fixed, labels, divergence=other, **options)
    assert_near(found[0][1:], torch.autograd.grad(0.5 * second, [v]), 1e-6)


def test_products() -> None:
    """Four for the student's gradients, two more for the teacher's, in each tile: nothing is made twice."""
    own, others = heads()

    def count(*frozen: Tensor, bytes_of: int | None = None) -> int:
        for x in (*own, *others):
            x.requires_grad_(all(x is not each for each in frozen))
        with small_tiles(), counted_products() as calls:
            teacher = TeacherHead(*others)
            loss = linear_kd_loss(
                *own[:2], teacher, student_bias=own[2], max_tile_bytes=bytes_of, teacher_gradient=True
            )
            loss.backward()
        return len(calls)

    assert count(*others) == 4
    assert count() == 6
    assert count(others[0]) == count(others[1]) == 5
    assert count(*own) == 4
    assert count(bytes_of=3 * 4 * 320 * 7) == 12  # logits of both sides and the student's gradient, 7 rows


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_from_hidden_states(dtype: torch.dtype, reduction: Any) -> None:
    """Two teachers with a gradient, one of them of logits, and one without; tiles; rows that are not selected, of which
    the teacher's hold NaN; upstream.
    """
    own, others = heads(dtype)
    logits, frozen, labels = leaf(N, V, dtype=dtype, seed=2), leaf(N, V, dtype=dtype, seed=3).detach(), torch.arange(N)
    mask = torch.arange(N) % 3 != 0
    with torch.no_grad():
        others[0][0] = torch.nan
    given: dict[str, Any] = {"teacher_weights": [0.5, 0.2, 0.3], "kd_mask": mask, "temperature": 2.0, "ce_weight": 0.5}
    teachers = [TeacherHead(*others), frozen, logits]
    with small_tiles():
        loss = linear_kd_loss(
            *own[:2], teachers, labels, student_bias=own[2], max_tile_bytes=60000, reduction=reduction,
            teacher_gradient=True, **given,
        )  # fmt: skip
    upstream = torch.linspace(0.5, 2, N) if reduction == "none" else torch.tensor(3.0)
    leaves = [*own, *others, logits]
    found = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    up = (upstream if reduction == "none" else upstream.expand(N)).double()

    def truth(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, c: Tensor, v: Tensor) -> Tensor:
        z, first = x @ w.T + b, y.nan_to_num(0) @ u.T + c
        kd = sum(s * kl(z, t, 2.0, 2.0) for s, t in zip((0.5, 0.2, 0.3), (first, frozen.double(), v), strict=True))
        ce = 0.5 * cross_entropy(z, labels, reduction="none")
        count = (mask.sum(), N) if reduction == "mean" else (1, 1)
        return (up * (mask * kd / count[0] + ce / count[1])).sum()

    rounding = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
    assert_near(found, exact(truth, *leaves), rounding)
    assert not found[3][~mask].any()


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_two_types(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    z, v = leaf(N, V, dtype=dtypes[0]), leaf(N, V, dtype=dtypes[1], seed=1)
    expected = exact(lambda z, v: 3 * kl(z, v).mean(), z, v)
    loss = kd_loss(z, v, teacher_gradient=True)
    assert_near(torch.autograd.grad(3 * loss, [z, v], retain_graph=True), expected, 1e-6)
    assert_near(torch.autograd.grad(3 * loss, [z, v]), expected, 1e-6)  # again, into fresh memory
    per_row = kd_loss(z, v, reduction="none", teacher_gradient=True)
    assert_near(torch.autograd.grad(per_row, [z, v], torch.full_like(per_row, 3 / N)), expected, 1e-6)


def test_of_one_tensor_and_of_the_teacher_alone() -> None:
    z = leaf(N, V)
    expected = exact(lambda z: kl(z, z, 2.0, 1.0).mean(), z)
    given: dict[str, Any] = {"temperature": 2.0, "teacher_temperature": 1.0, "teacher_gradient": True}
    assert_near(torch.autograd.grad(kd_loss(z, z, **given), z), expected, 1e-6)
    v = leaf(N, V, seed=1)
    loss, terms = kd_loss(z.detach(), v, return_terms=True, **given)
    assert_near(torch.autograd.grad(loss, v), exact(lambda v: kl(z.double().detach(), v, 2.0).mean(), v), 1e-6)
    torch.testing.assert_close(terms.kd, loss.detach())
    (_, others), eye = heads(), torch.eye(V)
    assert_near(
        torch.autograd.grad(linear_kd_loss(z.detach(), eye, TeacherHead(*others), teacher_gradient=True), others),
        exact(lambda y, u, c: kl(z.double().detach(), y @ u.T + c).mean(), *others),
        3e-6,
    )


def test_gradcheck() -> None:
    z, v = leaf(3, 7, dtype=torch.float64), leaf(3, 7, dtype=torch.float64, seed=1)
    for name in ("forward_kl", "dkd"):
        labels = torch.tensor([1, 2, 0])
        given: dict[str, Any] = {"divergence": name, "teacher_gradient": True, "ce_weight": 0.3}
        torch.autograd.gradcheck(lambda z, v, o=given, y=labels: kd_loss(z, v, y, **o), [z, v])
        torch.autograd.gradcheck(
            lambda x, w, y, u, o=given, t=labels: linear_kd_loss(x, w, TeacherHead(y, u), t, **o),
            [leaf(3, 4, dtype=v.dtype, seed=i) if i % 2 else leaf(7, 4, dtype=v.dtype, seed=i) for i in (1, 2, 3, 4)],
        )


def test_compiled() -> None:
    (x, w, b), (y, u, c) = heads()

    def step(*leaves: Tensor) -> Tensor:
        x, w, b, y, u, c = leaves
        given: dict[str, Any] = {"student_bias": b, "teacher_gradient": True}
        per_row = linear_kd_loss(x, w, TeacherHead(y, u, c), reduction="none", **given)
        return linear_kd_loss(x, w, TeacherHead(y, u, c), **given) + per_row.square().sum()

    leaves = x, w, b, y, u, c
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(*[torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)], strict=True):
        torch.testing.assert_close(one, other)
