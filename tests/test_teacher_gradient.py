"""``teacher_gradient=True``: the gradient of the losses with respect to the teacher, against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedkd
from fusedkd import TeacherHead, TeacherLogits, TeacherTopK, kd_loss, linear_kd_loss
from fusedkd.divergences import FAMILIES, WITH_KERNEL

N, V, H = 12, 70, 9


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return (share * log_p.exp() + (1 - share) * log_q.exp()).log()


def alpha_beta(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def dkd(log_p: Tensor, log_q: Tensor, y: Tensor, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    def two(log_x: Tensor) -> tuple[Tensor, Tensor]:
        x = log_x.exp()
        target = x.gather(-1, y.unsqueeze(-1))
        rest = x.scatter(-1, y.unsqueeze(-1), 0)
        return torch.cat([target, rest.sum(-1, keepdim=True)], -1), rest / rest.sum(-1, keepdim=True)

    (binary_p, hat_p), (binary_q, hat_q) = two(log_p), two(log_q)
    among = torch.where(hat_p > 0, hat_p * (hat_p.clamp(min=1e-300).log() - hat_q.clamp(min=1e-300).log()), 0)
    return alpha * kl(binary_p.log(), binary_q.log()) + beta * among.sum(-1)


FORMULAS: dict[str, Any] = {
    "forward_kl": lambda p, q, y: kl(p, q),
    "reverse_kl": lambda p, q, y: kl(q, p),
    "jeffreys": lambda p, q, y: kl(p, q) + kl(q, p),
    "jsd": lambda p, q, y: 0.5 * kl(p, mixture(p, q, 0.5)) + 0.5 * kl(q, mixture(p, q, 0.5)),
    "skew_kl": lambda p, q, y: kl(p, mixture(p, q, 0.1)),
    "skew_reverse_kl": lambda p, q, y: kl(q, mixture(p, q, 0.9)),
    "alpha_beta": lambda p, q, y: alpha_beta(p, q, 0.2, 0.7),
    "total_variation": lambda p, q, y: 0.5 * (p.exp() - q.exp()).abs().sum(-1),
    "dkd": dkd,
}


def truth(name: str, z: Tensor, v: Tensor, y: Tensor, T: float, T_t: float) -> Tensor:
    """T^k · D of each row, float64."""
    if name == "logit_mse":
        return (z - v).square().mean(-1)
    power = FAMILIES[name].temperature_power
    p, q = (v / T_t).log_softmax(-1), (z / T).log_softmax(-1)
    return T**power * FORMULAS[name](p, q, y)


def sides(dtype: torch.dtype = torch.float32, near: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's logits, labels."""
    random = torch.Generator().manual_seed(1)
    v = 2 * torch.randn(N, V, generator=random, dtype=torch.float64)
    z = v + near * torch.randn(N, V, generator=random, dtype=torch.float64)
    labels = torch.randint(V, (N,), generator=random)
    return z.to(dtype).requires_grad_(), v.to(dtype).requires_grad_(), labels


