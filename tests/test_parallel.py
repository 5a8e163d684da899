"""A vocabulary that is split over two and four processes: loss and gradients are those of one. One group of processes
for each number of ranks runs all of `parallel_cases.py`, whose cases are tests here.
"""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import CASES, Rank

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


def one_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    group = torch.distributed
    timeout = timedelta(seconds=60)
    store = f"file://{folder}/store"
    group.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    failed = {}
    for name, case in CASES.items():
        try:
            case(Rank(group.group.WORLD, rank, ranks))
        except Exception:
            failed[name] = traceback.format_exc()
        found: list[Any] = [None] * ranks
        group.all_gather_object(found, name in failed)
        assert len(set(found)) == 1 or not any(found), (name, failed)
    torch.save(failed, folder / f"{rank}.pt")
    group.barrier()
    os._exit(0)  # gloo's threads may still run when the interpreter takes them down, and abort the process


@pytest.fixture(scope="module", params=[2, 4])
def failed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What failed on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_loss_of_one_process(failed: list[dict[str, str]], name: str) -> None:
    for rank, each in enumerate(failed):
        assert name not in each, f"rank {rank}: {each.get(name)}"
