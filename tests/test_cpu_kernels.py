"""What is specific to the C++ kernels: NaN and infinity, nothing outside of a row, bits, threads. On every instruction
set: test_cpu_instruction_sets.py.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cpu_cases import (
    INF,
    NAN,
    assert_gradient,
    assert_guards,
    before_a_fault,
    guarded,
    hidden_inputs,
    identical,
    kd_inputs,
    kd_operators,
    row_weights,
)
from families import divergences, families
from operators import backward, forward, forward_, rescale_, truth
from truth import DTYPES, pair, targets

from fusedkd import DKD, JSD
from fusedkd.backends import eager
from fusedkd.backends.dispatch import serving
from fusedkd.backends.layout import (
    COUNTED,
    FINITE_GRADIENT,
    OPTIONS,
    HiddenDistance,
    HiddenNormalize,
    KernelId,
    Option,
    Stat,
)
from fusedkd.divergences import Divergence, ForwardKL

if serving["kd_forward", "CPU"][0] != "C++":
    pytest.skip("fusedkd._C does not serve the CPU", allow_module_level=True)

ops = torch.ops.fusedkd
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@families
@dtypes
@pytest.mark.parametrize("at", [0, 15, 16, 30])
def test_nan_shows(divergence: Divergence, dtype: torch.dtype, at: int) -> None:
    for bad in (NAN, INF):
        for which in (0, 1):
            operands = pair(1, 3, 31, dtype=dtype)
            operands[which][0, 1, at] = bad
            inputs = kd_inputs(*operands, torch.tensor([1, 2, 3]), divergence=divergence)
            rows, _, gradient = forward(inputs)
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
    weights, _ = row_weights(teacher, labels=labels)
    assert weights.tolist() == [1, 1, 1, 1, 0]
    inputs = kd_inputs(student, teacher, labels, weights)
    rows, _, gradient = forward(inputs)
    exact_rows, exact = truth(inputs)
    assert rows[0].isinf().tolist() == [False, True, False, True, False]
    assert rows[1].isinf().tolist() == [False, False, False, True, True]
    finite = exact_rows.isfinite()
    torch.testing.assert_close(rows[finite].double(), exact_rows[finite], rtol=1e-5, atol=0)
    assert not gradient[0, 3].any()
    assert_gradient(gradient, exact, 5.0)


# -------------------------------------------------- operators against float64


CASES: list[tuple[int, dict[str, float]]] = [  # columns that the teacher lacks, options
    (0, {}),
    (5, {"temperature": 4.0}),
    (0, {"temperature": 3.0, "softcap": 8.0, "scale": 1.5, "label_smoothing": 0.1}),
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
        inputs = kd_inputs(guarded(student), guarded(teacher), labels, weights, None, **values)
        rows, _, gradient, tripled = kd_operators(inputs)
        exact_rows, exact = truth(inputs)
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
        inputs = kd_inputs(student, teacher, labels, None, divergence, temperature=temperature)
        rows, _, gradient, tripled = kd_operators(inputs)
        exact_rows, exact = truth(inputs)
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
            inputs = kd_inputs(guarded(student), guarded(teacher), labels, weights, divergence, **values)
            rows, stats, gradient, tripled = kd_operators(inputs)
            exact_rows, exact = truth(inputs)
            tolerance = 1e-9 if dtype == torch.float64 else 3e-5  # αβ near an end: of the definition
            torch.testing.assert_close(rows.double(), exact_rows, rtol=tolerance, atol=tolerance / 10)
            scale = 1 + sum(abs(float(x)) for x in divergence.coefficients())
            assert_gradient(gradient, exact, 8 * scale)
            assert_gradient(tripled, 3 * exact, 24 * scale)
            assert stats[:, Stat.WEIGHT_SUM].isfinite().all()


@divergences
def test_infinite_divergence(divergence: Divergence) -> None:
    """Without a gradient, of the cross-entropy's beside it, or with a right one."""
    student, teacher = pair(1, 4, 50)
    student[0, 1, 3], teacher[0, 2, 3] = -INF, -INF
    inputs = kd_inputs(student, teacher, torch.tensor([0, 1, 2, -100]), None, divergence)
    if divergence.kernel_id == KernelId.DKD:
        inputs["row_weights"] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    rows, stats, gradient, _ = kd_operators(inputs)
    exact_rows, exact = truth(inputs)
    infinite = exact_rows[0].isinf()
    assert rows[0].isinf().tolist() == infinite.tolist()
    if divergence.kernel_id not in FINITE_GRADIENT:
        assert (stats[:, Stat.WEIGHT_SUM] == INF).tolist() == infinite.tolist()
    for row in range(4):
        if exact[0, row].any():
            assert_gradient(gradient[0, row], exact[0, row], 20.0)


