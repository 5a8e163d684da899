"""The operators as tests call them: what kd_forward and kd_backward are both given is one dictionary, `Inputs`, and so
is what cosine_forward and cosine_backward are. Which of the two is meant is seen by what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedkd.backends import eager

Inputs = dict[str, Any]
"""student, teacher, ids, labels, row_weights, options, normalizers, ignore_index, kernel_id, transform, ce; of the
cosine operators student, teacher, weights, normalizer."""


def _operator(inputs: Inputs, which: str, ops: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(ops, f"kd_{which}" if "kernel_id" in inputs else f"cosine_{which}")
    return found


def forward(
    inputs: Inputs, gradient: bool = True, ops: Any = torch.ops.fusedkd
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(row losses, statistics, gradient for upstream 1 in memory of its own). ``ops``: or `eager`, the truth."""
    out = torch.full_like(inputs["student"], torch.nan) if gradient else None
    row_losses, stats = _operator(inputs, "forward", ops)(**inputs, gradient=out)
    return row_losses, stats, out


def forward_(inputs: Inputs, ops: Any = torch.ops.fusedkd) -> tuple[Tensor, Tensor]:
    """(row losses, statistics); the gradient takes the place of the student's logits."""
    found: tuple[Tensor, Tensor] = ops.kd_forward(**inputs, gradient=inputs["student"])
    return found


def backward(upstream: Tensor, inputs: Inputs, stats: Tensor, ops: Any = torch.ops.fusedkd) -> Tensor:
    """The gradient for this upstream, in memory of its own."""
    out = torch.full_like(inputs["student"], torch.nan)
    _operator(inputs, "backward", ops)(**inputs, upstream=upstream, stats=stats, gradient=out, skip_if_one=False)
    return out


def rescale_(gradient: Tensor, upstream: Tensor, inputs: Inputs, stats: Tensor, ops: Any = torch.ops.fusedkd) -> None:
    """The gradient for this upstream in the place of that for upstream 1."""
    _operator(inputs, "backward", ops)(**inputs, upstream=upstream, stats=stats, gradient=gradient, skip_if_one=True)


def truth(inputs: Inputs, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """(row losses, gradient) by the reference, in float64."""
    wide = {name: inputs[name].double() for name in ("student", "teacher")}
    row_losses, _, out = forward({**inputs, **wide}, gradient, eager)
    return row_losses, out
