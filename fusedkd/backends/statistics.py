"""What rows of logits say of themselves beside the loss, for logging and for gates: entropies, the label's
log-probability, total variation. Here by PyTorch, on some rows at a time: no tensor of the size of the logits is kept.
`csrc/cpu/statistics_rows.h` and :mod:`fusedkd.backends.triton.statistics` have them in two passes.
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

TILE, TILE_OF_GPU = 1 << 17, 1 << 24
"""Logits of a side at a time: some six tensors of this size exist, which on a CPU its cache should hold."""
LOWEST = -1e4
"""For log-probabilities of −inf: 0 times it is 0."""


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
    """The operator of :mod:`fusedkd.backends.schema`, where C++ does not answer it."""
    rows, dtype = student.shape[0] * student.shape[1], accumulation_dtype(student.dtype)
    found = student.new_zeros((len(STATISTICS), rows), dtype=dtype)
    step = max(1, (TILE_OF_GPU if student.is_cuda else TILE) // student.shape[2])
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        of_rows, selected = of_part(options, part), row_weights[part] != 0
        column = has = None
        if labels is not None:
            has = selected & (labels[part] != ignore_index) & (labels[part] >= 0) & (labels[part] < columns)
            column = torch.where(has, labels[part], 0)
        probabilities = []
        for i, side in enumerate((student, teacher) if of_teacher else (student,)):
            log = _log_softmax(rows_of(side, part)[:, :columns], of_rows, transform, SIDES[i], dtype)
            if column is not None and has is not None:
                found[2 + i, part] = torch.where(has, log.gather(1, column.unsqueeze(1)).squeeze(1), 0)
            p = log.clamp_(min=LOWEST).exp()
            found[i, part] = torch.where(selected, -torch.einsum("rc,rc->r", p, log), 0)
            probabilities.append(p)
        if of_teacher:
            q, p = probabilities
            found[4, part] = torch.where(selected, q.sub_(p).abs_().sum(1) / 2, 0)
    return found


def _log_softmax(
    x: Tensor, options: Tensor, transform: bool, side: tuple[Option, Option, Option], dtype: torch.dtype
) -> Tensor:
    """Of some rows of one side, ``(R, C)``, at their temperature; −inf stays −inf."""
    temperature, softcap, scale = (options[..., name].unsqueeze(-1).to(dtype) for name in side)
    x = x.to(dtype)
    if transform:
        x = cap_and_scale(x, softcap, scale)
    return torch.log_softmax(x / temperature, 1)
