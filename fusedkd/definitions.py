"""What each loss is, in plain PyTorch, in the precision of its input: slow, short, obviously right.

Everything here works on rows: logits ``(N, V)`` give one value per row. The kernels compute what these functions say,
the tests compare with them in float64, and :mod:`fusedkd.fallback` answers with them where the C++ extension was not
built. The divergences are in :mod:`fusedkd.divergences`, and for teachers known at K columns in :mod:`fusedkd.sparse`.
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


def cross_entropy(student: Tensor, labels: Tensor, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """−(1 − ε)·log q_y − ε·mean_j log q_j per row at temperature 1, as in :func:`torch.nn.functional.cross_entropy`.

    A label out of range gives NaN; what ``ignore_index`` means is the caller's business.
    """
    log_q = log_softmax(student)
    legal = (labels >= 0) & (labels < student.shape[-1])
    nll = -log_q.gather(-1, torch.where(legal, labels, 0).unsqueeze(-1)).squeeze(-1)
    smoothing = torch.as_tensor(label_smoothing, dtype=student.dtype, device=student.device)
    hit = torch.where(smoothing == 1, 0, (1 - smoothing) * nll)
    loss = torch.where(smoothing == 0, nll, hit - smoothing * log_q.mean(-1))
    return torch.where(legal, loss, torch.nan)


def cross_entropy_gradient(student: Tensor, labels: Tensor, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """∂CE/∂z = q − (1 − ε)·1_y − ε/V per row; 0 where the label is out of range or the student row is all −inf."""
    legal = (labels >= 0) & (labels < student.shape[-1])
    target = torch.nn.functional.one_hot(torch.where(legal, labels, 0), student.shape[-1]).to(student.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / student.shape[-1]
    dead = (student == -torch.inf).all(-1) | ~legal
    return torch.where(dead.unsqueeze(-1), 0, log_softmax(student).exp() - target)


COSINE_EPSILON = 1e-12
"""Added to both squared norms, as in :func:`torch.nn.functional.cosine_embedding_loss`."""


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cos per row of hidden states ``(N, H)``, cos = x·y / √((Σx² + ε)(Σy² + ε)) (DistilBERT, arXiv:1910.01108,
    §3).

    Written as ½‖ax − by‖² + ε(a² + b²)/2 with a, b the inverse norms, which loses nothing when the two are close.
    """
    a, b = inverse_norm(student), inverse_norm(teacher)
    return 0.5 * (a * student - b * teacher).square().sum(-1) + 0.5 * COSINE_EPSILON * (a**2 + b**2).squeeze(-1)


def cosine_distance_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """∂(1 − cos)/∂x = a·((ax − by) − (1 − cos)·ax) per row."""
    a, b = inverse_norm(student), inverse_norm(teacher)
    return a * ((a * student - b * teacher) - cosine_distance(student, teacher).unsqueeze(-1) * a * student)


def inverse_norm(hidden: Tensor) -> Tensor:
    """(Σx² + ε)^−½ per row, shape ``(N, 1)``. A row above 1 is scaled down first, lest its squares overflow."""
    scale = hidden.detach().abs().amax(-1, keepdim=True).clamp(min=1).reciprocal()
    return scale * ((scale * hidden).square().sum(-1, keepdim=True) + COSINE_EPSILON * scale**2).rsqrt()
