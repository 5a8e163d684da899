"""A plugin of pytest that runs the tests marked `gpu` without a GPU, for `make sanitize`.

Every launch of a Triton kernel goes through Triton's own binder and front end and is executed on the CPU by ttsem,
which faults at an access outside of a tensor and at a race between programs. Memory that nobody wrote is NaN. Every
tensor says that it is on a GPU, which has 108 processors.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from ttsem import harness, mlir, sanitize

SKIPPED = {
    "compile": "Inductor has no GPU to compile for",
    "no_host_synchronisation": "nothing is ever waited for",
    "cuda_graph": "CUDA graphs",
    "test_memory": "memory statistics",
    "hidden_gpu.py::test_many_rows": "gigabytes",
    "memory_does_not": "memory statistics",
    "two_devices": "there is one device",
    "checks_its_arguments": "no tensor is on the CPU",
    "test_tracing": "fake tensors are told where a tensor really is",
    "test_saved_tensors": "so are checkpoints",
    "test_autocast": "so is autocast",
    "follow_the_module_to_a_device": "and so are modules",
}
"""Part of a test's name, and why it cannot run here."""

running = contextlib.ExitStack()
counts = sanitize.Session()


def pytest_load_initial_conftests() -> None:
    """Before the tests are imported, which ask whether there is a GPU."""
    global counts
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    _run_faster()
    counts = running.enter_context(sanitize.session(90, "<pytest>"))
    os.environ["FUSEDKD_BACKEND"] = "triton"
    from fusedkd.backends import dispatch, products
    from fusedkd.backends.triton import choice, kd

    kd.describe = choice.describe = lambda device: choice.Device(108, cluster=False, hip=False)
    dispatch.serving |= {(name, "CUDA"): backend for (name, _), backend in dispatch.serving.items()}
    product = products.product  # operands of 16 bits, result of 32: here, they are converted first
    products.product = lambda a, b, out, *x, **y: product(a.to(out.dtype), b.to(out.dtype), out, *x, **y)
    Tensor.is_cpu = property(lambda self: False)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Generator = Generator


class Generator(torch.Generator):
    """On the CPU, wherever it is asked for."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls)


def _run_faster() -> None:
    """ttsem compiles to machine code, which nobody executes, and parses a kernel again for each launch."""
    mlir.enable_generic_printing()
    modules: dict[Any, str] = {}

    def text(record: Any, stage: str, target: Any) -> str:
        key = record.fn.cache_key, str(harness._specialize(record.fn, record.args, record.kwargs, target))
        if key not in modules:
            modules[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return modules[key]

    harness.ir_for_launch = text
    mlir.parse = functools.cache(mlir.parse)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = next((why for part, why in SKIPPED.items() if part in item.nodeid.split("[")[0]), None)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist
        session.config.workeroutput["sanitizer"] = [counts.launches, counts.races_unchecked]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    launches, unchecked = node.workeroutput["sanitizer"]
    counts.launches += launches
    counts.races_unchecked += unchecked


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(
        f"{counts.launches} launches executed, {counts.races_unchecked} of them too large to look for races"
    )


def pytest_unconfigure() -> None:
    running.close()
