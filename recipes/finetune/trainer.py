"""transformers' Trainer with the loss of a GLUE task or of SQuAD, and beside it that of a teacher's outputs.

Exact under gradient accumulation and data parallelism: sums over the labels of a batch, divided by the number of labels
in the whole optimiser step.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel

from fusedkd import kd_loss
from fusedkd.divergences import Divergence
from fusedkd.integrations.heads import base_model
from fusedkd.integrations.interrupt import Interruptible
from fusedkd.integrations.refusals import shared_parameters

Batch = dict[str, Any]


class Padding(DataCollatorWithPadding):
    """Pads what models take; the other columns but those `kept` stay behind."""

    kept: tuple[str, ...] = ("token_type_ids", "labels")

    def __call__(self, features: list[dict[str, Any]]) -> Batch:
        kept = (*self.tokenizer.model_input_names, *self.kept)
        return super().__call__([{k: v for k, v in row.items() if k in kept} for row in features])  # type: ignore[return-value]


class TaskTrainer(Interruptible):
    """Arguments of `Trainer`, and:

    teacher       a model for the same task, or None: then the loss is that of the labels alone, whatever the weights
    temperature, divergence, alpha_kd, alpha_hard
                  alpha_kd · T^k · D + alpha_hard · CE; of scores: both are squared differences. The two terms of SQuAD,
                  start and end, are averaged.

    Raises:
        Stopped: in training, when the loss is no number, on SIGTERM or Ctrl-C and where a checkpoint cannot be written.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the count of the whole optimiser step

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        temperature: float = 2.0,
        divergence: str | Divergence = "forward_kl",
        alpha_kd: float = 0.5,
        alpha_hard: float = 0.5,
        **more: Any,
    ):
        super().__init__(*args, **more)
        self.alpha_kd, self.alpha_hard = alpha_kd, alpha_hard
        self.softmax: Any = {"temperature": temperature, "divergence": divergence}
        self.teacher: Any = teacher
        if teacher is not None:
            shared_parameters(self.model, teacher)  # type: ignore[arg-type]
            self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)  # type: ignore[arg-type]
            self.teacher_takes = takes(teacher)
        self.student_takes = takes(self.model)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Labels in one optimiser step over all ranks."""
        count = torch.tensor(sum(batch["labels"].numel() for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        student = outputs(model, self.student_takes, inputs)
        teacher = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher = outputs(self.teacher, self.teacher_takes, inputs)
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        # Data parallelism averages the gradients of the ranks, each of which has its part of the sum.
        loss = self.loss(student, teacher, labels, count) * self.accelerator.num_processes
        return (loss, {"logits": student}) if return_outputs else loss

    def loss(self, student: Tensor, teacher: Tensor | None, labels: Tensor, count: Any) -> Tensor:
        if labels.is_floating_point():
            hard = (student.float() - labels).square().sum() / count
            if teacher is None:
                return hard
            kd = (student.float() - teacher.float()).square().sum() / count
            return self.alpha_kd * kd + self.alpha_hard * hard
        if teacher is None:
            return F.cross_entropy(student.flatten(0, -2).float(), labels.flatten(), reduction="sum") / count
        return kd_loss(
            student,
            teacher,
            labels,
            kd_weight=self.alpha_kd,
            ce_weight=self.alpha_hard,
            kd_normalizer=count,
            ce_normalizer=count,
            **self.softmax,
        )

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss here is the task's alone."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            student = outputs(model, self.student_takes, inputs).float()
        loss = self.loss(student, None, labels, labels.numel())
        if prediction_loss_only:
            return loss, None, None
        return loss, tuple(part.contiguous() for part in student.unbind(1)) if student.dim() == 3 else student, labels


def takes(model: Any) -> set[str]:
    """The columns of a batch that a model can use. Token types are none where there is one type, as in RoBERTa."""
    one_type = getattr(model.config, "type_vocab_size", 1) < 2
    return (
        set(inspect.signature(base_model(model).forward).parameters)
        - {"labels"}
        - ({"token_type_ids"} if one_type else set())
    )


def outputs(model: Any, columns: set[str], batch: Batch) -> Tensor:
    """Logits of classes ``(B, C)``, scores ``(B,)``, or logits of start and end ``(B, 2, L)``, −inf on padding."""
    found = model(**{name: value for name, value in batch.items() if name in columns})
    if "start_logits" in found:
        logits = torch.stack([found.start_logits, found.end_logits], 1)
        return logits.masked_fill(batch["attention_mask"][:, None] == 0, float("-inf"))
    logits = found.logits
    return logits.squeeze(-1) if batch["labels"].is_floating_point() else logits
