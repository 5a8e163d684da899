#!/usr/bin/env bash
# torch 2.13.0, two gloo processes on a CPU: torch.autograd.grad with respect to the parameters of an FSDP2 model.
#
# Guess: the gradients that backward() leaves in .grad.
# Seen:  autograd.grad: The differentiated Tensor at index 0 appears to not have been used in the graph.
#        backward: 6 of 6 parameters have a gradient
# What is in the graph are the whole parameters that the forward gathered; hooks carry their gradients to the sharded ones that
# parameters() names. A check of gradients that asks autograd.grad, as on one process, has to call backward() there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/gradients.py" <<'PY'
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def run(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29744")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def sharded():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        for layer in model[:2]:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model, message = sharded(), "no error"
    try:
        torch.autograd.grad(model(torch.ones(2, 4)).sum(), list(model.parameters()))
    except RuntimeError as error:
        message = str(error).split(" Set allow_unused")[0]
    model = sharded()
    model(torch.ones(2, 4)).sum().backward()
    filled = [p.grad is not None for p in model.parameters()]
    if rank == 0:
        print(f"autograd.grad: {message}", f"backward: {sum(filled)} of {len(filled)} parameters have a gradient", sep="\n", flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, nprocs=2)
PY
"$folder/venv/bin/python" "$folder/gradients.py" > "$folder/log" 2>&1 || true
grep "^autograd.grad\|^backward" "$folder/log" || { cat "$folder/log"; exit 1; }
grep -q "^autograd.grad: The differentiated Tensor at index 0 appears to not have been used in the graph.$" "$folder/log"
grep -q "^backward: 6 of 6" "$folder/log"
