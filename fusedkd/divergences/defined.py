"""Divergences that have no kernel: each is its `definition`, which PyTorch's autograd differentiates in float64, some
rows at a time (:mod:`fusedkd.backends.defined`). What a source takes for a constant is detached here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedkd.checks import Real, flag, real
from fusedkd.divergences.base import Divergence, kl, tensor


@dataclass(frozen=True, eq=False)
class TAID(Divergence):
    """KL(m‖q), m = softmax of t·v/T + (1 − t)·z/T, where z is a constant: a teacher on the way from the student, t = 0,
    to the teacher, t = 1 (TAID, arXiv:2501.16937).

    t in [0, 1]. The source moves it from 0.4 to 1 over the training: a 0-d tensor, which the training loop fills.
    """

    t: Real = 0.4
    name, columns = "taid", "alike"

    def __post_init__(self) -> None:
        real("t", self.t, high=1.0, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return (self.t,)

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        (t,) = self.coefficients()
        log_m = t * log_p + (1 - t) * log_q.detach()
        return torch.where(_empty(log_m), torch.inf, kl(log_m.log_softmax(-1), log_q).sum(-1))


def _empty(log_m: Tensor) -> Tensor:
    """Rows of mixtures without a column that both sides have: where one masks it, log m is some share of −1e30."""
    return log_m.detach().amax(-1) < -1e15


@dataclass(frozen=True, eq=False)
class ToDi(Divergence):
    """Σ [w·p·log(p/q) + (1 − w)·q·log(q/p)], w = σ(beta·log(p/q)) of each column, a constant: forward KL where the
    student has too little, reverse KL where it has too much (ToDi, arXiv:2505.16297). beta ≥ 0.
    """

    beta: Real = 1.0
    name, columns = "todi", "sum"

    def __post_init__(self) -> None:
        real("beta", self.beta, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return (self.beta,)

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        (beta,) = self.coefficients()
        steep = beta * (log_p - log_q).detach()
        return (steep.sigmoid() * kl(log_p, log_q) + (-steep).sigmoid() * kl(log_q, log_p)).sum(-1)


@dataclass(frozen=True, eq=False)
class AdaptiveKL(Divergence):
    """w·KL(p‖q) + (1 − w)·KL(q‖p), w the share of Σ|p − q| that lies in the teacher's head, a constant: its highest
    columns whose p add up to at most `head`, and the highest in any case (AKL, arXiv:2404.02657).

    `head` in [0, 1]. Columns of the same p are of the head in the order of their numbers.
    """

    head: Real = 0.5
    name = "adaptive_kl"

    def __post_init__(self) -> None:
        real("head", self.head, high=1.0, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return (self.head,)

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        (head,) = self.coefficients()
        p, q = log_p.detach().exp(), log_q.detach().exp()
        p, order = p.sort(dim=-1, descending=True, stable=True)
        gap = (p - q.gather(-1, order)).abs()
        inside = p.cumsum(-1) <= head
        inside[:, 0] = True
        in_head, all_of_it = torch.where(inside, gap, 0).sum(-1, keepdim=True), gap.sum(-1, keepdim=True)
        w = torch.where(all_of_it > 0, in_head / all_of_it, 0.5)
        return (w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)).sum(-1)


@dataclass(frozen=True, eq=False)
class AMiD(Divergence):
    """KL(p‖m), or with `reverse` KL(q‖m), m ∝ (share·p^e + (1 − share)·q^e)^(1/e) with e = (1 − alpha)/2: at alpha = −1
    the arithmetic mean of teacher and student, which makes it a skew divergence, at alpha = 1 the geometric one,
    p^share·q^(1 − share) (AMiD, arXiv:2510.15982).

    `share` in [0, 1]: of the teacher in m, through which the gradient goes. From alpha = 1 on m is 0 where either side
    is.
    """

    alpha: Real = 1.0
    share: Real = 0.1
    reverse: bool = False
    name, columns = "amid", "alike"

    def __post_init__(self) -> None:
        real("alpha", self.alpha, low=float("-inf"), per_row=True)
        real("share", self.share, high=1.0, per_row=True)
        flag("reverse", self.reverse)

    def coefficients(self) -> tuple[Real, ...]:
        return self.alpha, self.share

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        alpha, share = (tensor(a, log_q) for a in self.coefficients())
        e = (1 - alpha) / 2
        geometric = share * log_p + (1 - share) * log_q
        some = torch.where(e == 0, 1, e)
        powers = torch.logaddexp(share.log() + some * log_p, torch.log1p(-share) + some * log_q)
        log_m = torch.where(e == 0, geometric, powers / some)
        found = kl(log_q if self.reverse else log_p, log_m.log_softmax(-1))
        return torch.where(_empty(log_m), torch.inf, found.sum(-1))


@dataclass(frozen=True, eq=False)
class LK(Divergence):
    """w·KL(p‖q) + (1 − w)·TV, TV = ½·Σ|p − q|, w = e^(−decay·a), a constant: of a drafting model, whose tokens the
    teacher accepts with probability a = Σ min(p, q) = 1 − TV (LK, arXiv:2602.23881). decay ≥ 0; published at T = 1.
    """

    decay: Real = 3.0
    name, columns, temperature_power = "lk", "alike", 1

    def __post_init__(self) -> None:
        real("decay", self.decay, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return (self.decay,)

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        (decay,) = self.coefficients()
        p, q = log_p.exp(), log_q.exp()
        w = (-decay * torch.minimum(p, q).sum(-1, keepdim=True)).detach().exp()
        return (w * kl(log_p, log_q) + (1 - w) * 0.5 * (p - q).abs()).sum(-1)


@dataclass(frozen=True, eq=False)
class NLA(Divergence):
    """−log a, a = Σ min(p, q) = 1 − TV: the negative logarithm of the probability with which the teacher accepts a
    token that the student drafts (LK, arXiv:2602.23881). Published at T = 1.
    """

    name, columns, temperature_power = "nla", "alike", 1

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return -torch.minimum(log_p.exp(), log_q.exp()).sum(-1).log()
