"""The Triton kernels of attention maps, compiled ahead of time as the package launches them: matrix units, wide
accesses, no spill, and shared memory that every GPU has.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import gpu_stub
from launch_cases import launch_attention
from test_triton_aot import ALL, AMD, BF16, FP16, FP32, NVIDIA, SM80, SM90, SM100, cache, describe, does_not_spill

from fusedkd.backends.layout import KernelId
from fusedkd.backends.triton import attention

__all__ = ["cache"]  # a fixture
KL, MSE = KernelId.FORWARD_KL, KernelId.LOGIT_MSE
LDS = 65536
"""AMD's shared memory."""
WIDEST = {BF16: 128, FP16: 128, FP32: 64}


def assert_fits(target: Any, tmp_path: Path, **case: Any) -> list[Any]:
    with gpu_stub.compiler(target, attention) as kernels:
        launch_attention(**case)
    for kernel in kernels:
        does_not_spill(kernel, tmp_path)
        assert kernel.metadata.shared <= (LDS if target.backend == "hip" else gpu_stub.SHARED_BYTES)
    return kernels


@pytest.mark.parametrize(
    ("target", "dtypes", "widths", "kernel_id"),
    [
        (SM80, (BF16, BF16), (128, 128), KL),
        (SM90, (FP32, FP32), (64, 64), KL),
        (SM100, (FP16, FP16), (80, 128), MSE),
        (AMD, (BF16, BF16), (128, 128), KL),
    ],
    ids=describe,
)
def test_nothing_spills(target: Any, dtypes: Any, widths: Any, kernel_id: KernelId, tmp_path: Path) -> None:
    for kernel in assert_fits(target, tmp_path, dtypes=dtypes, widths=widths, kernel_id=kernel_id, causal=True):
        if target.backend == "hip":
            assert re.search(r"(global|buffer)_load_dwordx4", kernel.asm["amdgcn"])
            assert FP32 in dtypes or "mfma" in kernel.asm["amdgcn"]
            continue
        ptx = kernel.asm["ptx"]
        assert re.search(r"cp\.async\S*global\S* .*0x10|ld\.global\S*\.v4|cp\.async\.c", ptx)
        assert "tf32" not in ptx
        assert FP32 in dtypes or "mma" in ptx


def test_one_binary_serves_every_shape() -> None:
    found = []
    for L, heads in ((300, 3), (512, 12)):
        with gpu_stub.compiler(SM90, attention) as kernels:
            launch_attention(L=L, heads=heads)
        found.append([kernel.hash for kernel in kernels])
    assert found[0] == found[1]


@pytest.mark.skipif(not ALL, reason="takes minutes: make aot")
@pytest.mark.parametrize("target", [*NVIDIA, AMD], ids=describe)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("kernel_id", [KL, MSE], ids=describe)
def test_every_layout(kernel_id: KernelId, dtypes: Any, target: Any, tmp_path: Path) -> None:
    most = min(WIDEST[x] for x in dtypes)
    fits = partial(assert_fits, target, tmp_path, dtypes=dtypes, kernel_id=kernel_id)
    for widths in ((16, 16), (most, most), (most // 2, most), (most, 24), (most * 5 // 8, most * 3 // 4)):
        for causal in (False, True):
            fits(widths=widths, causal=causal)
    fits(widths=(most, most), mask=False, upstream=True)
    fits(widths=(most - 1, most - 1), aligned=False, upstream=True)
    fits(widths=(most, most), gradient=False)
    fits(widths=(most, most), itself=True)