@pytest.mark.parametrize("kind", [*product(HiddenDistance, HiddenNormalize)], ids=str)
@pytest.mark.parametrize("width", [1, 7, 31, 768, 4099])
@dtypes
def test_hidden_operators(dtype: torch.dtype, width: int, kind: tuple) -> None:
    for noise in (1.0, 1e-2):
        student, teacher = pair(2, 2, width, dtype=dtype, teacher_dtype=torch.float32, noise=noise)
        inputs = hidden_inputs(guarded(student), guarded(teacher), torch.tensor([1.0, 0.0, 0.5, 1.0]), 2 / width, kind)
        rows, stats, gradient = forward(inputs)
        exact_rows, exact = truth(inputs)
        torch.testing.assert_close(rows.double(), exact_rows, rtol=3e-5, atol=1e-12)
        one, three = torch.ones((), dtype=rows.dtype), torch.full((4,), 3.0, dtype=rows.dtype)
        assert identical(gradient, backward(one, inputs, stats))
        rescaled = guarded(gradient)
        rescale_(rescaled, three[0], inputs, stats)
        assert_guards(rescaled)
        assert identical(rescaled, backward(three, inputs, stats))
        if width > 1:
            assert_gradient(gradient, exact, float(exact.norm()) / noise)
            assert_gradient(rescaled, 3 * exact, 3 * float(exact.norm()) / noise)


@pytest.mark.parametrize("vocabulary", [1, 7, 31, 1040, 50257])
@dtypes
def test_last_row_ends_at_a_fault(dtype: torch.dtype, vocabulary: int) -> None:
    """Reads and writes past the last row would end the process here."""
    student, teacher = pair(1, 3, vocabulary, dtype=dtype)
    expected = forward(kd_inputs(student, teacher, None))[2]
    student, teacher = before_a_fault(student), before_a_fault(teacher)
    sides = hidden_inputs(student, teacher)
    rows, stats, gradient = forward(sides)
    gradient = before_a_fault(gradient)
    rescale_(gradient, torch.zeros_like(rows[0]), sides, stats)
    assert not gradient.any()
    row_weights(teacher)
    forward(kd_inputs(student, teacher, None, None, JSD()))
    forward(kd_inputs(student, teacher, torch.tensor([0, 0, vocabulary - 1]), None, DKD()))
    forward_(kd_inputs(student, teacher, None))
    assert identical(student, expected)


