"""The loss from hidden states and heads: its cases, their inputs and float64 truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import CACHE_BYTES, ROWS_AT_A_TIME, Case
from fusedkd.reference import softmax


class Head(NamedTuple):
    """Hidden states ``(N, H)`` and the weight ``(V, H)`` that makes logits of them."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class LinearCase(Case):
    """``rows`` tokens, a vocabulary of ``columns``; H_s and H_t."""

    hidden: int = 0
    teacher_hidden: int = 0
    tile: int = 0  # rows per tile, of fusedkd alone; 0: the default

    @property
    def gradient_bytes(self) -> int:
        size = (self.rows + self.columns) * self.hidden * getattr(torch, self.dtype).itemsize
        return size if self.backward else 0

    @property
    def bytes_moved(self) -> None:
        """What bounds it is arithmetic."""

    @property
    def operations(self) -> int:
        """Of the matrix products: 6·N·V·H_s + 2·N·V·H_t, a third of the first forward."""
        student = (3 if self.backward else 1) * self.hidden
        return 2 * self.rows * self.columns * (student + (self.teacher_hidden if self.kd else 0))

    @property
    def label(self) -> str:
        shape = f"{self.rows}×({self.hidden}, {self.teacher_hidden})×{self.columns}"
        parts = super().label.replace(f"{self.rows}×{self.columns}", shape)
        return f"{parts}, {self.tile} rows per tile" if self.tile else parts

    def __str__(self) -> str:
        parts = super().__str__().replace(f"{self.rows}x", f"{self.rows}x{self.hidden}+{self.teacher_hidden}x")
        return f"{parts}-tile{self.tile}" if self.tile else parts

    def inputs(self, device: str) -> list[Any]:
        """Sets of (student, teacher, labels). The student's logits are the teacher's with noise, as far as its fewer
        columns allow: a distillation under way.
        """
        return _heads(self.rows, self.columns, self.hidden, self.teacher_hidden, self.dtype, device)

    def truth(self, student: Head, teacher: Head, labels: Tensor) -> tuple[float, tuple[Tensor, Tensor]]:
        value = 0.0
        w, w_t = student.weight.detach().double(), teacher.weight.double()
        d_hidden, d_weight = torch.empty(student.hidden.shape, dtype=w.dtype, device=w.device), torch.zeros_like(w)
        for start in range(0, self.rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            x, y = student.hidden.detach()[rows].double(), labels[rows]
            z, v = x @ w.t(), teacher.hidden[rows].double() @ w_t.t()
            divergence, slope = self._divergence(z, v, y, slice(None))
            value += self.kd_scale * divergence.sum().item()
            slope *= self.kd_scale
            if self.ce:
                value += self.ce_weight * softmax.cross_entropy(z, y).sum().item()
                slope += self.ce_weight * softmax.cross_entropy_gradient(z, y)
            d_hidden[rows] = slope @ w
            d_weight.addmm_(slope.t(), x)
        scale = self.upstream / self.rows
        return value / self.rows, (d_hidden.mul_(scale), d_weight.mul_(scale))


@lru_cache(maxsize=1)  # cases of one shape follow each other
def _heads(rows: int, columns: int, hidden: int, teacher_hidden: int, dtype: str, device: str) -> list[Any]:
    random = torch.Generator(device).manual_seed(0)
    to = getattr(torch, dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=random)

    sets = []
    width = min(hidden, teacher_hidden * 9 // 10)  # what the student lacks of the teacher's hidden states
    bytes_per_set = (rows + columns) * (hidden + teacher_hidden) * to.itemsize
    for _ in range(min(ceil(4 * CACHE_BYTES / bytes_per_set), 8)):
        t, w_t = normal(rows, teacher_hidden), normal(columns, teacher_hidden) * (3 / teacher_hidden**0.5)
        x, w = normal(rows, hidden), normal(columns, hidden) * (0.5 / hidden**0.5)
        x[:, :width], w[:, :width] = t[:, :width], w_t[:, :width]
        labels = torch.randint(0, columns, (rows,), device=device, generator=random)
        student = Head(x.to(to).requires_grad_(), w.to(to).requires_grad_())
        sets.append((student, Head(t.to(to), w_t.to(to)), labels))
    return sets


# -------------------------------------------------- cases


def linear(
    rows: int,
    hidden: int,
    teacher_hidden: int,
    columns: int,
    dtype: str,
    temperature: float = 2.0,
    ce: bool = True,
    **mode: Any,
) -> LinearCase:
    shape = {"hidden": hidden, "teacher_hidden": teacher_hidden}
    return LinearCase("linear_kd_loss", rows, columns, dtype, temperature, ce, **shape, **mode)


CASES = {
    "cpu-linear": [
        linear(1024, 256, 512, 32000, "float32"),
        linear(1024, 256, 512, 32000, "bfloat16"),
        linear(1024, 256, 512, 32000, "float32", backward=False),
        linear(1024, 256, 512, 32000, "float32", ce=False),
        linear(1024, 256, 512, 32000, "float32", kd=False),
        linear(1024, 256, 512, 32000, "bfloat16", kd=False),
        *(linear(4096, 128, 256, 32000, "float32", tile=tile) for tile in (64, 128, 256, 1024, 4096)),
    ],
    "cuda-linear": [  # performance of the products bounds all of them
        linear(8192, 2048, 4096, 128256, "bfloat16"),  # Llama 3: 1B from 8B
        linear(8192, 2048, 4096, 128256, "bfloat16", ce=False),
        linear(8192, 2048, 4096, 128256, "bfloat16", temperature=1.0, ce=False),
        linear(8192, 4096, 4096, 128256, "bfloat16"),
        linear(8192, 896, 3584, 151936, "bfloat16"),  # Qwen 2.5: 0.5B from 7B
        linear(4096, 1024, 4096, 151936, "bfloat16"),
        linear(16384, 4096, 4096, 32000, "bfloat16"),  # Llama 2
        linear(4096, 2304, 3584, 262144, "bfloat16"),  # Gemma
        *(linear(16384, 2048, 4096, 128256, "bfloat16", tile=tile) for tile in (512, 1024, 2048, 4096, 8192)),
    ],
    "smoke-linear": [
        linear(6, 5, 7, 33, "float32"),
        linear(6, 5, 7, 33, "float32", backward=False),
        linear(6, 5, 7, 33, "float32", kd=False),
        linear(6, 5, 7, 33, "bfloat16", tile=4),
    ],
}
