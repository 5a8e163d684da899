"""The divergences of :func:`fusedkd.kd_loss`: names, parameters, and what each of them is.

A divergence is a small frozen dataclass that users construct. It names the kernel that computes it,
:class:`~fusedkd.backends.layout.KernelId`, and gives that kernel's coefficients: numbers, 0-d tensors, so that a
schedule over a parameter recompiles nothing, or tensors ``(*)`` of a value per row. Several divergences share a kernel.
What a kernel computes is defined in :mod:`fusedkd.reference.divergences`, whose notation this page uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fusedkd.backends.layout import KernelId
from fusedkd.checks import Real, exact, real
from fusedkd.reference.softmax import log_softmax


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence D(p, q) of the teacher's p and the student's q. A subclass with a `definition` is one of your own.

    ``kernel_id``: what computes it; None if it has its `definition` alone. ``temperature_power``: k of the factor T^k
    that keeps the gradient's size independent of T (Hinton et al. 2015, §2); 0 where there is no softmax, and so no
    temperature. ``needs_labels``: rows without a label have no KD term. ``same_columns``: column j is the same token on
    both sides; without it the two vocabularies may be of any size, and `definition` gets all of both. ``bounded``: no p
    and q make D infinite, so that nobody has to ask.
    """

    name: ClassVar[str] = "divergence"
    """In error messages; the name of the class unless it says another."""
    kernel_id: ClassVar[KernelId | None] = None
    temperature_power: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = False
    same_columns: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def coefficients(self) -> tuple[Real, ...]:
        """a₀, a₁, … of the kernel's definition."""
        return ()

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        """D of each row, ``(R,)`` float64, which PyTorch's autograd can differentiate.

        It is called with some rows at a time, so that memory does not grow with N × V. What is general stays outside:
        temperatures and T^k, masks and normalisers, soft-caps, cross-entropy, padded vocabularies, rows that are masked
        throughout.

        Args:
            log_p, log_q: ``(R, C)`` float64, log-probabilities of teacher and student at their temperatures; without
                `same_columns` ``(R, V_t)`` and ``(R, V_s)``. They are finite: −inf, a masked column, comes as −1e30,
                whose exponential is 0. A value that grows when these are lowered further is infinite, and its
                gradient 0.
            labels: ``(R,)`` int64 in [0, C), or None unless `needs_labels`.
        """
        raise NotImplementedError

    def teacher_logprobs(self, rows: Tensor, temperature: Tensor) -> Tensor:
        """log p of the teacher's rows ``(R, C)`` float64, for `definition`."""
        return log_softmax(rows / temperature)

    def exchanged(self) -> tuple[Real, Divergence]:
        """(c, D') with c·D'(q, p) = D(p, q): the divergence seen from the other side. c is a weight ≥ 0."""
        if not self.same_columns:
            raise ValueError(f"{self.name} has no teacher_gradient: its two sides have columns of their own")
        return 1.0, _Exchanged(self)


class _Exchanged(Divergence):
    """The `definition` of another with its sides exchanged."""

    def __init__(self, other: Divergence) -> None:
        self.other = other
        self.name, self.temperature_power = other.name, other.temperature_power  # type: ignore[misc]
        self.needs_labels = other.needs_labels  # type: ignore[misc]

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return self.other.definition(log_q, log_p, labels)


@dataclass(frozen=True, eq=False)
class ForwardKL(Divergence):
    """KL(p‖q) (Hinton et al. 2015, arXiv:1503.02531, §2)."""

    name, kernel_id = "forward_kl", KernelId.FORWARD_KL

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, ReverseKL()


@dataclass(frozen=True, eq=False)
class ReverseKL(Divergence):
    """KL(q‖p) (MiniLLM, arXiv:2306.08543, eq. 1), per token."""

    name, kernel_id = "reverse_kl", KernelId.JEFFREYS

    def coefficients(self) -> tuple[Real, ...]:
        return 0.0, 1.0

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, ForwardKL()


