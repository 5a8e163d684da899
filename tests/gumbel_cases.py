"""What `gumbel_rows` is held to: for the noise of the seed, the choice and the relaxed gradient of
`fusedkd.reference.gumbel` in float64, the gradient by the rule of `linear_cases.py`.

S of a row is (‖y·r‖ + ‖y‖·|Σ y·r|)/T, the norms of the two terms subtracted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from linear_cases import PHASES, LinearTruth, assert_gradients, projected
from torch import Tensor
from truth import Term, float64

import fusedkd
from fusedkd.reference import gumbel

SEED = -(1 << 40) - 12345


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tables: tuple[Tensor, ...]
    upstreams: tuple[Tensor, ...]
    """The gradient of the rows of each table."""

    @property
    def operands(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: x for name, x in named.items() if x is not None}

    def leaves(self, *frozen: str) -> Problem:
        copies = {k: x.detach().clone().requires_grad_(k not in frozen) for k, x in self.operands.items()}
        return self._replace(**copies)

    def rows(self, **options: Any) -> tuple[Tensor, ...]:
        return fusedkd.gumbel_rows(self.hidden, self.weight, *self.tables, bias=self.bias, **{"seed": SEED, **options})

    def gradients(self, rows: tuple[Tensor, ...], **options: Any) -> dict[str, Tensor]:
        wanted = {k: x for k, x in self.operands.items() if x.requires_grad}
        rows = rows[: len(self.tables)]
        found = torch.autograd.grad(rows, list(wanted.values()), self.upstreams, **options)
        return dict(zip(wanted, found, strict=True))


def problem(
    *lead: int,
    hidden: int = 24,
    columns: int = 101,
    widths: tuple[int, ...] = (8, 17),
    dtype: torch.dtype = torch.float32,
    tables: torch.dtype | None = None,
    device: str = "cpu",
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """Logits of spread 2; some tokens are never drawn."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    offset = normal(columns)
    offset[3::11] = -torch.inf
    kind = tables or dtype
    return Problem(
        normal(*lead, hidden),
        normal(columns, hidden, scale=2 / hidden**0.5),
        offset if bias else None,
        tuple([normal(columns, width, dtype=kind) for width in widths]),
        tuple([normal(*lead, width, dtype=kind) for width in widths]),
    )


def noisy_logits(p: Problem, seed: int = SEED) -> Tensor:
    """Float64 ``(N, V)``, with the noise of the kernels."""
    logits = projected(p.hidden, p.weight, p.bias).reshape(-1, p.weight.shape[0])
    return logits + gumbel.noise(seed, *logits.shape)


def truth(p: Problem, temperature: float = 1.0, dtype: torch.dtype | None = None, seed: int = SEED) -> LinearTruth:
    """The gradients. `dtype`: of the arithmetic's operands, where it is not the hidden states'."""
    dtype = dtype or p.hidden.dtype
    x, weight = float64(p.hidden).reshape(-1, p.hidden.shape[-1]), float64(p.weight)
    noisy = noisy_logits(p, seed)
    y = (noisy / temperature).softmax(1)
    r = sum(float64(g).reshape(len(x), -1) @ float64(e).T for g, e in zip(p.upstreams, p.tables, strict=True))
    assert isinstance(r, Tensor)
    g = gumbel.relaxed_gradient(noisy, r, temperature)
    rows = ((y * r).norm(dim=1) + y.norm(dim=1) * (y * r).sum(1).abs()) / temperature
    unit = 2.0 ** g.abs().max().log2().floor()
    once = [float64((g / unit * phase).to(dtype)) * unit / phase for phase in PHASES]

    def pulled(g: Tensor) -> dict[str, Tensor]:
        found = {"hidden": (g @ weight).view(p.hidden.shape), "weight": g.T @ x, "bias": g.sum(0)}
        return {name: found[name] for name in p.operands}

    if dtype != torch.float64:  # the product and the sum with the noise round x, and x/T shows in y
        sizes = x.norm(dim=1) * weight.norm(dim=1).max() + noisy.clamp(min=0).amax(1)
        rows = rows * (1 + 2.0**-23 / 1e-6 * sizes / temperature)
    subtracted = {
        "hidden": rows * weight.norm(dim=-1).max(),
        "weight": (rows * x.norm(dim=-1)).norm(),
        "bias": rows.norm(),
    }
    none = Term(rows, rows)
    return LinearTruth(none, none, none, pulled(g), subtracted, [pulled(g) for g in once], rows != 0)


def check(p: Problem, *frozen: str, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """Choice, rows and gradients of one call; the ids."""
    leaves = p.leaves(*frozen)
    *rows, ids = leaves.rows(return_ids=True, **options)
    assert ids.shape == p.hidden.shape[:-1]
    assert not ids.requires_grad
    check_choice(p, ids, dtype)
    for each, table in zip(rows, p.tables, strict=True):
        assert torch.equal(each, table[ids])
    check_gradients(p, leaves.gradients(tuple(rows)), dtype=dtype, **options)
    return ids


def check_gradients(
    p: Problem, gradients: dict[str, Tensor], dtype: torch.dtype | None = None, temperature: Any = 1.0, **_: Any
) -> None:
    assert_gradients(gradients, p, truth(p, float(temperature), dtype), dtype=dtype)


def check_choice(p: Problem, ids: Tensor, dtype: torch.dtype | None = None) -> None:
    """The highest column, but for what products round."""
    noisy = noisy_logits(p)
    chosen = noisy.gather(1, ids.cpu().reshape(-1, 1)).squeeze(1)
    size = float64(p.hidden).reshape(len(noisy), -1).norm(dim=1) * float64(p.weight).norm(dim=1).max() + 25
    unit = 2.0**-51 if (dtype or p.hidden.dtype) == torch.float64 else 2.0**-22
    assert ((noisy.amax(1) - chosen) <= unit * size).all()


def operator_arguments(device: str) -> dict[str, list[dict[str, Any]]]:
    """Arguments for every operator, with and without what is optional."""
    ops, found = torch.ops.fusedkd, {}
    for name in ("forward", "backward", "ids", "gradients"):
        found[f"gumbel_{name}"] = []
    shared = {"seed": torch.tensor(SEED, device=device), "temperature": torch.tensor(0.5).double().to(device)}
    forms = (torch.bfloat16, True, [True, True, True]), (torch.float64, False, [False, True, False])
    for dtype, bias, wanted in forms:
        p = problem(7, dtype=dtype, bias=bias, device=device)
        linear = {**shared, "hidden": p.hidden, "weight": p.weight, "bias": p.bias, "tile": 3, "dtype": dtype}
        ids, stats = ops.gumbel_ids(**linear)
        found["gumbel_ids"].append(linear)
        rows = {"ids": ids, "stats": stats}
        upward = {"upstreams": p.upstreams, "tables": p.tables, "wanted": wanted}
        found["gumbel_gradients"].append({**linear, **rows, **upward})
        logits, slopes = torch.randn(2, 1, 7, 110, device=device).to(stats.dtype)[:, :, :, :101]
        found["gumbel_forward"].append({**shared, "logits": logits, "first_row": 2})
        given = {**shared, **rows, "slopes": slopes, "scale": shared["temperature"], "first_row": 2}
        found["gumbel_backward"].append({**given, "logits": logits})
    return found
