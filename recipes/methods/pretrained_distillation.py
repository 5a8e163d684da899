"""Distillation on texts without labels, alone and before the labels: pre-trained distillation (Turc et al. 2019,
arXiv:1908.08962, §2).

`kd_unlabelled`: T²·KL(p_T ‖ q_T) on all training texts; no label is seen. `pretrained_distillation`: three stages. The
student is pre-trained: it has layers of the pre-trained teacher, or is given with `--student`. It is distilled on all
training texts at temperature 1; the paper's loss −Σ p·log q has the gradient of the KL divergence. Last, it is
fine-tuned on the labels that there are.

The paper distils on texts of the task's domain, up to 50 times as many as there are labels: keep the labels of a few
examples with `--labels`.
"""

from torch import Tensor
from transformers import PreTrainedModel

from recipes.glue.method import Method, Positive, Share
from recipes.glue.run import Run
from recipes.glue.step import Step


def kd_unlabelled(run: Run, *, temperature: Positive = 2.0) -> PreTrainedModel:
    return run.fit(run.student(), lambda step: soft(step, temperature))


def pretrained_distillation(run: Run, *, share: Share = 0.5, temperature: Positive = 1.0) -> PreTrainedModel:
    """share: of the steps that are distillation."""
    first, second = run.split(share, 1 - share)
    student = run.fit(run.student(), lambda step: soft(step, temperature), steps=first)
    return run.fit(student, Step.hard, run.labelled, steps=second)


def soft(step: Step, temperature: float) -> Tensor:
    return step.soft(temperature=temperature)


METHODS = {
    "kd_unlabelled": Method(kd_unlabelled, "KD without labels", "arXiv:1503.02531"),
    "pretrained_distillation": Method(
        pretrained_distillation,
        "pre-trained distillation",
        "arXiv:1908.08962",
        published="SST-2 test, 6 layers of 768 columns from BERT-large: 91.8",
    ),
}
