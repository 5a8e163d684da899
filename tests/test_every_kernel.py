"""Every kernel of the KD losses, each with all families, types and forms in turn, on few rows by the test rule. This is
what to run first on a GPU, and a part of what `make sanitize` executes without one.

The rows lie between NaNs and start anywhere, so that a kernel that reads past a row shows it. By their width, a GPU of
108 processors keeps one in registers, takes it whole, or splits it into parts.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from families import DEFAULTS, SUMS, TAILS, at, describe, samples, top_k
from linear_cases import check_linear, problem, small_tiles, teacher_logits, tile_bytes
from test_statistics import compare, truth
from torch import Tensor
from truth import DTYPES, between_nans, check_hidden, check_kd, pair, targets

from fusedkd import JSD, TeacherLogits, TeacherSamples, TeacherTopK, kd_loss
from fusedkd.backends.statistics import STATISTICS
from fusedkd.divergences import Divergence

WIDTHS = {"resident": 1003, "whole": 4611, "split": 17011}
F16, BF16, F32, F64 = DTYPES
INF = torch.inf
BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F64, F64)]
kernels = pytest.mark.parametrize("kernel", WIDTHS)


def batch(
    kernel: str, device: str, turn: int = 0, teacher_columns: int = 0, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Four rows, with types and distances between them that change from turn to turn; every third label is ignored."""
    v = WIDTHS[kernel]
    dtypes = PAIRS[turn % len(PAIRS)]
    student, teacher = pair(2, 2, v, device=device, dtype=F64, teacher_columns=v + teacher_columns, **options)
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    after = 16 - (11 + v) % 16 + (turn % 3 == 2)  # rows of both start alike, but for every third turn
    return (
        between_nans(student, after=after),
        between_nans(teacher, after=16 - (11 + v + teacher_columns) % 16),
        targets(2, 2, classes=v, device=device),
    )


@kernels
@pytest.mark.parametrize(("turn", "divergence"), [*enumerate([*DEFAULTS, *SUMS[1::2]])], ids=describe)
def test_families(device: str, kernel: str, turn: int, divergence: Divergence) -> None:
    student, teacher, labels = batch(kernel, device, turn)
    check_kd(student, teacher, labels, **at(divergence, 2.0), **BOTH)


@kernels
def test_statistics(device: str, kernel: str) -> None:
    """Of rows of different types, one of them not selected."""
    for turn in (0, 4):
        student, teacher, labels = batch(kernel, device, turn)
        options = {"temperature": 2.0, "return_terms": True, "statistics": STATISTICS}
        _, terms = kd_loss(student, teacher, labels, **options)
        flat = [x.flatten(0, -2) for x in (student, teacher)]
        compare(terms.statistics, truth(*flat, labels.flatten(), 2.0))


@kernels
@pytest.mark.parametrize(("turn", "divergence"), [*enumerate(["forward_kl", JSD(0.3), "dkd"])], ids=describe)
def test_each_row_by_itself(device: str, kernel: str, turn: int, divergence: Any) -> None:
    """Reduction and upstream: statistics in the forward call, the gradient in the backward call."""
    student, teacher, labels = batch(kernel, device, turn)
    upstream = torch.tensor([[1.0, -0.3], [2.0, 0.7]])
    options = {"divergence": divergence, "temperature": 3.0, "reduction": "none", **BOTH}
    check_kd(student, teacher, labels, upstream=upstream, **options)


@kernels
def test_upstream_gradients(device: str, kernel: str) -> None:
    """The one that the forward call expected and another, in float16 and bfloat16, of a sum and of a mean."""
    for turn, reduction, upstream in ((1, "sum", 1.0), (1, "mean", 0.37), (2, "mean", 128.0)):
        student, teacher, labels = batch(kernel, device, turn)
        check_kd(student, teacher, labels, reduction=reduction, upstream=upstream, **BOTH)


@kernels
@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys"])
def test_softcap_scale_and_smoothing(device: str, kernel: str, divergence: str) -> None:
    student, teacher, labels = batch(kernel, device, turn=len(divergence))
    options = {"logit_softcap": 8.0, "logit_scale": 1.3, "label_smoothing": 0.1, "divergence": divergence}
    check_kd(student, TeacherLogits(teacher, softcap=9.0, scale=0.7), labels, temperature=4.0, **options, **BOTH)


@kernels
@pytest.mark.parametrize("teacher_columns", [-13, 13])
def test_padded_vocabularies(device: str, kernel: str, teacher_columns: int) -> None:
    student, teacher, labels = batch(kernel, device, turn=1, teacher_columns=teacher_columns)
    labels[0, 0] = WIDTHS[kernel] - 1
    check_kd(student, teacher, labels, temperature=2.0, **BOTH)


