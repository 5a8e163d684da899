"""The losses between attention maps, from queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends import defined
from fusedkd.backends.call import own_rows, pack
from fusedkd.backends.layout import OPTIONS, Option
from fusedkd.checks import Real
from fusedkd.divergences import Divergence, DivergenceName, LogitMSE, resolve
from fusedkd.losses.common import is_one, refuse_double_backward, save_for_backward
from fusedkd.losses.names import by_name
from fusedkd.losses.options import Reduction

ops = torch.ops.fusedkd


@by_name
def attention_kl_loss(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    relation_heads: int | None = None,
    student_scale: Real | None = None,
    teacher_scale: Real | None = None,
    divergence: DivergenceName | Divergence = "forward_kl",
    padded_queries: bool = False,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
) -> Tensor:
    """Mean over heads and queries of D(softmax(teacher_scale·Q_t·K_tᵀ), softmax(student_scale·Q_s·K_sᵀ)), the attention
    maps of a layer, of which only some rows exist at a time (:mod:`fusedkd.backends.attention_loop`).

    MiniLM (arXiv:2002.10957, §3): the maps of the last layer from (Q, K), and as value relation from (V, V). MiniLMv2
    (arXiv:2012.15828, §3): (Q, Q), (K, K) and (V, V) with `relation_heads`. MobileBERT (arXiv:2004.02984, §3.3): each
    layer's maps, head by head.

    Args:
        student_q, student_k: ``(B, heads, L, d_s)``, float16, bfloat16, float32 or float64, both of the same shape and
            type; last dimension contiguous. Where both are the same tensor its gradient is the sum of the two.
        teacher_q, teacher_k: ``(B, heads, L, d_t)``, the same of the teacher, which gets no gradient.
        mask: ``(B, L)``, bool or integer: non-zero selects, of keys and queries. Keys of padding are not seen, its
            queries have no loss, and neither is read.
        causal: a query sees no key after itself.
        relation_heads: divide the heads · d columns of each side anew into so many heads, so that the sides may differ
            in heads and in d.
        student_scale, teacher_scale: of the scores; a number or a 0-d tensor, 1/√d by default.
        divergence: as of :func:`kd_loss`; not ``dkd``, for queries have no labels.
        padded_queries: the queries of padding have a loss too, as in code that masks keys alone.
        reduction: ``"mean"`` over heads and selected queries, ``"sum"``, or ``"none"``: ``(B, heads, L)``.
        normalizer: replaces the count of selected queries under ``"mean"``: a number or a 0-d tensor.

    Returns:
        float32 (float64 for float64 input): a scalar, or ``(B, heads, L)`` under ``"none"``.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    family = check_softmax(divergence)
    sides = _checked(student_q, student_k, teacher_q, teacher_k, relation_heads)
    scales = sides.scales(student_scale, teacher_scale)
    options = _options(
        family, {Option.TEMPERATURE: 1 / scales[0], Option.TEACHER_TEMPERATURE: 1 / scales[1], Option.KD_SCALE: 1.0}
    )
    return _loss(sides, mask, causal, padded_queries, reduction, normalizer, family, options)


@by_name
def attention_mse_loss(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    relation_heads: int | None = None,
    student_scale: Real | None = None,
    teacher_scale: Real | None = None,
    padded_queries: bool = False,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
) -> Tensor:
    """Mean over heads, queries and keys of (student_scale·Q_s·K_sᵀ − teacher_scale·Q_t·K_tᵀ)², the scores of a layer
    before their softmax. Those of keys that a query does not see are 0 on both sides (TinyBERT, arXiv:1909.10351,
    §3.1).

    Over keys it is the mean of all L, of padding too, as in TinyBERT's code, which with `padded_queries` it equals.

    Args:
        student_q, student_k, teacher_q, teacher_k, mask: as of :func:`attention_kl_loss`.
        causal, relation_heads, student_scale, teacher_scale: likewise.
        padded_queries, reduction, normalizer: likewise.

    Returns, Raises:
        As :func:`attention_kl_loss`.
    """
    sides = _checked(student_q, student_k, teacher_q, teacher_k, relation_heads)
    student, teacher = sides.scales(student_scale, teacher_scale)
    options = _options(
        LogitMSE(scale=teacher / student),
        {Option.TEMPERATURE: 1.0, Option.TEACHER_TEMPERATURE: 1.0, Option.KD_SCALE: student * student},
    )
    return _loss(sides, mask, causal, padded_queries, reduction, normalizer, LogitMSE(), options)


def check_softmax(divergence: DivergenceName | Divergence) -> Divergence:
    """A divergence between rows of an attention map."""
    family = resolve(divergence)
    if family.needs_labels:
        raise ValueError(f"divergence must not be {family.name}: it needs labels, and queries have none")
    if family.temperature_power == 0:
        raise ValueError(f"divergence must not be {family.name}: attention_mse_loss compares scores without a softmax")
    if own_rows(family.coefficients()) is not None:
        raise ValueError(f"divergence must have parameters that all rows of a map share, but {family.name} has its own")
    return family


