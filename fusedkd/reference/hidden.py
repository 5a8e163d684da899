"""The distances between hidden states, in plain PyTorch, in the precision of their input: rows ``(N, H)`` give one
value each.

A row is first normalised to x̂ = a·(x − μ): a = 1, μ = 0 (none); a = (Σx² + ε)^−½, μ = 0 (L2); or μ the mean and
a = (Σ(x − μ)²/H + 1e-5)^−½ (layer norm without parameters). A distance is a function of x̂ and ŷ.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

DistanceName: TypeAlias = Literal["mse", "cosine", "smooth_l1"]
NormalizeName: TypeAlias = Literal["l2", "layer_norm"]

COSINE_EPSILON = 1e-12
"""Added to both squared norms, as in :func:`torch.nn.functional.cosine_embedding_loss`; of L2 normalisation too."""
LAYER_NORM_EPSILON = 1e-5
"""Added to the variance, the default of :func:`torch.nn.functional.layer_norm`."""


def hidden_distance(
    student: Tensor, teacher: Tensor, distance: DistanceName = "mse", normalize: NormalizeName | None = None
) -> Tensor:
    """Of each pair of rows, normalised as asked: Σd²/H, d = x̂ − ŷ (``"mse"``); Σ(d²/2 where |d| < 1, else |d| − ½)/H
    (``"smooth_l1"``); 1 − cos (``"cosine"``), which L2 normalisation does not change.
    """
    if distance == "cosine":
        return cosine_distance(*(normalized(x, None if normalize == "l2" else normalize) for x in (student, teacher)))
    d = normalized(student, normalize) - normalized(teacher, normalize)
    if distance == "mse":
        return d.square().mean(-1)
    return (0.5 * d.square()).where(d.abs() < 1, d.abs() - 0.5).mean(-1)


def hidden_gradient(
    student: Tensor, teacher: Tensor, distance: DistanceName = "mse", normalize: NormalizeName | None = None
) -> Tensor:
    """∂D/∂x per row. With g = ∂D/∂x̂ it is g, a·(g − (g·x̂)·x̂) or a·(g − mean g − mean(g·x̂)·x̂)."""
    if distance == "cosine" and normalize == "l2":
        normalize = None
    x, y = normalized(student, normalize), normalized(teacher, normalize)
    if distance == "cosine":
        g = cosine_distance_gradient(x, y)
    else:
        g = (2 * (x - y) if distance == "mse" else (x - y).clamp(-1, 1)) / x.shape[-1]
    if normalize is None:
        return g
    if normalize == "l2":
        return inverse_norm(student) * (g - (g * x).sum(-1, keepdim=True) * x)
    return inverse_deviation(student) * (g - g.mean(-1, keepdim=True) - (g * x).mean(-1, keepdim=True) * x)


def normalized(hidden: Tensor, normalize: NormalizeName | None) -> Tensor:
    """x̂ of rows ``(N, H)``."""
    if normalize is None:
        return hidden
    if normalize == "l2":
        return inverse_norm(hidden) * hidden
    scale = down(hidden)
    return inverse_deviation(hidden) / scale * centred(scale * hidden)


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


def down(hidden: Tensor) -> Tensor:
    """What a row above 1 is scaled by, lest its squares overflow, shape ``(N, 1)``."""
    return hidden.detach().abs().amax(-1, keepdim=True).clamp(min=1).reciprocal()


def centred(hidden: Tensor) -> Tensor:
    return hidden - hidden.mean(-1, keepdim=True)


def inverse_norm(hidden: Tensor) -> Tensor:
    """(Σx² + ε)^−½ per row, shape ``(N, 1)``."""
    scale = down(hidden)
    return scale * ((scale * hidden).square().sum(-1, keepdim=True) + COSINE_EPSILON * scale**2).rsqrt()


def inverse_deviation(hidden: Tensor) -> Tensor:
    """(Σ(x − μ)²/H + 1e-5)^−½ per row, shape ``(N, 1)``."""
    scale = down(hidden)
    variance = centred(scale * hidden).square().mean(-1, keepdim=True)
    return scale * (variance + LAYER_NORM_EPSILON * scale**2).rsqrt()
