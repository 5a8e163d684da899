"""A vocabulary that is split over the processes of a group: what kd_forward and kd_backward are, for the columns that
one rank holds.

    statistics of the own columns → all-gather, merged → value and Σw of the own columns → all-gather, added → gradient

The first crosses with 48 bytes a row, the second with 8 (twice that for float64 logits). What is merged is so on each
rank, in the order of the ranks, in float64: all ranks have the same bits. The gradient of the own columns needs nothing
more, and backward starts from the statistics. (Megatron-LM, arXiv:1909.08053, §3, does so for the cross-entropy.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd.backends.layout import (
    FIRST_DEFINED,
    NEEDS_WEIGHT_SUM,
    REVERSE,
    SHARD_STATS,
    STATS,
    TOLD,
    Option,
    ShardStat,
    Stage,
    Stat,
)
from fusedkd.backends.schema import accumulation_dtype

ops = torch.ops.fusedkd

LABEL_STUDENT, LABEL_TEACHER, GAP, COLUMNS, VALUE, WEIGHT = (STATS + stat for stat in ShardStat)

TOPS, RESTS = slice(Stat.STUDENT_MAX, Stat.CE_SUM, 2), slice(Stat.STUDENT_SUM, Stat.WEIGHT_SUM, 2)
"""Of the three softmaxes."""


class Shard(NamedTuple):
    """The columns that this rank holds."""

    group: Any
    """``torch.distributed.ProcessGroup``."""
    offset: int
    """Columns of the ranks before."""
    own: int
    """Of this rank, without padding. 0: what it is given is one column, −inf on both sides."""
    columns: int
    """Of all ranks."""


def gathered(x: Tensor, group: Any) -> Tensor:
    """``(ranks, *x.shape)``: the same tensor of each rank. All that crosses between ranks goes through here, but for
    the sum of the hidden states' gradient.
    """
    x = x.contiguous()
    found = x.new_empty(torch.distributed.get_world_size(group), *x.shape)
    all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    all_gather(found.flatten(), x.flatten(), group=group)
    return found


def known_rows(teacher: Tensor, shard: Shard) -> Tensor:
    """``(B, L, 1)``: −inf where all logits ``(B, L, C)`` of the teacher are, on every rank, else 0. One byte a row."""
    own, _ = ops.kd_row_weights(
        teacher=teacher, ids=None, labels=None, kd_mask=None, normalizers=None, ignore_index=-100, kd=True
    )
    known = (gathered((own != 0).to(torch.uint8), shard.group) != 0).any(0)
    return torch.where(known, 0.0, -torch.inf).view(*teacher.shape[:2], 1)


def has_kernel(kernel_id: int, device: torch.device) -> bool:
    """Whether it needs no other rank's logits."""
    key = device.type.upper()
    return kernel_id < FIRST_DEFINED and torch._C._dispatch_has_kernel_for_dispatch_key("fusedkd::kd_shard", key)


