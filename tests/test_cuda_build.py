"""Every CUDA source compiles for Ampere and Hopper with no spill and no stack, and rows move 16 bytes at a time; the
kernels of kd_cluster.cu by bulk copies, and on Hopper alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from fusedkd.backends.layout import KernelId

SOURCES = sorted((Path(__file__).parent.parent / "csrc/cuda").glob("*.cu"))
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.name)
def source(request):
    return request.param


@pytest.fixture(scope="module", params=["80", "90a"])
def compiled(request, source, tmp_path_factory) -> tuple[str, str]:
    """What ptxas reports, and the PTX."""
    folder = tmp_path_factory.mktemp(f"{source.stem}_sm_{request.param}")
    command = ["nvcc", "-std=c++20", "-O3", f"-gencode=arch=compute_{request.param},code=sm_{request.param}", "-cubin"]
    command += ["-Xptxas=-v", "--keep", f"--keep-dir={folder}", "-DUSE_CUDA", f"-o={folder}/kernels.cubin", str(source)]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-isystem={path}" for path in include_paths())]
    command += ["--split-compile=0"]  # the kernels of a file on all cores
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr, (folder / f"{source.stem}.ptx").read_text()


def test_no_spill_and_no_stack(compiled):
    report, ptx = compiled
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == ptx.count(".entry") > 0
    assert set(frames) == {("0", "0", "0")}, report


def entries_of(ptx: str, kernel: str) -> list[str]:
    return [entry for entry in re.split(r"\.entry ", ptx)[1:] if re.match(rf"\S*{kernel}", entry)]


def test_clusters_copy_in_bulk_and_store_16_bytes(source, compiled):
    if source.name != "kd_cluster.cu":
        pytest.skip("of kd_cluster.cu")
    _, ptx = compiled
    kernels = entries_of(ptx, "kd_cluster_kernelI")
    assert len(kernels) == 3 * (len(KernelId) + 1)  # dtypes; forms, and soft-caps with forward KL
    for kernel in kernels:
        copies = kernel.count("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes")
        if ".target sm_80" in ptx:
            assert "trap;" in kernel
            assert re.search(r"\.maxntid 1\b", kernel), "cluster_fits() would take it for a kernel"
            continue
        assert re.search(r"\.maxntid 192\b", kernel)
        assert copies > 0
        assert "mbarrier.try_wait" in kernel
        assert "st.shared::cluster" in kernel
        assert "barrier.cluster.wait.acquire" in kernel
        assert len(re.findall(r"st\.global\.cs\.v4", kernel)) >= 2
        assert len(re.findall(r"ld\.shared\.v4", kernel)) + len(re.findall(r"ld\.v4", kernel)) >= 4
        assert ".local" not in kernel
