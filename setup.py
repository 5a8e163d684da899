"""Builds the two libraries of fusedkd; everything else about the package is in pyproject.toml.

    fusedkd/_C.abi3.so        from csrc/cpu/*.cpp, the CPU kernels: by the C++ compiler
    fusedkd/_C_cuda.abi3.so   from csrc/cuda/*.cu, the CUDA kernels: by nvcc, called directly, where there is one

Both use the LibTorch stable ABI and nothing of Python's, so that one build serves every Python >= 3.10 and
torch >= 2.11; a CPU build of torch is enough to compile them. Neither is required: the package works without them, more
slowly, and a failure to build one is a warning when all is done. Environment variables:

    FUSEDKD_CPU, FUSEDKD_CUDA   0: do not build this library; 1: fail the installation if it cannot be built
    FUSEDKD_CUDA_ARCHS          compute capabilities, "80 90a 90+PTX" unless set (+PTX: newer GPUs can translate it);
                                without 90a, Triton answers on Hopper GPUs too
    CUDA_HOME                   where nvcc is, if not on PATH
    FUSEDKD_WERROR              1: a warning of the C++ compiler is an error, as in continuous integration
"""

import os
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

from backend import torch_folder

TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch that can load the libraries
CXX_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-g0", "-fvisibility=hidden"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--threads=0", "--split-compile=0"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("FUSEDKD_WERROR") == "1" else []
CXX_FLAGS += WARNINGS
NVCC_FLAGS += [f"-Xcompiler={','.join(WARNINGS)}", "--Werror=all-warnings"] if WARNINGS else []
BUILT_FOR = "built for the compute capabilities "  # csrc/cuda/archs.h

WITHOUT = {
    "FUSEDKD_CPU": "On a CPU it will be slow, PyTorch definitions answer instead of the fused kernels. Install a C++20 "
    "compiler, such as g++, and repeat the command; -v shows what it says, FUSEDKD_CPU=1 makes this an error.",
    "FUSEDKD_CUDA": "On Hopper GPUs Triton answers in the place of their own kernel. "
    "Repeat the command with -v to see what nvcc says; FUSEDKD_CUDA=1 makes this an error.",
}


def tell(message: str) -> None:
    """As a warning, which recent versions of pip show; on the terminal too, for older ones show nothing of a build that
    succeeds.
    """
    warnings.warn(message, stacklevel=2)
    if not sys.stderr.isatty():
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\n{message}", file=terminal)


def nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{cuda_home}/bin") if cuda_home else None)


def architectures() -> list[str]:
    """Compute capabilities as nvcc writes them: ["80", "90a", "90+PTX"]."""
    archs = os.environ.get("FUSEDKD_CUDA_ARCHS", "80 90a 90+PTX")
    return archs.replace(",", " ").replace(";", " ").replace(".", "").split()


def gencode(archs: list[str]) -> list[str]:
    """nvcc's options for such a list."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        code = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={code}_{number}")
    return flags


class BuildKernels(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True  # both libraries at once, and the CPU's sources
        self.left_out: list[str] = []

    def run(self) -> None:
        super().run()
        for message in self.left_out:
            tell(message)

    def build_extensions(self) -> None:
        compile_in_turn, workers = self.compiler.compile, os.cpu_count() if self.parallel is True else self.parallel

        def compile_at_once(sources: list[str], **options) -> list[str]:
            """The object files of the sources, in their order."""
            with ThreadPoolExecutor(workers) as pool:
                objects = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [file for of_source in objects for file in of_source]

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        try:
            torch = torch_folder()
            if torch is None:
                raise FileNotFoundError("there is no torch >= 2.11 to build against")
            for folder in ("include", "include/torch/csrc/api/include"):  # system folders, whose warnings do not count
                ext.extra_compile_args += ["-isystem", str(torch / folder)]
            ext.library_dirs = [str(torch / "lib")]
            if ext.name.endswith("_cuda"):
                self.build_with_nvcc(ext)
            else:
                super().build_extension(ext)
            return
        except OSError as error:
            reason = str(error)
        except (BaseError, CCompilerError):
            reason = "the compiler is missing or failed"
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build: it would be packed
        if ext.optional:
            self.left_out.append(f"fusedkd is built without {ext.name}: {reason}. {WITHOUT[ext.variable]}")
        raise CompileError(f"{reason}; fusedkd works without it, {ext.variable}=1 makes this an error")

    def build_with_nvcc(self, ext: Extension) -> None:
        compiler, target = nvcc(), Path(self.get_ext_fullpath(ext.name))
        if compiler is None:
            raise FileNotFoundError("nvcc is neither on PATH nor in CUDA_HOME/bin")
        newest = max(Path(file).stat().st_mtime for file in ext.sources + ext.depends)
        archs = " ".join(architectures())
        fresh = not self.force and target.exists() and target.stat().st_mtime > newest
        if fresh and f"{BUILT_FOR}{archs}:".encode() in target.read_bytes():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-shared", *ext.extra_compile_args, *gencode(architectures())]
        command += [f'-DFUSEDKD_CUDA_ARCHS="{archs}"']
        command += [f"-D{name}={value}" for name, value in ext.define_macros]
        command += [f"-L{path}" for path in ext.library_dirs]
        # A CPU torch lacks what USE_CUDA declares; at run time libtorch brings it (libtorch_cuda). cudart is static.
        command += ["-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
        self.spawn([*command, *ext.sources, "-o", str(target)])


def place(source: str) -> tuple[bool, str]:
    """In the order of building: what takes a third of the time comes first, so that the end is not a wait for it."""
    return Path(source).name != "kd.cpp", source


def library(
    name: str, sources: str, variable: str, default: bool, macros: dict[str, str], **options
) -> list[Extension]:
    """The extension as a list; an empty one where it is not wanted."""
    files, wish = sorted(glob(sources), key=place), os.environ.get(variable, "")
    if wish == "0" or not files or not (default or wish == "1"):
        return []
    macros = {"TORCH_TARGET_VERSION": TORCH_TARGET_VERSION, **macros}
    extension = Extension(
        name, files, define_macros=[*macros.items()], depends=glob("csrc/*/*.h") + glob("csrc/*/*.cuh"), **options
    )
    extension.py_limited_api, extension.optional, extension.variable = True, wish != "1" and not WARNINGS, variable
    return [extension]


cpu = library(
    "fusedkd._C", "csrc/cpu/*.cpp", "FUSEDKD_CPU", True, {}, extra_compile_args=CXX_FLAGS, libraries=["torch_cpu"]
)
cuda = library(
    "fusedkd._C_cuda",
    "csrc/cuda/*.cu",
    "FUSEDKD_CUDA",
    nvcc() is not None,
    {"USE_CUDA": "1"},
    extra_compile_args=NVCC_FLAGS,
)
setup(
    ext_modules=cpu + cuda,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # the wheel's tag
)
