"""What the conformance tests run over: every family of ``fusedkd.divergences.FAMILIES`` with its default parameters, so
that a new one is tested by being there, and with the parameters listed here, ends and interior. Those without a kernel
are apart, in DEFINED: `test_defined_families.py` has the rules for them, and their operators are nobody else's concern.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd import (
    DKD,
    JSD,
    LK,
    TAID,
    AdaptiveKL,
    AlphaBeta,
    AMiD,
    Jeffreys,
    LogitMSE,
    SkewKL,
    SkewReverseKL,
    TeacherSamples,
    TeacherTopK,
    ToDi,
)
from fusedkd.backends.layout import TOPK_KERNELS, KernelId
from fusedkd.divergences import FAMILIES, WITH_KERNEL, Divergence, ForwardKL, ReverseKL, TotalVariation
from fusedkd.divergences.sums import Sum

SUMS = [
    Sum(((1.0, ForwardKL()), (0.5, ReverseKL()))),
    Sum(((1.0, ForwardKL()), (0.5, TotalVariation()))),
    Sum(((0.3, Jeffreys(2.0, 0.5)), (0.7, ReverseKL()), (2.0, TotalVariation()))),
    Sum(((0.3, JSD(0.2)), (2.0, ReverseKL()))),
    Sum(((0.5, TotalVariation()), (1.5, SkewKL(0.1)))),
]
"""Of several divergences, by one kernel."""

DEFAULTS = [family() for family in WITH_KERNEL.values()]
PARAMETERS = [
    *(Jeffreys(*x) for x in ((0.3, 2.0), (1.0, 0.0))),
    *(JSD(x) for x in (0.0, 1e-3, 0.1, 0.9, 0.999, 1.0)),
    *(SkewKL(x) for x in (0.0, 1e-3, 0.7)),
    *(SkewReverseKL(*x) for x in ((0.0,), (1e-3,), (0.7,), (0.1, True))),
    *(AlphaBeta(*x) for x in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (1.5, -0.4), (-0.3, 1.1))),
    *(AlphaBeta(*x) for x in ((1e-3, 1.0), (1.0, 1e-3))),
    LogitMSE(0.3),
    *(DKD(*x) for x in ((1.0, 0.0), (0.0, 1.0), (3.0, 0.5))),
    *SUMS,
]

DEFINED = [
    *(family() for name, family in FAMILIES.items() if name not in WITH_KERNEL),
    *(TAID(x) for x in (0.0, 0.7, 1.0)),
    *(ToDi(x) for x in (0.0, 4.0)),
    *(AdaptiveKL(x) for x in (0.0, 0.9)),
    *(AMiD(*x) for x in ((-1.0, 0.1), (-1.0, 0.1, True), (1.0, 0.7, True), (-5.0, 0.4), (3.0, 0.4), (0.0, 0.4, True))),
    *(AMiD(0.5, x) for x in (0.0, 1.0)),
    *(LK(x) for x in (0.0, 20.0)),
]

TAILS = tuple(dict.fromkeys(tail for tail, _ in TOPK_KERNELS))
"""Of listed teachers that have kernels; the others: `test_topk_families.py`."""


def describe(x: Any) -> str:
    """For test ids: ``jsd-0.5``."""
    if not isinstance(x, Divergence):
        return str(x).removeprefix("torch.")
    values = [describe(part) for _, part in x.parts] if isinstance(x, Sum) else vars(x).values()
    return "-".join([x.name, *map(str, values)])


def parameters(divergence: Divergence) -> Tensor:
    """What its definition in `fusedkd.reference` is given: coefficients, or without a kernel its own parameters."""
    values = divergence.coefficients()
    if divergence.kernel_id is None:
        values = tuple(getattr(divergence, field.name) for field in fields(divergence))
    a = torch.zeros(7, dtype=torch.float64)
    for i, x in enumerate(values):
        a[i] = float(x)
    return a


families = pytest.mark.parametrize("divergence", DEFAULTS, ids=describe)
divergences = pytest.mark.parametrize("divergence", DEFAULTS + PARAMETERS, ids=describe)
defined_families = pytest.mark.parametrize("divergence", DEFINED, ids=describe)


def at(divergence: Divergence, temperature: float, **options: Any) -> dict[str, Any]:
    """Options of kd_loss, with the temperature where the family has one."""
    if divergence.kernel_id == KernelId.LOGIT_MSE:
        temperature = options["teacher_temperature"] = 1.0
    return {"divergence": divergence, "temperature": temperature, **options}


def top_k(logits: Tensor, k: int, tail: str = "renormalize", t: float = 1.0, padding: int = 0) -> TeacherTopK:
    """The k largest columns at temperature `t`, in the order of their numbers, the first `padding` of them padded."""
    ids = logits.topk(k, -1).indices.sort(-1).values
    logprobs = (logits.double() / t).log_softmax(-1).gather(-1, ids).to(logits.dtype)
    ids[..., :padding] = -1
    logprobs[..., :padding] = torch.nan  # nobody may read it
    return TeacherTopK(ids, logprobs, tail, logprobs_temperature=t)


def samples(logits: Tensor, k: int, seed: int = 3) -> TeacherSamples:
    generator = torch.Generator(logits.device).manual_seed(seed)
    return TeacherSamples.draw(logits, k, generator=generator)
