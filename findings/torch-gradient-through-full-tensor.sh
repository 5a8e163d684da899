#!/usr/bin/env bash
# torch 2.13.0, FSDP2 (fully_shard), two gloo processes on a CPU: a head that is a sharded unit of its own, its weight used outside
# the unit's forward by full_tensor(), as a loss that takes hidden states and the head's weight needs it.
#
# Guess: the gradient arrives averaged over the ranks, as that of every other parameter does.
# Seen:  full_tensor(): relative error 0.76
#        full_tensor(grad_placements=[Partial("avg")]): relative error 0.00
# Backward of a plain full_tensor() takes each rank's own slice of its own gradient, and adds nothing up. There is no error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/ranks.py" <<'PY'
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, init_device_mesh

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 10, bias=False)

    def forward(self, x, **options):
        return self.body(x) @ self.head.weight.full_tensor(**options).t()


def error(**options):
    torch.manual_seed(0)
    model, x, y = Model(), torch.randn(world, 4, 8), torch.randn(world, 4, 10)
    truth = torch.zeros(10, 8)
    for i in range(world):
        truth += torch.autograd.grad(((model.body(x[i]) @ model.head.weight.t() - y[i]) ** 2).mean(), model.head.weight)[0]
    truth /= world
    fully_shard(model.head, mesh=init_device_mesh("cpu", (world,)))
    ((model(x[rank], **options) - y[rank]) ** 2).mean().backward()
    found = model.head.weight.grad.full_tensor()
    return ((found - truth).norm() / truth.norm()).item()


for name, options in {"": {}, 'grad_placements=[Partial("avg")]': {"grad_placements": [Partial("avg")]}}.items():
    value = error(**options)
    if rank == 0:
        print(f"full_tensor({name}): relative error {value:.2f}")
    assert value > 0.5 if not options else value < 1e-5, (name, value)
dist.destroy_process_group()
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 29731 "$folder/ranks.py"
