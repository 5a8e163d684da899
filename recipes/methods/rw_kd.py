"""RW-KD: the two losses weighted for each example, by a meta-learner (Lu et al. 2021, Findings of EMNLP, 270).

Of example i: (1 − w_i)·CE_i + w_i·T²·KL_i, with w_i = sigmoid of a small network of log(1 + CE_i), log(1 + KL_i) and of
whether there is a label. The network is trained on two levels: its weights shall make the student better on labelled
examples that are held back from its training. After a small step of the student, θ' = θ − η·∇θ Σ_i (…), the held-back
loss has changed by

    −η·Σ_i [(1 − w_i)·⟨∇CE_i, g⟩ + w_i·⟨∇KL_i, g⟩],     g = ∇θ of the held-back loss,

to first order in η, and this is what the network minimises, with g scaled to length 1. η is no option, for AdamW
divides by the gradient's size. ⟨∇loss_i, g⟩ is a difference quotient, (loss_i(θ + εg) − loss_i(θ − εg))/2ε, as in DARTS
(arXiv:1806.09055): the losses of each example in two forward passes, without dropout. One gradient g, of a batch of
held-back examples, serves a whole optimiser step. No code was published; the network, what it sees and how fast it
learns are this recipe's choice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from fusedkd import kd_loss
from fusedkd.integrations.command import UsageError
from recipes.finetune.trainer import takes
from recipes.glue.method import Count, Method, Positive
from recipes.glue.run import Run
from recipes.glue.step import IGNORE, Step, has_label
from recipes.glue.trainer import BESIDE, IndexedPadding

EPSILON = 1e-2
"""How far the student moves along g, all of its weights as one vector."""
SHARE = 1e-2
"""Of the network's loss: AdamW does not see it. The clipping of gradients does, which takes network and student
together: so it leaves the student alone.
"""


def by_example(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """(CE_i, T²·KL_i), ``(B, 2)``; of scores the squared differences. Without a label CE_i is 0."""
    if labels.is_floating_point():
        hard = (logits - torch.where(has_label(labels), labels, logits.detach())).square()
        return torch.stack([hard, (logits - teacher).square()], -1)
    hard = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE)
    return torch.stack([hard, kd_loss(logits.float(), teacher, temperature=temperature, reduction="none")], -1)


class Weights(nn.Module):
    """(1 − w_i, w_i), ``(B, 2)``: at first a half for all. `speed` multiplies what the sigmoid is of."""

    def __init__(self, width: int, speed: float = 1.0):
        super().__init__()
        self.speed = speed
        self.hidden, self.out = nn.Linear(3, width), nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, losses: Tensor, known: Tensor) -> Tensor:
        seen = torch.cat([losses.clamp(min=0).log1p(), known[:, None].to(losses.dtype)], -1)
        w = (self.speed * self.out(self.hidden(seen).tanh())).sigmoid()
        return torch.cat([1 - w, w], -1)


class HeldBack:
    """What a step along each example's losses does for held-back ones."""

    def __init__(self, run: Run, rows: Any, batch: int, temperature: float):
        self.rows, self.batch, self.temperature, self.seed = rows, batch, temperature, run.seed
        self.collate = IndexedPadding(run.tokenizer)
        self.number, self.gradient = -1, {}  # type: int, dict[str, Tensor]

    def gains(self, step: Step) -> Tensor:
        """⟨∇loss_i, g⟩ of both losses, ``(B, 2)``."""
        model: Any = step.model.module if hasattr(step.model, "module") else step.model
        training = model.training
        model.eval()
        with unwrapped(model):
            if step.number != self.number:
                self.number, self.gradient = step.number, self.direction(model, step.number)
            with torch.no_grad():
                found = [self.losses(model, step, by) for by in (EPSILON, -EPSILON)]
        model.train(training)
        return (found[0] - found[1]) / (2 * EPSILON)

    def direction(self, model: Any, number: int) -> dict[str, Tensor]:
        random = np.random.default_rng((self.seed, number))
        chosen = random.choice(len(self.rows), min(self.batch, len(self.rows)), replace=False)
        batch = {k: v.to(model.device) for k, v in self.collate([self.rows[int(i)] for i in chosen]).items()}
        logits, labels = self.forward(model, {}, batch), batch["labels"]
        loss = F.mse_loss(logits, labels) if labels.is_floating_point() else F.cross_entropy(logits, labels)
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(BESIDE)}
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        found = {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}
        length = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt().clamp(min=1e-12)
        return {name: g / length for name, g in found.items()}

    def losses(self, model: Any, step: Step, by: float) -> Tensor:
        moved = {name: model.get_parameter(name) + by * g for name, g in self.gradient.items()}
        logits = self.forward(model, moved, step.batch)
        return by_example(logits, step.teacher.logits, step.labels, self.temperature)

    @staticmethod
    def forward(model: Any, moved: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        given = {name: value for name, value in batch.items() if name in takes(model)}
        logits = functional_call(model, moved, (), given).logits.float()
        return logits.squeeze(-1) if batch["labels"].is_floating_point() else logits


@contextmanager
def unwrapped(model: Any) -> Iterator[None]:
    """Within, the model is not in the half precision that accelerate has put around its `forward`: a difference
    quotient has no digits to lose.
    """
    wrapped = vars(model).pop("forward", None)
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def rw_kd(
    run: Run,
    *,
    temperature: Positive = 2.0,
    held_back: float = 0.1,
    batch: Count = 32,
    width: Count = 16,
    speed: Positive = 100.0,
) -> PreTrainedModel:
    """`held_back`: the share of the labelled examples; `batch`: how many of them g is of; `width`: of the network, one
    of whose steps moves the sigmoid's argument by up to `width` · `speed` learning rates.
    """
    labelled = run.labelled
    count = round(held_back * len(labelled))
    if not 0 < count < len(labelled):
        raise UsageError(f"held_back={held_back} of {len(labelled)} labelled examples leaves none on one of the sides")
    order = np.random.default_rng(run.seed).permutation(len(labelled))
    rows = labelled.select(order[:count])
    others = run.train.select(np.flatnonzero(~np.isin(run.train["index"], rows["index"])))
    side = HeldBack(run, rows, batch, temperature)
    torch.manual_seed(run.seed)
    beside = Weights(width, speed)

    def loss(step: Step) -> Tensor:
        losses = by_example(step.student.logits, step.teacher.logits, step.labels, temperature)
        weights = beside(losses.detach(), has_label(step.labels))
        counts = torch.stack([step.counts.labelled.clamp(min=1), step.counts.rows])
        network = -SHARE / speed * (weights * side.gains(step) / counts).sum()
        network = network - network.detach()  # a gradient without a value
        return (weights.detach() * losses / counts).sum() + network

    return run.fit(run.student(), loss, others, beside=beside)


METHODS = {"rw_kd": Method(rw_kd, "RW-KD", "doi:10.18653/v1/2021.findings-emnlp.270")}
