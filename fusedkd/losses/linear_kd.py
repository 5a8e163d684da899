"""The KD loss from hidden states and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fusedkd import checks as check
from fusedkd.backends import block, linear_loop
from fusedkd.backends.block import Flags, TeacherRows
from fusedkd.backends.call import as_rows, pack
from fusedkd.backends.layout import KernelId
from fusedkd.backends.linear_loop import tile_size
from fusedkd.backends.slopes import bound_of
from fusedkd.backends.statistics import OF_LABEL, Statistic
from fusedkd.divergences import Divergence
from fusedkd.losses import vocabulary
from fusedkd.losses.common import (
    distinct,
    refuse_double_backward,
    rounded,
    save_for_backward,
    save_teachers,
    saved_teachers,
)
from fusedkd.losses.kd import Teacher, Teachers
from fusedkd.losses.members import checked_options, members, refuse_statistics
from fusedkd.losses.options import (
    DEFAULTS,
    KDOptions,
    KDTerms,
    KDTermsAndStatistics,
    by_statistic,
    checked_statistics,
    logged,
    with_options,
)
from fusedkd.losses.rules import Prepared, prepare
from fusedkd.losses.teacher_gradient import exchanged, refuse_listed, wants_teacher_gradient
from fusedkd.losses.tiles import Tiles, bytes_per_row

ops = torch.ops.fusedkd


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    max_tile_bytes: int | None = None,
    tile_dtype: torch.dtype = torch.float32,
    max_rows: int | None = None,
    return_terms: Literal[False] = False,
    **options: Unpack[KDOptions],
) -> Tensor: ...


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    max_tile_bytes: int | None = None,
    tile_dtype: torch.dtype = torch.float32,
    max_rows: int | None = None,
    return_terms: Literal[True],
    **options: Unpack[KDOptions],
) -> tuple[Tensor, KDTerms]: ...


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    max_tile_bytes: int | None = None,
    tile_dtype: torch.dtype = torch.float32,
    max_rows: int | None = None,
    return_terms: Literal[True],
    statistics: Sequence[Statistic],
    **options: Unpack[KDOptions],
) -> tuple[Tensor, KDTermsAndStatistics]: ...


@with_options
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teachers,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    max_tile_bytes: int | None = None,
    tile_dtype: torch.dtype = torch.float32,
    max_rows: int | None = None,
    return_terms: bool = False,
    statistics: Sequence[Statistic] = (),
    **options: Unpack[KDOptions],
) -> Tensor | tuple[Tensor, KDTerms | KDTermsAndStatistics]:
    """The loss of :func:`kd_loss` for logits student_hidden · student_weightᵀ + student_bias, which never exist but for
    a tile of rows: 2·N·V·(3·H_s + H_t) operations, as few as value and gradient can take, and no memory that grows with
    N × V (:mod:`fusedkd.backends.linear_loop`).

    With `teacher_gradient` the teacher's gradient is made of the same logits: 4·N·V·H_t operations more.

    The tiles are float32, for 16-bit logits alone would cost 1 % of the gradient at KL 0.15, and all of it near
    convergence; each gradient is rounded once to the type of its input. Products are PyTorch's, on a GPU cuBLAS's in
    the operands' type with float32 sums. Rows that carry no term are not projected: always on a CPU, on a GPU through
    `max_rows`. Gradients of frozen inputs are not computed; with grad mode off only the logits are.

    Args:
        student_hidden: x, ``(*, H_s)``, float16, bfloat16, float32 or float64: what the student's head is given.
        student_weight: ``(V_s, H_s)``, of that type, as :attr:`torch.nn.Linear.weight`; under autocast of any.
        teacher: a :class:`~fusedkd.TeacherHead`, whose logits exist a tile at a time as well, or any teacher that
            :func:`kd_loss` takes, or a list of them.
        labels: class indices ``(*)``, int64, already shifted for causal models.
        {options}
        student_bias: ``(V_s,)``.
        max_tile_bytes: what the tiles of student and teachers may take together; rows per tile are at most 4096. None:
            on a GPU 4 GiB; on a CPU what stays near its caches, 48 MB or 128 rows, of products of our own, and 1024
            rows of PyTorch's. Fewer rows than 128, or 1024, starve the products, of which a warning tells. It changes
            results by rounding alone.
        tile_dtype: of the logits in a tile, on a GPU: float32, or the inputs' own type where that is wished for;
            float64 inputs always have float64 ones.
        max_rows: how many rows, at most, carry a term. Only a GPU needs to know: if there are more, loss and gradients
            are NaN there.
        return_terms: also return :class:`KDTerms`.
        statistics: as of :func:`kd_loss`, from the logits of the tiles.

    Returns:
        As :func:`kd_loss`. Gradients reach `student_hidden`, `student_weight` and `student_bias`, and with
        `teacher_gradient` the teacher's hidden states, head and bias, or its logits.

    Raises:
        ValueError, TypeError: before anything is computed, naming the argument, what it was and what it must be.
    """
    shard = None
    split = vocabulary.is_split(options, student_weight, student_hidden)
    teacher_gradient = wants_teacher_gradient(options, split)
    wanted_statistics = checked_statistics(statistics, return_terms, split)
    if split:
        if torch.compiler.is_compiling():
            tiling = {"max_tile_bytes": max_tile_bytes, "tile_dtype": tile_dtype, "max_rows": max_rows}
            more = {"student_bias": student_bias, "return_terms": return_terms, **tiling, **options}
            more["statistics"] = statistics
            return vocabulary.eagerly(linear_kd_loss, student_hidden, student_weight, teacher, labels, **more)
        student_hidden, student_weight, student_bias, teacher, shard = vocabulary.split_head(
            student_hidden, student_weight, student_bias, teacher, options
        )
    check.float_rows("student_hidden", student_hidden)
    check.head("student_", student_hidden, student_weight, student_bias)
    tiles = Tiles(max_tile_bytes, tile_dtype, max_rows)
    tiles.check()
    heads = student_hidden, student_weight, student_bias
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads]
    device, lead, columns = student_hidden.device, student_hidden.shape[:-1], student_weight.shape[0]
    logits = student_hidden.new_empty(()).expand(*lead, columns)  # their shape, type and device
    kd_mask = options.pop("kd_mask", None)
    asked = members(teacher, options)
    parts = [prepare(logits, member.teacher, labels, kd_mask, member.rules, shard) for member in asked]
    first = parts[0]
    refuse_statistics(statistics, asked, first)
    cast = check.autocast_dtype(device)
    dtype = student_hidden.dtype if cast is None or student_hidden.dtype == torch.float64 else cast  # as autocast does
    if not student_hidden.is_cuda:
        tile_dtype = torch.promote_types(tile_dtype, torch.float32)
    for part in parts:
        if check.readable(student_hidden):
            part.check_values(columns if shard is None else shard.columns)
        if part.rules.kd and not teacher_gradient:
            check.frozen("teacher", part.known.rows, any(x is not None and x.requires_grad for x in heads))
    given: list[TeacherRows] = []
    for part, member in zip(parts, asked, strict=True):
        same = given[member.first] if len(given) > member.first else None
        given.append(_teacher_rows(part, lead.numel(), cast, same))
    families = [part.family for part in parts]
    leaves: list[Tensor | None] = []
    if teacher_gradient:
        refuse_listed(asked)
        leaves = [leaf for part in parts for leaf in _leaves(part)]
        wanted += [leaf is not None for leaf in leaves]
        for i, part in enumerate(parts):
            if any(wanted[3 * i + 3 : 3 * i + 6]):
                given[i], family = exchanged(part, given[i])
                families.append(family)
    slopes: list[Tensor] = []
    others = [t for t in given if t.exchanged is not None]
    if (dtype == torch.float16 and any(wanted)) or torch.float16 in [t.rows.dtype for t in others]:
        calls = given + [t._replace(kernel_id=t.exchanged_kernel_id) for t in others]
        numbers = [part.known.coefficients for part in parts] + [f.coefficients() for f in families[len(parts) :]]
        whole = columns if shard is None else shard.columns
        slopes = [bound_of(call, each, whole) for call, each in zip(calls, numbers, strict=True)]
    columns = vocabulary.rows_alike(columns, shard)
    of_cache = max_tile_bytes is None and not student_hidden.is_cuda
    size = bytes_per_row(columns, dtype, tile_dtype, parts, given, wanted, read_again=of_cache)
    plan = LinearPlan(
        per_row=first.rules.per_row,
        return_terms=return_terms,
        wanted=wanted,
        families=tuple(families),
        slopes=len(slopes),
        flags=first.flags._replace(transform=any([part.flags.transform for part in parts])),
        tile=tiles.rows(size, lead.numel(), tile_size(device, dtype, tile_dtype)),
        tile_dtype=tile_dtype,
        dtype=dtype,
        max_rows=max_rows,
        statistics=wanted_statistics,
        common=first.common(student_weight.shape[0]),
    )
    flat = student_hidden.reshape(lead.numel(), student_hidden.shape[-1])
    fields = distinct([*leaves, *slopes, *[field for each in given for field in each]])
    labels_read = any([part.rules.labels_read for part in parts]) or not OF_LABEL.isdisjoint(statistics)
    read = first.labels if labels_read else None
    loss, terms, told = LinearKDLossFunction.apply(flat, student_weight, student_bias, read, plan, *fields)
    if plan.per_row:
        loss = loss.view(lead)
        terms = None if terms is None else terms.view(len(parts), 2, *lead)
    if terms is None:
        return loss
    found = by_statistic(told, statistics, lead)
    return loss, logged(terms, [member.weight for member in asked], found)


def checked_linear_options(options: Mapping[str, Any], teacher: Teacher | None = None) -> None:
    """Refuses the options that `linear_kd_loss` would refuse whatever its tensors are: see `checked_options`."""
    Tiles(options.get("max_tile_bytes"), options.get("tile_dtype", torch.float32), options.get("max_rows")).check()
    checked_options({name: value for name, value in options.items() if name in DEFAULTS}, teacher)


def _teacher_rows(part: Prepared, count: int, cast: torch.dtype | None, same: TeacherRows | None) -> TeacherRows:
    """What the operator is given of a teacher, whose hidden states and head autocast casts, as any product's. `same`:
    what it is given of it for another divergence, the same tensors, by which the operator knows it again.
    """
    _, (rows,), _ = as_rows(part.known.rows, part.known.rows)
    head, bias = [None if x is None else x.detach() for x in part.known.head or (None, None)]
    like = rows if head is None else pack([0.0], rows.device).expand(1, count, 1)  # of a head, all rows count
    unread = not part.rules.kd and part.known.ids is None
    if unread:
        rows, head, bias = rows[..., :0], None, None
    if head is not None and cast is not None and head.dtype != torch.float64:
        rows, head = rows.to(cast), head.to(cast)
    if same is not None and same.rows.shape == rows.shape:
        rows, head, bias = same.rows, same.head, same.bias
    found = part.teacher_rows(rows, head, bias, like)
    return found._replace(kernel_id=int(KernelId.FORWARD_KL)) if unread else found


def _leaves(part: Prepared) -> list[Tensor | None]:
    """The teacher's rows, head and bias, of those that get a gradient."""
    tensors = [part.known.rows, *(part.known.head or (None, None))]
    return [x if part.rules.kd and x is not None and x.requires_grad else None for x in tensors]


