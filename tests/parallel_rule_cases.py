"""More of what `test_parallel.py` runs on each rank: accumulation, second backwards, what it costs, errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import top_k
from linear_cases import logits_of, problem
from parallel_cases import ROWS, Rank, V, case, rows
from parallel_more_cases import mesh_of, split
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import pair

import fusedkd
from fusedkd import TeacherHead, kd_loss, linear_kd_loss
from fusedkd.backends.layout import KernelId
from fusedkd.backends.shard import has_kernel

FUSED = has_kernel(KernelId.FORWARD_KL, torch.device("cpu"))

# -------------------------------------------------- what else is asked of it


def micro_batches(ranks: Rank) -> None:
    """With the normalisers of the whole batch, two halves have its gradient."""
    student, teacher, labels = rows()
    span, whole = ranks.span(V), student.clone().requires_grad_()
    options = {"temperature": 2.0, "ce_weight": 0.5, "divergence": "reverse_kl"}
    kd_loss(whole, teacher, labels, **options).backward()
    own, n = student[:, span].clone().requires_grad_(), float((labels >= 0).sum())
    for part in (slice(0, 3), slice(3, ROWS)):
        counts = {"kd_normalizer": n, "ce_normalizer": n, "vocab_group": ranks.group}
        kd_loss(own[part], teacher[part, span], labels[part], **options, **counts).backward()
    torch.testing.assert_close(torch.cat(ranks.together(own.grad), -1), whole.grad)


class Squared(fusedkd.Divergence):
    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1)


def values_of_each_row(ranks: Rank) -> None:
    """By the kernels, and where logits are gathered; a sum of both."""
    student, teacher, labels = rows()
    x = torch.linspace(0, 1, ROWS)
    options = {"temperature": 1 + x, "kd_weight": 2 * x, "divergence": [(0.5, fusedkd.JSD(x)), (1 - x, Squared())]}
    found = []
    for span, group in ((ranks.span(V), {"vocab_group": ranks.group}), (slice(None), {})):
        own = student[:, span].clone().requires_grad_()
        loss, terms = kd_loss(own, teacher[:, span], labels, ce_weight=0.5, return_terms=True, **options, **group)
        loss.backward()
        gradient = torch.cat(ranks.together(own.grad), -1) if group else own.grad
        found.append((loss.detach(), *terms, gradient))
    torch.testing.assert_close(*found)
    given = {"return_terms": True, "statistics": ["student_entropy"], "vocab_group": ranks.group}
    with pytest.raises(ValueError, match="statistics are not available for a split vocabulary"):
        kd_loss(student[:, ranks.span(V)], teacher[:, ranks.span(V)], **given)


def inplace(ranks: Rank, divergence: str) -> None:
    student, teacher, labels = rows()
    span, whole = ranks.span(V), student.clone().requires_grad_()
    options = {"divergence": divergence, "ce_weight": 0.5}
    kd_loss(whole, teacher, labels, **options).backward()
    leaf = student[:, span].clone().requires_grad_()
    logits = leaf * 1.0
    kd_loss(logits, teacher[:, span], labels, inplace=True, vocab_group=ranks.group, **options).backward()
    torch.testing.assert_close(torch.cat(ranks.together(leaf.grad), -1), whole.grad)


def twice(ranks: Rank) -> None:
    """A second backward, and one without a gradient in forward."""
    student, teacher, labels = rows()
    own = student[:, ranks.span(V)].clone().requires_grad_()
    loss = kd_loss(own, teacher[:, ranks.span(V)], labels, divergence="jsd", ce_weight=0.5, vocab_group=ranks.group)
    first, second = (torch.autograd.grad(2 * loss, own, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    with torch.no_grad():
        again = kd_loss(
            own, teacher[:, ranks.span(V)], labels, divergence="jsd", ce_weight=0.5, vocab_group=ranks.group
        )
    assert torch.equal(again, loss)


def head_in_kd_loss(ranks: Rank) -> None:
    p = problem(ROWS, columns=(V, V))
    z, span = logits_of(p) + 0.1, ranks.span(V)
    teacher = TeacherHead(p.teacher.hidden, p.teacher.weight[span], p.teacher.bias[span])
    loss = kd_loss(z[:, span], teacher, p.labels, divergence="total_variation", vocab_group=ranks.group)
    torch.testing.assert_close(loss, kd_loss(z, p.teacher, p.labels, divergence="total_variation"))


def module(ranks: Rank) -> None:
    student, teacher, _ = rows()
    span = ranks.span(V)
    loss = fusedkd.nn.KDLoss(temperature=2.0, vocab_group=ranks.group)
    torch.testing.assert_close(loss(student[:, span], teacher[:, span]), kd_loss(student, teacher, temperature=2.0))


def compiled(ranks: Rank) -> None:
    """The graph breaks where the loss is called."""
    student, teacher, labels = rows()
    own, whole = student[:, ranks.span(V)].clone().requires_grad_(), student.clone().requires_grad_()

    @torch.compile(backend="eager")
    def step(x: Tensor, y: Tensor) -> Tensor:
        return 2 * kd_loss(x * 1.0, y, labels, ce_weight=0.5, vocab_group=ranks.group)

    loss = step(own, teacher[:, ranks.span(V)])
    loss.backward()
    expected = 2 * kd_loss(whole, teacher, labels, ce_weight=0.5)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.cat(ranks.together(own.grad), -1), whole.grad)
    p, span = problem(ROWS, columns=(V, V), bias=False), ranks.span(V)
    t = TeacherHead(p.teacher.hidden, p.teacher.weight[span])
    linear = torch.compile(linear_kd_loss, backend="eager")
    found = linear(p.hidden, p.weight[span], t, p.labels, vocab_group=ranks.group)
    torch.testing.assert_close(found, linear_kd_loss(p.hidden, p.weight, p.teacher, p.labels))


def alone(ranks: Rank) -> None:
    """A group of one process has all columns, padding apart. Groups are made by all processes."""
    if ranks.ranks < torch.distributed.get_world_size():
        return
    student, teacher, labels = rows()
    groups = [torch.distributed.new_group([i]) for i in range(torch.distributed.get_world_size())]
    own = groups[torch.distributed.get_rank()]
    labels = labels.clamp(max=89)
    loss = kd_loss(student, teacher, labels, ce_weight=0.5, vocab_group=own, vocab_size=90)
    torch.testing.assert_close(loss, kd_loss(student[:, :90], teacher[:, :90], labels, ce_weight=0.5))


def checkpointed(ranks: Rank) -> None:
    """The gradient is computed in backward, from what a second forward call leaves."""
    student, teacher, labels = rows()
    span, whole = ranks.span(V), student.clone().requires_grad_()
    options = {"divergence": "jeffreys", "ce_weight": 0.5}
    kd_loss(whole, teacher, labels, **options).backward()
    own = student[:, span].clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda x: kd_loss(2 * x / 2, teacher[:, span], labels, vocab_group=ranks.group, **options),
        own,
        use_reentrant=False,
    )
    loss.backward()
    torch.testing.assert_close(torch.cat(ranks.together(own.grad), -1), whole.grad)


for function in (micro_batches, values_of_each_row, twice, head_in_kd_loss, module, compiled, checkpointed):
    case(function)
for name in ("forward_kl", "reverse_kl", "logit_mse"):
    case(inplace, name)
case(alone)


@contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """By this rank, in all-gathers; other collectives are an error here."""
    sent: list[int] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace in ("c10d", "_c10d_functional"):
                assert "allgather" in function._opname, function
                sent.append(args[1].numel() * args[1].element_size())
            return function(*args, **(kwargs or {}))

    with Count():
        yield sent


def what_crosses(ranks: Rank, sparse: bool) -> None:
    """At most 64 bytes a row, backward included, whatever the divergence."""
    if not FUSED:
        return
    student, teacher, labels = rows()
    own = student[:, ranks.span(V)].clone().requires_grad_()
    known = top_k(teacher, 10) if sparse else teacher[:, ranks.span(V)]
    for divergence in ("forward_kl", "reverse_kl"):
        with bytes_sent() as sent:
            kd_loss(own, known, labels, divergence=divergence, ce_weight=0.5, vocab_group=ranks.group).backward()
        assert sent == ([] if sparse else [ROWS]) + [48 * ROWS, 8 * ROWS]
        assert sum(sent) <= 64 * ROWS


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that were made inside, each counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, Tensor):
                self.sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return found


def memory(ranks: Rank, divergence: str) -> None:
    """The gradient of the rank's own columns, and less than 4 KB a row."""
    if not FUSED:
        return
    own, teacher = (x.requires_grad_(i == 0) for i, x in enumerate(pair(ROWS, 1 << 16)))
    with Allocated() as made:
        kd_loss(own, teacher, divergence=divergence, vocab_group=ranks.group).backward()
    given = {x.untyped_storage().data_ptr() for x in (own, teacher)}
    assert sum(size for at, size in made.sizes.items() if at not in given) <= own.numel() * 4 + 4096 * ROWS


