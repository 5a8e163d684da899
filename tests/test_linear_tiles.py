"""How linear_kd_loss does its work: tiles of rows, which products run, the memory they take."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import describe, samples, top_k
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
from torch import nn
from truth import DTYPES, assert_value, noise_for

from fusedkd import TeacherHead
from fusedkd.backends import dispatch, linear_loop, products
from fusedkd.losses.tiles import Tiles

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7, "temperature": 2.0}
N = 18
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=describe)
two_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)


def heights(calls: list[tuple[int, int, int]], p: Problem) -> list[int]:
    """Rows of each product that makes logits of the student."""
    return [m for m, k, n in calls if (k, n) == p.weight.shape[::-1]]


@dtypes
@pytest.mark.parametrize(("rows", "expected"), [(40, 1), (37, 1), (20, 2), (15, 3), (1, 37)])
def test_tiles(device: str, dtype: torch.dtype, rows: int, expected: int) -> None:
    """So many rows at most in a tile of these bytes, whatever the gradients: by the rule, as without tiles."""
    p = problem(37, columns=(101, 90), dtype=dtype, device=device)
    p.labels[:] = p.labels.clamp(min=0)
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    most = tile_bytes(rows, 101, 90, size=logits.itemsize)
    with small_tiles(), counted_products() as calls:
        check_linear(p, max_tile_bytes=most, **BOTH)
        check_linear(p, max_tile_bytes=most, reduction="none", upstream=torch.linspace(0.5, 2, 37), **BOTH)
    if dtype in (torch.float32, torch.float64):
        found = heights(calls, p)[:expected]
        assert sum(found) == 37
        assert max(found) <= rows


def test_two_teacher_tiles_count(device: str) -> None:
    p = problem(37, device=device)
    with small_tiles(), counted_products() as calls:
        check_linear(p._replace(teacher=[p.teacher] * 2), max_tile_bytes=tile_bytes(15, 101, 101, 101), **BOTH)
    assert len(heights(calls, p)) >= 2
    assert max(heights(calls, p)) <= 15


def test_tiles_change_rounding_alone(device: str) -> None:
    p, found = problem(37, device=device).leaves(), []
    for rows in (37, 20, 15):
        with small_tiles():
            loss = p.loss(max_tile_bytes=tile_bytes(rows, 101, 101), **BOTH)
        found.append([loss.detach(), *p.gradients(loss).values()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).norm() <= 3e-7 * a.norm()


def test_default_tiles_of_many_rows(device: str) -> None:
    """In equal shares: 2048 to 4096 rows each on a GPU, a few hundred on a CPU."""
    fewest, most = (2048, 4096) if device != "cpu" else (128, 256) if products.own_products else (512, 1024)
    p = problem(9000, sizes=(8, 9), columns=(40, 40), device=device)
    with counted_products() as calls:
        check_linear(p, **BOTH, kd_mask=torch.ones_like(p.labels))
    found = heights(calls, p)
    assert sum(found) == 9000
    assert all(fewest <= m <= most for m in found)
    assert max(found) - min(found) <= len(found)


def test_default_tiles_on_a_cpu() -> None:
    """48 MB for student and teacher together, as long as that are 128 rows; otherwise what PyTorch's products need."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        size = linear_loop.tile_size(torch.device("cpu"), dtype, torch.float32)
        for columns, expected in ((1000, 256), (30522, 206), (128256, 128)):
            rows = Tiles(None, torch.float32, None).rows(tile_bytes(1, columns, columns), 10**6, size)
            assert rows == (expected if dtype in products.own_products else 1024)


