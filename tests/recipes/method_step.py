"""A run made once, a step of given logits, and the loss of a method without its training."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from distilbert.conftest import WORDS
from tiny_run import tiny_run
from transformers import BertTokenizer

from fusedkd.integrations.states import States
from recipes.glue.method import parse_method
from recipes.glue.run import Run
from recipes.glue.step import Counts, Loss, Outputs, Step

ROWS, CLASSES = 6, 4
EXTRA = 3
"""Rows of the optimiser step in other micro-batches; two have a label, unless all have one."""


@cache
def prepared() -> Run:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return tiny_run(Path("."), BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}))


def fresh_run(folder: Path) -> Run:
    """Quicker than a new one: the models, which no method changes, are the same ones."""
    run = prepared()
    return replace(run, arguments=replace(run.arguments, output_dir=str(folder)), logs=[])


def random_step(labels: bool = True, **outputs: torch.Tensor) -> Step:
    """Of random logits; `labels`: all rows have one, otherwise the second has none."""
    random = torch.Generator().manual_seed(0)
    z, v = (2 * torch.randn(ROWS, CLASSES, generator=random) for _ in range(2))
    y = torch.tensor([0, 3, 1, 2, 2, 0])
    if not labels:
        y[1] = -100
    known = int((y >= 0).sum())
    batch = {"labels": y, "index": torch.arange(ROWS), "attention_mask": torch.ones(ROWS, 5)}
    numbers = ROWS + EXTRA, known + (EXTRA if labels else 2), 5 * (ROWS + EXTRA), 5 * (ROWS + EXTRA)
    step = Step(None, None, batch, Counts(*map(torch.tensor, numbers)), None)
    for name, logits in {"student": z.requires_grad_(), "teacher": v, **outputs}.items():
        step.__dict__[name] = Outputs(logits, States((), {}))
    return step


def loss_of(run: Run, text: str) -> Loss:
    """The loss of the method's last training. Nothing is trained."""
    calls: list[Loss] = []

    def fit(model: Any, loss: Loss, rows: Any = None, **more: Any) -> Any:
        calls.append(loss)
        return model

    run.fit = fit  # type: ignore[method-assign]
    chosen = parse_method(text)
    chosen.method.train(run, **chosen.options)
    return calls[-1]
