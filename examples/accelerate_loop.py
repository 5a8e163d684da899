"""Distils a causal language model with accelerate, on any number of processes: python examples/accelerate_loop.py

The gradient is that of the whole step, however it is cut into micro-batches and processes: accelerate divides a loss by
the former, DDP by the latter. Several: torchrun --nproc_per_node 2 examples/accelerate_loop.py --model … --teacher …
"""

import argparse
from contextlib import nullcontext
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import fusedkd

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="the student, on the hub or a folder; without it a tiny one is made")
parser.add_argument("--teacher", help="with the tokenizer of the student; without it a tiny one is made")
parser.add_argument("--text", default=__file__, help="a file, a document a line")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=4, help="rows per micro-batch")
parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
options = parser.parse_args()
set_seed(0)


def load(name: str | None, width: int):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.2, **shape))


def collate(rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids = pad_sequence(rows, batch_first=True)
    return ids, attended, ids.masked_fill(attended == 0, -100)


encode = AutoTokenizer.from_pretrained(options.model).encode if options.model else lambda text: list(text.encode())
lines = [line for line in Path(options.text).read_text().splitlines() if line.strip()]
loader = DataLoader([torch.tensor(encode(line)[:256]) for line in lines], options.batch, True, collate_fn=collate)
student, teacher = load(options.model, 32), load(options.teacher, 64).eval()
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-5 if options.model else 1e-2)


accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
teacher.to(accelerator.device)

stream = chain.from_iterable(repeat(loader))
for step in range(options.steps):
    micro_batches = list(islice(stream, options.accumulate))
    rows = torch.stack([(labels[:, 1:] != -100).sum() for _, _, labels in micro_batches]).sum()
    rows = accelerator.reduce(rows, "sum")  # of the whole step, on all processes
    count = rows / (options.accumulate * accelerator.num_processes)  # by which the loss is divided besides
    for i, (ids, attended, labels) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1  # not accelerator.accumulate, which also steps where the loader ends
        with nullcontext() if last else accelerator.no_sync(student):
            with torch.no_grad():
                teacher_logits = teacher(ids, attention_mask=attended).logits[:, :-1]
            logits = student(ids, attention_mask=attended).logits[:, :-1]
            loss = fusedkd.kd_loss(
                logits, teacher_logits, labels[:, 1:], temperature=2.0, kd_weight=0.5, ce_weight=0.5,
                kd_normalizer=count, ce_normalizer=count,
            )  # fmt: skip
            accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == options.steps - 1:
        accelerator.print(f"step {step}: loss of the last micro-batch {loss.item():.4f}")
