"""Blocks of tokens, cut from text, and batches of them: padded, and masked for a masked language model."""

from __future__ import annotations

import inspect
import zlib
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.command import UsageError

# ---- blocks


def pack(text: Any, tokenizer: Tokenizer, block_size: int, what: str, num_proc: int = 1) -> Any:
    """Tokenize, join the lines and cut them into blocks; each thousand lines end with a shorter one.

    A block is [CLS] ... [SEP], or whatever the tokenizer has in their place. Without a [CLS] (GPT-2) it is text alone,
    and each line ends with the end-of-text token.
    """
    cut = Cut(tokenizer, block_size, joined=True)
    return cut_up(text, cut, what, num_proc)


def by_length(text: Any, tokenizer: Tokenizer, block_size: int, what: str, num_proc: int = 1) -> Any:
    """Tokenize and make each line a block, a long one several, with a column `length`: see `ByLength`."""
    return cut_up(text, Cut(tokenizer, block_size, joined=False), what, num_proc)


class Cut:
    """Lines of text to blocks of tokens, for `datasets.map`."""

    def __init__(self, tokenizer: Tokenizer, block_size: int, joined: bool):
        self.tokenizer, self.joined = tokenizer, joined
        causal = tokenizer.cls_token_id is None
        self.head, self.tail = ([], []) if causal else ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
        self.end = [tokenizer.eos_token_id] if causal else []  # of each line
        self.body = block_size - len(self.head) - len(self.tail)
        if self.body < 1:
            raise UsageError(f"--block_size must be at least {block_size - self.body + 1}, not {block_size}")
        self.unknown = "<unk>" if causal else tokenizer.unk_token or ""  # GPT-2 has no such token: the text as it came

    def fingerprint(self, text: datasets.Dataset) -> str | None:
        """What names the result in the cache: the same for the same tokenizer, trained here or read from any folder."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None  # `datasets` makes one
        parts = (text._fingerprint, inspect.getsource(Cut), backend.to_str(), self.head, self.tail, self.end, self.body)
        return Hasher.hash((*parts, self.unknown, self.joined))

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        text = [line.replace("[UNK]", self.unknown) for line in batch["text"]]
        lines = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        lines = [line + self.end for line in lines if line]
        if self.joined:
            lines = [list(chain.from_iterable(lines))]
        bodies = (line[i : i + self.body] for line in lines for i in range(0, len(line), self.body))
        blocks = [[*self.head, *body, *self.tail] for body in bodies]
        return {"input_ids": blocks} if self.joined else {"input_ids": blocks, "length": [len(b) for b in blocks]}


def cut_up(text: Any, cut: Cut, what: str, num_proc: int) -> Any:
    columns = {"input_ids": datasets.List(datasets.Value("int32"))}
    columns |= {} if cut.joined else {"length": datasets.Value("int32")}
    options: dict[str, Any] = {"batched": True, "remove_columns": ["text"], "features": datasets.Features(columns)}
    if isinstance(text, datasets.IterableDataset):
        blocks = text.map(cut, **options)
    else:
        options["new_fingerprint"] = cut.fingerprint(text)
        blocks = text.map(cut, num_proc=num_proc if num_proc > 1 else None, **options)
    if next(iter(blocks), None) is None:
        raise UsageError(f"the {what} text is empty")
    return blocks


# ---- batches


def pad(examples: list[dict[str, Any]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, `[examples, longest]`."""
    rows = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return ids, torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


class CausalCollator:
    """Batches of a causal model: labels are the ids (the loss shifts them), -100 on padding."""

    def __init__(self, tokenizer: Tokenizer):
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, attention = pad(examples, self.pad)
        return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(attention == 0, -100)}


class MaskingCollator:
    """Dynamic masking as DistilBERT was trained: rare tokens more often, p ~ count^-smoothing.

    Of each batch, ceil(mlm_probability * tokens) positions are drawn without replacement over the whole batch; 80 %
    become [MASK], 10 % a random token, 10 % stay. Special tokens are never drawn. Two differences from the published
    driver: random tokens are ordinary ones (there: any id), and the draw is a function of seed, epoch and batch, not of
    a running generator: the same for every student, for any number of workers, and after a resume.
    """

    def __init__(self, tokenizer: Tokenizer, counts: np.ndarray, mlm_probability: float, smoothing: float, seed: int):
        self.pad, self.mask = tokenizer.pad_token_id, tokenizer.mask_token_id
        self.mlm_probability, self.seed, self.epoch = mlm_probability, seed, 0
        self.weights = torch.from_numpy(np.maximum(counts, 1).astype(np.float64) ** -smoothing)
        self.weights[tokenizer.all_special_ids] = 0
        self.weights[len(tokenizer) :] = 0  # rows that only pad the teacher's vocabulary
        self.ordinary = self.weights.nonzero().squeeze(1)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, attention = pad(examples, self.pad)
        epoch = max(example.get("epoch", self.epoch) for example in examples)
        key = f"{self.seed} {epoch}".encode() + ids.numpy().tobytes()
        draw = torch.Generator().manual_seed(zlib.crc32(key))

        flat, weights = ids.flatten(), self.weights[ids.flatten()]
        wanted = int(np.ceil(self.mlm_probability * int(attention.sum())))
        chosen = weights.new_empty(0, dtype=torch.long)
        if count := min(wanted, int((weights > 0).sum())):
            chosen = torch.multinomial(weights, count, generator=draw)
        labels = torch.full_like(flat, -100)
        labels[chosen] = flat[chosen]
        fate = torch.rand(len(chosen), generator=draw)
        random = self.ordinary[torch.randint(len(self.ordinary), (len(chosen),), generator=draw)]
        flat[chosen] = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, random, flat[chosen]))
        return {"input_ids": flat.view_as(ids), "attention_mask": attention, "labels": labels.view_as(ids)}