@families
@dtypes
def test_unselected_rows_are_not_read(divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = pair(2, 3, 40, dtype=dtype)
    student[0, 1] = teacher[0, 1] = NAN
    teacher[1, 2] = NAN  # no KD, but a label
    labels, weights = targets(6, classes=40, ignored=None), torch.tensor([1.0, 0, 1, 1, 1, 0])
    labels[1] = -100
    rows, _, gradient = forward(kd_inputs(student, teacher, labels, weights, divergence))
    assert rows.isfinite().all()
    assert rows[:, 1].tolist() == [0, 0]
    assert gradient.isfinite().all()
    assert gradient.any(-1).flatten().tolist() == [True, False, True, True, True, True]
    cosine, _, pull = forward(hidden_inputs(student, teacher, weights))
    assert cosine.isfinite().all()
    assert pull.any(-1).flatten().tolist() == weights.bool().tolist()


@dtypes
def test_labels_out_of_range(dtype: torch.dtype) -> None:
    student, teacher = pair(1, 4, 20, dtype=dtype)
    labels = torch.tensor([20, 2**62, -1, 19])
    rows, _, gradient = forward(kd_inputs(student, teacher, labels))
    assert rows[1].isnan().tolist() == [True, True, True, False]
    assert gradient[0].any(-1).tolist() == [False, False, False, True]
    inputs = kd_inputs(student, teacher, labels, None, DKD())
    for ce in (True, False):
        rows, _, gradient = forward({**inputs, "ce": ce})
        assert rows[0].isnan().tolist() == [True, True, True, False]
        assert gradient[0].any(-1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_offsets_far_apart(noise: float) -> None:
    """v − z loses the digits of z and v between offsets ±1000 unless what its rounding drops is kept."""
    student, teacher = pair(1, 8, 5000, noise=noise)
    student, teacher = student + 1000, teacher - 1000.3
    inputs = kd_inputs(student, teacher, None, temperature=1.0)
    rows, _, gradient = forward(inputs)
    exact_rows, exact = truth(inputs)
    assert ((rows[0] - exact_rows[0]).abs() <= 1e-5 * exact_rows[0] + 1e-8 * exact_rows[0].sqrt()).all()
    assert_gradient(gradient, exact, 0.5 * 8**0.5)


def test_equal_logits_have_no_gradient() -> None:
    """Exactly: a product contracted into the subtraction q − p would leave its rounding behind."""
    student, _ = pair(1, 4, 1000)
    rows, _, gradient = forward(kd_inputs(student, student.clone(), None))
    assert not rows.any()
    assert not gradient.any()


def test_upstream_one_reads_nothing() -> None:
    student, teacher = pair(1, 2, 9)
    inputs = kd_inputs(student, teacher, None)
    _, stats, gradient = forward(inputs)
    kept, nothing = gradient.clone(), torch.full_like(student, NAN)
    rescale_(gradient, torch.ones(()), {**inputs, "student": nothing, "teacher": nothing}, stats)
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
            found = row_weights(teacher, backend, ids=ids, labels=row_labels, kd_mask=row_mask)
            assert [x.tolist() for x in found] == [expected, counts]
    for given, counts in (((COUNTED, 7.5), [3, 7.5]), ((0.25, COUNTED), [0.25, 4]), ((-1.0, 0.0), [1, 1])):
        normalizers = torch.tensor(given, dtype=torch.float64)
        for backend in (ops, eager):
            assert row_weights(teacher, backend, labels=labels, normalizers=normalizers)[1].tolist() == counts
    nothing = torch.full_like(teacher, NAN)
    found = row_weights(nothing, labels=labels, kd_mask=mask, kd=False)
    assert [x.tolist() for x in found] == [[0] * 6, [1, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_terms(dtype: torch.dtype) -> None:
    rows = torch.rand(2, 1001, dtype=dtype)
    for bad in (None, INF, NAN):
        if bad is not None:
            rows[0, 3] = bad
        for kd_weight, ce_weight in ((0.5, 0.7), (0.0, 2.0), (3.0, 0.0)):
            options = torch.zeros(OPTIONS, dtype=torch.float64)
            options[Option.KD_WEIGHT], options[Option.CE_WEIGHT] = kd_weight, ce_weight
            for per_row, normalizers in ((False, [7.0, 3.0]), (True, [1.0, 1.0])):
                given = {"row_losses": rows, "options": options, "per_row": per_row}
                given["normalizers"] = torch.tensor(normalizers, dtype=torch.float64)
                terms, truth = (torch.full((2, 1001) if per_row else (2,), NAN, dtype=dtype) for _ in range(2))
                loss, expected = ops.kd_terms(**given, terms=terms), eager.kd_terms(**given, terms=truth)
                torch.testing.assert_close(loss, expected, equal_nan=True)
                torch.testing.assert_close(terms, truth, equal_nan=True)
                assert torch.equal(loss.nan_to_num(), ops.kd_terms(**given, terms=None).nan_to_num())


def test_threads_do_not_matter() -> None:
    student, teacher = pair(3, 7, 5001)
    labels = targets(21, classes=5001)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        measured = kd_operators(kd_inputs(student, teacher, labels, None, JSD(0.1)))
        cosine = forward(hidden_inputs(student, teacher, None, 2.0))
        results.append([*kd_operators(kd_inputs(student, teacher, labels)), *measured, *cosine])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_operands_are_refused() -> None:
    student, teacher = pair(1, 2, 9)
    inputs = kd_inputs(student, teacher, None)
    for bad in (teacher.mT.contiguous().mT, teacher[:, :1], teacher.half().view(torch.int16), torch.zeros(1, 2, 10)):
        with pytest.raises(RuntimeError, match="fusedkd"):
            forward({**inputs, "teacher": bad})
