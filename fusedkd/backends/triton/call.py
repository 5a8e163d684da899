"""What both KD operators are given."""

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """As in :mod:`fusedkd.backends.schema`."""

    student: Tensor
    teacher: Tensor
    ids: Tensor | None
    labels: Tensor | None
    row_weights: Tensor
    options: Tensor
    normalizers: Tensor
    ignore_index: int
    kernel_id: int
    transform: bool
    ce: bool
