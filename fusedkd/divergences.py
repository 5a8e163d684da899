"""The divergence families of :func:`fusedkd.kd_loss`: names, parameters, and what each of them is.

A family is a small frozen dataclass that users construct. It names the :class:`Form` in which kernels compute it and
gives the coefficients of that form, numbers or 0-d tensors, so that a schedule over a parameter recompiles nothing.
Several families share a form. A form's definition is the function of its name below: plain PyTorch in the precision of
its input, from which the tests take their truth. Its kernels are one functor of ``csrc/divergences.h`` and one function
of ``fusedkd/kernels/divergences.py``.

Notation: s = z/T student, t = v/T teacher, q = softmax(s), p = softmax(t), δ = log p − log q. Where −inf masks a column
on both sides it contributes nothing. NaN or +inf on a common column of either side makes D NaN, and its gradient on all
common columns, whatever the coefficients; without a softmax it stays in its column, and an infinite D has gradient 0.
Gradients are with respect to s: w − q·Σw with w = q·∂D/∂q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fusedkd.arguments import Real, exact, real


class Form(IntEnum):
    """How kernels compute a family: the ``form`` argument of the KD operators."""

    FORWARD_KL = 0
    JEFFREYS = 1
    MIXTURE = 2
    ALPHA_BETA = 3
    TOTAL_VARIATION = 4
    LOGIT_MSE = 5
    DKD = 6


FINITE_GRADIENT = (Form.FORWARD_KL, Form.DKD)
"""The forms whose gradient is finite, and right, where the divergence is infinite. Any other's is 0 there."""


# -------------------------------------------------- families


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence D(p, q) of the teacher's p and the student's q.

    ``temperature_power``: k of the factor T^k that keeps the gradient's size independent of T (Hinton et al. 2015, §2);
    0 where there is no softmax, and so no temperature. ``needs_labels``: rows without a label have no KD term.
    """

    name: ClassVar[str]
    form: ClassVar[Form]
    temperature_power: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = False

    def coefficients(self) -> tuple[Real, ...]:
        """a₀, a₁, … of the form's definition."""
        return ()


@dataclass(frozen=True, eq=False)
class ForwardKL(Divergence):
    """KL(p‖q) (Hinton et al. 2015, arXiv:1503.02531, §2)."""

    name, form = "forward_kl", Form.FORWARD_KL


@dataclass(frozen=True, eq=False)
class ReverseKL(Divergence):
    """KL(q‖p) (MiniLLM, arXiv:2306.08543, eq. 1), per token."""

    name, form = "reverse_kl", Form.JEFFREYS

    def coefficients(self) -> tuple[Real, ...]:
        return 0.0, 1.0


@dataclass(frozen=True, eq=False)
class Jeffreys(Divergence):
    """forward·KL(p‖q) + reverse·KL(q‖p) (Jeffreys 1946 with both weights 1)."""

    forward: Real = 1.0
    reverse: Real = 1.0
    name, form = "jeffreys", Form.JEFFREYS

    def __post_init__(self) -> None:
        real("forward", self.forward)
        real("reverse", self.reverse)

    def coefficients(self) -> tuple[Real, ...]:
        return self.forward, self.reverse


@dataclass(frozen=True, eq=False)
class JSD(Divergence):
    """β·KL(p‖m) + (1 − β)·KL(q‖m), m = βp + (1 − β)q (GKD, arXiv:2306.13649, eq. 1).

    As in TRL, β = 0 is KL(p‖q) and β = 1 is KL(q‖p), though the formula vanishes towards both ends. β in [0, 1].
    """

    beta: Real = 0.5
    name, form = "jsd", Form.MIXTURE

    def __post_init__(self) -> None:
        real("beta", self.beta, high=1.0)

    def coefficients(self) -> tuple[Real, ...]:
        beta = exact(self.beta)
        teacher = beta + (beta == 0) - (beta == 1) * 1.0
        return _mixture(teacher, 1 - teacher, beta)


@dataclass(frozen=True, eq=False)
class SkewKL(Divergence):
    """KL(p‖αp + (1 − α)q) (DistiLLM, arXiv:2402.03898, eq. 5). α in [0, 1]; 0 makes it KL(p‖q), 1 makes it 0."""

    alpha: Real = 0.1
    name, form = "skew_kl", Form.MIXTURE

    def __post_init__(self) -> None:
        real("alpha", self.alpha, high=1.0)

    def coefficients(self) -> tuple[Real, ...]:
        return _mixture(1.0, 0.0, exact(self.alpha))


