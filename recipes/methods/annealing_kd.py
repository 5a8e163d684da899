"""Annealing-KD (Jafari et al. 2021, arXiv:2104.07163, §3): first the teacher's logits, from small to full size; then
the labels.

Stage I, without labels: the mean over examples and classes of (z − φ·v)², z the student's logits and v the teacher's,
with φ(𝒯) = 1 − (𝒯 − 1)/τ_max. The temperature 𝒯 falls from τ_max to 1, each value for an equal part of the stage, so
that φ rises from 1/τ_max to 1. Stage II: the labels' loss alone, on the examples that have one.

The paper sums over classes; its code takes the mean, as here. Of its 20 epochs 14 are stage I, with τ_max = 7 or 14.
Here both stages share the steps of one run in that proportion, and each has a learning rate that rises and falls.
"""

from torch import Tensor
from transformers import PreTrainedModel

from fusedkd import LogitMSE
from recipes.glue.method import Count, Method, Share
from recipes.glue.run import Run
from recipes.glue.step import Step


def annealing_kd(run: Run, *, tau_max: Count = 7, share: Share = 0.7) -> PreTrainedModel:
    """tau_max: how many values φ takes; share: of the steps that are stage I."""
    first, second = run.split(share, 1 - share)
    student = run.fit(run.student(), lambda step: annealed(step, phi(step.number, step.total, tau_max)), steps=first)
    return run.fit(student, Step.hard, run.labelled, steps=second)


def phi(number: int, total: int, tau_max: int) -> float:
    """At the optimiser step `number` of `total`: 1/τ_max, 2/τ_max, …, 1."""
    temperature = tau_max - number * tau_max // total
    return 1 - (temperature - 1) / tau_max


def annealed(step: Step, scale: float) -> Tensor:
    """The squared difference from the teacher's logits, or scores, times `scale`."""
    if step.is_regression:
        return step.soft(teacher=scale * step.teacher.logits)
    return step.soft(divergence=LogitMSE(scale), temperature=1.0)


METHODS = {
    "annealing_kd": Method(
        annealing_kd,
        "Annealing-KD",
        "arXiv:2104.07163",
        published="GLUE dev, DistilRoBERTa from RoBERTa-large: 81.42; TAKD 80.85, KD 80.8, labels alone 79.3",
    )
}
