"""hidden_loss with a projection: loss and gradients of hidden states, projection and bias by float64 truth; its tiles,
products and memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from linear_cases import counted_products
from projection_cases import H_S, H_T, HALF, assert_gradients, check, given, truth
from torch import Tensor
from torch.nn import functional as F
from truth import DTYPES

from fusedkd import hidden_loss
from fusedkd.backends import dispatch, products
from fusedkd.losses import projected

COMPARISONS = [
    (distance, normalize) for distance in ("mse", "cosine", "smooth_l1") for normalize in (None, "l2", "layer_norm")
]
comparisons = pytest.mark.parametrize(("distance", "normalize"), COMPARISONS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projected, "rows_per_tile", lambda *_: 4)


@dtypes
@comparisons
@pytest.mark.usefixtures("_small_tiles")
def test_distances(device: str, dtype: torch.dtype, distance: str, normalize: str | None) -> None:
    """21 rows in tiles of four, which are made of equal height: by the rule, the teacher's side too."""
    p = given(3, 7, dtype=dtype, device=device)
    check(p, distance=distance, normalize=normalize, frozen=())
    check(p, distance=distance, normalize=normalize, reduction="none", upstream=torch.linspace(0.5, 2, 21).view(3, 7))


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.usefixtures("_small_tiles")
def test_masks(device: str, dtype: torch.dtype, kind: torch.dtype, reduction: str) -> None:
    """What is in the other rows is not read, on either side."""
    p = given(3, 7, dtype=dtype, device=device)
    mask = (torch.arange(21, device=device).view(3, 7) % 3).to(kind)
    dirty = p._replace(student=p.student.clone(), teacher=p.teacher.clone())
    dirty.student[mask == 0], dirty.teacher[mask == 0] = torch.nan, torch.nan
    upstream = 0.5 if reduction != "none" else torch.linspace(0.5, 2, 21).view(3, 7)
    options = {"reduction": reduction, "upstream": upstream, "frozen": ()}
    expected = truth(p, mask, **{k: v for k, v in options.items() if k != "frozen"})
    leaves = dirty.leaves()
    loss = leaves.loss(mask, reduction=reduction, teacher_gradient=True)
    found = leaves.gradients(loss, upstream)
    assert_gradients(found, p, expected)
    for name in ("student", "teacher"):
        assert not found[name][mask == 0].any()
    check(p, mask, **options)


@pytest.mark.parametrize("mask", [torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.bool)], ids=["float", "bool"])
def test_nothing_selected(device: str, mask: Tensor) -> None:
    leaves = given(3, 7, device=device).leaves()
    loss = leaves.loss(mask.to(device), teacher_gradient=True)
    assert loss.item() == 0
    assert not any(x.any() for x in leaves.gradients(loss).values())


def test_no_rows(device: str) -> None:
    leaves = given(0, 7, device=device).leaves("teacher")
    loss = leaves.loss()
    assert loss.item() == 0
    assert not leaves.gradients(loss)["projection"].any()


@dtypes
@pytest.mark.parametrize("frozen", [("student",), ("projection",), ("bias",), ("student", "projection")], ids=str)
def test_frozen(device: str, dtype: torch.dtype, frozen: tuple[str, ...]) -> None:
    """Their gradients are not computed: two products of N·H_s·H_t less, at most."""
    p = given(3, 7, dtype=dtype, device=device)
    check(p, frozen=("teacher", *frozen))
    with counted_products() as calls:
        p.leaves("teacher", *frozen).loss()
    needed = 3 - len({"student", "projection"} & {*frozen})
    assert sum(m * k * n for m, k, n in calls) == needed * 21 * H_S * H_T
    with counted_products() as calls, torch.no_grad():
        p.leaves("teacher").loss()
    assert sum(m * k * n for m, k, n in calls) == 21 * H_S * H_T


def test_rows_that_are_not_selected_are_not_projected() -> None:
    mask = torch.arange(21).view(3, 7) % 3 == 0
    with counted_products() as calls:
        given(3, 7).leaves("teacher").loss(mask)
    assert sum(m * k * n for m, k, n in calls) == 3 * 7 * H_S * H_T


