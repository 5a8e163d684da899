"""What of a batch a model of a distilling Trainer is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fusedkd.integrations.heads import base_model
from fusedkd.integrations.kinds import kind_of

MEDIA = ("pixel_values", "input_features")
"""Beginnings of the names of what is no text."""


class Takes:
    """What a model of a Trainer can be given: the arguments of its forward, of a PEFT model those of its base. What is
    no text, it must name.

    A cache is never wanted: only without one do models find the ends of packed documents in `position_ids`.
    """

    def __init__(self, model: nn.Module):
        base = base_model(model)
        parameters = inspect.signature(base.forward).parameters
        self.names = {name for name, p in parameters.items() if p.kind != p.VAR_KEYWORD}
        self.others = len(self.names) < len(parameters)
        inherited = [vars(kind)["forward"] for kind in type(base).__mro__ if "forward" in vars(kind)]
        self.named = {name for forward in inherited for name in inspect.signature(forward).parameters}
        caches = "use_cache" in (self.named if self.others else self.names)
        self.cache = {"use_cache": False} if caches else {}

    def __contains__(self, name: str) -> bool:
        return name in self.names or (self.others and (name in self.named or not name.startswith(MEDIA)))

    def of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in batch.items() if k in self} | self.cache


def media(batch: Mapping[str, Any]) -> list[str]:
    """The names of what is no text."""
    return [name for name in batch if name.startswith(MEDIA)]


def refuse_media(batch: Mapping[str, Any], student: nn.Module) -> None:
    """What the student does not take, and pictures that it would take for text: without the types of tokens, which some
    classes of transformers go by, they compute something else in silence.
    """
    names = media(batch)
    if not names:
        return
    takes, student_class = Takes(student), type(base_model(student)).__name__
    for name in names:
        if name not in takes:
            raise ValueError(f"the batch has {name}, which {student_class} does not take")
    types = [name for name in ("mm_token_type_ids", "token_type_ids") if name in takes.named]
    if kind_of(base_model(student)).causal and types and not any(name in batch for name in types):
        raise ValueError(
            f"the batch has {names[0]}, but no {types[0]}, by which {student_class} knows the tokens of a picture: its "
            "processor returns them"
        )


def refuse_parts(batch: Mapping[str, Any], teachers: Any) -> None:
    """Images, whose rows are not those of the sequences, where a teacher sees parts of a batch."""
    names = media(batch)
    if names and (teachers.routed or teachers.sharded):
        which = "a dict of teachers" if teachers.routed else "a sharded teacher"
        raise ValueError(f"{which} takes text alone, but the batch has {names[0]}: pass one whole model, or a list")
