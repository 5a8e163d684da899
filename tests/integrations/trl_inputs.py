"""Rows of logits, and hidden states with their heads, for the losses of TRL's trainers."""

from __future__ import annotations

import torch
from torch import Tensor

B, COMPLETION, VOCABULARY = 2, 6, 48


def rows_of_logits() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, noise = (2 * torch.randn(B, COMPLETION, VOCABULARY, generator=draw) for _ in range(2))
    labels = torch.randint(VOCABULARY, (B, COMPLETION), generator=draw)
    labels[0, :2] = labels[1, 4:] = -100
    return student, student + 0.5 * noise, labels


def heads() -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Student's hidden states, weight, bias; teacher's, of another width; mask."""
    draw = torch.Generator().manual_seed(3)
    shapes = [
        (B, COMPLETION, 16),
        (VOCABULARY, 16),
        (VOCABULARY,),
        (B, COMPLETION, 24),
        (VOCABULARY, 24),
        (VOCABULARY,),
    ]
    *student, hidden_t, weight_t, bias_t = [torch.randn(s, generator=draw) * 0.6 for s in shapes]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
    return student, hidden_t, weight_t, bias_t, mask
