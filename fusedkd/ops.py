"""Every operator of the namespace ``fusedkd``: its schema, its fake implementation, and which backend answers on which
device.

N rows come as ``(B, L, V)`` tensors whose last stride is 1; the other strides are free, so that ``logits[:, :-1]``
needs no copy; row (b, l) belongs to entry b·L + l of every ``(N,)`` vector. The teacher arrives narrowed to the
C = min(V_s, V_t) common columns. A is the accumulation type: float64 for a float64 student, float32 otherwise. Real
options travel in one small float64 tensor, in the order of :class:`Option`, so that a new temperature compiles nothing.
The mathematics is in :mod:`fusedkd.definitions`.

``kd_row_weights``  the KD weight of each row, ``(N,)`` float32: from the mask or the labels; 0 where the teacher row is
                    all −inf.
``kd_forward``      rows ``(2, N)``: T^k·w·D and CE; stats ``(N, 6)``: maximum and Σ exp((x − max)/T) of student and
                    teacher over the common columns, and of the student at T = 1 over all of its columns; the gradient
                    for upstream 1, or an empty tensor.
``kd_forward_``     the same with the gradient written over the student's logits.
``kd_backward``     the gradient times the upstream, ``()`` or ``(N,)``, from the logits and the stats: one rounding.
``kd_rescale_``     the same into an existing gradient, which is already right, and left alone, if the upstream is 1.
``cosine_*``        likewise for hidden states ``(B, L, H)``: rows ``(N,)``: w·(1 − cos); stats ``(N, 3)``: both inverse
                    norms, 1 − cos.
"""

from __future__ import annotations

import os
import warnings
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedkd import fallback


class Option(IntEnum):
    """Positions in the ``options`` tensor of the KD operators. A soft-cap of 0 is none."""

    TEMPERATURE = 0
    TEACHER_TEMPERATURE = 1
    KD_SCALE = 2
    KD_WEIGHT = 3
    CE_WEIGHT = 4
    LABEL_SMOOTHING = 5
    SOFTCAP = 6
    SCALE = 7
    TEACHER_SOFTCAP = 8
    TEACHER_SCALE = 9


_KD = "Tensor teacher, Tensor? labels, Tensor weights, Tensor options, Tensor normalizers"
_KD_FLAGS = "int ignore_index, bool transform"
_COSINE = "Tensor student, Tensor teacher, Tensor? weights, Tensor normalizer"

SCHEMAS = {
    "kd_row_weights": "(Tensor teacher, Tensor? labels, Tensor? kd_mask, int ignore_index) -> Tensor",
    "kd_forward": f"(Tensor student, {_KD}, {_KD_FLAGS}, bool gradient) -> (Tensor, Tensor, Tensor)",
    "kd_forward_": f"(Tensor(a!) student, {_KD}, {_KD_FLAGS}) -> (Tensor, Tensor)",
    "kd_backward": f"(Tensor upstream, Tensor student, {_KD}, Tensor stats, {_KD_FLAGS}) -> Tensor",
    "kd_rescale_": f"(Tensor(a!) gradient, Tensor upstream, Tensor student, {_KD}, Tensor stats, {_KD_FLAGS}) -> ()",
    "cosine_forward": f"({_COSINE}, bool gradient) -> (Tensor, Tensor, Tensor)",
    "cosine_backward": f"(Tensor upstream, {_COSINE}, Tensor stats) -> Tensor",
    "cosine_rescale_": f"(Tensor(a!) gradient, Tensor upstream, {_COSINE}, Tensor stats) -> ()",
}

_library = torch.library.Library("fusedkd", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.needs_exact_strides)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(tensor: Tensor) -> Any:
    return tensor.shape[0] * tensor.shape[1]


@torch.library.register_fake("fusedkd::kd_row_weights")
def _(teacher: Tensor, labels: Tensor | None, kd_mask: Tensor | None, ignore_index: int) -> Tensor:
    return teacher.new_empty(_rows(teacher), dtype=torch.float32)


