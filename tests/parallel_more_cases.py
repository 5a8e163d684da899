"""More of what `test_parallel.py` runs on each rank: heads, DTensors, divergences without a kernel, errors, and what it
costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import samples, top_k
from linear_cases import HALF, assert_gradients, linear_truth, logits_of, problem, small_tiles, tile_bytes
from parallel_cases import ROWS, Rank, V, case, cut, rows
from torch import Tensor, nn
from truth import assert_value

import fusedkd
from fusedkd import TeacherHead, kd_loss, linear_kd_loss
from fusedkd.backends import gathered

# -------------------------------------------------- a divergence without a kernel


@dataclass(frozen=True)
class Hellinger(fusedkd.Divergence):
    """½·Σ(√p − √q)², of which each rank computes whole rows."""

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return 0.5 * ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)


def gathered_rows(ranks: Rank, **options: Any) -> None:
    """In tiles of three rows, the last shard shorter; against one process."""
    student, teacher, labels = rows(101)
    span, options = ranks.span(101), {"divergence": Hellinger(), "temperature": 2.0, "ce_weight": 0.5, **options}
    whole, own = (x.clone().requires_grad_() for x in (student, student[:, span]))
    expected = kd_loss(whole, teacher, labels, **options)
    up = torch.linspace(1, 2, ROWS) if expected.dim() else torch.tensor(0.3)
    tile, gathered.TILE = gathered.TILE, 303
    with pytest.warns(UserWarning, match="logits of all ranks are gathered"):
        loss = kd_loss(own, teacher[:, span], labels, vocab_group=ranks.group, vocab_size=101, **options)
    loss.backward(up)
    gathered.TILE = tile
    expected.backward(up)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.cat(ranks.together(own.grad), -1), whole.grad)


case(gathered_rows)
case(gathered_rows, reduction="none")


# -------------------------------------------------- hidden states and heads


FORMS: dict[str, Callable[[Any], Any]] = {
    "head": lambda p: p.teacher,
    "logits": lambda p: fusedkd.TeacherLogits(logits_of(p), 30.0, 0.9),
    "top_k": lambda p: top_k(logits_of(p), 10, "bucket"),
    "samples": lambda p: samples(logits_of(p) / 2, 20),
    "list": lambda p: [p.teacher, top_k(logits_of(p), 10)],
}


def linear(
    ranks: Rank,
    form: str = "head",
    *,
    columns: int = V,
    stored: int | None = None,
    biased: bool = True,
    frozen: str = "",
    upstream: Any = 1.0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """linear_kd_loss of each rank's rows of the heads: its hidden states' gradient is that of one process on each rank,
    not the rank's share of it, nor the ranks' sum of sums.
    """
    p = problem(ROWS, columns=(columns, columns), dtype=dtype, bias=biased)
    p = p._replace(labels=rows(columns)[2], teacher=FORMS[form](p))
    truth = linear_truth(p, upstream=upstream, **options)
    span = ranks.span(columns, stored)

    def padding(x: Tensor) -> Tensor:
        surplus = 0 if stored is None else stored - len(x)
        return torch.cat([x, x.new_full((surplus, *x.shape[1:]), torch.nan)])

    local = p._replace(
        weight=padding(p.weight[span]),
        bias=None if p.bias is None else padding(p.bias[span]),
        teacher=_head_of(p.teacher, span, padding),
    ).leaves(*[frozen] if frozen else [])
    size = None if columns % ranks.ranks == 0 and stored is None else columns
    with small_tiles():
        loss = local.loss(vocab_group=ranks.group, vocab_size=size, **options)
    assert_value(loss, truth.loss)
    loss.backward(torch.as_tensor(upstream).to(loss).expand_as(loss))
    found = {"hidden": local.hidden.grad}
    own = span.stop - span.start
    for name in ("weight", "bias"):
        x = local.operands.get(name)
        if x is not None and x.requires_grad:
            assert not x.grad[own:].any(), "padding has a gradient"
            found[name] = torch.cat(ranks.together(x.grad[:own]))
    if local.hidden.requires_grad:
        assert all(torch.equal(each, local.hidden.grad) for each in ranks.together(local.hidden.grad))
    assert_gradients({name: x for name, x in found.items() if x is not None}, p, truth)


def _head_of(teacher: Any, span: slice, padding: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(teacher, list):
        return [_head_of(each, span, padding) for each in teacher]
    if isinstance(teacher, TeacherHead):
        bias = None if teacher.bias is None else padding(teacher.bias[span])
        return TeacherHead(teacher.hidden, padding(teacher.weight[span]), bias, teacher.softcap, teacher.scale)
    return cut(teacher, span)


TILES = {"max_tile_bytes": tile_bytes(3, 101, 101)}
for form in FORMS:
    case(linear, form, ce_weight=0.5)
    case(linear, form, columns=101, ce_weight=0.5, label_smoothing=0.1, biased=False)
for reduction in ("mean", "sum", "none"):
    case(linear, divergence="reverse_kl", ce_weight=0.5, reduction=reduction)
case(linear, "logits", divergence="dkd", reduction="none", upstream=-0.3)
case(linear, kd_normalizer=17.0, ce_weight=0.5, ce_normalizer=11.0, upstream=2.5)
case(linear, columns=97, stored=64, ce_weight=0.5)
case(linear, columns=5, ce_weight=0.5, biased=False)
case(linear, frozen="hidden", ce_weight=0.5)
case(linear, frozen="weight", ce_weight=0.5)
for dtype in (torch.float64, *HALF):
    case(linear, dtype=dtype, ce_weight=0.5, temperature=2.0)


def tiles(ranks: Rank) -> None:
    """Three rows at a time, on shards of different sizes."""
    linear(ranks, columns=101, divergence="jsd", ce_weight=0.5, temperature=2.0, max_tile_bytes=3 * 4 * 4 * 64)


case(tiles)


# -------------------------------------------------- DTensors


def mesh_of(ranks: Rank) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(ranks.group, "cpu")


def split(ranks: Rank, x: Tensor, dim: int) -> Any:
    """A parameter of which each rank has its part."""
    from torch.distributed.tensor import DTensor, Shard

    local = x.narrow(dim, 0, 0) if dim else x[:0]
    span = ranks.span(x.shape[dim])
    local = x[:, span] if dim else x[span]
    d = DTensor.from_local(
        local.contiguous(), mesh_of(ranks), [Shard(dim)], run_check=False, shape=x.shape, stride=x.stride()
    )
    return nn.Parameter(d)


def dtensor_logits(ranks: Rank, columns: int, vocabulary: int | None = None) -> None:
    """With as many padded columns as the vocabulary is shorter."""
    student, teacher, labels = rows(columns)
    size = vocabulary or columns
    labels = labels.where(labels < size, 1)
    whole = student.clone().requires_grad_()
    options = {"temperature": 2.0, "ce_weight": 0.5, "divergence": "skew_kl"}
    expected = kd_loss(whole[:, :size], teacher[:, :size], labels, **options)
    own, known = split(ranks, student, 1), split(ranks, teacher, 1).detach()
    loss = kd_loss(own, known, labels, vocab_size=vocabulary, **options)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert own.grad.placements == own.placements
    torch.testing.assert_close(own.grad.full_tensor(), whole.grad)


def dtensor_head(ranks: Rank, replicated: bool) -> None:
    """Hidden states that are plain, the group said; or DTensors, which say all."""
    from torch.distributed.tensor import DTensor, Replicate

    p = problem(ROWS)
    whole = p.leaves()
    expected = whole.loss(ce_weight=0.5)
    hidden, more = p.hidden.clone(), {} if replicated else {"vocab_group": mesh_of(ranks)}
    if replicated:
        hidden = DTensor.from_local(hidden, mesh_of(ranks), [Replicate()])
    hidden.requires_grad_()
    weight, bias = split(ranks, p.weight, 0), split(ranks, p.bias, 0)
    t = p.teacher
    teacher = TeacherHead(t.hidden, split(ranks, t.weight, 0).detach(), split(ranks, t.bias, 0).detach())
    loss = linear_kd_loss(hidden, weight, teacher, p.labels, student_bias=bias, ce_weight=0.5, **more)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad.full_tensor() if replicated else hidden.grad, whole.hidden.grad)
    for actual, operand in ((weight, whole.weight), (bias, whole.bias)):
        assert actual.grad.placements == actual.placements
        torch.testing.assert_close(actual.grad.full_tensor(), operand.grad)


case(dtensor_logits, V)
case(dtensor_logits, 101)
case(dtensor_logits, V, 90)
case(dtensor_head, True)
case(dtensor_head, False)


class Headed(nn.Module):
    """A body and a head that tensor parallelism splits, whose forward is the loss."""

    def __init__(self, p: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(p.hidden.shape[1], p.hidden.shape[1]), nn.Linear(*reversed(p.weight.shape))

    def forward(self, x: Tensor, teacher: Any, labels: Tensor, group: Any) -> Tensor:
        hidden, head = self.body(x).tanh(), self.head
        options = {"student_bias": head.bias, "ce_weight": 0.5, "vocab_group": group}
        return linear_kd_loss(hidden, head.weight, teacher, labels, **options)


def with_fsdp(ranks: Rank) -> None:
    """A mesh of two dimensions: FSDP2 over the rows, the vocabulary split inside of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    if ranks.ranks < 4:  # a mesh is made by all processes
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    data, tensor = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
    p = problem(ROWS, columns=(V, V))
    p = p._replace(labels=p.labels.abs() % V)  # as many labelled rows in either half
    whole, model = Headed(p), Headed(p)
    parallelize_module(model, mesh["tp"], {"head": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    mine, span, t = (
        slice(data * ROWS // 2, (data + 1) * ROWS // 2),
        slice(tensor * V // 2, (tensor + 1) * V // 2),
        p.teacher,
    )
    teacher = TeacherHead(t.hidden[mine], t.weight[span], t.bias[span])
    model(p.hidden[mine], teacher, p.labels[mine], mesh["tp"]).backward()
    whole(p.hidden, t, p.labels, None).backward()
    for (name, found), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            found.grad.full_tensor(), expected.grad, msg=lambda text, name=name: f"{name}: {text}"
        )


case(with_fsdp)
