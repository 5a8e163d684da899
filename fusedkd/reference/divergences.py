"""What each divergence is, one function for each :class:`~fusedkd.backends.layout.KernelId`: value ``(N,)`` and
gradient ``(N, C)`` with respect to s.

Notation: s = z/T student, t = v/T teacher, q = softmax(s), p = softmax(t), δ = log p − log q. Where −inf masks a column
on both sides it contributes nothing. NaN or +inf on a common column of either side makes D NaN, and its gradient on all
common columns, whatever the coefficients; without a softmax it stays in its column, and an infinite D has gradient 0.
Gradients are w − q·Σw with w = q·∂D/∂q.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What a definition sees of N rows over C columns: log-probabilities at their temperatures, raw logits, labels."""

    log_p: Tensor
    log_q: Tensor
    teacher: Tensor
    student: Tensor
    labels: Tensor | None

    @property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @property
    def q(self) -> Tensor:
        return self.log_q.exp()


def kl_terms(log_p: Tensor, log_m: Tensor) -> Tensor:
    """p·log(p/m) per column: 0 where p is masked, +inf where only m is."""
    terms = torch.where(log_m == -torch.inf, torch.inf, log_p.exp() * (log_p - log_m))
    return torch.where(log_p == -torch.inf, 0, terms)


def weighted(a: Tensor, x: Tensor) -> Tensor:
    """a·x, and 0 where a is, even if x is infinite."""
    return torch.where(a == 0, 0, a * x)


def chain(w: Tensor, log_q: Tensor) -> Tensor:
    """From w = q·∂D/∂q to ∂D/∂s, through the softmax; 0 where the student masks the column."""
    w = torch.where(log_q == -torch.inf, 0, w)
    return w - log_q.exp() * w.sum(-1, keepdim=True)


def forward_kl(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p‖q); gradient q − p."""
    return kl_terms(r.log_p, r.log_q).sum(-1), r.q - r.p


def jeffreys(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """a₀·KL(p‖q) + a₁·KL(q‖p)."""
    terms = weighted(a[0], kl_terms(r.log_p, r.log_q)) + weighted(a[1], kl_terms(r.log_q, r.log_p))
    return terms.sum(-1), a[0] * (r.q - r.p) + weighted(a[1], chain(r.q * (r.log_q - r.log_p), r.log_q))


def mixture(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """a₀·KL(p‖m) + a₁·KL(q‖m), m = a₂·p + (1 − a₂)·q. Gradient: w = a₁·q·log(q/m) − a₃·(q/m)·(p − q)."""
    log_m = torch.logaddexp(a[2].log() + r.log_p, torch.log1p(-a[2]) + r.log_q)
    terms = weighted(a[0], kl_terms(r.log_p, log_m)) + weighted(a[1], kl_terms(r.log_q, log_m))
    ratio = r.log_q - log_m
    w = weighted(a[1], r.q * ratio) - weighted(a[3], ratio.exp() * (r.p - r.q))
    return terms.sum(-1), chain(w, r.log_q)


def alpha_beta(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """(α/s·p^s + β/s·q^s − p^α q^β)/(αβ), α = a₀, β = a₁, s = α + β, and its limits. w = (q^s − p^α q^β)/α."""
    alpha, beta = a[0], a[1]
    s = alpha + beta
    P, Q = (s * r.log_p).exp(), (s * r.log_q).exp()
    both = (r.log_p == -torch.inf) & (r.log_q == -torch.inf)
    if alpha == 0:
        terms, w = (kl_terms(s * r.log_q, s * r.log_p) - Q + P) / s**2, Q * (r.log_q - r.log_p)
    elif beta == 0:
        terms, w = (kl_terms(s * r.log_p, s * r.log_q) - P + Q) / s**2, (Q - P) / alpha
    else:
        G = (alpha * r.log_p + beta * r.log_q).exp()
        terms, w = (alpha / s * P + beta / s * Q - G) / (alpha * beta), (Q - G) / alpha
    return torch.where(both, 0, terms).sum(-1), chain(torch.where(both, 0, w), r.log_q)


def total_variation(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """½·Σ|p − q|; w = ½·q·sign(q − p)."""
    delta = r.log_q - r.log_p
    sign = torch.where(delta.isnan(), delta, delta.sign())  # PyTorch's sign of NaN is 0
    return 0.5 * (r.p - r.q).abs().sum(-1), chain(0.5 * r.q * sign, r.log_q)


def total(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """Jeffreys of a₀, a₁ + a₆·total variation."""
    (value, gradient), (more, slope) = jeffreys(r, a), total_variation(r, a)
    return value + weighted(a[6], more), gradient + weighted(a[6], slope)


def mixed_total(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the mixture of a₂ … a₅."""
    (value, gradient), (more, slope) = total(r, a), mixture(r, a[2:])
    return value + more, gradient + slope


def logit_mse(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of (z − a₀·v)². The gradient is with respect to z."""
    both = (r.student == -torch.inf) & (r.teacher == -torch.inf)
    distance = torch.where(both, 0, r.student - a[0] * r.teacher)
    return distance.square().mean(-1), 2 * distance / distance.shape[-1]


def dkd(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """a₀·KL(b(p)‖b(q)) + a₁·KL(p̂‖q̂). Gradient: a₀·(q_y − p_y) at the label; a₁·(q̂ − p̂) − a₀·(q_y − p_y)·q̂ elsewhere.

    Without a finite column beside the label, on either side, the second part is 0.
    """
    assert r.labels is not None
    legal = (r.labels >= 0) & (r.labels < r.log_q.shape[-1])
    y = torch.where(legal, r.labels, 0).unsqueeze(-1)
    others_p, others_q = (x.scatter(-1, y, -torch.inf) for x in (r.log_p, r.log_q))
    rest_p, rest_q = others_p.logsumexp(-1, keepdim=True), others_q.logsumexp(-1, keepdim=True)
    target_p, target_q = r.log_p.gather(-1, y), r.log_q.gather(-1, y)
    binary = (kl_terms(target_p, target_q) + kl_terms(rest_p, rest_q)).squeeze(-1)
    hat_p, hat_q = (torch.where(n == -torch.inf, n, x - n) for x, n in ((others_p, rest_p), (others_q, rest_q)))
    empty = (rest_p == -torch.inf) | (rest_q == -torch.inf)
    others = torch.where(empty, 0, kl_terms(hat_p, hat_q)).sum(-1)
    value = weighted(a[0], binary) + weighted(a[1], others)
    pull = a[0] * (target_q.exp() - target_p.exp())
    gradient = torch.where(empty, 0, a[1] * (hat_q.exp() - hat_p.exp())) - pull * hat_q.exp()
    return torch.where(legal, value, torch.nan), torch.where(legal.unsqueeze(-1), gradient.scatter(-1, y, pull), 0)
