"""The matrix product of csrc/cpu/product.cpp: of any shape and strides as exact as float32 sums are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import isa
from families import describe
from linear_cases import check_linear, problem
from torch import Tensor

from fusedkd.backends import products
from fusedkd.backends.dispatch import serving

if serving["kd_forward", "CPU"][0] != "C++":
    pytest.skip("fusedkd._C does not serve the CPU", allow_module_level=True)

BOTH = (torch.bfloat16, torch.float32)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=BOTH, ids=describe)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param not in products.own_products:
        pytest.skip("this processor leaves it to PyTorch")
    found: torch.dtype = request.param
    return found


def matrix(rows: int, columns: int, dtype: torch.dtype, *, turned: bool = False, seed: int = 0) -> Tensor:
    """Of standard normal numbers, in memory 3 elements wider than its rows, or, `turned`, than its columns."""
    rows, columns = (columns, rows) if turned else (rows, columns)
    x = torch.randn(rows, columns + 3, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, 1 : columns + 1]
    return x.t() if turned else x


# Sums of an odd length, and of more than one chunk and part; results of one number, of less and more than a tile.
SHAPES = [
    (1, 1, 1),
    (1, 64, 5),
    (7, 65, 3),
    (33, 101, 24),
    (50, 130, 1027),
    (5, 1030, 77),
    (970, 70, 40),
    (9, 40, 9001),
]


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product(m: int, n: int, k: int, turned: tuple[bool, bool], dtype: torch.dtype) -> None:
    """And nothing beside the result is written. A float32 operand beside one of bfloat16 is rounded."""
    b, bias = matrix(k, n, dtype, turned=turned[1], seed=1), torch.randn(n)
    for a in (matrix(m, k, dtype, turned=turned[0]), matrix(m, k, torch.float32, turned=turned[0])):
        exact = a.to(dtype).double() @ b.double()
        sizes = a.double().norm(dim=1, keepdim=True) * b.double().norm(dim=0)  # which a sum's rounding is relative to
        memory = torch.full((m, n + 9), 7.0)
        out = memory[:, 4 : n + 4]
        for add, given in ((False, bias), (False, None), (True, None)):
            start = out.double() if add else torch.zeros(n) if given is None else given.double()
            assert torch.ops.fusedkd.product(a=a, b=b, bias=given, out=out, add=add)
            assert ((out - exact - start).abs() / (sizes + start.abs())).max() <= 2.0**-21
        assert (memory[:, :4] == 7).all()
        assert (memory[:, n + 4 :] == 7).all()


def test_empty_sums_are_zero_and_empty_results_nothing(dtype: torch.dtype) -> None:
    out = torch.full((3, 5), 7.0)
    product = torch.ops.fusedkd.product
    product(a=matrix(3, 0, dtype), b=matrix(0, 5, dtype), bias=None, out=out, add=True)
    assert (out == 7).all()
    product(a=matrix(3, 0, dtype), b=matrix(0, 5, dtype), bias=torch.ones(5), out=out, add=False)
    assert (out == 1).all()
    product(a=matrix(0, 4, dtype), b=matrix(4, 5, dtype), bias=None, out=out[:0], add=False)


def test_nan_and_infinity_stay_in_their_rows_and_columns(dtype: torch.dtype) -> None:
    """In the last tile as well, whose packed rows and columns are filled up."""
    a, b = matrix(7, 65, torch.float32), matrix(65, 66, dtype)
    a[6, 64], a[2, 3], b[0, 65] = NAN, INF, -INF
    out = torch.empty(7, 66)
    torch.ops.fusedkd.product(a=a, b=b, bias=None, out=out, add=False)
    wrong = torch.zeros(7, 66, dtype=torch.bool)
    wrong[[2, 6]] = True
    wrong[:, 65] = True
    assert torch.equal(~out.isfinite(), wrong)
    assert out[6].isnan().all()


def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    shapes = [(100, 3000, 64), (96, 128, 9001), (3000, 128, 100)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for m, n, k in shapes:
                out = torch.empty(m, n)
                operands = matrix(m, k, dtype), matrix(k, n, dtype, seed=1)
                torch.ops.fusedkd.product(a=operands[0], b=operands[1], bias=None, out=out, add=False)
                found.append(out)
    finally:
        torch.set_num_threads(threads)
    for i, out in enumerate(found):
        assert torch.equal(out, found[i % len(shapes)])


def test_operands_without_a_unit_stride(dtype: torch.dtype) -> None:
    p = problem(9, dtype=dtype)
    spread = torch.empty(101, 48, dtype=dtype)[:, ::2].copy_(p.weight)
    check_linear(p._replace(weight=spread), temperature=2.0, ce_weight=0.5)


@pytest.mark.skipif("FUSEDKD_ISA" in os.environ, reason="is such a run")
@pytest.mark.parametrize("lower", ["avx512", "avx2"])
def test_where_the_processor_has_less(lower: str) -> None:
    """PyTorch's products answer, and the rule for gradients holds."""
    if isa() in (lower, "avx2", "plain"):
        pytest.skip(f"{isa()} is what the processor has")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_tiles or test_less",
        "-m",
        "not gpu",
    ]
    here = Path(__file__).parent
    run = subprocess.run(
        [*command, str(here / "test_linear_tiles.py"), f"{__file__}::test_less_is_obeyed"],
        env=os.environ | {"FUSEDKD_ISA": lower},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.skipif("FUSEDKD_ISA" not in os.environ, reason="no instruction set was asked for")
def test_less_is_obeyed() -> None:
    assert torch.bfloat16 not in products.own_products or isa() == "avx512_bf16"
    assert torch.float32 not in products.own_products or isa().startswith("avx512")