class _Sides(NamedTuple):
    """Queries and keys ``(B, heads, L, d)``; keys are None where they are the queries."""

    student_q: Tensor
    student_k: Tensor | None
    teacher_q: Tensor
    teacher_k: Tensor | None

    def scales(self, student: Real | None, teacher: Real | None) -> tuple[Real, Real]:
        """Those given, or 1/√d."""
        for name, value in (("student_scale", student), ("teacher_scale", teacher)):
            if value is not None:
                check.real(name, value, open_low=True)
        given = ((student, self.student_q), (teacher, self.teacher_q))
        found = [q.shape[-1] ** -0.5 if scale is None else check.exact(scale) for scale, q in given]
        return found[0], found[1]


def _checked(
    student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, relation_heads: int | None
) -> _Sides:
    """Both sides, with as many heads as they are compared by."""
    given = {"student_q": student_q, "student_k": student_k, "teacher_q": teacher_q, "teacher_k": teacher_k}
    for name, x in given.items():
        check.float_rows(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have the shape (B, heads, L, d), not {tuple(x.shape)}")
    for side, q, k in (("student", student_q, student_k), ("teacher", teacher_q, teacher_k)):
        if k.shape != q.shape:
            repeat = ": repeat the heads of grouped keys first" if k.shape[1] < q.shape[1] else ""
            raise ValueError(f"{side}_k must have the shape of {side}_q {tuple(q.shape)}, not {tuple(k.shape)}{repeat}")
        if k.dtype != q.dtype:
            raise TypeError(f"{side}_k must be {q.dtype} like {side}_q, not {k.dtype}")
        for name, x in ((f"{side}_q", q), (f"{side}_k", k)):
            if x.device != student_q.device:
                raise ValueError(f"{name} must be on the device of student_q {student_q.device}, not on {x.device}")
    ours, theirs = student_q.shape, teacher_q.shape
    if (ours[0], ours[2]) != (theirs[0], theirs[2]):
        raise ValueError(
            f"teacher_q must have the batch size and length of student_q {(ours[0], ours[2])}, not "
            f"{(theirs[0], theirs[2])}"
        )
    needs_gradient = student_q.requires_grad or student_k.requires_grad
    check.frozen("teacher_q", teacher_q, needs_gradient, never=True)
    if teacher_k is not teacher_q:
        check.frozen("teacher_k", teacher_k, needs_gradient, never=True)
    if relation_heads is None:
        if ours[1] != theirs[1]:
            raise ValueError(
                f"teacher_q must have the {ours[1]} heads of student_q, not {theirs[1]}: relation_heads divides both "
                "sides into the same number"
            )
    else:
        check.count("relation_heads", relation_heads)
        for side, q in (("student", student_q), ("teacher", teacher_q)):
            columns = q.shape[1] * q.shape[3]
            if columns % relation_heads:
                raise ValueError(
                    f"relation_heads must divide the {q.shape[1]} · {q.shape[3]} = {columns} columns of the {side}, "
                    f"but is {relation_heads}"
                )
    cast = check.autocast_dtype(student_q.device)

    def seen(x: Tensor) -> Tensor:
        x = x if cast is None or x.dtype == torch.float64 else x.to(cast)
        return x if relation_heads is None else _regrouped(x, relation_heads)

    return _Sides(
        seen(student_q),
        None if student_k is student_q else seen(student_k),
        seen(teacher_q).detach(),
        None if teacher_k is teacher_q else seen(teacher_k).detach(),
    )


def _regrouped(x: Tensor, heads: int) -> Tensor:
    """``(B, h, L, d)`` with its h·d columns in so many heads: a view of what was a projection ``(B, L, h·d)``."""
    return x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)


def _options(family: Divergence, values: dict[Option, Real]) -> list[Real]:
    packed: list[Real] = [0.0] * OPTIONS
    values |= {Option.KD_WEIGHT: 1.0, Option.SCALE: 1.0, Option.TEACHER_SCALE: 1.0}
    for option, value in values.items():
        packed[option.value] = value
    coefficients = family.coefficients()
    packed[Option.COEFFICIENTS : Option.COEFFICIENTS + len(coefficients)] = coefficients
    return packed


def selected(mask: Tensor | None, like: Tensor, padded_queries: bool) -> tuple[Tensor | None, Tensor | None]:
    """The queries that have a loss and the keys that are seen, ``(B, L)`` bool, None for all."""
    if mask is None:
        return None, None
    mask = check.plain("mask", mask)
    shape = like.shape[0], like.shape[2]
    if mask.shape != shape:
        raise ValueError(f"mask must have the shape (B, L) = {tuple(shape)}, not {tuple(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"mask must be bool or integer, non-zero for tokens and 0 for padding, not {mask.dtype}: neither "
            "weights nor what is added to scores"
        )
    if mask.device != like.device:
        raise ValueError(f"mask must be on the device of student_q {like.device}, not on {mask.device}")
    keys = (mask != 0).contiguous()
    return None if padded_queries else keys.clone(), keys  # torch.compile wants no tensor twice


