"""One training of one method with one seed: its data, its models, and how they are trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.bound import BoundTerms
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.interrupt import Arguments
from fusedkd.integrations.states import Recorder
from fusedkd.integrations.students import student_of
from fusedkd.integrations.term import Term
from recipes.finetune.tasks import Task
from recipes.finetune.trainer import takes
from recipes.glue.step import Loss, has_label
from recipes.glue.trainer import IndexedPadding, MethodTrainer

STAGE = 1_000_000
"""Between the seeds of two stages of a training."""


@dataclass
class Run:
    """
    task         how examples look and are scored
    tokenizer    of all models
    examples     training texts and `label`: the rows of `train`
    train        tokens, `labels` (−100 or NaN where an example has none) and `index`, its row
    held_out     tokens and `labels`
    source       what the teacher was before it was fine-tuned, whose layers a student copies; the teacher itself, where
                 that is not known
    teacher      fine-tuned on the task and frozen; None without
    arguments    of a training: batch, learning rate, seed; its number of steps is that of the whole run
    layers, width, init
                 of the student, as for :func:`fusedkd.integrations.students.student_of`
    given        a student given by the user, instead
    others       further held-out rows, by name
    """

    task: Task
    tokenizer: Tokenizer
    examples: datasets.Dataset
    train: datasets.Dataset
    held_out: datasets.Dataset
    source: PreTrainedModel
    teacher: PreTrainedModel | None
    arguments: Arguments
    layers: list[int] | None = None
    width: int | None = None
    init: Any = "copied"
    given: PreTrainedModel | None = None
    max_length: int = 128
    others: dict[str, datasets.Dataset] = field(default_factory=dict)
    logs: list[dict[str, float]] = field(default_factory=list)
    """Of all trainings so far."""
    known_logits: dict[Any, Tensor] = field(default_factory=dict)
    """Of the teacher on training rows, for all methods and seeds of a comparison."""
    trainings: WeakKeyDictionary[PreTrainedModel, int] = field(default_factory=WeakKeyDictionary)
    """Of each model so far: the stages of a method."""

    @property
    def seed(self) -> int:
        return self.arguments.seed

    @property
    def labelled(self) -> datasets.Dataset:
        """The training rows that have a label."""
        return self.train.select(np.flatnonzero(has_label(self.train["labels"])))

    @property
    def unlabelled(self) -> datasets.Dataset:
        return self.train.select(np.flatnonzero(~has_label(self.train["labels"])))

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run, which a method of several stages shares out."""
        if self.arguments.max_steps > 0:
            return self.arguments.max_steps
        batch = self.arguments.train_batch_size * self.arguments.gradient_accumulation_steps
        return math.ceil(
            self.arguments.num_train_epochs * math.ceil(len(self.train) / (batch * self.arguments.world_size))
        )

    def split(self, *shares: float) -> list[int]:
        """The steps of stages that share out those of the run in these proportions."""
        if min(shares) < 0 or not sum(shares):
            raise UsageError(f"shares of the steps must not be negative, but are {', '.join(map(str, shares))}")
        found: list[int] = []
        for i in range(len(shares)):
            found.append(round(self.steps * sum(shares[: i + 1]) / sum(shares)) - sum(found))
        return found

    # ---- models

    def student(self, layers: list[int] | None = None) -> PreTrainedModel:
        """A new one; the same for the same seed."""
        if self.given is not None and layers is None:
            return copy.deepcopy(self.given)
        new_head = self.source is not self.teacher  # which was put on a body without one
        return student_of(self.source, layers or self.layers, self.width, self.init, self.seed, new_head)

    def source_again(self) -> PreTrainedModel:
        """A copy of the source, to be trained: a model of the teacher's size."""
        return copy.deepcopy(self.source).requires_grad_()

    # ---- training

    def fit(
        self,
        model: PreTrainedModel,
        loss: Loss,
        rows: datasets.Dataset | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        terms: Sequence[Term] = (),
        hidden: bool = False,
        beside: nn.Module | None = None,
        steps: int | None = None,
        **arguments: Any,
    ) -> PreTrainedModel:
        """Train a model and return it. Each further stage of its training has an order of the data and dropout of its
        own: a stage that is shorter than the data would else read what the one before it has read.

        Args:
            model: trained in place.
            loss: of a :class:`recipes.glue.step.Step`.
            rows: training data of the form of `train`; None: `train`.
            teacher: instead of the run's.
            terms: what `Step.terms` sums: hidden states, attention maps, layers.
            hidden: whether `Step.student.states.hidden` and the teacher's are wanted without a term that has them.
            beside: a module that is trained with the student, and is no part of it.
            steps: optimiser steps; None: those of the whole run.
            arguments: of transformers' TrainingArguments, such as a `learning_rate`.
        """
        teacher = self.teacher if teacher is None else teacher
        rows = self.train if rows is None else rows
        steps = self.steps if steps is None else steps
        if steps == 0:
            return model
        if not len(rows):
            raise UsageError("there are no examples to train on: none has a label, or there are none at all")
        if (share := arguments.get("warmup_steps", self.arguments.warmup_steps)) < 1:
            arguments["warmup_steps"] = int(share * steps)  # rounded down: a stage of a step is not to be all warm-up
        options = replace(self.arguments, max_steps=steps, **arguments)
        before = self.trainings.get(model, 0)
        self.trainings[model] = before + 1
        options.seed += STAGE * before
        options.data_seed = None if options.data_seed is None else options.data_seed + STAGE * before
        read = steps * options.train_batch_size * options.gradient_accumulation_steps * options.world_size
        logits = None
        if teacher is not None and read >= len(rows):  # else it would run on more rows than it teaches
            known = self.known_logits if teacher is self.teacher else {}  # others live as long as this training
            logits = partial(self._teacher_logits, known, teacher, rows)
        trainer = MethodTrainer(
            model,
            options,
            IndexedPadding(self.tokenizer),
            rows.add_column("row", np.arange(len(rows))),
            None,
            self.tokenizer,
            teacher=teacher,
            loss=loss,
            bound=self._bound(terms, model, teacher) if terms else None,
            hidden=hidden,
            beside=beside,
            teacher_logits=logits,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        self.logs += trainer.state.log_history
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise UsageError("training diverged, its weights are not finite: try a smaller --learning_rate")
        return model

    def _teacher_logits(self, known: dict[Any, Tensor], teacher: PreTrainedModel, rows: datasets.Dataset) -> Tensor:
        """Once for this model, as it is now, and these rows."""
        key = teacher, sum(parameter._version for parameter in teacher.parameters()), rows._fingerprint
        if key not in known:
            known[key] = self.logits(teacher, rows)
        return known[key]

    def _bound(self, terms: Sequence[Term], model: Any, teacher: Any) -> BoundTerms:
        try:
            recorders = Recorder(model, False), Recorder(teacher, False)
            return BoundTerms(terms, *recorders, self.seed, device=self.arguments.device)
        except ValueError as error:
            raise UsageError(f"the terms of this method do not fit these models: {error}") from None

    @torch.no_grad()
    def logits(self, model: PreTrainedModel, rows: datasets.Dataset | None = None) -> Tensor:
        """``(N, C)``, or scores ``(N,)``, float32 on the CPU, of a model in evaluation; None: of the held-out rows."""
        rows = self.held_out if rows is None else rows
        order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")  # less padding
        collate, columns = IndexedPadding(self.tokenizer), takes(model)
        device, training = model.device, model.training
        model.eval()
        found = []
        own: Any = {"collate_fn": collate, "generator": torch.Generator()}  # no random number of a training is drawn
        loader: Any = DataLoader(rows.select(order), self.arguments.eval_batch_size, **own)
        for batch in loader:
            found.append(model(**{k: v.to(device) for k, v in batch.items() if k in columns}).logits.float().cpu())
        model.train(training)
        logits = torch.cat(found)[torch.from_numpy(np.argsort(order))]
        return logits if self.task.labels else logits.squeeze(-1)


def save(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Whole, or the folder is not there."""
    part = folder.with_name(f"{folder.name}.part")
    rmtree(part, ignore_errors=True)
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    part.rename(folder)
