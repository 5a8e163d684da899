"""Tensors that stand for others: fake and meta ones, and those of a tracer. A loss asks none of them for its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from truth import pair, targets

from fusedkd import TeacherHead, TeacherSamples, TeacherTopK, cosine_hidden_loss, kd_loss, linear_kd_loss

N, V, H = 6, 30, 8
OPTIONS: dict[str, Any] = {"ce_weight": 0.5, "temperature": 2.0}
Tensors = tuple[Tensor, ...]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": lambda x, w, v, ids, y: kd_loss(x @ w.T, v, y, **OPTIONS),
    "dkd": lambda x, w, v, ids, y: kd_loss(x @ w.T, v, y, divergence="dkd", **OPTIONS),
    "inplace": lambda x, w, v, ids, y: kd_loss(x @ w.T, v, y, inplace=True, **OPTIONS),
    "top-k": lambda x, w, v, ids, y: kd_loss(x @ w.T, TeacherTopK(ids, v.log_softmax(-1)[:, :3]), y, **OPTIONS),
    "samples": lambda x, w, v, ids, y: kd_loss(x @ w.T, TeacherSamples(ids, v[:, :3].square()), y, ce_weight=0.5),
    "linear": lambda x, w, v, ids, y: linear_kd_loss(x, w, v, y, **OPTIONS),
    "linear head": lambda x, w, v, ids, y: linear_kd_loss(x, w, TeacherHead(v[:, :H], w.detach()), y, **OPTIONS),
    "cosine": lambda x, w, v, ids, y: cosine_hidden_loss(x, v[:, :H], y) + w.square().sum(),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def tensors(device: str) -> Tensors:
    hidden, weight = pair(N, H, device=device)[0], pair(V, H, device=device, seed=5)[0]
    ids = torch.tensor([1, 4, 7], device=device).expand(N, 3)
    return hidden, weight, pair(N, V, device=device)[1], ids, targets(N, classes=V, device=device)


def gradients(name: str, hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensors:
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = LOSSES[name](x, w, *rest)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


@every_loss
def test_fake_tensors(device: str, name: str) -> None:
    real = tensors(device)
    with FakeTensorMode() as mode:
        found = gradients(name, *[mode.from_tensor(x) for x in real])
    for fake, expected in zip(found, gradients(name, *real), strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (expected.shape, expected.dtype, expected.device)


def test_fake_tensors_leave_no_trace(device: str) -> None:
    """Memory estimators and tracers call with fake tensors between real calls."""
    student, teacher = pair(3, 10, device=device)
    real = kd_loss(student, teacher, temperature=1.75)
    for temperature in (1.75, 1.875):
        with FakeTensorMode() as mode:
            fake = kd_loss(mode.from_tensor(student), mode.from_tensor(teacher), temperature=temperature)
        assert fake.shape == real.shape
    assert torch.equal(kd_loss(student, teacher, temperature=1.75), real)
    assert kd_loss(student, teacher, temperature=1.875) > 0


@every_loss
def test_meta_tensors(device: str, name: str) -> None:
    real = tensors(device)
    found = gradients(name, *[x.to("meta") for x in real])
    for meta, expected in zip(found, gradients(name, *real), strict=True):
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (expected.shape, expected.dtype)


@every_loss
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(device: str, name: str, mode: str) -> None:
    """What it traces computes loss and gradients of other tensors."""
    real = tensors(device)

    def step(*given: Tensor) -> Tensors:
        return gradients(name, *given)

    traced = make_fx(step, tracing_mode=mode)(*real)
    others = (*[x + 0.1 for x in real[:3]], *real[3:])
    for found, expected in zip(traced(*others), step(*others), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert expected.any()
