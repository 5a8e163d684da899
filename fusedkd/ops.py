"""Every operator of the namespace ``fusedkd``: its schema, its fake implementation, and which backend answers on which
device.

N rows come as ``(B, L, V)`` tensors whose last stride is 1; the other strides are free, so that ``logits[:, :-1]``
needs no copy; row (b, l) belongs to entry b·L + l of every ``(N,)`` vector. The teacher arrives narrowed to the
C = min(V_s, V_t) common columns. A is the accumulation type: float64 for a float64 student, float32 otherwise. Real
options travel in one small float64 tensor, in the order of :class:`Option`, so that a new temperature compiles nothing.
The mathematics is in :mod:`fusedkd.definitions`, :mod:`fusedkd.divergences` and :mod:`fusedkd.sparse`.

``kd_row_weights``  the KD weight of each row, ``(N,)`` float32, from the mask or the labels: 0 where the teacher row is
                    all −inf (with ids: has no finite entry), and everywhere, with nothing read, unless ``kd``; and both
                    normalisers of ``"mean"``, ``(2,)`` float64: selected rows, or the sum of a float mask, and labelled
                    rows; 1 for none.
``kd_forward``      rows ``(2, N)``: T^k·w·D and CE (of ``ce`` alone: a divergence may need the labels for itself);
                    stats ``(N, 8)``: maximum and Σ exp((x − max)/T) of student and teacher over the columns of the KD
                    term, and of the student at T = 1 over all of its columns; Σw of the gradient w − q·Σw, +inf where D
                    is infinite; one more for the backend's own use; and the gradient for upstream 1, or an empty
                    tensor.
``kd_forward_``     the same with the gradient written over the student's logits.
``kd_backward``     the gradient times the upstream, ``()`` or ``(N,)``, from the logits and the stats: one rounding.
``kd_rescale_``     the same into an existing gradient, which is already right, and left alone, if the upstream is 1.
``topk_*``          the four for a teacher known at K columns per row: ids ``(N, K)`` int64, −1 for padding, and as
                    ``teacher`` its log-probabilities or weights there, ``(B, L, K)``.
``kd_terms``        (loss, kd, ce) from rows: sums over the normalisers, or per row.
``kd_cluster``      kd_forward, kd_backward or kd_rescale_ in one pass on a Hopper GPU, into tensors that it is given.
                    False, and nothing is written, where no cluster of the device has room for a row.
``linear_kd``       all of the KD loss from hidden states ``(N, H_s)``, a head ``(V_s, H_s)`` and a bias ``(V_s,)`` or
                    None, tile by tile through the operators above. Of each teacher: its rows ``(N, ·)``; the head that
                    makes logits of them, or None; ids or None; weights, options, normalisers and form as above. The
                    first has the cross-entropy. ``tile`` rows of ``tile_dtype`` logits at a time; ``wanted``: the
                    gradients of hidden states, head, bias, for `upstream`: ``(N,)``, or None for 1. Products are made
                    in ``dtype``. Returns rows ``(teachers, 2, N)`` and the gradients in A, each empty if not wanted.
``cosine_*``        likewise for hidden states ``(B, L, H)``: rows ``(N,)``: w·(1 − cos); stats ``(N, 3)``: both inverse
                    norms, 1 − cos.
"""

from __future__ import annotations

import os
import sys
import warnings
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedkd import fallback


class Option(IntEnum):
    """Positions in the ``options`` tensor ``(16,)`` of the KD operators. A soft-cap of 0 is none. From COEFFICIENTS on:
    a₀, a₁, … of the divergence's form, then zeros.
    """

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
    COEFFICIENTS = 10


OPTIONS = 16


STATS = 8

_COSINE = "Tensor student, Tensor teacher, Tensor? weights, Tensor normalizer"
_FLAGS = "int ignore_index, int form, bool transform, bool ce"


def _kd_schemas(prefix: str, ids: str) -> dict[str, str]:
    inputs = f"Tensor teacher, {ids}Tensor? labels, Tensor weights, Tensor options, Tensor normalizers"
    return {
        f"{prefix}_forward": f"(Tensor student, {inputs}, {_FLAGS}, bool gradient) -> (Tensor, Tensor, Tensor)",
        f"{prefix}_forward_": f"(Tensor(a!) student, {inputs}, {_FLAGS}) -> (Tensor, Tensor)",
        f"{prefix}_backward": f"(Tensor upstream, Tensor student, {inputs}, Tensor stats, {_FLAGS}) -> Tensor",
        f"{prefix}_rescale_": f"(Tensor(a!) gradient, Tensor upstream, Tensor student, {inputs}, Tensor stats, "
        f"{_FLAGS}) -> ()",
    }


