"""The losses over several layers: their cases, inputs, float64 truth, and what one writes in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedkd
from benchmarks.cases import CACHE_BYTES, ROWS_AT_A_TIME, Case
from fusedkd.reference import layers

Loss = Callable[[Any, Any, Tensor], Tensor]
LISTED = "hidden_loss of a list"


@dataclass(frozen=True)
class LayersCase(Case):
    """``rows`` tokens of hidden size ``columns``; layers of the student and of the teacher."""

    layers: int = 1
    teacher_layers: int = 1

    @property
    def gradient_bytes(self) -> int:
        return super().gradient_bytes * self.layers

    @property
    def bytes_moved(self) -> int:
        """Each layer read once, the gradient written once."""
        side = self.rows * self.columns * getattr(torch, self.dtype).itemsize
        return (self.layers + self.teacher_layers) * side + self.gradient_bytes

    @property
    def label(self) -> str:
        return super().label.replace(f"{self.rows}×", f"({self.layers}, {self.teacher_layers})×{self.rows}×")

    def __str__(self) -> str:
        return super().__str__().replace(f"{self.rows}x", f"{self.layers}+{self.teacher_layers}x{self.rows}x")

    def inputs(self, device: str) -> list[Any]:
        """Sets of (student, teacher, the factors of the distances); both a tensor, or for LISTED a list of layers."""
        sets = _layers(self.layers, self.teacher_layers, self.rows, self.columns, self.dtype, device)
        if self.loss != LISTED:
            return sets
        return [(_leaves(student), [*teacher], factors) for student, teacher, factors in sets]

    def truth(self, student: Any, teacher: Any, factors: Tensor) -> tuple[float, Any]:
        if self.loss == LISTED:
            found = [_difference(x, y, self.upstream / self.rows) for x, y in zip(student, teacher, strict=True)]
            return sum([value for value, _ in found]), tuple([gradient for _, gradient in found])
        value, gradient = 0.0, torch.empty(student.shape, dtype=torch.float64, device=student.device)
        inside = torch.ones(factors.shape, dtype=torch.bool, device=student.device)
        for start in range(0, self.rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            x, y = student.detach()[:, rows].double(), teacher[:, rows].double()
            if self.loss == "layer_attention_loss":
                losses, gradient[:, rows], _ = layers.layer_attention(x, y, inside)
            else:
                losses = layers.pairwise_mse(x, y) * factors
                gradient[:, rows] = layers.pairwise_mse_gradient(x, y, factors)
            value += losses.sum().item()
        return value / self.rows, gradient.mul_(self.upstream / self.rows)


@lru_cache(maxsize=1)  # cases of one shape follow each other
def _layers(M: int, K: int, rows: int, columns: int, dtype: str, device: str) -> list[Any]:
    random = torch.Generator(device).manual_seed(0)
    to = getattr(torch, dtype)
    sets = []
    for _ in range(min(ceil(4 * CACHE_BYTES / ((M + K) * rows * columns * to.itemsize)), 8)):
        steps = torch.randn(K, rows, columns, device=device, generator=random)
        steps[1:] *= 0.1  # a residual stream
        teacher = steps.cumsum(0)
        noise = torch.randn(M, rows, columns, device=device, generator=random)
        student = teacher[torch.arange(M) * K // M] + 0.5 * noise
        factors = torch.rand(M, K, device=device, generator=random)
        sets.append((student.to(to).requires_grad_(), teacher.to(to), factors))
    return sets


def _leaves(layers: Tensor) -> tuple[Tensor, ...]:
    return tuple([layer.detach().clone().requires_grad_() for layer in layers])


def _difference(x: Tensor, y: Tensor, scale: float) -> tuple[float, Tensor]:
    """The mean squared difference, and its gradient times `scale`·rows."""
    d = x.detach().double() - y.double()
    return d.square().mean().item(), d.mul_(2 * scale / d.shape[-1])


# -------------------------------------------------- providers


def fusedkd_listed(case: Case) -> Loss:
    return lambda student, teacher, factors: fusedkd.hidden_loss(student, teacher)


def eager_listed(case: Case) -> Loss:
    def loss(student: Any, teacher: Any, factors: Tensor) -> Tensor:
        pairs = zip(student, teacher, strict=True)
        return torch.stack([F.mse_loss(x.float(), y.float()) for x, y in pairs]).sum()

    return loss


def fusedkd_attention(case: Case) -> Loss:
    return lambda student, teacher, factors: fusedkd.layer_attention_loss(student, teacher)


def eager_attention(case: Case) -> Loss:
    def loss(student: Tensor, teacher: Tensor, factors: Tensor) -> Tensor:
        student, teacher = student.float(), teacher.float()
        attention = torch.einsum("jnh,knh->jnk", student, teacher).softmax(-1)
        mixed = torch.einsum("jnk,knh->jnh", attention, teacher)
        return (student - mixed).square().mean(-1).sum(0).mean()

    return loss


def fusedkd_distances(case: Case) -> Loss:
    return lambda student, teacher, factors: (factors * fusedkd.pairwise_layer_mse(student, teacher)).sum()


def eager_distances(case: Case) -> Loss:
    """The loop of BERT-EMD's code."""

    def loss(student: Tensor, teacher: Tensor, factors: Tensor) -> Tensor:
        pairs = [F.mse_loss(s.float(), t.float()) for s in student for t in teacher]
        return (factors.flatten() * torch.stack(pairs)).sum()

    return loss