class LinearPlan(NamedTuple):
    """What is decided on the host before the operator starts."""

    per_row: bool
    return_terms: bool
    wanted: list[bool]
    """The gradients of hidden states, weight, bias, and with `teacher_gradient` of each teacher's rows, head, bias."""
    families: tuple[Divergence, ...]
    """Alive until backward: a divergence without a kernel is known by its number only."""
    slopes: int
    """How many there are: float16 needs them."""
    flags: Flags
    tile: int
    tile_dtype: torch.dtype
    dtype: torch.dtype
    max_rows: int | None
    statistics: tuple[bool, bool]
    """Whether any are asked for, whether any is of the teacher."""
    common: int
    """The columns that they are of."""

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        slopes: Sequence[Tensor],
        teachers: Sequence[TeacherRows],
        upstream: Tensor | None,
        wanted: list[bool],
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """The operator: row losses; the gradients; their unit; statistics, where the upstream is not yet known."""
        shard = {} if self.flags.shard is None else {"shard": self.flags.shard}
        operator = linear_loop.linear_kd if shard else ops.linear_kd
        return operator(  # type: ignore[no-any-return]
            **shard,
            hidden=hidden,
            weight=weight,
            bias=bias,
            labels=labels,
            teachers=[t.rows for t in teachers],
            heads=[t.head for t in teachers],
            biases=[t.bias for t in teachers],
            ids=[t.ids for t in teachers],
            row_weights=[t.row_weights for t in teachers],
            options=[t.options for t in teachers],
            normalizers=[t.normalizers for t in teachers],
            exchanged=[t.exchanged for t in teachers],
            slopes=list(slopes),
            upstream=upstream,
            ignore_index=self.flags.ignore_index,
            kernel_ids=[t.kernel_id for t in teachers],
            exchanged_kernel_ids=[t.exchanged_kernel_id for t in teachers],
            transform=self.flags.transform,
            ce=self.flags.ce,
            tile=self.tile,
            tile_dtype=self.tile_dtype,
            dtype=self.dtype,
            max_rows=self.max_rows,
            wanted=wanted,
            statistics=self.statistics if upstream is None else (False, False),
            common=self.common,
        )


