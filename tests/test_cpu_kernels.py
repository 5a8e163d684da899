"""What is specific to the C++ kernels: instruction sets, exponential and logarithm, nothing outside of a row, threads.

A plain run uses the best instruction set of the processor; `test_other_instruction_sets` runs this file, those of the
losses, test_kd_loss.py and test_cosine.py, and some of test_divergences.py again with each lower one, which FUSEDKD_ISA
asks for.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import divergences, families
from torch import Tensor
from truth import DTYPES, pair, targets

from fusedkd import DKD, JSD, SkewKL, SkewReverseKL
from fusedkd.backends import dispatch, eager
from fusedkd.backends.dispatch import serving as backends
from fusedkd.backends.layout import FINITE_GRADIENT, KernelId
from fusedkd.divergences import Divergence, ForwardKL

if backends["kd_forward", "CPU"][0] != "C++":
    pytest.skip("fusedkd._C does not serve the CPU", allow_module_level=True)

ops = torch.ops.fusedkd
LIBRARY = next(dispatch.PACKAGE.glob("_C.*so"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF, NAN = float("inf"), float("nan")


def isa() -> str:
    function = ctypes.CDLL(str(LIBRARY)).fusedkd_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def kd_arguments(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None = None,
    divergence: Divergence | None = None,
    **values: float,
) -> tuple[Any, ...]:
    """The arguments of kd_forward up to `gradient`; `values` are entries of `options`, by name."""
    divergence = ForwardKL() if divergence is None else divergence
    t = 1.0 if divergence.kernel_id == KernelId.LOGIT_MSE else values.get("temperature", 2.0)
    defaults = {
        "temperature": t,
        "teacher_temperature": t,
        "kd_scale": t * t,
        "kd_weight": 0.5,
        "ce_weight": 0.7,
        "smoothing": 0.0,
        "softcap": 0.0,
        "scale": 1.0,
        "teacher_softcap": 0.0,
        "teacher_scale": 1.0,
    }
    rows = student.shape[0] * student.shape[1]
    weights = torch.ones(rows) if weights is None else weights
    coefficients = [float(x) for x in divergence.coefficients()]
    options = [*(defaults | values | {"temperature": t}).values(), *coefficients, *[0.0] * (6 - len(coefficients))]
    normalizers = torch.tensor([2.0, 3.0], dtype=torch.float64)
    transform = bool({"softcap", "scale", "teacher_softcap", "teacher_scale"} & values.keys())
    flags = -100, int(divergence.kernel_id), transform, labels is not None
    return student, teacher, labels, weights, torch.tensor(options, dtype=torch.float64), normalizers, *flags


def kd_operators(arguments: tuple[Any, ...]) -> list[Tensor]:
    """What the KD operators say of these arguments, after a check that they agree to the last bit where they must."""
    student, *rest = arguments
    rows, stats, gradient = ops.kd_forward(*arguments, True)
    three = torch.full((), 3.0, dtype=rows.dtype)
    given = (*arguments[:6], stats, *arguments[6:])
    tripled = ops.kd_backward(three, *given)
    assert identical(rows, ops.kd_forward(*arguments, False)[0])
    assert identical(tripled, ops.kd_backward(three.expand(rows.shape[1]).contiguous(), *given))
    rescaled = gradient.clone()
    ops.kd_rescale_(rescaled, three, *given)
    assert identical(rescaled, tripled)
    inside = guarded(student)
    assert identical(rows, ops.kd_forward_(inside, *rest)[0])
    assert identical(inside, gradient)
    assert_guards(inside)
    return [rows, stats, gradient, tripled]


def identical(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def guarded(x: Tensor, gap: int = 33) -> Tensor:
    """A copy of x whose rows lie between NaN: `gap` columns around every row, whole rows of them around every batch."""
    batches, length, width = x.shape
    buffer = torch.full((batches + 1, length + 2, width + gap), NAN, dtype=x.dtype)
    return buffer[:batches, 1 : length + 1, gap // 3 : gap // 3 + width].copy_(x)


def assert_guards(inside: Tensor) -> None:
    assert inside._base is not None
    outside = inside._base.clone()
    outside.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(NAN)
    assert outside.isnan().all(), "written outside of a row"


def before_a_fault(x: Tensor) -> Tensor:
    """A contiguous copy of x that ends where a page starts that faults when touched."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages * page - size)
    return flat.view(x.shape).copy_(x)


