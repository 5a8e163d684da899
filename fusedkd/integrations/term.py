"""What a term of a distilling Trainer's loss is, and what it is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fusedkd import checks as check
from fusedkd.integrations.layer_pairs import Pairs
from fusedkd.integrations.states import Recorder, States

Rows: TypeAlias = Literal["kd", "attended", "sequences", "positions"]
"""Over which a term is a mean: those of the KD term, the tokens that are no padding, the sequences that have one, all
positions."""


class Given(NamedTuple):
    """What a term is computed from, of one batch ``(B, L)``."""

    student: States
    teacher: States
    attended: Tensor
    """The tokens that are no padding, ``(B, L)``."""
    pairs: Pairs
    """The layers that are compared."""
    projections: Sequence[nn.Linear]
    """For each pair, or one for all; empty without."""
    normalizer: Tensor | None
    """Of the rows, ``()``; None: the loss is per row."""
    causal: bool
    linear: Any = None
    """`linear_kd_loss` of the two models, with further options."""

    @property
    def reduced(self) -> dict[str, Any]:
        """Options of a loss."""
        return {"reduction": "none"} if self.normalizer is None else {"normalizer": self.normalizer}

    @property
    def linears(self) -> list[nn.Linear]:
        """For each pair, or none."""
        one_for_all = len(self.projections) == 1
        return [*self.projections] * (len(self.pairs) if one_for_all else 1)


@dataclass(frozen=True)
class Term:
    """A summand of the loss.

    Args:
        weight: its factor, not negative. 0: the term is neither computed nor logged.
        name: in the logs, `eval_…` in evaluations, and of its projections in checkpoints.
    """

    weight: float = field(default=1.0, kw_only=True)
    name: str = field(default="term", kw_only=True)
    of_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check.real("weight", self.weight)
        if not self.name.isidentifier():
            raise ValueError(f"name must be letters, digits and underscores, not {self.name!r}")

    @property
    def rows(self) -> Rows:
        return "attended"

    def pairs(self, student: Recorder, teacher: Recorder, draw: torch.Generator) -> Pairs:
        """The layers that are compared; asks the recorders for what it needs."""
        return ()

    def widths(self, pairs: Pairs, student: Recorder, teacher: Recorder) -> list[tuple[int, int]]:
        """Of each projection that is trained: columns of the student and of the teacher."""
        return []

    def loss(self, given: Given) -> Tensor:
        """Times the weight: a scalar, or per row."""
        raise NotImplementedError