def apart(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize("near", [1.0, 1e-3])
def test_each_divergence(name: str, near: float) -> None:
    """With different temperatures, a float mask, a normaliser, a factor, and cross-entropy beside it."""
    z, v, labels = sides(near=near)
    T, T_t = (1.0, 1.0) if name == "logit_mse" else (2.0, 1.5 if near == 1.0 else 2.0)
    mask = torch.linspace(0, 1, N).round(decimals=1)
    loss = kd_loss(
        z,
        v,
        labels,
        divergence=name,
        temperature=T,
        teacher_temperature=T_t,
        kd_weight=0.7,
        ce_weight=0.4,
        kd_mask=mask,
        kd_normalizer=5,
        teacher_gradient=True,
    )
    found = torch.autograd.grad(3 * loss, [z, v])
    z64, v64 = (x.detach().double().requires_grad_() for x in (z, v))
    rows = mask.double() * truth(name, z64, v64, labels, T, T_t)
    expected = 0.7 * rows.sum() / 5 + 0.4 * torch.nn.functional.cross_entropy(z64, labels)
    p, q = (v64 / T_t).softmax(-1), (z64 / T).softmax(-1)
    lost = 1e-6 * max(1.0, ((p.norm() + q.norm()) / (p - q).norm()).item())  # of the difference of the two, in float32
    if name == "total_variation" and near < 1:
        lost = 0.05  # the signs of differences that are rounding
    for one, other in zip(found, torch.autograd.grad(3 * expected, [z64, v64]), strict=True):
        assert apart(one, other) < lost
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_reductions_and_types(reduction: Any, dtype: torch.dtype) -> None:
    """Rows without a label are left out; a transform of either side."""
    z, v, labels = sides(dtype)
    labels[::3] = -100
    teacher = TeacherLogits(v, softcap=5.0, scale=0.8)
    loss = kd_loss(z, teacher, labels, temperature=2.0, logit_softcap=4.0, reduction=reduction, teacher_gradient=True)
    upstream = torch.linspace(0.5, 2, N, dtype=loss.dtype) if reduction == "none" else loss.new_tensor(1.0)
    found = torch.autograd.grad(loss, [z, v], upstream)
    z64, v64 = (x.detach().double().requires_grad_() for x in (z, v))
    capped = 4 * (z64 / 4).tanh(), 5 * (0.8 * v64 / 5).tanh()
    rows = truth("forward_kl", *capped, labels, 2.0, 2.0) * (labels >= 0)
    scalar = {"sum": rows.sum(), "mean": rows.sum() / (labels >= 0).sum(), "none": (rows * upstream).sum()}[reduction]
    rounding = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    for one, other in zip(found, torch.autograd.grad(scalar, [z64, v64]), strict=True):
        assert one.dtype == dtype
        assert apart(one, other) < rounding


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "logit_mse", "dkd"])
def test_from_hidden_states(name: str) -> None:
    """Both heads with biases; the same from a teacher's logits, and from a head in kd_loss."""
    random = torch.Generator().manual_seed(2)
    z, _, labels = sides()
    x, y = (torch.randn(N, h, generator=random).requires_grad_() for h in (H, H + 2))
    a, b = (torch.randn(V, h, generator=random).requires_grad_() for h in (H, H + 2))
    c, d = (torch.randn(V, generator=random).requires_grad_() for _ in range(2))
    leaves = x, a, c, y, b, d
    options: dict[str, Any] = {"divergence": fusedkd.LogitMSE(0.5) if name == "logit_mse" else name}
    options["teacher_gradient"] = True

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher / 2 if name == "logit_mse" else teacher
        return truth(name, student, teacher, labels, 1.0, 1.0).mean()

    doubles = [each.detach().double().requires_grad_() for each in leaves]
    x64, a64, c64, y64, b64, d64 = doubles
    expected = torch.autograd.grad(exact(x64 @ a64.T + c64, y64 @ b64.T + d64), doubles)
    loss = linear_kd_loss(x, a, TeacherHead(y, b, d), labels, student_bias=c, max_tile_bytes=5000, **options)
    for one, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert apart(one, other) < 5e-6
    teacher = (y @ b.T + d).detach().requires_grad_()
    loss = linear_kd_loss(x, a, teacher, labels, student_bias=c, **options)
    (found,) = torch.autograd.grad(loss, teacher)
    v64 = teacher.detach().double().requires_grad_()
    (expected_v,) = torch.autograd.grad(exact((x64 @ a64.T + c64).detach(), v64), v64)
    assert apart(found, expected_v) < 5e-6
    loss = kd_loss(z, TeacherHead(y, b, d), labels, **options)
    of_head = torch.autograd.grad(exact(z.detach().double(), y64 @ b64.T + d64), [y64, b64, d64])
    for one, other in zip(torch.autograd.grad(loss, [y, b, d]), of_head, strict=True):
        assert apart(one, other) < 5e-6


def test_padding_masked_columns_and_rows() -> None:
    """Surplus columns get none; a column that both mask, and a teacher's row of −inf, which does not count, neither."""
    z, v, labels = sides()
    with torch.no_grad():
        z[:, 3] = v[:, 3] = -torch.inf
        v[1] = -torch.inf
    wide = torch.cat([v.detach(), torch.full((N, 6), 9.0)], 1).requires_grad_()
    found = torch.autograd.grad(kd_loss(z, wide, temperature=2.0, teacher_gradient=True), [wide])[0]
    keep = torch.arange(V) != 3
    rows = torch.arange(N) != 1
    v64 = v.detach()[rows][:, keep].double().requires_grad_()
    z64 = z.detach()[rows][:, keep].double()
    (expected,) = torch.autograd.grad(truth("forward_kl", z64, v64, labels, 2.0, 2.0).mean(), v64)
    assert apart(found[rows][:, :V][:, keep], expected) < 1e-6
    assert not found[1].any()
    assert not found[:, V:].any()
    assert not found[:, 3].any()