class LinearKDLossFunction(torch.autograd.Function):
    """(loss, terms ``(teachers, 2, …)`` for logging or None, statistics or nothing). The forward call computes the
    gradients, in float32 and for upstream 1, unless it is ``per_row``; backward scales and rounds them. First of the
    fields come the tensors of teachers that may get a gradient, as many as there are in ``wanted``, then slopes, then
    the teachers' fields, one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        plan: LinearPlan,
        *fields: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        own = len(plan.wanted) - 3
        leaves = hidden, weight, bias, *fields[:own]
        slopes, teachers = fields[own : own + plan.slopes], block.unflatten(TeacherRows, fields[own + plan.slopes :])
        wanted = [want and not plan.per_row for want in plan.wanted]
        row_losses, gradients, unit, told = plan.run(hidden, weight, bias, labels, slopes, teachers, None, wanted)
        ctx.plan = plan
        ctx.like = [None if x is None else (x.dtype, x.shape) for x in leaves]
        ctx.set_materialize_grads(False)
        if plan.per_row:
            save_teachers(ctx, teachers, hidden, weight, bias, labels, *slopes)
        else:
            save_for_backward(ctx, *gradients, unit)
        terms = None
        if plan.return_terms:
            terms = row_losses.new_empty(row_losses.shape[: 2 + plan.per_row])
            ctx.mark_non_differentiable(terms, told)
        else:
            ctx.mark_non_differentiable(told)
        return block.loss_of(row_losses, teachers, terms, per_row=plan.per_row), terms, told

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _terms: None, _told: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        unused = (None,) * len(ctx.needs_input_grad)
        if upstream is None:
            return unused
        plan, factor = ctx.plan, None
        if plan.per_row:
            teachers, saved = saved_teachers(ctx, 4 + plan.slopes)
            _, gradients, unit, _ = plan.run(*saved[:4], saved[4:], teachers, upstream.contiguous(), plan.wanted)
            if unit.dim() == 0:
                factor = unit.reciprocal()
        else:
            *gradients, unit = ctx.saved_tensors
            factor = upstream if unit.dim() else upstream / unit
        found: list[Tensor | None] = [None] * len(gradients)
        for i, gradient in enumerate(gradients):
            if plan.wanted[i]:
                dtype, shape = ctx.like[i]
                found[i] = rounded(gradient, factor, dtype).view(shape)
        return *found[:3], None, None, *found[3:], *unused[len(found) + 2 :]
