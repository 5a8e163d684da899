"""The KD operators of the Triton kernels on every form, kernel, shape and kind of input. Not collected by itself:
`test_triton.py` runs it under the interpreter (TRITON_INTERPRET=1 python -m pytest tests/triton_operators.py).
"""

from __future__ import annotations

import operators
import pytest
import torch
from families import PARAMETERS, describe
from triton_cases import (
    FORMS,
    INF,
    KERNELS,
    LABELS,
    NAN,
    WEIGHTS,
    B,
    L,
    check,
    in_turn,
    inputs_of,
    logits,
    options_for,
)

from fusedkd import DKD, JSD, AlphaBeta, LogitMSE
from fusedkd.backends.layout import KernelId
from fusedkd.backends.triton import launch
from fusedkd.backends.triton.kd_naive import kd_naive
from fusedkd.divergences import Divergence, ForwardKL

# -------------------------------------------------- shapes, dtypes, options


# One column; less than a vector; two blocks and more than one of ends
@pytest.mark.parametrize(
    ("V", "dtype", "kernel"),
    [
        *((1200, torch.bfloat16, kernel) for kernel in KERNELS),
        (1, torch.float32, "whole"),
        (1, torch.float32, "split"),
        (7, torch.float16, "resident"),
    ],
    ids=describe,
)
def test_both_terms(V: int, dtype: torch.dtype, kernel: str) -> None:
    student, teacher = logits(V, b=B if V == 7 else 1)
    check(student.to(dtype), teacher.to(dtype), kernel=kernel, temperature=2.0, in_place=V == 1200)


def test_vocabulary_of_bert() -> None:
    student, teacher = (x[:1, :2].float() for x in logits(30522))
    check(student, teacher, labels=(7, -100), weights=(1.0, 0.5), temperature=2.0, small_blocks=False)


# Several blocks of a whole row: test_forms_close_to_the_teacher; every form with every kernel: `in_turn`
@pytest.mark.parametrize(
    ("divergence", "kernel"),
    [*((form, "split") for form in FORMS[1:]), (FORMS[2], "whole"), (FORMS[2], "resident")],
    ids=describe,
)
def test_forms(divergence: Divergence, kernel: str) -> None:
    student, teacher = (x.float() for x in logits(600))
    check(student, teacher, divergence=divergence, kernel=kernel, temperature=2.0, in_place=divergence is FORMS[2])


@pytest.mark.parametrize("divergence", PARAMETERS, ids=describe)
def test_parameters(divergence: Divergence) -> None:
    student, teacher = (x.float() for x in logits(31))
    if not isinstance(divergence, AlphaBeta) or min(divergence.coefficients()) >= 0:
        student[0, 0], teacher[0, 0] = student[0, 0] + 300, teacher[0, 0] * 20  # some columns underflow
    check(student, teacher, divergence=divergence, temperature=3.0, teacher_temperature=2.0)


@pytest.mark.parametrize("divergence", [JSD(0.9), DKD()], ids=describe)
def test_without_cross_entropy(divergence: Divergence) -> None:
    student, teacher = logits(127)
    check(student.float(), teacher.float(), divergence=divergence, temperature=2.0, ce=False, in_place=True)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_pairs_of_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = logits(257)
    check(student.to(dtypes[0]), teacher.to(dtypes[1]), temperature=1.5)


@pytest.mark.parametrize(("labels", "temperature"), [(None, 0.5), (LABELS, 0.5), (LABELS, 4.0), (LABELS, 20.0)])
def test_temperatures(temperature: float, labels: tuple[int, ...] | None) -> None:
    student, teacher = logits(127)
    check(student.float(), teacher.float(), labels=labels, temperature=temperature)


def test_temperature_of_the_teacher() -> None:
    student, teacher = logits(127)
    check(student.float(), teacher.float(), temperature=2.0, teacher_temperature=3.0)


