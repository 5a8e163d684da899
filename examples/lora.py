"""Teaches a language model new text by LoRA, with its base as the teacher: python examples/lora.py

The teacher is the student with its adapters off. The cross-entropy learns the text, the KD term holds the model to
what it said before; the weights are in memory once. In earnest: --model Qwen/Qwen3-0.6B --text domain.txt
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="on the hub or a folder; without it a tiny one is made")
parser.add_argument("--text", default=Path(__file__).parents[1] / "README.md")
parser.add_argument("--block", type=int, default=64, help="tokens per block")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--kd_weight", type=float, default=1.0, help="0: nothing holds the model to its past")
options = parser.parse_args()
set_seed(0)

encode = AutoTokenizer.from_pretrained(options.model).encode if options.model else lambda text: list(text.encode())


def rows_of(file: str | Path) -> torch.Tensor:
    ids = torch.tensor(encode(Path(file).read_text()))
    return ids[: len(ids) // options.block * options.block].view(-1, options.block)


if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model)
else:  # its past: the code of this file
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    past = rows_of(__file__)[:16]
    for _ in range(40):
        optimizer.zero_grad()
        model(past, labels=past).loss.backward()
        optimizer.step()

rows = rows_of(options.text)
blocks = Dataset.from_dict({"input_ids": rows, "labels": rows})  # the trainer shifts
student = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = DistillationTrainer(
    student,
    teacher=student.get_base_model(),
    args=TrainingArguments(
        "runs/lora", max_steps=options.steps, per_device_train_batch_size=8, save_strategy="no", report_to="none",
        learning_rate=2e-4 if options.model else 1e-2, use_cpu=not torch.accelerator.is_available(),
    ),
    kd=KDConfig(temperature=1.0, kd_weight=options.kd_weight, ce_weight=1.0),
    train_dataset=blocks.select(range(8, len(blocks))),
    eval_dataset=blocks.select(range(8)),
)  # fmt: skip


def report(when: str) -> None:
    found = trainer.evaluate()
    print(f"{when}: held-out perplexity {found['eval_perplexity']:.2f}, KL to itself as it was {found['eval_kl']:.4f}")


report("before")
trainer.train()
report("after")
