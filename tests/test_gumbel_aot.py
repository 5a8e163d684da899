"""The Triton kernels of `gumbel_rows`, compiled ahead of time: no spill, no fused multiply-add, one binary for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from test_triton_aot import (
    ALL,
    AMD,
    FP32,
    FP64,
    NAMES,
    SM80,
    SM90,
    SM100,
    _compile,
    cache,
    describe,
    does_not_spill,
    specialised,
)

from fusedkd.backends.triton.gumbel import OPTIONS
from fusedkd.backends.triton.gumbel_kernel import gumbel_backward_kernel, gumbel_forward_kernel

__all__ = ["cache"]  # a fixture
POINTERS = {"ids": "*i64", "seed": "*i64", "temperature": "*fp64", "scale": "*fp64"}
KERNELS = [gumbel_forward_kernel, gumbel_backward_kernel]


def pointers(kernel: Any, dtype: Any = FP32) -> dict[str, str]:
    types = POINTERS | {name: f"*{NAMES[dtype]}" for name in ("logits", "slopes", "stats")}
    names = {p.name for p in kernel.params}
    return {name: kind for name, kind in types.items() if name in names}


@pytest.mark.parametrize("kernel", KERNELS, ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(SM80, FP32), (AMD, FP32), *([(SM90, FP32), (SM100, FP32), (SM90, FP64)] if ALL else [])],
    ids=describe,
)
def test_machine_code(kernel: Any, target: Any, dtype: Any, tmp_path: Path) -> None:
    """The noise is the same on every device because nothing that makes it is fused."""
    options = dict(OPTIONS)
    constants = {"COUNTERS": options.pop("COUNTERS")}
    compiled = _compile(kernel, target, pointers(kernel, dtype), constants, options)
    assert does_not_spill(compiled, tmp_path) <= 64
    if target.backend == "cuda":
        assert "fma.rn.f32" not in compiled.asm["ptx"]
        assert "mul.f32" in compiled.asm["ptx"] or "mul.rn.f32" in compiled.asm["ptx"]


@pytest.mark.parametrize("kernel", KERNELS, ids=["forward", "backward"])
def test_one_binary_serves_every_shape(kernel: Any) -> None:
    assert specialised(kernel, set(pointers(kernel))) == set()
