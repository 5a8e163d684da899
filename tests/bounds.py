"""What a divergence is, row by row in float64, and which error of a kernel the rule of `truth.py` allows to it.

A kernel errs in δ by some 1e-7. Where the columns sum to one on both sides that cancels to second order, and the value
is right to 1e-5·D + 1e-8·√D. Elsewhere it does not:

αβ              p^s does not sum to one: 2e-6·√D + 1e-12, the square of half of it.
DKD, bucket     the target or the tail against the rest is a single difference of log-odds, with an error of its own,
                ≤ √D times the error of two log-sums: 1e-6·√D.
total variation Σ|p − q|, no square: 5e-7. A column whose |δ| ≤ 1e-5 may take either sign: it is not compared, and its
                share q of Σw is free.
logit MSE       no δ, but ε(|z| + |a·v|) per column in z − a·v: 2e-7·√D·rms(|z| + |a·v|); S likewise.
ignore, samples a sum of terms of both signs: 1e-5·Σ|terms| + 5e-7·(their mass).

S, the sum of the norms of the terms subtracted in a gradient, is ‖p‖ + ‖q‖ as often as δ occurs, and ‖w‖ + ‖q‖·Σ|w|
where w − q·Σw is formed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from families import parameters
from torch import Tensor

from fusedkd import TeacherSamples, TeacherTopK
from fusedkd.backends import eager
from fusedkd.backends.eager import DEFINITIONS
from fusedkd.backends.layout import FINITE_GRADIENT, KernelId, TopkKernelId
from fusedkd.divergences import Divergence
from fusedkd.reference import defined as reference
from fusedkd.reference import sparse
from fusedkd.reference.divergences import Rows
from fusedkd.reference.softmax import log_softmax


class Part(NamedTuple):
    """D per row and ∂D/∂s, with s = z/T; the error allowed to D; S; and per column an error that is free, or None."""

    value: Tensor
    gradient: Tensor
    tolerance: Tensor
    subtracted: Tensor
    free: Tensor | None = None


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1)


def chained(w: Tensor, q: Tensor) -> Tensor:
    """The terms that w − q·Σw subtracts."""
    return norm(w) + norm(q) * w.abs().sum(-1)


def tolerance(value: Tensor, exact: bool, root: Any = 1e-8, constant: Any = 0.0, noise: Any = 0.0) -> Tensor:
    """`noise`: what float64 leaves open of the definition itself."""
    if exact:
        return 1e-11 * value.abs() + 1e-14 + noise
    return 1e-5 * value.abs() + root * value.abs().sqrt() + constant + 1e-15  # the definitions' own last bit


def dense(divergence: Divergence, rows: Rows, exact: bool) -> Part:
    """`exact`: for a float64 student."""
    form, a = divergence.kernel_id, parameters(divergence)
    value, gradient = (getattr(reference, divergence.name) if form is None else DEFINITIONS[form])(rows, a)
    part = _BOUNDS.get(form, _plain)(Part(value, gradient, tolerance(value, exact), value), rows, a, exact)
    return _settled(part, rows.student, form in FINITE_GRADIENT)


def _settled(part: Part, student: Tensor, finite: bool) -> Part:
    """Rows without a gradient: the student's that are all −inf, whose value is +inf, and the others of an infinite
    divergence unless `finite`.
    """
    masked = (student == -torch.inf).all(-1)
    dead = masked if finite else masked | (part.value == torch.inf)
    return part._replace(
        value=torch.where(masked, torch.inf, part.value),
        gradient=torch.where(dead.unsqueeze(-1), 0, part.gradient),
        subtracted=torch.where(dead, 0, part.subtracted),
    )


# -------------------------------------------------- the forms of divergences.py


def _plain(part: Part, r: Rows, a: Tensor, exact: bool) -> Part:
    return part._replace(subtracted=norm(r.p) + norm(r.q))


def _jeffreys(part: Part, r: Rows, a: Tensor, exact: bool) -> Part:
    weight = a[0] + a[1]
    w = torch.where(r.q == 0, 0, a[1] * r.q * (r.log_p - r.log_q)) if a[1] else 0 * r.q
    return part._replace(
        tolerance=tolerance(part.value, exact, 1e-8 * weight.clamp(min=1).sqrt(), noise=1e-14 * weight),
        subtracted=weight * (norm(r.p) + norm(r.q)) + chained(w, r.q),
    )


def _mixture(part: Part, r: Rows, a: Tensor, exact: bool) -> Part:
    log_m = torch.logaddexp(a[2].log() + r.log_p, torch.log1p(-a[2]) + r.log_q)
    on = (r.log_q > -torch.inf) & (log_m > -torch.inf)
    ratio = torch.where(on, r.log_q - log_m, 0)
    pull = torch.where(on & (a[3] != 0), ratio.exp() * (r.p - r.q), 0)
    w = a[1] * (r.q * ratio).abs() + (a[3] * pull).abs()
    both = norm(r.p) + norm(r.q)
    return part._replace(subtracted=(a[0] + a[1]) * both + chained(w, r.q))


def _alpha_beta(part: Part, r: Rows, a: Tensor, exact: bool) -> Part:
    alpha, beta = a[:2].tolist()
    s = alpha + beta
    P, Q = (s * r.log_p).exp(), (s * r.log_q).exp()
    G = torch.where((r.p == 0) | (r.q == 0), 0, (alpha * r.log_p + beta * r.log_q).exp())
    w = (Q - G) / alpha if alpha else torch.where((r.p == 0) | (r.q == 0), 0, Q * (r.log_q - r.log_p))
    mass = P.sum(-1) + Q.sum(-1) + G.sum(-1)
    noise = 4e-15 * mass * (1 / abs(alpha * beta) if alpha * beta else 1 / s**2)
    subtracted = 2 * (norm(P) + norm(Q)) + chained(w, r.q)
    if exact:
        subtracted = subtracted * max(1.0, 0.1 / abs(alpha) if alpha else 1.0)  # the definition's own q^s − p^α q^β
    return part._replace(tolerance=tolerance(part.value, exact, 2e-6, 1e-12, noise), subtracted=subtracted)


def _total_variation(part: Part, r: Rows, a: Tensor, exact: bool) -> Part:
    near = (r.log_p - r.log_q).abs() <= (1e-12 if exact else 1e-5)
    share = torch.where(near, r.q, 0).sum(-1, keepdim=True)
    return part._replace(
        tolerance=tolerance(part.value, exact, 0.0, 5e-7),
        subtracted=norm(r.p) + norm(r.q),
        free=torch.where(near, torch.inf, r.q * share),
    )


def _logit_mse(part: Part, r: Rows, a: Tensor, exact: bool) -> Part:
    """z − v of two float32 numbers is right to its own last bit."""
    both = (r.student == -torch.inf) & (r.teacher == -torch.inf)
    z, v = (torch.where(both, 0, x) for x in (r.student, a[0] * r.teacher))
    size = (z - v).abs()
    if a[0] != 1 or any(bool((x.float() != x).any()) for x in (z, v)):
        size = z.abs() + v.abs()
    rms = size.square().mean(-1).sqrt()
    bound = tolerance(part.value, exact, 2e-7 * rms, 1e-14 * rms**2)
    return part._replace(tolerance=bound, subtracted=2 / size.shape[-1] * norm(size))


def _dkd(part: Part, r: Rows, a: Tensor, exact: bool) -> Part:
    assert r.labels is not None
    y = r.labels.clamp(0, r.q.shape[-1] - 1).unsqueeze(-1)
    logs = [x.gather(-1, y).squeeze(-1) for x in (r.log_p, r.log_q)]
    target = sum(torch.where(x == -torch.inf, 0, x.exp() * (1 - x / 4)) for x in logs)  # exp(x) errs by ε·|x|
    hats = [torch.nan_to_num(x.scatter(-1, y, -torch.inf).softmax(-1)) for x in (r.log_p, r.log_q)]
    return part._replace(
        tolerance=tolerance(part.value, exact, 1e-6 * a[0].clamp(min=1).sqrt(), noise=1e-14 * (a[0] + a[1])),
        subtracted=a[0] * target * (1 + norm(hats[1])) + a[1] * (norm(hats[0]) + norm(hats[1])),
    )


def _sum(part: Part, r: Rows, a: Tensor, exact: bool) -> Part:
    """All that its parts are allowed."""
    one, free = torch.ones_like(a[0]), None
    allowed, subtracted = torch.zeros_like(part.value), torch.zeros_like(part.value)
    for form, own, weight, weights in (
        (KernelId.JEFFREYS, a[:2], one, a[:2]),
        (KernelId.MIXTURE, a[2:6], one, a[2:4]),
        (KernelId.TOTAL_VARIATION, a[:0], a[6], a[6]),
    ):
        if weights.any():
            value, gradient = DEFINITIONS[form](r, own)
            each = _BOUNDS.get(form, _plain)(Part(value, gradient, tolerance(value, exact), value), r, own, exact)
            allowed, subtracted = allowed + weight * each.tolerance, subtracted + weight * each.subtracted
            free = free if each.free is None else weight * each.free
    return part._replace(tolerance=allowed, subtracted=subtracted, free=free)


_BOUNDS = {
    KernelId.JEFFREYS: _jeffreys,
    KernelId.MIXTURE: _mixture,
    KernelId.ALPHA_BETA: _alpha_beta,
    KernelId.TOTAL_VARIATION: _total_variation,
    KernelId.LOGIT_MSE: _logit_mse,
    KernelId.DKD: _dkd,
    KernelId.SUM: _sum,
    KernelId.MIXED_SUM: _sum,
}


# -------------------------------------------------- the forms of sparse.py


def listed(
    teacher: TeacherTopK | TeacherSamples, divergence: Divergence, student: Tensor, log_q: Tensor, t: float, exact: bool
) -> Part:
    """A teacher known at K columns, at temperature `t`."""
    ids = teacher.ids.reshape(-1, teacher.ids.shape[-1]).cpu().long()
    valid, q = ids >= 0, log_q.exp()
    column = torch.where(valid, ids, 0)
    if isinstance(teacher, TeacherSamples):
        w = teacher.weights.detach().cpu().double().reshape(ids.shape)
        value, gradient = eager.topk_definition(TopkKernelId.SAMPLES, ids, w, log_q, 1.0)
        w, mass = torch.where(valid, w, 0), torch.where(valid, w, 0).sum(-1)
        bound = tolerance(value, exact, 0.0, 5e-7 * mass, 1e-14 * mass)
        return _settled(Part(value, gradient, bound, mass * norm(q) + norm(w)), student, True)

    reverse = divergence.name == "reverse_kl"
    both_sides = reverse if teacher.tail == "renormalize" else teacher.tail == "both_renormalized"
    known = torch.where(valid, teacher.logprobs.detach().cpu().reshape(ids.shape), -torch.inf)
    sharpening = float(teacher.logprobs_temperature) / t
    value, gradient = sparse.topk_kl(teacher.tail, reverse, ids, known, log_q, sharpening)
    lp = known.double()
    log_qk = torch.where(valid, log_q.gather(-1, column), -torch.inf)
    if "renormalize" in teacher.tail:
        lp = (lp * sharpening).log_softmax(-1)
        log_qk = log_softmax(log_qk) if both_sides else log_qk
    p, qk = lp.exp(), log_qk.exp()
    delta = torch.where((lp == -torch.inf) | (log_qk == -torch.inf), 0, lp - log_qk)
    both = norm(p) + norm(qk if both_sides else q)
    bound = tolerance(value, exact)
    if teacher.tail == "bucket":
        off = q.scatter_reduce(-1, column, torch.where(valid, 0, q.gather(-1, column)), "amin")
        tails = sparse.tail_of_teacher(known, off.sum(-1, keepdim=True) > 0).squeeze(-1), off.sum(-1)
        ratio = torch.where(tails[1] > 0, tails[0] / tails[1], 0)
        both = both + norm(off) * ratio
        if reverse:
            log_ratio = torch.where(ratio > 0, -ratio.log(), 0)
            both = both + norm(off) * log_ratio.abs()
            w = (qk * delta).abs().sum(-1) + tails[1] * log_ratio.abs()
            both = both + norm(qk * delta) + norm(q) * w
        bound = tolerance(value, exact, 1e-6, noise=1e-14)
    elif teacher.tail == "ignore":
        terms, mass = ((qk if reverse else p) * delta).abs().sum(-1), (qk if reverse else p).sum(-1)
        bound = tolerance(terms, exact, 0.0, 5e-7 * mass)
        if reverse:
            w = qk * (1 + delta.abs())
            both = both + norm(w) + norm(q) * w.sum(-1)
    elif reverse:
        both = both + chained(qk * delta, qk)
    return _settled(Part(value, gradient, bound, both), student, not reverse)
