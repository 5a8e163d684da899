"""Which kernel answers a KD call, by shape, dtype, divergence and device; and how its blocks are laid out.

cluster   row pair in the shared memory of a thread-block cluster (CUDA C++ for Hopper): 6 bytes per 16-bit logit
resident  row pair in the registers of one program: 6 bytes
split     each row divided among several programs, one launch per pass: 10 or 14 bytes
whole     one program per row, two or three passes: 10 or 14 bytes, of which the caches serve what they hold
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from fusedkd.backends.layout import KernelId
from fusedkd.backends.triton.row import UNIT
from fusedkd.backends.triton.softmax import MAX_PARTS

CLUSTER_BYTES = 1 << 20
"""Of a student row: with the teacher's, what a cluster of 16 blocks holds in the shared memory of as many processors;
half of it where every processor is to hold two or three blocks.
"""

SURPLUS_COLUMNS = 2048
"""Of the student alone: a cluster does not hold them, and reads them one by one."""

RESIDENT_COLUMNS = 4096
"""Eight columns of both sides for each of 512 threads. A processor has two rows of so many columns at 64 registers, and
otherwise one, and nothing to compute while it waits for the next. Twice as many columns compile without a spill at 128
registers, but two passes over 8192 columns find the second in L1 and L2. Float64 does not fit.
"""

FEWER_COLUMNS = 2048
"""The same of forms for which 128 registers are too few: the mixture by Triton 3.8, soft-capped αβ by Triton 3.9."""

PART_COLUMNS = 8192
"""Two blocks: a shorter part is done before its launch has paid for itself."""

PROGRAMS = 2
"""Of 16 warps on a processor at a time: the parts of all rows run at once, in one wave."""


class Device(NamedTuple):
    processors: int
    cluster: bool
    """Whether `kd_cluster` is built and the device can run it."""
    hip: bool


@cache
def describe(device: torch.device) -> Device:
    """What the table needs to know, asked once. The interpreter counts as one processor: there, rows are never few."""
    if device.type != "cuda":
        return Device(1, False, False)
    properties, hip = torch.cuda.get_device_properties(device), torch.version.hip is not None
    built = torch._C._dispatch_has_kernel_for_dispatch_key("fusedkd::kd_cluster", "CUDA")
    return Device(properties.multi_processor_count, built and not hip and properties.major == 9, hip)


class Case(NamedTuple):
    rows: int
    V: int
    C: int
    student: torch.dtype
    teacher: torch.dtype
    kernel_id: int
    transform: bool
    forward: bool
    """Statistics are to be taken. Otherwise one pass is left, which nothing has to be kept for."""
    own_options: bool = False
    """Of each row, which the cluster kernel does not read."""


def choose(case: Case, device: Device) -> tuple[str, int]:
    """A kernel, the first line that fits, and the number of parts into which it splits a row."""
    rows, V, C, dtype, teacher, kernel_id, transform, forward, own_options = case
    wide = dtype == torch.float64
    cluster = device.cluster and not wide and dtype == teacher and not own_options
    cluster = cluster and (kernel_id == KernelId.FORWARD_KL or not transform)
    resident = forward and not wide and resident_columns(kernel_id, transform) >= C
    at_the_ends = V - C + 2 * UNIT.value  # at most: columns of the row that are not in its body
    parts = min(PROGRAMS * device.processors // rows, V // PART_COLUMNS, MAX_PARTS.value)

    if cluster and RESIDENT_COLUMNS < V and V * dtype.itemsize <= CLUSTER_BYTES and V - C <= SURPLUS_COLUMNS:
        return "cluster", 1
    if resident and at_the_ends <= _columns(C) // 8:
        return "resident", 1
    if parts > 1:  # few rows, and long ones
        return "split", parts
    return "whole", 1


def resident_columns(kernel_id: int, transform: bool) -> int:
    """The longest row that stays in registers. A sum with a mixture does not; soft-capped, no sum and no mixture."""
    if kernel_id == KernelId.MIXED_SUM or (transform and kernel_id in (KernelId.MIXTURE, KernelId.SUM)):
        return 0
    if kernel_id == KernelId.MIXTURE:
        return FEWER_COLUMNS
    return FEWER_COLUMNS if kernel_id == KernelId.ALPHA_BETA and transform else RESIDENT_COLUMNS


REGISTERS = 64, 80, 128, 168, 255
COLUMNS = 4096, 2048, 2048, 1024, 1024
"""Steps of a thread's registers, and of a block: a processor runs two programs of 16 warps, three or two of 8, or three
or two of 4; the last step is for MIXED_SUM alone. COLUMNS do not hold for rows that stay in registers: they have up to
16 warps at every step.
"""
PROCESSOR_REGISTERS = 65536
"""A program with more for all of its threads together cannot be launched."""

STEP = {KernelId.JEFFREYS: 1, KernelId.MIXTURE: 2, KernelId.ALPHA_BETA: 2, KernelId.DKD: 2}
STEP |= {KernelId.SUM: 1, KernelId.MIXED_SUM: 3}
"""Index into REGISTERS and COLUMNS, for two or three passes over 16-bit rows; 0 for other forms. A soft-cap, rows of 32
bits and rows that stay in registers take one step more each, surplus columns of the student if there is none of these.
Rows that stay in registers take none if the step is 0 and there is no cross-entropy.
"""

FUSED = {"enable_fp_fusion": True}
"""x·y + z in one instruction that rounds once, as the error bounds count on. Triton 3.10 no longer does it unasked."""


def layout(
    dtype: torch.dtype,
    columns: int,
    kernel_id: int,
    *,
    teacher: torch.dtype = torch.bfloat16,
    resident: bool = False,
    transform: bool = False,
    surplus: bool = False,
    ce: bool = True,
    in_phase: bool = True,
    hip: bool = False,
) -> dict[str, Any]:
    """Block and warps: eight columns of a block per thread (float64: four), groups of one 16-byte access of a student.

    Two blocks of 16 warps share an SM, no more, so that their row pairs are still in the L2 cache for the second pass.
    That takes at most 64 registers, which ptxas does not keep to unasked. They are enough where accesses are wide and
    rows have 16 bits; others have what the table says, twice as many where accesses are narrow.
    """
    wide = dtype == torch.float64
    step = STEP.get(KernelId(kernel_id), 0) + transform
    step += max(dtype.itemsize, teacher.itemsize) > 2 or (surplus and not transform and not resident)
    step = min(step + (resident and (ce or step > 0)), len(REGISTERS) - (1 if kernel_id == KernelId.MIXED_SUM else 2))
    largest = RESIDENT_COLUMNS if resident else min(COLUMNS[step], 2048 if wide else 4096)
    threads = min(_columns(columns), largest) // 8
    block = threads * (4 if wide else 8)
    options = {"BLOCK": block, "GROUP": 16 // dtype.itemsize, "num_warps": threads // (64 if hip else 32)} | FUSED
    if hip or wide:
        return options
    registers = REGISTERS[step] * (1 if in_phase else 2)
    return options | {"maxnreg": min(registers, PROCESSOR_REGISTERS // threads, 255)}


def _columns(n: int) -> int:
    return max(1 << max(n - 1, 0).bit_length(), 512)
