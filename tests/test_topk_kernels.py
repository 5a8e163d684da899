"""The kernels for teachers known at K columns: those of C++ here, on every instruction set of the processor, those of
Triton by its interpreter in a process of their own (`triton_topk_operators.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import operators
import pytest
import torch
from cpu_cases import before_a_fault, isa
from topk_cases import B, Case, L, N, case, check, inputs_of, run, same
from topk_rules import RULES
from truth import DTYPES

from fusedkd.backends import layout
from fusedkd.backends.dispatch import serving as backends
from fusedkd.backends.layout import TopkKernelId

ops = torch.ops.fusedkd
compiled = pytest.mark.skipif(backends["kd_forward", "CPU"][0] != "C++", reason="fusedkd._C does not serve the CPU")
forms = pytest.mark.parametrize("form", TopkKernelId, ids=lambda form: form.name.lower())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.skipif("FUSEDKD_ISA" in os.environ, reason="is such a run")
@compiled
@pytest.mark.parametrize("lower", ["avx2", "plain"])
def test_other_instruction_sets(lower: str) -> None:
    if isa() in (lower, "plain"):
        pytest.skip(f"{isa()} is what the processor has")
    child(__file__, "-k", "rules or 31-9", FUSEDKD_ISA=lower)


@pytest.mark.skipif("FUSEDKD_ISA" in os.environ, reason="has none")
def test_triton_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    child(str(Path(__file__).with_name("triton_topk_operators.py")), TRITON_INTERPRET="1")


def child(file: str, *arguments: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", file, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(file).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0, "labels": None},
    {"temperature": 3.0, "transform": (8.0, 1.5), "smoothing": 0.1},
    {"temperature": 4.0, "smoothing": 0.1, "teacher_dtype": torch.bfloat16},
]


# One column; less than a vector, with one of the list and with all; odd; several blocks; a list as long as they get
@compiled
@pytest.mark.parametrize(("V", "K"), [(1, 1), (7, 1), (7, 7), (31, 9), (2087, 64), (3000, 1024)])
@dtypes
@forms
def test_operators(form: TopkKernelId, dtype: torch.dtype, V: int, K: int) -> None:
    for options in OPTIONS:
        t = options.get("temperature", 1.0)
        listed = case(form, V, K, temperature=t)
        if form in (TopkKernelId.RENORMALIZE, TopkKernelId.RENORMALIZE_REVERSE):
            options = options | {"logprobs_temperature": 1.7}
        check(ops, form, listed, dtype, all_four=V != 3000, **options)


@compiled
@pytest.mark.parametrize("rule", RULES)
@forms
def test_rules(form: TopkKernelId, rule: Any) -> None:
    rule(ops, form)


@compiled
@dtypes
@pytest.mark.parametrize("V", [1, 31, 1040, 5000])
def test_last_row_ends_at_a_fault(dtype: torch.dtype, V: int) -> None:
    """Reads and writes past the last row would end the process here."""
    for form in (TopkKernelId.RENORMALIZE, TopkKernelId.RENORMALIZE_REVERSE, TopkKernelId.SAMPLES):
        student, teacher, ids = case(form, V, min(V, 20))
        student, teacher = student.to(dtype), teacher.to(dtype)
        y, w, n = torch.arange(N).clamp(max=V - 1), torch.ones(N), torch.ones(2).double()
        rest = y, w, torch.tensor([1.0] * 5 + [0.1] + [1.0] * (layout.OPTIONS - 6)).double(), n
        expected = operators.forward(inputs_of(form, Case(student, teacher, ids), *rest))[2]
        inside = Case(before_a_fault(student), before_a_fault(teacher), before_a_fault(ids))
        operators.forward_(inputs_of(form, inside, *rest))
        assert same(inside.student, expected)


@compiled
def test_threads_do_not_matter() -> None:
    student, teacher, ids = case(TopkKernelId.BUCKET, 9000, 64)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(ops, TopkKernelId.BUCKET, Case(student, teacher.nan_to_num(0), ids)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@compiled
def test_bad_operands_are_refused() -> None:
    rows = case(TopkKernelId.BUCKET, 9, 3)
    for bad in (
        rows._replace(ids=rows.ids.int()),
        rows._replace(ids=rows.ids[:, :2]),
        rows._replace(teacher=rows.teacher[:, :1]),
        rows._replace(student=rows.student.mT.contiguous().mT),
    ):
        with pytest.raises(RuntimeError, match="fusedkd"):
            run(ops, TopkKernelId.BUCKET, bad)
    with pytest.raises(RuntimeError, match="fusedkd"):
        run(ops, 7, rows)


@compiled
def test_strides() -> None:
    """The student's rows and the teacher's come as they lie."""
    rows = case(TopkKernelId.BUCKET, 40, 5)
    longer = torch.cat([rows.student, rows.student[:, :1] * torch.nan], 1)[:, :L]
    teacher = rows.teacher.transpose(0, 1).contiguous().transpose(0, 1)
    expected = run(ops, TopkKernelId.BUCKET, rows)
    assert longer.stride(0) != rows.student.stride(0)
    assert B > 1
    assert all(map(same, run(ops, TopkKernelId.BUCKET, Case(longer, teacher, rows.ids)), expected))
