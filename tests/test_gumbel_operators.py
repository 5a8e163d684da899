"""The noise of gumbel_rows, the same everywhere, and its operators on given logits: choice, statistics, gradient."""

from __future__ import annotations

import math

import pytest
import torch
from families import describe
from gumbel_cases import SEED
from torch import Tensor
from truth import INTERPRETED, float64

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


@pytest.mark.parametrize("dtype", EXACT)
def test_a_sure_row_keeps_its_digits(dtype: torch.dtype, device: str) -> None:
    """One column has all but 1e-10 of y: Σ y·r is r of that one to float32, the gradient is not."""
    logits = torch.zeros(1, 3, 600, device=device, dtype=dtype)
    logits[0, :, 77] = 60.0
    slopes = torch.randn(1, 3, 600, generator=torch.Generator().manual_seed(0)).to(device, dtype) + 5
    given = {"seed": torch.tensor(5, device=device), "temperature": double(2.0, device), "first_row": 0}
    ids, stats = ops.gumbel_forward(logits=logits, **given)
    assert (ids == 77).all()
    noisy = (logits[0].cpu() + gumbel.noise(5, 3, 600)).double()
    exact = gumbel.relaxed_gradient(noisy, slopes[0].cpu().double(), 2.0)
    ops.gumbel_backward(logits=logits, slopes=slopes, ids=ids, stats=stats, scale=double(0.5, device), **given)
    unit = 2e-6 if dtype == torch.float32 else 1e-14  # of e^−30, whose argument is rounded
    assert (float64(logits[0]) - exact).norm() <= unit * exact.norm()
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
