"""What the losses over several layers are given, checked: layers, rows and buckets."""

from __future__ import annotations

import numbers
from collections.abc import Sequence, Sized
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import pack
from fusedkd.backends.layout import COUNTED
from fusedkd.checks import Real

ops = torch.ops.fusedkd

Layers = Tensor | Sequence[Tensor]
"""``(M, *, H)``, or M tensors ``(*, H)``."""


class Sides(NamedTuple):
    """Both sides, checked: as autograd is given them, one stacked tensor or a tensor per layer."""

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    stacked: tuple[bool, bool]
    wanted: tuple[bool, bool]
    """The gradients of either."""

    @classmethod
    def of(cls, student_layers: Layers, teacher_layers: Layers, teacher_gradient: bool) -> Sides:
        check.flag("teacher_gradient", teacher_gradient)
        first = _one_of("student_layers", student_layers, None)
        other = _one_of("teacher_layers", teacher_layers, first)
        if first.shape[-1] != other.shape[-1]:
            sizes = f"{first.shape[-1]} and {other.shape[-1]}"
            raise ValueError(
                f"student_layers and teacher_layers must have the same last dimension, not {sizes}: project the "
                f"student's layers first, with torch.nn.Linear({sizes.replace(' and', ',')}), or compare one layer "
                "with another by hidden_loss, whose projection does that"
            )
        stacked = isinstance(student_layers, Tensor), isinstance(teacher_layers, Tensor)
        student = (student_layers,) if isinstance(student_layers, Tensor) else tuple(student_layers)
        teacher = (teacher_layers,) if isinstance(teacher_layers, Tensor) else tuple(teacher_layers)
        needs = [torch.is_grad_enabled() and any([t.requires_grad for t in side]) for side in (student, teacher)]
        if not teacher_gradient:
            for layer in teacher:
                check.frozen("teacher layer", layer, needs[0])
        return cls(student, teacher, stacked, (needs[0], needs[1] and teacher_gradient))

    @property
    def first(self) -> Tensor:
        """A student layer ``(*, H)``."""
        return self.student[0][0] if self.stacked[0] else self.student[0]

    @property
    def counts(self) -> tuple[int, int]:
        """M and K."""
        student, teacher = (
            len(side[0] if stacked else side)
            for side, stacked in zip((self.student, self.teacher), self.stacked, strict=True)
        )
        return student, teacher

    def rows(self, mask: Tensor | None, normalizer: Real | None) -> tuple[Tensor | None, Tensor]:
        """The weights of the rows, and what sums over them are divided by, ``()`` float64."""
        return row_weights(check.row_vector("mask", mask, self.first), self.first, normalizer)


def row_weights(mask: Tensor | None, rows: Tensor, normalizer: Real | None) -> tuple[Tensor | None, Tensor]:
    """Of a mask ``(N,)`` of the rows ``(*, H)``: their weights, or None for 1, and the normaliser, `normalizer` or else
    their count, ``()`` float64.
    """
    device = rows.device
    if mask is None:
        divisor = pack([rows.shape[:-1].numel() if normalizer is None else normalizer], device)[0]
        return None, torch.where(divisor <= 0, 1, divisor)
    weights, divisors = ops.kd_row_weights(
        teacher=pack([0.0], device).expand(1, len(mask), 1),
        ids=None,
        labels=None,
        kd_mask=mask,
        normalizers=pack([COUNTED if normalizer is None else normalizer, 1.0], device),
        ignore_index=0,
        kd=True,
    )
    return weights, divisors[0]


def total(row_losses: Tensor, normalizer: Tensor) -> Tensor:
    """Their sum over the normaliser."""
    return (row_losses.sum(dtype=torch.float64) / normalizer).to(row_losses.dtype)


def _one_of(name: str, layers: Layers, like: Tensor | None) -> Tensor:
    """The first of the layers, after a look at all."""
    if isinstance(layers, Tensor):
        check.float_rows(name, layers)
        if layers.dim() < 2 or len(layers) == 0:
            raise ValueError(
                f"{name} must be (layers, *, H) with at least one layer, not of shape {tuple(layers.shape)}"
            )
        if like is not None:
            check.float_rows(f"{name}[0]", layers[0], like=like)
        return layers[0]
    if not isinstance(layers, Sequence) or len(layers) == 0:
        what = "an empty sequence" if isinstance(layers, Sequence) else type(layers).__name__
        raise TypeError(f"{name} must be a tensor (layers, *, H) or a sequence of tensors (*, H), not {what}")
    for i, layer in enumerate(layers):
        check.float_rows(f"{name}[{i}]", layer, like=layers[0] if like is None and i > 0 else like)
        if layer.dtype != layers[0].dtype or layer.shape[-1] != layers[0].shape[-1]:
            kinds = [f"{tuple(t.shape)} of {t.dtype}" for t in (layers[0], layer)]
            raise ValueError(f"{name} must have one type and size, but {name}[0] is {kinds[0]}, {name}[{i}] {kinds[1]}")
    return layers[0]


def bucket_table(buckets: Sequence[Sequence[int]] | None, counts: tuple[int, int], device: torch.device) -> Tensor:
    """The buckets as ``(M, K)`` of 0 and 1."""
    M, K = counts
    if buckets is None:
        buckets = [range(K)] * M
    if len(buckets) != M:
        raise ValueError(f"buckets must have one entry for each of the {M} student layers, not {len(buckets)}")
    flags = [0.0] * (M * K)
    for j, bucket in enumerate(buckets):
        if not isinstance(bucket, Sized):
            raise TypeError(f"buckets[{j}] must be a list of positions in the teacher layers, not {bucket!r}")
        if len(bucket) == 0:
            raise ValueError(f"buckets[{j}] must name at least one teacher layer, but it is empty")
        for k in bucket:
            if isinstance(k, bool) or not isinstance(k, numbers.Integral):
                raise TypeError(f"buckets[{j}] must hold integers, not {type(k).__name__}")
            if not 0 <= k < K:
                raise ValueError(f"buckets[{j}] must hold positions in the {K} teacher layers, 0 to {K - 1}, not {k}")
            flags[j * K + k] = 1.0
    if check.tracing():
        return torch.tensor(flags, dtype=torch.float64, device=device).view(M, K)
    return pack(flags, device).view(M, K)
