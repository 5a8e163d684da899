"""Writes a teacher's top-k to disk once, then distils without the teacher: python examples/offline_cache.py

DistillationTrainer takes such a data set as it is, with teacher=None; this is a loop of your own. The first half is
also a command, `fusedkd cache`. In earnest: --model and --teacher, as for plain_loop.py
"""

from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset, load_from_disk
from torch.utils.data import DataLoader

import fusedkd
from fusedkd.integrations import cache_teacher
from fusedkd.integrations.offline import OfflineTeacherCollator

options = tiny.arguments(__doc__, steps=40, batch=8, top_k=16)
folder = Path("runs/offline_cache")
student, teacher = tiny.models(options)

# Once: the documents, tokenized, and beside each token the columns that the teacher finds most likely after it.
Dataset.from_dict({"input_ids": tiny.documents(options)}).save_to_disk(folder / "tokens")
if not options.teacher:
    teacher.save_pretrained(folder / "teacher")
words = ["--teacher", options.teacher or folder / "teacher", "--dataset", folder / "tokens"]
words += ["--output", folder / "top_k", "--top_k", options.top_k]
if cache_teacher.main([str(word) for word in words]) != 0:
    raise SystemExit("the cache was not written")
del teacher


# As often as you like: no teacher in memory.
def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids, attended, labels = tiny.collate([torch.as_tensor(example["input_ids"]) for example in examples])
    return {"input_ids": ids, "attention_mask": attended, "labels": labels}


collator = OfflineTeacherCollator(collate)  # pads the teacher's columns to that batch, with ids of −1
loader = DataLoader(load_from_disk(folder / "top_k"), options.batch, shuffle=True, collate_fn=collator)
optimizer = torch.optim.AdamW(student.parameters(), lr=tiny.learning_rate(options))
for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps)):
    batch = {name: column.to(tiny.DEVICE) for name, column in batch.items()}
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    teacher_rows = fusedkd.TeacherTopK(batch["teacher_ids"][:, :-1], batch["teacher_logprobs"][:, :-1], tail="bucket")
    optimizer.zero_grad()
    loss = fusedkd.kd_loss(logits, teacher_rows, batch["labels"][:, 1:])  # row i is about token i + 1, as the logits
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == options.steps - 1:
        print(f"step {step}: KL to the teacher's top {options.top_k} and the rest {loss.item():.4f}")
