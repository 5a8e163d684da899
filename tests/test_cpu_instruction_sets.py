"""The C++ kernels on each instruction set of the processor, and what each has of its own: exponential and logarithm.

A plain run uses the best instruction set; `test_other_instruction_sets` runs this file, test_cpu_kernels.py, those of
the losses, test_kd_loss.py and test_cosine.py, and some of test_gumbel.py and others again with each
lower one, which FUSEDKD_ISA asks for.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import INF, isa, kd_inputs
from operators import forward, truth
from torch import Tensor

from fusedkd import JSD, SkewKL, SkewReverseKL
from fusedkd.backends.dispatch import serving

if serving["kd_forward", "CPU"][0] != "C++":
    pytest.skip("fusedkd._C does not serve the CPU", allow_module_level=True)


@pytest.mark.skipif("FUSEDKD_ISA" in os.environ, reason="is such a run")
@pytest.mark.parametrize("lower", ["avx2", "plain"])
def test_other_instruction_sets(lower: str) -> None:
    if isa() in (lower, "plain"):
        pytest.skip(f"{isa()} is what the processor has")
    here = Path(__file__).parent
    tests = ["test_cpu_instruction_sets.py", "test_cpu_kernels.py", "test_kd_loss.py", "test_cosine.py"]
    tests += [f"test_gumbel.py::test_{name}" for name in ("every_backend_has_the_same_noise", "choice_and_gradient")]
    tests += [f"test_few_columns.py::test_{name}" for name in ("every_width", "operators_agree")]
    tests += [f"test_divergences.py::test_{name}" for name in ("parameters", "far_apart", "underflow_on_both_sides")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not wide and not gpu", "-p", "no:cacheprovider"]
        + [str(here / name) for name in tests],
        env=os.environ | {"FUSEDKD_ISA": lower},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.skipif("FUSEDKD_ISA" not in os.environ, reason="no instruction set was asked for")
def test_the_wish_is_obeyed() -> None:
    assert isa() == os.environ["FUSEDKD_ISA"]


# -------------------------------------------------- exponential and logarithm


def two_columns(x: Tensor) -> Tensor:
    """2^x/(1 + 2^x) for x <= 0 as the kernels compute it: the gradient of a column whose teacher has p = 0."""
    student = torch.stack([torch.zeros_like(x), x], -1)[None]
    teacher = torch.tensor([0.0, -INF], dtype=x.dtype).expand_as(student)
    log2e = 1 / math.log(2)
    inputs = kd_inputs(student, teacher, None, temperature=log2e, kd_scale=2 * log2e, kd_weight=1.0)
    return forward(inputs)[2][0, :, 1]


@pytest.mark.parametrize(
    ("dtype", "least", "tolerance"), [(torch.float32, -126, 1.2e-7), (torch.float64, -1022, 2.3e-16)]
)
def test_exponential(dtype: torch.dtype, least: int, tolerance: float) -> None:
    """Relative accuracy over the whole range, and 0 below it. Normalisation rounds thrice more where 1 + 2^x > 1."""
    x = torch.cat([torch.linspace(0, least, 100_001), torch.arange(0, least - 1, -1), torch.tensor([-0.5, -1e-30])])
    x = x.to(dtype)
    exact = torch.exp2(x.double()) / (1 + torch.exp2(x.double()))
    error = (two_columns(x).double() - exact).abs() / exact
    tiny = x < (-25 if dtype == torch.float32 else -54)
    assert error[tiny].max() <= tolerance
    assert error.max() <= 4 * tolerance
    assert not two_columns(torch.tensor([least - 2.0, -5000.0, -3e38, -INF], dtype=dtype)).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("share", [1e-4, 0.1, 0.5, 0.9])
def test_logarithm(dtype: torch.dtype, tolerance: float, share: float) -> None:
    """log(1 + share·(e^−x − 1)) in mixtures of p and q that differ in one column of two, x from 0.01 to 60."""
    x = torch.logspace(-2, math.log10(60), 20_001, dtype=torch.float64).to(dtype)
    teacher = torch.stack([torch.zeros_like(x), -x], -1)[None]
    for divergence in (SkewKL(share), SkewReverseKL(share), JSD(share)):
        for student, other in ((torch.zeros_like(teacher), teacher), (teacher, torch.zeros_like(teacher))):
            inputs = kd_inputs(student, other, None, divergence=divergence, temperature=1.0)
            value, exact = forward(inputs, gradient=False)[0][0], truth(inputs, gradient=False)[0][0]
            noise = 1e-15  # of a definition that subtracts
            assert (value.double() - exact).abs().sub(noise).div(exact).max() <= tolerance
