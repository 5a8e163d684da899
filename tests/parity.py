"""What the parity tests share: losses as other codes define them, in float64, beside ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

B, L, H, WIDE, HEADS, D = 3, 7, 24, 40, 4, 6
"""Batch, length, columns of the student and of a wider teacher, heads and their columns."""
LENGTHS = (7, 4, 1)
"""Tokens of each sentence, in front of its padding."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    return (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).long()


masked = pytest.mark.parametrize("mask", [None, mask()], ids=["all", "mask"])


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Value and gradients."""
    results = []
    for function in (ours, theirs):
        own = [x.clone().requires_grad_() for x in leaves]
        loss = function(*own)
        results.append((loss.detach(), torch.autograd.grad(loss, own)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-14)
    for found, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-13)
        assert expected.norm() > 1e-4


def entropy(scores: Tensor) -> Tensor:
    """Of the teacher, by row: what a cross-entropy has beside the divergence."""
    return -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)


def scores(q: Tensor, k: Tensor, keys: Tensor | None = None) -> Tensor:
    """As BERT makes them: 10,000 is subtracted of keys that are padding."""
    found = q @ k.mT / q.shape[-1] ** 0.5
    return found if keys is None else found - 10_000 * (1 - keys.double())[:, None, None]
