"""The Triton kernels compiled ahead of time, without a GPU: vector width and spills of the machine code, and whether a
GPU has the registers for it.

The pointers to logits are 16-byte aligned and nothing else is specialised, as at run time: the accesses are wide
whatever the vocabulary, 50257 included. What test_triton_launch.py launches on sm_90 is compiled there, spills and
registers included: here are widths, other GPUs, and what comes closest to the registers. `make aot` runs this file with
several versions of Triton, and then, for FUSEDKD_AOT=all, over everything that the table of layouts tells apart.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from fusedkd.backends.layout import NEEDS_WEIGHT_SUM, KernelId  # noqa: E402
from fusedkd.backends.triton.choice import PROCESSOR_REGISTERS, RESIDENT_COLUMNS, layout, resident_columns  # noqa: E402
from fusedkd.backends.triton.kd_kernel import FINISH, STATISTICS, VALUES, WHOLE, kd_backward_kernel, kd_forward_kernel  # noqa: E402
from fusedkd.backends.triton.kd_shard import kd_shard_kernel  # noqa: E402
from fusedkd.backends.triton.row_kernels import (  # noqa: E402
    kd_row_weights_kernel,
    kd_terms_kernel,
    linear_unit_kernel,
)
from fusedkd.backends.triton.statistics import kd_statistics_kernel  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NVIDIA = SM80, SM90, SM100 = [GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)]
AMD = GPUTarget("hip", "gfx942", 64)
ALL = os.environ.get("FUSEDKD_AOT") == "all"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
BF16, FP16, FP32, FP64 = NAMES
STRUCTURE = {
    "KERNEL_ID": KernelId.FORWARD_KL,
    "CE": True,
    "TRANSFORM": False,
    "SURPLUS": False,
    "SKIP_IF_ONE": False,
    "RESIDENT": False,
    "SPLIT": False,
    "STAGE": WHOLE,
    "PER_ROW": False,
    "TEACHER_IN_PHASE": True,
    "GRADIENT_IN_PHASE": True,
}
FORWARD = {"partials": None}
BACKWARD = {"kernel": kd_backward_kernel}
EVERYTHING = {"TRANSFORM": True, "SURPLUS": True}
OUT_OF_PHASE = {"TEACHER_IN_PHASE": False, "GRADIENT_IN_PHASE": False}
RESIDENT = FORWARD | {"RESIDENT": True}
STAGES = [
    {"SPLIT": True, "STAGE": STATISTICS, "gradient": None},
    {"SPLIT": True, "STAGE": VALUES},
    {"SPLIT": True, "STAGE": FINISH, "gradient": None},
]


def describe(x: Any) -> str | None:
    """For test ids."""
    if isinstance(x, KernelId):
        return x.name.lower().replace("_", " ")
    return f"sm_{x.arch}" if isinstance(x, GPUTarget) else str(x)


def some(cases: dict[str, Any], *names: str) -> pytest.MarkDecorator:
    """Of these cases of a test the named ones; all of them in `make aot`."""
    assert cases.keys() >= set(names)
    chosen = {name: case for name, case in cases.items() if ALL or name in names}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One empty cache, so that what is measured was compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(
    target: GPUTarget, student: torch.dtype, teacher: torch.dtype, kernel: Any = kd_forward_kernel, **structure: Any
) -> CompiledKernel:
    constants = STRUCTURE | structure
    constants |= {key: int(getattr(constants[key], "value", constants[key])) for key in ("KERNEL_ID", "STAGE")}
    form = constants["KERNEL_ID"]
    constants["NEEDS_WEIGHT_SUM"] = form in NEEDS_WEIGHT_SUM
    options = layout(
        student,
        resident_columns(form, constants["TRANSFORM"]) if constants["RESIDENT"] else 50257,
        form,
        teacher=teacher,
        resident=constants["RESIDENT"],
        transform=constants["TRANSFORM"],
        surplus=constants["SURPLUS"],
        ce=constants["CE"],
        in_phase=constants["TEACHER_IN_PHASE"] and constants["GRADIENT_IN_PHASE"],
        hip=target.backend == "hip",
    )
    constants |= {key: options.pop(key) for key in ("BLOCK", "GROUP")}
    real = f"*{'fp64' if student == FP64 else 'fp32'}"
    types = {"student": f"*{NAMES[student]}", "teacher": f"*{NAMES[teacher]}", "gradient": f"*{NAMES[student]}"}
    types |= {"labels": "*i64", "weights": "*fp32", "real_options": "*fp64", "normalizers": "*fp64"}
    types |= {"upstream": real, "row_losses": real, "stats": real, "partials": real}
    types |= {"loss": real, "terms": real, "ticket": "*i32"}
    names = {p.name for p in kernel.params}
    types, constants = ({name: x for name, x in given.items() if name in names} for given in (types, constants))
    return _compile(kernel, target, types, constants, options)


def _compile(kernel: Any, target: GPUTarget, pointers: dict, constants: dict, options: dict) -> CompiledKernel:
    signature = {p.name: p.annotation_type or "i32" for p in kernel.params} | pointers
    signature |= dict.fromkeys(constants, "constexpr")
    index = {name: (i,) for i, name in enumerate(signature)}
    anywhere = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    aligned = {index[name]: [["tt.divisibility", 16]] for name in pointers if name not in anywhere | constants.keys()}
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


def does_not_spill(kernel: CompiledKernel, tmp_path: Path) -> int:
    """And the registers it takes."""
    if kernel.metadata.target.backend == "cuda":
        use = resources(kernel, tmp_path)
        assert use["STACK"] == use["LOCAL"] == 0
        assert use["REG"] * kernel.metadata.num_warps * 32 <= PROCESSOR_REGISTERS, "cannot be launched"
        return use["REG"]
    # Scalar registers are spilled to vector registers, not to memory.
    spilled = re.findall(r"(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", kernel.asm["amdgcn"])
    assert spilled == ["0", "0"]
    return 0


def programs(kernel: CompiledKernel, tmp_path: Path) -> int:
    """How many share a processor, as far as its registers go. A thread gets them eight at a time."""
    registers = -(-does_not_spill(kernel, tmp_path) // 8) * 8
    return PROCESSOR_REGISTERS // (registers * kernel.metadata.num_warps * 32)


# Per access: whole vectors in the loop over the body of a row, then single columns at its two ends.
ACCESSES = {describe(target): (target, BF16, BF16, [128, 128, 16, 16], [128, 16], 2) for target in NVIDIA} | {
    "fp32": (SM90, FP32, FP32, [128, 128, 128, 128, 32, 32], [128, 128, 32], 3),
    "a thread's columns, whatever their dtype": (SM90, FP32, BF16, [128, 128, 64, 64, 32, 16], [128, 128, 32], 3),
}


@some(ACCESSES, "sm_90", "a thread's columns, whatever their dtype")
def test_accesses_are_wide(case: tuple, tmp_path: Path) -> None:
    target, student, teacher, reads, writes, shared = case
    kernel = compiled(target, student, teacher, **FORWARD)
    ptx = kernel.asm["ptx"]
    assert bits(ptx, "ld", "evict_last") == reads, "first pass"
    assert bits(ptx, "ld", "evict_first") == reads, "second pass"
    assert bits(ptx, "st", "evict_first") == writes
    assert programs(kernel, tmp_path) >= shared


FORMS = {describe(form): form for form in KernelId if form != KernelId.FORWARD_KL}


@some(FORMS, "mixture", "total variation")
def test_forms(case: KernelId, tmp_path: Path) -> None:
    kernel = compiled(SM90, BF16, BF16, KERNEL_ID=case, **FORWARD)
    ptx = kernel.asm["ptx"]
    passes = 3 if case in NEEDS_WEIGHT_SUM else 2
    assert bits(ptx, "ld", "evict_last") == [128] * 2 * (passes - 1) + [16] * 2 * (passes - 1)
    assert bits(ptx, "ld", "evict_first") == [128, 128, 16, 16]
    assert bits(ptx, "st", "evict_first") == [128, 16]
    assert programs(kernel, tmp_path) >= 2


ONCE = (KernelId.FORWARD_KL, KernelId.TOTAL_VARIATION)
ONCE = {
    f"{describe(form)}, {'both terms' if ce else 'no labels'}": (form, ce, 1 if ce else 2)
    for ce, forms in ((False, [*ONCE, KernelId.LOGIT_MSE]), (True, [*ONCE, KernelId.MIXTURE, KernelId.DKD]))
    for form in forms
}


@some(ONCE, "forward kl, no labels", "mixture, both terms")
def test_resident_rows_are_read_once(case: tuple[KernelId, bool, int], tmp_path: Path) -> None:
    form, ce, shared = case
    kernel = compiled(SM90, BF16, BF16, KERNEL_ID=form, CE=ce, SURPLUS=True, **RESIDENT)
    assert bits(kernel.asm["ptx"], "ld", "evict_first") == [128, 128, 16, 16]
    assert not bits(kernel.asm["ptx"], "ld", "evict_last")
    assert bits(kernel.asm["ptx"], "st", "evict_first") == [128, 16]
    assert programs(kernel, tmp_path) >= shared


def test_every_layout_can_be_launched() -> None:
    """What ptxas may use of a processor's registers is there for all threads of a block."""
    rows = product((BF16, FP32), NAMES, (1, 512, 513, 1025, 2049, RESIDENT_COLUMNS, 50257))
    names = "resident", "transform", "surplus", "ce", "in_phase"
    options = list(product(KernelId, *[(False, True)] * len(names)))
    for (student, teacher, columns), (form, *values) in product(rows, options):
        flags = dict(zip(names, values, strict=True))
        block = layout(student, columns, form, teacher=teacher, **flags)
        assert block["maxnreg"] * block["num_warps"] * 32 <= PROCESSOR_REGISTERS
        assert block["BLOCK"] >= columns or not flags["resident"] or columns > RESIDENT_COLUMNS


