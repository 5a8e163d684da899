"""The teacher model of a distilling Trainer: what it is, what of a batch it is given, and how it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from fusedkd import checks as check
from fusedkd.integrations import refusals
from fusedkd.integrations.classes import End, current_end, refuse_others
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.heads import Head, base_model, checked
from fusedkd.integrations.kinds import Kind, kind_of, why_not_causal
from fusedkd.integrations.kinds import attended as attended_tokens
from fusedkd.integrations.offline import COLUMNS
from fusedkd.integrations.pair import Single
from fusedkd.integrations.sharded import Shares, is_sharded
from fusedkd.integrations.states import Recorder, States
from fusedkd.integrations.takes import Takes
from fusedkd.teachers import TeacherHead, TeacherLogits, TeacherTopK


class TeacherModel:
    """A teacher beside its student: frozen, run in evaluation mode and without gradients.

    Args:
        model: the teacher. The very model around which the student, a PEFT model, is built: the student's own weights
            with adapters off.
        student: the student.
        kind: of the student.
        device: where the teacher goes, unless a `device_map` of several devices has placed it, or :func:`fully_shard`
            its shares. None: it stays where it lies. Its hidden states come to the student's device, to which its head
            is copied once.
    """

    def __init__(self, model: nn.Module, student: nn.Module, kind: Kind, device: torch.device | None):
        self.model, self.adapted = model, None
        self.shares, self.sharded = Shares(model), False
        """Whether each rank holds a share: then all must call it together. The head's weight lasts until `release`."""
        self.known: End | None = None
        self.placed = device is None or getattr(model, "hf_device_map", None) is not None
        self.copies: dict[str, tuple[Any, Any, Tensor]] = {}
        if model is not student and model is base_model(student):
            self.adapted = student
            _refuse_moving_base(student)
        else:
            self.sharded = is_sharded(model)
            refusals.other_shares(model)
            refusals.shared_parameters(student, model)
            if not kind_of(base_model(model)).classes:
                checked(base_model(model))
            if not (self.placed or self.sharded or any(p.is_meta for p in model.parameters())):
                model.to(device)
            _ = self.head  # while it is not frozen: what it adds to its logits shows by its gradient
            model.eval().requires_grad_(False)
        self.student = student
        self.takes = Takes(model)
        self.recorder: Recorder | None = None
        self.dropped: set[str] = set()
        refuse_others((base_model(student), kind), (base_model(model), self.head.kind))

    @property
    def head(self) -> End:
        self.known = current_end(self.known, self.model)
        return self.known

    @property
    def entry(self) -> torch.device:
        """Where its tokens go."""
        return base_model(self.model).get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def bind(self) -> None:
        """To the model as it is now: resized, or sharded."""
        self.sharded, _ = self.adapted is None and is_sharded(self.model), self.head

    def release(self) -> None:
        self.shares.release()

    def record(self, causal: bool) -> None:
        """From now on keep what terms of the loss compare."""
        self.release()  # what the head was asked is still whole
        with evaluating(self.model):
            self.recorder = Recorder(self.model, causal)
        self.release()

    def __call__(self, batch: Mapping[str, Any], attended: Tensor) -> tuple[Single, States | None]:
        """Its hidden states at the head, or its classes' logits, and what else is recorded of it.

        Args:
            batch: what the student is given.
            attended: ``(B, L)``, the tokens that are no padding. One that the teacher's vocabulary does not hold is an
                error on the CPU; on a GPU the teacher's states of that sequence are NaN.
        """
        ids, own = batch["input_ids"], self.takes.of(batch)
        self._tell(batch.keys() - own.keys())
        lost, read = None, {"input_ids": attended_tokens(batch) & attended.any(1, keepdim=True)}
        for name, counted in (read | {self.head.kind.tokens: attended}).items():
            vocabulary = known_tokens(self.model, name)
            if vocabulary < known_tokens(self.student, name):
                beyond = batch[name] >= vocabulary
                refusals.unknown_ids(batch[name], beyond & counted, name, vocabulary)
                own[name] = batch[name].masked_fill(beyond, 0)
                wrong = None if ids.is_cpu else (beyond & counted).any(1)
                lost = wrong if lost is None or wrong is None else lost | wrong
        if self.placed:
            own = {name: across(value, self.entry) for name, value in own.items()}
        with evaluating(self.model), _without_adapters(self.adapted):
            with nullcontext() if self.recorder is None else self.recorder() as states_of:
                hidden, outputs = self.head.hidden_states(self.model, own)
            if self.sharded and isinstance(self.head, Head):
                self.shares.gather(self.head.linear)

        def here(states: Tensor) -> Tensor:
            states = across(states, ids.device)
            return states if lost is None else states.masked_fill(lost.view(-1, *[1] * (states.dim() - 1)), torch.nan)

        hidden, states = here(hidden), None if states_of is None else states_of(outputs).map(here)
        head = self.head
        if not isinstance(head, Head):
            return TeacherLogits(hidden), states
        weight, bias = head.parameters()  # which a resize makes anew, and not frozen
        weight, bias = (self._copied(name, x, ids.device) for name, x in (("weight", weight), ("bias", bias)))
        return TeacherHead(hidden, weight, bias, softcap=head.softcap, scale=head.scale), states

    def _copied(self, name: str, parameter: Any, device: torch.device) -> Any:
        """Of the head, on the student's device: a copy is kept until the parameter changes or is another."""
        if parameter is None or parameter.device == device:
            return None if parameter is None else parameter.detach()
        state = parameter._version, device
        known = self.copies.get(name)
        if known is None or known[0] is not parameter or known[1] != state:
            self.copies[name] = known = (parameter, state, across(parameter.detach(), device))
        return known[2]

    def _tell(self, dropped: set[str]) -> None:
        if dropped - self.dropped:
            self.dropped |= dropped
            name, names = type(base_model(self.model)).__name__, ", ".join(sorted(dropped))
            check.warn(f"{name}, the teacher, does not take {names}, which the student is given")


