"""Teaches a language model new text by LoRA, with its base as the teacher: python examples/lora.py

The teacher is the student with its adapters off. The cross-entropy learns the text, the KD term holds the model to
what it said before; the weights are in memory once. In earnest: --model Qwen/Qwen3-0.6B --text domain.txt
"""

from pathlib import Path

import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

options = tiny.arguments(__doc__, steps=40, batch=8, kd_weight=1.0)
blocks = tiny.blocks(options)
model = tiny.model(options.model, 64)
if not options.model:  # a tiny one gets a past, other text than what it is to learn
    past = torch.tensor(list(Path(tiny.__file__).read_bytes()[:1024]), device=tiny.DEVICE).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(past, labels=past).loss.backward()
        optimizer.step()

lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
student = get_peft_model(model, lora)
arguments = TrainingArguments(
    "runs/lora", max_steps=options.steps, per_device_train_batch_size=options.batch, save_strategy="no",
    report_to="none", learning_rate=10 * tiny.learning_rate(options) if options.model else 1e-2,
    use_cpu=not torch.accelerator.is_available(),
)  # fmt: skip
trainer = DistillationTrainer(
    student,
    teacher=student.get_base_model(),
    args=arguments,
    kd=KDConfig(temperature=1.0, kd_weight=options.kd_weight, ce_weight=1.0),
    train_dataset=blocks.select(range(8, len(blocks))),
    eval_dataset=blocks.select(range(8)),
)


def report(when: str) -> None:
    found = trainer.evaluate()
    print(f"{when}: held-out perplexity {found['eval_perplexity']:.2f}, KL to itself as it was {found['eval_kl']:.4f}")


report("before")
trainer.train()
report("after")
