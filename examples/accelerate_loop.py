"""Distils a causal language model with accelerate, on any number of processes: python examples/accelerate_loop.py

The gradient is that of the whole step, however it is cut into micro-batches and processes: accelerate divides a loss by
the former, DDP by the latter. Several: torchrun --nproc_per_node 2 examples/accelerate_loop.py --model … --teacher …
"""

from contextlib import nullcontext
from itertools import chain, islice, repeat

import tiny
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import fusedkd

options = tiny.arguments(__doc__, steps=40, batch=4, accumulate=2)
student, teacher = tiny.models(options)
loader = DataLoader(tiny.documents(options), options.batch, shuffle=True, collate_fn=tiny.collate)
optimizer = torch.optim.AdamW(student.parameters(), lr=tiny.learning_rate(options))

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
