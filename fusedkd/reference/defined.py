"""What each divergence without a kernel is, one function by the name of its family: value ``(N,)`` and gradient
``(N, C)`` with respect to s, in the notation and by the rules of :mod:`fusedkd.reference.divergences`. ``a``: the
family's parameters in their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkd.reference.divergences import Rows, chain, forward_kl, kl_terms, total_variation, weighted
from fusedkd.reference.softmax import log_softmax


def taid(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """KL(m‖q), log m = t·log p + (1 − t)·log q − log Σ, constant; gradient q − m."""
    log_m = log_softmax(weighted(a[0], r.log_p) + weighted(1 - a[0], r.log_q))
    nowhere = (log_m == -torch.inf).all(-1)  # no column that both sides have
    return torch.where(nowhere, torch.inf, kl_terms(log_m, r.log_q).sum(-1)), r.q - log_m.exp()


def todi(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """Σ [u·p·δ − (1 − u)·q·δ], u = σ(βδ) constant; w = (1 − u)·q·(1 − δ) − u·p."""
    delta = torch.where((r.log_p == -torch.inf) & (r.log_q == -torch.inf), 0, r.log_p - r.log_q)
    u, rest = (weighted(a[0], sign * delta).sigmoid() for sign in (1, -1))
    terms = weighted(u, kl_terms(r.log_p, r.log_q)) + weighted(rest, kl_terms(r.log_q, r.log_p))
    return terms.sum(-1), chain(rest * r.q * (1 - delta) - u * r.p, r.log_q)


def adaptive_kl(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """u·KL(p‖q) + (1 − u)·KL(q‖p), u constant: of Σ|p − q| the share of the columns that are among the teacher's
    highest, which together have at most a₀ of it, or are the highest.
    """
    order = r.log_p.sort(dim=-1, descending=True, stable=True).indices
    p, gap = r.p.gather(-1, order), (r.p - r.q).abs().gather(-1, order)
    head = (p.cumsum(-1) <= a[0]) | (torch.arange(p.shape[-1]) == 0)
    total = gap.sum(-1)
    u = torch.where(total == 0, 0.5, torch.where(head, gap, 0).sum(-1) / total)
    value = weighted(u, kl_terms(r.log_p, r.log_q).sum(-1)) + weighted(1 - u, kl_terms(r.log_q, r.log_p).sum(-1))
    u = u.unsqueeze(-1)
    return value, u * (r.q - r.p) + (1 - u) * chain(r.q * (r.log_q - r.log_p), r.log_q)


def amid(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p‖m), or with a₂ KL(q‖m); r = (a₁·p^e + (1 − a₁)·q^e)^(1/e), e = (1 − a₀)/2, or p^a₁·q^(1 − a₁); m = r/Σr.

    With c = ∂log r/∂log q = (1 − a₁)·(q/r)^e: w = c·(m − p), or q·(log(q/m) − c) + c·m.
    """
    e, share, reverse = (1 - a[0]) / 2, a[1], a[2] != 0
    if e == 0:
        log_r = weighted(share, r.log_p) + weighted(1 - share, r.log_q)
        c = (1 - share).expand_as(log_r)
    else:
        log_r = torch.logaddexp(share.log() + e * r.log_p, torch.log1p(-share) + e * r.log_q) / e
        c = (1 - share) * (e * (r.log_q - log_r)).exp()
    log_m = log_softmax(log_r)
    m = log_m.exp()
    on = r.log_q > -torch.inf
    c = torch.where(on & (log_r > -torch.inf), c, 0)
    w = torch.where(on, r.q * (r.log_q - log_m - c), 0) + c * m if reverse else c * (m - r.p)
    return kl_terms(r.log_q if reverse else r.log_p, log_m).sum(-1), chain(w, r.log_q)


def lk(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """u·KL(p‖q) + (1 − u)·TV, u = e^(−a₀·Σ min(p, q)) constant."""
    u = (-a[0] * torch.minimum(r.p, r.q).sum(-1)).exp()
    (kl, d_kl), (tv, d_tv) = forward_kl(r, a), total_variation(r, a)
    return weighted(u, kl) + (1 - u) * tv, u.unsqueeze(-1) * d_kl + (1 - u).unsqueeze(-1) * d_tv


def nla(r: Rows, a: Tensor) -> tuple[Tensor, Tensor]:
    """−log a, a = Σ min(p, q) = 1 − TV; gradient that of TV over a."""
    accepted = torch.minimum(r.p, r.q).sum(-1)
    return -accepted.log(), total_variation(r, a)[1] / accepted.unsqueeze(-1)
