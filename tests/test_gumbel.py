"""gumbel_rows: its noise, the choice, the relaxed gradient, and the rules of rows that have no softmax."""

from __future__ import annotations

import math
from typing import Any

import gumbel_cases
import pytest
import torch
from families import describe
from gumbel_cases import SEED, Problem, check, check_choice, check_gradients, problem
from linear_cases import counted_products, small_tiles, tile_bytes
from torch import Tensor
from torch.nn.functional import one_hot
from truth import DTYPES, EMULATED, INTERPRETED, float64

import fusedkd
from fusedkd.backends import eager
from fusedkd.reference import gumbel

INF, NAN = math.inf, math.nan
ops = torch.ops.fusedkd
EXACT = [torch.float32, torch.float64]


def double(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


# -------------------------------------------------- noise


def test_words_are_those_of_philox() -> None:
    """The known answer of Random123 for counter and key 0; every bit of seed, row and column matters."""
    zero = torch.zeros((), dtype=torch.int64)
    words = gumbel.philox(zero, zero, zero)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seeds = [torch.tensor(x) for x in (0, 1, 1 << 31, 1 << 32, 1 << 62, -1, -(1 << 63))]
    rows = [torch.tensor(x) for x in (1, 1 << 31)]
    found = [gumbel.philox(zero, zero, seed)[0] for seed in seeds] + [gumbel.philox(zero, row, zero)[0] for row in rows]
    assert len({int(x) for x in found}) == len(found)


def test_noise_of_words() -> None:
    """Over the whole range, from words near both ends to any."""
    ends = torch.arange(0, 3000)
    words = torch.cat([ends, gumbel.WORD - ends, torch.arange(0, 1 << 32, 65537)])
    u, rest = ((k.double() + 0.5) * 2.0**-32 for k in (words, gumbel.WORD - words))
    exact = -torch.where(u < 0.5, -u.log(), -torch.log1p(-rest)).log()
    noise = gumbel.gumbel(words)
    assert ((noise - exact).abs() / (1 + exact.abs())).max() <= 2.5e-7
    assert noise.min() > -3.14
    assert noise.max() < 22.9


def test_noise_is_of_seed_row_and_column_alone() -> None:
    whole = gumbel.noise(SEED, 9, 700)
    assert torch.equal(gumbel.noise(torch.tensor(SEED), 4, 130, first_row=5), whole[5:, :130])
    assert len(whole.unique()) > 0.99 * whole.numel()
    assert not torch.equal(gumbel.noise(SEED + 1, 9, 700), whole)


@pytest.mark.parametrize("dtype", EXACT, ids=describe)
def test_every_backend_has_the_same_noise(device: str, dtype: torch.dtype) -> None:
    """To the last bit: of rows with one column each, the only one that is not −∞."""
    n, columns = 16 if INTERPRETED else 600, 517
    only = torch.arange(n) * 37 % columns
    logits = torch.full((1, n, columns), -INF, dtype=dtype)
    logits[0, torch.arange(n), only] = 0.0
    ids, stats = ops.gumbel_forward(
        logits=logits.to(device),
        seed=torch.tensor(SEED, device=device),
        temperature=double(1.0, device),
        first_row=(1 << 32) - 8,
    )
    assert torch.equal(ids.cpu(), only)
    noise = gumbel.noise(SEED, n, columns, first_row=(1 << 32) - 8)
    assert torch.equal(stats[:, 0].cpu(), noise[torch.arange(n), only].to(dtype))
    assert (stats[:, 1] == 1).all()


def test_moments() -> None:
    n = 240_000
    noise = gumbel.noise(1, 120, 2000).double()
    assert abs(noise.mean() - 0.5772156649) < 3 * (math.pi**2 / 6 / n) ** 0.5
    assert abs(noise.var() - math.pi**2 / 6) < 3 * (4.4 * (math.pi**2 / 6) ** 2 / n) ** 0.5  # kurtosis 5.4
    exact = (-(-noise.flatten().sort().values).exp()).exp()
    assert (exact - (torch.arange(n) + 0.5) / n).abs().max() < 1.36 / n**0.5  # Kolmogorov, 5 %
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:]), (noise[:, :-32], noise[:, 32:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 3 / n**0.5


@pytest.mark.skipif(INTERPRETED, reason="the same noise, slowly")
def test_tokens_are_drawn_from_the_softmax() -> None:
    """χ² of 40 000 draws from 13 columns."""
    n, columns = 40_000, 13
    logits = torch.randn(columns, generator=torch.Generator().manual_seed(2)) * 1.5
    logits[4] = -INF
    hidden, weight = torch.zeros(n, 4), torch.zeros(columns, 4)
    (_, ids) = fusedkd.gumbel_rows(
        hidden, weight, torch.eye(columns), bias=logits, temperature=0.3, seed=7, return_ids=True
    )
    expected, counts = logits.softmax(0) * n, ids.bincount(minlength=columns)
    assert counts[4] == 0
    kept = expected > 0
    chi2 = ((counts - expected)[kept].square() / expected[kept]).sum()
    assert chi2 < 26.2  # 1 % of χ² with 11 degrees of freedom lie above 24.7, 0.6 % above 26.2


# -------------------------------------------------- operators

WIDTHS = [1, 2, 31, 128, 129, 517, 2048, 2065]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtype", EXACT, ids=describe)
def test_choice_and_gradient(device: str, columns: int, dtype: torch.dtype) -> None:
    """The choice bit for bit, in rows that start anywhere among NaNs; nothing beside them is written."""
    generator = torch.Generator().manual_seed(columns)
    memory = torch.full((1, 4, columns + 9), NAN, dtype=dtype, device=device)
    logits = memory[:, :, 5 : columns + 5]
    logits.copy_(2 * torch.randn(1, 4, columns, generator=generator))
    logits[0, 1, columns // 2 + 1 :] = -INF
    slopes = torch.full((1, 4, columns + 3), NAN, dtype=dtype, device=device)[:, :, 1 : columns + 1]
    slopes.copy_(torch.randn(1, 4, columns, generator=generator) + 3)
    given = {"seed": torch.tensor(SEED, device=device), "temperature": double(0.7, device), "first_row": 3}
    ids, stats = ops.gumbel_forward(logits=logits, **given)
    noisy = logits[0].cpu() + gumbel.noise(SEED, 4, columns, first_row=3)
    assert torch.equal(ids.cpu(), noisy.argmax(1))
    assert torch.equal(stats[:, 0].cpu(), noisy.amax(1))
    total = ((noisy.double() - noisy.amax(1, keepdim=True).double()) / 0.7).exp().sum(1)
    unit = 1e-6 if dtype == torch.float32 else 1e-14
    assert ((float64(stats[:, 1]) - total).abs() / total).max() <= unit

    r = float64(slopes[0])
    exact = gumbel.relaxed_gradient(noisy.double(), r, 0.7)
    y = (noisy.double() / 0.7).softmax(1)
    terms = ((y * r).norm(dim=1) + y.norm(dim=1) * (y * r).sum(1).abs()) / 0.7
    ops.gumbel_backward(logits=logits, slopes=slopes, ids=ids, stats=stats, scale=1 / given["temperature"], **given)
    assert ((float64(logits[0]) - exact).norm(dim=1) <= unit * terms + 1e-300).all()
    assert columns == 1 or exact.norm() > 0.1
    assert memory[:, :, :5].isnan().all()
    assert memory[:, :, columns + 5 :].isnan().all()


def test_a_sure_row_keeps_its_digits(device: str) -> None:
    """One column has all but 1e-9 of y: Σ y·r is r of that one to float32, the gradient is not."""
    logits = torch.zeros(1, 3, 600, device=device)
    logits[0, :, 77] = 60.0
    slopes = torch.randn(1, 3, 600, generator=torch.Generator().manual_seed(0)).to(device) + 5
    given = {"seed": torch.tensor(5, device=device), "temperature": double(2.0, device), "first_row": 0}
    ids, stats = ops.gumbel_forward(logits=logits, **given)
    assert (ids == 77).all()
    noisy = (logits[0].cpu() + gumbel.noise(5, 3, 600)).double()
    exact = gumbel.relaxed_gradient(noisy, slopes[0].cpu().double(), 2.0)
    ops.gumbel_backward(logits=logits, slopes=slopes, ids=ids, stats=stats, scale=double(0.5, device), **given)
    assert (float64(logits[0]) - exact).norm() <= 2e-5 * exact.norm()  # e^−30 itself has an argument rounded at 2⁻²²·60
    assert exact.norm() > 1e-13


def test_ties_and_rows_without_a_softmax(device: str) -> None:
    """The first of equals; a NaN above all, as torch.argmax has it."""
    columns = 700
    noise = gumbel.noise(SEED, 5, columns).to(device)
    logits = torch.zeros(1, 5, columns, dtype=torch.float64, device=device)
    logits[0, 0] = -noise[0].double()  # all are 0 then
    logits[0, 1] = torch.where(torch.arange(columns, device=device) % 97 == 5, -noise[1].double() + 1, -INF)
    logits[0, 2, [600, 333]] = NAN
    logits[0, 3] = -INF
    logits[0, 4, [40, 20]] = INF
    given = {"seed": torch.tensor(SEED, device=device), "temperature": double(1.0, device), "first_row": 0}
    ids, stats = ops.gumbel_forward(logits=logits, **given)
    assert ids.tolist() == [0, 5, 333, 0, 20]
    assert torch.equal(ids, eager.gumbel_forward(logits, **given)[0])
    assert stats[:2, 1].cpu().tolist() == [columns, 8]
    assert not (stats[2:, 1] > 0).any()


# -------------------------------------------------- the function


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=describe)
def test_gradients(device: str, dtype: torch.dtype, temperature: float) -> None:
    check(problem(3, 5, dtype=dtype, device=device), temperature=temperature)


@pytest.mark.parametrize(("dtype", "tables"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_tables_of_another_type(device: str, dtype: torch.dtype, tables: torch.dtype) -> None:
    check(problem(12, dtype=dtype, tables=tables, bias=False, device=device))


def test_tables_of_several_types(device: str) -> None:
    p = problem(6, widths=(8, 9, 10), device=device)
    kinds = (torch.float64, torch.float16, torch.float32)
    tables = tuple([t.to(kind) for t, kind in zip(p.tables, kinds, strict=True)])
    upstreams = tuple([t.to(kind) for t, kind in zip(p.upstreams, kinds, strict=True)])
    check(p._replace(tables=tables, upstreams=upstreams))


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",), ("hidden", "weight")], ids=str)
def test_frozen_inputs_cost_no_product(device: str, frozen: tuple[str, ...]) -> None:
    p = problem(10, device=device)
    leaves = p.leaves(*frozen)
    with counted_products() as products:
        rows = leaves.rows()
        assert len(products) == 1
        gradients = leaves.gradients(rows)
    assert len(products) == 1 + 1 + len(p.tables) + ("hidden" not in frozen) + ("weight" not in frozen)
    check_gradients(p, gradients)


def test_eager_is_the_same(device: str) -> None:
    """What MATE-KD writes, with this noise."""
    p = problem(4, 6, dtype=torch.float64, device=device)
    leaves = p.leaves()
    tables = [t.clone().requires_grad_() for t in p.tables]
    leaves = leaves._replace(tables=tuple(tables))
    inputs = [leaves.hidden, leaves.weight, leaves.bias, *tables]
    rows = leaves.rows(temperature=0.6)
    found = torch.autograd.grad(rows, inputs, p.upstreams)
    noise = gumbel.noise(SEED, 24, 101).to(device).view(4, 6, 101)
    logits = torch.nn.functional.log_softmax(leaves.hidden @ leaves.weight.T + leaves.bias, -1)
    y = ((logits + noise) / 0.6).softmax(-1)
    hard = one_hot(y.argmax(-1), 101).double() - y.detach() + y
    expected = [hard @ table for table in tables]
    for a, b in zip(rows, expected, strict=True):
        torch.testing.assert_close(a, b)
    exact = torch.autograd.grad(expected, inputs, p.upstreams)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert b.norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)
def test_tables_that_learn(device: str, dtype: torch.dtype) -> None:
    """As an embedding layer; a table whose rows nobody used gets none."""
    p = problem(40, columns=13, dtype=dtype, device=device)
    tables = [t.clone().requires_grad_() for t in p.tables]
    first, second, ids = p._replace(tables=tuple(tables)).rows(return_ids=True)
    (gradient,) = torch.autograd.grad(first, tables[:1], p.upstreams[:1], retain_graph=True)
    layer = p.tables[0].double().requires_grad_()
    (exact,) = torch.autograd.grad(layer[ids], layer, p.upstreams[0].double())
    assert gradient.dtype == dtype
    assert (gradient.double() - exact).norm() <= (2.0**-8 if dtype == torch.bfloat16 else 1e-6) * exact.norm()
    assert torch.autograd.grad(first, tables[1], p.upstreams[0], allow_unused=True, retain_graph=True) == (None,)
    assert second.grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=describe)
def test_tiles(device: str, dtype: torch.dtype) -> None:
    """The noise of a row does not depend on them; they are of equal height."""
    p = problem(37, dtype=dtype, device=device)
    most = tile_bytes(10, 101, 101) + (tile_bytes(10, 101, size=2) if dtype == torch.bfloat16 else 0)
    whole = check(p)
    with small_tiles(), counted_products() as products:
        assert torch.equal(check(p, max_tile_bytes=most), whole)
    assert [m for m, _, _ in products][:4] == [10, 10, 10, 7]


def test_one_row_at_a_time(device: str) -> None:
    p = problem(9, device=device)
    with small_tiles():
        assert torch.equal(check(p, max_tile_bytes=1), check(p))


def test_float16_has_room(device: str) -> None:
    """Gradients of 1e-6, divided by a batch, and of 1e4."""
    for scale in (1e-6, 1e4):
        p = problem(12, dtype=torch.float16, tables=torch.float32, device=device)
        p = p._replace(upstreams=tuple([scale * u for u in p.upstreams]))
        leaves = p.leaves("weight", "bias")
        hidden = leaves.hidden.detach().float().requires_grad_()
        rows = leaves._replace(hidden=hidden.half()).rows()
        (gradient,) = torch.autograd.grad(rows, hidden, p.upstreams)
        exact = gumbel_cases.truth(p).gradients["hidden"]
        smallest = 2.0**-24 * exact.numel() ** 0.5
        assert (float64(gradient) - exact).norm() <= 1e-3 * exact.norm() + smallest


def test_a_padded_vocabulary(device: str) -> None:
    """The head and one table have rows that no other has."""
    p = problem(9, columns=101, device=device)
    wide = problem(9, columns=104, device=device, bias=False)
    head = torch.cat([p.weight, wide.weight[101:] * 100])
    bias = torch.cat([p.bias, p.bias.new_full((3,), 50.0)])
    padded = p._replace(weight=head, bias=bias, tables=(wide.tables[0].clone(), p.tables[1]))
    padded.tables[0][:101] = p.tables[0]
    leaves = padded.leaves()
    *rows, ids = leaves.rows(return_ids=True)
    check_choice(p, ids)
    gradients = leaves.gradients(tuple(rows))
    for name in ("weight", "bias"):
        assert gradients[name].shape[0] == 104
        assert not gradients[name][101:].any()
        gradients[name] = gradients[name][:101]
    check_gradients(p, gradients)


def test_undefined_rows_show(device: str) -> None:
    """In value and gradient, and no other row's."""
    p = problem(6, device=device)
    p.hidden[2, 0], p.hidden[4] = NAN, INF
    table = p.tables[0].clone().requires_grad_()
    leaves = p._replace(tables=(table, p.tables[1])).leaves("weight", "bias")
    first, second, ids = leaves.rows(return_ids=True)
    wrong = torch.tensor([False, False, True, False, True, False], device=device)
    for rows in (first, second):
        assert torch.equal(rows.isnan().all(1), wrong)
        assert torch.equal(rows.isnan().any(1), wrong)
    assert ids.min() >= 0
    hidden, of_table = torch.autograd.grad((first, second), (leaves.hidden, table), p.upstreams)
    assert torch.equal(hidden.isnan().any(1), wrong)
    assert of_table[ids[wrong]].isnan().all()
    masked = problem(6, device=device)
    masked.bias.fill_(-INF)
    assert all(rows.isnan().all() for rows in masked.rows())


def test_no_rows(device: str) -> None:
    p = problem(0, device=device)
    leaves = p.leaves()
    first, _, ids = leaves.rows(return_ids=True)
    assert first.shape == (0, 8)
    assert ids.shape == (0,)
    rows = leaves.rows()
    assert not any(g.any() for g in leaves.gradients(rows).values())


def test_shapes_and_strides(device: str) -> None:
    p = problem(2, 3, 4, device=device)
    first, second = p.rows()
    assert first.shape == (2, 3, 4, 8)
    assert second.shape == (2, 3, 4, 17)
    strided = p._replace(hidden=torch.cat([p.hidden, p.hidden], 2)[:, :, :4])
    assert torch.equal(strided.rows()[0], first)
    (one,) = p._replace(hidden=p.hidden[0, 0, 0], tables=p.tables[:1]).rows()
    assert one.shape == (8,)


# -------------------------------------------------- seeds


def test_seeds_of_generators() -> None:
    p, draw = problem(50), torch.Generator()

    def ids(**options: Any) -> list[int]:
        found: list[int] = p.rows(**{"seed": None, "return_ids": True, **options})[-1].tolist()
        return found

    torch.manual_seed(3)
    first, second = ids(), ids()
    torch.manual_seed(3)
    assert ids() == first != second
    assert ids(generator=draw.manual_seed(1)) == ids(generator=draw.manual_seed(1)) != ids(generator=draw)
    assert ids(seed=5) == ids(seed=torch.tensor(5)) != ids(seed=6)


def test_backward_again_and_no_second_derivative(device: str) -> None:
    p = problem(7, device=device)
    leaves = p.leaves()
    rows = leaves.rows()
    once, again = (leaves.gradients(rows, retain_graph=True) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
    with pytest.raises(RuntimeError, match="no second derivative"):
        leaves.gradients(rows, create_graph=True)


def test_without_gradients(device: str) -> None:
    p = problem(7, device=device)
    with torch.no_grad():
        rows = p.leaves().rows()
    assert not any(x.requires_grad for x in rows)
    assert torch.equal(rows[0], p.rows()[0])
    assert not p.rows()[0].requires_grad


def test_autocast(device: str) -> None:
    """Operands in bfloat16, each gradient in the dtype of its input."""
    p = problem(3, 5, device=device)
    half = p._replace(hidden=p.hidden.bfloat16(), weight=p.weight.bfloat16())
    half = half._replace(tables=tuple([t.bfloat16() for t in p.tables]))
    half = half._replace(upstreams=tuple([t.bfloat16() for t in p.upstreams]))
    leaves = p._replace(upstreams=tuple([t.float() for t in half.upstreams])).leaves()
    with torch.autocast(device, torch.bfloat16):
        *rows, ids = leaves.rows(return_ids=True)
    assert torch.equal(rows[0], p.tables[0][ids])
    check_choice(half, ids)
    gradients = leaves.gradients(tuple(rows))
    gumbel_cases.assert_gradients(gradients, p, gumbel_cases.truth(half, dtype=torch.bfloat16), dtype=torch.bfloat16)


def test_inference_tensors_and_a_temperature_on_the_device(device: str) -> None:
    p = problem(5, device=device)
    with torch.inference_mode():
        tables = tuple([t.clone() for t in p.tables])
    temperature = torch.tensor(0.5, device=device)
    check(p._replace(tables=tables), temperature=temperature)


@pytest.mark.skipif(EMULATED or INTERPRETED, reason="measures the process")
def test_memory_does_not_grow_with_rows_times_columns() -> None:
    """Products and operators see a tile, whatever the rows."""
    p = problem(600, columns=3000, hidden=8, widths=(4,))
    leaves, seen = p.leaves(), []
    with small_tiles(), counted_products() as products:
        leaves.gradients(leaves.rows(max_tile_bytes=tile_bytes(64, 3000, 3000)))
    seen = [max(m, k) for m, k, _ in products if m != 3000]
    assert max(m for m, k, n in products if n == 3000) <= 64
    assert len(seen) >= 20


def made(**changes: Any) -> Problem:
    return problem(5)._replace(**changes)


P = problem(5)


@pytest.mark.parametrize(
    ("changes", "options", "error", "match"),
    [
        ({"hidden": P.hidden.long()}, {}, TypeError, "hidden must be float16"),
        ({"hidden": [1.0]}, {}, TypeError, "hidden must be a tensor, not list"),
        ({"weight": P.weight[:, :-1]}, {}, ValueError, r"weight must have the shape \(V, 24\)"),
        ({"weight": P.weight.double()}, {}, TypeError, "weight must be torch.float32 like the hidden states"),
        ({"weight": None}, {}, TypeError, "weight must be a tensor"),
        ({"bias": P.bias[:-1]}, {}, ValueError, r"bias must have the shape \(101,\)"),
        ({"tables": ()}, {}, ValueError, "embeddings must be at least one table"),
        ({"tables": (P.tables[0], P.tables[1][:40])}, {}, ValueError, r"embeddings\[1\] must have a row for each .*40"),
        ({"tables": (P.tables[0].long(),)}, {}, TypeError, r"embeddings\[0\] must be float16.*int64"),
        ({"tables": (P.tables[0][0],)}, {}, ValueError, r"embeddings\[0\] must have the shape \(V, E\), not \(8,\)"),
        ({"tables": ("wte",)}, {}, TypeError, r"embeddings\[0\] must be a tensor, not str"),
        ({}, {"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({}, {"temperature": torch.ones(3)}, ValueError, "temperature must be a number or a real 0-d tensor"),
        ({}, {"tau": 1.0}, TypeError, r"gumbel_rows has no option tau \(temperature\?\)"),
        ({}, {"seed": 0.5}, TypeError, "seed must be an integer"),
        ({}, {"seed": 1 << 64}, ValueError, "seed must be an integer of 64 bits"),
        ({}, {"seed": torch.tensor([1])}, ValueError, r"seed must be an integer or a 0-d int64 tensor.*\(1,\)"),
        ({}, {"generator": torch.Generator()}, ValueError, "seed and generator"),
        ({}, {"max_tile_bytes": 0}, ValueError, "max_tile_bytes must be at least 1"),
        ({}, {"return_ids": "no"}, TypeError, "return_ids must be True or False"),
    ],
)
def test_bad_arguments(changes: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        made(**changes).rows(**options)
