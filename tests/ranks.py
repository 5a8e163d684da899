"""Functions that several processes of one group call (gloo, on the CPU). Each is a fork of a process that has imported
the libraries, once for all tests: of a process that is started for one test, imports take most of the time.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "fusedkd.integrations.transformers"])


def one_rank(rank: int, ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the environment that torchrun gives its processes."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"}
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    result = function(*arguments)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may still run when the interpreter takes them down, and abort the process


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` of a module returns on the first of the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, Path(folder), function, arguments)
        torch.multiprocessing.start_processes(one_rank, given, nprocs=ranks, start_method="forkserver")
        return torch.load(Path(folder) / "result.pt")
