"""Student and teachers on one batch, and the parts of it that have a teacher each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fusedkd.integrations.states import States
from fusedkd.losses.kd import kd_loss
from fusedkd.losses.linear_kd import linear_kd_loss
from fusedkd.losses.options import DEFAULTS, KDTerms
from fusedkd.teachers import TeacherHead, TeacherLogits, TeacherTopK

Single: TypeAlias = TeacherHead | TeacherLogits


class Group(NamedTuple):
    """Sequences of a batch that have one teacher."""

    rows: Tensor
    """Their indices, ``(B',)``, in order."""
    teacher: Single | None


class Routed(NamedTuple):
    """The teachers of a batch: each sequence is in one group, that of its route ``(B,)``."""

    groups: list[Group]
    routes: Tensor


Form: TypeAlias = Single | list[Single] | Routed
"""Of the teachers of a batch: one, several for every row, or one for each."""


def part(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """These sequences of a batch; what has not one entry per sequence stays."""
    size = len(batch["input_ids"])

    def of(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value

    return {name: of(value) for name, value in batch.items()}


class Pair(NamedTuple):
    """Student and teacher on one batch ``(B, L)`` of rows, at the ends of their backbones."""

    hidden: Tensor
    weight: Tensor | None
    """None: of a classifier, whose logits stand in the place of hidden states."""
    bias: Tensor | None
    teacher: Form | TeacherTopK | None
    labels: Tensor | None
    masks: list[Tensor]
    """The rows that :meth:`DistillationTrainer.masks` names."""
    attended: Tensor
    """The tokens that are no padding, ``(B, L)``; where sequences are rows, those of the sequences."""
    states: States | None = None
    teacher_states: States | None = None
    """Where a term compares them, of one teacher for all rows."""

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a language model's."""
        assert self.weight is not None
        return self.weight, self.bias

    def of(self, group: Group) -> Pair:
        """These sequences alone, with their teacher."""
        rows = group.rows
        if len(rows) == len(self.hidden):
            return self._replace(teacher=group.teacher)
        return self._replace(
            hidden=self.hidden[rows],
            teacher=group.teacher,
            labels=None if self.labels is None else self.labels[rows],
            masks=[mask[rows] for mask in self.masks],
            attended=self.attended[rows],
        )


def compared(pair: Pair, softcap: float | None, scale: float | None, options: dict[str, Any]) -> tuple[Tensor, KDTerms]:
    """`linear_kd_loss` of the pair, of classifiers `kd_loss`, under the soft-cap and scale of the student's logits."""
    teacher: Any = pair.teacher
    unread = pair.hidden.detach()
    if pair.weight is None:
        of_logits: Any = {name: value for name, value in options.items() if name in DEFAULTS}
        teacher = teacher or unread
        return kd_loss(pair.hidden, teacher, pair.labels, kd_mask=pair.masks[0], return_terms=True, **of_logits)
    return linear_kd_loss(  # type: ignore[no-any-return]
        pair.hidden,
        pair.weight,
        teacher or TeacherHead(unread, pair.weight.detach()),
        pair.labels,
        student_bias=pair.bias,
        kd_mask=pair.masks[0],
        logit_softcap=softcap,
        logit_scale=scale,
        return_terms=True,
        **options,
    )


def joined(
    pair: Pair, groups: Sequence[Group], loss: Callable[..., tuple[Tensor, KDTerms]], options: dict[str, Any]
) -> tuple[Tensor, KDTerms]:
    """The losses of groups as that of the batch: their sum or, where they are per row, each row in its place.

    `loss` of a pair and these options.
    """
    if options.get("reduction", "mean") == "mean":  # of the batch, not of each group
        counts = zip(("kd_normalizer", "ce_normalizer"), pair.masks, strict=False)
        options = options | {name: mask.sum() for name, mask in counts if options.get(name) is None}
    found = [loss(pair.of(group), **options) for group in groups]

    def together(values: Sequence[Tensor]) -> Tensor:
        if values[0].dim() == 0:
            return torch.stack(list(values)).sum()
        places = torch.cat([group.rows for group in groups])
        return torch.cat(list(values))[places.argsort()]

    losses, terms = zip(*found, strict=True)
    return together(losses), KDTerms(*(together(each) for each in zip(*terms, strict=True)))
