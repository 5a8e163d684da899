"""gumbel_rows under torch.compile and with fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import fresh_compiler, graph  # noqa: F401
from families import describe
from gumbel_cases import SEED, check_gradients, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedkd


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)
def test_one_graph(device: str, dtype: torch.dtype) -> None:
    p = problem(3, 5, dtype=dtype, device=device)
    leaves = p.leaves()
    eager = leaves.rows(return_ids=True, temperature=0.5)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return fusedkd.gumbel_rows(hidden, weight, *p.tables, bias=bias, seed=SEED, return_ids=True, **options)

    *rows, ids = graph(step)(leaves.hidden, leaves.weight, leaves.bias, temperature=0.5)
    assert torch.equal(ids, eager[-1])
    assert all(torch.equal(a, b) for a, b in zip(rows, eager, strict=False))
    check_gradients(p, leaves.gradients(tuple(rows)), temperature=0.5)


def test_a_seed_that_is_a_tensor(device: str) -> None:
    """A layer before, a loss after, a table that learns, in one graph."""
    p = problem(30, device=device)
    layer = (torch.randn(24, 24, generator=torch.Generator().manual_seed(1)) / 5).to(device)

    def step(layer: Tensor, table: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(p.hidden @ layer)
        first, second, ids = fusedkd.gumbel_rows(hidden, p.weight, table, p.tables[1], seed=seed, return_ids=True)
        return first.square().sum() + (second * p.upstreams[1]).sum(), ids

    compiled = graph(step)
    for seed in (torch.tensor(SEED, device=device), torch.tensor(1, device=device)):
        results = []
        for function in (step, compiled):
            leaves = [layer.clone().requires_grad_(), p.tables[0].clone().requires_grad_()]
            loss, ids = function(*leaves, seed)
            results.append((loss, ids, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert results[0][2].norm() > 0.1


@pytest.mark.parametrize("tables", [1, 2, 3])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_graph_draws_anew_at_every_call(device: str, backend: str, tables: int) -> None:
    """Nothing requires a gradient: Dynamo takes another way then, on which it counts the arguments."""
    if backend == "inductor" and tables != 2:
        pytest.skip("one is enough")
    p = problem(30, widths=(8,) * tables, device=device)
    compiled = graph(lambda hidden: fusedkd.gumbel_rows(hidden, p.weight, *p.tables, return_ids=True), backend)
    drawn = [compiled(p.hidden)[-1].tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_fake_tensors(device: str) -> None:
    p = problem(3, 5, dtype=torch.bfloat16, device=device)
    with FakeTensorMode() as mode:
        hidden, weight = (mode.from_tensor(x).requires_grad_() for x in (p.hidden, p.weight))
        tables = [mode.from_tensor(t) for t in p.tables]
        first, second, ids = fusedkd.gumbel_rows(hidden, weight, *tables, return_ids=True)
        (first.sum() + second.sum()).backward()
    assert (first.shape, second.shape, ids.shape) == ((3, 5, 8), (3, 5, 17), (3, 5))
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
