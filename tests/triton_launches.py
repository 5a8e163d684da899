"""What stands around the KD kernels of Triton: row weights and their counts, terms, the choice of a kernel, and the
mathematics. Not collected by itself: `test_triton.py` runs it under the interpreter.
"""

from __future__ import annotations

import operators
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_cases import INF, KERNELS, LABELS, NAN, B, L, assert_close, between_nans, inputs_of, logits, options_for

from fusedkd.backends import call, eager, linear_loop
from fusedkd.backends.layout import COUNTED, OPTIONS, KernelId, TopkKernelId
from fusedkd.backends.triton import choice, kd, last, launch
from fusedkd.backends.triton import math as helpers
from fusedkd.divergences import ForwardKL, ReverseKL

MASKS = [
    None,
    torch.tensor([True, False] * 3),
    torch.tensor([1, 0, -2, 0, 3, 1]),
    torch.tensor([0.5, 0, 1, 0, 2, 1e-3]),
]
MASKS += [MASKS[2].to(torch.uint8), MASKS[3].double(), MASKS[3].bfloat16()]


@pytest.mark.parametrize("mask", MASKS, ids=lambda x: str(x.dtype) if x is not None else "None")
@pytest.mark.parametrize("labels", [None, LABELS])
def test_row_weights(mask: Tensor | None, labels: tuple[int, ...] | None) -> None:
    teacher = logits(300, b=B)[1].float()
    teacher[0, 2, :299] = teacher[1, 1, 1:] = teacher[1, 2] = -INF  # only the last of these has no column left
    teacher = between_nans(teacher)
    y = None if labels is None else torch.tensor(labels)
    given = {"teacher": teacher, "ids": None, "labels": y, "kd_mask": mask, "normalizers": None}
    given |= {"ignore_index": -100, "kd": True}
    weights, counts = launch.kd_row_weights(**given)
    assert weights.dtype == torch.float32
    assert counts.dtype == torch.float64
    truth = eager.kd_row_weights(**given)
    assert torch.equal(weights, truth[0])
    assert torch.equal(counts, truth[1])
    assert weights[2] != 0 or labels is not None
    assert weights[5] == 0
    assert not launch.kd_row_weights(**given | {"teacher": teacher[..., :0]})[0].any()
    assert not launch.kd_row_weights(**given | {"teacher": teacher * NAN, "kd": False})[0].any()


