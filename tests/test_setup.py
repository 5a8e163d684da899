"""What setup.py builds the CUDA library for, without nvcc; and what a library makes of that list."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from setuptools.errors import CompileError

from fusedkd.backends import dispatch

ROOT = Path(__file__).parents[1]


class Build:
    """setup.py's build of the CUDA library into a folder, with a stand-in for nvcc."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.library, self.patch, self.commands = folder / "_C_cuda.abi3.so", patch, []
        (folder / "nvcc").touch(0o755)
        patch.setenv("PATH", str(folder))
        patch.setenv("FUSEDKD_CUDA", "1")
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **arguments: None)

    def nvcc(self, command: list[str]) -> None:
        self.commands.append(command)
        archs = next(option for option in command if option.startswith("-DFUSEDKD_CUDA_ARCHS=")).split("=")[1]
        self.library.write_text(f"built for the compute capabilities {archs[1:-1]}: build it again")

    def run(self, archs: str | None) -> list[list[str]]:
        """All commands so far."""
        self.patch.delenv("FUSEDKD_CUDA_ARCHS", raising=False)
        if archs is not None:
            self.patch.setenv("FUSEDKD_CUDA_ARCHS", archs)
        script: dict[str, Any] = runpy.run_path("setup.py")
        command = script["BuildKernels"](setuptools.Distribution())
        command.spawn, command.get_ext_fullpath = self.nvcc, lambda name: str(self.library)
        command.build_with_nvcc(script["cuda"][0])
        return self.commands


def test_a_library_is_built_again_for_other_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build(tmp_path, monkeypatch)
    first = list(build.run(None))
    assert len(first) == 1
    assert [option for option in first[0] if option.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert '-DFUSEDKD_CUDA_ARCHS="80 90a 90+PTX"' in first[0]
    assert build.run("8.0;9.0a, 9.0+PTX") == first, "the same list"
    again = build.run("80 90")
    assert len(again) == 2
    assert '-DFUSEDKD_CUDA_ARCHS="80 90"' in again[1]
    assert not any("90a" in option for option in again[1])


def test_kernels_for_hopper_need_90a(tmp_path: Path) -> None:
    """Compiled for 90 alone they are empty: nobody may be offered them."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "archs.cpp"
    yes, no = ("80 90a 90+PTX", "90a", "90a+PTX"), ("80 90", "80 90+PTX", "100a", "unknown")
    checks = [f'static_assert({"" if a in yes else "!"}fusedkd::has_hopper("{a}"));' for a in (*yes, *no)]
    checks.append("static_assert(!fusedkd::has_hopper(FUSEDKD_CUDA_ARCHS));")  # not known
    source.write_text("\n".join(['#include "archs.h"', *checks]))
    subprocess.run([compiler, "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc/cuda'}", str(source)], check=True)


def test_the_report_says_why_nobody_answers_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library built and loaded, but not for 90a."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(dispatch, "load", lambda library: None)
    monkeypatch.setattr(dispatch, "serving", {})
    monkeypatch.setattr(dispatch, "library", SimpleNamespace(impl=lambda *arguments: None))
    pytest.importorskip("triton")
    for built, backend in ((False, "nobody"), (True, "CUDA C++")):
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *names, built=built: built)
        dispatch._dispatch_cuda()
        assert dispatch.serving["kd_cluster", "CUDA"][0] == backend
        assert dispatch.serving["kd_forward", "CUDA"][0] == "Triton"
        assert ("90a" in dispatch.serving["kd_cluster", "CUDA"][1]) is not built


@pytest.mark.parametrize("fails", [False, True])
def test_sources_are_compiled_at_once(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other; object files keep the order of the sources, and an error of one is the build's."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    script: dict[str, Any] = runpy.run_path("setup.py")
    command, together = script["BuildKernels"](setuptools.Distribution()), threading.Barrier(2, timeout=20)

    def compile_in_turn(sources: list[str], debug: bool) -> list[str]:
        together.wait()
        if fails and sources == ["b.cpp"]:
            raise CompileError("broken")
        return [source.replace(".cpp", ".o") for source in sources]

    command.compiler, command.parallel, command.extensions = SimpleNamespace(compile=compile_in_turn), 2, []
    command.build_extensions()
    if fails:
        with pytest.raises(CompileError, match="broken"):
            command.compiler.compile(["a.cpp", "b.cpp"], debug=False)
    else:
        assert command.compiler.compile(["b.cpp", "a.cpp"], debug=False) == ["b.o", "a.o"]