for sparse in (False, True):
    case(what_crosses, sparse)
for name in ("forward_kl", "jsd"):
    case(memory, name)


def refused(ranks: Rank) -> None:
    """On all ranks alike, before anything crosses."""
    from torch.distributed.tensor import DTensor, Replicate

    student, teacher, _ = rows()
    own, known, group = student[:, ranks.span(V)], teacher[:, ranks.span(V)], ranks.group
    mesh = mesh_of(ranks)
    whole = DTensor.from_local(student, mesh, [Replicate()])
    part = split(ranks, student, 1)
    leaf = own.clone().requires_grad_()
    for error, match, arguments, options in (
        (ValueError, "it needs a vocab_group", (own, known), {"vocab_size": V}),
        (TypeError, "must be a torch.distributed.ProcessGroup", (own, known), {"vocab_group": "gloo"}),
        (ValueError, "at least 1", (own, known), {"vocab_group": group, "vocab_size": 0}),
        (ValueError, r"of vocab_size=1000 it must have", (own, known), {"vocab_group": group, "vocab_size": 1000}),
        (ValueError, "teacher has 100 columns on rank", (own, teacher), {"vocab_group": group}),
        (ValueError, "both must be split alike", (own, known[:, :-1]), {"vocab_group": group}),
        (TypeError, r"student_logits is a DTensor, .* not by \(Replicate", (whole, known), {}),
        (TypeError, r"teacher is a DTensor, .* not by \(Replicate", (part, whole), {}),
        (ValueError, "inplace=True needs shards", (part, known), {"inplace": True}),
        (ValueError, "labels must be", (own, known, torch.full((ROWS,), V)), {"vocab_group": group, "ce_weight": 1.0}),
        (ValueError, "ids must be", (own, top_k(teacher, 3)), {"vocab_group": group, "vocab_size": 90}),
        (
            ValueError,
            "inplace=True needs shards",
            (leaf * 1, known),
            {"vocab_group": group, "vocab_size": 60, "inplace": True},
        ),
    ):
        with pytest.raises(error, match=match):
            kd_loss(*arguments, **options)
    p = problem(ROWS, columns=(V, V))
    with pytest.raises(TypeError, match=r"pass vocab_group=student_weight.device_mesh"):
        linear_kd_loss(p.hidden, split(ranks, p.weight, 0), p.teacher)


def other_shards(ranks: Rank) -> None:
    """Shards that are no even split: seen on all ranks when they have met."""
    student, teacher, _ = rows()
    mine = slice(0, 30) if ranks.rank == 0 else slice(30, 50)
    with pytest.raises(ValueError, match="columns in all"):
        kd_loss(student[:, mine], teacher[:, mine], vocab_group=ranks.group)


case(refused)
case(other_shards)
