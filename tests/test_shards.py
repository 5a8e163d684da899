"""A vocabulary in shards, one after the other in one process: what the stages of `kd_shard` and the merge between
them make of it is what kd_forward and kd_backward make of whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import operators
import pytest
import torch
from families import DEFAULTS, describe, samples, top_k
from operators import Inputs
from torch import Tensor
from truth import pair

from fusedkd import kd_loss
from fusedkd.backends import shard
from fusedkd.backends.layout import NEEDS_WEIGHT_SUM, SHARD_STATS, STATS, TOLD, KernelId, Stage, TopkKernelId
from fusedkd.backends.schema import accumulation_dtype
from fusedkd.losses.rules import prepare, rules_of
from fusedkd.losses.vocabulary import _place

ROWS, V = 6, 300
SPLITS = [(150, 150), (100, 100, 100), (299, 1), (1, 299, 0)]


def inputs_of(student: Tensor, teacher: Any, labels: Tensor, divergence: Any = "forward_kl", **options: Any) -> Inputs:
    """What kd_loss gives the operators."""
    rules = rules_of({"divergence": divergence, "ce_weight": 0.5, **options})
    part = prepare(student, teacher, labels, None, rules)
    given = part.teacher_rows(part.known.rows.view(1, *part.known.rows.shape))
    inputs = {name: getattr(given, name) for name in ("ids", "row_weights", "options", "normalizers", "kernel_id")}
    return inputs | {
        "student": student.unsqueeze(0),
        "teacher": given.rows,
        "labels": labels,
        "ignore_index": -100,
        "transform": part.flags.transform,
        "ce": True,
    }


def over_shards(inputs: Inputs, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(row losses, statistics, gradient)."""
    listed = inputs["ids"] is not None
    dtype = accumulation_dtype(inputs["student"].dtype)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    shards = [shard.Shard(None, start, size, V) for start, size in zip(starts, sizes, strict=True)]

    def of(each: shard.Shard) -> Inputs:
        def cut(x: Tensor) -> Tensor:
            empty = torch.full((*x.shape[:-1], 1), -torch.inf, dtype=x.dtype, device=x.device)
            return x[..., each.offset : each.offset + each.own] if each.own else empty

        return inputs | {"student": cut(inputs["student"])} | ({} if listed else {"teacher": cut(inputs["teacher"])})

    def empty() -> Tensor:
        return torch.full((ROWS, STATS + SHARD_STATS), torch.nan, dtype=dtype, device=inputs["student"].device)

    told = [empty() for _ in shards]
    for each, stats in zip(shards, told, strict=True):
        shard._run(of(each), each, Stage.STATISTICS, stats)
        if each.own == 0:
            stats[:, shard.GAP : shard.COLUMNS + 1] = 0
    found = shard.merged(torch.stack(told)[..., :TOLD], inputs["options"], listed)
    parts = []
    for each in shards:
        stats = shard.rounded(found, dtype, listed)
        shard._run(of(each), each, Stage.VALUES, stats)
        parts.append(stats[:, shard.VALUE :])
    found[:, shard.VALUE :] = torch.stack(parts).double().sum(0)
    losses = shard.losses(found, inputs, shards[0])
    needs_weight_sum = not listed and inputs["kernel_id"] in NEEDS_WEIGHT_SUM
    shard.complete(stats, found[:, shard.VALUE :], needs_weight_sum)
    gradients = []
    for each in shards:
        given = of(each)
        to = torch.full_like(given["student"], torch.nan)
        shard._run(given, each, Stage.GRADIENT, stats, gradient=to)
        gradients.append(to[..., : each.own])
        if not listed and not needs_weight_sum:  # the gradient in the pass of the values
            early = torch.full_like(given["student"], torch.nan)
            shard._run(given, each, Stage.VALUES, stats.clone(), gradient=early)
            torch.testing.assert_close(early, to, rtol=1e-5, atol=1e-8)
    return losses, stats, torch.cat(gradients, -1)