PROVIDERS = {
    "layer_attention_loss": {
        "fusedkd": fusedkd_attention,
        "eager": eager_attention,
        "torch.compile": eager_attention,
    },
    LISTED: {"fusedkd": fusedkd_listed, "eager": eager_listed, "torch.compile": eager_listed},
    "pairwise_layer_mse": {"fusedkd": fusedkd_distances, "eager": eager_distances, "torch.compile": eager_distances},
}


# -------------------------------------------------- cases


def attention(layers: int, teacher_layers: int, rows: int, columns: int, dtype: str, **mode: Any) -> LayersCase:
    shape = {"layers": layers, "teacher_layers": teacher_layers}
    return LayersCase("layer_attention_loss", rows, columns, dtype, **shape, **mode)


def distances(layers: int, teacher_layers: int, rows: int, columns: int, dtype: str, **mode: Any) -> LayersCase:
    shape = {"layers": layers, "teacher_layers": teacher_layers}
    return LayersCase("pairwise_layer_mse", rows, columns, dtype, **shape, **mode)


def listed(layers: int, rows: int, columns: int, dtype: str, **mode: Any) -> LayersCase:
    return LayersCase(LISTED, rows, columns, dtype, layers=layers, teacher_layers=layers, **mode)


CASES = {
    "cpu-layers": [
        listed(12, 4096, 768, "float32"),
        listed(12, 4096, 768, "bfloat16"),
        listed(12, 4096, 768, "float32", backward=False),
        listed(12, 32, 768, "float32"),
        attention(4, 12, 2048, 768, "float32"),  # BERT-base, 4 layers of 12
        attention(4, 12, 2048, 768, "bfloat16"),
        attention(4, 12, 2048, 768, "float32", backward=False),
        attention(12, 24, 512, 1024, "float32"),  # BERT-large
        distances(4, 12, 2048, 768, "float32"),
        distances(4, 12, 2048, 768, "bfloat16"),
        distances(4, 12, 2048, 768, "float32", backward=False),
        distances(12, 24, 512, 1024, "float32"),
    ],
    "cuda-layers": [
        listed(12, 8192, 768, "bfloat16"),
        listed(32, 4096, 4096, "bfloat16"),
        attention(4, 12, 8192, 768, "bfloat16"),
        attention(12, 24, 8192, 1024, "bfloat16"),
        attention(8, 32, 4096, 4096, "bfloat16"),
        distances(4, 12, 8192, 768, "bfloat16"),
        distances(12, 24, 8192, 1024, "bfloat16"),
        distances(8, 32, 4096, 4096, "bfloat16"),
    ],
    "smoke-layers": [
        listed(2, 6, 20, "float32"),
        listed(2, 6, 20, "bfloat16", backward=False),
        attention(2, 3, 6, 20, "float32"),
        attention(2, 3, 6, 20, "bfloat16", backward=False),
        distances(2, 3, 6, 20, "float32"),
    ],
}