# Everything at once, and each kernel of the others that is not the above
VARIANTS = {
    "backward": (SM90, BACKWARD),
    "without gradient": (SM100, FORWARD | {"gradient": None}),
    "rescale, everything": (SM90, BACKWARD | EVERYTHING | {"SKIP_IF_ONE": True}),
    "out of phase, everything": (SM90, FORWARD | EVERYTHING | OUT_OF_PHASE),
    "resident, everything": (SM100, RESIDENT | EVERYTHING),
    "resident mixture": (SM100, RESIDENT | {"KERNEL_ID": KernelId.MIXTURE}),
    "resident jeffreys, everything": (SM80, RESIDENT | EVERYTHING | {"KERNEL_ID": KernelId.JEFFREYS}),
    "resident dkd, out of phase, everything": (
        SM90,
        RESIDENT | EVERYTHING | OUT_OF_PHASE | {"KERNEL_ID": KernelId.DKD},
    ),
}
for _form, _target in ((KernelId.JEFFREYS, SM90), (KernelId.MIXTURE, SM100), (KernelId.DKD, SM80)):
    VARIANTS[f"{describe(_form)}, everything"] = _target, FORWARD | EVERYTHING | {"KERNEL_ID": _form}
for _stage, _form in zip(STAGES, (KernelId.FORWARD_KL, KernelId.FORWARD_KL, KernelId.MIXTURE), strict=True):
    VARIANTS[f"{describe(_form)}, stage {_stage['STAGE'].value}"] = SM90, _stage | {"KERNEL_ID": _form}


