"""A head that FSDP2 shards as a unit of its own, on two processes: what the error says to do gives the gradients of one
process. (A plain ``full_tensor()`` leaves each rank with its own rows' gradient, without an error.)
"""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from truth import pair, targets

from fusedkd import TeacherHead, linear_kd_loss
from fusedkd.integrations.trl.hidden import head_of

ROWS, INPUTS, H, V = 8, 6, 16, 24
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(INPUTS, H), nn.Linear(H, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()


def loss(model: Model, rows: slice, weight: Tensor, bias: Tensor) -> Tensor:
    """Of some rows, divided by the number of rows there are in each process."""
    x, h = pair(ROWS, INPUTS)[0][rows], pair(ROWS, 12)[1][rows]
    teacher = TeacherHead(h, pair(V, 12, seed=4)[0])
    labels = targets(ROWS, classes=V, ignored=None)[rows]
    return linear_kd_loss(model(x), weight, teacher, labels, student_bias=bias, ce_weight=0.5)


def one_rank() -> list[dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    rank, model, mesh = torch.distributed.get_rank(), Model(), init_device_mesh("cpu", (2,))
    for unit in (model.body, model.head, model):
        fully_shard(unit, mesh=mesh)
    rows, head = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2), model.head
    with pytest.raises(TypeError, match="student_weight is a DTensor") as told:
        loss(model, rows, head.weight, head.bias)
    names = {"Partial": Partial, "student_weight": head.weight, "student_bias": head.bias}
    advice = str(told.value).rpartition("elsewhere pass ")[2]
    whole = [eval(advice.replace("student_weight", name), names) for name in ("student_weight", "student_bias")]
    gradients = []
    for weight, bias in (whole, head_of(torch.empty(0, H), head.weight, head.bias)):
        model.zero_grad()
        loss(model, rows, weight, bias).backward()
        gradients.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    return gradients


def test_the_advice_for_a_sharded_head() -> None:
    """And what the losses of TRL's trainers make of one."""
    found, model = on_ranks(2, one_rank), Model()
    loss(model, slice(None), model.head.weight, model.head.bias).backward()
    for name, p in model.named_parameters():
        assert p.grad.any()
        for gradients in found:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-7)
