"""A teacher of another vocabulary, whose probabilities a matrix W takes to the student's columns: some rows at a time,
and then by the kernel of any divergence.

    p' = W·softmax(v/T)        [R, V_s] float64, R rows at a time
    log p', rounded once, is the teacher that the kernel sees, at temperature 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedkd.backends.call import of_part, rows_of
from fusedkd.backends.layout import FIRST_DEFINED, STATS, Option
from fusedkd.backends.schema import accumulation_dtype, losses_and_stats
from fusedkd.reference.softmax import cap_and_scale, log_softmax

ops = torch.ops.fusedkd

TILE = 1 << 22
"""Logits of a side at a time."""


@dataclass(frozen=True, eq=False)
class Projected:
    """What the ``kernel_id`` of a projected teacher stands for (:func:`fusedkd.backends.defined.number`)."""

    weight: Tensor
    """W, ``(V_s, V_t)`` float64, sparse COO, coalesced."""
    divergence: Any
    """Of the student's columns; alive until backward."""
    kernel_id: int
    """Its own."""

    def kd_forward(self, inputs: dict[str, Any], gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        """As the operator; the statistics are those of the kernel."""
        operator = ops.defined_forward if self.kernel_id >= FIRST_DEFINED else ops.kd_forward
        row_losses, stats = losses_and_stats(inputs["student"], 2, STATS)
        to = None if gradient is None else gradient.view(-1, gradient.shape[-1])
        for part, call in self._tiles(inputs):
            row_losses[:, part], stats[part] = operator(**call, gradient=None if to is None else to[part].unsqueeze(0))
        return row_losses, stats

    def kd_backward(self, inputs: dict[str, Any], upstream: Tensor, stats: Tensor, gradient: Tensor) -> None:
        operator = ops.defined_backward if self.kernel_id >= FIRST_DEFINED else ops.kd_backward
        to = gradient.view(-1, gradient.shape[-1])
        for part, call in self._tiles(inputs):
            more = {"upstream": upstream[part] if upstream.dim() else upstream, "stats": stats[part]}
            operator(**call, **more, gradient=to[part].unsqueeze(0), skip_if_one=False)

    def _tiles(self, inputs: dict[str, Any]) -> Iterator[tuple[slice, dict[str, Any]]]:
        """(rows, what is given of them)."""
        student, labels, options = inputs["student"], inputs["labels"], inputs["options"].clone()
        for option, value in ((Option.TEACHER_TEMPERATURE, 1), (Option.TEACHER_SOFTCAP, 0), (Option.TEACHER_SCALE, 1)):
            options[..., option].fill_(value)
        rows, step = student.shape[0] * student.shape[1], max(1, TILE // max(self.weight.shape))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            given = of_part(inputs["options"], part)
            logprobs, empty = self._logprobs(rows_of(inputs["teacher"], part), given, inputs["transform"])
            of_rows = {
                "student": rows_of(student, part).unsqueeze(0),
                "teacher": logprobs.to(accumulation_dtype(student.dtype)).unsqueeze(0),
                "labels": None if labels is None else labels[part],
                "row_weights": torch.where(empty, 0, inputs["row_weights"][part]),
                "options": of_part(options, part),
                "kernel_id": self.kernel_id,
            }
            yield part, inputs | of_rows

    def _logprobs(self, rows: Tensor, options: Tensor, transform: bool) -> tuple[Tensor, Tensor]:
        """log p' of the teacher's logits ``(R, V_t)``, and which rows have nothing on the student's columns."""
        v = rows.double()
        softcap, scale, temperature = (
            options[..., option, None]
            for option in (Option.TEACHER_SOFTCAP, Option.TEACHER_SCALE, Option.TEACHER_TEMPERATURE)
        )
        if transform:
            v = cap_and_scale(v, softcap, scale)
        p = log_softmax(v / temperature).exp()
        projected = torch.sparse.mm(self.weight, p.t()).t().contiguous()
        return projected.log(), (projected == 0).all(-1)
