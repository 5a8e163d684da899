"""Every CUDA source compiles for Ampere and Hopper with no spill and no stack, and rows move 16 bytes at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

SOURCES = sorted((Path(__file__).parent.parent / "csrc").glob("*.cu"))
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
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr, (folder / f"{source.stem}.ptx").read_text()


def test_no_spill_and_no_stack(compiled):
    report, ptx = compiled
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == ptx.count(".entry") > 0
    assert set(frames) == {("0", "0", "0")}, report


def test_rows_in_registers_move_16_bytes_at_a_time(compiled):
    _, ptx = compiled
    entries = re.split(r"\.entry ", ptx)[1:]
    # The last template argument of cosine_kernel is the elements of a load: 1, or 16 bytes of the narrower side.
    wide = [entry for entry in entries if re.match(r"\S*cosine_kernelI\S+Li[48]EE", entry)]
    assert len(wide) == 9
    for entry in wide:
        loads = re.findall(r"ld\.global\.(v4\.[a-z]?\d+|[a-z]?16)", entry)
        stores = re.findall(r"st\.global\.(v4\.[a-z]?\d+|[a-z]?16)", entry)
        assert len(loads) >= 8
        assert len(stores) >= 4
        assert all(kind.startswith("v4") for kind in loads + stores)
