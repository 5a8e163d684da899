"""The options of a distilling Trainer's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from fusedkd import checks as check
from fusedkd.divergences import Divergences
from fusedkd.integrations.cache_store import PACKED
from fusedkd.integrations.offline import COLUMNS
from fusedkd.losses.linear_kd import checked_linear_options
from fusedkd.teachers import TAILS

TAKEN = ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels", *COLUMNS, PACKED)
"""Columns that mean something else to the trainer."""


@dataclass
class KDConfig:
    """What :class:`DistillationTrainer` minimises: kd_weight · T^k · D + ce_weight · CE.

    The options of :func:`fusedkd.linear_kd_loss`, by their names there, and:

    kd_on                       the rows of the KD term: "labels", those whose label is not −100 (so not the prompt's),
                                or "attended", all that the attention mask selects
    tail, logprobs_temperature  of an offline teacher, as for :class:`fusedkd.TeacherTopK`
    teacher_column              of a data set, which names the teacher of each example: for a dict of teachers

    Raises:
        ValueError, TypeError: naming the option, what it was and what it must be.
    """

    temperature: float = 2.0
    teacher_temperature: float | None = None
    divergence: Divergences = "forward_kl"
    kd_weight: float = 0.5
    ce_weight: float = 0.5
    scale_by_t2: bool = True
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    kd_on: Literal["labels", "attended"] = "labels"
    vocab_mismatch: Literal["error", "truncate"] = "error"
    max_tile_bytes: int | None = None
    max_rows: int | None = None
    tail: Literal["renormalize", "both_renormalized", "bucket", "ignore"] = "renormalize"
    logprobs_temperature: float = 1.0
    teacher_weights: Sequence[float] | None = None
    teacher_column: str = "teacher"

    def __post_init__(self) -> None:
        if self.kd_on not in ("labels", "attended"):
            raise ValueError(f"kd_on must be 'labels' or 'attended', not {self.kd_on!r}")
        checked_linear_options(self.options())
        weights = self.teacher_weights
        if weights is not None and not any(weights):
            raise ValueError(
                f"teacher_weights must not all be 0, but is {weights!r}: kd_weight=0 trains without teachers"
            )
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, not {self.tail!r}")
        check.real("logprobs_temperature", self.logprobs_temperature, open_low=True)
        if not isinstance(self.teacher_column, str):
            raise TypeError(f"teacher_column must be the name of a column, not {type(self.teacher_column).__name__}")
        if self.teacher_column in TAKEN:
            raise ValueError(f"teacher_column must be a column of its own, not {self.teacher_column!r}")

    def options(self) -> dict[str, Any]:
        """Those of :func:`fusedkd.linear_kd_loss`."""
        own = ("kd_on", "tail", "logprobs_temperature", "teacher_column")
        return {f.name: getattr(self, f.name) for f in fields(KDConfig) if f.name not in own}

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares student and teacher."""
        return self.kd_weight != 0
