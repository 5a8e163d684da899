"""The distances between hidden states, in plain PyTorch, in the precision of their input: rows ``(N, H)`` give one
value each.
"""

from __future__ import annotations

from torch import Tensor

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
