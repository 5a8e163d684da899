"""What the conformance tests run over: every family of ``fusedkd.divergences.FAMILIES`` with its default parameters, so
that a new one is tested by being there, and with the parameters listed here, ends and interior.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd import DKD, JSD, AlphaBeta, Jeffreys, LogitMSE, SkewKL, SkewReverseKL, TeacherSamples, TeacherTopK
from fusedkd.backends.layout import KernelId
from fusedkd.divergences import FAMILIES, Divergence

DEFAULTS = [family() for family in FAMILIES.values()]
PARAMETERS = [
    *(Jeffreys(*x) for x in ((0.3, 2.0), (1.0, 0.0))),
    *(JSD(x) for x in (0.0, 1e-3, 0.1, 0.9, 0.999, 1.0)),
    *(SkewKL(x) for x in (0.0, 1e-3, 0.7)),
    *(SkewReverseKL(*x) for x in ((0.0,), (1e-3,), (0.7,), (0.1, True))),
    *(AlphaBeta(*x) for x in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (1.5, -0.4), (-0.3, 1.1))),
    *(AlphaBeta(*x) for x in ((1e-3, 1.0), (1.0, 1e-3))),
    LogitMSE(0.3),
    *(DKD(*x) for x in ((1.0, 0.0), (0.0, 1.0), (3.0, 0.5))),
]


def describe(x: Any) -> str:
    """For test ids: ``jsd-0.5``."""
    if not isinstance(x, Divergence):
        return str(x).removeprefix("torch.")
    return "-".join([x.name, *(str(v) for v in vars(x).values())])


families = pytest.mark.parametrize("divergence", DEFAULTS, ids=describe)
divergences = pytest.mark.parametrize("divergence", DEFAULTS + PARAMETERS, ids=describe)


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
