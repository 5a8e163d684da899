"""Every operator of the namespace ``fusedkd``: its schema and its fake implementation. All arguments go by keyword.

N rows come as ``(B, L, V)`` tensors whose last stride is 1; the other strides are free, so that ``logits[:, :-1]``
needs no copy; row (b, l) belongs to entry b·L + l of every ``(N,)`` vector. The teacher arrives narrowed to the
C = min(V_s, V_t) common columns. A is the accumulation type: float64 for a float64 student, float32 otherwise. Options,
statistics and kernels are numbered in :mod:`fusedkd.backends.layout`; what is computed is in :mod:`fusedkd.reference`.

``kd_row_weights``  the KD weight of each row, ``(N,)`` float32, from the mask or the labels: 0 where the teacher row is
                    all −inf (with ids: has no finite entry), and everywhere, with nothing read, unless ``kd``; and both
                    normalisers, ``(2,)`` float64: those given, but where one is COUNTED, or None is, the selected rows,
                    or the sum of a float mask, and the labelled rows; 1 for none. With `given`, tensors on a GPU among
                    the real options or normalisers: `normalizers` is the recipe by which both are made of them
                    (:func:`fusedkd.backends.call.recipe`), and the options come after the normalisers, ``(20,)``.
``kd_forward``      row losses ``(2, N)``: T^k·w·D and CE (of ``ce`` alone: a divergence may need the labels for
                    itself); statistics ``(N, 8)``; and into `gradient`, unless it is None, the gradient for upstream 1.
                    It may be the student's own memory.
``kd_backward``     the gradient times the upstream, ``()`` or ``(N,)``, from the logits and the statistics, into
                    `gradient`: one rounding. With ``skip_if_one``, `gradient` is already right, and left alone, if the
                    upstream is 1.
                    With `ids` ``(N, K)`` int64, −1 for padding, the teacher is known at these columns alone:
                    ``(B, L, K)`` log-probabilities or weights there.
``defined_*``       the two for a divergence that has no kernel (:mod:`fusedkd.backends.defined`).
``kd_terms``        the loss from row losses: the sum of kd and ce, each times its weight, where kd and ce are sums over
                    the normalisers, ``()``, or per row, ``(N,)``. Both go into `terms`, ``(2, …)``, unless it is None.
``kd_loss``         these three in one call: loss, row weights, normalisers, statistics. With `given`, `options` is the
                    recipe. kd_forward is given the labels for ``ce`` or if the divergence ``needs_labels``.
                    ``checked``: on a CPU it raises where a label or a list is not as :mod:`fusedkd.checks` says,
                    before anything is written.
``defined_loss``    the same for a divergence that has no kernel.
``kd_cluster``      kd_forward or kd_backward in one pass on a Hopper GPU, into tensors that it is given. False, and
                    nothing is written, where no cluster of the device has room for a row.
``kd_shard``        a stage (:class:`fusedkd.backends.layout.Stage`) of kd_forward and kd_backward for the columns
                    [offset, offset + V) of a vocabulary, whose labels and ids count over all of it. The statistics,
                    ``(N, STATS + SHARD_STATS)``, are merged between the stages (:mod:`fusedkd.backends.shard`).
``kd_both``         kd_forward, and row by row the same with the sides exchanged, which gives the teacher's gradient, in
                    `teacher_gradient` unless it is None: that may be the teacher's own memory, but `gradient` not the
                    student's. The options of the exchanged call are `exchanged`. Returns row losses, statistics, and
                    those of the exchanged call. Without ids; in C++ alone.
``kd_statistics``   of the KD term's two softmaxes, over the so many ``columns`` that are common: entropy of the
                    student, of the teacher; log-probability of the label, student's, teacher's; total variation:
                    ``(5, N)`` in A. 0 in a row that the KD term does not select, log-probabilities in a row without a
                    label, and all of the teacher's unless ``of_teacher``.
``linear_kd``       all of the KD loss from hidden states ``(N, H_s)``, a head ``(V_s, H_s)`` and a bias ``(V_s,)`` or
                    None, tile by tile through the operators above. Of each teacher: its rows ``(N, ·)``; the head that
                    makes logits of them, or None; ids or None; row weights, options, normalisers and kernel as above.
                    The first has the cross-entropy. ``tile`` rows of ``tile_dtype`` logits at a time; ``wanted``: the
                    gradients of hidden states, head, bias, for `upstream`: ``(N,)``, or None for 1; then perhaps of
                    each teacher those of its rows, head, bias, for which it has the options and the kernel of the
                    `exchanged` call, as kd_both. Products are made in ``dtype``, or a teacher's. `slopes`: a bound of
                    |∂D/∂s| of each teacher, and of each exchanged call, ``()`` float64, where a gradient is wanted
                    that is made of float16. Returns row losses ``(teachers, 2, N)``; the gradients in A, each empty if
                    not wanted; the unit they are in, ``()`` float64, empty if it is 1; and kd_statistics of `common`
                    columns, of the first teacher if ``statistics[1]``, empty unless ``statistics[0]``.
``linear_unit``     the unit in which float16 has room for the gradients of the logits, and the normalisers in it, of
                    each teacher two: ``(1 + 2·teachers,)`` float64.
``linear_hidden``   all of hidden_loss, below, for a student ``(N, H_s)`` behind a projection ``(H_t, H_s)`` with a bias
                    ``(H_t,)`` or None, ``tile`` rows at a time. Products are made in ``dtype``. `upstream` and
                    ``wanted`` as of linear_kd, and after those of hidden states, projection and bias the gradient of
                    the teacher's side, ``(N, H_t)``. Returns the loss and these four.
``attention``       the loss between attention maps, from queries and keys ``(B, heads, L, d)``; keys None: those are
                    the queries. ``rows`` and ``keys``, ``(B, L)`` bool or None for all: the queries that have a loss,
                    the keys that are seen. ``upstream``: ``(B, heads, L)``, or None for 1. Returns row losses
                    ``(B, heads, L)`` and the gradients of the student's queries and keys in A, each empty if not
                    wanted, the sum of both in the first where they are the same.
``hidden_*``        kd_forward and kd_backward for M layers of hidden states, each ``(B, L, H)`` of N rows, and those of
                    a teacher, each in pieces ``(B, L, H_k)`` that count as their concatenation: of all layers in turn,
                    those of a layer as many as have its columns together. B, L and H may differ between layers. Row
                    losses ``(M, N)``: w·D times the layer's weight, of ``layer_weights`` ``(M,)`` float64; statistics
                    ``(M, N, HIDDEN_STATS)``. `gradient`: one for each layer, of no elements where it is not wanted, or
                    none at all. `upstream` is the same for all layers. ``distance`` and ``normalize``: HiddenDistance,
                    HiddenNormalize. Without `weights`, all are 1.
``hidden_loss``     from the mask ``(N,)`` or None to the loss in one call: the sum of the row losses over the
                    normaliser, or over the layers of each row; the weights of the rows, empty without a mask; the
                    normaliser, ``()`` float64; statistics. `normalizers` ``(1 + M,)`` float64: the normaliser, or
                    COUNTED as for kd_row_weights, and the weights of the layers.
``layer_attention`` ALP-KD over M student and K teacher layers, each ``(B, L, H)``, of one type a side: row losses
                    ``(N,)``, Σ_j w·|s_j − c_j|²/H; and the gradients of their sum over the normaliser times `upstream`
                    ``()`` or ``(N,)``, None for 1, into `gradient` ``(M, B, L, H)`` and `teacher_gradient`
                    ``(K, B, L, H)``, unless these are None. `buckets` ``(M, K)`` float64: not 0 where the layer k is
                    one of j's. ``skip_if_one`` as in kd_backward.
``layer_distances`` mean over H and weighted sum over rows, by the normaliser, of (s_j − t_k)², ``(M, K)``.
``layer_distances_backward``  its gradient ``(M, B, L, H)``, of the first side, for an upstream ``(M, K)`` float64.
``gumbel_forward``  of logits ``(1, N, V)`` in A and their noise, that of the rows from ``first_row`` on under the
                    `seed` (``()`` int64): the highest column of each row, ``(N,)`` int64, and statistics ``(N, 2)`` at
                    the `temperature`, ``()`` float64.
``gumbel_backward`` over the logits, the gradient of the relaxed one-hot rows y, times `scale` (``()`` float64), from
                    `slopes` like the logits, ∂loss/∂y; 1/T is a part of the scale.
``gumbel_ids``      gumbel_forward from hidden states ``(N, H)``, a head ``(V, H)`` and a bias ``(V,)`` or None,
                    ``tile`` rows at a time. Products are made in ``dtype``.
``gumbel_gradients``  the gradients of the three that are ``wanted``, from those of the rows ``(N, E)`` of each table
                    ``(V, E)``: as those of linear_kd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkd.backends.layout import HIDDEN_STATS, NORMALIZERS, OPTIONS, GumbelStat, Stat

_INPUTS = (
    "Tensor student, Tensor teacher, Tensor? ids, Tensor? labels, Tensor row_weights, Tensor options, "
    "Tensor normalizers"
)
_FLAGS = "int ignore_index, int kernel_id, bool transform, bool ce"
_FORWARD = f"(*, {_INPUTS}, Tensor(a!)? gradient, {_FLAGS}) -> (Tensor, Tensor)"
_BACKWARD = f"(*, Tensor upstream, {_INPUTS}, Tensor stats, Tensor(a!) gradient, {_FLAGS}, bool skip_if_one) -> ()"
_LOSS = (
    "(*, Tensor student, Tensor teacher, Tensor? ids, Tensor? labels, Tensor? kd_mask, Tensor options, "
    "Tensor? normalizers, Tensor? given=None, Tensor(a!)? gradient, Tensor(b!)? terms, int ignore_index, "
    "int kernel_id, bool transform, bool kd, bool ce, bool needs_labels, bool per_row, bool checked) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
_HIDDEN = "Tensor[] student, Tensor[] teacher, Tensor? weights, Tensor normalizer, Tensor layer_weights"
_COMPARED = "int distance, int normalize"
_LAYERS = "Tensor[] student, Tensor[] teacher, Tensor? weights, Tensor normalizer"
_GUMBEL = "Tensor hidden, Tensor weight, Tensor? bias, Tensor seed, Tensor temperature, SymInt tile, ScalarType dtype"

SCHEMAS = {
    "kd_row_weights": "(*, Tensor teacher, Tensor? ids, Tensor? labels, Tensor? kd_mask, Tensor? normalizers, "
    "Tensor? given=None, int ignore_index, bool kd) -> (Tensor, Tensor)",
    "kd_forward": _FORWARD,
    "kd_backward": _BACKWARD,
    "defined_forward": _FORWARD,
    "defined_backward": _BACKWARD,
    "kd_terms": "(*, Tensor row_losses, Tensor options, Tensor normalizers, Tensor(a!)? terms, bool per_row) -> Tensor",
    "kd_loss": _LOSS,
    "defined_loss": _LOSS,
    "linear_kd": "(*, Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, Tensor[] teachers, Tensor?[] heads, "
    "Tensor?[] biases, Tensor?[] ids, Tensor[] row_weights, Tensor[] options, Tensor[] normalizers, "
    "Tensor?[] exchanged, Tensor[] slopes, Tensor? upstream, int ignore_index, int[] kernel_ids, "
    "int[] exchanged_kernel_ids, bool transform, bool ce, SymInt tile, ScalarType tile_dtype, ScalarType dtype, "
    "SymInt? max_rows, bool[] wanted, bool[] statistics, SymInt common) -> (Tensor, Tensor[], Tensor, Tensor)",
    "kd_statistics": "(*, Tensor student, Tensor teacher, Tensor? labels, Tensor row_weights, Tensor options, "
    "bool transform, bool of_teacher, SymInt columns, int ignore_index) -> Tensor",
    "linear_unit": "(*, Tensor[] row_weights, Tensor[] options, Tensor[] normalizers, Tensor[] slopes) -> Tensor",
    "linear_hidden": "(*, Tensor hidden, Tensor weight, Tensor? bias, Tensor[] teacher, Tensor? mask, "
    f"Tensor normalizers, Tensor? upstream, {_COMPARED}, bool per_row, SymInt tile, ScalarType dtype, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "hidden_forward": f"(*, {_HIDDEN}, Tensor(a!)[] gradient, {_COMPARED}) -> (Tensor, Tensor)",
    "hidden_loss": "(*, Tensor[] student, Tensor[] teacher, Tensor? mask, Tensor normalizers, Tensor(a!)[] gradient, "
    f"{_COMPARED}, bool per_row) -> (Tensor, Tensor, Tensor, Tensor)",
    "hidden_backward": f"(*, Tensor upstream, {_HIDDEN}, Tensor stats, Tensor(a!)[] gradient, {_COMPARED}, "
    "bool skip_if_one) -> ()",
    "attention": "(*, Tensor student_q, Tensor? student_k, Tensor teacher_q, Tensor? teacher_k, Tensor? rows, "
    "Tensor? keys, Tensor options, Tensor normalizers, Tensor? upstream, int kernel_id, bool causal, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor)",
    "layer_attention": f"(*, Tensor? upstream, {_LAYERS}, Tensor buckets, Tensor(a!)? gradient, "
    "Tensor(b!)? teacher_gradient, bool skip_if_one) -> Tensor",
    "layer_distances": f"(*, {_LAYERS}) -> Tensor",
    "layer_distances_backward": f"(*, Tensor upstream, {_LAYERS}) -> Tensor",
    "gumbel_forward": "(*, Tensor logits, Tensor seed, Tensor temperature, int first_row) -> (Tensor, Tensor)",
    "gumbel_backward": "(*, Tensor(a!) logits, Tensor slopes, Tensor ids, Tensor stats, Tensor seed, "
    "Tensor temperature, Tensor scale, int first_row) -> ()",
    "gumbel_ids": f"(*, {_GUMBEL}) -> (Tensor, Tensor)",
    "gumbel_gradients": f"(*, Tensor[] upstreams, Tensor[] tables, Tensor ids, Tensor stats, {_GUMBEL}, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)",
}
CLUSTER = (
    "kd_cluster(*, Tensor student, Tensor teacher, Tensor? labels, Tensor row_weights, Tensor options, "
    "Tensor normalizers, Tensor? upstream, Tensor(a!)? row_losses, Tensor(b!) stats, Tensor(c!)? gradient, "
    f"{_FLAGS}, bool skip_if_one) -> bool"
)
SHARD = (
    f"kd_shard(*, Tensor? upstream, {_INPUTS}, Tensor(a!) stats, Tensor(b!)? gradient, {_FLAGS}, bool skip_if_one, "
    "int stage, int offset, int vocabulary) -> ()"
)
BOTH = (
    "kd_both(*, Tensor student, Tensor teacher, Tensor? labels, Tensor row_weights, Tensor options, "
    "Tensor normalizers, Tensor exchanged, Tensor(a!)? gradient, Tensor(b!)? teacher_gradient, int ignore_index, "
    "int kernel_id, int exchanged_kernel_id, bool transform, bool ce) -> (Tensor, Tensor, Tensor)"
)
PRODUCT = "product(*, Tensor a, Tensor b, Tensor? bias, Tensor(a!) out, bool add) -> bool"
"""out = a·b + bias, or out += a·b, in float32, of one pair of matrices or of several. False, and nothing done: this
processor has no such product."""
PAIRS = (
    "attention_pairs(*, Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? rows, "
    "Tensor? keys, Tensor options, Tensor normalizers, Tensor? upstream, Tensor(a!) row_losses, Tensor(b!)? d_q, "
    "Tensor(c!)? d_k, int kernel_id, bool causal) -> bool"
)
"""All of attention; d_k may be d_q. False, and nothing done, where no kernel takes these operands, as of product."""

library = torch.library.Library("fusedkd", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=torch.Tag.needs_exact_strides)
library.define(CLUSTER)  # called by kd_* alone, below everything that traces
library.define(SHARD)  # called in eager mode alone
library.define(BOTH, tags=torch.Tag.needs_exact_strides)  # where C++ serves a CPU
library.define(PRODUCT)  # by linear_kd
library.define(PAIRS)  # by attention


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def weights_and_counts(teacher: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Memory for what kd_row_weights returns of the rows ``(B, L, C)``."""
    rows, values = teacher.shape[0] * teacher.shape[1], NORMALIZERS if given is None else NORMALIZERS + OPTIONS
    return teacher.new_empty(rows, dtype=torch.float32), teacher.new_empty(values, dtype=torch.float64)


