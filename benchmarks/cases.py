"""What is measured: the shapes, their inputs, the float64 truth, and the fewest bytes a shape can move."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from fusedkd import definitions

CACHE_BYTES = 64 << 20  # at least the last-level cache of the machines measured (L3 32 MB, L2 of an H200 60 MB)
ROWS_AT_A_TIME = 256  # of the float64 truth, so that it needs no memory of its own to speak of


@dataclass(frozen=True)
class Case:
    """One loss at one shape. ``backward``: loss and gradient (upstream 1); otherwise the loss alone, in ``no_grad``."""

    loss: str  # kd_loss or cosine_hidden_loss
    rows: int
    columns: int  # V for kd_loss, H for cosine_hidden_loss
    dtype: str = "float32"
    temperature: float = 1.0
    ce: bool = False
    backward: bool = True

    @property
    def ce_weight(self) -> float:
        return 0.5 if self.ce else 0.0

    @property
    def gradient_bytes(self) -> int:
        return self.rows * self.columns * getattr(torch, self.dtype).itemsize if self.backward else 0

    @property
    def bytes_moved(self) -> int:
        """Student and teacher read once, the gradient written once: no implementation can move less."""
        return (3 if self.backward else 2) * self.rows * self.columns * getattr(torch, self.dtype).itemsize

    def __str__(self) -> str:
        kd = f"-T{self.temperature:g}" + ("-ce" if self.ce else "") if self.loss == "kd_loss" else ""
        return f"{self.loss}-{self.rows}x{self.columns}-{self.dtype}{kd}-{'fwd+bwd' if self.backward else 'fwd'}"

    def inputs(self, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sets of (student, teacher, labels), as many as it takes for no round to find its input in the cache.

        The student is the teacher with noise, labels are drawn from the teacher: a distillation under way.
        """
        random = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        shape = (self.rows, self.columns)
        sets = []
        for _ in range(min(ceil(4 * CACHE_BYTES / (2 * self.rows * self.columns * dtype.itemsize)), 64)):
            teacher = torch.randn(shape, device=device, generator=random) * 3
            student = teacher + 0.5 * torch.randn(shape, device=device, generator=random)
            labels = torch.empty(shape, device=device).exponential_(generator=random)
            labels = (teacher - labels.log_()).argmax(-1)  # Gumbel: a draw from softmax(teacher)
            sets.append((student.to(dtype).requires_grad_(), teacher.to(dtype), labels))
        return sets

    def truth(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        """Value and gradient of the mean over rows, by the definitions in float64."""
        value, gradient = 0.0, torch.empty(student.shape, dtype=torch.float64, device=student.device)
        for start in range(0, self.rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            x, y = student.detach()[rows].double(), teacher[rows].double()
            if self.loss == "cosine_hidden_loss":
                value += definitions.cosine_distance(x, y).sum().item()
                gradient[rows] = definitions.cosine_distance_gradient(x, y)
                continue
            t, kd_weight = self.temperature, (1 - self.ce_weight) * self.temperature**2
            value += kd_weight * definitions.forward_kl(x, y, t, t).sum().item()
            gradient[rows] = kd_weight * definitions.forward_kl_gradient(x, y, t, t)
            if self.ce:
                value += self.ce_weight * definitions.cross_entropy(x, labels[rows]).sum().item()
                gradient[rows] += self.ce_weight * definitions.cross_entropy_gradient(x, labels[rows])
        return value / self.rows, gradient.div_(self.rows)


def kd(
    rows: int, columns: int, dtype: str = "float32", temperature: float = 2.0, ce: bool = True, **mode: bool
) -> Case:
    return Case("kd_loss", rows, columns, dtype, temperature, ce, **mode)


def cosine(rows: int, columns: int, dtype: str = "float32", **mode: bool) -> Case:
    return Case("cosine_hidden_loss", rows, columns, dtype, **mode)


CASES = {
    "cpu": [
        kd(512, 30522, temperature=1.0),  # BERT's vocabulary
        kd(512, 30522),
        kd(512, 30522, temperature=4.0),
        kd(512, 30522, ce=False),
        kd(512, 30522, "bfloat16"),
        kd(512, 50257),  # GPT-2's: no row but the first starts on 16 bytes
        kd(512, 30522, backward=False),
        cosine(4096, 768),  # DistilBERT: 32 sequences of 128
        cosine(4096, 768, "bfloat16"),
        cosine(8192, 1024),
        cosine(8192, 1024, backward=False),
    ],
    "cuda": [
        kd(8192, 32000, "bfloat16", temperature=1.0),
        kd(8192, 32000, "bfloat16"),
        kd(8192, 32000, "bfloat16", temperature=4.0),
        kd(8192, 32000, "bfloat16", ce=False),
        kd(8192, 32000),
        kd(8192, 50257, "bfloat16"),  # rows off 16 bytes
        kd(8192, 128256, "bfloat16"),  # Llama 3
        kd(8192, 128256, "bfloat16", backward=False),
        kd(8192, 128256),
        kd(4096, 151936, "bfloat16"),  # Qwen
        kd(4096, 262144, "bfloat16"),  # Gemma
        kd(512, 128256, "bfloat16"),
        kd(64, 128256, "bfloat16"),  # fewer rows than multiprocessors
        cosine(8192, 768, "bfloat16"),
        cosine(8192, 4096, "bfloat16"),
        cosine(16384, 4096, "bfloat16"),
        cosine(32768, 8192, "bfloat16"),
        cosine(16384, 4096),
    ],
    "smoke": [kd(6, 33), kd(6, 33, backward=False), cosine(6, 20, "bfloat16")],  # tests the harness, in seconds
}
