"""Which backend answers which operator on which device, decided when the package is imported."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fusedkd.backends import attention_loop, block, eager, gumbel_loop, linear_loop, products, projected
from fusedkd.backends.schema import SCHEMAS, library

PACKAGE = Path(__file__).parent.parent

serving: dict[tuple[str, str], tuple[str, str]] = {}
"""(operator, device) → (backend, reason): what ``python -m fusedkd.env`` prints."""

LOOPS = {
    "linear_kd": linear_loop,
    "linear_hidden": projected,
    "attention": attention_loop,
    "gumbel_ids": gumbel_loop,
    "gumbel_gradients": gumbel_loop,
}
"""Operators that are PyTorch everywhere: products, and the operators above on tiles."""
KERNELS = {"kd_": "launch", "hidden_": "hidden", "layer_": "layers", "gumbel_": "gumbel"}
"""How the names of operators that have kernels begin → the module of :mod:`fusedkd.backends.triton` that starts them.
The C++ library has the same on a CPU, and so have the definitions.
"""
KERNEL_OPERATORS = {
    module: [name for name in SCHEMAS if name.startswith(prefix) and name not in LOOPS]
    for prefix, module in KERNELS.items()
}
WITH_KERNELS = list(chain.from_iterable(KERNEL_OPERATORS.values()))
DEFINED_OPERATORS = [name for name in SCHEMAS if name.startswith("defined_")]
SHARD_OPERATORS = ["kd_shard"]
BOTH_OPERATORS = ["kd_both"]
SCALARS = "a few scalars"
GATHERED = "the logits of all ranks are gathered"
UNIT_OPERATORS = ["linear_unit"]
PAIR_OPERATORS = ["attention_pairs"]


def load(library: str) -> str | None:
    """Load a compiled library, which registers its own operators; None, or the reason why it could not."""
    found = sorted(PACKAGE.glob(f"{library}.*so"))
    if not found:
        other = _hidden(library)
        hides = "" if other is None else f" in {PACKAGE}, which hides the installed {other}, where it is"
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
    here = PACKAGE
    folders = (Path(entry, here.name) for entry in sys.path)
    return next((f for f in folders if f.resolve() != here.resolve() and any(f.glob(f"{library}.*so"))), None)


def _advice() -> str:
    """What mends a library that is missing, as one sentence."""
    checkout = PACKAGE.parent
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
        serving[name, device] = backend, reason
        if module is not None:
            library.impl(name, getattr(module, name), device)


class _Slow:
    """The definitions, with one warning at the first call that says what is missing and how to build it."""

    def __init__(self, reason: str) -> None:
        self.message: str | None = (
            f"fusedkd: {reason}, so slow PyTorch definitions answer instead of the fused kernels. {_advice()}"
        )

    def __getattr__(self, name: str) -> Any:
        def operator(**arguments: Any) -> Any:
            if self.message is not None:
                message, self.message = self.message, None
                warnings.warn(message, stacklevel=2)
            return getattr(eager, name)(**arguments)

        return operator


def _serve_loops(device: str) -> None:
    """The operators that are PyTorch everywhere."""
    for name, module in LOOPS.items():
        _serve([name], device, "PyTorch", "products by torch.mm or `product`, tiles by the operators above", module)
    for name in DEFINED_OPERATORS:
        serving[name, device] = "PyTorch", "autograd on some rows at a time"
        function = getattr(import_module("fusedkd.backends.defined"), name.replace("defined", "kd"))
        library.impl(name, function, device)


def _ask_for_products() -> None:
    """The types that the library multiplies on this processor faster than PyTorch."""
    matrices = {dtype: torch.empty(0, 0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    out, product = matrices[torch.float32], torch.ops.fusedkd.product
    found = [dtype for dtype, x in matrices.items() if product(a=x, b=x, bias=None, out=out, add=False)]
    products.own_products = frozenset(found)
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in found)
    reason = f"of {names}, on this processor" if found else "this processor has no AVX-512, or a library that uses it"
    _serve(["product", *PAIR_OPERATORS], "CPU", "C++" if found else "PyTorch", reason)


def _serve_triton(device: str, reason: str) -> None:
    for module, names in KERNEL_OPERATORS.items():
        more = SHARD_OPERATORS + UNIT_OPERATORS if module == "launch" else []
        _serve(names + more, device, "Triton", reason, import_module(f"fusedkd.backends.triton.{module}"))
    _serve(PAIR_OPERATORS, device, "Triton", reason, import_module("fusedkd.backends.triton.attention"))


def _serve_definitions(device: str, reason: str, definitions: Any) -> None:
    _serve(WITH_KERNELS, device, "definitions", reason, definitions)
    _serve(SHARD_OPERATORS, device, "PyTorch", GATHERED)
    _serve(UNIT_OPERATORS, device, "PyTorch", SCALARS, linear_loop)


def _dispatch_cpu() -> None:
    choice = os.environ.get("FUSEDKD_BACKEND", "auto")
    _serve_loops("CPU")
    if choice == "definitions":
        _serve_definitions("CPU", "FUSEDKD_BACKEND=definitions", eager)
    elif choice == "triton":  # how the Triton kernels are tested without a GPU: TRITON_INTERPRET=1, or `make sanitize`
        _serve_triton("CPU", "FUSEDKD_BACKEND=triton")
    elif choice == "auto":
        missing = load("_C")
        if missing is None:
            _serve(UNIT_OPERATORS, "CPU", "PyTorch", SCALARS, linear_loop)
            _serve(WITH_KERNELS + SHARD_OPERATORS + BOTH_OPERATORS, "CPU", "C++", "fusedkd._C is built")
            block.both_on = frozenset({"cpu"})
            _ask_for_products()
        else:
            _serve_definitions("CPU", missing, _Slow(missing))
    else:
        raise ValueError(f"FUSEDKD_BACKEND must be auto, definitions or triton, not {choice!r}")


def _dispatch_cuda() -> None:
    if torch.version.cuda is None and torch.version.hip is None:  # asking for a device would break later forks
        return
    try:
        _serve_triton("CUDA", "Triton is installed")
    except ImportError as error:
        _serve_definitions("CUDA", f"Triton is missing ({error})", eager)
    _serve_loops("CUDA")
    missing = load("_C_cuda")
    if missing is None:
        if torch._C._dispatch_has_kernel_for_dispatch_key("fusedkd::kd_cluster", "CUDA"):
            _serve(["kd_cluster"], "CUDA", "CUDA C++", "fusedkd._C_cuda is built; Triton's kd_* call it on Hopper GPUs")
        else:
            _serve(["kd_cluster"], "CUDA", "nobody", "fusedkd._C_cuda is built without 90a in FUSEDKD_CUDA_ARCHS")


_dispatch_cpu()
_dispatch_cuda()