def check(inputs: Inputs, sizes: Sequence[int]) -> None:
    losses, stats, gradient = over_shards(inputs, sizes)
    rows, of_whole, whole = operators.forward(inputs)
    tolerance = {"rtol": 1e-5, "atol": 1e-7, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(losses, rows, **tolerance)
    torch.testing.assert_close(gradient, whole, **tolerance | {"check_dtype": True})
    assert whole.any()
    ce = slice(4, 6)
    torch.testing.assert_close(stats[:, ce], of_whole[:, ce], **tolerance)


def case(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Columns and whole shards of −inf, a row of them, a sure row."""
    student, teacher = pair(ROWS, V, dtype=dtype, device=device)
    student[0, ::3], teacher[0, ::2] = -torch.inf, -torch.inf
    student[1, 100:], teacher[1, 100:] = -torch.inf, -torch.inf
    student[2, 7] = teacher[2, 7] = 60
    student[3] = -torch.inf
    labels = torch.tensor([149, 99, -100, 5, 299, 150], device=device)
    student[0, 149] = 1.0
    return student, teacher, labels


@pytest.mark.parametrize("divergence", DEFAULTS, ids=describe)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_logits(device: str, divergence: Any, sizes: Sequence[int]) -> None:
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.01, "logit_softcap": 20.0}
    if divergence.kernel_id != KernelId.LOGIT_MSE:
        options |= {"temperature": 2.0, "teacher_temperature": 1.5}
    check(inputs_of(*case(device), divergence, **options), sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(device: str, dtype: torch.dtype) -> None:
    student, teacher, labels = case(device, dtype)
    inputs = inputs_of(student, teacher, labels, "skew_kl", temperature=2.0)
    losses, _, gradient = over_shards(inputs, (100, 100, 100))
    rows, _, whole = operators.forward(inputs)
    torch.testing.assert_close(losses, rows, rtol=1e-5, atol=1e-7, check_dtype=False, equal_nan=True)
    torch.testing.assert_close(gradient, whole)


@pytest.mark.parametrize("kernel", TopkKernelId, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_lists(device: str, kernel: TopkKernelId, sizes: Sequence[int]) -> None:
    student, teacher, labels = case(device)
    tail, _, reverse = kernel.name.lower().partition("_")
    known = samples(teacher, 40) if kernel == TopkKernelId.SAMPLES else top_k(teacher, 12, tail, padding=2)
    check(inputs_of(student, known, labels, "reverse_kl" if reverse else "forward_kl", label_smoothing=0.1), sizes)


def test_a_part_of_a_sum_less_one_keeps_its_digits() -> None:
    """The maximum in one part, and in several; nothing at all."""
    x = torch.tensor([[50.0, 0.0, 1.0, 2.0], [3.0, 3.0, 3.0, -1.0], [-torch.inf] * 4], dtype=torch.float64)

    def of(part: Tensor) -> tuple[Tensor, Tensor]:
        top = part.amax(-1)
        base = torch.where(top == -torch.inf, 0, top)
        others = torch.where(part == top.unsqueeze(-1), 0, ((part - base.unsqueeze(-1)) / 2).exp()).sum(-1)
        count = (part == top.unsqueeze(-1)).sum(-1)
        return top, torch.where(top == -torch.inf, -1, others + (count - 1))

    whole = of(x)
    parts = [torch.stack(each) for each in zip(of(x[:, :1]), of(x[:, 1:2]), of(x[:, 2:]), strict=True)]
    top, rest = shard.merge_rests(parts[0], parts[1], torch.tensor(2.0, dtype=torch.float64))
    assert torch.equal(top, whole[0])
    torch.testing.assert_close(rest, whole[1], rtol=1e-14, atol=0)
    assert 0 < rest[0] < 1e-9
    assert rest[2] == -1


@pytest.mark.parametrize(
    ("stored", "size", "places"),
    [
        ((26, 26, 26, 23), 101, [(0, 26), (26, 26), (52, 26), (78, 23)]),
        ((2, 2, 1, 0), 5, [(0, 2), (2, 2), (4, 1), (5, 0)]),
        ((32, 32, 32, 32), 101, [(0, 32), (32, 32), (64, 32), (96, 5)]),
        ((64, 64, 64, 64), 101, [(0, 64), (64, 37), (101, 0), (101, 0)]),
        ((25, 25, 25, 25), 100, [(0, 25), (25, 25), (50, 25), (75, 25)]),
    ],
)
def test_places(stored: tuple[int, ...], size: int, places: list[tuple[int, int]]) -> None:
    assert [_place("x", n, size, rank, 4) for rank, n in enumerate(stored)] == places


def test_a_part_that_is_no_even_one() -> None:
    with pytest.raises(ValueError, match=r"x has 1 columns on rank 1 of 4 .* vocab_size=8 it must have 2"):
        _place("x", 1, 8, 1, 4)


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(ValueError, match="init_process_group first"):
        kd_loss(*pair(2, 8), vocab_group=object())
