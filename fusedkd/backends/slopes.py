"""How steep a divergence can be: a bound of |∂D/∂s| in any column,
s = z/T, from the coefficients a₀, a₁, … of its kernel and the number of columns C, whatever the logits.

Where log(q/p) or a logit itself occurs there is no such bound. It is then that of rows up to `LOG_RATIO` and `LOGIT`.
What needs a bound, float16 gradients, leaves several times as much to spare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.block import TeacherRows
from fusedkd.backends.call import pack
from fusedkd.backends.defined import numbered
from fusedkd.backends.layout import FIRST_DEFINED, OPTIONS, KernelId, Option, TopkKernelId
from fusedkd.checks import Real

LOG_RATIO = 8.0
"""Of |log q − log p|."""
LOGIT = 64.0
"""Of |z| and |v|, where they are compared themselves."""

Bound = Callable[[Sequence[Tensor], int], Tensor]


def one(a: Sequence[Tensor], columns: int) -> Tensor:
    """Of q − p, and of ½·q·(sign − Σq·sign)."""
    return torch.ones_like(a[0])


def log_ratio(a: Sequence[Tensor], columns: int) -> Tensor:
    """Of q·(x − Σqx), x = log(q/p): at most the range of x / 4. Without the other columns' share q·(1 + x)."""
    return torch.full_like(a[0], LOG_RATIO + 1)


def jeffreys(a: Sequence[Tensor], columns: int) -> Tensor:
    return a[0].abs() + a[1].abs() * LOG_RATIO


def mixture(a: Sequence[Tensor], columns: int) -> Tensor:
    """With r = 1 − a₂ and x = log(q/m): q·x ≤ KL(q‖m) ≤ −log r, and −q·x ≤ a₂·p. In the other part (q/m)·|p − q| ≤ 1/r,
    and its sum ≤ 2/r.
    """
    rest = 1 - a[2]
    log = rest.log().neg().clamp(max=LOG_RATIO)
    return a[1].abs() * (2 * log + a[2]) + torch.where(a[3] == 0, 0, 3 * a[3].abs() / rest)


def alpha_beta(a: Sequence[Tensor], columns: int) -> Tensor:
    """w = (q^s − p^α q^β)/α: either power is at most 1, and their sums at most C^(1 − s) (Hölder), while both exponents
    are positive. p^α with α < 0 is up to (q/p)^−α·q^s.
    """
    alpha, beta = a[0], a[1]
    w = alpha.abs().reciprocal().clamp(max=LOG_RATIO) * torch.exp(LOG_RATIO * torch.maximum(-alpha, -beta).clamp(min=0))
    return w * (1 + torch.exp(math.log(columns) * (1 - alpha - beta).clamp(min=0)))


def logit_mse(a: Sequence[Tensor], columns: int) -> Tensor:
    return 2 * (1 + a[0].abs()) * LOGIT / columns


def dkd(a: Sequence[Tensor], columns: int) -> Tensor:
    """a₁·(q̂ − p̂) − a₀·(q_y − p_y)·q̂, and the label's own a₀·(q_y − p_y)."""
    return a[0].abs() + a[1].abs()


def total(a: Sequence[Tensor], columns: int) -> Tensor:
    return jeffreys(a, columns) + a[6].abs()


def mixed_total(a: Sequence[Tensor], columns: int) -> Tensor:
    return total(a, columns) + mixture(a[2:], columns)


BOUNDS: dict[KernelId, Bound] = {
    KernelId.FORWARD_KL: one,
    KernelId.JEFFREYS: jeffreys,
    KernelId.MIXTURE: mixture,
    KernelId.ALPHA_BETA: alpha_beta,
    KernelId.TOTAL_VARIATION: one,
    KernelId.LOGIT_MSE: logit_mse,
    KernelId.DKD: dkd,
    KernelId.SUM: total,
    KernelId.MIXED_SUM: mixed_total,
}
SPARSE_BOUNDS: dict[TopkKernelId, Bound] = {
    TopkKernelId.RENORMALIZE: one,
    TopkKernelId.RENORMALIZE_REVERSE: log_ratio,
    TopkKernelId.BUCKET: one,
    TopkKernelId.BUCKET_REVERSE: log_ratio,
    TopkKernelId.IGNORE: one,
    TopkKernelId.IGNORE_REVERSE: log_ratio,
    TopkKernelId.SAMPLES: one,  # times the sum of the row's weights
}
DEFINED_BOUND: Bound = log_ratio
"""Of a divergence without a kernel, of which nothing is known."""


def bound_of(teacher: TeacherRows, coefficients: Sequence[Real], columns: int) -> Tensor:
    """Of one teacher's divergence with these coefficients, ``()`` float64. With numbers it is computed once."""
    kernel_id, listed, device = teacher.kernel_id, teacher.ids is not None, teacher.options.device
    if listed and kernel_id >= FIRST_DEFINED:  # as steep as with the teacher's logits
        family, _ = numbered(kernel_id)
        kernel_id = kernel_id if family.kernel_id is None else family.kernel_id
        listed, coefficients = False, coefficients[1:]  # without the temperature of the log-probabilities
    padded = [*coefficients, *[0.0] * (OPTIONS - Option.COEFFICIENTS - len(coefficients))]
    if check.tracing() or any([isinstance(a, Tensor) for a in padded]):
        slope = _bound(kernel_id, listed, pack(padded, device), columns)
    else:
        slope = pack([_number(kernel_id, listed, tuple(padded), columns)], device).view(())
    if teacher.ids is not None and kernel_id == TopkKernelId.SAMPLES:
        mass = torch.where(teacher.ids >= 0, teacher.rows.flatten(0, 1), 0).sum(1)
        slope = slope * (mass.abs().amax() if mass.numel() else 0)
    return slope


@lru_cache(maxsize=256)
def _number(kernel_id: int, listed: bool, coefficients: tuple[Any, ...], columns: int) -> float:
    return _bound(kernel_id, listed, torch.tensor(coefficients, dtype=torch.float64, device="cpu"), columns).item()


def _bound(kernel_id: int, listed: bool, coefficients: Tensor, columns: int) -> Tensor:
    bound = SPARSE_BOUNDS[TopkKernelId(kernel_id)] if listed else DEFINED_BOUND
    if not listed and kernel_id < FIRST_DEFINED:
        bound = BOUNDS[KernelId(kernel_id)]
    slope = bound(coefficients.unbind(-1), columns)
    return slope if slope.dim() == 0 else slope.amax()  # of rows with coefficients of their own
