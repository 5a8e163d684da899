"""Distils a causal language model with transformers' Trainer, without its logits: python examples/hf_trainer.py

The heads of both models never run, and the gradient is the same however a step is cut into micro-batches and processes.
In earnest: --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --text book.txt
"""

from typing import Any

import tiny
import torch
from transformers import TrainingArguments

from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

options = tiny.arguments(__doc__, steps=60, batch=4, accumulate=2)
blocks = tiny.blocks(options)
student, teacher = (tiny.model(name, width) for name, width in tiny.sizes(options))


def trainer(model: Any, teacher: Any, kd: KDConfig) -> DistillationTrainer:
    arguments = TrainingArguments(
        "runs/hf_trainer", max_steps=options.steps, per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate, learning_rate=tiny.learning_rate(options), logging_steps=20,
        save_strategy="no", report_to="none", use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    data = {"train_dataset": blocks.select(range(8, len(blocks))), "eval_dataset": blocks.select(range(8))}
    return DistillationTrainer(model, teacher=teacher, args=arguments, kd=kd, **data)


def report(when: str, found: dict[str, float]) -> None:
    print(f"{when}: held-out perplexity {found['eval_perplexity']:.2f}, KL to the teacher {found['eval_kl']:.4f}")


if not options.teacher:  # a tiny one is trained first, by cross-entropy alone: a kd_weight of 0 needs no teacher
    trainer(teacher, None, KDConfig(kd_weight=0.0, ce_weight=1.0)).train()

distillation = trainer(student, teacher, KDConfig(temperature=2.0, kd_weight=0.5, ce_weight=0.5))
report("before", distillation.evaluate())
distillation.train()
report("after", distillation.evaluate())
