"""transformers' Trainer with the triple loss of DistilBERT, exact under gradient accumulation and data parallelism.

Each term is a sum over its own tokens divided by the number of such tokens in the whole optimiser step: all
micro-batches, all ranks. The same class trains the teacher and the MLM-only student: a term of weight 0 costs nothing.
"""

import statistics
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback

from fusedkd.distilbert.data import MaskingCollator
from fusedkd.nn import DistilBertLoss

Batch = dict[str, torch.Tensor]


class DistilBertTrainer(Trainer):
    """Arguments of `Trainer`, and:

    criterion       the loss; with alpha_distil = alpha_cos = 0 the teacher is used for evaluation only
    teacher         any masked language model with the student's vocabulary, or None
    eval_collator   masks the held-out blocks, always in the same way
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole optimiser step

    def __init__(
        self,
        *args: Any,
        criterion: DistilBertLoss,
        teacher: PreTrainedModel | None = None,
        eval_collator: MaskingCollator | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.criterion = criterion
        self.teacher: Any = teacher
        if teacher is not None:
            self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)  # type: ignore[arg-type]
        self.eval_collator = eval_collator
        self.terms: list[torch.Tensor] = []
        self.clock = StepClock()
        self.add_callback(self.clock)
        self.add_callback(EpochSetter(self.data_collator))

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """[attended tokens, masked tokens] of one optimiser step over all ranks."""
        attended = sum((batch["attention_mask"] != 0).sum() for batch in batch_samples)
        masked = sum((batch["labels"] != self.criterion.ignore_index).sum() for batch in batch_samples)
        counts = torch.stack([torch.as_tensor(attended), torch.as_tensor(masked)]).to(device)
        return self.accelerator.gather(counts).view(-1, 2).sum(0) if self.args.world_size > 1 else counts

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        attended, masked = num_items_in_batch
        loss = self.criterion
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        hidden = loss.alpha_cos != 0
        student = model(**inputs, output_hidden_states=hidden)
        teacher: Any = None
        if loss.alpha_distil or hidden:
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher(**inputs, output_hidden_states=hidden)
        total, terms = loss(
            student.logits,
            teacher.logits if teacher else None,
            labels,
            inputs["attention_mask"],
            student.hidden_states[-1] if hidden else None,
            teacher.hidden_states[-1] if hidden else None,
            kd_normalizer=masked if loss.kd_on == "masked" else attended,
            mlm_normalizer=masked,
            cos_normalizer=attended,
        )
        self.terms.append(torch.stack([term.float() for term in terms]))
        # Data parallelism averages the gradients of the ranks, each of which has its part of the sum.
        total = total * self.accelerator.num_processes
        return (total, student) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the three terms beside the loss: means over the optimiser steps since the last time."""
        if "loss" in logs and self.terms:
            steps = len(self.terms) / self.args.gradient_accumulation_steps
            means = self.accelerator.reduce(torch.stack(self.terms).sum(0) / steps, "sum")
            logs |= dict(zip(("distil", "mlm", "cos"), means.tolist(), strict=True))
            self.terms.clear()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out loss, accuracy and KL to the teacher on the masked tokens; each rank takes its share."""
        blocks: Any = self.eval_dataset
        model: Any = self.model
        loader = DataLoader(blocks, self.args.per_device_eval_batch_size, collate_fn=self.eval_collator)
        mine = islice(loader, self.args.process_index, None, self.args.world_size)
        with self.accelerator.autocast():
            # Not the wrapped model: DistributedDataParallel synchronises buffers in every forward pass, and the ranks'
            # numbers of batches differ.
            sums = held_out_sums(model, self.teacher, mine, self.args.device)
        metrics = {f"eval_{k}": v for k, v in held_out_means(self.accelerator.reduce(sums, "sum")).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@torch.no_grad()
def held_out_sums(
    model: torch.nn.Module, teacher: PreTrainedModel | None, batches: Iterable[Batch], device: torch.device
) -> torch.Tensor:
    """float64 `[4]`: over the masked tokens, sums of cross-entropy, hits, KL(teacher ‖ model) at T = 1, and 1."""
    criterion = DistilBertLoss(temperature=1.0, alpha_distil=float(teacher is not None), alpha_cos=0.0, kd_on="masked")
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    model.eval()
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        target = teacher(**inputs).logits if teacher is not None else None
        _, terms = criterion(
            logits, target, labels, inputs["attention_mask"], None, None, kd_normalizer=1.0, mlm_normalizer=1.0
        )
        masked = labels != criterion.ignore_index
        hits = (logits.argmax(-1) == labels).sum()
        sums += torch.stack([x.double() for x in (terms.mlm, hits, terms.distil, masked.sum())])
    return sums


def held_out_means(sums: torch.Tensor) -> dict[str, float]:
    loss, hits, kl, count = sums.tolist()
    return {"loss": loss / count, "accuracy": hits / count, "kl": kl / count}


class EpochSetter(TrainerCallback):
    """Tells the collator which epoch it masks for."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


class StepClock(TrainerCallback):
    """Seconds per optimiser step, data included, evaluation and checkpoints not; a median, against a busy machine."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.durations: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.durations.append(now - self.last)
        self.last = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    on_save = on_evaluate

    @property
    def median(self) -> float:
        return statistics.median(self.durations) if self.durations else float("nan")


class RichProgress(TrainerCallback):
    """A bar on a terminal, and everywhere a line for each evaluation."""

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, description=f"{self.name}  loss {logs['loss']:.3f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        m = kwargs["metrics"]
        line = f"  step {state.global_step:>5}  held-out loss {m['eval_loss']:.3f}  accuracy {m['eval_accuracy']:.1%}"
        self.console.print(line + (f"  KL to the teacher {m['eval_kl']:.3f}" if m["eval_kl"] else ""), highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
