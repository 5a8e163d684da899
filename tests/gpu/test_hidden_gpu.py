"""hidden_loss where only a GPU shows it: CUDA graphs, many rows, determinism. Values and gradients: test_hidden.py."""

from __future__ import annotations

import pytest
import torch
from graphs import capture
from torch import Tensor
from truth import assert_gradient, assert_value, hidden_truth, pair

from fusedkd import hidden_loss
from fusedkd.backends import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KIND = {"distance": "smooth_l1", "normalize": "layer_norm"}


def test_in_a_cuda_graph() -> None:
    """Captured once and replayed on other data: no synchronisation, no allocation that outlives the capture."""
    x, y = pair(4, 33, 768, dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(4, 33, device="cuda", dtype=torch.bool)
    x.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = hidden_loss(x, [y[..., :256].contiguous(), y[..., 256:].contiguous()], mask, **KIND)
        return loss, torch.autograd.grad(loss, x)[0]

    graph, (loss, gradient) = capture(step)
    with torch.no_grad():
        x.copy_(x.flip(0) + 1)
        mask[2] = False
    graph.replay()
    truth = hidden_truth(x, y, mask, **KIND)
    assert_value(loss, truth.loss)
    assert_gradient(gradient, truth)


def test_deterministic_and_served_by_triton() -> None:
    assert dispatch.serving["hidden_forward", "CUDA"][0] == "Triton", dispatch.serving["hidden_forward", "CUDA"]
    x, y = pair(64, 64, 4096, dtype=torch.bfloat16, device="cuda")
    x.requires_grad_()
    first, second = (torch.autograd.grad(hidden_loss(x, y, normalize="l2"), x)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_many_rows() -> None:
    """More rows than a grid has in y or z, and offsets past 2³¹ elements."""
    x = torch.randn(280_000, 8192, dtype=torch.bfloat16, device="cuda")
    y = x.clone()
    y[-1] = pair(1, 8192, dtype=torch.bfloat16, device="cuda")[1]
    x.requires_grad_()
    loss = hidden_loss(x, y, distance="cosine", reduction="sum")
    loss.backward()
    truth = hidden_truth(x[-1:], y[-1:], distance="cosine", reduction="sum")
    assert_value(loss, truth.loss)
    assert_gradient(x.grad[-1:], truth)
    assert x.grad[:-1].abs().max() < 1e-6 * x.grad[-1].abs().max()