@dtypes
def test_options(device: str, dtype: torch.dtype) -> None:
    p = given(3, 7, dtype=dtype, device=device)
    check(p._replace(bias=None))
    check(p, normalizer=5, upstream=3.0)
    check(p, normalizer=torch.tensor(5, device=device), upstream=3.0)
    mask = torch.arange(21, device=device).view(3, 7) % 3
    for chosen in (mask, mask / 3, (mask > 0) & torch.tensor([[True], [False], [True]], device=device)):
        pooled = p if dtype not in HALF else given(3, 7, dtype=torch.float32, device=device)
        check(pooled, chosen, pool="mean", distance="cosine", frozen=())
    pieces = [piece.contiguous() for piece in p.teacher.split([5, 20, H_T - 25], -1)]
    check(p._replace(teacher=pieces), normalize="l2")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_means_of_16_bits_are_projected_in_float32(device: str, dtype: torch.dtype) -> None:
    check(given(3, 7, dtype=dtype, device=device), pool="mean", normalize="layer_norm")


def test_pieces_and_layers_get_gradients(device: str) -> None:
    """One projection of all layers, or one each; a teacher in pieces that gets a gradient."""
    p, q = (given(3, 7, device=device, dtype=torch.float64, seed=seed) for seed in (0, 1))
    pieces = [piece.clone().requires_grad_() for piece in p.teacher.split([5, H_T - 5], -1)]
    loss = hidden_loss(p.student, pieces, projection=p.projection, teacher_gradient=True)
    found = torch.cat(torch.autograd.grad(loss, pieces), -1)
    torch.testing.assert_close(found, truth(p._replace(bias=None)).gradients["teacher"], rtol=1e-12, atol=1e-15)

    a, b = p.leaves("teacher"), q.leaves("teacher")
    layers = [a.student, b.student], [a.teacher, b.teacher]
    one, other = truth(p), truth(q._replace(projection=p.projection, bias=p.bias))
    shared = hidden_loss(*layers, projection=a.projection, bias=a.bias, layer_weights=[0.5, 2])
    gradients = torch.autograd.grad(shared, [a.projection, a.bias, a.student, b.student])
    expected = [0.5 * one.gradients[k] + 2 * other.gradients[k] for k in ("projection", "bias")]
    expected += [0.5 * one.gradients["student"], 2 * other.gradients["student"]]
    torch.testing.assert_close([*gradients], expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(shared.detach(), 0.5 * one.loss + 2 * other.loss)

    own = hidden_loss(*layers, projection=[a.projection, b.projection], bias=[None, b.bias], reduction="none")
    gradients = torch.autograd.grad(own.sum(), [a.projection, b.projection, b.bias])
    alone = truth(p._replace(bias=None), reduction="sum"), truth(q, reduction="sum")
    expected = [alone[0].gradients["projection"], alone[1].gradients["projection"], alone[1].gradients["bias"]]
    torch.testing.assert_close([*gradients], expected, rtol=1e-12, atol=1e-15)


def test_a_layer_without_projection(device: str) -> None:
    p, x = given(3, 7, device=device), torch.ones(3, 7, 5, device=device, requires_grad=True)
    loss = hidden_loss([x, p.student], [0 * x.detach(), p.teacher], projection=[None, p.projection])
    torch.testing.assert_close(loss.detach(), 1 + hidden_loss(p.student, p.teacher, projection=p.projection))


def test_a_second_backward(device: str) -> None:
    p = given(3, 7, device=device)
    leaves = p.leaves("teacher")
    loss = leaves.loss()
    for scale in (1.0, 3.0, 1.0):
        (scale * loss).backward(retain_graph=True)
    expected = truth(p, upstream=5.0)
    assert_gradients({"student": leaves.student.grad, "projection": leaves.projection.grad}, p, expected)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(leaves.loss(), leaves.student, create_graph=True)


def test_strided_inputs(device: str) -> None:
    """All but the first token, and the first alone; a projection without a unit stride."""
    p = given(3, 7, device=device)
    for part in ((slice(None), slice(1, None)), (slice(None), 0)):
        check(p._replace(student=p.student[part], teacher=p.teacher[part]))
    check(p._replace(projection=p.projection.repeat_interleave(2, 1)[:, ::2]))
    cls = p.student.clone().requires_grad_()
    loss = hidden_loss(cls[:, 0], p.teacher[:, 0], projection=p.projection, bias=p.bias)
    expected = truth(p._replace(student=p.student[:, 0], teacher=p.teacher[:, 0])).gradients["student"]
    torch.testing.assert_close(torch.autograd.grad(loss, cls)[0][:, 0].double().cpu(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("distance", "size"), [("mse", 1e18), ("smooth_l1", 1e36)])
@pytest.mark.parametrize("last", [1.0, torch.inf])
def test_sums_that_overflow(device: str, distance: str, size: float, last: float) -> None:
    """The row is summed again, where the gradient has not yet been written over it."""
    x, w = torch.full((3, 4), size, device=device), torch.ones(1024, 4, device=device, requires_grad=True)
    x[0] *= last
    found = hidden_loss(x, torch.zeros(3, 1024, device=device), distance=distance, projection=w)
    expected = 16 * size**2 if distance == "mse" else 4 * size
    assert found.item() == (torch.inf if last == torch.inf else pytest.approx(expected, rel=1e-6))


# -------------------------------------------------- float16


@pytest.mark.parametrize(("rows", "size"), [(64, 1.0), (4096, 1e-3), (64, 1000.0)])
def test_float16_has_room(monkeypatch: pytest.MonkeyPatch, rows: int, size: float) -> None:
    """∂y is rounded to float16 on a GPU, and here too: divided by rows and width, it would underflow; far from its
    teacher, overflow.
    """
    monkeypatch.setattr(products, "operand", lambda g, dtype, tiles: g.to(dtype))
    monkeypatch.setattr(projected, "rows_per_tile", lambda *_: rows // 2 + 1)
    p = given(rows, dtype=torch.float16, noise=size)
    upstream = 1.0 if size > 1 else 1024.0  # a loss scale, without which float16 gradients would not hold it
    check(p, upstream=upstream)
    check(p, reduction="none", upstream=torch.linspace(0.5, 2, rows) / rows * upstream)


# -------------------------------------------------- the losses of others


def test_parity_with_tinybert(device: str) -> None:
    """MSE of fit_dense(h_s), one layer that all share, mean over all of it; padding counts there, so no mask."""
    torch.manual_seed(0)
    fit = torch.nn.Linear(H_S, H_T, dtype=torch.float64, device=device)
    students = [torch.randn(2, 5, H_S, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3)]
    teachers = [torch.randn(2, 5, H_T, dtype=torch.float64, device=device) for _ in range(3)]
    inputs = [*students, fit.weight, fit.bias]
    theirs = sum(F.mse_loss(fit(x), t) for x, t in zip(students, teachers, strict=True))
    ours = hidden_loss(students, teachers, projection=fit.weight, bias=fit.bias)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_parity_with_ckd(device: str) -> None:
    """The student's layer projected up to a group of teacher layers, both divided by their norms: squared errors summed
    over features, layers and tokens that are no padding.
    """
    torch.manual_seed(0)
    up = torch.nn.Linear(H_S, 2 * H_T, dtype=torch.float64, device=device)
    students = [torch.randn(2, 5, H_S, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    groups = [[torch.randn(2, 5, H_T, dtype=torch.float64, device=device) for _ in range(2)] for _ in range(2)]
    mask = torch.arange(10, device=device).view(2, 5) % 4 != 3
    inputs, theirs = [*students, up.weight, up.bias], 0.0
    for x, group in zip(students, groups, strict=True):
        s, t = F.normalize(up(x), dim=-1), F.normalize(torch.cat(group, -1), dim=-1)
        theirs = theirs + ((s - t) ** 2).sum(-1)[mask].sum()
    ours = (
        2
        * H_T
        * hidden_loss(students, groups, mask, normalize="l2", projection=up.weight, bias=up.bias, reduction="sum")
    )
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected)


# -------------------------------------------------- memory

CLEAR_REFS = "/proc/self/clear_refs"
PEAK = """
import sys, torch, fusedkd
from benchmarks.measure import peak_bytes
device = sys.argv[1]
x, w, t = (torch.randn(*shape, device=device) for shape in [(8192, 16), (2048, 16), (8192, 2048)])
x.requires_grad_(), w.requires_grad_()
def run(rows):
    return lambda: torch.autograd.grad(fusedkd.hidden_loss(x[:rows], t[:rows], projection=w), (x, w))
run(8)()  # what libraries load and keep
print(*[peak_bytes(run(rows), device) for rows in (2048, 8192)])
"""


def test_memory_does_not_grow_with_the_projected_rows(device: str) -> None:
    """A tile of 8 MB (on a GPU of 4096 rows); four times the rows add 0.2 MB to each gradient and to the losses. The
    projected rows would add 50.
    """
    if device == "cpu" and (
        dispatch.serving["hidden_forward", "CPU"][0] != "C++" or not os.access(CLEAR_REFS, os.W_OK)
    ):
        pytest.skip("needs the C++ kernels and Linux's /proc")
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PEAK, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    if "None" in done.stdout:
        pytest.skip("cannot be measured here")
    few, many = (int(peak) / 2**20 for peak in done.stdout.split())
    tile = 8 if device == "cpu" else 16
    assert tile / 2 < few < tile + 8
    assert many < few + 6 + (0 if device == "cpu" else 16)
