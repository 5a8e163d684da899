"""What the examples train: models of the hub, named by --model and --teacher, or tiny ones made here; and a text."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
README = Path(__file__).parents[1] / "README.md"


def arguments(description: str, **numbers: float) -> argparse.Namespace:
    """Of the command line: those of every example, and numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the student: a name on the hub or a folder; without it a tiny one is made")
    parser.add_argument("--teacher", help="with the student's tokenizer; without it a tiny one is made")
    parser.add_argument("--text", default=README, help="a file, a document a line")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    set_seed(0)
    return parser.parse_args()


def model(name: str | None, width: int, vocabulary: int = 256, **config: Any) -> Any:
    """A Llama with two layers over bytes, where there is no name."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name).to(DEVICE)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape, **config)).to(DEVICE)


def models(options: argparse.Namespace) -> tuple[Any, Any]:
    """Student and teacher; a made one is not trained, but sure of what it says."""
    student, teacher = (model(name, width, initializer_range=0.2) for name, width in sizes(options))
    return student, teacher.eval()


def sizes(options: argparse.Namespace) -> list[tuple[str | None, int]]:
    return [(options.model, 32), (options.teacher, 64)]


def learning_rate(options: argparse.Namespace) -> float:
    return 2e-5 if options.model else 1e-2


def encoder(options: argparse.Namespace) -> Callable[[str], list[int]]:
    """Of text as tokens; as bytes for a tiny model."""
    return AutoTokenizer.from_pretrained(options.model).encode if options.model else lambda text: list(text.encode())


def documents(options: argparse.Namespace, most: int = 256) -> list[Tensor]:
    """The lines of the text, of unequal length."""
    encode, lines = encoder(options), Path(options.text).read_text().splitlines()
    return [torch.tensor(encode(line)[:most]) for line in lines if line.strip()]


def blocks(options: argparse.Namespace, length: int = 64) -> Dataset:
    """The text cut into rows of one length, for a Trainer, which shifts the labels."""
    ids = torch.tensor(encoder(options)(Path(options.text).read_text()))
    rows = ids[: len(ids) // length * length].view(-1, length)
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def collate(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids ``(B, L)``, their attention mask, and labels with −100 at padding."""
    attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids = pad_sequence(rows, batch_first=True)
    return ids, attended, ids.masked_fill(attended == 0, -100)
