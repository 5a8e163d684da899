"""Distils a causal language model with Lightning: python examples/lightning_module.py

Lightning divides each loss by the accumulation steps, and DDP by the processes, so what the loss itself divides by is
the rows of the whole step over both. In earnest: --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --text paragraphs.txt
"""

from collections.abc import Iterator
from itertools import islice

import lightning
import tiny
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import fusedkd

options = tiny.arguments(__doc__, steps=40, batch=4, accumulate=2)
student, teacher = tiny.models(options)
loader = DataLoader(tiny.documents(options), options.batch, shuffle=True, collate_fn=tiny.collate)


class Steps:
    """The batches of the loader, each with the number of rows of its optimiser step."""

    def __len__(self) -> int:
        return len(loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        batches = iter(loader)
        while micro_batches := list(islice(batches, options.accumulate)):
            rows = torch.stack([(labels[:, 1:] != -100).sum() for _, _, labels in micro_batches]).sum()
            yield from ((*batch, rows) for batch in micro_batches)


class Distillation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        ids, attended, labels, rows = batch
        count = self.all_gather(rows).sum() / (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        with torch.no_grad():
            teacher_logits = self.teacher(ids, attention_mask=attended).logits[:, :-1]
        logits = self.student(ids, attention_mask=attended).logits[:, :-1]
        loss = fusedkd.kd_loss(
            logits, teacher_logits, labels[:, 1:], temperature=2.0, kd_weight=0.5, ce_weight=0.5,
            kd_normalizer=count, ce_normalizer=count,
        )  # fmt: skip
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=tiny.learning_rate(options))


quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = lightning.Trainer(max_steps=options.steps, accumulate_grad_batches=options.accumulate, **quiet)
trainer.fit(Distillation(), Steps())
print(f"{trainer.global_step} steps, loss of the last micro-batch {trainer.callback_metrics['loss']:.4f}")