def assert_gradient(actual: Tensor, truth: Tensor, subtracted: float) -> None:
    """The test rule for all rows at once: 1.25 × rounding + 1e-6 × the norms of what was subtracted."""
    rounding = (truth.to(actual.dtype).double() - truth).norm()
    bound = 1.25 * rounding + (1e-13 if actual.dtype == torch.float64 else 1e-6) * subtracted
    assert truth.norm() > 2 * bound, "an all-zero gradient would pass"
    assert (actual.double() - truth).norm() <= bound


# -------------------------------------------------- instruction sets


@pytest.mark.skipif("FUSEDKD_ISA" in os.environ, reason="is such a run")
@pytest.mark.parametrize("lower", ["avx2", "plain"])
def test_other_instruction_sets(lower: str) -> None:
    if isa() in (lower, "plain"):
        pytest.skip(f"{isa()} is what the processor has")
    here = Path(__file__).parent
    tests = ["test_cpu_kernels.py", "test_kd_loss.py", "test_cosine.py"]
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
    arguments = kd_arguments(student, teacher, None, temperature=log2e, kd_scale=2 * log2e, kd_weight=1.0)
    return ops.kd_forward(*arguments, True)[2][0, :, 1]


@pytest.mark.parametrize(
    ("dtype", "least", "tolerance"), [(torch.float32, -126, 1.2e-7), (torch.float64, -1022, 2.3e-16)]
)
def test_exponential(dtype: torch.dtype, least: int, tolerance: float) -> None:
    """Relative accuracy over the whole range, and 0 below it. Normalisation rounds thrice more where 1 + 2^x > 1."""
    x = torch.cat([torch.linspace(0, least, 100_001), torch.arange(0, least - 1, -1), torch.tensor([-0.5, -1e-30])])
    x = x.to(dtype)
    truth = torch.exp2(x.double()) / (1 + torch.exp2(x.double()))
    error = (two_columns(x).double() - truth).abs() / truth
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
            arguments = kd_arguments(student, other, None, divergence=divergence, temperature=1.0)
            value = ops.kd_forward(*arguments, False)[0][0]
            truth = eager.kd_forward(student.double(), other.double(), *arguments[2:], False)[0][0]
            noise = 1e-15  # of a definition that subtracts
            assert (value.double() - truth).abs().sub(noise).div(truth).max() <= tolerance


@families
@dtypes
@pytest.mark.parametrize("at", [0, 15, 16, 30])
def test_nan_shows(divergence: Divergence, dtype: torch.dtype, at: int) -> None:
    for bad in (NAN, INF):
        for which in (0, 1):
            operands = pair(1, 3, 31, dtype=dtype)
            operands[which][0, 1, at] = bad
            arguments = kd_arguments(*operands, torch.tensor([1, 2, 3]), divergence=divergence)
            rows, _, gradient = ops.kd_forward(*arguments, True)
            if divergence.kernel_id != KernelId.LOGIT_MSE or bad != INF:  # (∞ − v)² is ∞, without a gradient
                assert rows[0].isnan().tolist() == [False, True, False]
                assert gradient[0].isnan().any(-1).tolist() == [False, True, False]
            assert rows[1].isnan().tolist() == [False, which == 0, False]


