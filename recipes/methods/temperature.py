"""A temperature that is learned with the student: Curriculum Temperature (Li et al. 2023, arXiv:2211.16231), global-T.

(1 − α)·CE + α·T²·KL(p‖q), and T = low + (high − low)·sigmoid(b + speed·t) with one trained number t, 0 at first. The
gradient of T²·KL in T goes to t alone:

    d(T²·KL)/dT = 2T·KL + T²·dKL/dT,    dKL/dT = −[Σ(q − p)·z + Σp·(δ − KL)·v]/T²,    δ = log p − log q

direction=up reverses it, as the paper does: T makes the student's task harder. direction=down minimises over T as
well; there the loss vanishes towards T = 0, so that only `low` stops it. The paper also raises this gradient's weight
from 0 to 1, its curriculum: that is left out, for AdamW divides by the gradient's size. The bounds and the start are
this recipe's choice.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedkd.integrations.command import UsageError
from recipes.glue.method import Method, Positive, Share
from recipes.glue.run import Run
from recipes.glue.step import Step


class Temperature(nn.Module):
    def __init__(self, start: float, low: float, high: float, speed: float):
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))
        share = (start - low) / (high - low)
        self.low, self.high, self.speed, self.b = low, high, speed, math.log(share / (1 - share))

    def forward(self) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(self.b + self.speed * self.t)


def softened(z: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """T²·KL(p‖q) of each row, differentiable in T."""
    log_p, log_q = ((x.detach().double() / temperature.double()).log_softmax(-1) for x in (v, z))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def learned_temperature(
    run: Run,
    *,
    alpha: Share = 0.5,
    direction: Literal["up", "down"] = "up",
    start: float = 2.0,
    low: float = 1.0,
    high: float = 10.0,
    speed: Positive = 100.0,
) -> PreTrainedModel:
    """One optimiser step moves the sigmoid's argument by up to `speed` learning rates. T is the last of `run.logs`."""
    if not 0 < low < start < high:
        raise UsageError(f"0 < low < start < high must hold, not low={low}, start={start}, high={high}")
    sign = -1.0 if direction == "up" else 1.0
    beside = Temperature(start, low, high, speed)

    def loss(step: Step) -> Tensor:
        z, temperature = step.student.logits, beside()
        soft = step.soft(temperature=temperature.detach())
        # Divided by what t is multiplied with: AdamW does not see it, and the clipping of gradients, which takes t and
        # the student together, leaves the student alone.
        own = softened(z, step.teacher.logits, temperature).sum() / step.counts.rows / (speed * (high - low))
        own = sign * (own - own.detach())  # a gradient without a value
        return alpha * soft + (1 - alpha) * step.hard() + own.to(soft.dtype)

    model = run.fit(run.student(), loss, beside=beside)
    run.logs.append({"temperature": float(beside().detach())})
    return model


METHODS = {
    "learned_temperature": Method(
        learned_temperature,
        "learned temperature",
        "arXiv:2211.16231",
        "CIFAR-100, ResNet-56 → 20: 71.19 (KD 70.66)",
        needs=("teacher", "classes"),
    )
}
