"""Model compression (Buciluǎ et al. 2006, doi:10.1145/1150402.1150464): the student learns from several teachers.

The mean over teachers of the mean over classes of (z − v_m)², whose gradient is that of the distance from the mean of
the teachers' logits; or (target=probabilities) the mean of T²·KL(p_m‖q), whose gradient is that of the mean of their
probabilities. With α < 1 the labels count, too: (1 − α)·CE + α·(…).

The first teacher is the run's. The others are trained here from what it was before it was fine-tuned, with the labels
that there are and seeds of their own, in as many steps as the student: extra training beside the student's. Seeds
change the order of the examples and the dropout; the fresh head is the same. The paper's ensemble labels made-up
examples (MUNGE); here it labels the training texts, also those without a label.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.glue.method import Count, Method, Positive, Share
from recipes.glue.run import Run
from recipes.glue.step import Step


def further_teachers(run: Run, count: int) -> list[PreTrainedModel]:
    """Fine-tuned with the seeds 1000, 1001, … beyond the run's."""
    seeds = range(run.seed + 1000, run.seed + 1000 + count)
    models = [run.fit(run.source_again(), Step.hard, run.labelled, seed=seed) for seed in seeds]
    return [model.eval().requires_grad_(False) for model in models]


def ensemble(
    run: Run,
    *,
    teachers: Count = 3,
    target: Literal["logits", "probabilities"] = "logits",
    temperature: Positive = 2.0,
    alpha: Share = 1.0,
) -> PreTrainedModel:
    """`temperature` is of the probabilities."""
    others = further_teachers(run, teachers - 1)
    options: dict[str, Any] = {"temperature": temperature}
    if target == "logits":
        options = {"temperature": 1.0, "divergence": "logit_mse"}

    def loss(step: Step) -> Tensor:
        with torch.no_grad():
            logits = [step.teacher.logits, *[step.run(other).logits for other in others]]
        return alpha * step.soft(teacher=logits, **options) + (1 - alpha) * step.hard()

    return run.fit(run.student(), loss)


METHODS = {
    "ensemble": Method(ensemble, "logit MSE to an ensemble", "doi:10.1145/1150402.1150464", needs=("teacher", "source"))
}