SURPLUS = [(13, ForwardKL(), "resident"), (600, ForwardKL(), "whole"), (600, ForwardKL(), "split")]
SURPLUS += [(13, divergence, "whole") for divergence in FORMS[1:]]


@pytest.mark.parametrize(("surplus", "divergence", "kernel"), SURPLUS, ids=describe)
def test_student_columns_without_a_teacher(surplus: int, divergence: Divergence, kernel: str) -> None:
    student, teacher = logits(700)
    student[..., -1] += 8  # the maximum of all columns lies beyond the common ones
    check(
        student.float(),
        teacher[..., :-surplus].float(),
        divergence=divergence,
        kernel=kernel,
        labels=(699, 700 - surplus, -100),
        weights=(1.0, 0.5, 1.0),
        temperature=3.0,
        smoothing=0.1,
        in_place=kernel == "resident",
    )


def test_student_without_a_teacher() -> None:
    student, teacher = logits(40)
    check(student.float(), teacher[..., :0].float(), weights=(0.0,) * 6)


@pytest.mark.parametrize(
    ("divergence", "kernel"), [(ForwardKL(), "resident"), (JSD(), "whole"), (DKD(), "split")], ids=describe
)
def test_label_smoothing(divergence: Divergence, kernel: str) -> None:
    student, teacher = logits(257)
    options = {"divergence": divergence, "kernel": kernel, "temperature": 2.0}
    check(student.float() + 1000, teacher.float() - 1000, smoothing=0.1, **options)
    check(student.float(), teacher.float(), smoothing=1.0, **options)


@pytest.mark.parametrize(
    ("divergence", "kernel"),
    [(ForwardKL(), "whole"), (JSD(), "resident"), (DKD(), "whole"), (ForwardKL(), "split"), (AlphaBeta(), "split")],
    ids=describe,
)
def test_z_loss(divergence: Divergence, kernel: str) -> None:
    student, teacher = logits(257)
    options = {"divergence": divergence, "kernel": kernel, "temperature": 2.0}
    surplus = teacher[..., :240].float()
    check(student.float() - 40, surplus, z_loss=1e-2, smoothing=0.1, transforms=(30.0, 1.0, 30.0, 1.0), **options)
    student[0, 0], student[0, 1, :200] = -INF, -INF
    check(student.float(), teacher.float(), z_loss=0.3, labels=(5, 3, 210), weights=(1.0, 0.0, 1.0), **options)


@pytest.mark.parametrize("transforms", [(30.0, 1.0, 30.0, 1.0), (5.0, 0.25, 0.0, 2.0), (0.0, 0.5, 4.0, 1.0)])
def test_softcap_and_scale(transforms: tuple[float, float, float, float]) -> None:
    student, teacher = logits(257)
    student[0, :, 3] = teacher[0, :, 3] = -INF
    student[0, :, 4:6] = torch.tensor([300.0, -300.0])  # ten times the cap: the slope must not vanish
    check(student.float(), teacher.float(), temperature=2.0, transforms=transforms, in_place=transforms[0] == 30)


@in_turn(1)
def test_softcap_of_forms(divergence: Divergence, kernel: str) -> None:
    student, teacher = logits(127)
    student[0, :, 3] = teacher[0, :, 3] = -INF
    check(student.float(), teacher.float(), divergence=divergence, kernel=kernel, transforms=(5.0, 0.5, 4.0, 1.0))


@pytest.mark.parametrize("layout", ["without the last token", "transposed", "expanded"])
def test_strides(layout: str) -> None:
    """The operators take the strides as they come: the same bits as for contiguous rows of the same alignment."""
    student, teacher = (x.bfloat16() for x in logits(127, b=B))
    if layout == "without the last token":
        student = torch.cat([student, student[:, :1] * NAN], 1)[:, :-1]
    elif layout == "transposed":
        student = student.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        teacher = teacher[:1, :1].expand(B, L, -1)
    inputs = inputs_of(ForwardKL(), student, teacher, torch.tensor(LABELS), torch.tensor(WEIGHTS))
    rows, _, gradient = operators.forward(inputs, ops=launch)
    expected, truth = operators.truth(inputs)
    assert torch.allclose(rows.double(), expected, rtol=1e-5, atol=2e-7)
    assert torch.allclose(gradient.double(), truth, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=describe)
