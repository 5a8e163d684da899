"""Distils a teacher that has another tokenizer: python examples/other_tokenizer.py

The teacher's probabilities are carried over to the student's tokens, at the rows where both have read the same text;
the text itself teaches nothing here. In earnest: --model HuggingFaceTB/SmolLM2-135M --teacher Qwen/Qwen3-0.6B --text …
"""

from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fusedkd
from fusedkd.integrations.tokenizers import PairedBatch, paired, projection

options = tiny.arguments(__doc__, steps=30, batch=8, length=64)
lines = [line for line in Path(options.text).read_text().splitlines() if len(line) > 40]


def tokenizer(name: str | None, size: int) -> Any:
    """Of the hub, or one over bytes that learns its tokens from the text."""
    if name:
        return AutoTokenizer.from_pretrained(name)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


student_tokenizer, teacher_tokenizer = tokenizer(options.model, 300), tokenizer(options.teacher, 500)
student = tiny.model(options.model, 32, vocabulary=300)
teacher = tiny.model(options.teacher, 64, vocabulary=500)


def collate(texts: list[str]) -> PairedBatch:
    return paired(texts, student_tokenizer, teacher_tokenizer, max_length=options.length).to(tiny.DEVICE)


def hidden_states(model: Any, side: dict[str, Tensor]) -> Tensor:
    return model.base_model(**side).last_hidden_state  # type: ignore


seen = DataLoader(lines[::2] + lines[1::4], options.batch, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
unseen = collate(lines[3::4])
batches = chain.from_iterable(repeat(seen))

if not options.teacher:  # a tiny one has to learn the text first
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for batch in islice(batches, 40):
        labels = batch.teacher["input_ids"].masked_fill(batch.teacher["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        teacher(**batch.teacher, labels=labels).loss.backward()
        optimizer.step()
teacher.eval().requires_grad_(False)

heads = [model.get_output_embeddings().weight for model in (student, teacher)]
columns = len(heads[0]), len(heads[1])
W = projection(student_tokenizer, teacher_tokenizer, columns=columns).to(tiny.DEVICE)
print(f"{torch.sparse.sum(W, 0).to_dense().mean():.0%} of the teacher's tokens have a place among the student's")


def kl(batch: PairedBatch) -> Tensor:
    """From the teacher in the student's tokens, of the rows where both have read the same text."""
    head = fusedkd.TeacherHead(batch.teacher_rows(hidden_states(teacher, batch.teacher)), heads[1])
    states = hidden_states(student, batch.student)
    return fusedkd.linear_kd_loss(states, heads[0], fusedkd.TeacherProjected(head, W), kd_mask=batch.mask)


optimizer = torch.optim.AdamW(student.parameters(), lr=tiny.learning_rate(options))
for step, batch in enumerate(islice(batches, options.steps + 1)):
    if step % 10 == 0:
        with torch.no_grad():
            print(f"step {step}: KL {kl(batch).item():.4f}, on other text {kl(unseen).item():.4f}")
    optimizer.zero_grad()
    kl(batch).backward()
    optimizer.step()
