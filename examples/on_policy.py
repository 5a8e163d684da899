"""Distils on the text that the student writes: python examples/on_policy.py

The student continues the beginnings of lines, and learns from the teacher's distribution at each token that it wrote.
In earnest, with a line of the text as a message to the model: --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B
--text questions.txt --written 256
"""

from pathlib import Path

import tiny
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainingArguments

from fusedkd.integrations.on_policy import OnPolicyTrainer
from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

options = tiny.arguments(__doc__, steps=32, batch=16, accumulate=1, written=12, lmbda=1.0)
lines = [line for line in Path(options.text).read_text().splitlines() if len(line) > 24]
if options.model:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": line}] for line in lines]})
else:  # bytes; an example with a completion can be kept as it is, by lmbda < 1, and evaluated
    tokenizer, ids = None, [list(line.encode()) for line in lines]
    data = Dataset.from_dict({"prompt": [each[:8] for each in ids], "completion": [each[8:24] for each in ids]})

student, teacher = (tiny.model(name, width) for name, width in tiny.sizes(options))


def arguments(steps: int, batch: int, accumulate: int = 1) -> TrainingArguments:
    return TrainingArguments(
        "runs/on_policy", max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        learning_rate=tiny.learning_rate(options), logging_steps=8, save_strategy="no", report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip


if not options.teacher:  # a tiny one is trained first, by cross-entropy alone
    alone = KDConfig(kd_weight=0.0, ce_weight=1.0)
    DistillationTrainer(teacher, None, arguments(60, 8), kd=alone, train_dataset=tiny.blocks(options)).train()

trainer = OnPolicyTrainer(
    student,
    teacher,
    arguments(options.steps, options.batch, options.accumulate),
    processing_class=tokenizer,
    train_dataset=data,
    lmbda=options.lmbda,
    max_new_tokens=options.written,
)
trainer.train()
for log in trainer.state.log_history:
    if "loss" in log:
        print(
            f"step {log['step']:3}: reverse KL {log['kd']:.4f} on {log['on_policy']:.0%} own text; a token of it has "
            f"log-probability {log['student_logprob']:.2f} of the student, {log['teacher_logprob']:.2f} of the teacher"
        )