@dtypes
def test_minus_infinity(dtype: torch.dtype) -> None:
    student, teacher = pair(1, 5, 100, dtype=dtype)
    student[0, :, 17] = teacher[0, :, 17] = -INF  # masked by both: contributes nothing
    student[0, 1, 3] = -INF  # by the student alone: infinite,
    teacher[0, 1, 3] = -500.0  # even where p underflows
    teacher[0, 2, 3] = -INF
    student[0, 3] = -INF
    teacher[0, 4] = -INF
    labels = torch.tensor([0, 1, 2, 3, 17])
    weights, _ = ops.kd_row_weights(teacher, None, labels, None, -100, True)
    assert weights.tolist() == [1, 1, 1, 1, 0]
    arguments = kd_arguments(student, teacher, labels, weights)
    rows, _, gradient = ops.kd_forward(*arguments, True)
    truth, _, exact = eager.kd_forward(student.double(), teacher.double(), *arguments[2:], True)
    assert rows[0].isinf().tolist() == [False, True, False, True, False]
    assert rows[1].isinf().tolist() == [False, False, False, True, True]
    finite = truth.isfinite()
    torch.testing.assert_close(rows[finite].double(), truth[finite], rtol=1e-5, atol=0)
    assert not gradient[0, 3].any()
    assert_gradient(gradient, exact, 5.0)


# -------------------------------------------------- operators against float64


CASES: list[tuple[int, dict[str, float]]] = [  # columns that the teacher lacks, options
    (0, {}),
    (5, {"temperature": 4.0}),
    (0, {"temperature": 3.0, "softcap": 8.0, "scale": 1.5, "smoothing": 0.1}),
]


@pytest.mark.parametrize(
    ("teacher_dtype", "vocabulary"),
    [(t, v) for t in DTYPES for v in (1, 7, 31, 1040)] + [(torch.bfloat16, 30522), (torch.float32, 50257)],
)
@dtypes
def test_kd_operators(dtype: torch.dtype, teacher_dtype: torch.dtype, vocabulary: int) -> None:
    """Every pair of dtypes, odd rows between NaN, a narrower teacher, weights, ignored labels."""
    for narrower, values in CASES:
        student, teacher = pair(2, 2, vocabulary, dtype=dtype, teacher_dtype=teacher_dtype)
        teacher = teacher[..., : max(1, vocabulary - narrower)]
        labels, weights = targets(4, classes=vocabulary, seed=3), torch.tensor([1.0, 0.0, 0.5, 1.0])
        arguments = kd_arguments(guarded(student), guarded(teacher), labels, weights, None, **values)
        rows, _, gradient, tripled = kd_operators(arguments)
        exact_rows, _, exact = eager.kd_forward(student.double(), teacher.double(), *arguments[2:], True)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(rows.double(), exact_rows, rtol=tolerance, atol=tolerance / 10)
        if vocabulary > 1:
            assert_gradient(gradient, exact, 4.0)
            assert_gradient(tripled, 3 * exact, 12.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.0])
def test_late_maxima(temperature: float) -> None:
    """Exponentials are kept relative to the first columns' maximum until a later one is out of its reach."""
    student, teacher = pair(2, 2, 9000)
    slope = torch.linspace(0, 1, 9000)
    student[0, 0] += 30 * slope  # within reach, and beyond it in one step and in several
    student[0, 1] += 900 * (slope > 0.6)
    student[1] += 2000 * slope
    teacher[:, 0] -= 1000 * slope
    teacher[:, 1] += 300 * (slope > 0.3)
    student[:, :, :2100], teacher[:, :, :4200] = -INF, -INF  # nothing in a first block
    for divergence in (ForwardKL(), JSD(0.3)):
        labels = torch.tensor([8000, 8999, 2100, 8999])
        arguments = kd_arguments(student, teacher, labels, None, divergence, temperature=temperature)
        rows, _, gradient, tripled = kd_operators(arguments)
        exact_rows, _, exact = eager.kd_forward(student.double(), teacher.double(), *arguments[2:], True)
        torch.testing.assert_close(rows.double(), exact_rows, rtol=1e-5, atol=1e-6)
        assert_gradient(gradient, exact, 8.0)
        assert_gradient(tripled, 3 * exact, 24.0)


