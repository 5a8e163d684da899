"""What `make sanitize` sees: stray accesses, races, memory that nobody wrote."""

from __future__ import annotations

import pytest
import torch
from truth import EMULATED

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not EMULATED, reason="is of make sanitize")]
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402


@triton.jit
def copy(x, y, N, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < N, other=0.0) + tl.program_id(0), i < N)


@pytest.mark.parametrize(
    ("n", "step", "seen"), [(32, 16, None), (33, 16, "tensor passed as `x`"), (32, 8, "program instances")]
)
def test_stray_accesses_and_races(n: int, step: int, seen: str | None) -> None:
    """Two programs of 16 columns each: 32 columns; one more; and some columns twice."""
    x, y = torch.ones(32, device="cuda"), torch.zeros(32, device="cuda")
    programs = (3 if n > 32 else 2,)
    if seen is None:
        copy[programs](x, y, n, STEP=step, BLOCK=16)
        assert y.tolist() == [1.0] * 16 + [2.0] * 16
        return
    with pytest.raises(Exception, match=seen):
        copy[programs](x, y, n, STEP=step, BLOCK=16)


def test_what_nobody_wrote_is_nan() -> None:
    assert torch.empty(3, device="cuda").isnan().all()
    with torch._C.DisableTorchFunction():  # as inside an operator
        assert torch.ones(2).new_empty(3).isnan().all()
