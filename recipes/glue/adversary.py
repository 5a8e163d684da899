"""A generator that looks for texts on which a student and its teacher differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedkd.integrations.command import UsageError
from recipes.glue.generator import Generator, batches, embedded
from recipes.glue.run import Run
from recipes.glue.step import Counts, Step

Divergence = Callable[[Step, Tensor, Tensor], Tensor]
"""Of a batch: how far the student's logits are from the teacher's, differentiable in both."""


class Adversary:
    """Takes some steps of AdamW before every so many steps of the student.

    A step maximises the divergence between student and teacher on a batch of texts that the generator has rewritten:
    both are differentiated, down to their embeddings of the drawn tokens, and so is the generator by the
    straight-through Gumbel-softmax; but the generator's parameters alone are updated. Every process takes the same
    steps, from the same seed.

    Args:
        student: trained by `run.fit`, in place.
        divergence: what is maximised.
        steps, every: so many steps of the generator before each so many steps of the student.
        learning_rate: constant.

    Raises:
        UsageError: for numbers of steps that cannot be.
    """

    def __init__(
        self,
        run: Run,
        generator: Generator,
        student: Any,
        divergence: Divergence,
        steps: int = 10,
        every: int = 100,
        learning_rate: float = 5e-7,
    ):
        if steps < 0 or every < 1:
            raise UsageError(f"generator_steps={steps}, student_steps={every}: at least 0 and at least 1")
        self.generator, self.student, self.teacher, self.divergence = generator, student, run.teacher, divergence
        self.steps, self.every, self.seed, self.device = steps, every, run.seed, run.arguments.device
        self.parameters = [*generator.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, weight_decay=0.0)
        self.batches = batches(run, run.seed)
        self.seen = -1

    def before(self, step: Step) -> None:
        """Called with every micro-batch of the student."""
        if step.number != self.seen and step.number % self.every == 0:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(self.seed + step.number)
                for _ in range(self.steps):
                    self.update()
        self.seen = step.number

    def update(self) -> None:
        gradients = torch.autograd.grad(self.loss(), self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, batch: Any = None, seed: int | None = None) -> Tensor:
        """Minus the divergence; of the next batch unless one is given. `seed`: of the Gumbel noise."""
        batch = next(self.batches) if batch is None else batch
        models: tuple[Any, Any] = self.student, self.teacher
        step = Step(*models, batch, Counts.of(batch), None)
        tables = [model.get_input_embeddings().weight.detach() for model in models]
        rows, _, where = self.generator.rows(batch, *tables, seed=seed)
        student, teacher = [
            step.run(model, input_ids=None, inputs_embeds=embedded(model, batch, each, where)).logits
            for model, each in zip(models, rows, strict=True)
        ]
        return -self.divergence(step, student, teacher)
