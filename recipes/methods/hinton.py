"""Labels alone, and distillation of the teacher's logits.

Hinton et al. 2015 (arXiv:1503.02531), §2: (1 − α)·CE + α·T²·KL(p‖q), p and q the softmax of the teacher's logits v/T
and of the student's z/T. CE is a mean over the examples that have a label, the teacher's term one over all examples.
Other divergences take the place of KL(p‖q):

    reverse_kl   KL(q‖p)                                      MiniLLM, arXiv:2306.08543, eq. 1
    jeffreys     KL(p‖q) + KL(q‖p)                            Jeffreys 1946
    jsd          ½·KL(p‖m) + ½·KL(q‖m), m = (p + q)/2         GKD, arXiv:2306.13649, eq. 1, with β = ½
    logit_mse    mean over classes of (z − v)², no softmax    Ba and Caruana 2014, arXiv:1312.6184 (there half the sum
                                                              over classes, and no term of the labels)
    dkd          αTCKD + βNCKD                                DKD, arXiv:2203.08679, eq. 7

KD is written with CE(p, q), too, whose gradient is that of KL(p‖q); PKD's and TAKD's code divides by the number of
classes besides. TRL and Liger leave T² out of their divergences; here it is a factor of all of these
but logit_mse. Of scores the teacher's term is the squared difference, whatever T.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusedkd import DKD
from fusedkd.divergences import DivergenceName
from fusedkd.integrations.command import UsageError
from recipes.glue.method import Method, Positive, Share, Weight
from recipes.glue.run import Run
from recipes.glue.step import Loss, Step, has_label


def hinton(alpha: float, temperature: float, divergence: str = "forward_kl") -> Loss:
    """(1 − α) · labels + α · teacher."""

    def loss(step: Step) -> Tensor:
        soft = step.soft(temperature=temperature, divergence=divergence)
        return alpha * soft + (1 - alpha) * step.hard()

    return loss


def labels_alone(run: Run) -> PreTrainedModel:
    return run.fit(run.student(), Step.hard, run.labelled)


def distil(
    run: Run, *, temperature: Positive = 2.0, alpha: Share = 0.5, divergence: DivergenceName = "forward_kl"
) -> PreTrainedModel:
    if not run.task.labels and divergence not in ("forward_kl", "logit_mse"):
        raise UsageError(f"divergence={divergence} is one of classes, but the labels of {run.task.name} are scores")
    if divergence == "dkd":
        raise UsageError("divergence=dkd is the method dkd, which has an option for each of its weights")
    if divergence == "logit_mse" and temperature != 1:
        raise UsageError(f"divergence=logit_mse has no softmax: temperature must be 1, not {temperature}")
    return run.fit(run.student(), hinton(alpha, temperature, divergence))


def logit_mse(run: Run, *, alpha: Share = 1.0) -> PreTrainedModel:
    return distil(run, alpha=alpha, temperature=1.0, divergence="logit_mse")


def dkd(run: Run, *, temperature: Positive = 4.0, alpha: Weight = 1.0, beta: Weight = 8.0) -> PreTrainedModel:
    """CE + T²·(αTCKD + βNCKD): the label's class against the rest, and the rest among themselves.

    An example without a label is split at the class that the teacher prefers. With two classes the rest is one class,
    NCKD is 0 and this is CE + α·T²·KL. The published code raises the second term from 0 in the first 20 epochs.
    """

    def loss(step: Step) -> Tensor:
        target = torch.where(has_label(step.labels), step.labels, step.teacher.logits.argmax(-1))
        return step.hard() + step.soft(labels=target, temperature=temperature, divergence=DKD(alpha, beta))

    return run.fit(run.student(), loss)


CLASSES: tuple[Literal["teacher", "classes"], ...] = ("teacher", "classes")
OF_ALP_KD = "GLUE dev, BERT 12 → 4 layers: 76.02 (labels alone 74.61), ALP-KD's table 1"
METHODS = {
    "ce": Method(labels_alone, "labels alone", "", "GLUE dev, BERT of 4 layers: 74.61, ALP-KD's table 1", needs=()),
    "kd": Method(distil, "KD", "arXiv:1503.02531", OF_ALP_KD),
    "reverse_kl": Method(partial(distil, divergence="reverse_kl"), "reverse KL", "arXiv:2306.08543", needs=CLASSES),
    "jeffreys": Method(partial(distil, divergence="jeffreys"), "Jeffreys", "doi:10.1098/rspa.1946.0056", needs=CLASSES),
    "jsd": Method(partial(distil, divergence="jsd"), "Jensen-Shannon", "arXiv:2306.13649", needs=CLASSES),
    "logit_mse": Method(logit_mse, "logit MSE", "arXiv:1312.6184"),
    "dkd": Method(dkd, "DKD", "arXiv:2203.08679", "CIFAR-100, ResNet-56 → 20: 71.97 (KD 70.66)", needs=CLASSES),
}