@torch.library.register_fake("fusedkd::kd_forward")
def _(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = _rows(student), accumulation_dtype(student.dtype)
    gradient = student.new_empty(student.shape) if arguments[-1] else student.new_empty(0)
    return student.new_empty(2, n, dtype=dtype), student.new_empty(n, 6, dtype=dtype), gradient


@torch.library.register_fake("fusedkd::kd_forward_")
def _(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    n, dtype = _rows(student), accumulation_dtype(student.dtype)
    return student.new_empty(2, n, dtype=dtype), student.new_empty(n, 6, dtype=dtype)


@torch.library.register_fake("fusedkd::kd_backward")
@torch.library.register_fake("fusedkd::cosine_backward")
def _(upstream: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    return student.new_empty(student.shape)


@torch.library.register_fake("fusedkd::kd_rescale_")
@torch.library.register_fake("fusedkd::cosine_rescale_")
def _(*arguments: Any) -> None:
    return None


@torch.library.register_fake("fusedkd::cosine_forward")
def _(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = _rows(student), accumulation_dtype(student.dtype)
    gradient = student.new_empty(student.shape) if arguments[-1] else student.new_empty(0)
    return student.new_empty(n, dtype=dtype), student.new_empty(n, 3, dtype=dtype), gradient


# -------------------------------------------------- dispatch

backends: dict[tuple[str, str], tuple[str, str]] = {}
"""(operator, device) → (backend, reason): what ``python -m fusedkd.env`` prints."""

KD_OPERATORS = [name for name in SCHEMAS if name.startswith("kd_")]
COSINE_OPERATORS = [name for name in SCHEMAS if name.startswith("cosine_")]


def load(library: str) -> str | None:
    """Load a compiled library, which registers its own operators; None, or the reason why it could not."""
    found = sorted(Path(__file__).parent.glob(f"{library}.*so"))
    if not found:
        return f"{library} is not built"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{library} does not load ({error})"
    return None


def _serve(names: list[str], device: str, backend: str, reason: str, module: Any = None) -> None:
    """Note who answers these operators on the device and why; a Python module is also registered (a library did that
    itself).
    """
    for name in names:
        backends[name, device] = backend, reason
        if module is not None:
            _library.impl(name, getattr(module, name), device)


class _Slow:
    """The definitions, with one warning at the first call that says what is missing and how to build it."""

    def __init__(self, reason: str) -> None:
        self.message: str | None = (
            f"fusedkd: {reason}, so slow PyTorch definitions answer instead of the fused kernels. With a C++ compiler, "
            "`pip install --no-build-isolation --no-deps --force-reinstall .` in a checkout builds them."
        )

    def __getattr__(self, name: str) -> Any:
        def operator(*arguments: Any) -> Any:
            if self.message is not None:
                message, self.message = self.message, None
                warnings.warn(message, stacklevel=2)
            return getattr(fallback, name)(*arguments)

        return operator


def _dispatch_cpu() -> None:
    choice = os.environ.get("FUSEDKD_BACKEND", "auto")
    if choice == "definitions":
        _serve([*SCHEMAS], "CPU", "definitions", "FUSEDKD_BACKEND=definitions", fallback)
    elif choice == "triton":  # under TRITON_INTERPRET=1: how the Triton kernels are tested without a GPU
        _serve(KD_OPERATORS, "CPU", "Triton", "FUSEDKD_BACKEND=triton", import_module("fusedkd.kernels.kd"))
        _serve(COSINE_OPERATORS, "CPU", "definitions", "there is no Triton kernel for it", fallback)
    elif choice == "auto":
        missing = load("_C")
        if missing is None:
            _serve([*SCHEMAS], "CPU", "C++", "fusedkd._C is built")
        else:
            _serve([*SCHEMAS], "CPU", "definitions", missing, _Slow(missing))
    else:
        raise ValueError(f"FUSEDKD_BACKEND must be auto, definitions or triton, not {choice!r}")


def _dispatch_cuda() -> None:
    if torch.version.cuda is None and torch.version.hip is None:  # asking for a device would break later forks
        return
    try:
        _serve(KD_OPERATORS, "CUDA", "Triton", "Triton is installed", import_module("fusedkd.kernels.kd"))
    except ImportError as error:
        _serve(KD_OPERATORS, "CUDA", "definitions", f"Triton is missing ({error})", fallback)
    missing = load("_C_cuda")
    if missing is None:
        _serve(COSINE_OPERATORS, "CUDA", "CUDA C++", "fusedkd._C_cuda is built")
    else:
        _serve(COSINE_OPERATORS, "CUDA", "definitions", missing, fallback)


_dispatch_cpu()
_dispatch_cuda()
