"""What a careful user writes in plain PyTorch: an expression per divergence, and per teacher known at K columns.

Each takes the student's logits z, the teacher's v or what is known of it, and the temperature, and returns D, its mean
over rows. A family of :data:`fusedkd.divergences.FAMILIES` without an expression here is measured
without this comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkd import TeacherSamples, TeacherTopK

LOW = -1e4
"""Far below any logit: a softmax without this column, and no inf − inf."""


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q)."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def at(x: Tensor, t: float) -> Tensor:
    """x/T, without a copy at T = 1."""
    return x / t if t != 1 else x


def log_softmaxes(z: Tensor, v: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """(log p, log q)."""
    return F.log_softmax(at(v, t), -1), F.log_softmax(at(z, t), -1)


# -------------------------------------------------- divergences of (z, v, labels, family, temperature)


def forward_kl(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    log_p, log_q = log_softmaxes(z, v, t)
    return kl(log_p, log_q)


def reverse_kl(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    log_p, log_q = log_softmaxes(z, v, t)
    return kl(log_q, log_p)


def jeffreys(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    log_p, log_q = log_softmaxes(z, v, t)
    return family.forward * kl(log_p, log_q) + family.reverse * kl(log_q, log_p)


def mixed(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share·p + (1 − share)·q), through logarithms, where nothing underflows."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def jsd(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    log_p, log_q = log_softmaxes(z, v, t)
    log_m = mixed(log_p, log_q, family.beta)
    return family.beta * kl(log_p, log_m) + (1 - family.beta) * kl(log_q, log_m)


def skew_kl(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    log_p, log_q = log_softmaxes(z, v, t)
    return kl(log_p, mixed(log_p, log_q, family.alpha))


def skew_reverse_kl(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    log_p, log_q = log_softmaxes(z, v, t)
    return kl(log_q, mixed(log_p, log_q, 1 - family.alpha))


def alpha_beta(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    log_p, log_q = log_softmaxes(z, v, t)
    a, b = family.alpha, family.beta
    s = a + b
    terms = (a / s) * (s * log_p).exp() + (b / s) * (s * log_q).exp() - (a * log_p + b * log_q).exp()
    return terms.sum(-1).mean() / (a * b)


def total_variation(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    return 0.5 * (at(v, t).softmax(-1) - at(z, t).softmax(-1)).abs().sum(-1).mean()


def logit_mse(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    return F.mse_loss(z, v if family.scale == 1 else family.scale * v)


def dkd(z: Tensor, v: Tensor, labels: Tensor, family: Any, t: float) -> Tensor:
    y = labels.unsqueeze(-1)
    z, v = at(z, t), at(v, t)
    others_p, others_q = v.scatter(-1, y, LOW), z.scatter(-1, y, LOW)
    odds_p = v.gather(-1, y) - others_p.logsumexp(-1, keepdim=True)
    odds_q = z.gather(-1, y) - others_q.logsumexp(-1, keepdim=True)
    target = kl(F.logsigmoid(torch.cat([odds_p, -odds_p], -1)), F.logsigmoid(torch.cat([odds_q, -odds_q], -1)))
    return family.alpha * target + family.beta * kl(F.log_softmax(others_p, -1), F.log_softmax(others_q, -1))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jeffreys,
        jsd,
        skew_kl,
        skew_reverse_kl,
        alpha_beta,
        total_variation,
        logit_mse,
        dkd,
    )
}


# -------------------------------------------------- forward KL to (z, teacher known at K columns, temperature)


def renormalize(z: Tensor, teacher: TeacherTopK, t: float) -> Tensor:
    return kl(F.log_softmax(teacher.logprobs, -1), F.log_softmax(at(z, t), -1).gather(-1, teacher.ids))


def bucket(z: Tensor, teacher: TeacherTopK, t: float) -> Tensor:
    log_p, log_q = teacher.logprobs, F.log_softmax(at(z, t), -1).gather(-1, teacher.ids)
    rest_p, rest_q = (torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)) for x in (log_p, log_q))
    return kl(torch.cat([log_p, rest_p], -1), torch.cat([log_q, rest_q], -1))


def samples(z: Tensor, teacher: TeacherSamples, t: float) -> Tensor:
    return -(teacher.weights * F.log_softmax(at(z, t), -1).gather(-1, teacher.ids)).sum(-1).mean()


LISTED: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (renormalize, bucket, samples)}
