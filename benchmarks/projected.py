"""hidden_loss with a projection: its cases, their inputs and float64 truth, and who is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedkd
from benchmarks.cases import CACHE_BYTES, ROWS_AT_A_TIME
from benchmarks.linear import Head, LinearCase
from fusedkd.reference.hidden import hidden_distance, hidden_gradient


@dataclass(frozen=True)
class ProjectedCase(LinearCase):
    """``rows`` tokens, ``hidden`` dimensions of the student and ``columns`` of the teacher."""

    normalize: str = ""

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.columns * self.hidden * (3 if self.backward else 1)

    @property
    def label(self) -> str:
        parts = [
            f"hidden_loss {self.rows}×({self.hidden} → {self.columns}) {self.dtype}",
            self.normalize,
            "" if self.backward else "forward only",
        ]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.hidden}to{self.columns}"
        parts = [self.loss, shape, self.dtype, self.normalize, "fwd+bwd" if self.backward else "fwd"]
        return "-".join(part for part in parts if part)

    def inputs(self, device: str) -> list[Any]:
        """Sets of (student with its projection, teacher, nothing)."""
        return _states(self.rows, self.hidden, self.columns, self.dtype, device)

    def truth(self, student: Head, teacher: Tensor, labels: Tensor) -> tuple[float, tuple[Tensor, Tensor]]:
        value, w = 0.0, student.weight.detach().double()
        d_hidden, d_weight = torch.empty(student.hidden.shape, dtype=w.dtype, device=w.device), torch.zeros_like(w)
        for start in range(0, self.rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            x = student.hidden.detach()[rows].double()
            compared: tuple[Any, ...] = x @ w.t(), teacher[rows].double(), "mse", self.normalize or None
            value += hidden_distance(*compared).sum().item()
            g = hidden_gradient(*compared)
            d_hidden[rows] = g @ w
            d_weight.addmm_(g.t(), x)
        return value / self.rows, (d_hidden.div_(self.rows), d_weight.div_(self.rows))


@lru_cache(maxsize=1)  # cases of one shape follow each other
def _states(rows: int, hidden: int, columns: int, dtype: str, device: str) -> list[Any]:
    random, to = torch.Generator(device).manual_seed(0), getattr(torch, dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=random)

    sets = []
    bytes_per_set = (rows * (hidden + columns) + columns * hidden) * to.itemsize
    for _ in range(min(ceil(4 * CACHE_BYTES / bytes_per_set), 8)):
        x, w = normal(rows, hidden), normal(columns, hidden) / hidden**0.5
        teacher = x @ w.t() + 0.5 * normal(rows, columns)
        student = Head(x.to(to).requires_grad_(), w.to(to).requires_grad_())
        sets.append((student, teacher.to(to), torch.empty(0)))
    return sets


# -------------------------------------------------- providers

Loss = Callable[[Head, Tensor, Tensor], Tensor]


def fused(case: ProjectedCase) -> Loss:
    normalize: Any = case.normalize or None
    return lambda student, teacher, labels: fusedkd.hidden_loss(
        student.hidden, teacher, projection=student.weight, normalize=normalize
    )


def eager(case: ProjectedCase) -> Loss:
    def normalized(x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1) if case.normalize == "l2" else x.float()

    return lambda student, teacher, labels: F.mse_loss(normalized(F.linear(*student)), normalized(teacher))


def products(case: ProjectedCase) -> Loss:
    """The matrix products of value and gradient, in the operands' type, and nothing else."""

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w, x @ w.t())
            return x.new_zeros(())

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
            x, w, y = ctx.saved_tensors
            return y @ w, y.t() @ x

    return lambda student, teacher, labels: Products.apply(*student)


# -------------------------------------------------- cases


def projected(rows: int, hidden: int, columns: int, dtype: str = "float32", **mode: Any) -> ProjectedCase:
    return ProjectedCase("projected_hidden_loss", rows, columns, dtype, hidden=hidden, **mode)


CASES = {
    "cpu-projected": [
        projected(8192, 768, 1024),
        projected(8192, 768, 1024, "bfloat16"),
        projected(8192, 768, 1024, normalize="l2"),
        projected(8192, 768, 1024, backward=False),
        projected(8192, 312, 768),  # TinyBERT's students of 4 layers
        projected(4096, 1024, 4096, "bfloat16"),
    ],
    "cuda-projected": [
        projected(8192, 768, 1024, "bfloat16"),
        projected(16384, 2048, 4096, "bfloat16"),
        projected(16384, 2048, 4096, "bfloat16", normalize="l2"),
        projected(16384, 2048, 4096, "bfloat16", backward=False),
        projected(16384, 2048, 4096),
    ],
    "smoke-projected": [
        projected(6, 5, 7),
        projected(6, 5, 7, backward=False),
        projected(6, 5, 7, "bfloat16", normalize="l2"),
    ],
}
