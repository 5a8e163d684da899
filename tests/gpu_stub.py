"""A GPU that is not there: inside :func:`gpu`, Triton launches kernels on CPU tensors as it does on a GPU's (signature,
binder, specialisation, compilation, the limits that loading the machine code checks), but nothing runs.

Neither the interpreter nor a compilation ahead of time goes that way: both took a kernel that no GPU could launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fusedkd.backends.triton import choice, kd

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
REGISTERS = 65536
"""Of 32 bits, for all threads of a block, on every GPU since sm_50."""
SHARED_BYTES = 101376
"""A block's shared memory where there is least of it: sm_86, sm_89, sm_120."""


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    """The parameters that the machine code takes to be multiples of 16; other calls compile another."""
    threads: int
    fused: bool
    """The launch asks for x·y + z in one instruction."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that do not fit into its registers."""


class Machine(NamedTuple):
    """What `load_binary` makes of machine code."""

    registers: int
    spilled: int


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and more of the kernel in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", usage)}


def _load(name: str, binary: bytes, shared: int, device: int) -> tuple[None, Machine, int, int, int]:
    """As CUDA: the block may have as many threads as there are registers for, which go to threads eight at a time."""
    use = resources(binary)
    spilled = use["STACK"] + use["LOCAL"]
    threads = REGISTERS // (-(-max(use["REG"], 1) // 8) * 8) // 32 * 32
    return None, Machine(use["REG"], spilled), use["REG"], spilled // 4, min(threads, 1024)


class _Launcher:
    """Notes the launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Machine, *rest: Any) -> None:
        source, names = self.source, self.source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items()}
        aligned = frozenset(names[path[0]] for path, attributes in source.attrs.items() if attributes)
        threads, fused = self.metadata.num_warps * 32, self.metadata.enable_fp_fusion
        driver.active.launches.append(
            Launch(source.fn.__name__, (x, y, z), source.signature, constants, aligned, threads, fused, *function)
        )


class Driver:
    """What Triton asks of a driver. The device's number is its compute capability: kernels are kept per device."""

    launcher_cls = _Launcher

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[Launch] = []
        properties = {"max_shared_mem": SHARED_BYTES}
        self.utils = SimpleNamespace(load_binary=_load, get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiler:
    """A kernel that is compiled where it is launched."""

    def __init__(self, kernel: JITFunction, found: list[CompiledKernel]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **given: self.found.append(self.kernel.warmup(grid=grid, **given))


@contextmanager
def compiler(target: GPUTarget, *modules: ModuleType) -> Iterator[list[CompiledKernel]]:
    """The kernels that these modules launch inside, compiled ahead of time for a target, AMD's included."""
    hip = target.backend == "hip"
    stub = Driver(942 if hip else target.arch)
    found: list[CompiledKernel] = []
    before = driver._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stub, "get_current_target", lambda: target)
        patch.setattr(torch.version, "hip", "6.4" if hip else None)
        for module in modules:
            for name, x in list(vars(module).items()):
                if isinstance(x, JITFunction):
                    patch.setattr(module, name, _Compiler(x, found))
        driver.set_active(stub)
        try:
            yield found
        finally:
            driver._active = before


@contextmanager
def gpu(capability: int = 90, processors: int = 108) -> Iterator[list[Launch]]:
    """The launches inside, in order. What cannot be launched raises, as on a GPU of this compute capability; more
    threads than there are registers for: `triton.OutOfResources`.
    """
    stub = Driver(capability)
    before = driver._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.language, "default_fp_fusion", False)  # what Triton does unasked differs by version
        patch.setattr(kd, "describe", lambda _: choice.Device(processors, cluster=False, hip=False))
        driver.set_active(stub)
        try:
            yield stub.launches
        finally:
            driver._active = before
