"""What of a batch a model of a distilling Trainer is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fusedkd.integrations.heads import base_model

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


def refuse_parts(batch: Mapping[str, Any], teachers: Any) -> None:
    """Images, whose rows are not those of the sequences, where a teacher sees parts of a batch."""
    names = [name for name in batch if name.startswith(MEDIA)]
    if names and (teachers.routed or teachers.sharded):
        which = "a dict of teachers" if teachers.routed else "a sharded teacher"
        raise ValueError(f"{which} takes text alone, but the batch has {names[0]}: pass one whole model, or a list")
