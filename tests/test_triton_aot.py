"""The Triton kernels compiled ahead of time, without a GPU: vector width, spills and barriers of the machine code.

Pointers are 16-byte aligned and no integer is specialised, as at run time: the accesses are wide whatever the
vocabulary, 50257 included.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from fusedkd.kernels import kd  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NVIDIA = [GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)]
AMD = GPUTarget("hip", "gfx942", 64)
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
BF16, FP32, FP64 = NAMES
STRUCTURE = {
    "TRANSFORM": False,
    "SURPLUS": False,
    "RESCALE": False,
    "TEACHER_IN_PHASE": True,
    "GRADIENT_IN_PHASE": True,
}
FORWARD, BACKWARD = {"upstream": None}, {"rows": None}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One empty cache, so that what is measured was compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(target: GPUTarget, student: torch.dtype, teacher: torch.dtype, **structure: Any) -> CompiledKernel:
    constants = STRUCTURE | structure
    in_phase = constants["TEACHER_IN_PHASE"] and constants["GRADIENT_IN_PHASE"]
    options = kd.block_options(student, 50257, in_phase, target.backend == "hip")
    constants |= {key: options.pop(key) for key in ("BLOCK", "GROUP")}
    real = f"*{'fp64' if student == FP64 else 'fp32'}"
    types = {"student": f"*{NAMES[student]}", "teacher": f"*{NAMES[teacher]}", "gradient": f"*{NAMES[student]}"}
    types |= {"labels": "*i64", "weights": "*fp32", "options": "*fp64", "normalizers": "*fp64"}
    types |= {"upstream": real, "rows": real, "stats": real}
    return _compile(kd.kd_kernel, target, types, constants, options)


def _compile(kernel: Any, target: GPUTarget, pointers: dict, constants: dict, options: dict) -> CompiledKernel:
    signature = {p.name: p.annotation_type or "i32" for p in kernel.params} | pointers
    signature |= dict.fromkeys(constants, "constexpr")
    index = {name: (i,) for i, name in enumerate(signature)}
    aligned = {index[name]: [["tt.divisibility", 16]] for name in pointers if name not in constants}
    source = ASTSource(kernel, signature, {index[name]: value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=target, options=options)


def resources(kernel: CompiledKernel, tmp_path: Path) -> dict[str, int]:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def bits(ptx: str, kind: str, hint: str) -> list[int]:
    """Widths in bits of the global accesses with an eviction hint: those of the logits and the gradient."""
    found = re.findall(rf"{kind}\.global\.L1::{hint}\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return sorted((int(lanes or 1) * int(width) for lanes, width in found), reverse=True)


# Per access: whole vectors in the loop over the body of a row, then single columns at its two ends.
@pytest.mark.parametrize("target", NVIDIA, ids=lambda t: f"sm_{t.arch}")
@pytest.mark.parametrize(
    ("student", "teacher", "reads", "writes"),
    [
        (BF16, BF16, [128, 128, 16, 16], [128, 16]),
        (FP32, FP32, [128, 128, 128, 128, 32, 32], [128, 128, 32]),
        (FP32, BF16, [128, 128, 64, 64, 32, 16], [128, 128, 32]),  # a thread's four columns, whatever their dtype
    ],
    ids=["bf16", "fp32", "fp32-bf16"],
)
def test_accesses_are_wide(
    target: GPUTarget, student: Any, teacher: Any, reads: list, writes: list, tmp_path: Path
) -> None:
    kernel = compiled(target, student, teacher, **FORWARD)
    ptx = kernel.asm["ptx"]
    assert bits(ptx, "ld", "evict_last") == reads, "first pass"
    assert bits(ptx, "ld", "evict_first") == reads, "second pass"
    assert bits(ptx, "st", "evict_first") == writes
    use = resources(kernel, tmp_path)
    assert use["STACK"] == use["LOCAL"] == 0
    assert use["REG"] <= 64, "two blocks of 16 warps no longer fit"


VARIANTS = {
    "backward": BACKWARD,
    "KD alone": FORWARD | {"labels": None},
    "without gradient": FORWARD | {"gradient": None},
    "everything": FORWARD | {"TRANSFORM": True, "SURPLUS": True, "TEACHER_IN_PHASE": False, "GRADIENT_IN_PHASE": False},
    "rescale, everything": BACKWARD | {"TRANSFORM": True, "SURPLUS": True, "RESCALE": True},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("target", NVIDIA, ids=lambda t: f"sm_{t.arch}")
def test_nothing_spills(target: GPUTarget, variant: dict[str, Any], tmp_path: Path) -> None:
    use = resources(compiled(target, BF16, BF16, **variant), tmp_path)
    assert use["STACK"] == use["LOCAL"] == 0


def test_float64_does_not_spill(tmp_path: Path) -> None:
    use = resources(compiled(NVIDIA[1], FP64, FP64, **FORWARD), tmp_path)
    assert use["STACK"] == use["LOCAL"] == 0


@pytest.mark.parametrize(
    "variant", [FORWARD, BACKWARD, VARIANTS["everything"]], ids=["forward", "backward", "everything"]
)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32), (FP32, BF16)], ids=str)
def test_amd(dtypes: tuple[torch.dtype, torch.dtype], variant: dict[str, Any]) -> None:
    assembly = compiled(AMD, *dtypes, **variant).asm["amdgcn"]
    spilled = re.findall(r"(?:[sv]gpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly)
    assert len(spilled) == 3
    assert set(spilled) == {"0"}
    assert "global_load_dwordx4" in assembly
    if variant.get("GRADIENT_IN_PHASE", True):
        assert "global_store_dwordx4" in assembly


def test_a_row_that_starts_elsewhere_than_the_student(tmp_path: Path) -> None:
    """Only the side out of step pays with narrow accesses."""
    ptx = compiled(NVIDIA[1], BF16, BF16, **FORWARD, TEACHER_IN_PHASE=False).asm["ptx"]
    assert bits(ptx, "ld", "evict_last") == [128] + [16] * 10
    assert bits(ptx, "st", "evict_first") == [128, 16]


@pytest.mark.parametrize("target", [*NVIDIA, AMD], ids=lambda t: str(t.arch))
def test_row_weights(target: GPUTarget, tmp_path: Path) -> None:
    pointers = {"teacher": "*bf16", "labels": "*i64", "kd_mask": "*i1", "weights": "*fp32"}
    kernel = _compile(kd.kd_row_weights_kernel, target, pointers, {"BLOCK": 128}, {"num_warps": 1})
    if target is not AMD:
        assert resources(kernel, tmp_path)["STACK"] == 0


@pytest.mark.parametrize("kernel", [kd.kd_kernel, kd.kd_row_weights_kernel], ids=lambda k: k.__name__)
def test_one_binary_serves_every_shape(kernel: Any) -> None:
    pointers = {"student", "teacher", "labels", "kd_mask", "weights", "options", "normalizers"}
    pointers |= {"upstream", "rows", "stats", "gradient"}
    integers = [p for p in kernel.params if not p.is_constexpr and p.name not in pointers]
    assert integers
    assert all(p.do_not_specialize for p in integers)