@dataclass(frozen=True, eq=False)
class SkewReverseKL(Divergence):
    """KL(q‖(1 − α)p + αq) (DistiLLM, arXiv:2402.03898, eq. 6). α in [0, 1]; 0 makes it KL(q‖p), 1 makes it 0.

    ``detach_mixture``: no gradient flows through the mixture, as in DistiLLM-2 (arXiv:2503.07067).
    """

    alpha: Real = 0.1
    detach_mixture: bool = False
    name, form = "skew_reverse_kl", Form.MIXTURE

    def __post_init__(self) -> None:
        real("alpha", self.alpha, high=1.0)

    def coefficients(self) -> tuple[Real, ...]:
        *weights, pull = _mixture(0.0, 1.0, 1 - exact(self.alpha))
        return *weights, 0.0 if self.detach_mixture else pull


def _mixture(teacher: Real, student: Real, share: Real) -> tuple[Real, ...]:
    """Coefficients of teacher·KL(p‖m) + student·KL(q‖m), m = share·p + (1 − share)·q, and of its gradient."""
    rest = 1 - share
    return teacher, student, share, teacher * rest * rest - student * share * rest


@dataclass(frozen=True, eq=False)
class AlphaBeta(Divergence):
    """−1/(αβ)·Σ [p^α q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)], α + β > 0 (ABKD, arXiv:2505.04560, eq. 6; Cichocki et
    al. 2011). By continuity (1, 0) is KL(p‖q) and (0, 1) is KL(q‖p).
    """

    alpha: Real = 0.2
    beta: Real = 0.7
    name, form = "alpha_beta", Form.ALPHA_BETA

    def __post_init__(self) -> None:
        low = float("-inf")
        real("alpha", self.alpha, low=low)
        real("beta", self.beta, low=low)
        if not isinstance(self.alpha, Tensor) and not isinstance(self.beta, Tensor):
            real("alpha + beta", self.alpha + self.beta, open_low=True)

    def coefficients(self) -> tuple[Real, ...]:
        return self.alpha, self.beta


@dataclass(frozen=True, eq=False)
class TotalVariation(Divergence):
    """½·Σ|p − q| (Wen et al. 2023, arXiv:2307.15190, §3)."""

    name, form, temperature_power = "total_variation", Form.TOTAL_VARIATION, 1


@dataclass(frozen=True, eq=False)
class LogitMSE(Divergence):
    """Mean over the vocabulary of (z − scale·v)²: no softmax, so the temperature must be 1 (Buciluǎ et al. 2006; φ of
    Annealing-KD, arXiv:2104.07163, eq. 3). A sum over the vocabulary, as in DistilBERT's code, is V times this.
    """

    scale: Real = 1.0
    name, form, temperature_power = "logit_mse", Form.LOGIT_MSE, 0

    def __post_init__(self) -> None:
        real("scale", self.scale, open_low=True)

    def coefficients(self) -> tuple[Real, ...]:
        return (self.scale,)


@dataclass(frozen=True, eq=False)
class DKD(Divergence):
    """α·KL(b(p)‖b(q)) + β·KL(p̂‖q̂): target against the rest, b = (p_y, 1 − p_y), and the rest among themselves,
    renormalised (Decoupled KD, arXiv:2203.08679, eq. 7). Needs labels; a row without one carries no KD term.
    """

    alpha: Real = 1.0
    beta: Real = 8.0
    name, form, needs_labels = "dkd", Form.DKD, True

    def __post_init__(self) -> None:
        real("alpha", self.alpha)
        real("beta", self.beta)

    def coefficients(self) -> tuple[Real, ...]:
        return self.alpha, self.beta


FAMILIES: dict[str, type[Divergence]] = {
    family.name: family
    for family in (
        ForwardKL,
        ReverseKL,
        Jeffreys,
        JSD,
        SkewKL,
        SkewReverseKL,
        AlphaBeta,
        TotalVariation,
        LogitMSE,
        DKD,
    )
}


def resolve(divergence: str | Divergence) -> Divergence:
    """The object itself, or the family of that name with its default parameters."""
    if isinstance(divergence, Divergence) and type(divergence) is not Divergence:
        if not isinstance(getattr(divergence, "form", None), Form) or not hasattr(divergence, "name"):
            raise TypeError(
                f"divergence is a {type(divergence).__name__}, which must have a name, and as its form one of "
                "fusedkd.divergences.Form, the definitions that kernels compute"
            )
        return divergence
    if isinstance(divergence, str) and divergence in FAMILIES:
        return FAMILIES[divergence]()
    raise ValueError(f"divergence must be a Divergence or one of {', '.join(FAMILIES)}, not {divergence!r}")


# -------------------------------------------------- definitions


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


DEFINITIONS: dict[Form, Callable[[Rows, Tensor], tuple[Tensor, Tensor]]] = {
    Form.FORWARD_KL: forward_kl,
    Form.JEFFREYS: jeffreys,
    Form.MIXTURE: mixture,
    Form.ALPHA_BETA: alpha_beta,
    Form.TOTAL_VARIATION: total_variation,
    Form.LOGIT_MSE: logit_mse,
    Form.DKD: dkd,
}
