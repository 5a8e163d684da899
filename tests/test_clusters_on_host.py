"""csrc/cuda/clusters.cuh, which talks to CUDA's runtime, run without one: clusters_on_host.cpp answers in its place."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

TESTS = Path(__file__).parent


def test_limits_are_set_once_and_room_is_asked_for(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folders = [f"-I{folder}" for folder in (TESTS / "no_cuda", TESTS.parent / "csrc/cuda")]
    folders += [f"-isystem{path}" for path in include_paths()]
    program = tmp_path / "clusters"
    source = TESTS / "clusters_on_host.cpp"
    subprocess.run([compiler, "-std=c++20", "-Wall", "-Werror", *folders, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