@some(VARIANTS, "without gradient", "resident dkd, out of phase, everything", "dkd, everything")
def test_nothing_spills(case: tuple[GPUTarget, dict[str, Any]], tmp_path: Path) -> None:
    target, variant = case
    does_not_spill(compiled(target, BF16, BF16, **variant), tmp_path)


# `linear_kd_loss` makes logits of 32 bits; what comes closest to its registers
VARIANTS_32_BITS = {
    "reverse kl": FORWARD | {"KERNEL_ID": KernelId.JEFFREYS},
    "everything": FORWARD | EVERYTHING,
    "alpha beta, everything": FORWARD | EVERYTHING | {"KERNEL_ID": KernelId.ALPHA_BETA},
    "mixture, everything": FORWARD | EVERYTHING | {"KERNEL_ID": KernelId.MIXTURE},
    "resident": RESIDENT | {"SURPLUS": True},
    "resident mixture": RESIDENT | {"SURPLUS": True, "KERNEL_ID": KernelId.MIXTURE},
    "resident alpha beta, out of phase, everything": RESIDENT
    | EVERYTHING
    | OUT_OF_PHASE
    | {"KERNEL_ID": KernelId.ALPHA_BETA},
    "jeffreys, stage 1": STAGES[1] | EVERYTHING | {"KERNEL_ID": KernelId.JEFFREYS},
}


