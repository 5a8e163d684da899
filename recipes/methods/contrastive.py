"""CILDA and CoDIR: an example's layers are told from those of other examples.

(1 − α)·CE + α·T²·KL + weight·InfoNCE. The hidden states of each layer are averaged over the tokens of an example, and
the means of all layers put together; the student's are projected to the teacher's width, and InfoNCE is
−log of the softmax of cos(s_i, t_j)/τ at j = i, a mean over examples. What an example is told from:

cilda   the other examples of its micro-batch, on its device (Haidar et al. 2022, arXiv:2204.07674): the loss depends
        on how a step is cut. The paper's generator of adversarial text is another method's.
codir   examples of another class in a bank of the last `bank` examples (Sun et al. 2020, arXiv:2009.14167, §3). The
        class is the one that the teacher predicts, of a score the nearest whole number, so that examples without a
        label have one; in the paper it is the label. The bank takes up the examples of a step after it. It holds the
        teacher's side, which never becomes old: the teacher is frozen.

In the papers the teacher's side is projected as well, to few columns. Here it is taken as it is, because projections of
both sides could agree on little of what the teacher knows. The papers tune the weights; the defaults are arbitrary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedkd import contrastive_hidden_loss
from fusedkd.losses.pool import pooled, token_weights
from recipes.glue.method import Count, Method, Positive, Share, Weight
from recipes.glue.run import Run
from recipes.glue.step import Loss, Step


def summaries(step: Step) -> tuple[Tensor, Tensor]:
    """Of each example all layers' means, ``(B, N·H)``: the student's projected, the teacher's."""
    student, teacher = (side.states.hidden[1:] for side in (step.student, step.teacher))
    shares, _ = token_weights(student[0], step.attended)
    ours, theirs = (torch.cat([pooled(h, shares) for h in side], -1) for side in (student, teacher))
    return step.beside(ours), theirs


def cilda(
    run: Run, *, alpha: Share = 0.5, temperature: Positive = 1.0, weight: Weight = 0.5, tau: Positive = 0.07
) -> PreTrainedModel:
    def contrast(step: Step) -> Tensor:
        ours, theirs = summaries(step)
        loss: Tensor = contrastive_hidden_loss(ours, theirs, temperature=tau, normalizer=step.counts.rows)
        return loss

    return contrasted(run, contrast, alpha, temperature, weight)


class Bank:
    """The teacher's summaries of the last `size` examples ``(R, N·H)``, and their classes ``(R,)``."""

    def __init__(self, size: int):
        self.size, self.number = size, 0
        self.rows: Tensor | None = None
        self.classes: Tensor | None = None
        self.new: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, classes: Tensor, number: int) -> None:
        """Examples of a micro-batch, which the bank has from the next optimiser step on."""
        if number != self.number and self.new:
            held = [] if self.rows is None or self.classes is None else [(self.rows, self.classes)]
            self.rows, self.classes = (torch.cat(part)[-self.size :] for part in zip(*held, *self.new, strict=True))
            self.new = []
        self.number = number
        self.new.append((rows.detach(), classes))

    def others(self, label: Tensor) -> Tensor | None:
        """The rows of all classes but one; None: there is none."""
        if self.rows is None:
            return None
        rows = self.rows[self.classes != label]
        return rows if len(rows) else None


def codir(
    run: Run,
    *,
    alpha: Share = 0.5,
    temperature: Positive = 1.0,
    weight: Weight = 0.1,
    tau: Positive = 0.07,
    bank: Count = 4096,
) -> PreTrainedModel:
    memory = Bank(bank)

    def contrast(step: Step) -> Tensor:
        ours, theirs = summaries(step)
        logits = step.teacher.logits
        classes = logits.round().long() if step.is_regression else logits.argmax(-1)
        memory.add(theirs, classes, step.number)
        total = 0 * ours.sum()
        for label in classes.unique():
            if (others := memory.others(label)) is not None:
                options: Any = {"temperature": tau, "normalizer": step.counts.rows}
                total = total + contrastive_hidden_loss(
                    ours, theirs, negatives=others, mask=classes == label, **options
                )
        return total

    return contrasted(run, contrast, alpha, temperature, weight)


def contrasted(run: Run, contrast: Loss, alpha: float, temperature: float, weight: float) -> PreTrainedModel:
    def loss(step: Step) -> Tensor:
        soft = step.soft(temperature=temperature)
        return alpha * soft + (1 - alpha) * step.hard() + weight * contrast(step)

    student = run.student()
    sizes = [model.config.num_hidden_layers * model.config.hidden_size for model in (student, run.source)]
    torch.manual_seed(run.seed)
    return run.fit(student, loss, hidden=True, beside=nn.Linear(*sizes))


METHODS = {
    "cilda": Method(cilda, "CILDA, its contrastive loss", "arXiv:2204.07674"),
    "codir": Method(codir, "CoDIR", "arXiv:2009.14167"),
}
