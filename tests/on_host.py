"""Compiles a CUDA source for the CPU, where tests/cuda_on_host.h runs it thread by thread, and loads it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parent.parent


def load(source: str, folder: Path, *options: str) -> None:
    """The operators of csrc/cuda/`source` as ``torch.ops.fusedkd_on_host``, once they are defined."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / f"{Path(source).stem}_on_host.so"
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", "-w", "-fvisibility=hidden", *options]
    command += ["-U_FORTIFY_SOURCE"]  # refuses to jump from one fiber's stack to another's
    command += ["-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", '-DFUSEDKD_CUDA_ARCHS="90a"']
    command += [f"-isystem{path}" for path in include_paths()]
    command += ["-include", str(ROOT / "tests/cuda_on_host.h")]
    command += ["-x", "c++", str(ROOT / "csrc/cuda" / source), "-x", "none"]
    command += [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)


def guarded(values: Tensor, dtype: torch.dtype, device: str = "cpu", offset: int = 0, gap: int = 0) -> Tensor:
    """The values (B, L, H) as a strided view into NaN: rows `gap` elements apart, starting `offset` past 16 bytes."""
    b, length, h = values.shape
    stride = h + gap
    buffer = torch.full(((b * (length + 1) + 1) * stride + offset + 64,), torch.nan, dtype=dtype, device=device)
    view = buffer.as_strided((b, length, h), ((length + 1) * stride, stride, 1), 32 + offset)
    return view.copy_(values)
