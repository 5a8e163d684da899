"""Distils a causal language model in a loop of your own: python examples/plain_loop.py

Labels are shifted by hand, padding carries no loss, and the gradient is that of the whole step however it is cut into
micro-batches. In earnest: --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --text paragraphs.txt
"""

from itertools import chain, islice, repeat

import tiny
import torch
from torch.utils.data import DataLoader

import fusedkd

options = tiny.arguments(__doc__, steps=40, batch=4, accumulate=2)
student, teacher = tiny.models(options)
loader = DataLoader(tiny.documents(options), options.batch, shuffle=True, collate_fn=tiny.collate)
optimizer = torch.optim.AdamW(student.parameters(), lr=tiny.learning_rate(options))

stream = chain.from_iterable(repeat(loader))
for step in range(options.steps):
    micro_batches = [[t.to(tiny.DEVICE) for t in batch] for batch in islice(stream, options.accumulate)]
    count = sum((labels[:, 1:] != -100).sum() for _, _, labels in micro_batches)  # rows of the whole step
    optimizer.zero_grad()
    kd = ce = 0.0
    for ids, attended, labels in micro_batches:
        with torch.no_grad():
            teacher_logits = teacher(ids, attention_mask=attended).logits[:, :-1]  # the last position predicts nothing
        logits = student(ids, attention_mask=attended).logits[:, :-1]
        loss, terms = fusedkd.kd_loss(
            logits, teacher_logits, labels[:, 1:], temperature=2.0, kd_weight=0.5, ce_weight=0.5,
            kd_normalizer=count, ce_normalizer=count, return_terms=True,
        )  # fmt: skip
        loss.backward()
        kd, ce = kd + terms.kd.item(), ce + terms.ce.item()
    optimizer.step()
    if step % 10 == 0 or step == options.steps - 1:
        print(f"step {step}: kd {kd:.4f}, ce {ce:.4f}")
