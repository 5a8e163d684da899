"""The losses between attention maps: their cases, their inputs and float64 truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from fusedkd.reference import attention as reference
from fusedkd.reference.divergences import forward_kl, logit_mse


class QueriesAndKeys(NamedTuple):
    """``(B, heads, L, d)`` each."""

    q: Tensor
    k: Tensor


@dataclass(frozen=True)
class AttentionCase(Case):
    """``rows`` queries, B·heads·L of them, against ``columns`` keys, L."""

    heads: int = 12
    width: int = 64  # d, of both sides
    causal: bool = False

    @property
    def batch(self) -> int:
        return self.rows // (self.heads * self.columns)

    @property
    def gradient_bytes(self) -> int:
        return 2 * self.rows * self.width * getattr(torch, self.dtype).itemsize if self.backward else 0

    @property
    def bytes_moved(self) -> None:
        """What bounds it is arithmetic."""

    @property
    def operations(self) -> int:
        """Of the matrix products, half of them where keys after a query are left out."""
        products = 4 if self.backward else 2
        return 2 * products * self.rows * self.columns * self.width // (2 if self.causal else 1)

    @property
    def label(self) -> str:
        shape = f"{self.batch}×{self.heads}×{self.columns}×{self.width}"
        mode = ["causal" if self.causal else "", "" if self.backward else "forward only"]
        return ", ".join(part for part in (f"{self.loss} {shape} {self.dtype}", *mode) if part)

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.heads}x{self.columns}x{self.width}"
        mode = ["causal" if self.causal else "", "fwd+bwd" if self.backward else "fwd"]
        return "-".join(part for part in (self.loss, shape, self.dtype, *mode) if part)

    def inputs(self, device: str) -> list[Any]:
        """One set of (student, teacher, labels that nobody reads): the maps are larger than the caches."""
        return _sides(self.batch, self.heads, self.columns, self.width, self.dtype, device)

    def truth(self, student: QueriesAndKeys, teacher: QueriesAndKeys, labels: Tensor) -> tuple[float, Any]:
        value, scale, loss = 0.0, self.width**-0.5, logit_mse if self.loss == "attention_mse_loss" else forward_kl
        seen = reference.visible(None, self.columns, self.causal)
        gradients = [torch.empty(x.shape, dtype=torch.float64, device=x.device) for x in student]
        for b in range(self.batch):
            for h in range(self.heads):
                q, k, t_q, t_k = (x.detach()[b : b + 1, h : h + 1].double() for x in (*student, *teacher))
                z, t = reference.scores(q, k, scale, seen), reference.scores(t_q, t_k, scale, seen)
                row_losses, d_scores = loss(reference.rows(z, t), torch.ones(1, dtype=torch.float64))
                value += row_losses.sum().item()
                found = reference.gradients(d_scores.view(z.shape) * (self.upstream / self.rows), q, k, scale)
                for gradient, x in zip(gradients, found, strict=True):
                    gradient[b, h] = x[0, 0]
        return value / self.rows, tuple(gradients)


@lru_cache(maxsize=1)  # cases of one shape follow each other
def _sides(batch: int, heads: int, length: int, width: int, dtype: str, device: str) -> list[Any]:
    random = torch.Generator(device).manual_seed(0)
    to = getattr(torch, dtype)

    def normal() -> Tensor:
        return torch.randn(batch, heads, length, width, device=device, generator=random)

    teacher = QueriesAndKeys(normal(), normal())
    student = QueriesAndKeys(*((x + 0.5 * normal()).to(to).requires_grad_() for x in teacher))
    return [(student, QueriesAndKeys(*(x.to(to) for x in teacher)), torch.empty(0))]


# -------------------------------------------------- cases


def attention(
    loss: str, batch: int, length: int, dtype: str = "float32", heads: int = 12, **mode: Any
) -> AttentionCase:
    return AttentionCase(f"attention_{loss}_loss", batch * heads * length, length, dtype, heads=heads, **mode)


CASES = {
    "cpu-attention": [
        *(
            attention(loss, batch, length)
            for loss in ("kl", "mse")
            for batch, length in ((8, 128), (2, 512), (1, 1024))
        ),
        attention("kl", 1, 1024, causal=True),
        *(attention(loss, 1, 1024, "bfloat16") for loss in ("kl", "mse")),
        attention("kl", 1, 1024, backward=False),
        attention("kl", 1, 2048),
        attention("kl", 1, 4096),
        attention("mse", 1, 4096),
    ],
    "cuda-attention": [
        *(attention(loss, 8, length, "bfloat16") for loss in ("kl", "mse") for length in (512, 2048, 4096)),
        attention("kl", 8, 4096, "bfloat16", causal=True),
        attention("kl", 8, 2048),
    ],
    "smoke-attention": [
        attention("kl", 2, 9, heads=3),
        attention("mse", 2, 9, heads=3, backward=False),
        attention("kl", 2, 9, heads=3, causal=True),
    ],
}