def all_rows(teacher: Tensor, ids: Tensor | None = None, normalizers: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row weights and counts without labels and mask."""
    return launch.kd_row_weights(
        teacher, ids, labels=None, kd_mask=None, normalizers=normalizers, ignore_index=-100, kd=True
    )


def test_normalizers_that_are_given() -> None:
    teacher = logits(40, b=B)[1].float()
    for given, counts in (((COUNTED, 7.5), [6, 7.5]), ((0.25, COUNTED), [0.25, 1]), ((-1.0, 0.0), [1, 1])):
        assert all_rows(teacher, normalizers=torch.tensor(given).double())[1].tolist() == counts
    assert all_rows(teacher, normalizers=torch.tensor([NAN, 2.0]).double())[1][0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_options_that_are_tensors(dtype: torch.dtype) -> None:
    """Packed beside the counts, of which one is given; the same tensor twice, once squared."""
    teacher, n, T = logits(40, b=B)[1].float(), torch.tensor(7, dtype=dtype), torch.tensor([3.0])
    table = [COUNTED, n, T, 0.25, T, *range(-5, OPTIONS - 8)]
    given = {"teacher": teacher, "ids": None, "labels": None, "kd_mask": None, "ignore_index": -100, "kd": True}
    for values, expected in ((table, 7), ([*table[:1], T, *table[2:]], 3)):
        numbers, tensors = call.recipe(values, {4: 2}, teacher.device)
        assert len(tensors) == len({id(x) for x in values if isinstance(x, Tensor)})
        for backend in (launch, eager):
            _, found = backend.kd_row_weights(**given, normalizers=numbers, given=tensors)
            assert found.tolist() == [6, expected, 3, 0.25, 9, *table[5:]]


def test_row_weights_of_lists() -> None:
    teacher = logits(40, b=B)[1].float()
    ids = torch.arange(40).repeat(6, 1)
    ids[0], teacher[0, 1] = -1, -INF
    ids[2, 1:], teacher[1, 0, :39] = -1, -INF
    ids[4, ::2] = -1
    teacher[1, 1, 1::2] = -INF  # the others are padding
    weights, counts = all_rows(teacher, ids)
    assert weights.tolist() == [0, 0, 1, 1, 0, 1]
    assert counts.tolist() == [3, 1]


@pytest.mark.parametrize("largest", [1.0, 1e4, 0.0])
@pytest.mark.parametrize("n", [0, 1, 2500])
def test_unit(n: int, largest: float) -> None:
    """A power of 2, and normalisers in it: as by PyTorch."""
    weights = torch.rand(n, generator=torch.Generator().manual_seed(0)) - 0.5
    weights[-1:] = -largest
    for coefficient, weights_of_terms in ((1.0, (0.6, 0.8)), (0.3, (1.0, 0.0)), (0.3, (0.0, 1.0)), (0.1, (0.0, 0.0))):
        slope, divisors = torch.tensor(coefficient).double(), torch.tensor([3.0, 7000.0]).double()
        kd, ce = weights_of_terms
        options = operators.options_tensor(temperature=3.0, kd_scale=9.0, kd_weight=kd, ce_weight=ce, scale=0.5)
        given = [[x] for x in (weights, options, divisors, slope)]
        truth = linear_loop.linear_unit(*given)
        torch.testing.assert_close(launch.linear_unit(*given), truth, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("mask", [False, True])
def test_unit_of_weights_that_are_repeated(mask: bool) -> None:
    """As for attention: of each query one weight for all heads, or one for all there is."""
    own = torch.tensor([[0.0] * 8, [3.0] * 8])[:, None] if mask else torch.tensor([2.0, 1e30])[0]
    given = [[own.expand(2, 4, 8)], [options_for(ForwardKL())], [torch.ones(2).double()], [torch.ones(()).double()]]
    torch.testing.assert_close(launch.linear_unit(*given), linear_loop.linear_unit(*given), rtol=1e-15, atol=0)


@pytest.mark.parametrize("n", [1, 6, 3000])
def test_terms(n: int) -> None:
    rows = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    normalizers = torch.tensor([3.0, 7.0]).double()
    for weights in ((0.6, 0.8), (0.0, 0.8)):
        options = options_for(ForwardKL(), weights=weights)
        for per_row in (False, True):
            terms, truth = (torch.full((2, n) if per_row else (2,), NAN) for _ in range(2))
            loss = launch.kd_terms(rows, options, normalizers, terms, per_row)
            expected = eager.kd_terms(rows, options, normalizers, truth, per_row)
            assert torch.allclose(loss, expected, rtol=1e-6, atol=0)
            assert torch.allclose(terms, truth, rtol=1e-6, atol=0)
            assert torch.equal(loss, launch.kd_terms(rows, options, normalizers, None, per_row))
    rows[0, 0] = INF
    terms = torch.empty(2)
    assert launch.kd_terms(rows, options, normalizers, terms, False).isfinite()
    assert terms[0] == INF


@pytest.mark.parametrize(
    ("kernel", "per_row"), [("resident", True), ("whole", False), ("split", False), ("top-k", False)]
)
def test_loss_in_one_launch(kernel: str, per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernel the rows have."""
    monkeypatch.setattr(kd, "choose", lambda *_: (kernel, KERNELS.get(kernel)))
    student, teacher = (x.float() for x in logits(257, b=B))
    if kernel == "top-k":
        ids = torch.arange(8).repeat(B * L, 1)
        known = {"teacher": teacher[..., :8].log_softmax(-1), "ids": ids, "kernel_id": TopkKernelId.BUCKET}
    else:
        known = {"teacher": teacher, "ids": None, "kernel_id": KernelId.JEFFREYS}
    given = {"student": student, "labels": torch.tensor(LABELS), "kd_mask": MASKS[3], **known}
    given |= {"options": options_for(ReverseKL(), 2.0, (0.6, 0.8)), "normalizers": None, "gradient": None}
    given |= {"ignore_index": -100, "transform": False, "kd": True, "ce": True}
    given |= {"needs_labels": False, "per_row": per_row, "checked": False}
    terms, truth = (torch.full((2, B * L) if per_row else (2,), NAN) for _ in range(2))
    loss, *_ = launch.kd_loss(**given, terms=terms)
    expected, *_ = eager.kd_loss(**given, terms=truth)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms, truth, rtol=1e-5, atol=1e-6)