@divergences
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_every_divergence(divergence: Divergence, dtype: torch.dtype) -> None:
    """Forward, backward, rescale, in place, over blocks with an end; test_divergences.py has the numbers."""
    for vocabulary in (7, 2100):
        for narrower, values in CASES:
            student, teacher = pair(2, 2, vocabulary, dtype=dtype, teacher_dtype=torch.float32)
            teacher = teacher[..., : vocabulary - narrower]
            labels, weights = targets(4, classes=vocabulary - narrower, seed=3), torch.tensor([1.0, 0.0, 0.0, 1.0])
            arguments = kd_arguments(guarded(student), guarded(teacher), labels, weights, divergence, **values)
            rows, stats, gradient, tripled = kd_operators(arguments)
            exact_rows, _, exact = eager.kd_forward(student.double(), teacher.double(), *arguments[2:], True)
            tolerance = 1e-9 if dtype == torch.float64 else 3e-5  # αβ near an end: of the definition
            torch.testing.assert_close(rows.double(), exact_rows, rtol=tolerance, atol=tolerance / 10)
            scale = 1 + sum(abs(float(x)) for x in divergence.coefficients())
            assert_gradient(gradient, exact, 8 * scale)
            assert_gradient(tripled, 3 * exact, 24 * scale)
            assert stats[:, 6].isfinite().all()


@divergences
def test_infinite_divergence(divergence: Divergence) -> None:
    """Without a gradient, of the cross-entropy's beside it, or with a right one."""
    student, teacher = pair(1, 4, 50)
    student[0, 1, 3], teacher[0, 2, 3] = -INF, -INF
    arguments = kd_arguments(student, teacher, torch.tensor([0, 1, 2, -100]), None, divergence)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0]) if divergence.kernel_id == KernelId.DKD else arguments[3]
    arguments = (*arguments[:3], weights, *arguments[4:])
    rows, stats, gradient, _ = kd_operators(arguments)
    exact_rows, _, exact = eager.kd_forward(student.double(), teacher.double(), *arguments[2:], True)
    infinite = exact_rows[0].isinf()
    assert rows[0].isinf().tolist() == infinite.tolist()
    if divergence.kernel_id not in FINITE_GRADIENT:
        assert (stats[:, 6] == INF).tolist() == infinite.tolist()
    for row in range(4):
        if exact[0, row].any():
            assert_gradient(gradient[0, row], exact[0, row], 20.0)


@pytest.mark.parametrize("width", [1, 7, 31, 768, 4099])
@dtypes
def test_cosine_operators(dtype: torch.dtype, width: int) -> None:
    for noise in (1.0, 1e-2):
        student, teacher = pair(2, 2, width, dtype=dtype, teacher_dtype=torch.float32, noise=noise)
        normalizer, weights = torch.tensor(2.0, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.5, 1.0])
        arguments = (guarded(student), guarded(teacher), weights, normalizer)
        rows, stats, gradient = ops.cosine_forward(*arguments, True)
        exact_rows, _, exact = eager.cosine_forward(student.double(), teacher.double(), weights, normalizer, True)
        torch.testing.assert_close(rows.double(), exact_rows, rtol=3e-5, atol=1e-12)
        one, three = torch.ones((), dtype=rows.dtype), torch.full((4,), 3.0, dtype=rows.dtype)
        assert identical(gradient, ops.cosine_backward(one, *arguments, stats))
        rescaled = guarded(gradient)
        ops.cosine_rescale_(rescaled, three[0], *arguments, stats)
        assert_guards(rescaled)
        assert identical(rescaled, ops.cosine_backward(three, *arguments, stats))
        if width > 1:
            assert_gradient(gradient, exact, float((1 / student.double().norm(dim=-1)).sum()))
            assert_gradient(rescaled, 3 * exact, float((3 / student.double().norm(dim=-1)).sum()))


