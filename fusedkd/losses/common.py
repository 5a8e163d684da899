"""What the losses' ``torch.autograd.Function`` share: when the gradient is computed, and what is kept for backward.

*Gradient in forward* (bf16, float32, float64 under ``mean`` and ``sum`` in eager mode): the forward call leaves the
gradient for upstream 1. The first backward rescales it in place, which is a launch that returns at once when the
upstream is 1 and otherwise recomputes from the logits; a second backward recomputes into fresh memory. Everything else
takes the value forward and the gradient backward. Either way the gradient is rounded once.

A ``forward`` of any number of tensors has two parameters beside the context, a plan and ``*tensors``. Where a call has
as many arguments as the signature has parameters, and no input requires a gradient, a compiled graph would take the
first argument for the context (torch 2.13: ``findings/torch-compile-autograd-function-varargs.sh``).

Where saved-tensor hooks are active (checkpoint, offloading), backward computes the gradient, except with `inplace`,
whose gradient is a saved tensor. Backward reads ``ctx.saved_tensors`` once: a checkpoint raises at a second read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.block import TeacherRows, unflatten

ROUNDED_AT_ONCE = 1 << 18
"""Elements, which a cache holds."""


def gradient_in_forward(student: Tensor, per_row: bool, inplace: bool = False) -> bool:
    """float16 would lose small gradients with the normaliser folded in before the loss scale; a compiled graph plans
    its own memory. Hooks of saved tensors say where memory is short: a checkpoint would throw the gradient away, an
    offload would carry it besides both logits. Over the student's logits it takes no memory of its own.
    """
    return (
        torch.is_grad_enabled()
        and student.requires_grad
        and not per_row
        and student.dtype != torch.float16
        and not torch.compiler.is_compiling()
        and (inplace or torch._C._autograd._top_saved_tensors_default_hooks(False) is None)
    )


def distinct(tensors: Sequence[Any]) -> Sequence[Any]:
    """For the arguments of a ``torch.autograd.Function``: Dynamo refuses a tensor that is among them twice. In a
    compiled graph the second is a view of the first, so that it is no longer the same by ``is``.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Any] = []
    for x in tensors:
        again = isinstance(x, Tensor) and any([x is other for other in found])
        found.append(x.view_as(x) if again else x)
    return found


def is_one(upstream: Tensor) -> bool:
    """Whether the upstream gradient is known to be 1, for which the gradient lies there already."""
    return check.readable(upstream) and upstream.item() == 1


def save_for_backward(ctx: Any, *tensors: Any) -> None:
    """``save_for_backward`` refuses what ``torch.inference_mode`` made, as it often did the teacher's logits: of that,
    an ordinary tensor on the same memory is saved. Not in compiled graphs, which save for themselves.
    """
    if not torch.compiler.is_compiling():
        tensors = tuple([t if t is None or not t.is_inference() else _ordinary(t) for t in tensors])
    ctx.save_for_backward(*tensors)


def _ordinary(t: Tensor) -> Tensor:
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def save_teachers(ctx: Any, teachers: Sequence[TeacherRows], *tensors: Tensor | None) -> None:
    """Keeps the tensors, and the teachers, for `saved_teachers`."""
    ctx.kernel_ids = [{"kernel_id": t.kernel_id, "exchanged_kernel_id": t.exchanged_kernel_id} for t in teachers]
    fields = [field for t in teachers for field in t._replace(kernel_id=None, exchanged_kernel_id=None)]  # type: ignore
    save_for_backward(ctx, *tensors, *fields)


def saved_teachers(ctx: Any, tensors: int) -> tuple[list[TeacherRows], tuple[Any, ...]]:
    """The teachers, and the first so many of the tensors that were kept with them."""
    saved = ctx.saved_tensors
    teachers = zip(unflatten(TeacherRows, saved[tensors:]), ctx.kernel_ids, strict=True)
    return [t._replace(**kernel_ids) for t, kernel_ids in teachers], saved[:tensors]


def refuse_double_backward() -> None:
    """Autograd runs backward in grad mode for ``create_graph=True`` alone. ``once_differentiable`` would return a
    constant there, and a gradient penalty would vanish without a word.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("fusedkd's losses have no second derivative: backward was called with create_graph=True")


def rounded(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient · factor in another type: one pass, one rounding."""
    if factor is None or (gradient.dtype != dtype and is_one(factor)):
        return gradient.to(dtype)
    if torch.compiler.is_compiling() or gradient.dtype == dtype:
        return (gradient * factor).to(dtype)
    found = gradient.new_empty(gradient.shape, dtype=dtype)
    if gradient.is_cuda:
        return torch.mul(gradient, factor, out=found)
    rows = max(1, ROUNDED_AT_ONCE // max(1, gradient[:1].numel()))  # a CPU's product has memory of its own type first
    for part, to in zip(gradient.split(rows), found.split(rows), strict=True):
        to.copy_(part * factor)
    return found