def losses_and_stats(student: Tensor, losses: int | None, stats: int) -> tuple[Tensor, Tensor]:
    """Memory for what a forward operator returns of the rows ``(B, L, V)``: row losses ``(losses, N)``, or ``(N,)``,
    and statistics ``(N, stats)``.
    """
    rows, dtype = student.shape[0] * student.shape[1], accumulation_dtype(student.dtype)
    shape = (rows,) if losses is None else (losses, rows)
    return student.new_empty(shape, dtype=dtype), student.new_empty((rows, stats), dtype=dtype)


def layers_and_stats(student: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Memory for what hidden_forward returns."""
    first, layers = student[0], len(student)
    rows, dtype = first.shape[0] * first.shape[1], accumulation_dtype(first.dtype)
    return first.new_empty((layers, rows), dtype=dtype), first.new_empty((layers, rows, HIDDEN_STATS), dtype=dtype)


def by_layer(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Each layer of the student with its pieces of the teacher."""
    rest = iter(teacher)
    for layer in student:
        pieces: list[Tensor] = []
        while sum([piece.shape[2] for piece in pieces]) < layer.shape[2]:
            pieces.append(next(rest))
        yield layer, pieces


def layers_like(layers: Sequence[Tensor]) -> Tensor:
    """Memory for the gradient of layers ``(B, L, H)``, one after the other."""
    return layers[0].new_empty((len(layers), *layers[0].shape))


def ids_and_stats(like: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for what the Gumbel operators return of so many rows, whose accumulation type this is."""
    return like.new_empty(rows, dtype=torch.int64), like.new_empty((rows, len(GumbelStat)), dtype=dtype)


def gradients_like(hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the three gradients of linear_kd, empty where one is not wanted: float32, in which those of the head
    add up over the tiles and all of them wait for the upstream gradient, so that each is rounded once.
    """
    total = torch.promote_types(hidden.dtype, torch.float32)
    rows = math.prod(hidden.shape[:-1])
    d_hidden = hidden.new_empty((rows, hidden.shape[-1]) if wanted[0] else 0, dtype=total)
    d_weight = weight.new_empty(weight.shape if wanted[1] else 0, dtype=total)
    d_bias = weight.new_empty(weight.shape[0] if wanted[2] else 0, dtype=total)
    return d_hidden, d_weight, d_bias


def linear_gradients_like(
    hidden: Tensor, weight: Tensor, teachers: Sequence[Tensor], heads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor]:
    """As `gradients_like`, and then, if `wanted` goes on, for those of each teacher."""
    found = [*gradients_like(hidden, weight, wanted[:3])]
    for i in range(len(wanted) // 3 - 1):
        head = heads[i]
        found += gradients_like(teachers[i], teachers[i] if head is None else head, wanted[3 * i + 3 : 3 * i + 6])
    return found


def unit_shape(slopes: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[int, ...]:
    """Of the unit of linear_kd's gradients."""
    return () if len(slopes) > 0 and any(wanted) else (0,)


def projected_gradients_like(
    hidden: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gradients_like`, and for that of the teacher's side."""
    of_student = gradients_like(hidden, weight, wanted)
    shape = (hidden.shape[0], weight.shape[0]) if wanted[3] else (0,)
    return *of_student, of_student[0].new_empty(shape)


def attention_memory(q: Tensor, k: Tensor | None, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what the operator attention returns."""
    total = torch.promote_types(q.dtype, torch.float32)
    d_q = q.new_empty(q.shape if wanted[0] else 0, dtype=total)
    d_k = q.new_empty(q.shape if wanted[1] and k is not None else 0, dtype=total)
    return q.new_empty(q.shape[:3], dtype=total), d_q, d_k


@torch.library.register_fake("fusedkd::kd_row_weights")
def _(*, teacher: Tensor, given: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    return weights_and_counts(teacher, given)


@torch.library.register_fake("fusedkd::kd_forward")
@torch.library.register_fake("fusedkd::defined_forward")
def _(*, student: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return losses_and_stats(student, 2, len(Stat))


@torch.library.register_fake("fusedkd::kd_both")
def _(*, student: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    row_losses, stats = losses_and_stats(student, 2, len(Stat))
    return row_losses, stats, torch.empty_like(stats)


@torch.library.register_fake("fusedkd::hidden_forward")
def _(*, student: list[Tensor], **_: Any) -> tuple[Tensor, Tensor]:
    return layers_and_stats(student)


@torch.library.register_fake("fusedkd::hidden_loss")
def _(*, student: list[Tensor], mask: Tensor | None, per_row: bool, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_losses, stats = layers_and_stats(student)
    rows = row_losses.shape[1]
    weights = row_losses.new_empty(0 if mask is None else rows, dtype=torch.float32)
    return row_losses.new_empty(rows if per_row else ()), weights, row_losses.new_empty((), dtype=torch.float64), stats


@torch.library.register_fake("fusedkd::gumbel_forward")
def _(*, logits: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return ids_and_stats(logits, logits.shape[1], logits.dtype)


@torch.library.register_fake("fusedkd::gumbel_ids")
def _(*, hidden: Tensor, dtype: torch.dtype, **_: Any) -> tuple[Tensor, Tensor]:
    return ids_and_stats(hidden, hidden.shape[0], accumulation_dtype(dtype))


@torch.library.register_fake("fusedkd::gumbel_gradients")
def _(*, hidden: Tensor, weight: Tensor, dtype: torch.dtype, wanted: list[bool], **_: Any) -> tuple[Tensor, ...]:
    return gradients_like(hidden.to(dtype), weight.to(dtype), wanted)


@torch.library.register_fake("fusedkd::kd_backward")
@torch.library.register_fake("fusedkd::gumbel_backward")
@torch.library.register_fake("fusedkd::defined_backward")
@torch.library.register_fake("fusedkd::hidden_backward")
def _(**_: Any) -> None:
    return None


@torch.library.register_fake("fusedkd::kd_terms")
def _(*, row_losses: Tensor, per_row: bool, **_: Any) -> Tensor:
    return row_losses.new_empty((row_losses.shape[1],) if per_row else ())


@torch.library.register_fake("fusedkd::kd_loss")
@torch.library.register_fake("fusedkd::defined_loss")
def _(
    *, student: Tensor, teacher: Tensor, per_row: bool, given: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_losses, stats = losses_and_stats(student, 2, len(Stat))
    loss = row_losses.new_empty((row_losses.shape[1],) if per_row else ())
    return loss, *weights_and_counts(teacher, given), stats


@torch.library.register_fake("fusedkd::kd_statistics")
def _(*, student: Tensor, **_: Any) -> Tensor:
    return student.new_empty(5, student.shape[0] * student.shape[1], dtype=accumulation_dtype(student.dtype))


@torch.library.register_fake("fusedkd::linear_kd")
def _(
    *,
    hidden: Tensor,
    weight: Tensor,
    teachers: list[Tensor],
    heads: list[Tensor | None],
    slopes: list[Tensor],
    dtype: torch.dtype,
    wanted: list[bool],
    statistics: list[bool],
    **_: Any,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    row_losses = hidden.new_empty(len(teachers), 2, hidden.shape[0], dtype=accumulation_dtype(dtype))
    unit = hidden.new_empty(unit_shape(slopes, wanted), dtype=torch.float64)
    found = row_losses.new_empty((5, hidden.shape[0]) if statistics[0] else (0,))
    return row_losses, linear_gradients_like(hidden, weight, teachers, heads, wanted), unit, found


@torch.library.register_fake("fusedkd::linear_unit")
def _(*, row_weights: list[Tensor], **_: Any) -> Tensor:
    return row_weights[0].new_empty(1 + NORMALIZERS * len(row_weights), dtype=torch.float64)


@torch.library.register_fake("fusedkd::linear_hidden")
def _(
    *, hidden: Tensor, weight: Tensor, per_row: bool, dtype: torch.dtype, wanted: list[bool], **_: Any
) -> tuple[Tensor, ...]:
    loss = hidden.new_empty(hidden.shape[0] if per_row else (), dtype=accumulation_dtype(dtype))
    return loss, *projected_gradients_like(hidden, weight, wanted)


@torch.library.register_fake("fusedkd::attention")
def _(*, student_q: Tensor, student_k: Tensor | None, wanted: list[bool], **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attention_memory(student_q, student_k, wanted)


@torch.library.register_fake("fusedkd::layer_attention")
def _(*, student: list[Tensor], **_: Any) -> Tensor:
    return losses_and_stats(student[0], None, 0)[0]


@torch.library.register_fake("fusedkd::layer_distances")
def _(*, student: list[Tensor], teacher: list[Tensor], **_: Any) -> Tensor:
    return student[0].new_empty(len(student), len(teacher), dtype=accumulation_dtype(student[0].dtype))


@torch.library.register_fake("fusedkd::layer_distances_backward")
def _(*, student: list[Tensor], **_: Any) -> Tensor:
    return layers_like(student)