def test_small_tiles_warn(device: str) -> None:
    fewest = linear_loop.tile_size(torch.device(device), torch.float32, torch.float32).fewest
    p = problem(fewest + 400, sizes=(4, 4), columns=(30, 30), device=device, bias=False)
    few = problem(fewest - 30, sizes=(4, 4), columns=(30, 30), device=device)
    with pytest.warns(UserWarning, match=f"max_tile_bytes.* {fewest - 1} rows .* below {fewest}"):
        p.loss(max_tile_bytes=tile_bytes(fewest - 1, 30, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.loss()
        p.loss(max_tile_bytes=tile_bytes(fewest, 30, 30))
        few.loss(max_tile_bytes=tile_bytes(fewest - 30, 30, 30))  # all of its rows


@pytest.mark.parametrize("tile_dtype", [torch.bfloat16, torch.float32], ids=describe)
def test_tile_dtype(device: str, tile_dtype: torch.dtype) -> None:
    """16-bit logits are for those who can bear their error: near their teacher float32 is 50 times closer."""
    p = problem(24, dtype=torch.bfloat16, device=device, noise=noise_for(1e-3), labels=False)
    truth, leaves = linear_truth(p), p.leaves()
    gradients = leaves.gradients(leaves.loss(tile_dtype=tile_dtype))
    if tile_dtype == torch.float32:
        assert_gradients(gradients, p, truth)
    error = (gradients["hidden"].double().cpu() - truth.gradients["hidden"]).norm() / truth.gradients["hidden"].norm()
    assert error < {torch.bfloat16: 2.0, torch.float32: 0.005}[tile_dtype]


# -------------------------------------------------- products


@dtypes
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids=str)
def test_flops(device: str, dtype: torch.dtype, rows: int | None, frozen: tuple[str, ...]) -> None:
    """2·N·V·H for every product that is needed, 6·N·V·H_s + 2·N·V·H_t in all; backward has none."""
    p = problem(3, 6, columns=(101, 90), dtype=dtype, device=device)
    p.labels[:] = p.labels.clamp(min=0)
    forward = 2 * N * 101 * 24, 2 * N * 90 * 32
    tiles = {} if rows is None else {"max_tile_bytes": tile_bytes(rows, 101, 90)}
    with small_tiles(), counted_products() as calls:
        leaves = p.leaves(*frozen)
        leaves.gradients(leaves.loss(**tiles, **BOTH), 3.0)
    products = 3 - len({"hidden", "weight"} & {*frozen})
    assert sum(2 * m * k * n for m, k, n in calls) == products * forward[0] + forward[1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_products_alone(device: str, reduction: str) -> None:
    """Without gradients to compute, also of a Parameter."""
    p = problem(3, 6, device=device)
    p.labels[:] = p.labels.clamp(min=0)
    learnt = p.leaves()._replace(weight=nn.Parameter(p.weight.clone()))
    for q, mode in ((p, torch.enable_grad()), (learnt, torch.no_grad()), (learnt, torch.inference_mode())):
        with mode, counted_products() as calls:
            loss = q.loss(reduction=reduction, **BOTH)
        assert not loss.requires_grad
        assert sum(2 * m * k * n for m, k, n in calls) == 2 * N * 101 * (24 + 32)
        assert_value(loss, linear_truth(p, reduction=reduction, **BOTH).loss)


def test_products_of_other_teachers(device: str) -> None:
    p = problem(3, 6, device=device)
    p.labels[:] = p.labels.clamp(min=0)
    logits = logits_of(p)
    for teacher, hidden in (
        (logits, 0),
        (top_k(logits, 8), 0),
        (samples(logits, 8), 0),
        ([p.teacher, logits, TeacherHead(p.teacher.hidden[..., :7], p.teacher.weight[:, :7])], 32 + 7),
    ):
        with counted_products() as calls:
            leaves = p._replace(teacher=teacher).leaves()
            leaves.loss(ce_weight=0.5).backward()
        assert sum(2 * m * k * n for m, k, n in calls) == 2 * N * 101 * (3 * 24 + hidden)


def test_no_product_of_the_teacher_without_its_term(device: str) -> None:
    p = problem(3, 6, device=device)
    p.labels[:] = p.labels.clamp(min=0)
    with counted_products() as calls:
        p.loss(kd_weight=0.0, ce_weight=1.0)
        p._replace(teacher=[p.teacher, p.teacher]).loss(teacher_weights=[0.0, 1.0])
    assert sum(2 * m * k * n for m, k, n in calls) == 2 * N * 101 * (24 + 24 + 32)


# -------------------------------------------------- memory

CLEAR_REFS = "/proc/self/clear_refs"
PEAK = """
import sys, torch, fusedkd
from benchmarks.measure import peak_bytes
n, device = int(sys.argv[1]), sys.argv[2]
V, H = 8000, 32
x, w, t, u = (torch.randn(*shape, H, device=device) / 4 for shape in [(n,), (V,), (n,), (V,)])
x.requires_grad_(), w.requires_grad_()
labels = torch.randint(V, (n,), device=device)
def run(rows=n):
    head = fusedkd.TeacherHead(t[:rows], u)
    loss = fusedkd.linear_kd_loss(x[:rows], w, head, labels[:rows], ce_weight=1.0, max_tile_bytes=80 << 20)
    return torch.autograd.grad(loss, (x, w))
run(8)  # what libraries load and keep
print(peak_bytes(run, device))
"""


def test_memory_does_not_grow_with_rows_times_vocabulary(device: str) -> None:
    """Tiles of 80 MB and a head's gradient of 1 MB; four times the rows add their own gradient alone, 0.8 MB. One
    tensor of N×V would add 196.
    """
    if device == "cpu" and (dispatch.serving["kd_forward", "CPU"][0] != "C++" or not os.access(CLEAR_REFS, os.W_OK)):
        pytest.skip("needs the C++ kernels and Linux's /proc")
    root, peaks = Path(__file__).parent.parent, []
    for n in (2048, 8192):
        command = [sys.executable, "-c", PEAK, str(n), device]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
        if done.stdout.strip() == "None":
            pytest.skip("cannot be measured here")
        peaks.append(int(done.stdout) / 2**20)
    assert 40 < peaks[0] < 80 + 32
    assert peaks[1] < peaks[0] + 24