SCHEMAS = {
    "kd_row_weights": "(Tensor teacher, Tensor? ids, Tensor? labels, Tensor? kd_mask, int ignore_index, bool kd)"
    " -> (Tensor, Tensor)",
    **_kd_schemas("kd", ""),
    **_kd_schemas("topk", "Tensor ids, "),
    "kd_terms": "(Tensor rows, Tensor options, Tensor normalizers, bool per_row) -> (Tensor, Tensor, Tensor)",
    "linear_kd": "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, Tensor[] teachers, Tensor?[] heads, "
    "Tensor?[] biases, Tensor?[] ids, Tensor[] row_weights, Tensor[] options, Tensor[] normalizers, Tensor? upstream, "
    "int ignore_index, int[] forms, bool transform, bool ce, SymInt tile, ScalarType tile_dtype, ScalarType dtype, "
    "SymInt? max_rows, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    "cosine_forward": f"({_COSINE}, bool gradient) -> (Tensor, Tensor, Tensor)",
    "cosine_backward": f"(Tensor upstream, {_COSINE}, Tensor stats) -> Tensor",
    "cosine_rescale_": f"(Tensor(a!) gradient, Tensor upstream, {_COSINE}, Tensor stats) -> ()",
}
CLUSTER = (
    "kd_cluster(Tensor student, Tensor teacher, Tensor? labels, Tensor weights, Tensor options, Tensor normalizers, "
    f"Tensor? upstream, Tensor(a!)? rows, Tensor(b!) stats, Tensor(c!)? gradient, {_FLAGS}, bool rescale) -> bool"
)

_library = torch.library.Library("fusedkd", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.needs_exact_strides)
_library.define(CLUSTER)  # called by kd_* alone, below everything that traces


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(tensor: Tensor) -> Any:
    return tensor.shape[0] * tensor.shape[1]


def _rows_and_stats(student: Tensor) -> tuple[Tensor, Tensor]:
    n, dtype = _rows(student), accumulation_dtype(student.dtype)
    return student.new_empty(2, n, dtype=dtype), student.new_empty(n, STATS, dtype=dtype)


