"""Which device and which backend the suite runs on.

Every conformance test takes the `device` fixture: ``pytest`` runs it on the CPU, ``pytest -m gpu`` on a GPU, and
``make sanitize`` on one that is not there (`sanitizer.py`). Who answers on the CPU is the environment's choice, as for
any user: the C++ extension, ``FUSEDKD_BACKEND=definitions``, or ``FUSEDKD_BACKEND=triton TRITON_INTERPRET=1``, which
leaves out the tests marked `wide` and still takes many minutes.

Functions whose tests take more than 50 ms each are marked `slow`: those of slow.txt, one list, so that a measurement
renews it as a whole. ``make quick`` runs the others, and names those that should be in the list. Files of which many
tests are in it start first, and those of FIRST before them: a long file that starts last keeps one worker of
``--dist loadfile`` busy while the others have nothing left.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from truth import INTERPRETED

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


FIRST = ("test_triton.py", "test_cpu_instruction_sets.py")  # few tests, of a minute and more each
SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().splitlines())  # file::function


@pytest.fixture(scope="session", params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "wide: rows too wide for Triton's interpreter")
    config.addinivalue_line("markers", "slow: more than 50 ms each, listed in tests/slow.txt")
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would start the files with the most tests
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once_per_launch()


def patch_once_per_launch() -> None:
    """Triton's interpreter (3.6 to 3.9) replaces the functions of its language when it launches a kernel, and again at
    each call of a helper, which is more than half of its time: here at the launch, for all modules. It also looks for
    an overflow in each sum of integers: here it does not, for the tests' rows are too short to have one. And it makes
    its table of NumPy's types anew wherever it needs one of them.
    """
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    of_pointers, of_numbers = np.dtype(np.uint64), cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda of: of_pointers if of.scalar.is_ptr() else of_numbers(of.scalar)
    everything = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda fn: patch(everything)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    for item in items:
        if f"{item.path.name}::{getattr(item, 'originalname', item.name)}" in SLOW:
            item.add_marker(pytest.mark.slow)
    for item in items if INTERPRETED else []:
        if item.get_closest_marker("wide"):
            item.add_marker(pytest.mark.skip(reason="too wide for Triton's interpreter"))
    yield  # `-m` selects
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.name not in FIRST, -slow[item.path], item.path))
