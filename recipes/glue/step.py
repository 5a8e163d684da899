"""What a method's loss is computed from: student, teacher and labels of one batch, and the counts of its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkd import kd_loss
from fusedkd.integrations.bound import BoundTerms
from fusedkd.integrations.states import Recorder, States
from fusedkd.integrations.term import Given
from recipes.finetune.trainer import Batch, takes

IGNORE = -100
"""The label of an example that has none; of a score it is NaN."""


class Outputs(NamedTuple):
    logits: Tensor
    """``(B, C)`` of classes, ``(B,)`` of scores."""
    states: States
    """Hidden states, queries, keys and values: those that the step's terms or `hidden` ask for."""


class Counts(NamedTuple):
    """Of one optimiser step over all micro-batches and ranks, ``()`` each: a loss is a sum divided by one of them."""

    rows: Tensor
    labelled: Tensor
    attended: Tensor
    """Tokens that are no padding."""
    positions: Tensor
    """Tokens, padding included."""

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        labels, attended = batch["labels"], batch["attention_mask"]
        numbers = len(labels), has_label(labels).sum(), attended.sum(), attended.numel()
        return cls(*(torch.as_tensor(number, device=labels.device) for number in numbers))


def has_label(labels: Any) -> Tensor:
    """Of numbers of classes, or of scores, ``(N,)``: a tensor, or the column of a data set."""
    labels = torch.as_tensor(labels if isinstance(labels, Tensor) else list(labels))
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORE


class Step:
    """One micro-batch in training.

    Attributes:
        model: the student, in training mode, as the Trainer has wrapped it.
        teacher_model: the teacher, frozen; None without.
        batch: `input_ids`, `attention_mask`, `labels`, `index` (the rows of the training data), …, ``(B, …)``.
        counts: those of the whole optimiser step.
        epoch: how much of the training data has been seen, from 0.
        number, total: of the optimiser step, from 0, and how many there are.
        beside: the module that is trained beside the student, if there is one.
        teacher_logits: makes the teacher's logits of all rows of the training, ``(N, …)``, by the batch's `row`; None:
            the teacher runs.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        batch: Batch,
        counts: Counts,
        bound: BoundTerms | None,
        *,
        hidden: bool = False,
        epoch: float = 0.0,
        number: int = 0,
        total: int = 1,
        beside: Any = None,
        teacher_logits: Callable[[], Tensor] | None = None,
    ):
        self.model, self.teacher_model, self.batch, self.counts = model, teacher, batch, counts
        self.bound, self.hidden, self.beside = bound, hidden, beside
        self.epoch, self.number, self.total = epoch, number, total
        self.teacher_logits = teacher_logits

    # ---- outputs

    @property
    def labels(self) -> Tensor:
        """``(B,)``: numbers of classes, −100 where there is no label; or scores, NaN where there is none."""
        return self.batch["labels"]

    @property
    def attended(self) -> Tensor:
        """The tokens that are no padding, ``(B, L)``."""
        return self.batch["attention_mask"] != 0

    @property
    def is_regression(self) -> bool:
        return self.labels.is_floating_point()

    @cached_property
    def student(self) -> Outputs:
        return self.run(self.model, self.bound.recorders[0] if self.bound else None)

    @cached_property
    def teacher(self) -> Outputs:
        """Without a gradient, without dropout: the same for a row in every epoch."""
        if self.teacher_logits is not None and self.bound is None and not self.hidden:
            return Outputs(self.teacher_logits().to(self.labels.device)[self.batch["row"]], States((), {}))
        with torch.no_grad():
            return self.run(self.teacher_model, self.bound.recorders[1] if self.bound else None)

    def run(self, model: Any, recorder: Recorder | None = None, **changes: Any) -> Outputs:
        """Any model on the batch, or on the batch with changes: ``inputs_embeds=…, input_ids=None``."""
        given = {name: value for name, value in {**self.batch, **changes}.items() if value is not None}
        columns = takes(model.module if hasattr(model, "module") else model) | {"inputs_embeds"}
        given = {name: value for name, value in given.items() if name in columns}
        with recorder() if recorder else nullcontext() as keep:
            found = model(**given, output_hidden_states=self.hidden or bool(recorder and recorder.hidden))
        states = keep(found) if keep else States((), {})
        if self.hidden:
            states = states._replace(hidden=tuple(found.hidden_states))
        return Outputs(found.logits.squeeze(-1) if self.is_regression else found.logits, states)

    # ---- losses: each the batch's part of a mean over the optimiser step

    def hard(self, logits: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        """The labels' loss, a mean over the examples that have one: cross-entropy; of scores the squared difference."""
        logits = (self.student.logits if logits is None else logits).float()
        if self.is_regression:
            known = has_label(self.labels)
            return (logits - self.labels)[known].square().sum() / self.counts.labelled.clamp(min=1)
        loss = F.cross_entropy(
            logits, self.labels, reduction="sum", ignore_index=IGNORE, label_smoothing=label_smoothing
        )
        return loss / self.counts.labelled.clamp(min=1)

    def soft(
        self, logits: Tensor | None = None, teacher: Tensor | Sequence[Tensor] | None = None, **options: Any
    ) -> Tensor:
        """The teacher's loss, a mean over examples: T^k · D of :func:`fusedkd.kd_loss`, whose options it takes (the
        defaults are temperature 2 and forward KL); of scores the squared difference. Of several teachers: from a list
        of their logits, the mean of their losses; of scores the squared difference from their mean.
        """
        logits = self.student.logits if logits is None else logits
        teacher = self.teacher.logits if teacher is None else teacher
        if self.is_regression:
            target = teacher if isinstance(teacher, Tensor) else torch.stack(list(teacher)).mean(0)
            return (logits.float() - target.float()).square().sum() / self.counts.rows
        options = {"temperature": 2.0, "kd_weight": 1.0, "ce_weight": 0.0, **options}
        loss: Tensor = kd_loss(logits, teacher, kd_normalizer=self.counts.rows, **options)
        return loss

    def terms(self) -> Tensor:
        """The terms that the training was given, with their weights."""
        if self.bound is None:
            raise ValueError("the training has no terms: pass them to Run.fit")
        by_rows = {"attended": self.counts.attended, "sequences": self.counts.rows, "positions": self.counts.positions}
        losses, projections = [], self.bound.projections
        for term in self.bound.terms:
            own: Any = projections[term.name] if term.name in projections else ()  # noqa: SIM401 (a ModuleDict)
            sides = self.student.states, self.teacher.states, self.attended
            pairs = self.bound.pairs[term.name]
            losses.append(term.loss(Given(*sides, pairs, own, by_rows[term.rows], causal=False)))
        return torch.stack(losses).sum()


Loss = Callable[[Step], Tensor]
"""Of a micro-batch: its part of the loss of the optimiser step."""