@torch.library.register_fake("fusedkd::kd_row_weights")
def _(teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return teacher.new_empty(_rows(teacher), dtype=torch.float32), teacher.new_empty(2, dtype=torch.float64)


@torch.library.register_fake("fusedkd::kd_forward")
@torch.library.register_fake("fusedkd::topk_forward")
def _(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_rows_and_stats(student), student.new_empty(student.shape if arguments[-1] else 0)


@torch.library.register_fake("fusedkd::kd_forward_")
@torch.library.register_fake("fusedkd::topk_forward_")
def _(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _rows_and_stats(student)


@torch.library.register_fake("fusedkd::kd_backward")
@torch.library.register_fake("fusedkd::topk_backward")
@torch.library.register_fake("fusedkd::cosine_backward")
def _(upstream: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    return student.new_empty(student.shape)


@torch.library.register_fake("fusedkd::kd_rescale_")
@torch.library.register_fake("fusedkd::topk_rescale_")
@torch.library.register_fake("fusedkd::cosine_rescale_")
def _(*arguments: Any) -> None:
    return None


@torch.library.register_fake("fusedkd::kd_terms")
def _(rows: Tensor, options: Tensor, normalizers: Tensor, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (rows.shape[1],) if per_row else ()
    return rows.new_empty(shape), rows.new_empty(shape), rows.new_empty(shape)


@torch.library.register_fake("fusedkd::cosine_forward")
def _(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = _rows(student), accumulation_dtype(student.dtype)
    gradient = student.new_empty(student.shape) if arguments[-1] else student.new_empty(0)
    return student.new_empty(n, dtype=dtype), student.new_empty(n, 3, dtype=dtype), gradient


@torch.library.register_fake("fusedkd::linear_kd")
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, *arguments: Any) -> Any:
    linear, teachers, dtype, wanted = import_module("fusedkd.linear"), arguments[0], arguments[-3], arguments[-1]
    rows = hidden.new_empty(len(teachers), 2, hidden.shape[0], dtype=accumulation_dtype(dtype))
    return rows, *linear.gradients_like(hidden, weight, wanted)


# -------------------------------------------------- dispatch

backends: dict[tuple[str, str], tuple[str, str]] = {}
"""(operator, device) → (backend, reason): what ``python -m fusedkd.env`` prints."""

KD_OPERATORS = [name for name in SCHEMAS if name.startswith("kd_")]
TOPK_OPERATORS = [name for name in SCHEMAS if name.startswith("topk_")]
COSINE_OPERATORS = [name for name in SCHEMAS if name.startswith("cosine_")]
TILE_OPERATORS = [name for name in SCHEMAS if not name.startswith("linear_")]
LINEAR_OPERATORS = [name for name in SCHEMAS if name.startswith("linear_")]


def load(library: str) -> str | None:
    """Load a compiled library, which registers its own operators; None, or the reason why it could not."""
    found = sorted(Path(__file__).parent.glob(f"{library}.*so"))
    if not found:
        other = _hidden(library)
        hides = "" if other is None else f" in {Path(__file__).parent}, which hides the installed {other}, where it is"
        return f"{library} is not built{hides}"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{library} does not load ({error})"
    return None


def _hidden(library: str) -> Path | None:
    """The folder of an installed fusedkd that has the library, where this one, a checkout in which Python was started,
    comes before it.
    """
    here = Path(__file__).parent
    folders = (Path(entry, here.name) for entry in sys.path)
    return next((f for f in folders if f.resolve() != here.resolve() and any(f.glob(f"{library}.*so"))), None)


def _advice() -> str:
    """What mends a library that is missing, as one sentence."""
    checkout = Path(__file__).parent.parent
    hidden = _hidden("_C") is not None
    builds = "With a C++ compiler, `pip install --no-build-isolation --no-deps"
    if (checkout / "setup.py").is_file():
        start = f"Start Python outside of {checkout} to use the installed one. " if hidden else ""
        return f"{start}{builds} -e {checkout}` builds {'it here' if hidden else 'them'}."
    return f"{builds} --force-reinstall .` in a checkout builds them."


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
            f"fusedkd: {reason}, so slow PyTorch definitions answer instead of the fused kernels. {_advice()}"
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
    reason = "products by torch.mm, tiles by the operators above"
    _serve(LINEAR_OPERATORS, "CPU", "PyTorch", reason, import_module("fusedkd.linear"))
    if choice == "definitions":
        _serve(TILE_OPERATORS, "CPU", "definitions", "FUSEDKD_BACKEND=definitions", fallback)
    elif choice == "triton":  # how the Triton kernels are tested without a GPU: TRITON_INTERPRET=1, or `make sanitize`
        for names, module in ((KD_OPERATORS, "kd"), (TOPK_OPERATORS, "topk")):
            _serve(names, "CPU", "Triton", "FUSEDKD_BACKEND=triton", import_module(f"fusedkd.kernels.{module}"))
        _serve(COSINE_OPERATORS, "CPU", "definitions", "there is no Triton kernel for it", fallback)
    elif choice == "auto":
        missing = load("_C")
        if missing is None:
            _serve(TILE_OPERATORS, "CPU", "C++", "fusedkd._C is built")
        else:
            _serve(TILE_OPERATORS, "CPU", "definitions", missing, _Slow(missing))
    else:
        raise ValueError(f"FUSEDKD_BACKEND must be auto, definitions or triton, not {choice!r}")


def _dispatch_cuda() -> None:
    if torch.version.cuda is None and torch.version.hip is None:  # asking for a device would break later forks
        return
    try:
        for names, module in ((KD_OPERATORS, "kd"), (TOPK_OPERATORS, "topk")):
            _serve(names, "CUDA", "Triton", "Triton is installed", import_module(f"fusedkd.kernels.{module}"))
    except ImportError as error:
        _serve(KD_OPERATORS + TOPK_OPERATORS, "CUDA", "definitions", f"Triton is missing ({error})", fallback)
    reason = "products by torch.mm, tiles by the operators above"
    _serve(LINEAR_OPERATORS, "CUDA", "PyTorch", reason, import_module("fusedkd.linear"))
    missing = load("_C_cuda")
    if missing is None:
        _serve(COSINE_OPERATORS, "CUDA", "CUDA C++", "fusedkd._C_cuda is built")
        if torch._C._dispatch_has_kernel_for_dispatch_key("fusedkd::kd_cluster", "CUDA"):
            _serve(["kd_cluster"], "CUDA", "CUDA C++", "fusedkd._C_cuda is built; Triton's kd_* call it on Hopper GPUs")
        else:
            _serve(["kd_cluster"], "CUDA", "nobody", "fusedkd._C_cuda is built without 90a in FUSEDKD_CUDA_ARCHS")
    else:
        _serve(COSINE_OPERATORS, "CUDA", "definitions", missing, fallback)


_dispatch_cpu()
_dispatch_cuda()
