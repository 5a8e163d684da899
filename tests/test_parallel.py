"""A vocabulary that is split over two and four processes: loss and gradients are those of one. Four processes run the
cases of `parallel_cases.py`, `parallel_more_cases.py` and `parallel_rule_cases.py`, which are tests here: as one group,
and as two groups of two.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import parallel_rule_cases  # noqa: F401
import pytest
import torch
from parallel_cases import CASES, Rank
from ranks import on_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

WORLD = 4


def one_rank(folder: Path) -> None:
    group = torch.distributed
    rank, pairs = group.get_rank(), [group.new_group([0, 1]), group.new_group([2, 3])]

    def run(ranks: Rank, names: list[str]) -> None:
        for name in names:
            try:
                CASES[name](ranks)
            except Exception:
                (folder / f"{ranks.ranks} {name} {rank}").write_text(traceback.format_exc())
            found: list[Any] = [None] * ranks.ranks
            group.all_gather_object(found, name, group=ranks.group)
            assert found == [name] * ranks.ranks, "the ranks are out of step"

    names = list(CASES)
    run(Rank(group.group.WORLD, rank, WORLD), names)
    run(Rank(pairs[rank // 2], rank % 2, 2), names[rank // 2 :: 2])


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """What failed on a rank, by the number of ranks and the case."""
    folder = tmp_path_factory.mktemp("ranks")
    stopped = ""
    try:
        on_ranks(WORLD, one_rank, folder)
    except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
        stopped = f"{error}"
    found = {tuple(file.name.split(" ")[:2]): file.read_text() for file in folder.glob("? *")}
    if stopped:
        pytest.fail("\n".join([stopped, *(f"{key}: {error}" for key, error in found.items())]))
    return found


@pytest.mark.parametrize("ranks", [2, WORLD])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_one_process(failed: dict[tuple[str, str], str], name: str, ranks: int) -> None:
    assert (f"{ranks}", name) not in failed, failed[f"{ranks}", name]
