"""Writes a teacher's top-k to disk once, then distils without the teacher: python examples/offline_cache.py

DistillationTrainer takes such a data set as it is, with teacher=None; this is a loop of your own. The first half is
also a command, python -m fusedkd.integrations.cache_teacher. In earnest:
--model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import fusedkd
from fusedkd.integrations import cache_teacher
from fusedkd.integrations.offline import OfflineTeacherCollator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="the student, on the hub or a folder; without it a tiny one is made")
parser.add_argument("--teacher", help="with the tokenizer of the student; without it a tiny one is made")
parser.add_argument("--text", default=__file__, help="a file, a document a line")
parser.add_argument("--cache", default="runs/offline_cache", help="a folder; an interrupted run goes on in it")
parser.add_argument("--top_k", type=int, default=16)
parser.add_argument("--steps", type=int, default=40)
options = parser.parse_args()
set_seed(0)


def load(name: str | None, width: int):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.2, **shape))


# Once: the documents, tokenized, and beside each token the columns that the teacher finds most likely after it.
folder = Path(options.cache)
encode = AutoTokenizer.from_pretrained(options.model).encode if options.model else lambda text: list(text.encode())
lines = [line for line in Path(options.text).read_text().splitlines() if line.strip()]
Dataset.from_dict({"input_ids": [encode(line)[:256] for line in lines]}).save_to_disk(folder / "tokens")
if not options.teacher:
    load(None, 64).save_pretrained(folder / "teacher")
arguments = ["--teacher", options.teacher or str(folder / "teacher"), "--dataset", str(folder / "tokens")]
arguments += ["--output", str(folder / "top_k"), "--top_k", str(options.top_k)]
if cache_teacher.main(arguments) != 0:
    raise SystemExit(1)


# As often as you like: no teacher in memory.
def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    rows = [torch.as_tensor(example["input_ids"]) for example in examples]
    ids, attended = (pad_sequence(t, batch_first=True) for t in (rows, [torch.ones_like(row) for row in rows]))
    return {"input_ids": ids, "attention_mask": attended, "labels": ids.masked_fill(attended == 0, -100)}


collator = OfflineTeacherCollator(collate)  # pads the teacher's columns to that batch, with ids of −1
loader = DataLoader(load_from_disk(folder / "top_k"), batch_size=8, shuffle=True, collate_fn=collator)
student = load(options.model, 32)
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-5 if options.model else 1e-2)
for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps)):
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    teacher = fusedkd.TeacherTopK(batch["teacher_ids"][:, :-1], batch["teacher_logprobs"][:, :-1], tail="bucket")
    optimizer.zero_grad()
    loss = fusedkd.kd_loss(logits, teacher, batch["labels"][:, 1:])  # row i is about token i + 1, as the logits are
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == options.steps - 1:
        print(f"step {step}: KL to the teacher's top {options.top_k} and the rest {loss.item():.4f}")
