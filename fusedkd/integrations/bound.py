"""Terms of a loss, bound to a student and its teacher: which layers they compare, and the projections between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fusedkd.integrations.layer_pairs import Pairs
from fusedkd.integrations.states import Recorder
from fusedkd.integrations.term import Term


class BoundTerms:
    """Terms that compare more than logits.

    Args:
        terms: of different names.
        student, teacher: the recorders of the two models, which are asked for what the terms need.
        seed: of the projections' first values, and of layers that are drawn.
        kind: of the projections: `device`, `dtype`.

    Raises:
        ValueError: where a term does not fit the models.
    """

    def __init__(self, terms: Sequence[Term], student: Recorder, teacher: Recorder, seed: int, **kind: Any):
        self.terms, self.recorders, self.seed = [*terms], (student, teacher), seed
        self.draw(0)
        self.projections = nn.ModuleDict()
        """Of each term that has some: a linear map for each pair of layers, or one for all."""
        draw = torch.Generator().manual_seed(seed)
        for term in self.terms:
            if widths := term.widths(self.pairs[term.name], *self.recorders):
                self.projections[term.name] = nn.ModuleList([_linear(*each, draw).to(**kind) for each in widths])

    def draw(self, epoch: int) -> None:
        """The layers of this epoch."""
        self.epoch = epoch
        for recorder in self.recorders:
            recorder.hidden, recorder.layers = False, frozenset()
        draw = torch.Generator().manual_seed(self.seed + epoch)
        self.pairs: dict[str, Pairs] = {term.name: term.pairs(*self.recorders, draw) for term in self.terms}

    @property
    def wanted(self) -> dict[str, Any]:
        """Further arguments of both models."""
        return {"output_hidden_states": True} if self.recorders[0].hidden else {}


def _linear(student: int, teacher: int, draw: torch.Generator) -> nn.Linear:
    """With the values of a new `torch.nn.Linear`, from a generator."""
    with torch.device("cpu"):
        linear = nn.utils.skip_init(nn.Linear, student, teacher)
    bound = student**-0.5
    for parameter in (linear.weight, linear.bias):
        nn.init.uniform_(parameter, -bound, bound, generator=draw)
    return linear
