"""Straight-through samples from a head over the vocabulary, as rows of embedding tables."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.call import real_tensor
from fusedkd.backends.layout import GumbelStat
from fusedkd.backends.linear_loop import tile_size
from fusedkd.backends.products import row_bytes
from fusedkd.backends.schema import accumulation_dtype
from fusedkd.checks import Real
from fusedkd.losses.common import refuse_double_backward, save_for_backward
from fusedkd.losses.names import by_name
from fusedkd.losses.tiles import Tiles

ops = torch.ops.fusedkd


@by_name
def gumbel_rows(
    hidden: Tensor,
    weight: Tensor,
    *embeddings: Tensor,
    bias: Tensor | None = None,
    temperature: Real = 1.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    max_tile_bytes: int | None = None,
    return_ids: bool = False,
) -> tuple[Tensor, ...]:
    """Draws a token per row from softmax(hidden · weightᵀ + bias) and returns its rows of the embedding tables,
    differentiable by the straight-through Gumbel-softmax estimator (Jang et al. 2017, arXiv:1611.01144, §2.2): the
    generator of MATE-KD (arXiv:2105.05912, §3.1), which student and teacher read.

    Forward: id = argmax(logits + Gumbel noise), and row `id` of each table. Backward, as if the row had been y·table
    with y = softmax((logits + noise)/T): ∂loss/∂logits = y·(r − Σ y·r)/T, r = Σ_m G_m·E_mᵀ over the tables E_m and the
    gradients G_m of their rows. That is ``torch.nn.functional.gumbel_softmax(logits, tau=T, hard=True) @ table`` in
    value and gradient, but nothing of size N × V exists: logits come and go a tile of rows at a time, and the noise is
    made again in backward from a seed of 64 bits (:func:`fusedkd.reference.gumbel.noise`), the same on every device.

    Only the rows that are passed are worked on: pass the positions where a token is to be drawn, ``hidden[masked]``,
    and put the result where the embeddings of these positions belong.

    Args:
        hidden: ``(*, H)``, float16, bfloat16, float32 or float64: what the generator's head is given.
        weight: ``(V, H)``, of that type, as :attr:`torch.nn.Linear.weight`; under autocast of any.
        embeddings: one or more tables ``(V, E_m)``, of any floating-point type. Where V differs by padding, tokens are
            drawn from the columns that all have. Those that require a gradient get that of an embedding layer.
        bias: ``(V,)``; −inf where a token must not be drawn.
        temperature: T > 0 of the relaxed gradient, a number or a 0-d tensor. The choice does not depend on it.
        generator: of the seed, on the device of `hidden`; None: PyTorch's own.
        seed: instead of drawing one: an integer, or a 0-d int64 tensor on the device of `hidden`. Row i of the call has
            the noise of row i of this seed, however the call is tiled.
        max_tile_bytes: what the two tiles of logits and of r may take together; as in :func:`linear_kd_loss`.
        return_ids: also return the ids.

    Returns:
        A tuple of the rows ``(*, E_m)`` of each table in its type; last, if asked for, the ids ``(*)``, int64. A row
        whose softmax is not defined, because a logit is NaN or +inf or all are −inf, is NaN, and so is its gradient.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
        RuntimeError: at a second backward through the first.
    """
    check.float_rows("hidden", hidden)
    check.plain("weight", weight)
    if bias is not None:
        check.plain("bias", bias)
    check.head("", hidden, weight, bias)
    columns = _columns(hidden, weight, embeddings)
    check.real("temperature", temperature, open_low=True)
    check.flag("return_ids", return_ids)
    tiles = Tiles(max_tile_bytes, torch.float32, None)
    tiles.check()
    device, lead = hidden.device, hidden.shape[:-1]
    cast = check.autocast_dtype(device)
    dtype = hidden.dtype if cast is None or hidden.dtype == torch.float64 else cast
    if cast is None and dtype == torch.float64:
        cast = dtype
    exact = accumulation_dtype(dtype)
    bytes_per_row = 2 * row_bytes(columns, exact) + (row_bytes(columns, dtype) if dtype != exact else 0)
    plan = GumbelPlan(
        tile=tiles.rows(bytes_per_row, lead.numel(), tile_size(device, dtype, torch.float32)),
        dtype=dtype,
        operands=tuple([_operand_type(table.dtype, exact, cast) for table in embeddings]),
    )
    *rows, ids = GumbelRowsFunction.apply(
        plan,
        hidden.reshape(lead.numel(), hidden.shape[-1]),
        _first(columns, weight),
        None if bias is None else _first(columns, bias),
        _seed(seed, generator, device),
        real_tensor(temperature, device),
        *[_first(columns, table) for table in embeddings],
    )
    found = [each.view(*lead, each.shape[-1]) for each in rows]
    return (*found, ids.view(lead)) if return_ids else tuple(found)


def _columns(hidden: Tensor, weight: Tensor, embeddings: tuple[Tensor, ...]) -> int:
    """What the head and all tables have of the vocabulary."""
    if not embeddings:
        raise ValueError("embeddings must be at least one table (V, E), but none is given")
    for i, table in enumerate(embeddings):
        name = f"embeddings[{i}]"
        check.plain(name, table)
        if table.dtype not in check.FLOATING:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, not {table.dtype}")
        if table.dim() != 2 or table.shape[1] == 0:
            raise ValueError(f"{name} must have the shape (V, E), not {tuple(table.shape)}")
        if table.device != hidden.device:
            raise ValueError(f"{name} must be on the hidden states' device {hidden.device}, not {table.device}")
        small, large = sorted((table.shape[0], weight.shape[0]))
        if large > check.most_padded(small):
            raise ValueError(
                f"{name} must have a row for each of the {weight.shape[0]} columns of weight, but for padding, "
                f"not {table.shape[0]}"
            )
    return min([weight.shape[0], *[table.shape[0] for table in embeddings]])


def _first(rows: int, x: Tensor) -> Tensor:
    """Some rows; all of them as they are, for a view would copy its gradient."""
    return x if x.shape[0] == rows else x[:rows]


def _operand_type(table: torch.dtype, exact: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    """Of the product r, whose result is `exact`: the table's, or what autocast makes of it."""
    if exact == torch.float64:
        return exact
    if cast is not None:
        return cast
    return exact if table == torch.float64 else table


