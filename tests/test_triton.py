"""The Triton kernels without a GPU, by Triton's interpreter: the operators; and what the conformance tests ask of the
backend, of rows that are broken, far from 0 or not selected, of statistics and of Gumbel noise.

Triton decides when it is imported whether it interprets, hence processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GUMBEL = "same_noise or ties or (choice_and_gradient and 2065)"
STATISTICS = "definitions and bfloat16 or pytorch_has and 301"
RULES = "(where_not_a_number and 0.5 and 0.7) or row_of_nan or (far_from_zero and 0.0) or not_selected"
ONE_OF_A_KERNEL = "not skew and not reverse"


def interpreted(*arguments: str, **environment: str) -> None:
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr


def test_operators_under_the_interpreter() -> None:
    interpreted("triton_operators.py", "triton_launches.py", "triton_attention_operators.py", FUSEDKD_BACKEND="triton")


def test_conformance_under_the_interpreter() -> None:
    """Of the files together, since one process starts faster than three: no name of one is meant in another."""
    files = ("test_divergence_rules.py", "test_statistics.py", "test_gumbel_operators.py")
    wanted = f"({RULES}) and {ONE_OF_A_KERNEL} or {STATISTICS} or {GUMBEL}"
    interpreted(*files, "-k", wanted, FUSEDKD_BACKEND="triton")
