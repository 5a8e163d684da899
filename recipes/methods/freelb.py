"""FreeLB (Zhu et al. 2020, arXiv:1909.11764, algorithm 1): training on embeddings that are moved to raise the loss.

A perturbation δ of the word embeddings begins at random, uniform in ±start/√(L·H) for L tokens of H columns. The loss
is taken at K values of δ, each δ + η·g/‖g‖ of the one before, with g the gradient of its loss and ‖·‖ the norm over all
tokens and columns of an example; a δ longer than max_norm is scaled back to it. The model learns from the mean of the
K losses, which have the same dropout.

`freelb` is on the labels alone. `freelb_kd` takes (1 − α)·CE + α·T²·KL(p_T ‖ q_T) as its loss, both in the ascent and
in the descent; the teacher reads the text as it is, since δ belongs to the student's embeddings.

An optimiser step costs K forward and K backward passes, K − 1 more for the gradients of δ alone, and the memory of K
batches; the published code has K passes each and the memory of one, since it adds up the weights' gradients on the way.
Its runs have K = 2 to 4, η = 0.03 to 0.2 and start up to 0.6, of embeddings of another model than yours.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusedkd.integrations.heads import base_model
from recipes.glue.method import Count, Method, Positive, Share, Weight
from recipes.glue.run import Run
from recipes.glue.step import Step


def freelb(
    run: Run, *, ascents: Count = 3, step_size: Weight = 0.1, start: Weight = 0.2, max_norm: Weight = 0.0
) -> PreTrainedModel:
    """ascents: K; step_size: η; max_norm: 0 for none."""
    perturbed = Perturbed(ascents, step_size, start, max_norm)
    return run.fit(run.student(), lambda step: perturbed(step, step.hard), run.labelled)


def freelb_kd(
    run: Run,
    *,
    ascents: Count = 3,
    step_size: Weight = 0.1,
    start: Weight = 0.2,
    max_norm: Weight = 0.0,
    temperature: Positive = 2.0,
    alpha: Share = 0.5,
) -> PreTrainedModel:
    """ascents: K; step_size: η; max_norm: 0 for none; alpha: of the teacher's term."""
    perturbed = Perturbed(ascents, step_size, start, max_norm)

    def loss(step: Step) -> Tensor:
        return perturbed(
            step, lambda logits: alpha * step.soft(logits, temperature=temperature) + (1 - alpha) * step.hard(logits)
        )

    return run.fit(run.student(), loss)


class Perturbed:
    """The mean of a loss over K perturbations of the embeddings, each further up than the one before."""

    def __init__(self, ascents: int, step_size: float, start: float, max_norm: float):
        self.ascents, self.step_size, self.start, self.max_norm = ascents, step_size, start, max_norm

    def __call__(self, step: Step, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        model = step.model.module if hasattr(step.model, "module") else step.model
        words = base_model(model).get_input_embeddings()(step.batch["input_ids"])
        delta, dropout, losses = self.first(words, step.attended), int(torch.randint(2**31, ())), []
        for number in range(self.ascents):
            delta.requires_grad_()
            with torch.random.fork_rng([words.device] if words.is_cuda else []):
                torch.manual_seed(dropout)
                logits = step.run(step.model, inputs_embeds=words + delta, input_ids=None).logits
            losses.append(loss_of(logits))
            if number < self.ascents - 1:
                (gradient,) = torch.autograd.grad(losses[-1], delta, retain_graph=True)
                delta = self.next(delta.detach(), gradient)
        return torch.stack(losses).mean()

    def first(self, words: Tensor, attended: Tensor) -> Tensor:
        """``(B, L, H)``, 0 on padding."""
        columns = attended.sum(1) * words.shape[-1]
        delta = torch.empty_like(words, requires_grad=False).uniform_(-1, 1) * attended[..., None]
        return delta * (self.start * columns.clamp(min=1) ** -0.5)[:, None, None]

    def next(self, delta: Tensor, gradient: Tensor) -> Tensor:
        delta = delta + self.step_size * gradient / norm(gradient).clamp(min=1e-12)
        return delta * (self.max_norm / norm(delta)).clamp(max=1) if self.max_norm else delta


def norm(x: Tensor) -> Tensor:
    """Of each example, ``(B, 1, 1)``."""
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)


METHODS = {
    "freelb": Method(
        freelb,
        "FreeLB",
        "arXiv:1909.11764",
        published="GLUE test, BERT-base: 79.4; without 78.3",
        needs=("both_directions",),
    ),
    "freelb_kd": Method(
        freelb_kd,
        "FreeLB and KD",
        "arXiv:1909.11764, arXiv:2105.05912",
        published="GLUE dev, DistilRoBERTa from RoBERTa-large: 80.06; KD alone 80.77, FreeLB alone "
        "80.01 (in arXiv:2105.05912)",
        needs=("teacher", "both_directions"),
    ),
}
