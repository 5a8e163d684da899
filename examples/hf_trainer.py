"""Distils a causal language model with transformers' Trainer, without its logits: python examples/hf_trainer.py

The heads of both models never run, and the gradient is the same however a step is cut into micro-batches and processes.
In earnest: --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --text book.txt
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="the student, on the hub or a folder; without it a tiny one is made")
parser.add_argument("--teacher", help="with the tokenizer of the student; without it a tiny one is made and trained")
parser.add_argument("--text", default=Path(__file__).parents[1] / "README.md")
parser.add_argument("--block", type=int, default=64, help="tokens per block")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()
set_seed(0)


def load(name: str | None, width: int):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))


def trainer(model, teacher, kd: KDConfig) -> DistillationTrainer:
    arguments = TrainingArguments(
        "runs/hf_trainer", max_steps=options.steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=2e-5 if options.model else 1e-2, logging_steps=20, save_strategy="no", report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    data = {"train_dataset": blocks.select(range(8, len(blocks))), "eval_dataset": blocks.select(range(8))}
    return DistillationTrainer(model, teacher=teacher, args=arguments, kd=kd, **data)


def report(when: str, found: dict[str, float]) -> None:
    print(f"{when}: held-out perplexity {found['eval_perplexity']:.2f}, KL to the teacher {found['eval_kl']:.4f}")


encode = AutoTokenizer.from_pretrained(options.model).encode if options.model else lambda text: list(text.encode())
ids = torch.tensor(encode(Path(options.text).read_text()))
rows = ids[: len(ids) // options.block * options.block].view(-1, options.block)
blocks = Dataset.from_dict({"input_ids": rows, "labels": rows})  # the trainer shifts

student, teacher = load(options.model, 32), load(options.teacher, 64)
if not options.teacher:  # by cross-entropy alone: with a kd_weight of 0 no teacher is needed
    trainer(teacher, None, KDConfig(kd_weight=0.0, ce_weight=1.0)).train()

distillation = trainer(student, teacher, KDConfig(temperature=2.0, kd_weight=0.5, ce_weight=0.5))
report("before", distillation.evaluate())
distillation.train()
report("after", distillation.evaluate())
