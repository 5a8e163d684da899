"""The teachers of a distilling Trainer: one, several that all teach every row, or one for each row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedkd.integrations.heads import base_model
from fusedkd.integrations.kinds import Kind
from fusedkd.integrations.pair import Form, Group, Routed, part
from fusedkd.integrations.routed import NONE
from fusedkd.integrations.states import States
from fusedkd.integrations.teacher import TeacherModel, load


def loaded(teacher: Any, kind: Kind, student: Any) -> Any:
    """`teacher` with models in the place of names and folders, and of "base"."""
    if isinstance(teacher, Mapping):
        return {key: loaded(each, kind, student) for key, each in teacher.items()}
    if isinstance(teacher, list | tuple):
        return [loaded(each, kind, student) for each in teacher]
    if teacher == "base":
        if base_model(student) is student:
            raise ValueError(
                f"teacher='base' is a PEFT model with its adapters off, but the student is a {type(student).__name__}"
            )
        return base_model(student)
    return load(teacher, kind) if isinstance(teacher, str | Path) else teacher


class Teachers:
    """Every :class:`TeacherModel` of a Trainer, by its key: of a list the index, of a dict the name.

    Args:
        given: a model, a list of models (all of them teach every row) or a dict of them (one for each row).
        student, kind, device: as for :class:`TeacherModel`.
    """

    def __init__(self, given: Any, student: nn.Module, kind: Kind, device: torch.device | None):
        self.routed, self.listed = isinstance(given, Mapping), isinstance(given, list)
        named = given if self.routed else dict(enumerate(given if self.listed else [given]))
        once = {id(model): TeacherModel(model, student, kind, device) for model in named.values()}
        self.models = {key: once[id(model)] for key, model in named.items()}
        self.distinct = list(once.values())
        """A model that stands under two keys runs once."""
        self.left = self.behind = 0

    def bind(self) -> None:
        """To the models as they are now."""
        for model in self.distinct:
            model.bind()

    @property
    def several(self) -> bool:
        return self.routed or self.listed

    @property
    def sharded(self) -> list[TeacherModel]:
        """Those that all ranks must run together."""
        return [model for model in self.distinct if model.sharded]

    def __call__(
        self, batch: Mapping[str, Any], attended: Tensor, routes: Tensor | None = None
    ) -> tuple[Form, States | None]:
        """What the loss takes of them, and of a single teacher the states, if they are recorded.

        Args:
            batch, attended: as for :class:`TeacherModel`.
            routes: ``(B,)``, of teachers per row, the index of each sequence's; None: no sequence has one.
        """
        if self.routed:
            if routes is None:  # no other way than with the column: another rank's batch may have it
                routes = torch.full_like(attended[:, 0], NONE, dtype=torch.int64)
            return self._groups(batch, attended, routes), None
        found = {model: model(batch, attended) for model in self.distinct}
        heads, states = zip(*(found[model] for model in self.models.values()), strict=True)
        return (list(heads), None) if self.listed else (heads[0], states[0])

    def _groups(self, batch: Mapping[str, Any], attended: Tensor, routes: Tensor) -> Routed:
        """Waits for the device: which rows a model runs on is decided on the host."""
        models: list[TeacherModel | None] = [*self.models.values(), None]  # the last: NONE
        named, groups = [models[route] for route in routes.tolist()], []
        for model in (*self.distinct, None):
            own = [i for i, each in enumerate(named) if each is model]
            rows = torch.tensor(own, device=attended.device)
            if own:
                teacher = None if model is None else model(part(batch, rows), attended[rows])[0]
                groups.append(Group(rows, teacher))
            elif model is not None and model.sharded:
                self._idle(model, batch, attended)
        return Routed(groups, routes)

    # ---- what ranks do together

    def begin_step(self, micro_batches: int, most: int) -> None:
        """`micro_batches`: of this rank in the optimiser step; `most`: of any rank."""
        self.left, self.behind = micro_batches, most - micro_batches

    def keep_up(self, batch: Mapping[str, Any], attended: Tensor) -> None:
        """Before each micro-batch of a step. Ahead of its last, runs the sharded ones as often as another rank does
        that has more: else that rank would wait for ever.
        """
        self.left -= 1
        for model in self.sharded * (self.behind if self.left == 0 else 0):
            self._idle(model, batch, attended)

    @staticmethod
    def _idle(model: TeacherModel, batch: Mapping[str, Any], attended: Tensor) -> None:
        """For the other ranks' sake alone: on the first sequence, as if it were padding."""
        first = torch.zeros(1, dtype=torch.int64, device=attended.device)
        model(part(batch, first), torch.zeros_like(attended[:1]))
        model.release()  # what is still whole would not be gathered the next time

    def release(self) -> None:
        """After a batch: what was gathered of sharded ones is given back."""
        for model in self.sharded:
            model.release()
