"""The Triton kernel for teachers known at K columns, compiled ahead of time: wide accesses at V = 50257, no spill."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from test_triton_aot import (
    ALL,
    AMD,
    BF16,
    FP32,
    FP64,
    NAMES,
    SM80,
    SM90,
    SM100,
    _compile,
    bits,
    cache,
    resources,
    specialised,
)

from fusedkd.backends.layout import TopkKernelId
from fusedkd.backends.triton import topk
from fusedkd.backends.triton.topk_kernel import topk_backward_kernel, topk_forward_kernel

__all__ = ["cache"]  # a fixture
FORWARD: dict[str, Any] = {}
BACKWARD = {"kernel": topk_backward_kernel}


def compiled(
    target: Any,
    form: TopkKernelId,
    dtype: Any = BF16,
    K: int = 64,
    kernel: Any = topk_forward_kernel,
    **structure: Any,
) -> Any:
    structure = {
        "TRANSFORM": False,
        "SKIP_IF_ONE": False,
        "PER_ROW": False,
        "GRADIENT_IN_PHASE": True,
        "KERNEL_ID": int(form),
    } | structure
    options = topk.block_options(dtype, 50257, K, structure["GRADIENT_IN_PHASE"], target.backend == "hip")
    structure |= {key: options.pop(key) for key in ("BLOCK", "GROUP", "BLOCK_K")}
    if form not in topk.MARKED:
        structure["marks"] = None
    real = f"*{'fp64' if dtype == FP64 else 'fp32'}"
    types = {"student": f"*{NAMES[dtype]}", "teacher": real, "ids": "*i64", "gradient": f"*{NAMES[dtype]}"}
    types |= {"labels": "*i64", "weights": "*fp32", "real_options": "*fp64", "normalizers": "*fp64", "marks": "*i32"}
    types |= {"upstream": real, "row_losses": real, "stats": real}
    types |= {"loss": real, "terms": real, "ticket": "*i32"}
    names = {p.name for p in kernel.params}
    types, structure = ({name: x for name, x in given.items() if name in names} for given in (types, structure))
    return _compile(kernel, target, types, structure, options)


@pytest.mark.parametrize(
    ("target", "dtype", "form", "reads"),
    [
        (SM80, BF16, TopkKernelId.BUCKET, [128, 16]),
        (SM100, FP32, TopkKernelId.BUCKET_REVERSE, [128, 128, 32]),
        *([(SM90, BF16, TopkKernelId.RENORMALIZE, [128, 16])] if ALL else []),
    ],
    ids=str,
)
def test_accesses_are_wide(target: Any, dtype: Any, form: TopkKernelId, reads: list[int], tmp_path: Path) -> None:
    kernel = compiled(target, form, dtype, **FORWARD)
    ptx = kernel.asm["ptx"]
    assert bits(ptx, "ld", "evict_last") == bits(ptx, "ld", "evict_first") == bits(ptx, "st", "evict_first") == reads
    use = resources(kernel, tmp_path)
    assert use["STACK"] == use["LOCAL"] == 0
    assert use["REG"] <= 80, "three blocks of 8 warps no longer fit"


@pytest.mark.parametrize(
    ("form", "K", "structure"),
    [
        (TopkKernelId.BUCKET, 512, BACKWARD | {"SKIP_IF_ONE": True}),
        (TopkKernelId.BUCKET_REVERSE, 1024, FORWARD | {"TRANSFORM": True, "GRADIENT_IN_PHASE": False}),
        (TopkKernelId.SAMPLES, 1024, FORWARD),
        (TopkKernelId.RENORMALIZE_REVERSE, 64, FORWARD | {"labels": None}),
    ][: None if ALL else 2],
    ids=str,
)
def test_nothing_spills(form: TopkKernelId, K: int, structure: dict[str, Any], tmp_path: Path) -> None:
    use = resources(compiled(SM90, form, K=K, **structure), tmp_path)
    assert use["STACK"] == use["LOCAL"] == 0


def test_amd() -> None:
    """Scalars may wait in the lanes of a vector register (sgpr_spill), nothing in memory."""
    assembly = compiled(AMD, TopkKernelId.BUCKET, **FORWARD).asm["amdgcn"]
    assert re.findall(r"(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly) == ["0", "0"]
    assert "global_load_dwordx4" in assembly
    assert "global_store_dwordx4" in assembly


def test_one_binary_serves_every_shape() -> None:
    pointers = {"student", "teacher", "ids", "labels", "weights", "real_options", "normalizers", "upstream", "stats"}
    pointers |= {"row_losses", "gradient", "marks"}
    for kernel in (topk_forward_kernel, topk_backward_kernel):
        assert specialised(kernel, pointers & {p.name for p in kernel.params}) == {"student", "gradient"}