def test_naive_kernel(dtype: torch.dtype) -> None:
    """The plain loops, the real kernel and the reference say the same."""
    student, teacher = (x.to(dtype) for x in logits(1300, b=B))
    labels = torch.arange(B * L) * 200
    options = options_for(ForwardKL(), 2.0, (0.6, 0.8))
    inputs = inputs_of(ForwardKL(), student, teacher, labels, torch.ones(B * L), options)
    kd, ce, gradient = kd_naive(student.flatten(0, 1), teacher.flatten(0, 1), labels, 2.0, 0.6, 0.8)
    rows, _, real = operators.forward(inputs, ops=launch)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for losses, slope in ((rows.double(), real.double()), operators.truth(inputs)):
        torch.testing.assert_close(torch.stack([kd, ce]).double(), losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.view_as(slope).double(), slope.double(), rtol=rounding, atol=1e-6)


# -------------------------------------------------- precision


@pytest.mark.parametrize(("kl", "offset"), [(1e-2, 0.0), (1e-6, 1000.0), (1e-6, -1000.0)])
def test_close_to_the_teacher(kl: float, offset: float) -> None:
    student, teacher = logits(1000, kl)
    check((student + offset).float(), (teacher + offset).float())
    check((student + offset).float(), (teacher - offset).float(), labels=None, temperature=2.0)


CLOSE = [*FORMS[1:], JSD(0.0), JSD(1.0), AlphaBeta(1.0, 0.0), AlphaBeta(0.0, 1.0), AlphaBeta(1.5, -0.4)]


