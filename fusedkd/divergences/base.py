"""What a divergence is, to the losses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fusedkd.backends.layout import KernelId
from fusedkd.checks import Real
from fusedkd.reference.softmax import log_softmax

MASKED = -1e29
"""Log-probabilities below this are those of masked columns (:meth:`Divergence.definition`)."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence D(p, q) of the teacher's p and the student's q. A subclass with a `definition` is one of your own.

    ``kernel_id``: what computes it; None if it has its `definition` alone. ``temperature_power``: k of the factor T^k
    that keeps the gradient's size independent of T (Hinton et al. 2015, §2); 0 where there is no softmax, and so no
    temperature. ``needs_labels``: rows without a label have no KD term. ``columns`` says whether a
    :class:`~fusedkd.TeacherTopK` will do. ``"sum"``: D = Σ f(p_i, q_i), the same f for all columns. ``"alike"``: no
    such sum, but without regard to which column is which: all columns off a list can be one. ``"own"``: neither.
    ``same_columns``: column j is the same token on both sides; without it the two vocabularies may be of any size, and
    `definition` gets all of both. ``bounded``: no p and q make D infinite, so that nobody has to ask.
    """

    name: ClassVar[str] = "divergence"
    """In error messages; the name of the class unless it says another."""
    kernel_id: ClassVar[KernelId | None] = None
    temperature_power: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = False
    columns: ClassVar[Literal["sum", "alike", "own"]] = "own"
    same_columns: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def coefficients(self) -> tuple[Real, ...]:
        """a₀, a₁, … of the kernel's definition; the parameters of a `definition` of ours."""
        return ()

    def having(self, coefficients: Sequence[Tensor]) -> Divergence:
        """The same with these as its coefficients: ``()``, or ``(R, 1)`` where each row has its own."""
        if len(coefficients) == 0:
            return self
        found, values = copy.copy(self), tuple(coefficients)
        object.__setattr__(found, "coefficients", lambda: values)
        return found

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

    def coefficients(self) -> tuple[Real, ...]:
        return self.other.coefficients()

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        values = [tensor(value, log_q) for value in self.coefficients()]
        return self.other.having(values).definition(log_q, log_p, labels)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """What each column adds to KL(p‖q), in a `definition`."""
    return log_p.exp() * (log_p - log_q)


def tensor(value: Real, like: Tensor) -> Tensor:
    """A coefficient in this type, for which no device is waited."""
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full((), value)
