#!/usr/bin/env bash
# torch 2.13.0, two gloo processes on a CPU: all-gathers of an FSDP2 model (three units, one of them the root's) in forwards under no_grad.
#
# Guess: as many in each forward, for reshard_after_forward is on.
# Seen:  first 3, second 2, after model.reshard() 3
# The root's unit stays whole after a forward, for a backward that never comes. Whoever runs a frozen model (a teacher, an evaluation) on
# more batches on one rank than on another must not take the numbers of collectives as equal per call: without reshard() they are not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/gathers.py" <<'PY'
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode


def gathers(model, x):
    with CommDebugMode() as seen, torch.no_grad():
        model(x)
    return sum(seen.get_comm_counts().values())


def run(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29743")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4)
    for layer in model[:2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    seen = gathers(model, x), gathers(model, x)
    model.reshard()
    seen += (gathers(model, x),)
    if rank == 0:
        print("first {}, second {}, after model.reshard() {}".format(*seen), flush=True)
    dist.barrier()
    os._exit(seen != (3, 2, 3))


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, nprocs=2)
PY
"$folder/venv/bin/python" "$folder/gathers.py" > "$folder/log" 2>&1 || true
grep "^first" "$folder/log" || { cat "$folder/log"; exit 1; }
grep -q "^first 3, second 2, after model.reshard() 3$" "$folder/log"