@kernels
@pytest.mark.parametrize("mask", [torch.bool, torch.int64, torch.float32], ids=str)
def test_masks(device: str, kernel: str, mask: torch.dtype) -> None:
    """Of rows, and of columns; what is in a row without a term is not read."""
    student, teacher, labels = batch(kernel, device)
    labels[1, 1] = labels[1, 0] = -100
    selected = torch.tensor([[1, 0], [2, 0]], device=device).to(mask)
    student[:, :, 5:90] = teacher[:, :, 5:90] = teacher[1, 0, 200:300] = -INF
    teacher[0, 1], teacher[1, 1], student[1, 1] = torch.nan, -INF, INF
    check_kd(student, teacher, labels.clamp(max=3), kd_mask=selected, **BOTH)


@kernels
def test_in_place(device: str, kernel: str) -> None:
    """The same bits where the logits were, contiguous ones in odd places."""
    student, teacher, labels = batch(kernel, device, turn=1)
    options = {"temperature": 2.0, "divergence": JSD(0.3), **BOTH}
    leaf, found = student.contiguous().requires_grad_(), []
    for inplace in (False, True):
        loss = kd_loss(leaf + 0, teacher, labels, inplace=inplace, **options)
        found.append(torch.autograd.grad(loss, leaf)[0])
    assert found[0].any()
    assert torch.equal(*found)


# -------------------------------------------------- teachers known at K columns

LISTS = [(tail, divergence) for tail in TAILS for divergence in ("forward_kl", "reverse_kl")]


def known(kind: str, logits: Tensor, k: int, t: float) -> TeacherTopK | TeacherSamples:
    return samples(logits, k) if kind == "samples" else top_k(logits, k, kind, t, padding=1)


@pytest.mark.parametrize(
    ("turn", "kind", "divergence"),
    [(i, *pair) for i, pair in enumerate([*LISTS, ("samples", "forward_kl")])],
)
@pytest.mark.parametrize(("kernel", "k"), [("resident", 9), ("whole", 70)])
def test_lists(device: str, turn: int, kind: str, divergence: str, kernel: str, k: int) -> None:
    student, logits, labels = batch(kernel, device, turn)
    teacher = known(kind, logits.clone(), k, 2.0)
    options = {"divergence": divergence, "temperature": 2.0, **BOTH}
    check_kd(student, teacher, labels, **options)
    if k == 9:
        rows = {"reduction": "none", "upstream": torch.tensor([[1.0, -0.3], [2.0, 0.7]])}
        check_kd(student, teacher, labels, label_smoothing=0.1, logit_softcap=8.0, **rows, **options)


# -------------------------------------------------- hidden states

HIDDEN = [*product(("mse", "smooth_l1", "cosine"), (None, "l2", "layer_norm"))]


@pytest.mark.parametrize(("width", "pieces"), [(1003, 2), (1024, 1), (8600, 1)])  # held, held and aligned, not held
@pytest.mark.parametrize(("turn", "kind"), [*enumerate(HIDDEN)], ids=describe)
def test_hidden(device: str, width: int, pieces: int, turn: int, kind: tuple[Any, Any]) -> None:
    student, teacher = pair(2, 2, width, device=device, dtype=F64)
    student, teacher = (x.to(dtype) for x, dtype in zip((student, teacher), PAIRS[turn % len(PAIRS)], strict=True))
    mask, options = (
        torch.tensor([[1, 0], [1, 3]], device=device),
        dict(zip(("distance", "normalize"), kind, strict=True)),
    )
    if width != 1024:
        student, teacher = between_nans(student), between_nans(teacher)
    student[0, 1] = torch.nan
    check_hidden(student, teacher, mask, pieces=pieces, upstream=16.0 * width, **options)
    rows: dict[str, Any] = {"reduction": "none", "upstream": torch.tensor([[1.0, 1.0], [-0.3, 0.7]]) * width}
    check_hidden(student, teacher, mask.float(), pieces=pieces, **rows, **options)


# -------------------------------------------------- from hidden states


@pytest.mark.parametrize("dtype", DTYPES, ids=describe)
def test_linear(device: str, dtype: torch.dtype) -> None:
    """Three tiles; fewer rows than there are, of which a third has no term; a teacher of each kind."""
    p = problem(37, columns=(601, 590), dtype=dtype, device=device)
    options = {"temperature": 2.0, "kd_mask": p.labels != -100, **BOTH}
    most = tile_bytes(15, 601, 590, size=8 if dtype == F64 else 4)
    with small_tiles():
        check_linear(p, max_tile_bytes=most, **options)
        check_linear(p, max_tile_bytes=most, max_rows=25, divergence="reverse_kl", **options)
        upstream = torch.linspace(0.5, 2, 37)
        check_linear(p, max_tile_bytes=most, max_rows=25, reduction="none", upstream=upstream, **options)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=describe)
def test_linear_with_lists_and_several_teachers(device: str, dtype: torch.dtype) -> None:
    p = problem(37, columns=(601, 601), dtype=dtype, device=device)
    logits = teacher_logits(p.teacher).logits.to(device, F32)
    listed = top_k(logits, 9, t=2.0)
    with small_tiles():
        most = tile_bytes(15, 601)
        check_linear(p._replace(teacher=listed), max_tile_bytes=most, temperature=2.0, **BOTH)
        check_linear(p._replace(teacher=[p.teacher, listed]), max_tile_bytes=2 * most, temperature=2.0, **BOTH)
