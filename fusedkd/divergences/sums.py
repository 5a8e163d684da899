"""Sums of divergences of the same two rows, which one kernel computes in the passes of one divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusedkd.backends.layout import KernelId
from fusedkd.checks import Real, exact
from fusedkd.divergences import FAMILIES, Divergence, Jeffreys

Weighted = tuple[Real, Divergence]

SUMMED = (KernelId.FORWARD_KL, KernelId.JEFFREYS, KernelId.TOTAL_VARIATION, KernelId.MIXTURE)
"""The kernels whose divergences may be in a sum, of the last of them one at most. Only those of `FAMILIES`: another
class may have a factor T^k, rows or an exchanged divergence of its own.
"""
COEFFICIENTS = 7


@dataclass(frozen=True, eq=False)
class Sum(Divergence):
    """Σ weight·T^(k − 2)·D of divergences that `SUMMED` is about: with the factor T² that it has, each has its own T^k.
    Where it is infinite, its gradient is 0.
    """

    parts: tuple[Weighted, ...]
    temperature: Real = 1.0
    """The student's, or 1 if no factor is wanted."""
    name, kernel_id, columns = "sum", KernelId.SUM, "sum"

    def coefficients(self) -> tuple[Real, ...]:
        found: list[Real] = [0.0] * COEFFICIENTS
        for weight, part in self.parts:
            w, own = exact(weight), [exact(a) for a in part.coefficients()]
            if part.kernel_id == KernelId.FORWARD_KL:
                found[0] = found[0] + w
            elif part.kernel_id == KernelId.JEFFREYS:
                found[0], found[1] = found[0] + w * own[0], found[1] + w * own[1]
            elif part.kernel_id == KernelId.TOTAL_VARIATION:
                found[6] = found[6] + w / exact(self.temperature)
            else:
                found[2:6] = w * own[0], w * own[1], own[2], w * own[3]
        return tuple(found)

    def exchanged(self) -> tuple[Real, Divergence]:
        parts = []
        for weight, part in self.parts:
            factor, other = part.exchanged()
            parts.append((exact(weight) * factor, other))
        return 1.0, type(self)(tuple(parts), self.temperature)


class MixedSum(Sum):
    """With a mixture."""

    name, kernel_id = "mixed_sum", KernelId.MIXED_SUM


def summed(parts: Sequence[Weighted], temperature: Real) -> list[Weighted]:
    """These as few: what a kernel sums up is one. `temperature`: the student's, or 1 if no factor T^k is wanted."""
    one: list[Weighted] = []
    rest: list[Weighted] = []
    mixed = False
    for weight, part in parts:
        mixture = part.kernel_id == KernelId.MIXTURE
        counts = isinstance(weight, Tensor) or weight != 0
        ours = type(part) is FAMILIES.get(part.name) and part.kernel_id in SUMMED
        found = ours and counts and not (mixed and mixture)
        (one if found else rest).append((weight, part))
        mixed = mixed or (found and mixture)
    if len(one) < 2 or not _alike([temperature, *[x for w, part in one for x in (w, *part.coefficients())]]):
        return list(parts)
    if mixed:
        return [(1.0, MixedSum(tuple(one), temperature)), *rest]
    total = Sum(tuple(one), temperature)
    if any([part.kernel_id == KernelId.TOTAL_VARIATION for _, part in one]):
        return [(1.0, total), *rest]
    return [(1.0, Jeffreys(*total.coefficients()[:2])), *rest]


def _alike(values: Sequence[Real]) -> bool:
    """Whether those of a value per row have one shape. Otherwise one is a mistake, which each by itself will tell."""
    return len({value.shape for value in values if isinstance(value, Tensor) and value.dim() > 0}) < 2
