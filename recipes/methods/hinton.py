"""Labels alone, and Hinton's distillation with any divergence between the classes' probabilities.

Hinton et al. 2015 (arXiv:1503.02531), §2: (1 − α)·CE + α·T²·KL(p_T ‖ q_T).
"""

from functools import partial

from transformers import PreTrainedModel

from recipes.glue.method import Method
from recipes.glue.run import Run
from recipes.glue.step import Step


def labels_alone(run: Run) -> PreTrainedModel:
    return run.fit(run.student(), Step.hard, run.labelled)


def distil(
    run: Run, *, temperature: float = 2.0, alpha: float = 0.5, divergence: str = "forward_kl"
) -> PreTrainedModel:
    """On all examples; those without a label have the teacher's term alone."""

    def loss(step: Step):  # type: ignore[no-untyped-def]
        soft = step.soft(temperature=temperature, divergence=divergence)
        return alpha * soft + (1 - alpha) * step.hard()

    return run.fit(run.student(), loss)


METHODS = {
    "ce": Method(labels_alone, "labels alone", "", needs=()),
    "kd": Method(distil, "KD", "arXiv:1503.02531"),
    "reverse_kl": Method(partial(distil, divergence="reverse_kl"), "reverse KL", "arXiv:2306.08543"),
}