def kd_forward(inputs: dict[str, Any], shard: Shard, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """kd_forward of :mod:`fusedkd.backends.schema`; statistics ``(N, STATS + SHARD_STATS)``."""
    student, listed = inputs["student"], inputs["ids"] is not None
    rows, dtype = student.shape[0] * student.shape[1], accumulation_dtype(student.dtype)
    own = student.new_empty(rows, STATS + SHARD_STATS, dtype=dtype)
    _run(inputs, shard, Stage.STATISTICS, own)
    if shard.own == 0:
        own[:, GAP : COLUMNS + 1] = 0
    found = merged(gathered(own[:, :TOLD], shard.group), inputs["options"], listed)
    if found.is_cpu and len(found):  # on a GPU, `losses` makes the loss NaN
        same_split(int(found[0, COLUMNS]), shard)
    stats = rounded(found, dtype, listed)
    waits = inputs["kernel_id"] in (REVERSE if listed else NEEDS_WEIGHT_SUM)
    _run(inputs, shard, Stage.VALUES, stats, gradient=None if waits else gradient)
    found[:, VALUE:] = gathered(stats[:, VALUE:], shard.group).double().sum(0)
    row_losses = losses(found, inputs, shard)
    complete(stats, found[:, VALUE:], waits and not listed)
    if gradient is not None and waits:
        _run(inputs, shard, Stage.GRADIENT, stats, gradient=gradient)
    return row_losses.to(dtype), stats


def kd_backward(
    inputs: dict[str, Any], shard: Shard, *, upstream: Tensor, stats: Tensor, gradient: Tensor, skip_if_one: bool
) -> None:
    _run(inputs, shard, Stage.GRADIENT, stats, gradient=gradient, upstream=upstream, skip_if_one=skip_if_one)


def _run(inputs: dict[str, Any], shard: Shard, stage: Stage, stats: Tensor, **more: Any) -> None:
    """The stage of the columns that this rank holds."""
    given = {"upstream": None, "gradient": None, "skip_if_one": False} | more
    place = {"offset": shard.offset, "vocabulary": shard.columns}
    ops.kd_shard(**inputs, **given, **place, stats=stats, stage=int(stage))


def same_split(columns: int, shard: Shard) -> None:
    """Refuses shards, of so many columns in all, that are not those of one vocabulary."""
    if columns != shard.columns:
        raise ValueError(
            f"the ranks of vocab_group hold {columns} columns in all, but {shard.columns} by the shard of this "
            "one: the vocabulary must be split evenly, and unless all shards are full, vocab_size must say its size"
        )


def merged(told: Tensor, options: Tensor, listed: bool) -> Tensor:
    """Statistics of whole rows, ``(N, STATS + SHARD_STATS)`` float64, sums less 1, from those of the ranks, ``(ranks,
    N, TOLD)``. Those of a teacher known at few columns keep a sum in two parts.
    """
    parts = told.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format)  # rows side by side: faster
    found = parts.new_zeros(STATS + SHARD_STATS, parts.shape[2])
    other = Option.TEMPERATURE if listed else Option.TEACHER_TEMPERATURE
    own = options[..., Option.TEMPERATURE]
    temperatures = torch.stack([own, options[..., other], torch.ones_like(own)]).view(3, -1)
    rests = parts[:, RESTS]
    if listed:
        rests = rests.clone()
        for i, lost in enumerate((Stat.WEIGHT_SUM, Stat.OWN)):
            rests[:, i] += parts[:, lost] - 1
    found[TOPS], found[RESTS] = merge_rests(parts[:, TOPS], rests, temperatures)
    found[LABEL_STUDENT : LABEL_TEACHER + 1] = parts[:, LABEL_STUDENT : LABEL_TEACHER + 1].sum(0)
    columns = parts[:, COLUMNS]
    gaps = parts[:, GAP] + columns * (found[Stat.CE_MAX] - parts[:, Stat.CE_MAX])
    found[GAP], found[COLUMNS] = torch.where(columns == 0, 0, gaps).sum(0), columns.sum(0)
    return found.t()


def merge_rests(tops: Tensor, rests: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and Σ exp((x − maximum)/T) − 1 of whole rows, ``(softmaxes, N)``, from those of their parts, ``(parts,
    softmaxes, N)``: what has the maximum keeps its digits. −inf and −1 of nothing.
    """
    top = tops.amax(0)
    base = torch.where(top == -torch.inf, 0, top)
    at_top = tops == top
    lowered = (rests + 1) * torch.exp((tops - base) / temperature)
    return top, torch.where(at_top, rests, lowered).sum(0) + (at_top.sum(0) - 1)


def rounded(found: Tensor, dtype: torch.dtype, listed: bool) -> Tensor:
    """The statistics as kernels have them."""
    stats = found.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if listed:
        for total, lost in ((Stat.STUDENT_SUM, Stat.WEIGHT_SUM), (Stat.OTHER_SUM, Stat.OWN)):
            whole = found[:, total] + 1
            stats[:, total] = whole
            stats[:, lost] = whole - stats[:, total].double()
    return stats


def complete(stats: Tensor, sums: Tensor, needs_weight_sum: bool) -> None:
    """D and Σw ``(N, 2)`` into the statistics."""
    stats[:, VALUE:] = sums
    if needs_weight_sum:
        value, weight = stats[:, VALUE], stats[:, WEIGHT]
        stats[:, Stat.WEIGHT_SUM] = torch.where(value.isfinite(), weight, value)


def losses(found: Tensor, inputs: dict[str, Any], shard: Shard) -> Tensor:
    """Row losses ``(2, N)``, float64, from the statistics of whole rows."""
    options, weights, labels = inputs["options"], inputs["row_weights"], inputs["labels"]
    rows = found.new_zeros(2, len(found))
    scale = options[..., Option.KD_SCALE]
    rows[0] = torch.where((weights != 0) & (scale != 0), scale * weights.double() * found[:, VALUE], 0)
    if inputs["ce"]:
        smoothing, z_loss = options[..., Option.LABEL_SMOOTHING], options[..., Option.Z_LOSS_WEIGHT]
        top, rest = found[:, Stat.CE_MAX], found[:, Stat.CE_SUM]
        log_l = torch.log1p(rest)
        ce = log_l + torch.where(smoothing == 1, 0, (1 - smoothing) * (top - found[:, LABEL_STUDENT]))
        ce = ce + torch.where(smoothing == 0, 0, smoothing * found[:, GAP] / shard.columns)
        ce = ce + torch.where(z_loss == 0, 0, z_loss * (top + log_l).square())
        ce = torch.where(rest == -1, torch.inf, ce)
        ce = torch.where((labels >= 0) & (labels < shard.columns), ce, torch.nan)
        rows[1] = torch.where(labels == inputs["ignore_index"], 0, ce)
    return torch.where(found[:, COLUMNS] == shard.columns, rows, torch.nan)
