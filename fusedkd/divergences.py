"""The divergence families of :func:`fusedkd.kd_loss`: the one place where their names and what the functions need to
know of them stand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Divergence:
    """A divergence D(p, q) of the teacher's p and the student's q.

    ``temperature_power``: k of the factor T^k that keeps the gradient's size independent of T (Hinton et al. 2015, §2).
    """

    name: str
    temperature_power: int


FAMILIES = {family.name: family for family in (Divergence("forward_kl", 2),)}


def resolve(divergence: str | Divergence) -> Divergence:
    if isinstance(divergence, Divergence):
        return divergence
    if divergence not in FAMILIES:
        raise ValueError(f"divergence must be one of {', '.join(FAMILIES)}, not {divergence!r}")
    return FAMILIES[divergence]
