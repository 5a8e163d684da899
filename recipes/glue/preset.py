"""The losses of :mod:`fusedkd.integrations.presets`, which are those of a DistillationTrainer, on a task."""

from torch import Tensor
from transformers import PreTrainedModel

from fusedkd.integrations.presets import Recipe
from recipes.glue.step import Loss, Step


def by_preset(recipe: Recipe) -> Loss:
    """Its terms, to be given to `Run.fit` as well, and its losses of teacher and labels."""
    kd = recipe["kd"]

    def loss(step: Step) -> Tensor:
        total = step.terms() if recipe["terms"] else step.labels.new_zeros((), dtype=step.student.logits.dtype)
        if kd.kd_weight:
            total = total + kd.kd_weight * step.soft(temperature=kd.temperature, divergence=kd.divergence)
        return total + kd.ce_weight * step.hard() if kd.ce_weight else total

    return loss


def other_width(student: PreTrainedModel, teacher: PreTrainedModel | None) -> bool:
    """Whether hidden states of the two are compared behind a projection only."""
    return teacher is not None and bool(student.config.hidden_size != teacher.config.hidden_size)
