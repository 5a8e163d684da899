"""The Triton kernels without a GPU: `triton_operators.py` and `triton_launches.py`, run by Triton's interpreter.

Triton decides when it is imported whether it interprets, hence a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_operators_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    files = [str(Path(__file__).with_name(name)) for name in ("triton_operators.py", "triton_launches.py")]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