def across(value: Any, device: torch.device) -> Any:
    """The one place where something goes from the student's device to the teacher's, or back. A model whose embeddings
    are offloaded (meta) fetches what it is given by itself.
    """
    return value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value


def known_tokens(model: nn.Module, name: str = "input_ids") -> int:
    """How many a model has embeddings of: an encoder's, or a decoder's."""
    whole = base_model(model)
    embeddings = (whole.get_decoder() if name == "decoder_input_ids" else whole).get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", len(embeddings.weight)))


def load(name: Any, kind: Kind) -> nn.Module:
    """The teacher of that name or in that folder, of the student's kind."""
    failure: Exception | None = None
    for auto in kind.autos:
        try:
            reason = why_not_causal(AutoConfig.from_pretrained(name)) if kind.causal else None
            model, about = auto.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError) as error:
            failure = error
            continue
        if reason:
            raise ValueError(f"teacher={str(name)!r} {reason}")
        if kind.classes and about["missing_keys"]:
            missing = ", ".join(sorted(about["missing_keys"])[:3])
            raise ValueError(f"teacher={str(name)!r} is no {kind.noun[2:]} that was trained: it has no {missing}")
        return model  # type: ignore[no-any-return]
    raise ValueError(
        f"teacher={str(name)!r} is neither a folder with {kind.noun} nor one's name on the hub"
    ) from failure


def listed(batch: Mapping[str, Any], kd: KDConfig, vocabulary: int) -> TeacherTopK | None:
    """The offline teacher of a batch, if it has one, by the columns that a student of that vocabulary has.

    Others may be padding of the teacher's vocabulary and are left out. A row that has no more, and a column too far
    beyond, are refused; on a GPU the row is NaN. With vocab_mismatch "truncate" they are left out as well.
    """
    if COLUMNS[0] not in batch:
        return None
    ids, logprobs = (batch[name] for name in COLUMNS)
    beyond = ids >= vocabulary
    known = ids.masked_fill(beyond, -1)
    if kd.vocab_mismatch == "error":
        wrong = (beyond & ~(known >= 0).any(-1, keepdim=True)) | (ids >= check.most_padded(vocabulary))
        refusals.unknown_ids(ids, wrong, "teacher_ids", vocabulary)
        if not ids.is_cpu:
            row = wrong.any(-1, keepdim=True)
            known, logprobs = torch.where(row, known.clamp(min=0), known), logprobs.masked_fill(row, torch.nan)
    return TeacherTopK(known, logprobs, tail=kd.tail, logprobs_temperature=kd.logprobs_temperature)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode: modules that are the student's as well are in training mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_adapters(student: Any) -> Iterator[None]:
    """With the adapters of a PEFT model off, if there is one. Which parameters are trained is as before."""
    if student is None:
        yield
        return
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    try:
        with student.disable_adapter():
            yield
    finally:
        for p in student.parameters():
            p.requires_grad_(id(p) in trained)


def _refuse_moving_base(student: Any) -> None:
    """Weights that are trained and not switched off with the adapters."""
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    with _without_adapters(student):
        moving = [name for name, p in student.named_parameters() if p.requires_grad and name in trained]
    if moving:
        raise ValueError(
            f"the teacher is the student with adapters off, but {', '.join(moving[:3])} of these weights are trained: "
            "give the student a base of its own (copy.deepcopy)"
        )
