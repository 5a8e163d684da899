"""``python -m fusedkd.env``: versions, devices, and which backend serves each operator, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from fusedkd import __version__
from fusedkd.backends import dispatch


def versions() -> dict[str, str]:
    """The versions a bug report or a benchmark needs; what is not installed says so."""
    found = {"fusedkd": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "datasets", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> dict[str, str]:
    """The processor with what torch makes of it, and every GPU."""
    isa = torch.backends.cpu.get_cpu_capability()
    found = {"CPU": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {isa}"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"CUDA {index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        found["CUDA"] = "none"
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    for title, table in (("versions", versions()), ("devices", devices())):
        print(title)
        for name, value in table.items():
            print(f"  {name:<15} {value}")
        if title == "versions":
            print(f"  {'imported from':<15} {Path(__file__).parent}")
    compilers = {name: shutil.which(name) or "not found" for name in ("c++", "nvcc")}
    print("compilers")
    for name, path in compilers.items():
        print(f"  {name:<15} {path}")
    print("operators")
    for (operator, device), (backend, reason) in dispatch.serving.items():
        print(f"  {operator:<15} {device:<5} {backend:<12} {reason}")
    if not any(device == "CUDA" for _, device in dispatch.serving):
        print("  (this torch is built without CUDA and ROCm: with either, Triton serves what C++ serves here)")


if __name__ == "__main__":
    main()
