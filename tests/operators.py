"""The operators as tests call them: what kd_forward and kd_backward are both given is one dictionary, `Inputs`, and so
is what hidden_forward and hidden_backward are. Which of the two is meant is seen by what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedkd.backends import eager
from fusedkd.backends.layout import OPTIONS, Option

Inputs = dict[str, Any]
"""student, teacher, ids, labels, row_weights, options, normalizers, ignore_index, kernel_id, transform, ce; of the
operators of hidden states student, teacher (a list), weights, normalizer, distance, normalize: one layer."""


def options_tensor(coefficients: Iterable[Any] = (), fill: float = 0.0, **values: float) -> Tensor:
    """The ``options`` of both KD operators by the names of `Option`, in lower case; the others are `fill`."""
    options = torch.full((OPTIONS,), fill, dtype=torch.float64)
    for name, value in values.items():
        options[Option[name.upper()]] = value
    for i, coefficient in enumerate(coefficients):
        options[Option.COEFFICIENTS + i] = float(coefficient)
    return options


def _operator(inputs: Inputs, which: str, ops: Any) -> Callable[..., Any]:
    if "kernel_id" in inputs:
        found: Callable[..., Any] = getattr(ops, f"kd_{which}")
        return found
    return partial(_one_layer, getattr(ops, f"hidden_{which}"))


def _one_layer(operator: Callable[..., Any], *, student: Tensor, gradient: Tensor | None, **given: Any) -> Any:
    one = torch.ones(1, dtype=torch.float64, device=student.device)
    layers = {"student": [student], "layer_weights": one, "gradient": [] if gradient is None else [gradient]}
    found = operator(**layers, **given)
    return None if found is None else [each[0] for each in found]


def forward(
    inputs: Inputs, gradient: bool = True, ops: Any = torch.ops.fusedkd
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(row losses, statistics, gradient for upstream 1 in memory of its own). ``ops``: or `eager`, the truth."""
    out = _buffer(inputs) if gradient else None
    row_losses, stats = _operator(inputs, "forward", ops)(**inputs, gradient=out)
    return row_losses, stats, out


def forward_(inputs: Inputs, ops: Any = torch.ops.fusedkd) -> tuple[Tensor, Tensor]:
    """(row losses, statistics); the gradient takes the place of the student's logits."""
    found: tuple[Tensor, Tensor] = ops.kd_forward(**inputs, gradient=inputs["student"])
    return found


def backward(upstream: Tensor, inputs: Inputs, stats: Tensor, ops: Any = torch.ops.fusedkd) -> Tensor:
    """The gradient for this upstream, in memory of its own."""
    out = _buffer(inputs)
    _operator(inputs, "backward", ops)(**inputs, upstream=upstream, stats=stats, gradient=out, skip_if_one=False)
    return out


def rescale_(gradient: Tensor, upstream: Tensor, inputs: Inputs, stats: Tensor, ops: Any = torch.ops.fusedkd) -> None:
    """The gradient for this upstream in the place of that for upstream 1."""
    _operator(inputs, "backward", ops)(**inputs, upstream=upstream, stats=stats, gradient=gradient, skip_if_one=True)


def truth(inputs: Inputs, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """(row losses, gradient) by the reference, in float64. The teacher keeps its dtype, which says how far its
    log-probabilities are rounded.
    """
    row_losses, _, out = forward({**inputs, "student": inputs["student"].double()}, gradient, eager)
    return row_losses, out


def _buffer(inputs: Inputs) -> Tensor:
    """Contiguous, as the losses make it."""
    student: Tensor = inputs["student"]
    return student.new_full(student.shape, torch.nan)
