"""Attention maps in plain PyTorch, in the precision of their input: queries and keys ``(B, heads, L, d)`` give one row
of L scores per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkd.reference import softmax
from fusedkd.reference.divergences import Rows


def visible(keys: Tensor | None, length: int, causal: bool) -> Tensor:
    """Which keys each query sees, ``(B or 1, 1, L, L)`` bool: those of `keys` ``(B, L)``; causally none after it."""
    seen = torch.ones(1, 1, length, length, dtype=torch.bool)
    if keys is not None:
        seen = seen.to(keys.device) & (keys != 0)[:, None, None, :]
    return seen.tril() if causal else seen


def scores(q: Tensor, k: Tensor, scale: float, seen: Tensor) -> Tensor:
    """scale·Q·Kᵀ, −inf where a query does not see a key."""
    return torch.where(seen.to(q.device), scale * (q @ k.transpose(-1, -2)), -torch.inf)


def rows(student_scores: Tensor, teacher_scores: Tensor) -> Rows:
    """What the divergences of :mod:`fusedkd.reference.divergences` are given, one row per query."""
    student, teacher = student_scores.flatten(0, -2), teacher_scores.flatten(0, -2)
    return Rows(softmax.log_softmax(teacher), softmax.log_softmax(student), teacher, student, None)


def gradients(d_scores: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of queries and keys, from that of the scores."""
    return scale * (d_scores @ k), scale * (d_scores.transpose(-1, -2) @ q)
