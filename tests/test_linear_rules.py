"""The rules of linear_kd_loss: which rows are projected and count, reductions and normalisers, which products run, bad
arguments, torch.compile, operators, autocast, memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import describe
from linear_cases import (
    Problem,
    assert_gradients,
    check_linear,
    counted_products,
    linear_truth,
    logits_of,
    problem,
    small_tiles,
    tile_bytes,
)
from torch import Tensor, nn
from truth import DTYPES, assert_value

import fusedkd
from fusedkd import TeacherHead, TeacherLogits, kd_loss, linear_kd_loss

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7, "temperature": 2.0}
N = 18
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=describe)
two_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)


def rows_projected(calls: list[tuple[int, int, int]], p: Problem) -> int:
    return sum(m for m, k, n in calls if (k, n) == p.weight.shape[::-1])


# -------------------------------------------------- rows


def masks(device: str) -> dict[str, Tensor]:
    """Of six rows the first has both terms, the second and fifth a label alone, the last the divergence alone, and the
    third neither.
    """
    on = torch.arange(N, device=device).view(3, 6) % 6
    on = (on == 0) | (on == 3) | (on == 5)
    return {
        "bool": on,
        "integer": on * torch.arange(1, N + 1, device=device).view(3, 6),
        "float": on * torch.linspace(0.25, 2, N, device=device).view(3, 6),
    }


@two_dtypes
@pytest.mark.parametrize("mask", ["bool", "integer", "float", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_of_the_two_terms(device: str, dtype: torch.dtype, mask: str, reduction: str) -> None:
    """As in MLM: divergence on attended tokens, cross-entropy on masked ones."""
    p = problem(3, 6, dtype=dtype, device=device)
    p.labels[0, ::2] = -100
    options = {"kd_mask": masks(device).get(mask), "reduction": reduction, **BOTH}
    upstream = torch.linspace(-1, 2, N).view(3, 6) if reduction == "none" else 1.0
    check_linear(p, upstream=upstream, **options)
    check_linear(p, upstream=upstream, **{**options, "ce_weight": 0.0})
    check_linear(p, upstream=upstream, **{**options, "kd_weight": 0.0})


def test_rows_without_a_term_are_not_projected(device: str) -> None:
    """On a GPU as many as `max_rows` says are."""
    p, mask = problem(3, 6, device=device), masks(device)["bool"]
    labelled = p.labels != -100
    expected = {"both": mask | labelled, "kd": mask, "ce": labelled}
    weights = {"both": {}, "kd": {"ce_weight": 0.0}, "ce": {"kd_weight": 0.0}}
    for which, rows in expected.items():
        count = int(rows.sum())
        with counted_products() as calls:
            check_linear(p, kd_mask=mask, max_rows=None if device == "cpu" else count, **{**BOTH, **weights[which]})
        assert rows_projected(calls, p) == count < N
        assert check_linear(p, kd_mask=mask, **{**BOTH, **weights[which]}).rows.sum() == count


def test_max_rows(device: str) -> None:
    """Room for more rows than there are changes nothing; too little makes the loss NaN where nobody may look."""
    p, mask = problem(3, 6, device=device), masks(device)["bool"]
    count = int((mask | (p.labels != -100)).sum())
    for most in (count, count + 1, 5 * N):
        check_linear(p, kd_mask=mask, max_rows=most, **BOTH)
    if device != "cpu":
        assert p.loss(kd_mask=mask, max_rows=count - 1, **BOTH).isnan()


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_at_all(device: str, dtype: torch.dtype, reduction: str) -> None:
    p = problem(2, 4, dtype=dtype, device=device)
    p.labels[:] = -100
    empty = problem(0, 4, dtype=dtype, device=device)
    for q in (p, empty):
        leaves = q.leaves()
        loss = leaves.loss(reduction=reduction, **BOTH)
        assert loss.requires_grad
        assert not loss.any()
        gradients = leaves.gradients(loss)
        for name, x in leaves.operands.items():
            assert gradients[name].shape == x.shape
            assert gradients[name].dtype == dtype
            assert not gradients[name].any()
    assert leaves.loss(reduction="sum", **BOTH) == 0


@dtypes
def test_nan_in_rows_without_a_term(device: str, dtype: torch.dtype) -> None:
    """Neither in the loss nor in a gradient; also in the teacher's."""
    p, mask = problem(3, 6, dtype=dtype, device=device), masks(device)["bool"]
    off = ~(mask | (p.labels != -100))
    assert off.any()
    truth, dirty = linear_truth(p, kd_mask=mask, **BOTH), p.leaves()
    with torch.no_grad():
        dirty.hidden[off] = torch.nan
        p.teacher.hidden[~mask] = torch.nan  # rows with cross-entropy alone among them
    for reduction in ("mean", "none"):
        truth = linear_truth(dirty, kd_mask=mask, reduction=reduction, **BOTH)
        loss = dirty.loss(kd_mask=mask, reduction=reduction, **BOTH)
        assert loss.isfinite().all()
        assert_value(loss, truth.loss)
        gradients = dirty.gradients(loss)
        assert_gradients(gradients, p, truth)
        assert not gradients["hidden"][off].any()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_a_row_with_a_term(device: str, side: str) -> None:
    p = problem(3, 6, device=device)
    hidden = p.hidden if side == "student" else p.teacher.hidden
    hidden[0, 1, 3] = torch.nan
    assert p.loss(**BOTH).isnan()
    rows = p.loss(reduction="none", **BOTH).flatten()
    assert rows.isnan().tolist() == [i == 1 for i in range(N)]


