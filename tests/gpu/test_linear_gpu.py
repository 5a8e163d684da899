"""linear_kd_loss where only a GPU can tell: nothing waits for the device, CUDA graphs, `max_rows`, memory that does not
grow with N × V. Its conformance suite, tests/test_linear*.py, runs on a GPU as on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from graphs import capture
from torch import Tensor

from fusedkd import TeacherHead, linear_kd_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS = {"temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


class Problem:
    """Heads of 1037 columns, hidden states of 24 and 40, every third row without a term."""

    def __init__(self, rows: int, dtype: torch.dtype, columns: int = 1037) -> None:
        random = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=random).to(dtype)

        self.student = [x.requires_grad_() for x in (normal(rows, 24), normal(columns, 24))]
        self.teacher = TeacherHead(normal(rows, 40), normal(columns, 40))
        self.labels = torch.randint(0, columns, (rows,), device="cuda", generator=random)
        self.labels[::3] = -100

    def step(self, scale: float = 1.0, **options: object) -> tuple[Tensor, ...]:
        loss = linear_kd_loss(*self.student, self.teacher, self.labels, **{**OPTIONS, **options})
        return loss.detach(), *torch.autograd.grad(scale * loss, self.student)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("max_rows", [None, 40])
def test_no_host_synchronisation(dtype: torch.dtype, scale: float, max_rows: int | None) -> None:
    problem = Problem(50, dtype)
    expected = problem.step(scale, max_rows=max_rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = problem.step(scale, max_rows=max_rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(x.any() for x in actual)


@DTYPES
def test_cuda_graph(dtype: torch.dtype) -> None:
    """Captured once, replayed on other numbers and labels: what an eager call gives."""
    problem = Problem(50, dtype)
    graph, captured = capture(lambda: problem.step(0.25))
    with torch.no_grad():
        problem.student[0].copy_(problem.student[0].flip(0))
        problem.labels.copy_(problem.labels.flip(0))
    graph.replay()
    for a, b in zip(captured, problem.step(0.25), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@DTYPES
def test_max_rows(dtype: torch.dtype) -> None:
    """The rows with a term are 33: as many are projected, fewer are refused, and the result is the same."""
    problem = Problem(50, dtype)
    whole, compact = problem.step(), problem.step(max_rows=33)
    for a, b in zip(compact, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert not compact[1][::3].any()
    assert problem.step(max_rows=32)[0].isnan()


def test_nan_in_a_row_without_a_term() -> None:
    problem = Problem(50, torch.bfloat16)
    expected = problem.step()
    with torch.no_grad():
        problem.student[0][::3] = torch.nan
        problem.teacher.hidden[::3] = torch.nan
    for a, b in zip(problem.step(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_memory_does_not_grow_with_the_rows() -> None:
    peaks = []
    for rows in (4096, 16384):
        problem = Problem(rows, torch.bfloat16, columns=32000)
        problem.step(max_tile_bytes=1 << 28)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.step(max_tile_bytes=1 << 28)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < (1 << 28) + 4 * 32000 * 24 * 4 + (32 << 20)
    assert peaks[1] - peaks[0] < 16384 * 24 * 16 + (1 << 20)