@dataclass(frozen=True, eq=False)
class Jeffreys(Divergence):
    """forward·KL(p‖q) + reverse·KL(q‖p) (Jeffreys 1946 with both weights 1)."""

    forward: Real = 1.0
    reverse: Real = 1.0
    name, kernel_id = "jeffreys", KernelId.JEFFREYS

    def __post_init__(self) -> None:
        real("forward", self.forward, per_row=True)
        real("reverse", self.reverse, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return self.forward, self.reverse

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, Jeffreys(self.reverse, self.forward)


@dataclass(frozen=True, eq=False)
class JSD(Divergence):
    """β·KL(p‖m) + (1 − β)·KL(q‖m), m = βp + (1 − β)q (GKD, arXiv:2306.13649, eq. 1).

    As in TRL, β = 0 is KL(p‖q) and β = 1 is KL(q‖p), though the formula vanishes towards both ends. β in [0, 1].
    """

    beta: Real = 0.5
    name, kernel_id = "jsd", KernelId.MIXTURE

    def __post_init__(self) -> None:
        real("beta", self.beta, high=1.0, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        beta = exact(self.beta)
        teacher = beta + (beta == 0) - (beta == 1) * 1.0
        return _mixture(teacher, 1 - teacher, beta)

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, JSD(1 - exact(self.beta))


@dataclass(frozen=True, eq=False)
class SkewKL(Divergence):
    """KL(p‖αp + (1 − α)q) (DistiLLM, arXiv:2402.03898, eq. 5). α in [0, 1]; 0 makes it KL(p‖q), 1 makes it 0."""

    alpha: Real = 0.1
    name, kernel_id = "skew_kl", KernelId.MIXTURE

    def __post_init__(self) -> None:
        real("alpha", self.alpha, high=1.0, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        return _mixture(1.0, 0.0, exact(self.alpha))

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, SkewReverseKL(self.alpha)


@dataclass(frozen=True, eq=False)
class SkewReverseKL(Divergence):
    """KL(q‖(1 − α)p + αq) (DistiLLM, arXiv:2402.03898, eq. 6). α in [0, 1]; 0 makes it KL(q‖p), 1 makes it 0.

    ``detach_mixture``: no gradient flows through the mixture, as in DistiLLM-2 (arXiv:2503.07067).
    """

    alpha: Real = 0.1
    detach_mixture: bool = False
    name, kernel_id = "skew_reverse_kl", KernelId.MIXTURE

    def __post_init__(self) -> None:
        real("alpha", self.alpha, high=1.0, per_row=True)

    def coefficients(self) -> tuple[Real, ...]:
        *weights, pull = _mixture(0.0, 1.0, 1 - exact(self.alpha))
        return *weights, 0.0 if self.detach_mixture else pull

    def exchanged(self) -> tuple[Real, Divergence]:
        if self.detach_mixture:
            raise ValueError("SkewReverseKL(detach_mixture=True) has no teacher_gradient: p is in the mixture alone")
        return 1.0, SkewKL(self.alpha)


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
    name, kernel_id = "alpha_beta", KernelId.ALPHA_BETA

    def __post_init__(self) -> None:
        low = float("-inf")
        real("alpha", self.alpha, low=low, per_row=True)
        real("beta", self.beta, low=low, per_row=True)
        if not isinstance(self.alpha, Tensor) and not isinstance(self.beta, Tensor):
            real("alpha + beta", self.alpha + self.beta, open_low=True)

    def coefficients(self) -> tuple[Real, ...]:
        return self.alpha, self.beta

    def exchanged(self) -> tuple[Real, Divergence]:
        return 1.0, AlphaBeta(self.beta, self.alpha)


@dataclass(frozen=True, eq=False)
class TotalVariation(Divergence):
    """½·Σ|p − q| (Wen et al. 2023, arXiv:2307.15190, §3)."""

    name, kernel_id, temperature_power = "total_variation", KernelId.TOTAL_VARIATION, 1

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
        binary = (target_p.exp() * (target_p - target_q) + rest_p.exp() * (rest_p - rest_q)).squeeze(-1)
        known = torch.minimum(rest_p, rest_q) > MASKED  # a finite column beside the label on either side
        among = torch.where(others & known, hat_p.exp() * (hat_p - hat_q), 0).sum(-1)
        return self.alpha * binary + self.beta * among


MASKED = -1e29
"""Log-probabilities below this are those of masked columns (:meth:`Divergence.definition`)."""


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
    )
}


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
]
"""The keys of FAMILIES, for type checkers."""


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
