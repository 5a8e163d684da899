"""transformers' Trainer with the loss of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusedkd.integrations.bound import BoundTerms
from recipes.finetune.trainer import Batch, Padding, TaskTrainer
from recipes.glue.step import Counts, Loss, Step

BESIDE = "trained_beside"
"""Of a student, while it is trained: the module that is trained with it."""


class IndexedPadding(Padding):
    """Keeps the rows' numbers, too."""

    kept = (*Padding.kept, "index", "row")


class MethodTrainer(TaskTrainer):
    """Arguments of `Trainer`, and:

    teacher   a model for the same task, frozen; or None
    loss      of a :class:`recipes.glue.step.Step`; sums over the batch, divided by the counts of the whole optimiser
              step, so that one step has one gradient however it is cut into micro-batches and devices
    bound     the terms that the loss asks for
    hidden    whether it asks for hidden states
    beside    a module that is trained with the student, and is no part of it: a projection, a temperature
    teacher_logits
              makes the teacher's logits of all training rows; None: the teacher runs on every batch
    """

    def __init__(
        self,
        *args: Any,
        loss: Loss,
        bound: BoundTerms | None = None,
        hidden: bool = False,
        beside: nn.Module | None = None,
        teacher_logits: Callable[[], Tensor] | None = None,
        **more: Any,
    ):
        super().__init__(*args, **more)
        self.loss_of, self.bound, self.hidden = loss, bound, hidden
        self.beside, self.teacher_logits = beside, teacher_logits
        own = [module for module in (bound.projections if bound else None, beside) if module is not None]
        self.trained_beside = nn.ModuleList(own).to(self.args.device)

    def _inner_training_loop(self, *args: Any, **options: Any) -> Any:
        with self._training_beside():
            return super()._inner_training_loop(*args, **options)

    @contextmanager
    def _training_beside(self) -> Iterator[None]:
        """Within, it is a part of the student, for its optimiser and the reduction of its gradients."""
        model: Any = self.model
        if not any(True for _ in self.trained_beside.parameters()):
            yield
            return
        model.add_module(BESIDE, self.trained_beside)
        try:
            yield
        finally:
            delattr(model, BESIDE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """None, not even when a signal ends the training: a student that is not finished is trained again."""

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """`Counts` of one optimiser step over all ranks."""
        total = torch.stack([torch.stack(Counts.of(batch)) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.gather(total[None]).sum(0) if self.args.world_size > 1 else total

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts = Counts.of(inputs) if num_items_in_batch is None else Counts(*num_items_in_batch)
        epoch = float(self.state.epoch or 0)
        if self.bound is not None and int(epoch) != self.bound.epoch:
            self.bound.draw(int(epoch))
        step = Step(
            model,
            self.teacher,
            inputs,
            counts,
            self.bound,
            hidden=self.hidden,
            epoch=epoch,
            number=self.state.global_step,
            total=self.state.max_steps,
            beside=self.beside,
            teacher_logits=self.teacher_logits,
        )
        loss = self.loss_of(step)
        if self.args.world_size > 1 and "student" in vars(step):  # which waits for a gradient of the head, too
            loss = loss + 0.0 * step.student.logits.float().sum()
        loss = loss * self.accelerator.num_processes  # whose gradients data parallelism averages
        return (loss, {"logits": step.student.logits}) if return_outputs else loss
