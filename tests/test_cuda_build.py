"""The CUDA library as it was built: its kernels have no spill and no stack, for Ampere and Hopper, and rows move 16
bytes at a time; the kernels of kd_cluster.cu by bulk copies, and on Hopper alone.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import fusedkd
from fusedkd.backends.layout import KernelId

triton = pytest.importorskip("triton")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LIBRARY = Path(fusedkd.__file__).with_name("_C_cuda.abi3.so")
KERNELS = 3 * (len(KernelId) + 1)
"""Dtypes; forms, and soft-caps with forward KL."""
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="nvcc was not on PATH when fusedkd was built")


def dump(option: str) -> str:
    return subprocess.run([CUOBJDUMP, option, LIBRARY], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_spill_and_no_stack(arch):
    machine_code = [
        part for part in dump("--dump-resource-usage").split("Fatbin elf code:") if f"arch = {arch}\n" in part
    ]
    if not machine_code:
        pytest.skip("FUSEDKD_CUDA_ARCHS left it out")
    frames = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", "".join(machine_code))
    assert len(frames) >= KERNELS
    assert set(frames) == {("0", "0")}


def kernels_of(code: str, start: str) -> list[str]:
    kernels = [part for part in code.split(start)[1:] if re.match(r"\S*kd_cluster_kernelI", part)]
    assert len(kernels) == KERNELS
    return kernels


def test_no_cluster_but_on_hopper():
    """The PTX for the GPUs after it."""
    for kernel in kernels_of(dump("--dump-ptx"), ".entry "):
        assert "trap;" in kernel
        assert re.search(r"\.maxntid 1\b", kernel), "cluster_fits() would take it for a kernel"


def test_clusters_copy_in_bulk_and_store_16_bytes():
    """In Hopper's machine code: bulk copies, barriers of shared memory and of the cluster, wide accesses."""
    if "sm_90a" not in dump("--list-elf"):
        pytest.skip("FUSEDKD_CUDA_ARCHS left it out")
    machine_code = dump("--dump-sass").split("arch = sm_90a\n")[-1].split("Fatbin ptx code:")[0]
    for kernel in kernels_of(machine_code, "Function : "):
        assert "UBLKCP.S.G" in kernel
        assert "SYNCS.PHASECHK.TRANS64.TRYWAIT" in kernel
        assert "UCGABAR_WAIT" in kernel
        assert kernel.count("STG.E.EF.128 ") >= 2
        assert kernel.count("LDS.128 ") + kernel.count("LD.E.128 ") >= 4
        assert not re.search(r"\b(LDL|STL)\b", kernel), "memory of a thread's own"
    assert dump("--dump-elf").count("0xc0 0x1 0x1") == KERNELS, "most threads of a block: 192"