@pytest.mark.parametrize("vocabulary", [1, 7, 31, 1040, 50257])
@dtypes
def test_last_row_ends_at_a_fault(dtype: torch.dtype, vocabulary: int) -> None:
    """Reads and writes past the last row would end the process here."""
    student, teacher = pair(1, 3, vocabulary, dtype=dtype)
    expected = ops.kd_forward(*kd_arguments(student, teacher, None), True)[2]
    student, teacher = before_a_fault(student), before_a_fault(teacher)
    normalizer = torch.ones((), dtype=torch.float64)
    cosine = ops.cosine_forward(student, teacher, None, normalizer, True)
    gradient, zero = before_a_fault(cosine[2]), torch.zeros_like(cosine[0][0])
    ops.cosine_rescale_(gradient, zero, student, teacher, None, normalizer, cosine[1])
    assert not gradient.any()
    ops.kd_row_weights(teacher, None, None, None, -100, True)
    ops.kd_forward(*kd_arguments(student, teacher, None, None, JSD()), True)
    ops.kd_forward(*kd_arguments(student, teacher, torch.tensor([0, 0, vocabulary - 1]), None, DKD()), True)
    ops.kd_forward_(*kd_arguments(student, teacher, None))
    assert identical(student, expected)


@families
@dtypes
def test_unselected_rows_are_not_read(divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = pair(2, 3, 40, dtype=dtype)
    student[0, 1] = teacher[0, 1] = NAN
    teacher[1, 2] = NAN  # no KD, but a label
    labels, weights = targets(6, classes=40, ignored=None), torch.tensor([1.0, 0, 1, 1, 1, 0])
    labels[1] = -100
    rows, _, gradient = ops.kd_forward(*kd_arguments(student, teacher, labels, weights, divergence), True)
    assert rows.isfinite().all()
    assert rows[:, 1].tolist() == [0, 0]
    assert gradient.isfinite().all()
    assert gradient.any(-1).flatten().tolist() == [True, False, True, True, True, True]
    cosine, _, pull = ops.cosine_forward(student, teacher, weights, torch.ones((), dtype=torch.float64), True)
    assert cosine.isfinite().all()
    assert pull.any(-1).flatten().tolist() == weights.bool().tolist()


@dtypes
def test_labels_out_of_range(dtype: torch.dtype) -> None:
    student, teacher = pair(1, 4, 20, dtype=dtype)
    labels = torch.tensor([20, 2**62, -1, 19])
    rows, _, gradient = ops.kd_forward(*kd_arguments(student, teacher, labels), True)
    assert rows[1].isnan().tolist() == [True, True, True, False]
    assert gradient[0].any(-1).tolist() == [False, False, False, True]
    arguments = kd_arguments(student, teacher, labels, None, DKD())
    for ce in (True, False):
        rows, _, gradient = ops.kd_forward(*arguments[:-1], ce, True)
        assert rows[0].isnan().tolist() == [True, True, True, False]
        assert gradient[0].any(-1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_offsets_far_apart(noise: float) -> None:
    """v − z loses the digits of z and v between offsets ±1000 unless what its rounding drops is kept."""
    student, teacher = pair(1, 8, 5000, noise=noise)
    student, teacher = student + 1000, teacher - 1000.3
    arguments = kd_arguments(student, teacher, None, temperature=1.0)
    rows, _, gradient = ops.kd_forward(*arguments, True)
    truth, _, exact = eager.kd_forward(student.double(), teacher.double(), *arguments[2:], True)
    assert ((rows[0] - truth[0]).abs() <= 1e-5 * truth[0] + 1e-8 * truth[0].sqrt()).all()
    assert_gradient(gradient, exact, 0.5 * 8**0.5)


def test_equal_logits_have_no_gradient() -> None:
    """Exactly: a product contracted into the subtraction q − p would leave its rounding behind."""
    student, _ = pair(1, 4, 1000)
    rows, _, gradient = ops.kd_forward(*kd_arguments(student, student.clone(), None), True)
    assert not rows.any()
    assert not gradient.any()


def test_upstream_one_reads_nothing() -> None:
    student, teacher = pair(1, 2, 9)
    arguments = kd_arguments(student, teacher, None)
    _, stats, gradient = ops.kd_forward(*arguments, True)
    kept, nothing = gradient.clone(), torch.full_like(student, NAN)
    ops.kd_rescale_(gradient, torch.ones(()), nothing, nothing, *arguments[2:6], stats, *arguments[6:])
    assert identical(gradient, kept)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *DTYPES], ids=str
)
def test_row_weights(dtype: torch.dtype) -> None:
    teacher, _ = pair(2, 3, 5, dtype=torch.float64)
    teacher[0, 1], teacher[1, 0] = -INF, NAN
    teacher[0, 2, :4], teacher[0, 2, 4] = -INF, -1e300  # which float32 would take for −∞
    mask = torch.tensor([2, 2, 2, 2, 0, 0]).to(dtype)
    weight = 2.0 if dtype.is_floating_point else 1.0
    labels = torch.tensor([0, 1, -100, -100, 4, 5])
    some, few = (torch.tensor([0, -1, 1, 2, k]).expand(6, 5).contiguous() for k in (3, -1))
    for ids, row_labels, row_mask, expected, counts in (
        (None, labels, mask, [weight, 0, weight, weight, 0, 0], [3 * weight, 4]),
        (None, labels, None, [1, 0, 0, 0, 1, 1], [3, 4]),
        (None, None, None, [1, 0, 1, 1, 1, 1], [5, 1]),
        (torch.full((6, 5), -1), labels, mask, [0] * 6, [1, 4]),
        (some, None, None, [1, 0, 1, 1, 1, 1], [5, 1]),
        (few, None, None, [1, 0, 0, 1, 1, 1], [4, 1]),
    ):
        for backend in (ops, eager):
            found = backend.kd_row_weights(teacher, ids, row_labels, row_mask, -100, True)
            assert [x.tolist() for x in found] == [expected, counts]
    nothing = torch.full_like(teacher, NAN)
    found = ops.kd_row_weights(nothing, None, labels, mask, -100, False)
    assert [x.tolist() for x in found] == [[0] * 6, [1, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_terms(dtype: torch.dtype) -> None:
    rows = torch.rand(2, 1001, dtype=dtype)
    for bad in (None, INF, NAN):
        if bad is not None:
            rows[0, 3] = bad
        for kd_weight, ce_weight in ((0.5, 0.7), (0.0, 2.0), (3.0, 0.0)):
            options = torch.zeros(16, dtype=torch.float64)
            options[3], options[4] = kd_weight, ce_weight
            for per_row, normalizers in ((False, [7.0, 3.0]), (True, [1.0, 1.0])):
                arguments = rows, options, torch.tensor(normalizers, dtype=torch.float64), per_row
                for actual, expected in zip(ops.kd_terms(*arguments), eager.kd_terms(*arguments), strict=True):
                    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_threads_do_not_matter() -> None:
    student, teacher = pair(3, 7, 5001)
    arguments = kd_arguments(student, teacher, targets(21, classes=5001))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        measured = kd_operators(kd_arguments(student, teacher, arguments[2], None, JSD(0.1)))
        cosine = ops.cosine_forward(student, teacher, None, arguments[5][0], True)
        results.append([*kd_operators(arguments), *measured, *cosine])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_operands_are_refused() -> None:
    student, teacher = pair(1, 2, 9)
    arguments = kd_arguments(student, teacher, None)
    for bad in (teacher.mT.contiguous().mT, teacher[:, :1], teacher.half().view(torch.int16), torch.zeros(1, 2, 10)):
        with pytest.raises(RuntimeError, match="fusedkd"):
            ops.kd_forward(student, bad, *arguments[2:], True)