@pytest.mark.parametrize("divergence", CLOSE, ids=describe)
def test_forms_close_to_the_teacher(divergence: Divergence) -> None:
    student, teacher = logits(1000, 1e-6)
    check((student + 1000).float(), (teacher + 1000).float(), divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("divergence", [*FORMS[:3], FORMS[6]], ids=describe)
def test_forms_close_to_the_teacher_but_for_a_constant(divergence: Divergence) -> None:
    student, teacher = logits(1000, 1e-6)
    check((student + 1000).float(), (teacher - 1000).float(), divergence=divergence, kernel="split")


@in_turn(0)
def test_equal_logits(divergence: Divergence, kernel: str) -> None:
    student = logits(257)[0].float()
    student[0, :, 8:40] = -INF
    if divergence.kernel_id == KernelId.LOGIT_MSE:
        divergence = LogitMSE()
    rows, gradient = check(student, student, divergence=divergence, kernel=kernel, temperature=3.0)
    assert not rows[0].any()
    assert not gradient[0, 2].any()


@in_turn(2)
def test_far_apart(divergence: Divergence, kernel: str) -> None:
    student, teacher = (40 * x for x in logits(257))
    check(student.float(), teacher.flip(-1).float(), divergence=divergence, kernel=kernel)


# -------------------------------------------------- masks and broken input


@in_turn(1)
def test_masked_columns(divergence: Divergence, kernel: str) -> None:
    student, teacher = (x.float() for x in logits(127))
    student[0, 0, 50:90] = -INF  # these by both, those by one
    teacher[0, 0, 50:90] = teacher[0, 1, 8:40] = student[0, 2, 9] = -INF
    teacher[0, 2, 9] = -1000  # p underflows
    options = {"labels": (5, 0, 3), "weights": (1.0, 1.0, 0.5), "temperature": 3.0}
    _, gradient = check(student, teacher, divergence=divergence, kernel=kernel, **options)
    assert gradient.isfinite().all()
    assert not gradient[0, 0, 50:90].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_masked_columns_in(dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in logits(127, b=B))
    teacher[1, 0, 8:40] = student[1, 2, 9] = -INF
    teacher[1, 2, 9] = -1000
    rows, _ = check(student, teacher)
    assert rows[0].isinf().tolist() == [False] * 5 + [True]


@in_turn(2)
def test_masks_as_low_as_the_type_goes(divergence: Divergence, kernel: str) -> None:
    """Finite on both sides: the columns add nothing, at any two temperatures."""
    if divergence.kernel_id == KernelId.LOGIT_MSE:
        pytest.skip("(z − scale·v)² of them is infinite")
    student, teacher = (x.float() for x in logits(127))
    student[0, :, 50:60] = teacher[0, :, 50:60] = torch.finfo(torch.float32).min
    check(student, teacher, divergence=divergence, kernel=kernel, temperature=1.0, teacher_temperature=0.4)
    check(student, teacher, divergence=divergence, kernel=kernel, temperature=0.4, teacher_temperature=1.0)


@in_turn(2)
def test_masked_rows(divergence: Divergence, kernel: str) -> None:
    student, teacher = (x.float() for x in logits(127))
    student[0, 0] = -INF
    rows, gradient = check(student, teacher, divergence=divergence, kernel=kernel, labels=(5, 3, -100))
    assert rows[:, 0].tolist() == [INF, INF]
    assert not gradient[0, 0].any()


def test_masked_but_for_the_label() -> None:
    """DKD of a single column is that of the target against nothing."""
    student, teacher = (x.float() for x in logits(127))
    for x in (student, teacher):
        x[0, 0, :5] = x[0, 0, 6:] = -INF
    check(student, teacher, divergence=DKD())


def test_masked_common_columns() -> None:
    student, teacher = (x.float() for x in logits(127))
    student[0, :, :100] = -INF
    rows, _ = check(student, teacher[..., :100], labels=(101, 0, -100, 3, -100, 120))
    assert rows[0, 0] == INF
    assert rows[1, 0].isfinite()


def test_label_out_of_range() -> None:
    student, teacher = (x.float() for x in logits(127, b=B))
    options = {"labels": (127, -1, 4, 10**12, -100, 2), "weights": (0.0, 0.0, 1, 0, 1, 1)}
    rows, gradient = check(student, teacher, **options)
    assert rows[1].isnan().tolist() == [True, True, False, True, False, False]
    assert not gradient.flatten(0, 1)[[0, 1, 3]].any()
    check(student, teacher, divergence=DKD(), **options)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_rows_that_no_term_needs_are_not_read(bad: float) -> None:
    student, teacher = (x.float() for x in logits(257, b=B))
    teacher[0, 1, 7] = teacher[1, 1] = student[1, 1] = bad
    rows, gradient = check(student, teacher)
    assert rows.isfinite().all()
    assert not gradient[1, 1].any()


@pytest.mark.parametrize(("divergence", "bad"), [*zip(FORMS, [NAN, INF] * 4, strict=False)], ids=describe)
def test_broken_logits_show(divergence: Divergence, bad: float) -> None:
    student, teacher = (x.float() for x in logits(257))
    student[0, 0, 0] = student[0, 2, 256] = teacher[0, 2, 100] = bad
    options = options_for(divergence, 1.0 if divergence.kernel_id == KernelId.LOGIT_MSE else 2.0)
    inputs = inputs_of(divergence, student, teacher, torch.tensor([5, 0, 7]), torch.tensor([1.0, 0, 1]), options)
    rows, _, _ = operators.forward(inputs, gradient=False, ops=launch)
    assert (~rows.isfinite()).tolist() == [[True, False, True]] * 2
    student[0, 2, 256] = 0
    rows, _, _ = operators.forward(inputs, gradient=False, ops=launch)
    assert (~rows.isfinite()).tolist() == [[True, False, True], [True, False, False]]
