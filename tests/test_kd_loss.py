"""The numbers of kd_loss, value and gradient, by the test rule: dtypes, vocabularies, temperatures, offsets, closeness,
strides, −inf columns, soft-caps. What the options mean is tested in test_kd_rules.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from truth import DTYPES, check_kd, kd_truth, noise_for, pair, targets

from fusedkd import TeacherLogits, TotalVariation, kd_loss

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}
T = [0.5, 1.0, 2.0, 4.0, 20.0]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
vocabularies = pytest.mark.parametrize(
    "vocabulary", [7, 513, *(pytest.param(v, marks=pytest.mark.wide) for v in (30522, 50257))]
)


@dtypes
@vocabularies
def test_both_terms(device: str, dtype: torch.dtype, vocabulary: int) -> None:
    student, teacher = pair(5, vocabulary, dtype=dtype, device=device)
    labels = targets(5, classes=vocabulary, device=device)
    check_kd(student, teacher, labels, temperature=2.0, **BOTH)


@pytest.mark.parametrize("temperature", T)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_temperatures(device: str, dtype: torch.dtype, temperature: float, ce_weight: float) -> None:
    """CE is at temperature 1 whatever T is: at 1, 2 and 4 the kernels derive its exponentials from the KD term's."""
    student, teacher = pair(6, 1000, dtype=dtype, device=device)
    labels = targets(6, classes=1000, device=device)
    check_kd(student, teacher, labels, temperature=temperature, ce_weight=ce_weight)
    check_kd(student, teacher, labels, temperature=temperature, ce_weight=ce_weight, reduction="none")


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(2.0, 1.0), (1.0, 4.0), (0.5, 20.0)])
def test_teacher_temperature(device: str, temperature: float, teacher_temperature: float) -> None:
    student, teacher = pair(6, 300, device=device)
    labels = targets(6, classes=300, device=device)
    check_kd(student, teacher, labels, temperature=temperature, teacher_temperature=teacher_temperature, **BOTH)


@pytest.mark.parametrize("kl", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_student_close_to_its_teacher(device: str, kl: float, temperature: float, offset: float) -> None:
    student, teacher = pair(8, 2000, device=device, noise=noise_for(kl, temperature), offset=offset)
    truth = check_kd(student, teacher, temperature=temperature, scale_by_t2=False, reduction="none")
    assert kl / 3 < truth.loss.value.mean() < kl * 3
    check_kd(student, teacher, targets(8, classes=2000, device=device), temperature=temperature, **BOTH)


@pytest.mark.wide
@pytest.mark.parametrize("kl", [1e-2, 1e-6])
def test_close_at_full_width(device: str, kl: float) -> None:
    student, teacher = pair(4, 50257, device=device, noise=noise_for(kl))
    check_kd(student, teacher, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 32.0, -32.0])
@pytest.mark.parametrize("kl", [1.0, 1e-3, 1e-6])
def test_close_in_16_bit(device: str, dtype: torch.dtype, offset: float, kl: float) -> None:
    student, teacher = pair(8, 2000, dtype=dtype, device=device, noise=noise_for(kl), offset=offset)
    student[0, 0] = teacher[0, 0] + 0.5  # 16 bit round some pairs of rows to the same numbers
    check_kd(student, teacher, targets(8, classes=2000, device=device), temperature=2.0, **BOTH)
    check_kd(student, teacher, reduction="none", upstream=torch.linspace(-2, 3, 8))


def test_equal_logits(device: str) -> None:
    """Student = teacher: no negative value, and a gradient that is rounding noise at most."""
    student, _ = pair(6, 1000, device=device)
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, student, temperature=2.0, reduction="none")
    rows.sum().backward()
    assert rows.abs().max() <= 1e-12
    assert leaf.grad.norm(dim=-1).max() <= 1e-7


