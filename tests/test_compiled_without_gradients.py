"""Losses of any number of tensors in one compiled graph, where no input requires a gradient: an evaluation step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedkd

N, H = 6, 8


def sized(*widths: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(N, width, generator=random) for width in widths]


WEIGHT, BIAS = torch.randn(H, 5), torch.randn(H)
PIECES = {1: (8,), 2: (3, 5), 3: (2, 2, 4)}
LAYERS = ((1, 1), (1, 2), (2, 1))

Case = tuple[Callable[..., Any], list[Tensor]]
CASES: dict[str, Case] = {}
for count, widths in PIECES.items():
    CASES[f"{count} pieces"] = lambda x, *t: fusedkd.hidden_loss(x, list(t)), sized(H, *widths)
    CASES[f"{count} pieces behind a projection"] = (
        lambda x, *t: fusedkd.hidden_loss(x, list(t), projection=WEIGHT, bias=BIAS),
        sized(5, *widths),
    )
for m, k in LAYERS:
    for loss in (fusedkd.layer_attention_loss, fusedkd.pairwise_layer_mse):
        CASES[f"{loss.__name__}, {m} and {k} layers"] = (
            lambda *x, loss=loss, m=m: loss(list(x[:m]), list(x[m:])),
            sized(*[H] * (m + k)),
        )
CASES["several teachers"] = lambda z, *v: fusedkd.kd_loss(z, list(v)), sized(H, H, H)


@pytest.mark.parametrize("name", CASES)
def test_as_in_eager_mode(name: str) -> None:
    loss, tensors = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
