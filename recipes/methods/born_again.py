"""Born-Again Networks (Furlanello et al. 2018, arXiv:1805.04770, §3): students of students of one size.

Generation 0 learns from labels alone, each further one from the one before, at temperature 1. Each starts as
the run's student does, with a seed of its own. `variant`:

    labels   CE(y, q) + CE(p, q), p of the generation before ("BAN+L"; the gradient of the second term is KL's)
    plain    CE(p, q)
    cwtm     CE of the labels, each example weighted with max p over the mean of max p
    dkpp     CE(p', q): p whose values, but for the largest, are permuted at random, one permutation for each example
             and generation

The paper's mean of max p is over the batch, here over the labelled examples, so that a step has one gradient however it
is cut. With two classes dkpp permutes nothing. p is computed once, of all training examples without dropout.

born_again returns the last generation, born_again_ensemble the mean of the logits of all generations but 0: a model of
`generations` times the size. Every generation takes all steps of the run: extra training.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fusedkd.integrations.command import UsageError
from recipes.glue.ensemble import Ensemble
from recipes.glue.method import Count, Method
from recipes.glue.run import Run
from recipes.glue.step import IGNORE, Loss, Step

Variant = Literal["labels", "plain", "cwtm", "dkpp"]


def permuted(logits: Tensor, seed: int) -> Tensor:
    """``(N, C)``: each row's largest stays where it is, the others change places at random."""
    random = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed))
    top = logits.argmax(-1, keepdim=True)
    places = logits.scatter(1, top, float("inf")).argsort(-1)[:, :-1]  # of the others
    order = random.scatter(1, top, float("inf")).argsort(-1)[:, :-1]
    return logits.scatter(1, places, logits.gather(1, order))


def taught_by(logits: Tensor, run: Run, variant: Variant, seed: int) -> Loss:
    """`logits` of the generation before, of every row of `run.train`."""
    device = run.arguments.device
    if variant == "cwtm":
        sure = logits.softmax(-1).amax(-1)
        sure = (sure / sure[np.asarray(run.labelled["index"])].mean()).to(device)
        return lambda step: weighted(step, sure[step.batch["index"]])
    table = (permuted(logits, seed) if variant == "dkpp" else logits).to(device)

    def loss(step: Step) -> Tensor:
        soft = step.soft(teacher=table[step.batch["index"]], temperature=1.0)
        return soft + step.hard() if variant == "labels" else soft

    return loss


def weighted(step: Step, weights: Tensor) -> Tensor:
    rows = F.cross_entropy(step.student.logits.float(), step.labels, reduction="none", ignore_index=IGNORE)
    return (weights * rows).sum() / step.counts.labelled.clamp(min=1)


def all_generations(run: Run, count: int, variant: Variant) -> list[PreTrainedModel]:
    """Generation 0 and `count` others; 0 is the student of labels alone with the run's seed."""
    if not run.task.labels and variant in ("cwtm", "dkpp"):
        raise UsageError(f"variant={variant} is one of classes, but the labels of {run.task.name} are scores")
    models: list[PreTrainedModel] = []
    for number in range(count + 1):
        seed = run.seed + 1000 * number
        its = replace(run, arguments=replace(run.arguments, seed=seed))
        loss = taught_by(run.logits(models[-1], run.train), run, variant, seed) if models else Step.hard
        rows = run.labelled if not models or variant == "cwtm" else run.train
        models.append(its.fit(its.student(), loss, rows))
    return models


def born_again(run: Run, *, generations: Count = 2, variant: Variant = "labels") -> PreTrainedModel:
    return all_generations(run, generations, variant)[-1]


def born_again_ensemble(run: Run, *, generations: Count = 2, variant: Variant = "labels") -> PreTrainedModel:
    return Ensemble.of(all_generations(run, generations, variant)[1:])


PAPER = "arXiv:1805.04770"
DENSENET = "CIFAR-100 error, DenseNet-80-80 (generation 0: 17.16), table 2: "
METHODS = {
    "born_again": Method(born_again, "Born-Again", PAPER, DENSENET + "15.5, third generation, plain", needs=()),
    "born_again_ensemble": Method(
        born_again_ensemble,
        "Born-Again ensemble",
        PAPER,
        DENSENET + "15.14, three generations, plain",
        needs=(),
    ),
}
