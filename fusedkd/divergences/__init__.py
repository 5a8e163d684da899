"""The divergences of :func:`fusedkd.kd_loss`: names, parameters, and what each of them is.

A divergence is a small frozen dataclass that users construct. It names the kernel that computes it,
:class:`~fusedkd.backends.layout.KernelId`, and gives that kernel's coefficients: numbers, 0-d tensors, so that a
schedule over a parameter recompiles nothing, or tensors ``(*)`` of a value per row. Several divergences share a kernel.
What a kernel computes is defined in :mod:`fusedkd.reference.divergences`, whose notation this page uses. Those without
a kernel are in :mod:`fusedkd.divergences.defined`; the `definition` of one with a kernel is for what that does not
serve: most of them for a teacher known at few columns, DKD for the teacher's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fusedkd.backends.layout import KernelId
from fusedkd.checks import Real, exact, real
from fusedkd.divergences.base import MASKED, kl, tensor
from fusedkd.divergences.base import Divergence as Divergence
from fusedkd.divergences.defined import LK, NLA, TAID, AdaptiveKL, AMiD, ToDi


@dataclass(frozen=True, eq=False)
class ForwardKL(Divergence):
    """KL(p‖q) (Hinton et al. 2015, arXiv:1503.02531, §2)."""

    name, kernel_id, columns = "forward_kl", KernelId.FORWARD_KL, "sum"

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return kl(log_p, log_q).sum(-1)

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, ReverseKL()


@dataclass(frozen=True, eq=False)
class ReverseKL(Divergence):
    """KL(q‖p) (MiniLLM, arXiv:2306.08543, eq. 1), per token."""

    name, kernel_id, columns = "reverse_kl", KernelId.JEFFREYS, "sum"

    def coefficients(self) -> tuple[Real, ...]:
        return 0.0, 1.0

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return kl(log_q, log_p).sum(-1)

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, ForwardKL()


@dataclass(frozen=True, eq=False)
class Jeffreys(Divergence):
    """forward·KL(p‖q) + reverse·KL(q‖p) (Jeffreys 1946 with both weights 1)."""

    forward: Real = 1.0
    reverse: Real = 1.0
    name, kernel_id, columns = "jeffreys", KernelId.JEFFREYS, "sum"

    def __post_init__(self) -> None:
        real("forward", self.forward, per_row=True)
        real("reverse", self.reverse, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return self.forward, self.reverse

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        forward, reverse = self.coefficients()
        return (forward * kl(log_p, log_q) + reverse * kl(log_q, log_p)).sum(-1)

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, Jeffreys(self.reverse, self.forward)


class _Mixture(Divergence):
    """teacher·KL(p‖m) + student·KL(q‖m), m = share·p + (1 − share)·q, as its first coefficients say."""

    kernel_id, columns = KernelId.MIXTURE, "sum"

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        teacher, student, share, _ = (tensor(a, log_q) for a in self.coefficients())
        other = log_q.detach() if getattr(self, "detach_mixture", False) else log_q
        log_m = torch.logaddexp(share.log() + log_p, torch.log1p(-share) + other)
        return (teacher * kl(log_p, log_m) + student * kl(log_q, log_m)).sum(-1)


def _mixture(teacher: Real, student: Real, share: Real) -> tuple[Real, ...]:
    """Coefficients of teacher·KL(p‖m) + student·KL(q‖m), m = share·p + (1 − share)·q, and of its gradient."""
    rest = 1 - share
    return teacher, student, share, teacher * rest * rest - student * share * rest


@dataclass(frozen=True, eq=False)
class JSD(_Mixture):
    """β·KL(p‖m) + (1 − β)·KL(q‖m), m = βp + (1 − β)q (GKD, arXiv:2306.13649, eq. 1).

    As in TRL, β = 0 is KL(p‖q) and β = 1 is KL(q‖p), though the formula vanishes towards both ends. β in [0, 1].
    """

    beta: Real = 0.5
    name = "jsd"

    def __post_init__(self) -> None:
        real("beta", self.beta, high=1.0, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        beta = exact(self.beta)
        teacher = beta + (beta == 0) - (beta == 1) * 1.0
        return _mixture(teacher, 1 - teacher, beta)

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, JSD(1 - exact(self.beta))


@dataclass(frozen=True, eq=False)
class SkewKL(_Mixture):
    """KL(p‖αp + (1 − α)q) (DistiLLM, arXiv:2402.03898, eq. 5). α in [0, 1]; 0 makes it KL(p‖q), 1 makes it 0."""

    alpha: Real = 0.1
    name = "skew_kl"

    def __post_init__(self) -> None:
        real("alpha", self.alpha, high=1.0, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return _mixture(1.0, 0.0, exact(self.alpha))

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, SkewReverseKL(self.alpha)


@dataclass(frozen=True, eq=False)
class SkewReverseKL(_Mixture):
    """KL(q‖(1 − α)p + αq) (DistiLLM, arXiv:2402.03898, eq. 6). α in [0, 1]; 0 makes it KL(q‖p), 1 makes it 0.

    ``detach_mixture``: no gradient flows through the mixture, as in DistiLLM-2 (arXiv:2503.07067).
    """

    alpha: Real = 0.1
    detach_mixture: bool = False
    name = "skew_reverse_kl"

    def __post_init__(self) -> None:
        real("alpha", self.alpha, high=1.0, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        *weights, pull = _mixture(0.0, 1.0, 1 - exact(self.alpha))
        return *weights, 0.0 if self.detach_mixture else pull

    def exchanged(self) -> tuple[Real, Divergence]:
        if self.detach_mixture:
            raise ValueError("SkewReverseKL(detach_mixture=True) has no teacher_gradient: p is in the mixture alone")
        return 1.0, SkewKL(self.alpha)


@dataclass(frozen=True, eq=False)
class AlphaBeta(Divergence):
    """−1/(αβ)·Σ [p^α q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)], α + β > 0 (ABKD, arXiv:2505.04560, eq. 6; Cichocki et
    al. 2011). By continuity (1, 0) is KL(p‖q) and (0, 1) is KL(q‖p).
    """

    alpha: Real = 0.2
    beta: Real = 0.7
    name, kernel_id, columns = "alpha_beta", KernelId.ALPHA_BETA, "sum"

    def __post_init__(self) -> None:
        low = float("-inf")
        real("alpha", self.alpha, low=low, per_row=True)
        real("beta", self.beta, low=low, per_row=True)
        if not isinstance(self.alpha, Tensor) and not isinstance(self.beta, Tensor):
            real("alpha + beta", self.alpha + self.beta, open_low=True)

    def coefficients(self) -> tuple[Real, ...]:
        return self.alpha, self.beta

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        alpha, beta = (tensor(a, log_q) for a in self.coefficients())
        s = alpha + beta
        p, q, delta = (s * log_p).exp(), (s * log_q).exp(), s * (log_p - log_q)
        both = (alpha * log_p + beta * log_q).exp()
        general = (alpha / s * p + beta / s * q - both) / torch.where(alpha * beta == 0, 1, alpha * beta)
        limits = torch.where(beta == 0, p * delta - p + q, p - q - q * delta) / s**2
        return torch.where(alpha * beta == 0, limits, general).sum(-1)

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, AlphaBeta(self.beta, self.alpha)


@dataclass(frozen=True, eq=False)
class TotalVariation(Divergence):
    """½·Σ|p − q| (Wen et al. 2023, arXiv:2307.15190, §3)."""

    name, kernel_id, temperature_power, columns = "total_variation", KernelId.TOTAL_VARIATION, 1, "sum"

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, self


@dataclass(frozen=True, eq=False)
class LogitMSE(Divergence):
    """Mean over the vocabulary of (z − scale·v)²: no softmax, so the temperature must be 1 (Buciluǎ et al. 2006; φ of
    Annealing-KD, arXiv:2104.07163, eq. 3). A sum over the vocabulary, as in DistilBERT's code, is V times this.
    """

    scale: Real = 1.0
    name, kernel_id, temperature_power = "logit_mse", KernelId.LOGIT_MSE, 0

    def __post_init__(self) -> None:
        real("scale", self.scale, open_low=True, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return (self.scale,)

    def exchanged(self) -> tuple[Real, Divergence]:
        scale = exact(self.scale)
        return scale * scale, LogitMSE(1 / scale)  # (z − c·v)² = c²·(v − z/c)²


@dataclass(frozen=True, eq=False)
class DKD(Divergence):
    """α·KL(b(p)‖b(q)) + β·KL(p̂‖q̂): target against the rest, b = (p_y, 1 − p_y), and the rest among themselves,
    renormalised (Decoupled KD, arXiv:2203.08679, eq. 7). Needs labels; a row without one carries no KD term.
    """

    alpha: Real = 1.0
    beta: Real = 8.0
    name, kernel_id, needs_labels = "dkd", KernelId.DKD, True

    def __post_init__(self) -> None:
        real("alpha", self.alpha, per_row=True)
        real("beta", self.beta, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return self.alpha, self.beta

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        """For the gradient of the teacher, which has no kernel."""
        assert labels is not None
        y = labels.unsqueeze(-1)
        others = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, y, False)
        (target_p, rest_p, hat_p), (target_q, rest_q, hat_q) = (_decoupled(x, y, others) for x in (log_p, log_q))
        binary = kl(target_p, target_q) + kl(rest_p, rest_q)
        known = torch.minimum(rest_p, rest_q) > MASKED  # a finite column beside the label on either side
        among = torch.where(others & known, kl(hat_p, hat_q), 0).sum(-1, keepdim=True)
        alpha, beta = self.coefficients()
        return (alpha * binary + beta * among).squeeze(-1)


def _decoupled(log_x: Tensor, y: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log x_y, log (1 − x_y), and log x̂ of the other columns."""
    rest = torch.where(others, log_x, -torch.inf).logsumexp(-1, keepdim=True)
    return log_x.gather(-1, y), rest, torch.where(others, log_x - rest, 0)


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
        TAID,
        ToDi,
        AdaptiveKL,
        AMiD,
        LK,
        NLA,
    )
}
WITH_KERNEL = {name: family for name, family in FAMILIES.items() if family.kernel_id is not None}


