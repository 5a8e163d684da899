"""Divergences that have no kernel, only :meth:`fusedkd.Divergence.definition`: run by autograd on some rows at a time.
So are those whose kernel is not for a teacher known at few columns (:mod:`fusedkd.backends.outcomes`).

The rules, the cross-entropy and the gradient's coefficients are those of :mod:`fusedkd.backends.eager`, whose memory
this bounds. Everything is float64: a formula that was not written for cancellation still has digits to lose.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedkd.backends import eager, outcomes
from fusedkd.backends.call import of_part, rows_of
from fusedkd.backends.composed import in_turn, whole_loss
from fusedkd.backends.eager import EagerCall
from fusedkd.backends.layout import FINITE_GRADIENT, FIRST_DEFINED, STATS, Option
from fusedkd.backends.schema import losses_and_stats
from fusedkd.backends.vocabulary_map import Projected
from fusedkd.checks import outside_graphs
from fusedkd.reference.softmax import log_softmax

ops = torch.ops.fusedkd

TILE = 1 << 22
"""Logits of a side at a time: some ten float64 tensors of this size exist."""
LOWEST = -1e30
"""For log-probabilities of −inf."""

AUTOGRAD = tuple(getattr(torch._C.DispatchKey, f"Autograd{name}") for name in ("CPU", "CUDA", "Other"))

TAILS = (None, "renormalize", "both_renormalized", "bucket", "ignore")
"""What becomes of the columns off a list; None: there is no list. A divergence has a number for each of them."""

_numbers = itertools.count(FIRST_DEFINED, len(TAILS))
_defined: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@outside_graphs
def number(divergence: Any, tail: str | None = None) -> int:
    """The ``kernel_id`` of a divergence, or of a teacher's `Projected`, for as long as it is alive. (An operator takes
    numbers, no Python object.)
    """
    known = divergence.__dict__.get("_kernel_id")
    if known is None or _defined.get(known) is not divergence:  # a copy has the number of another
        known = next(_numbers)
        object.__setattr__(divergence, "_kernel_id", known)
        _defined[known] = divergence
    return int(known) + TAILS.index(tail)


def numbered(kernel_id: int) -> tuple[Any, str | None]:
    """The divergence of this number, and the tail."""
    tail = (kernel_id - FIRST_DEFINED) % len(TAILS)
    return _defined[kernel_id - tail], TAILS[tail]


@outside_graphs
def infinite_off_the_list(divergence: Any) -> bool:
    """Whether D is infinite where the student alone has something; False of parameters that are tensors."""
    if any([isinstance(value, Tensor) for value in vars(divergence).values()]):
        return False
    log_p = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64, device="cpu")
    _, _, infinite = _derived(divergence, log_p, torch.full_like(log_p, 0.5).log(), None)
    return bool(infinite)


def kd_forward(*, gradient: Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor]:
    family, _ = numbered(inputs["kernel_id"])
    if isinstance(family, Projected):
        return family.kd_forward(inputs, gradient)
    row_losses, stats = losses_and_stats(inputs["student"], 2, STATS)
    to = None if gradient is None else gradient.view(-1, gradient.shape[-1])
    one = row_losses.new_ones(())
    for part, call in _tiles(inputs):
        value, slope = divergence(call)
        row_losses[:, part] = call.row_losses(value).to(row_losses.dtype)
        if to is not None:
            to[part] = call.gradient(one, slope).flatten(0, 1)
    return row_losses, stats.zero_()


def kd_backward(*, upstream: Tensor, stats: Tensor, gradient: Tensor, skip_if_one: bool, **inputs: Any) -> None:
    if eager.skipped(upstream, skip_if_one):
        return
    family, _ = numbered(inputs["kernel_id"])
    if isinstance(family, Projected):
        return family.kd_backward(inputs, upstream, stats, gradient)
    to = gradient.view(-1, gradient.shape[-1])
    for part, call in _tiles(inputs):
        to[part] = call.gradient(upstream[part] if upstream.dim() else upstream, divergence(call)[1]).flatten(0, 1)


kd_loss = whole_loss(ops.kd_row_weights, in_turn(kd_forward, ops.kd_terms))


def _tiles(inputs: dict[str, Any]) -> Iterator[tuple[slice, EagerCall]]:
    """(rows, what is given of them), TILE logits at a time."""
    student, teacher, labels = inputs["student"], inputs["teacher"], inputs["labels"]
    rows = student.shape[0] * student.shape[1]
    step = max(1, TILE // max(student.shape[2], teacher.shape[2]))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        of_rows = {
            "student": rows_of(student, part).unsqueeze(0),
            "teacher": rows_of(teacher, part).unsqueeze(0),
            "ids": None if inputs["ids"] is None else inputs["ids"][part],
            "labels": None if labels is None else labels[part],
            "row_weights": inputs["row_weights"][part],
            "options": of_part(inputs["options"], part),
        }
        yield part, _Tile(**{**inputs, **of_rows})


class _Tile(EagerCall):
    """Some rows, whose logits are made once."""

    def logits(self) -> tuple[Tensor, Tensor]:
        found = self.__dict__.get("made")
        if found is None:
            found = self.__dict__["made"] = super().logits()
        return found


def divergence(call: EagerCall) -> tuple[Tensor, Tensor]:
    """D and ∂D/∂z per row."""
    family, tail = numbered(call.kernel_id)
    first = Option.COEFFICIENTS + (tail is not None)
    family = family.having([call.option(first + i) for i in range(len(family.coefficients()))])
    return _with_logits(call, family) if tail is None else _with_list(call, family, tail)


def _with_logits(call: EagerCall, family: Any) -> tuple[Tensor, Tensor]:
    z, v = call.logits()
    if family.same_columns:
        z = z[:, : v.shape[1]]
    selected = (call.row_weights != 0).unsqueeze(-1)
    z, v = torch.where(selected, z, 0), torch.where(selected, v, 0)  # what is in other rows must not show
    t_s, t_t = call.option(Option.TEMPERATURE), call.option(Option.TEACHER_TEMPERATURE)
    labels = call.some_labels() if family.needs_labels else call.labels
    if labels is not None:
        labels = torch.where((labels >= 0) & (labels < z.shape[1]) & selected.squeeze(-1), labels, 0)
    log_q = log_softmax(z / t_s)
    D, w, infinite = _derived(family, family.teacher_logprobs(v, t_t), log_q, labels)
    slope = w - log_q.exp() * w.sum(-1, keepdim=True)
    dead = infinite | (z == -torch.inf).all(-1)
    return torch.where(dead, torch.inf, D), torch.where(dead.unsqueeze(-1), 0, slope / t_s)


def _with_list(call: EagerCall, family: Any, tail: str) -> tuple[Tensor, Tensor]:
    assert call.ids is not None
    t_s, t_t = call.option(Option.TEMPERATURE), call.option(Option.TEACHER_TEMPERATURE)
    illegal = call.illegal()
    ids = torch.where(illegal.unsqueeze(-1), -1, call.ids)
    known = call.teacher.flatten(0, 1)
    rows = outcomes.of(tail, ids, known, call.logits()[0] / t_s, call.option(Option.COEFFICIENTS) / t_t)
    D, w, infinite = _derived(family, rows.log_p, rows.log_q, None)
    masked = (rows.log_q == -torch.inf).all(-1) & (rows.log_off == -torch.inf).squeeze(-1)
    dead = illegal | masked | (infinite if family.kernel_id not in FINITE_GRADIENT else False)
    slope = rows.chained(w / t_s).masked_fill_(dead.unsqueeze(-1), 0)
    return torch.where(illegal, torch.nan, torch.where(infinite | masked, torch.inf, D)), slope


def _derived(family: Any, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """D, ∂D/∂log q and whether D is infinite, of each row. A log q of −inf has no derivative, unless it is finite."""

    def lowered(x: Tensor, lowest: float) -> Tensor:
        return torch.where(x == -torch.inf, lowest, x)

    def value(lowest: float, log_q: Tensor) -> Tensor:
        found = family.definition(lowered(log_p, lowest), log_q, labels)
        if not isinstance(found, Tensor) or found.shape != log_q.shape[:1]:
            raise ValueError(
                f"the definition of {type(family).__name__} must return one value per row, shape "
                f"{tuple(log_q.shape[:1])}, not "
                f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
            )
        return found.double()

    with torch.enable_grad(), _autograd():
        leaf = lowered(log_q, LOWEST).detach().requires_grad_()
        D = value(LOWEST, leaf)
        (w,) = torch.autograd.grad(D.sum(), leaf, allow_unused=True, materialize_grads=True)
    D = D.detach()
    with torch.no_grad():
        infinite = D.isposinf()
        masked = any([bool((x == -torch.inf).any()) for x in (log_p, log_q)]) if log_q.is_cpu else True  # no waiting
        if masked and not family.bounded:
            infinite |= value(2 * LOWEST, lowered(log_q, 2 * LOWEST)) > D
        finite = family.kernel_id in FINITE_GRADIENT
        return D, w if finite else torch.where(log_q == -torch.inf, 0, w), infinite


def _autograd() -> Any:
    """A compiled graph calls operators below autograd, which is needed here."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD:
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(included, excluded)