@some(VARIANTS_32_BITS, "mixture, everything", "resident mixture", "jeffreys, stage 1")
def test_rows_of_32_bits_do_not_spill(case: dict[str, Any], tmp_path: Path) -> None:
    does_not_spill(compiled(SM90, FP32, FP32, **case), tmp_path)


SURPLUS = {"SURPLUS": True}
STRUCTURES = [
    *(call | SURPLUS | more for call in (FORWARD, RESIDENT) for more in ({}, EVERYTHING, EVERYTHING | OUT_OF_PHASE)),
    RESIDENT | SURPLUS | {"CE": False},
    *(BACKWARD | EVERYTHING | more for more in ({}, OUT_OF_PHASE | {"SKIP_IF_ONE": True})),
    *(stage | EVERYTHING for stage in STAGES[1:]),
]


@pytest.mark.skipif(not ALL, reason="takes many minutes: make aot")
@pytest.mark.parametrize(
    ("target", "student", "teacher"),
    [
        *((target, *pair) for pair in ((BF16, BF16), (FP32, FP32), (FP32, BF16)) for target in NVIDIA),
        *((SM90, *pair) for pair in ((BF16, FP32), (FP16, FP16))),
    ],
    ids=describe,
)
@pytest.mark.parametrize("form", KernelId, ids=describe)
def test_every_layout(form: KernelId, target: GPUTarget, student: Any, teacher: Any, tmp_path: Path) -> None:
    for structure in STRUCTURES:
        if structure.get("RESIDENT") and not resident_columns(form, structure.get("TRANSFORM", False)):
            continue  # is not chosen
        does_not_spill(compiled(target, student, teacher, KERNEL_ID=form, **structure), tmp_path)


def test_float64_does_not_spill(tmp_path: Path) -> None:
    does_not_spill(compiled(SM90, FP64, FP64, **FORWARD), tmp_path)


ON_AMD = {
    "forward": (BF16, BF16, FORWARD),
    "backward": (BF16, BF16, BACKWARD),
    "everything": (FP32, BF16, FORWARD | EVERYTHING | OUT_OF_PHASE),
    "mixture": (BF16, BF16, FORWARD | {"KERNEL_ID": KernelId.MIXTURE}),
    "resident": (BF16, BF16, RESIDENT),
}


@some(ON_AMD, "backward", "everything")
def test_amd(case: tuple[torch.dtype, torch.dtype, dict[str, Any]], tmp_path: Path) -> None:
    student, teacher, variant = case
    kernel = compiled(AMD, student, teacher, **variant)
    does_not_spill(kernel, tmp_path)
    assert "global_load_dwordx4" in kernel.asm["amdgcn"]
    if variant.get("GRADIENT_IN_PHASE", True):
        assert "global_store_dwordx4" in kernel.asm["amdgcn"]


STATISTICS_OF = {
    f"{describe(target)}, {NAMES[dtypes[0]]}{', transform' * transform}": (target, dtypes, transform)
    for target, dtypes, transform in product([*NVIDIA, AMD], [(BF16, BF16), (FP32, FP32)], [False, True])
}