@triton.jit
def sums_kernel(x, values, ticket, out, BLOCK: tl.constexpr):
    kd = tl.load(x + tl.program_id(0))
    last.leave(values, kd, 2.0 * kd)
    if last.is_last(ticket):
        a, b = last.totals(values, BLOCK)
        tl.store(out, a)
        tl.store(out + 1, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_all_programs(dtype: torch.dtype) -> None:
    """More than are added up at a time; and again, which finds the counter at 0."""
    x, ticket = torch.rand(11, dtype=dtype) - 0.5, torch.zeros(1, dtype=torch.int32)
    for n in (11, 3, 1):
        values, out = torch.full((2, n), NAN, dtype=dtype), torch.full((2,), NAN, dtype=torch.float64)
        sums_kernel[(n,)](x, values, ticket, out, BLOCK=4)
        torch.testing.assert_close(out, torch.stack([x[:n].double().sum(), 2 * x[:n].double().sum()]))
        assert ticket == 0


def test_no_rows() -> None:
    empty = torch.empty(0, 3, 7)
    w, counts = all_rows(empty)
    assert counts.tolist() == [1, 1]
    inputs = inputs_of(ForwardKL(), empty, empty, None, w, ce=False)
    rows, stats, gradient = operators.forward(inputs, ops=launch)
    assert (rows.shape, stats.shape, gradient.shape) == ((2, 0), (0, 8), (0, 3, 7))
    terms = torch.full((2,), NAN)
    assert launch.kd_terms(rows, options_for(ForwardKL()), counts, terms, False) == 0
    assert terms.tolist() == [0, 0]


# -------------------------------------------------- choice


H200, A100 = choice.Device(132, True, False), choice.Device(108, False, False)


@pytest.mark.parametrize(
    ("kernel", "parts", "shape", "dtype", "device", "forward"),
    [
        ("cluster", 1, (8192, 128256, 128256), torch.bfloat16, H200, True),
        ("cluster", 1, (64, 262144, 262144), torch.bfloat16, H200, True),
        ("whole", 1, (8192, 500000, 500000), torch.float32, H200, True),
        ("whole", 1, (8192, 128256, 128256), torch.float64, H200, True),
        ("resident", 1, (8192, 4096, 4096), torch.bfloat16, H200, True),
        ("resident", 1, (8192, 1000, 1000), torch.float32, A100, True),
        ("whole", 1, (8192, 1000, 1000), torch.float32, A100, False),
        ("whole", 1, (8192, 4096, 1000), torch.float32, A100, True),  # too many columns at its ends
        ("split", 3, (64, 128256, 128256), torch.bfloat16, A100, True),
        ("split", 3, (64, 128256, 128256), torch.bfloat16, A100, False),
        ("split", 15, (1, 128256, 128256), torch.bfloat16, A100, True),
        ("whole", 1, (1, 10000, 10000), torch.bfloat16, A100, True),
        ("whole", 1, (128, 128256, 128256), torch.bfloat16, A100, True),
    ],
)
def test_choice(
    kernel: str, parts: int, shape: tuple[int, int, int], dtype: torch.dtype, device: choice.Device, forward: bool
) -> None:
    case = choice.Case(*shape, dtype, dtype, KernelId.FORWARD_KL, True, forward)
    assert choice.choose(case, device) == (kernel, parts)


def test_another_kernel_where_no_cluster_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd, "describe", lambda device: H200)
    calls, (student, teacher) = [], (x.float() for x in logits(4200, b=B))
    w, counts = all_rows(teacher)
    inputs = inputs_of(ForwardKL(), student, teacher, None, w, normalizers=tuple(counts.tolist()), ce=False)
    with torch.library._scoped_library("fusedkd", "IMPL") as library:
        library.impl("kd_cluster", lambda **arguments: bool(calls.append(arguments)), "CPU")
        found = operators.forward(inputs, ops=launch)
    assert len(calls) == 1
    for actual, expected in zip(found[::2], operators.forward(inputs, ops=eager)[::2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert found[2].any()


# -------------------------------------------------- mathematics


@triton.jit
def helper_kernel(x, y, HELPER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, HELPER(tl.load(x + i)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["log", "log1p", "expm1", "log_sigmoid"])
def test_helpers(name: str, dtype: torch.dtype) -> None:
    size = torch.logspace(-30, 1.5, 2048, base=10, dtype=torch.float64)
    x = {"log": size, "log1p": torch.cat([size, -size.clamp(max=1)])}.get(name, torch.cat([size, -size])).to(dtype)
    truth = torch.nn.functional.logsigmoid if name == "log_sigmoid" else getattr(torch, name)
    y = torch.empty_like(x)
    helper_kernel[(1,)](x, y, getattr(helpers, name), len(x))
    x, y = x.double(), y.double()
    unit = 3e-7 if dtype == torch.float32 else 1e-15
    assert_close(y, truth(x), unit * (1 + x.abs()) * truth(x).abs())  # of exp2, for x·log2 e is rounded
