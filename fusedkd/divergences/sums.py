"""Sums of divergences of the same two rows, which one kernel computes in the passes of one divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from fusedkd.backends.layout import KernelId
from fusedkd.checks import Real, exact
from fusedkd.divergences import FAMILIES, Divergence

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
    name, columns = "sum", "sum"

    @property
    def kernel_id(self) -> KernelId:  # type: ignore[override]
        """The one that computes the least of what is not in the sum."""
        kernels = [part.kernel_id for _, part in self.parts]
        if KernelId.MIXTURE in kernels:
            return KernelId.MIXED_SUM
        return KernelId.SUM if KernelId.TOTAL_VARIATION in kernels else KernelId.JEFFREYS

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
        return 1.0, Sum(tuple(parts), self.temperature)


def summed(parts: Sequence[Weighted], temperature: Real) -> list[Weighted]:
    """These as few, in their order: what a kernel sums up is one, in the place of its first. `temperature`: the
    student's, or 1 if no factor T^k is wanted.
    """
    folded: list[Weighted] = []
    found: list[Weighted | None] = []  # None: where the sum goes
    for weight, part in parts:
        again = part.kernel_id == KernelId.MIXTURE and KernelId.MIXTURE in [other.kernel_id for _, other in folded]
        counts = isinstance(weight, Tensor) or weight != 0
        if type(part) is FAMILIES.get(part.name) and part.kernel_id in SUMMED and counts and not again:
            found += [] if folded else [None]
            folded.append((weight, part))
        else:
            found.append((weight, part))
    if len(folded) < 2 or not _alike([temperature, *[x for w, part in folded for x in (w, *part.coefficients())]]):
        return list(parts)
    total = _some([weight for weight, _ in folded]), Sum(tuple(folded), temperature)
    return [total if each is None else each for each in found]


def _some(weights: Sequence[Real]) -> Real:
    """1, or 0 where all weights are: such a row is not read. Numbers here are not 0."""
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    return 1.0 if len(tensors) < len(weights) else reduce(torch.logical_or, tensors).double()


def _alike(values: Sequence[Real]) -> bool:
    """Whether those of a value per row have one shape. Otherwise one is a mistake, which each by itself will tell."""
    return len({value.shape for value in values if isinstance(value, Tensor) and value.dim() > 0}) < 2