@some(STATISTICS_OF, "sm_100, bf16, transform", "sm_gfx942, bf16, transform")
def test_statistics_do_not_spill(case: tuple[GPUTarget, tuple[torch.dtype, torch.dtype], bool], tmp_path: Path) -> None:
    target, dtypes, transform = case
    options = layout(
        *(dtypes[0], 50257, KernelId.FORWARD_KL),
        teacher=dtypes[1],
        transform=transform,
        ce=False,
        in_phase=not transform,
        hip=target.backend == "hip",
    )
    constants = {"OF_TEACHER": True, "TRANSFORM": transform, "TEACHER_IN_PHASE": not transform}
    constants |= {key: options.pop(key) for key in ("BLOCK", "GROUP")}
    types = {"student": f"*{NAMES[dtypes[0]]}", "teacher": f"*{NAMES[dtypes[1]]}", "labels": "*i64"}
    types |= {"weights": "*fp32", "real_options": "*fp64", "found": "*fp32"}
    does_not_spill(_compile(kd_statistics_kernel, target, types, constants, options), tmp_path)


def test_a_row_that_starts_elsewhere_than_the_student() -> None:
    """Only the side out of step pays with narrow accesses."""
    ptx = compiled(SM90, BF16, BF16, **FORWARD, TEACHER_IN_PHASE=False).asm["ptx"]
    assert bits(ptx, "ld", "evict_last") == [128] + [16] * 10
    assert bits(ptx, "st", "evict_first") == [128, 16]


SMALL = {
    "weights": (
        kd_row_weights_kernel,
        {"teacher": "*bf16", "ids": "*i64", "labels": "*i64", "kd_mask": "*i1", "weights": "*fp32"}
        | {"normalizers": "*fp64", "given": "*fp32", "counts": "*fp64", "partials": "*fp64", "ticket": "*i32"},
        {"KD": True, "ROWS": 32, "BLOCK": 64},
    ),
    "terms": (
        kd_terms_kernel,
        {name: "*fp32" for name in ("row_losses", "loss", "terms")} | {"real_options": "*fp64", "normalizers": "*fp64"},
        {"PER_ROW": False, "BLOCK": 2048},
    ),
    "unit": (
        linear_unit_kernel,
        {"weights": "*fp32"} | dict.fromkeys(("real_options", "normalizers", "slope", "found"), "*fp64"),
        {"TOP": 8192.0, "BLOCK": 2048},
    ),
}


@pytest.mark.parametrize("target", [SM90, AMD], ids=describe)
@pytest.mark.parametrize(("kernel", "pointers", "constants"), SMALL.values(), ids=SMALL.keys())
def test_small_kernels(kernel: Any, pointers: dict, constants: dict, target: GPUTarget, tmp_path: Path) -> None:
    warps = 4 if kernel is kd_row_weights_kernel else 16
    does_not_spill(_compile(kernel, target, pointers, dict(constants), {"num_warps": warps}), tmp_path)


def specialised(kernel: Any, pointers: set[str]) -> set[str]:
    """The arguments whose value may cost a compilation in mid-training: integers, pointers that may be unaligned."""
    arguments = [p for p in kernel.params if not p.is_constexpr]
    integers = {p.name for p in arguments if p.name not in pointers}
    assert integers
    assert pointers >= {p.name for p in arguments} - integers
    free = {p.name for p in arguments if p.do_not_specialize or p.do_not_specialize_on_alignment}
    return {p.name for p in arguments} - free


def test_one_binary_serves_every_shape() -> None:
    """But for logits, which are aligned before the launch."""
    pointers = {
        "student",
        "teacher",
        "labels",
        "weights",
        "real_options",
        "normalizers",
        "upstream",
        "row_losses",
        "stats",
    }
    pointers |= {"gradient", "partials", "loss", "terms", "ticket"}
    for kernel in (kd_forward_kernel, kd_backward_kernel, kd_shard_kernel):
        assert specialised(kernel, pointers & {p.name for p in kernel.params}) == {"student", "teacher", "gradient"}
    for kernel, types, _ in SMALL.values():
        assert specialised(kernel, set(types)) == set()