def test_masked_teacher_rows_are_not_selected(device: str) -> None:
    p = problem(3, 6, device=device)
    logits = logits_of(p)
    logits[1] = -torch.inf
    check_linear(p._replace(teacher=logits), **BOTH)


# -------------------------------------------------- reductions


def part_of(p: Problem, rows: slice) -> Problem:
    head = TeacherHead(p.teacher.hidden[rows], p.teacher.weight, p.teacher.bias)
    return p._replace(hidden=p.hidden[rows], teacher=head, labels=p.labels[rows])


def test_accumulation_is_exact_with_the_normalizers_of_the_step(device: str) -> None:
    """8 sequences at once, and 2 × 4: the same loss and gradients."""
    p = problem(8, 5, device=device)
    p.labels[0, 1:] = -100  # unequal counts
    mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(2)).to(device)
    truth, leaves = linear_truth(p, kd_mask=mask, **BOTH), p.leaves()
    counts = {"kd_normalizer": mask.sum(), "ce_normalizer": (p.labels != -100).sum()}
    halves = [slice(0, 4), slice(4, 8)]
    losses = [part_of(leaves, rows).loss(kd_mask=mask[rows], **counts, **BOTH) for rows in halves]
    for loss in losses:
        loss.backward()
    assert_value(torch.stack(losses).detach().sum(), truth.loss)
    assert_gradients({name: x.grad for name, x in leaves.operands.items()}, p, truth)
    naive = sum(part_of(p, rows).loss(kd_mask=mask[rows], **BOTH) for rows in halves) / 2
    assert abs(naive - truth.loss.value) > 1e-3 * truth.loss.value


def test_normalizers_of_numbers(device: str) -> None:
    check_linear(problem(3, 6, device=device), kd_normalizer=5, ce_normalizer=torch.tensor(3.0), **BOTH)
    check_linear(problem(3, 6, device=device), kd_normalizer=0, **BOTH)


def test_terms(device: str) -> None:
    p = problem(3, 6, device=device)
    for reduction in ("mean", "sum", "none"):
        loss, terms = p.loss(reduction=reduction, return_terms=True, **BOTH)
        torch.testing.assert_close(0.5 * terms.kd + 0.7 * terms.ce, loss)
        assert torch.equal(loss, p.loss(reduction=reduction, **BOTH))


def test_options_as_tensors(device: str) -> None:
    p = problem(3, 6, device=device)
    tensors = {k: torch.tensor(x, device=device) for k, x in BOTH.items()}
    assert torch.equal(p.loss(**tensors), p.loss(**BOTH))
    several, weights = p._replace(teacher=[p.teacher] * 2), [0.25, torch.tensor(0.5, device=device)]
    assert torch.equal(several.loss(teacher_weights=weights), several.loss(teacher_weights=[0.25, 0.5]))


