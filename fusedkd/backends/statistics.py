"""What rows of logits say of themselves beside the loss, for logging and for gates: entropies, the label's
log-probability, total variation. By PyTorch, on some rows at a time: no tensor of the size of the logits is kept.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fusedkd.backends.call import of_part, rows_of
from fusedkd.backends.layout import Option
from fusedkd.backends.schema import accumulation_dtype
from fusedkd.reference.softmax import cap_and_scale

Statistic: TypeAlias = Literal[
    "student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob", "total_variation"
]
STATISTICS: tuple[str, ...] = get_args(Statistic)
"""Their names, in the order of the rows of what `kd_statistics` returns."""
OF_TEACHER = frozenset({"teacher_entropy", "teacher_logprob", "total_variation"})
OF_LABEL = frozenset({"student_logprob", "teacher_logprob"})

SIDES = (
    (Option.TEMPERATURE, Option.SOFTCAP, Option.SCALE),
    (Option.TEACHER_TEMPERATURE, Option.TEACHER_SOFTCAP, Option.TEACHER_SCALE),
)
"""Options of the student and of the teacher."""

TILE = 1 << 20
"""Logits of a side at a time: some six tensors of this size exist."""


def kd_statistics(
    *,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    options: Tensor,
    transform: bool,
    of_teacher: bool,
    columns: int,
    ignore_index: int,
) -> Tensor:
    """The operator of :mod:`fusedkd.backends.schema`, on any device."""
    rows, dtype = student.shape[0] * student.shape[1], accumulation_dtype(student.dtype)
    found = student.new_zeros((len(STATISTICS), rows), dtype=dtype)
    step = max(1, TILE // student.shape[2])
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        of_rows = of_part(options, part)
        selected, y = row_weights[part] != 0, None if labels is None else labels[part]
        z = _Softmax(rows_of(student, part)[:, :columns], of_rows, transform, SIDES[0], dtype)
        found[0, part] = z.entropy()
        if y is not None:
            has = selected & (y != ignore_index) & (y >= 0) & (y < z.log.shape[1])
            column = torch.where(has, y, 0).unsqueeze(1)
            found[2, part] = torch.where(has, z.log.gather(1, column).squeeze(1), 0)
        if of_teacher:
            v = _Softmax(rows_of(teacher, part), of_rows, transform, SIDES[1], dtype)
            found[1, part] = v.entropy()
            if y is not None:
                found[3, part] = torch.where(has, v.log.gather(1, column).squeeze(1), 0)
            found[4, part] = (v.log.exp() - z.log.exp()).abs_().sum(1) / 2
        for i in (0, 1, 4):
            found[i, part] = torch.where(selected, found[i, part], 0)
    return found


class _Softmax:
    """The log-probabilities of some rows of one side, ``(R, C)``, at their temperature; −inf stays −inf."""

    def __init__(
        self, x: Tensor, options: Tensor, transform: bool, side: tuple[Option, Option, Option], dtype: torch.dtype
    ) -> None:
        temperature, softcap, scale = (options[..., name].unsqueeze(-1).to(dtype) for name in side)
        x = x.to(dtype)
        if transform:
            x = cap_and_scale(x, softcap, scale)
        self.log = torch.log_softmax(x / temperature, 1)

    def entropy(self) -> Tensor:
        """−Σ p·log p: 0 for what has no probability."""
        return -torch.where(self.log == -torch.inf, 0, self.log.exp() * self.log).sum(1)
