"""Students with zeros instead of fewer layers: magnitude pruning and lottery tickets, both with a teacher.

In each weight matrix of the layers the share `sparsity` of the weights, those of least |w|, becomes 0 and stays 0;
embeddings, norms, biases and the head stay as they are. The loss is Hinton's, (1 − α)·CE + α·T²·KL. The student is the
run's: `--layers` with all of the teacher's numbers prunes a model as deep as the teacher.

gradual   the share grows in 20 steps as s·(1 − (1 − t)³), where t goes from 0 to 1 over the first 70 % of the training
          (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)
one shot  the pretrained weights are pruned, then trained
lottery   iterative magnitude pruning (Chen et al. 2020, arXiv:2007.12223, §2): train, prune some more of the trained
          weights, set the others back to the pretrained ones; after `rounds` of this train the ticket. Each round is a
          training beside the student's own, `search` times as long. The paper ranks the weights of all matrices
          together, here each matrix has its share.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.students import LAYER
from recipes.glue.method import Count, Method, Positive, Share
from recipes.glue.run import Run
from recipes.glue.step import Step
from recipes.methods.hinton import hinton

PRUNINGS, RAMP = 20, 0.7


class Masks:
    """Of the weight matrices of a model's layers, which are its own again after `bake`.

    While it is trained, each is W ⊙ mask: what is pruned has no gradient, and no part in the norm of the gradient.
    """

    def __init__(self, model: nn.Module):
        self.matrices = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and re.search(LAYER, f".{name}.")
        }
        if not self.matrices:
            raise UsageError(f"{type(model).__name__} has no layers whose weights could be pruned")
        for module in self.matrices.values():
            prune.identity(module, "weight")

    @torch.no_grad()
    def grow(self, sparsity: float) -> None:
        """Prune the smallest weights until this share is 0 in each matrix; what is pruned stays so."""
        for module in map(_pruned, self.matrices.values()):
            size = module.weight_orig.abs().masked_fill(module.weight_mask == 0, -1.0).flatten()
            smallest = size.topk(_count(sparsity, size.numel()), largest=False).indices
            module.weight_mask.view(-1)[smallest] = 0

    def bake(self, sparsity: float) -> None:
        """Write the zeros into the weights; RuntimeError where a matrix has fewer than it must have."""
        for name, module in self.matrices.items():
            prune.remove(module, "weight")
            zeros, wanted = int((module.weight == 0).sum()), _count(sparsity, module.weight.numel())
            if zeros < wanted:
                raise RuntimeError(f"{name} has {zeros} zeros, not {wanted}")


def _pruned(module: Any) -> Any:
    """With `weight_orig` and `weight_mask`, as torch.nn.utils.prune makes it."""
    return module


def _count(sparsity: float, numbers: int) -> int:
    return round(sparsity * numbers)


def sparsity_at(share: float, sparsity: float) -> float:
    """Of gradual pruning, after a share of the training, a number of 20 values."""
    t = min(int(share / RAMP * PRUNINGS) / PRUNINGS, 1.0)
    return sparsity * (1 - (1 - t) ** 3)


def check(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity must be a share of the weights, at least 0 and below 1, not {sparsity:g}")


def magnitude(
    run: Run,
    *,
    sparsity: float = 0.5,
    schedule: Literal["gradual", "one_shot"] = "gradual",
    temperature: Positive = 2.0,
    alpha: Share = 0.5,
) -> PreTrainedModel:
    check(sparsity)
    if schedule not in ("gradual", "one_shot"):
        raise UsageError(f"--method magnitude_pruning: schedule must be gradual or one_shot, not {schedule!r}")
    model = run.student()
    masks, distil = Masks(model), hinton(alpha, temperature)
    before = -1.0

    def loss(step: Step) -> Tensor:
        nonlocal before
        now = sparsity_at(step.number / step.total, sparsity)
        if schedule == "gradual" and now != before:  # once for all micro-batches of a step
            masks.grow(now)
            before = now
        return distil(step)

    if schedule == "one_shot":
        masks.grow(sparsity)
    run.fit(model, loss)
    masks.grow(sparsity)  # of a training of so few steps that the last pruning was none of them
    masks.bake(sparsity)
    return model


def lottery(
    run: Run,
    *,
    sparsity: float = 0.5,
    rounds: Count = 3,
    search: Positive = 1.0,
    temperature: Positive = 2.0,
    alpha: Share = 0.5,
) -> PreTrainedModel:
    check(sparsity)
    return ticket(run, sparsity, rounds, max(1, round(search * run.steps)), hinton(alpha, temperature))


def ticket(run: Run, sparsity: float, rounds: int, steps: int, loss: Callable[[Step], Tensor]) -> PreTrainedModel:
    """Found in `rounds` trainings of so many steps, and trained."""
    found: dict[str, Tensor] = {}
    for done in range(rounds + 1):
        model = run.student()  # rewound
        masks = Masks(model)
        for name, module in masks.matrices.items():
            if done:
                _pruned(module).weight_mask.copy_(found[name])
        run.fit(model, loss, steps=run.steps if done == rounds else steps)
        if done < rounds:
            masks.grow(1 - (1 - sparsity) ** ((done + 1) / rounds))
            found = {name: _pruned(module).weight_mask.cpu() for name, module in masks.matrices.items()}
    masks.bake(sparsity)
    return model


METHODS = {
    "magnitude_pruning": Method(
        magnitude,
        "magnitude pruning",
        "arXiv:1710.01878",
        published="BERT-base with KD, MNLI-m dev 84.5: 78.3 with 10 % of the weights, 69.4 with 3 % (arXiv:2005.07683)",
    ),
    "lottery_ticket": Method(
        lottery,
        "lottery ticket",
        "arXiv:2007.12223",
        published="BERT-base without KD: as good as dense with 60 % zeros on SST-2 and RTE, 50 % on CoLA and STS-B",
    ),
}