DivergenceName: TypeAlias = Literal[
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "alpha_beta",
    "total_variation",
    "logit_mse",
    "dkd",
    "taid",
    "todi",
    "adaptive_kl",
    "amid",
    "lk",
    "nla",
]
"""The keys of FAMILIES, for type checkers."""
Divergences: TypeAlias = DivergenceName | Divergence | Sequence[tuple[Real, DivergenceName | Divergence]]
"""What the losses take: one, or pairs (weight, divergence)."""


def parts_of(divergence: Divergences) -> list[Divergence]:
    """The divergence, or those of a list."""
    if isinstance(divergence, str | Divergence):
        return [resolve(divergence)]
    return [resolve(each) for _, each in divergence]


def resolve(divergence: str | Divergence) -> Divergence:
    """The object itself, or the family of that name with its default parameters."""
    if isinstance(divergence, Divergence) and type(divergence) is not Divergence:
        own = type(divergence).definition is not Divergence.definition
        if not own and not isinstance(divergence.kernel_id, KernelId):
            raise TypeError(
                f"divergence is a {type(divergence).__name__}, which must have a method "
                "definition(log_p, log_q, labels), or as its kernel_id one of fusedkd.backends.layout.KernelId"
            )
        return divergence
    if isinstance(divergence, str) and divergence in FAMILIES:
        return FAMILIES[divergence]()
    raise ValueError(f"divergence must be a Divergence or one of {', '.join(FAMILIES)}, not {divergence!r}")
