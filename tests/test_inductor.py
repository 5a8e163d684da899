"""The losses with their defaults, and several members of one loss, in one graph of torch.compile's own backend: what
`aot_eager` accepts Inductor may not lower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from truth import INTERPRETED

import fusedkd
from fusedkd import TeacherHead, TeacherTopK, kd_loss, linear_kd_loss

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles nothing")

N, H, V = 4, 6, 9
random = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=random)


mask, ids = torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.tensor([[0, 3, 5], [8, 2, 1], [4, 5, 6], [7, 0, 3]])
labels, logprobs = ids[:, 0], -1.0 - normal(N, 3).abs()
hidden, head, logits, other = normal(N, H), normal(V, H), normal(N, V), normal(N, V)
layers = [normal(2, 5, 8) for _ in range(4)]
heads = [normal(2, 2, 5, 4) for _ in range(4)]
TWO: Any = [(1.0, "forward_kl"), (0.5, "alpha_beta")]
SUM: Any = [(1.0, "forward_kl"), (0.5, "total_variation")]

CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "kd": (lambda z: kd_loss(z, other), [logits]),
    "kd, per row": (lambda z: kd_loss(z, other, reduction="none"), [logits]),
    "kd, top-k": (lambda z: kd_loss(z, TeacherTopK(ids, logprobs, tail="bucket")), [logits]),
    "kd, two teachers": (lambda z: kd_loss(z, [other, other + logits], kd_mask=mask), [logits]),
    "kd, two divergences": (lambda z: kd_loss(z, other, divergence=TWO, kd_mask=mask), [logits]),
    "kd, a sum": (lambda z: kd_loss(z, other, divergence=SUM), [logits]),
    "kd, both sides": (lambda z, v: kd_loss(z, v, divergence=TWO, teacher_gradient=True), [logits, other]),
    "linear": (lambda x, w: linear_kd_loss(x, w, other), [hidden, head]),
    "linear, per row": (lambda x, w: linear_kd_loss(x, w, other, reduction="none"), [hidden, head]),
    "linear, two divergences": (
        lambda x, w: linear_kd_loss(x, w, TeacherHead(hidden.cos(), head.sin()), divergence=TWO, kd_mask=mask),
        [hidden, head],
    ),
    "linear, both sides": (
        lambda x, w, y, u: linear_kd_loss(x, w, TeacherHead(y, u), divergence=TWO, teacher_gradient=True),
        [hidden, head, hidden.cos(), head.sin()],
    ),
    "hidden": (lambda x: fusedkd.hidden_loss(x, layers[1]), layers[:1]),
    "attention": (lambda q, k: fusedkd.attention_kl_loss(q, k, *heads[2:]), heads[:2]),
    "scores": (lambda q, k: fusedkd.attention_mse_loss(q, k, *heads[2:]), heads[:2]),
    "layer attention": (lambda *x: fusedkd.layer_attention_loss(list(x), layers[2:]), layers[:2]),
    "layer pairs": (lambda *x: fusedkd.pairwise_layer_mse(list(x), layers[2:]), layers[:2]),
    "contrastive": (lambda x: fusedkd.contrastive_hidden_loss(x, hidden.cos()), [hidden]),
    "sampled": (lambda z: fusedkd.sampled_kl_loss(z, logprobs[:, 0], labels), [logits]),
    "linear, sampled": (lambda x, w: fusedkd.linear_sampled_kl_loss(x, w, logprobs[:, 0], labels), [hidden, head]),
}


@pytest.mark.parametrize("name", CASES)
def test_as_in_eager_mode(name: str) -> None:
    loss, tensors = CASES[name]
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value.sum(), leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert results[0][1].norm() > 0.01


@pytest.mark.parametrize("name", ["linear", "layer attention"])
def test_without_gradients(name: str) -> None:
    loss, tensors = CASES[name]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(*tensors), loss(*tensors))
