"""The cross-entropy of a row at temperature 1, with label smoothing ε and z-loss: for both kernels of logits.

CE = log Σe^z − (1 − ε)·z_y − ε·mean z + ζ·(log Σe^z)²          ζ: z_loss_weight (PaLM, arXiv:2204.02311, §5)
∂CE/∂z = (1 + 2ζ·log Σe^z)·q₁ − (1 − ε)·1_y − ε/V               q₁ = softmax(z)
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.math import INFINITY, LOG2E, expm1, finite_or_zero, log1p


class Label(NamedTuple):
    column: Any
    """y, int64, in range or not."""
    counted: Any
    """Whether y is not ignore_index: the row has a cross-entropy, NaN if y is out of range."""
    legal: Any
    """Whether y is in [0, V)."""


class CEGradient(NamedTuple):
    """q·q₁ − other in every column but the label's, which has `label`. 0 for a row without cross-entropy."""

    q: Any
    other: Any
    label: Any


@triton.jit
def read_label(labels, i_row, ignore_index, V, CE: tl.constexpr):
    column = tl.full((), 0, tl.int64)
    legal = tl.full((), 0, tl.int1)
    counted = legal
    if labels is not None:
        column = tl.load(labels + i_row)
        legal = (column >= 0) & (column < V)
        if CE:
            counted = column != ignore_index
    return Label(column=column, counted=counted, legal=legal)


@triton.jit
def cross_entropy(label, z_y, shifted, top, rest, weights, V):
    """Of a row with maximum `top` and Σe^{z − top} = 1 + `rest`; shifted: Σ (z − z_y), with 0 for an infinite z_y."""
    log_total = log1p(rest)
    ce = top - z_y
    if weights.label_smoothing != 0:
        ce = tl.where(weights.label_smoothing == 1, 0.0, (1.0 - weights.label_smoothing) * ce)
        ce += weights.label_smoothing * (top - finite_or_zero(z_y) - shifted / V)
    ce += log_total
    if weights.z_loss_weight != 0:
        log_sum = top + log_total
        ce += weights.z_loss_weight * log_sum * log_sum
    ce = tl.where(rest == -1, INFINITY, ce)  # all logits are −∞
    return tl.where(label.counted, tl.where(label.legal, ce, float("nan")), 0.0)


@triton.jit
def cross_entropy_gradient(a, z_y, top, rest, weights, V):
    """a: the weight of the row's cross-entropy in the loss, 0 for none. A row of nothing but −∞ has gradient 0."""
    a = tl.where(rest == -1, 0.0, a)
    z_loss = tl.where(weights.z_loss_weight == 0, 0.0, 2.0 * weights.z_loss_weight * (top + log1p(rest)))
    x = z_y - finite_or_zero(top)
    q_y = tl.exp2(x * LOG2E) / (1.0 + rest)
    less_one = (expm1(x) - rest) / (1.0 + rest)  # q_y − 1, of which a sure label leaves little
    other = weights.label_smoothing / V
    label = less_one + z_loss * q_y + weights.label_smoothing - other
    return CEGradient(
        q=tl.where(a == 0, 0.0, a * (1.0 + z_loss)),
        other=a * other,
        label=tl.where(a == 0, 0.0, a * label),
    )


@triton.jit
def add_cross_entropy(b_g, b_q, o, o_label, ce):
    """b_g and the gradient of the cross-entropy in a block, where b_q is q·q₁."""
    return b_g + tl.where(o == o_label, ce.label, b_q - ce.other)


@triton.jit
def scaled(a, x):
    """a·x, and 0 where a is, whatever x holds."""
    return tl.where(a == 0, 0.0, a * x)
