"""The stages of a method without a Trainer: each stage's loss of any batch, and its gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_run import tiny_run
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from recipes.glue.method import parse_method
from recipes.glue.run import Run
from recipes.glue.step import Counts, Step
from recipes.glue.trainer import IndexedPadding

LENGTHS = (12, 5, 9, 12, 4, 7, 12, 6)


@dataclass
class Stage:
    """What `Run.fit` was given."""

    run: Run
    model: Any
    loss: Any
    rows: Any
    options: dict[str, Any]
    trained: list[str]
    """Names of the parameters that were not frozen."""

    @property
    def teacher(self) -> Any:
        return self.options.get("teacher") or self.run.teacher

    @property
    def beside(self) -> Any:
        return self.options.get("beside")

    @cached_property
    def bound(self) -> Any:
        terms = self.options.get("terms")
        return self.run._bound(terms, self.model, self.teacher) if terms else None

    def step(self, batch: dict[str, Tensor], counts: Counts | None = None, number: int = 0) -> Step:
        options = {"hidden": self.options.get("hidden", False), "beside": self.beside, "number": number}
        return Step(self.model.eval(), self.teacher, batch, counts or Counts.of(batch), self.bound, **options)

    def parameters(self) -> dict[str, Tensor]:
        """All that are trained, by name."""
        modules = {"": self.model, "beside.": self.beside, "bound.": self.bound and self.bound.projections}
        return {
            f"{at}{name}": p
            for at, module in modules.items()
            if module is not None
            for name, p in module.named_parameters()
        }

    def gradient(self, batch: dict[str, Tensor], cuts: int = 1, number: int = 0) -> dict[str, Tensor]:
        """Of one optimiser step of so many micro-batches."""
        for p in self.parameters().values():
            p.grad = None
        size, counts = len(batch["labels"]) // cuts, Counts.of(batch)
        for i in range(cuts):
            part = {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
            self.loss(self.step(part, counts, number)).backward()
        return {name: p.grad for name, p in self.parameters().items() if p.grad is not None}


@dataclass
class Caught(Run):
    """Trains nothing."""

    stages: list[Stage] = field(default_factory=list)

    def fit(self, model: Any, loss: Any, rows: Any = None, **options: Any) -> Any:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self.stages.append(Stage(self, model, loss, rows, options, trained))
        return model


PLAIN: list[Caught] = []
"""The run without options, which is made once."""


def caught(folder: Path, tokenizer: Any, **more: Any) -> Caught:
    """The teacher finds both classes likely."""
    run = tiny_run(folder, tokenizer, **more)
    logits = run.logits(run.teacher, run.train.select(range(8)))
    with torch.no_grad():
        run.teacher.classifier.bias[0] -= (logits[:, 0] - logits[:, 1]).median() - 0.01
    return Caught(**{each.name: getattr(run, each.name) for each in fields(run)})


def stages(folder: Path, tokenizer: Any, method: str, **more: Any) -> list[Stage]:
    """Of a method with options, as it is named on the command line."""
    if not more and not PLAIN:
        PLAIN.append(caught(folder, tokenizer))
    run = caught(folder, tokenizer, **more) if more else replace(PLAIN[0], stages=[])
    chosen = parse_method(method)
    chosen.check(run)
    chosen.method.train(run, **chosen.options)
    for stage in run.stages:
        vars(stage.model).pop("forward", None)  # of early exits, which are not yet there in training
        vars(stage.model)["_modules"].pop("exits", None)
    return run.stages


def batch_of(run: Run, start: int = 0, lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    """Rows cut to these lengths, and padded."""
    rows = [run.train[start + i] for i in range(len(lengths))]
    cut = [
        {name: v[:length] if isinstance(v, list) else v for name, v in row.items()}
        for row, length in zip(rows, lengths, strict=True)
    ]
    return dict(IndexedPadding(run.tokenizer)(cut))


def of_width(tokenizer: Any, width: int, heads: int = 4) -> Any:
    """A student to be given."""
    torch.manual_seed(3)
    size = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 2, "intermediate_size": 2 * width}
    return BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **size))


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative error of a gradient."""
    expected = {name: g.double() for name, g in expected.items()}
    zeros = {name: torch.zeros_like(g) for name, g in (found | expected).items()}
    parts = [(found.get(k, z).double() - expected.get(k, z).double()).norm() for k, z in zeros.items()]
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    assert size > 1e-3
    return float(torch.stack(parts).norm() / size)


# ---- by plain formulas


class View:
    """Of a model on a batch, in float64, by the model's own outputs."""

    def __init__(self, model, batch):
        self.model = copy.deepcopy(model).double().eval().requires_grad_(True)
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        found = self.model(**given, output_hidden_states=True)
        self.hidden, self.logits, self.mask = found.hidden_states, found.logits, batch["attention_mask"].bool()
        self.first = [h[:, 0] for h in self.hidden]
        m = self.mask[..., None]
        self.means = [(h * m).sum(1) / m.sum(1) for h in self.hidden]

    def scores(self, layer, of="query key"):
        """Before the softmax, 0 for padded keys."""
        attention = self.model.bert.encoder.layer[layer].attention.self
        q, k = (getattr(attention, name)(self.hidden[layer]).unflatten(-1, (4, -1)) for name in of.split())
        found = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        return found.masked_fill(~self.mask[:, None, None], 0)

    def logmap(self, layer, of="query key"):
        return self.scores(layer, of).masked_fill(~self.mask[:, None, None], -1e30).log_softmax(-1)


def unit(x):
    return F.normalize(x, dim=-1)


def soft(s, t, temperature=1.0):
    sides = [(z / temperature).log_softmax(-1) for z in (s.logits, t.logits)]
    return temperature**2 * F.kl_div(*sides, reduction="batchmean", log_target=True)


def hard(s, y):
    return F.cross_entropy(s.logits, y)
