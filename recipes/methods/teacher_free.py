"""Without a teacher: a made-up one, or a copy of the student.

label_smoothing    (1 − ε)·CE + ε·KL(u‖q), u uniform: label smoothing up to a constant, log C of each example (Yuan et
                   al. 2020, arXiv:1909.11723, §3; the published code shares ε out among the other classes alone).
tf_kd_reg          Tf-KD_reg (there, §5.2): (1 − α)·CE + α·T²·KL(p_T‖q_T) with the virtual teacher p, which gives
                   `correct` to the label and shares the rest; p_T is the softmax of log p/T. The published code
                   (form=code) takes the softmax of the probabilities p/T instead, and the student's at temperature 1:
                   smoothing towards almost equal probabilities. Its mean over classes times 100, for 100 classes, is
                   the sum here. The paper's formulas have no T².
tf_kd_self         Tf-KD_self (there, §5.1): (1 − α)·CE + α·T²·KL from a copy of the student trained with labels alone;
                   the published code has its mean over classes times a factor, 1 as a rule.
self_distillation  Rounds without labels (Mobahi et al. 2020, arXiv:2002.05715): a student trained with labels teaches a
                   new one, by its predictions alone, and so on. Each round regularises more; beyond a few it underfits.

The last two train one or more students before the one that is returned, each for all steps of the run: extra training.
A virtual teacher says something of labelled examples only: label_smoothing and tf_kd_reg leave out the others.
"""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.glue.method import Count, Method, Positive, Share
from recipes.glue.run import Run
from recipes.glue.step import Step
from recipes.methods.hinton import hinton, labels_alone


def label_smoothing(run: Run, *, epsilon: Share = 0.1) -> PreTrainedModel:

    def loss(step: Step) -> Tensor:
        uniform = torch.zeros_like(step.student.logits)
        return (1 - epsilon) * step.hard() + epsilon * step.soft(teacher=uniform, temperature=1.0)

    return run.fit(run.student(), loss, run.labelled)


def virtual_teacher(labels: Tensor, classes: int, correct: float) -> Tensor:
    """Probabilities ``(B, C)``."""
    rest = torch.full((len(labels), classes), (1 - correct) / (classes - 1), device=labels.device)
    return rest.scatter(1, labels[:, None], correct)


def tf_kd_reg(
    run: Run,
    *,
    alpha: Share = 0.1,
    temperature: Positive = 20.0,
    correct: Share = 0.99,
    form: Literal["paper", "code"] = "paper",
) -> PreTrainedModel:

    def loss(step: Step) -> Tensor:
        teacher = virtual_teacher(step.labels, step.student.logits.shape[-1], correct)
        if form == "paper":
            soft = step.soft(teacher=teacher.log(), temperature=temperature)
        else:
            soft = step.soft(teacher=teacher, temperature=1.0, teacher_temperature=temperature)
        return (1 - alpha) * step.hard() + alpha * soft

    return run.fit(run.student(), loss, run.labelled)


def tf_kd_self(run: Run, *, alpha: Share = 0.5, temperature: Positive = 2.0) -> PreTrainedModel:
    """The paper tunes both numbers for each network."""
    loss = hinton(alpha, temperature)
    return run.fit(run.student(), loss, teacher=labels_alone(run))


def self_distillation(run: Run, *, rounds: Count = 2, temperature: Positive = 1.0) -> PreTrainedModel:
    model = labels_alone(run)
    for _ in range(rounds):
        model = run.fit(run.student(), lambda step: step.soft(temperature=temperature), teacher=model)
    return model


YUAN = "arXiv:1909.11723"
ALONE = "CIFAR-100, ResNet-18 (labels alone 75.87): "
METHODS = {
    "label_smoothing": Method(label_smoothing, "label smoothing", YUAN, ALONE + "77.26", needs=("classes",)),
    "tf_kd_reg": Method(tf_kd_reg, "Tf-KD_reg", YUAN, ALONE + "77.36", needs=("classes",)),
    "tf_kd_self": Method(tf_kd_self, "Tf-KD_self", YUAN, ALONE + "77.10", needs=()),
    "self_distillation": Method(self_distillation, "self-distillation", "arXiv:2002.05715", needs=()),
}