def _loss(
    sides: _Sides,
    mask: Tensor | None,
    causal: bool,
    padded_queries: bool,
    reduction: str,
    normalizer: Real | None,
    family: Divergence,
    options: list[Real],
) -> Tensor:
    check.flag("causal", causal)
    check.flag("padded_queries", padded_queries)
    check.reduction(reduction, normalizer=normalizer)
    q = sides.student_q
    rows, keys = selected(mask, q, padded_queries)
    all_count = rows is None and family.temperature_power == 0
    if keys is not None and rows is None:  # a query that sees no key has no softmax, and no squared error either
        rows = keys.cumsum(1) > 0 if causal else keys.any(1, keepdim=True).expand_as(keys).contiguous()
    per_row = reduction == "none"
    plan = Plan(
        per_row=per_row,
        kernel_id=defined.number(family) if family.kernel_id is None else int(family.kernel_id),
        family=family,
        causal=bool(causal),
        wanted=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, sides.student_k)],
        gradient_in_forward=not per_row
        and (torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is None),
    )
    count: Any = 1.0
    if reduction == "mean":
        count = q.shape[0] * q.shape[2] if rows is None or all_count else rows.sum()
        count = (count if normalizer is None else check.exact(normalizer)) * q.shape[1]
    normalizers = pack([count, 1.0], q.device)
    normalizers = torch.where(normalizers > 0, normalizers, 1.0)
    return AttentionLossFunction.apply(*sides, rows, keys, pack(options, q.device), normalizers, plan)  # type: ignore[no-any-return]


class Plan(NamedTuple):
    """What is decided on the host before the operator starts."""

    per_row: bool
    kernel_id: int
    family: Divergence
    """Alive until backward: a divergence without a kernel is known by its number only."""
    causal: bool
    wanted: list[bool]
    """The gradients of the student's queries and keys."""
    gradient_in_forward: bool

    def run(self, inputs: tuple[Tensor | None, ...], upstream: Tensor | None, wanted: list[bool]) -> tuple[Tensor, ...]:
        """The operator: row losses, and the gradients."""
        names = "student_q", "student_k", "teacher_q", "teacher_k", "rows", "keys", "options", "normalizers"
        given = dict(zip(names, inputs, strict=True))
        return ops.attention(  # type: ignore[no-any-return]
            **given, upstream=upstream, kernel_id=self.kernel_id, causal=self.causal, wanted=wanted
        )


class AttentionLossFunction(torch.autograd.Function):
    """A loss between attention maps: a scalar, or per row.

    The forward call computes the gradients, in float32 and for upstream 1; the first backward scales, rounds and hands
    them over. Where there are none it computes them: per row, under hooks of saved tensors, a second time. A compiled
    graph keeps them as saved tensors, for it plans its own memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_q: Tensor,
        student_k: Tensor | None,
        teacher_q: Tensor,
        teacher_k: Tensor | None,
        rows: Tensor | None,
        keys: Tensor | None,
        options: Tensor,
        normalizers: Tensor,
        plan: Plan,
    ) -> Tensor:
        inputs = student_q, student_k, teacher_q, teacher_k, rows, keys, options, normalizers
        row_losses, *gradients = plan.run(inputs, None, plan.wanted if plan.gradient_in_forward else [False, False])
        ctx.plan, ctx.dtype, ctx.gradients = plan, student_q.dtype, None
        if plan.gradient_in_forward and torch.compiler.is_compiling():
            save_for_backward(ctx, *gradients)
        else:
            ctx.gradients = gradients if plan.gradient_in_forward else None
            save_for_backward(ctx, *inputs)
        if plan.per_row:
            return row_losses
        return row_losses.sum(dtype=torch.float64).div(normalizers[0]).to(row_losses.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        plan = ctx.plan
        gradients, ctx.gradients = ctx.gradients, None
        if plan.gradient_in_forward and torch.compiler.is_compiling():
            gradients = [gradient * upstream for gradient in ctx.saved_tensors]
        else:
            if gradients is None:
                per_row = upstream.contiguous() if plan.per_row else None
                _, *gradients = plan.run(ctx.saved_tensors, per_row, plan.wanted)
            if not plan.per_row and not is_one(upstream):
                gradients = [gradient.mul_(upstream) for gradient in gradients]
        found = [g.to(ctx.dtype) if want else None for g, want in zip(gradients, plan.wanted, strict=True)]
        return *found, *(None,) * 7
