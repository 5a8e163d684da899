"""Logits in plain PyTorch, in the precision of its input: soft-cap and scale, log-softmax, cross-entropy. Logits
``(N, V)`` give one value per row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cap_and_scale(logits: Tensor, softcap: float | Tensor = 0.0, scale: float | Tensor = 1.0) -> Tensor:
    """c·tanh(scale·z/c), or scale·z where the cap c is 0 (none); −inf, a masked column, stays −inf (Gemma 2,
    arXiv:2408.00118, §2).
    """
    softcap, scale = (torch.as_tensor(x, dtype=logits.dtype, device=logits.device) for x in (softcap, scale))
    scaled = logits * scale
    capped = softcap * torch.tanh(scaled / torch.where(softcap > 0, softcap, 1))
    return torch.where((softcap > 0) & (logits != -torch.inf), capped, scaled)


def cap_and_scale_derivative(logits: Tensor, softcap: float | Tensor = 0.0, scale: float | Tensor = 1.0) -> Tensor:
    """d/dz of :func:`cap_and_scale`: scale·4e/(1+e)² with e = exp(−2|scale·z/c|), which 1 − tanh² would lose far from
    0.
    """
    softcap, scale = (torch.as_tensor(x, dtype=logits.dtype, device=logits.device) for x in (softcap, scale))
    e = torch.exp(-2 * (logits * scale / torch.where(softcap > 0, softcap, 1)).abs())
    return scale * torch.where(softcap > 0, 4 * e / (1 + e) ** 2, 1)


def log_softmax(x: Tensor) -> Tensor:
    """log softmax over the last dimension; a row that is all −inf stays −inf instead of NaN."""
    return torch.where((x == -torch.inf).all(-1, keepdim=True), -torch.inf, torch.log_softmax(x, -1))


def cross_entropy(
    student: Tensor, labels: Tensor, label_smoothing: float | Tensor = 0.0, z_loss_weight: float | Tensor = 0.0
) -> Tensor:
    """−(1 − ε)·log q_y − ε·mean_j log q_j per row at temperature 1, as in :func:`torch.nn.functional.cross_entropy`,
    and z_loss_weight·(log Σe^z)² (PaLM, arXiv:2204.02311, §5).

    A label out of range gives NaN; what ``ignore_index`` means is the caller's business.
    """
    log_q = log_softmax(student)
    legal = (labels >= 0) & (labels < student.shape[-1])
    nll = -log_q.gather(-1, torch.where(legal, labels, 0).unsqueeze(-1)).squeeze(-1)
    smoothing = torch.as_tensor(label_smoothing, dtype=student.dtype, device=student.device)
    hit = torch.where(smoothing == 1, 0, (1 - smoothing) * nll)
    loss = torch.where(smoothing == 0, nll, hit - smoothing * log_q.mean(-1))
    weight = torch.as_tensor(z_loss_weight, dtype=student.dtype, device=student.device)
    loss = loss + torch.where(weight == 0, 0, weight * student.logsumexp(-1).square())
    return torch.where(legal, loss, torch.nan)


def cross_entropy_gradient(
    student: Tensor, labels: Tensor, label_smoothing: float | Tensor = 0.0, z_loss_weight: float | Tensor = 0.0
) -> Tensor:
    """∂CE/∂z = (1 + 2·z_loss_weight·log Σe^z)·q − (1 − ε)·1_y − ε/V per row; 0 where the label is out of range or the
    student row is all −inf.
    """
    legal = (labels >= 0) & (labels < student.shape[-1])
    target = torch.nn.functional.one_hot(torch.where(legal, labels, 0), student.shape[-1]).to(student.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / student.shape[-1]
    dead = (student == -torch.inf).all(-1) | ~legal
    share = 1 + 2 * z_loss_weight * student.logsumexp(-1, keepdim=True)
    return torch.where(dead.unsqueeze(-1), 0, share * log_softmax(student).exp() - target)
