"""Where a forward launch leaves the loss, and what it needs for that: see :mod:`fusedkd.backends.triton.last`."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd.backends.call import lasting


class Result(NamedTuple):
    """Arguments of the forward kernels, by their names."""

    loss: Tensor | None
    """``()`` or ``(N,)``; None: the row losses alone are wanted."""
    terms: Tensor | None
    ticket: Tensor | None
    PER_ROW: bool


NO_RESULT = Result(None, None, None, False)


def ticket(device: torch.device) -> Tensor:
    """The counter of the programs that are done, 0 between launches: one for each stream, for launches of one follow
    each other; and one of its own for a launch in a CUDA graph, which is replayed anywhere.
    """
    if device.type != "cuda":
        return _ticket(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _ticket(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _ticket(device: torch.device, stream: int) -> Tensor:
    return lasting(lambda: torch.zeros(1, dtype=torch.int32, device=device), device)
