"""CUDA graphs of what tests do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Results = TypeVar("Results")


def capture(step: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A graph of the step, and the memory into which each replay writes its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is lazy happens here, where capturing does not forbid it
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