def _seed(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """0-d int64 on the device, which is not waited for."""
    if seed is None:
        if generator is not None and generator.device.type != device.type:
            raise ValueError(f"generator must be on the hidden states' device {device}, not on {generator.device}")
        return torch.randint(0, (1 << 63) - 1, (), generator=generator, device=device)
    if generator is not None:
        raise ValueError("seed and generator are two ways to say the same: pass one of them")
    if not isinstance(seed, Tensor):
        check.integer("seed", seed)
        return torch.full((), seed, dtype=torch.int64, device=device)
    check.plain("seed", seed)
    if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed must be an integer or a 0-d int64 tensor on {device}, not a tensor of shape {tuple(seed.shape)}, "
            f"{seed.dtype}, on {seed.device}"
        )
    return seed


class GumbelPlan(NamedTuple):
    """What is decided on the host before an operator starts."""

    tile: int
    dtype: torch.dtype
    """Of the operands of the products with the head."""
    operands: tuple[torch.dtype, ...]
    """Of those with each table."""


class GumbelRowsFunction(torch.autograd.Function):
    """(rows of each table …, ids) of hidden states, weight, bias, seed, temperature and the tables. The logits are made
    again in backward.
    """

    @staticmethod
    def forward(ctx: Any, plan: GumbelPlan, *tensors: Any) -> tuple[Tensor, ...]:  # two parameters: losses/common.py
        hidden, weight, bias, seed, temperature, *tables = tensors
        ids, stats = ops.gumbel_ids(
            hidden=hidden,
            weight=weight,
            bias=bias,
            seed=seed,
            temperature=temperature,
            tile=plan.tile,
            dtype=plan.dtype,
        )
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ids)
        save_for_backward(ctx, hidden, weight, bias, seed, temperature, ids, stats, *tables)
        undefined = _undefined(stats)
        return *[table[ids].masked_fill(undefined, torch.nan) for table in tables], ids

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, bias, seed, temperature, ids, stats, *tables = ctx.saved_tensors
        plan, wanted = ctx.plan, list(ctx.needs_input_grad[1:4])
        given = [i for i, upstream in enumerate(upstreams[:-1]) if upstream is not None]
        gradients: list[Tensor | None] = [None] * 3
        if any(wanted) and given:
            found = ops.gumbel_gradients(
                upstreams=[upstreams[i].to(plan.operands[i]).contiguous() for i in given],  # type: ignore[union-attr]
                tables=[tables[i].to(plan.operands[i]) for i in given],
                ids=ids,
                stats=stats,
                hidden=hidden,
                weight=weight,
                bias=bias,
                seed=seed,
                temperature=temperature,
                tile=plan.tile,
                dtype=plan.dtype,
                wanted=wanted,
            )
            inputs = zip(found, (hidden, weight, bias), wanted, strict=True)
            gradients = [gradient.to(x.dtype) if want else None for gradient, x, want in inputs]
        of_tables: list[Tensor | None] = [None] * len(tables)
        for i in given:
            if ctx.needs_input_grad[6 + i]:
                of_tables[i] = _table_gradient(upstreams[i], tables[i], ids, stats)  # type: ignore[arg-type]
        return None, *gradients, None, None, *of_tables


def _undefined(stats: Tensor) -> Tensor:
    """``(N, 1)``: the rows without a softmax, whose sum of exponentials is NaN, or 0 of nothing but −inf."""
    return (stats[:, GumbelStat.NOISY_SUM] > 0).logical_not().unsqueeze(1)


def _table_gradient(upstream: Tensor, table: Tensor, ids: Tensor, stats: Tensor) -> Tensor:
    """That of an embedding layer, summed in float32 at least and in the same order every time."""
    rows = upstream.to(torch.promote_types(table.dtype, torch.float32)).masked_fill(_undefined(stats), torch.nan)
    return torch.ops.aten.embedding_dense_backward(rows, ids, len(table), -1, False).to(table.dtype)
