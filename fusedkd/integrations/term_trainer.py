"""What a distilling Trainer does with its terms: those beside the logits' are bound to its models, their projections
trained and saved, and all are logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusedkd.integrations import refusals
from fusedkd.integrations.bound import BoundTerms
from fusedkd.integrations.evaluation import EvaluatingTrainer
from fusedkd.integrations.offline import Batch
from fusedkd.integrations.pair import Pair
from fusedkd.integrations.sharded import set_whole, whole
from fusedkd.integrations.states import Recorder
from fusedkd.integrations.term import Given, Term

MODULE = "distillation_terms"
"""Of a student, while it is trained: the projections."""
FILE = f"{MODULE}.safetensors"
"""In a checkpoint."""


class TermTrainer(EvaluatingTrainer):
    """The terms of :class:`fusedkd.integrations.transformers.DistillationTrainer`."""

    teachers: Any
    head: Any
    parts: Callable[[], dict[str, tuple[float, int]]]
    warned: set[str]
    given_terms: list[Term]
    """Beside those of KDConfig; without those of weight 0."""
    bound: BoundTerms | None
    """Those that compare more than logits."""

    # ---- models

    def _start_terms(self, terms: Sequence[Term]) -> None:
        self.given_terms = [term for term in terms if term.weight != 0]
        self.kinds = list(dict.fromkeys(term.rows for term in self.given_terms if term.rows != "kd"))
        self.compared: list[Term] = [term for term in self.given_terms if not term.of_logits]
        self.bound = None
        self.bound_to: Any = None

    @property
    def projections(self) -> nn.ModuleDict:
        """Of each term that has some: a linear map for each pair of layers, or one for all."""
        return self.bound.projections if self.bound else nn.ModuleDict()

    def _bind_terms(self) -> None:
        """To the models as they are now, new projections with them."""
        if not self.compared or self.bound_to is self.model:
            return
        teacher, causal = self.teachers.distinct[0], self.head.causal
        if teacher.recorder is None:
            teacher.record(causal)
        student: Any = self.model
        kind: Any = {"device": self.args.device, "dtype": self.head.dtype}
        recorders = Recorder(student, causal), teacher.recorder
        self.bound = BoundTerms(self.compared, *recorders, self.args.seed, **kind)
        refusals.projections(self)
        self.bound_to = self.model

    @contextmanager
    def recording(self) -> Iterator[Callable[[Any], Any]]:
        """Within, the student runs once; yields what makes States of its outputs."""
        if self.bound is None:
            yield lambda outputs: None
            return
        student, _ = self.bound.recorders
        with student() as states:
            yield states

    def wanted(self, batch: Batch) -> dict[str, Any]:
        """Further arguments of both models."""
        if self.bound is None:
            return {}
        if (epoch := int(self.state.epoch or 0)) != self.bound.epoch:
            self.bound.draw(epoch)
        if self.bound.recorders[0].layers:
            refusals.attention_batch(batch)
        return self.bound.wanted

    # ---- the loss

    def masks_of_terms(self, attended: Tensor) -> list[Tensor]:
        """The rows of `kinds`, ``(B, L)`` or ``(B, 1)``."""
        made = {"attended": lambda: attended, "sequences": lambda: attended.any(1, keepdim=True)}
        made["positions"] = lambda: torch.ones_like(attended)
        return [made[kind]() for kind in self.kinds]

    def parts_of_terms(self) -> dict[str, tuple[float, int]]:
        """As `parts`, behind the KD term's rows and those of the cross-entropy."""
        index = {"kd": 0} | {kind: i for i, kind in enumerate(self.kinds, start=2)}
        return {term.name: (term.weight, index[term.rows]) for term in self.given_terms}

    def losses_of_terms(self, pair: Pair, counts: Tensor | None, linear: Callable[..., Any]) -> dict[str, Tensor]:
        """Times their weights, by name: scalars, or per row."""
        found, parts, projections = {}, self.parts_of_terms(), self.projections
        for term in self.given_terms:
            normalizer = None if counts is None else counts[parts[term.name][1]]
            own: Any = projections[term.name] if term.name in projections else ()  # noqa: SIM401 (a ModuleDict)
            refusals.own_units(term.name, own)
            pairs = self.bound.pairs.get(term.name, ()) if self.bound else ()
            states: Any = {"student": pair.states, "teacher": pair.teacher_states, "attended": pair.attended}
            given = Given(
                **states,
                pairs=pairs,
                projections=own,
                normalizer=normalizer,
                causal=self.head.causal,
                linear=partial(linear, pair),
            )
            loss = term.loss(given)
            if counts is not None:
                refusals.constant(term.name, loss)
            found[term.name] = loss
        return found

    # ---- training and checkpoints

    @contextmanager
    def training_projections(self) -> Iterator[None]:
        """Within, they are the student's: in its optimiser, its gradient norm and its reduction, but not in what
        `save_pretrained` saves.
        """
        model: Any = self.model
        if not self.projections:
            yield
            return
        keys = self.projections.state_dict()  # FSDP2 makes parameters shares again, which an evaluation left whole
        held = {p for group in self.optimizer.param_groups for p in group["params"]} if self.optimizer else None
        if held is not None and not held.issuperset(self.projections.parameters()):
            raise ValueError(
                "optimizers holds an optimizer without the projections of the terms: add "
                "trainer.projections.parameters() to its groups, or leave it to the Trainer"
            )
        ignored = getattr(model, "_keys_to_ignore_on_save", None)
        model.add_module(MODULE, self.projections)
        model._keys_to_ignore_on_save = {*(ignored or ()), *(f"{MODULE}.{k}" for k in keys)}
        try:
            yield
        finally:
            delattr(model, MODULE)
            model._keys_to_ignore_on_save = ignored

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.projections:  # of a checkpoint
            self.save_projections(Path(str(output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._bind_terms()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_projections(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.load_projections(str(self.state.best_model_checkpoint))

    def save_projections(self, checkpoint: Path) -> None:
        values = {name: whole(value).contiguous() for name, value in self.projections.state_dict().items()}
        if self.args.should_save:
            checkpoint.mkdir(parents=True, exist_ok=True)  # of FSDP's shares the Trainer has saved nothing yet
            save_file(values, checkpoint / FILE)

    def load_projections(self, checkpoint: str | Path) -> None:
        if not self.projections:
            return
        file = Path(checkpoint) / FILE
        if not file.is_file():
            raise ValueError(f"{checkpoint} has no {FILE}, the projections of the terms: it is of another run")
        saved, own = load_file(file), self.projections.state_dict()
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise ValueError(f"{file} holds {', '.join(saved)}, but the terms have {', '.join(own)}, in their shapes")
        for name, value in own.items():
            set_whole(value, saved[name])

    # ---- logs

    def _start_sums(self) -> None:
        self.terms: Any = 0
        """The sums of the terms over this rank's micro-batches since the last log."""
        self.steps, self.last_step = 0, -1  # optimiser steps in that sum
        self.blank: Any = 0
        """How many of this rank's batches had no row of each of `masks`."""

    def _add(self, terms: dict[str, Tensor]) -> None:
        """Of a micro-batch."""
        self.terms = self.terms + torch.stack([terms[name] for name in self.parts()]).double()
        self.steps += self.state.global_step != self.last_step
        self.last_step = self.state.global_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the terms beside the loss: means over the optimiser steps since the last time."""
        if isinstance(self.blank, Tensor):
            blank, self.blank = self.blank.tolist(), 0  # waits for the device, as a log does anyway
            names = {name for name, (weight, i) in self.parts().items() if weight != 0 and blank[i]} - self.warned
            refusals.warn_of_blank(names)
            self.warned |= names
        if "loss" in logs and self.steps:
            means = self.accelerator.reduce(self.terms / self.steps, "sum").tolist()
            logs |= dict(zip(self.parts(), means, strict=True))
            self.terms, self.steps = 0, 0
        super().log(logs, start_time)