def test_deterministic(device: str) -> None:
    for dtype in DTYPES:
        runs, threads = [], torch.get_num_threads()
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            p = problem(40, columns=(1037, 1037), dtype=dtype, device=device).leaves()
            with small_tiles():
                loss = p.loss(max_tile_bytes=tile_bytes(15, 1037, 1037), **BOTH)
            runs.append((loss.detach(), *p.gradients(loss).values()))
        torch.set_num_threads(threads)
        for one, again, parallel in zip(*runs, strict=True):
            assert torch.equal(one, again)
            assert (one - parallel).norm() <= (1e-3 if dtype in (torch.float16, torch.bfloat16) else 1e-6) * one.norm()


# -------------------------------------------------- bad arguments


P = problem(3, 4, sizes=(6, 8), columns=(10, 10))
X, W, B, Y = P.hidden, P.weight, P.bias, P.labels
HEAD = P.teacher


def head(**changes: Any) -> TeacherHead:
    return TeacherHead(**{**vars(HEAD), **changes})


ERRORS: list[tuple[dict[str, Any], Any, str]] = [
    ({"student_hidden": [[1.0]]}, TypeError, "student_hidden must be a tensor, not list"),
    ({"student_hidden": X.long()}, TypeError, "student_hidden .*int64"),
    ({"student_hidden": torch.tensor(1.0)}, ValueError, "student_hidden"),
    ({"student_hidden": X[..., :5]}, ValueError, r"student_weight .*5.*\(10, 6\)"),
    ({"student_weight": [[1.0]]}, TypeError, "student_weight must be a tensor, not list"),
    ({"student_weight": None}, TypeError, "student_weight"),
    ({"student_weight": W[0]}, ValueError, r"student_weight .*\(6,\)"),
    ({"student_weight": W[None]}, ValueError, r"student_weight .*\(1, 10, 6\)"),
    ({"student_weight": W[:, :5]}, ValueError, r"student_weight .*6.*\(10, 5\)"),
    ({"student_weight": W.T}, ValueError, r"student_weight .*\(6, 10\)"),
    ({"student_weight": W[:0]}, ValueError, "student_weight"),
    ({"student_weight": W.bfloat16()}, TypeError, "student_weight .*float32.*bfloat16"),
    ({"student_weight": W.as_subclass(type("DTensor", (Tensor,), {}))}, TypeError, "student_weight .*DTensor"),
    (
        {"student_weight": W.as_subclass(type("DTensor", (Tensor,), {})).requires_grad_()},
        TypeError,
        r"student_weight is a DTensor.*grad_placements=\[Partial\(.avg.\)\] \* student_weight\.device_mesh\.ndim\)",
    ),
    ({"student_weight": W.to("meta")}, ValueError, "student_weight .*device.*meta"),
    ({"student_bias": B[:9]}, ValueError, r"student_bias .*10.*\(9,\)"),
    ({"student_bias": B[None]}, ValueError, r"student_bias .*\(1, 10\)"),
    ({"student_bias": 1.0}, TypeError, "student_bias must be a tensor, not float"),
    ({"student_bias": B.double()}, TypeError, "student_bias .*float64"),
    ({"teacher": head(hidden=HEAD.hidden[:2])}, ValueError, r"teacher.hidden .*\(3, 4\).*\(2, 4, 8\)"),
    ({"teacher": head(hidden=HEAD.hidden.long())}, TypeError, "teacher.hidden"),
    ({"teacher": head(hidden=None)}, TypeError, "teacher.hidden"),
    ({"teacher": head(hidden=HEAD.hidden[..., :7])}, ValueError, r"teacher.weight .*7.*\(10, 8\)"),
    ({"teacher": head(weight=HEAD.weight[0])}, ValueError, "teacher.weight"),
    ({"teacher": head(weight=HEAD.weight.half())}, TypeError, "teacher.weight .*float16"),
    ({"teacher": head(bias=HEAD.bias[:9])}, ValueError, r"teacher.bias .*\(9,\)"),
    ({"teacher": head(softcap=-1.0)}, ValueError, "teacher.softcap must be above 0"),
    ({"teacher": head(scale=0.0)}, ValueError, "teacher.scale must be above 0"),
    ({"teacher": head(weight=torch.zeros(1100, 8), bias=None)}, ValueError, "10 and 1100.*tokenizer"),
    ({"teacher": torch.zeros(3, 4, 1100)}, ValueError, "10 and 1100.*tokenizer"),
    ({"teacher": torch.zeros(2, 4, 10)}, ValueError, "teacher must have the student's leading shape"),
    ({"teacher": TeacherLogits(torch.zeros(3, 4, 10).int())}, TypeError, "teacher must be float16"),
    ({"teacher": None}, TypeError, "teacher must be a tensor"),
    ({"teacher": []}, ValueError, "teacher is an empty list"),
    ({"teacher": [HEAD, head(bias=HEAD.bias[:9])]}, ValueError, "teacher.bias"),
    (
        {"teacher": [HEAD], "teacher_weights": [1.0, 2.0]},
        ValueError,
        "teacher_weights must hold one weight per teacher",
    ),
    ({"teacher_weights": [1.0]}, ValueError, "teacher_weights is for a list"),
    ({"labels": Y[:2]}, ValueError, r"labels must have .*\(3, 4\)"),
    ({"labels": Y.int()}, TypeError, "labels must be int64"),
    ({"labels": Y.clamp(min=0) + 10}, ValueError, r"labels must be -100 .*\[0, 10\)"),
    ({"labels": None}, ValueError, "ce_weight is not 0.*needs labels"),
    ({"kd_mask": Y[:2]}, ValueError, "kd_mask must have"),
    ({"temperature": 0}, ValueError, "temperature must be above 0"),
    ({"divergence": "kl"}, ValueError, "divergence must be"),
    ({"divergence": "logit_mse", "temperature": 2.0}, ValueError, "temperature must be 1 for logit_mse"),
    ({"kd_weight": -0.5}, ValueError, "kd_weight must be at least 0"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be"),
    ({"reduction": "sum", "kd_normalizer": 3}, ValueError, "kd_normalizer"),
    ({"max_tile_bytes": 0}, ValueError, "max_tile_bytes .*0"),
    ({"max_tile_bytes": -5}, ValueError, "max_tile_bytes .*-5"),
    ({"max_tile_bytes": "4 GB"}, TypeError, "max_tile_bytes .*str"),
    ({"max_rows": 0}, ValueError, "max_rows .*0"),
    ({"max_rows": -1}, ValueError, "max_rows .*-1"),
    ({"max_rows": 2.5}, TypeError, "max_rows .*float"),
    ({"tile_dtype": torch.int32}, (TypeError, ValueError), "tile_dtype .*int32"),
    ({"tile_dtype": "float32"}, (TypeError, ValueError), "tile_dtype"),
    ({"inplace": True}, TypeError, "inplace"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_errors(change: dict[str, Any], error: Any, message: str) -> None:
    arguments = {"student_hidden": X, "student_weight": W, "teacher": HEAD, "labels": Y, "student_bias": B, **change}
    with counted_products() as calls, pytest.raises(error, match=message):
        linear_kd_loss(**{"ce_weight": 1.0, **arguments})
    assert not calls


# -------------------------------------------------- modules


def test_module(device: str) -> None:
    p = problem(3, 6, device=device)
    module = fusedkd.nn.LinearKDLoss(temperature=2.0, ce_weight=0.7)
    arguments = p.hidden, p.weight, p.teacher, p.labels
    for bias in (None, p.bias):
        expected = linear_kd_loss(*arguments, student_bias=bias, temperature=2.0, ce_weight=0.7, kd_weight=0.5)
        assert torch.equal(module(*arguments, student_bias=bias, kd_weight=0.5), expected)
    assert "temperature=2.0" in repr(module)
    for name in ("temprature", "inplace", "student_hidden"):
        with pytest.raises(TypeError, match=name):
            fusedkd.nn.LinearKDLoss(**{name: 1.0})


def test_kd_loss_takes_a_head(device: str) -> None:
    p = problem(3, 6, columns=(101, 96), device=device)
    logits = nn.functional.linear(p.hidden, p.weight, p.bias)
    torch.testing.assert_close(kd_loss(logits, p.teacher, p.labels, **BOTH), p.loss(**BOTH))
    several = p._replace(teacher=[p.teacher, logits.detach()])
    torch.testing.assert_close(kd_loss(logits, several.teacher, p.labels, **BOTH), several.loss(**BOTH))
    with pytest.raises(ValueError, match=r"teacher.weight .*\(96, 31\)"):
        kd_loss(logits, TeacherHead(p.teacher.hidden, p.teacher.weight[:, :31]))