def test_infinite_loss_shows_and_gives_no_nan() -> None:
    z, v, _ = sides()
    with torch.no_grad():
        z[0, 0] = -torch.inf
    loss = kd_loss(z, v, teacher_gradient=True)
    assert loss.item() == torch.inf
    for gradient in torch.autograd.grad(loss, [z, v]):
        assert gradient.isfinite().all()


def test_several_teachers_and_those_without_a_gradient() -> None:
    z, v, labels = sides()
    frozen = torch.randn(N, V)
    found = torch.autograd.grad(
        kd_loss(z, [v, frozen], labels, teacher_weights=[0.3, 0.7], ce_weight=1.0, teacher_gradient=True), [z, v]
    )
    z64, v64 = (x.detach().double().requires_grad_() for x in (z, v))
    parts = [w * truth("forward_kl", z64, t, labels, 1.0, 1.0).mean() for w, t in ((0.3, v64), (0.7, frozen.double()))]
    expected = sum(parts) + torch.nn.functional.cross_entropy(z64, labels)
    for one, other in zip(found, torch.autograd.grad(expected, [z64, v64]), strict=True):
        assert apart(one, other) < 1e-6


def test_a_generator_reaches_both() -> None:
    """MATE-KD's maximisation: a frozen student and a frozen teacher read the same input."""
    random = torch.Generator().manual_seed(3)
    inputs = torch.randn(N, H, generator=random).requires_grad_()
    student, teacher = (torch.randn(H, V, generator=random) for _ in range(2))
    (found,) = torch.autograd.grad(kd_loss(inputs @ student, inputs @ teacher, teacher_gradient=True), inputs)
    x = inputs.detach().double().requires_grad_()
    rows = truth("forward_kl", x @ student.double(), x @ teacher.double(), torch.zeros(0), 1.0, 1.0)
    (expected,) = torch.autograd.grad(rows.mean(), x)
    assert apart(found, expected) < 2e-6
    (alone,) = torch.autograd.grad(kd_loss(inputs @ student, (inputs @ teacher).detach()), inputs)
    assert apart(alone, expected) > 0.1  # what the option is for


def test_compiled_and_without_gradients() -> None:
    z, v, labels = sides()

    def step(z: Tensor, v: Tensor) -> Tensor:
        return kd_loss(z, v, labels, ce_weight=0.5, teacher_gradient=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(*[torch.autograd.grad(f(z, v), [z, v]) for f in (compiled, step)], strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert not step(z, v).requires_grad
    fixed = v.detach()
    assert torch.equal(torch.autograd.grad(step(z, fixed), z)[0], torch.autograd.grad(step(z, v), z)[0])


def test_refusals() -> None:
    z, v, _ = sides()
    ids = torch.arange(4).repeat(N, 1)
    listed = TeacherTopK(ids, v[:, :4].log_softmax(-1))
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (listed, {}, TypeError, "teacher_gradient needs a teacher of logits or a TeacherHead, not a TeacherTopK"),
        (v, {"inplace": True}, ValueError, "teacher_gradient and inplace exclude each other"),
        (v, {"divergence": fusedkd.SkewReverseKL(0.1, detach_mixture=True)}, ValueError, "has no teacher_gradient"),
    ]
    for teacher, options, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            kd_loss(z, teacher, teacher_gradient=True, **options)
    with pytest.raises(TypeError, match="teacher_gradient must be True or False, not 'yes'"):
        kd_loss(z, v, teacher_gradient="yes")  # type: ignore[call-overload]
    with pytest.warns(UserWarning, match="pass teacher_gradient=True"):
        kd_loss(z, v)


def test_of_no_rows(device: str) -> None:
    student, teacher = (torch.zeros(0, 7, device=device, requires_grad=True) for _ in range(2))
    loss = kd_loss(student, teacher, divergence="jsd", teacher_gradient=True)
    loss.backward()
    assert loss == 0
    assert teacher.grad is not None
    assert student.grad is not None
    assert teacher.grad.shape == student.grad.shape == (0, 7)