@dtypes
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_teacher_of_another_dtype(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = pair(4, 129, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    if teacher_dtype == torch.float64:
        teacher = teacher.float().double()  # what a float32 kernel can see of it
    check_kd(student, teacher, targets(4, classes=129, device=device), temperature=2.0, **BOTH)


def test_one_column(device: str) -> None:
    """A regression head, of which the squared error alone can learn."""
    student, teacher = pair(5, 1, device=device)
    check_kd(student, teacher, divergence="logit_mse")
    labels = torch.zeros(5, dtype=torch.int64, device=device)
    for options in ({}, {"labels": labels, "divergence": "logit_mse", **BOTH}, {"divergence": TotalVariation()}):
        with pytest.raises(ValueError, match=r"one column, whose softmax is 1.*logit_mse"):
            kd_loss(student, teacher, **options)


def test_no_rows(device: str) -> None:
    student, teacher = pair(0, 7, device=device)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    check_kd(student, teacher, labels, vacuous=True, **BOTH)
    check_kd(student, teacher, labels, vacuous=True, reduction="none", upstream=torch.zeros(0), **BOTH)


def test_one_row_without_leading_dimensions(device: str) -> None:
    student, teacher = pair(257, device=device)
    check_kd(student, teacher, torch.tensor(3, device=device), **BOTH)
    check_kd(student, teacher, torch.tensor(3, device=device), reduction="none", **BOTH)


STRIDED = {
    "padded rows": lambda x: F.pad(x, (0, 7), value=torch.nan)[..., :-7],
    "all but the last token": lambda x: torch.cat([x, torch.full_like(x[:, :1], torch.nan)], 1)[:, :-1],
    "all but the first token": lambda x: torch.cat([torch.full_like(x[:, :1], torch.nan), x], 1)[:, 1:],
    "every other row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2)[:, :, 0],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "off by one": lambda x: F.pad(x.flatten(), (1, 0), value=torch.nan)[1:].view(x.shape),
    "size-1 dimensions": lambda x: x.unsqueeze(1).unsqueeze(0),
    "three that do not collapse": lambda x: torch.stack([x, x + 1], 1).transpose(0, 2)[:, :, ::2],
}


@pytest.mark.parametrize("student_layout", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides(device: str, student_layout, dtype: torch.dtype) -> None:
    """NaN lies around every row: a stray read shows."""
    student, teacher = (student_layout(x) for x in pair(3, 4, 77, dtype=dtype, device=device))
    labels = targets(*student.shape[:-1], classes=77, device=device)
    check_kd(student, teacher, labels, temperature=2.0, **BOTH)
    check_kd(student, teacher.contiguous(), labels, temperature=2.0, **BOTH)
    check_kd(student.contiguous(), teacher, labels, temperature=2.0, **BOTH)


@pytest.mark.wide
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_at_full_width(device: str, dtype: torch.dtype) -> None:
    student, teacher = (STRIDED["all but the last token"](x) for x in pair(2, 2, 50257, dtype=dtype, device=device))
    check_kd(student, teacher, targets(2, 2, classes=50257, device=device), temperature=2.0, **BOTH)


def test_expanded_teacher(device: str) -> None:
    """One teacher row for all: stride 0."""
    student, teacher = pair(3, 4, 33, device=device)
    check_kd(student, teacher[:1, :1].expand(3, 4, 33), targets(3, 4, classes=33, device=device), **BOTH)
    check_kd(student, teacher[:, :1].expand(3, 4, 33))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_masked_columns(device: str, dtype: torch.dtype, temperature: float) -> None:
    student, teacher = pair(8, 40, dtype=dtype, device=device)
    labels = torch.full((8,), 30, device=device)
    student[0, 5] = teacher[0, 5] = -torch.inf  # on both sides
    student[1, :20] = teacher[1, :20] = -torch.inf  # a whole first half: maxima start at -inf
    student[2, 1:] = teacher[2, 1:] = -torch.inf  # one column left, and not the label's
    teacher[3, :39] = -torch.inf  # the teacher alone: a one-hot
    teacher[4] = -torch.inf  # not selected
    labels[2] = -100
    mask = torch.ones(8, dtype=torch.bool, device=device)
    for reduction in ("mean", "none"):
        check_kd(student, teacher, labels, temperature=temperature, kd_mask=mask, reduction=reduction, **BOTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_infinite_divergence_has_a_finite_gradient(device: str, dtype: torch.dtype, temperature: float) -> None:
    student, teacher = pair(5, 40, dtype=dtype, device=device)
    student[0, 5] = -torch.inf  # the teacher has probability there
    student[1, :20] = -torch.inf
    student[2], teacher[2, 7] = -torch.inf, -torch.inf  # gradient 0
    student[3, 8], teacher[3, 8] = -torch.inf, -1e4  # p underflows, the divergence is infinite all the same
    labels = torch.full((5,), 30, device=device)
    rows = check_kd(student, teacher, labels, temperature=temperature, reduction="none", **BOTH).loss.value
    assert rows.isinf().tolist() == [True] * 4 + [False]
    check_kd(student, teacher, labels, temperature=temperature, **BOTH)
    check_kd(student, teacher, temperature=temperature)


def test_label_on_a_masked_column(device: str) -> None:
    student, teacher = pair(2, 10, device=device)
    student[:, 3] = teacher[:, 3] = -torch.inf
    truth = check_kd(student, teacher, torch.tensor([3, 4], device=device), reduction="none", **BOTH)
    assert truth.loss.value.isinf().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_far_apart(device: str, dtype: torch.dtype) -> None:
    """Logits whose differences leave exp's range: p or q underflow, p·δ does not, 0·∞ may not appear."""
    student, teacher = pair(6, 50, dtype=dtype, device=device)
    student, teacher = 60 * student, 60 * teacher.flip(1)
    check_kd(student, teacher, targets(6, classes=50, device=device), reduction="none", **BOTH)
    check_kd(student, teacher, targets(6, classes=50, device=device), temperature=20.0, **BOTH)


@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_softcap_and_scale(device: str, softcap: float | None, scale: float | None, temperature: float) -> None:
    student, teacher = pair(6, 200, device=device)
    labels = targets(6, classes=200, device=device)
    student[0, 4] = teacher[0, 4] = -torch.inf  # stays -inf through the cap
    labels[0] = 5
    options = {"temperature": temperature, **BOTH}
    check_kd(student, teacher, labels, logit_softcap=softcap, logit_scale=scale, **options)
    form = TeacherLogits(teacher, softcap=softcap, scale=scale)
    check_kd(student, form, labels, **options)
    check_kd(student, form, labels, logit_softcap=7.0, logit_scale=1.5, **options)


def test_softcap_far_out(device: str) -> None:
    """At |z| = 10c the slope is 8e-9: column by column, which a norm over the row would not see."""
    sign = pair(4, 24, device=device)[0].sign()
    student = sign * torch.linspace(8 * 2.0, 10 * 2.0, 24, device=device)
    teacher = pair(4, 24, device=device, seed=7)[1]
    labels = targets(4, classes=24, device=device, ignored=None)
    options = {"logit_softcap": 2.0, **BOTH}
    truth = kd_truth(student, teacher, labels, **options)
    leaf = student.clone().requires_grad_()
    kd_loss(leaf, teacher, labels, **options).backward()
    torch.testing.assert_close(leaf.grad.double().cpu(), truth.gradient, rtol=1e-4, atol=0)
    assert (truth.gradient != 0).all()


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_label_smoothing(device: str, dtype: torch.dtype, smoothing: float) -> None:
    student, teacher = pair(6, 1000, dtype=dtype, device=device, offset=20.0)
    labels = targets(6, classes=1000, device=device)
    check_kd(student, teacher, labels, label_smoothing=smoothing, temperature=2.0, **BOTH)
    expected = F.cross_entropy(student.double(), labels, label_smoothing=smoothing)
    actual = kd_loss(student, teacher, labels, kd_weight=0.0, ce_weight=1.0, label_smoothing=smoothing)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def test_label_smoothing_and_masked_columns(device: str) -> None:
    """Smoothing puts weight on every column: infinite where one is masked; without it masked columns are free."""
    student, teacher = pair(2, 10, device=device)
    student[0, 3] = teacher[0, 3] = -torch.inf
    labels = torch.tensor([4, 4], device=device)
    rows = check_kd(student, teacher, labels, label_smoothing=0.1, reduction="none", **BOTH).loss.value
    assert rows.isinf().tolist() == [True, False]
    assert check_kd(student, teacher, labels, reduction="none", **BOTH).loss.value.isfinite().all()


def test_equals_torch_on_ordinary_input(device: str) -> None:
    student, teacher = pair(4, 8, 100, device=device)
    labels = targets(4, 8, classes=100, device=device)
    options = {"temperature": 2.0, "kd_weight": 0.3, "ce_weight": 0.7, "kd_mask": torch.ones_like(labels)}

    def eager(z: Tensor) -> Tensor:
        log_q, log_p = ((x.flatten(0, 1) / 2.0).log_softmax(-1) for x in (z, teacher.to(z)))
        kd = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * 2.0**2
        return 0.3 * kd + 0.7 * F.cross_entropy(z.flatten(0, 1), labels.flatten())

    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = kd_loss(ours, teacher, labels, **options), eager(theirs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-8)
