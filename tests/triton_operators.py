"""The operators of the Triton kernels against the definitions in float64, by the rule of `truth.py`. Not collected by
itself: `test_triton.py` runs it under the interpreter (TRITON_INTERPRET=1 python -m pytest tests/triton_operators.py).

The interpreter rounds bfloat16 towards zero, which no GPU does: its cast is replaced by PyTorch's, and bfloat16 is held
to the rule like everything else. Stray reads do not fault here, so every row lies between NaNs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fusedkd import fallback
from fusedkd.definitions import cap_and_scale, log_softmax
from fusedkd.kernels import kd

NAN, INF = float("nan"), float("inf")
B, L = 2, 3
LABELS = (5, 0, -100, 3, -100, 2)  # modulo V
WEIGHTS = (1.0, 0.0, 1.0, 0.25, 0.0, 1.0)  # with the labels: both terms, CE alone, KD alone, weighted, neither, both

truncating = interpreter._convert_float


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
    if (source, target) != (tl.float32, tl.bfloat16):
        return truncating(data, source, target, mode)
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = convert


def between_nans(rows: Tensor, before: int = 11, after: int = 6) -> Tensor:
    """The same values [B, L, n] in rows that nothing aligns, with NaN before and after each, and a gap per batch."""
    stride = before + rows.shape[2] + after
    buffer = torch.full((rows.shape[0], rows.shape[1] * stride + 3), NAN, dtype=rows.dtype)
    view = buffer[:, : rows.shape[1] * stride].unflatten(1, (-1, stride))[:, :, before : before + rows.shape[2]]
    view.copy_(rows)
    return view


def surroundings(view: Tensor) -> Tensor:
    """The buffer of `between_nans` with the rows themselves blanked out."""
    base = view._base.clone()
    base.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(0)
    return base


def logits(V: int, kl: float = 0.1, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Float64 student and teacher about `kl` apart at T = 1."""
    generator = torch.Generator().manual_seed(seed)
    teacher = spread * torch.randn(B, L, V, generator=generator, dtype=torch.float64)
    return teacher + (2 * kl) ** 0.5 * torch.randn(B, L, V, generator=generator, dtype=torch.float64), teacher


def check(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: tuple[int, ...] | None = LABELS,
    weights: tuple[float, ...] = WEIGHTS,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    smoothing: float = 0.0,
    transforms: tuple[float, float, float, float] | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Forward and backward on these rows by the rule, on request also what writes in place, and the forward call
    without gradient. Returns rows and gradient for more.
    """
    n, V = student.shape[0] * student.shape[1], student.shape[2]
    student, teacher = between_nans(student), between_nans(teacher, before=11 if V % 2 else 4)
    y = None if labels is None else torch.tensor([i % V if 0 <= i < 10 else i for i in labels])
    w = torch.tensor(weights)
    kd_scale, kd_weight, ce_weight, n_kd, n_ce = temperature**2, 0.6, 0.8, 3.5, 4.0
    options = [temperature, teacher_temperature or temperature, kd_scale, kd_weight, ce_weight, smoothing]
    options = torch.tensor([*options, *(transforms or (NAN,) * 4)], dtype=torch.float64)  # unread without `transform`
    tail = y, w, options, torch.tensor([n_kd, n_ce], dtype=torch.float64)
    flags = -100, transforms is not None

    # Values
    expected, _, _ = fallback.kd_forward(student.double(), teacher.double(), *tail, *flags, False)
    rows, stats, gradient = kd.kd_forward(student, teacher, *tail, *flags, True)
    exact = student.dtype == torch.float64
    divergence = expected[0] / kd_scale
    tolerance = 1e-11 * divergence + 1e-14 if exact else 1e-5 * divergence + 1e-8 * w * (divergence / w).sqrt()
    assert_close(rows[0].double() / kd_scale, divergence, tolerance)
    assert_close(rows[1].double(), expected[1], 1e-11 * expected[1] + 1e-14 if exact else 1e-5 * expected[1] + 2e-7)

    # Gradients, and S: the norms of the terms subtracted
    z, v = student.double().flatten(0, 1), teacher.double().flatten(0, 1)
    if transforms is not None:
        z, v = cap_and_scale(z, *transforms[:2]), cap_and_scale(v, *transforms[2:])
    slope = 1.0 if transforms is None else transforms[1]
    kd_terms = [log_softmax(x / t).exp().norm(dim=1) for x, t in zip((z[:, : v.shape[1]], v), options[:2], strict=True)]
    s = torch.where(w != 0, slope * kd_weight * kd_scale / n_kd * w / temperature * sum(kd_terms), 0)
    if y is not None:
        s += torch.where(y != -100, slope * ce_weight / n_ce * (log_softmax(z).exp().norm(dim=1) + 1), 0)

    def assert_gradient(actual: Tensor, upstream: Tensor) -> None:
        up = upstream.double()
        truth = fallback.kd_backward(up, student.double(), teacher.double(), *tail, stats.double(), *flags)
        truth, got = truth.flatten(0, 1), actual.double().flatten(0, 1)
        rounding = (truth.to(actual.dtype).double() - truth).norm(dim=1)
        bound = 1.25 * rounding + (1e-13 if exact else 1e-6) * s * up.abs()
        error = (got - truth).norm(dim=1)
        assert (error <= bound).all(), f"{error / bound}"
        assert not got[truth.norm(dim=1) == 0].any()
        if V > 1:
            assert (truth.norm(dim=1) > 2 * bound).any(), "zero would pass"

    one = torch.ones((), dtype=stats.dtype)
    upstream = torch.tensor([1.0, -0.3, 2.0, 0.7, 5.0, 0.0], dtype=stats.dtype)[:n]
    assert_gradient(gradient, one)
    assert_gradient(kd.kd_backward(upstream, student, teacher, *tail, stats, *flags), upstream)
    if not in_place:
        return rows, gradient

    # The same bits again, and nothing outside the rows
    only, same, nothing = kd.kd_forward(student, teacher, *tail, *flags, False)
    assert torch.equal(rows.nan_to_num(-1), only.nan_to_num(-1))
    assert torch.equal(stats.nan_to_num(-1), same.nan_to_num(-1))
    assert nothing.shape == (0,)
    scaled = kd.kd_backward(one * 0.3, student, teacher, *tail, stats, *flags)
    assert_gradient(scaled, one * 0.3)
    target = between_nans(gradient)
    poison = torch.full_like(student, NAN), torch.full_like(teacher, NAN)
    kd.kd_rescale_(target, one, *poison, *tail, stats * NAN, *flags)
    assert torch.equal(target, gradient)
    kd.kd_rescale_(target, one * 0.3, student, teacher, *tail, stats, *flags)
    assert torch.equal(target, scaled)
    assert surroundings(target).isnan().sum() == target._base.numel() - target.numel()
    overwritten = between_nans(student)
    again, same = kd.kd_forward_(overwritten, teacher, *tail, *flags)
    assert torch.equal(overwritten, gradient)
    assert torch.equal(again.nan_to_num(-1), rows.nan_to_num(-1))
    assert torch.equal(same.nan_to_num(-1), stats.nan_to_num(-1))
    assert surroundings(overwritten).isnan().sum() == overwritten._base.numel() - overwritten.numel()
    return rows, gradient


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = ~same & ~((actual - expected).abs() <= torch.where(expected.isfinite(), tolerance, 0))
    assert not wrong.any(), f"{actual[wrong]} is not {expected[wrong]} within {tolerance[wrong]}"


# -------------------------------------------------- shapes, dtypes, options


# One column; less than a vector; odd; one block of several groups; two blocks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", [1, 7, 127, 257, 1000])
def test_both_terms(V: int, dtype: torch.dtype) -> None:
    student, teacher = logits(V)
    check(student.to(dtype), teacher.to(dtype), temperature=2.0, in_place=dtype == torch.bfloat16)


def test_vocabulary_of_bert() -> None:
    student, teacher = (x[:1, :2].float() for x in logits(30522))
    check(student, teacher, labels=(7, -100), weights=(1.0, 0.5), temperature=2.0)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_pairs_of_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = logits(257)
    check(student.to(dtypes[0]), teacher.to(dtypes[1]), temperature=1.5, in_place=True)


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_temperatures(temperature: float, labels: tuple[int, ...] | None) -> None:
    student, teacher = logits(127)
    check(student.float(), teacher.float(), labels=labels, temperature=temperature)


def test_temperature_of_the_teacher() -> None:
    student, teacher = logits(127)
    check(student.float(), teacher.float(), temperature=2.0, teacher_temperature=3.0)


@pytest.mark.parametrize(("surplus", "temperature"), [(1, 2.0), (13, 3.0), (600, 2.0)])
def test_student_columns_without_a_teacher(surplus: int, temperature: float) -> None:
    student, teacher = logits(1000)
    student[..., -1] += 8  # the maximum of all columns lies beyond the common ones
    labels = (999, 0, -100, 3, -100, 1000 - surplus)
    check(
        student.float(),
        teacher[..., :-surplus].float(),
        labels=labels,
        temperature=temperature,
        smoothing=0.1,
        in_place=True,
    )


def test_student_without_a_teacher() -> None:
    student, teacher = logits(40)
    check(student.float(), teacher[..., :0].float(), weights=(0.0,) * 6)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(smoothing: float) -> None:
    student, teacher = logits(257)
    check(student.float() + 1000, teacher.float() - 1000, temperature=2.0, smoothing=smoothing)


@pytest.mark.parametrize("transforms", [(30.0, 1.0, 30.0, 1.0), (5.0, 0.25, 0.0, 2.0), (0.0, 0.5, 4.0, 1.0)])
def test_softcap_and_scale(transforms: tuple[float, float, float, float]) -> None:
    student, teacher = logits(257)
    student[0, :, 3] = teacher[0, :, 3] = -INF
    student[0, :, 4:6] = torch.tensor([300.0, -300.0])  # ten times the cap: the slope must not vanish
    check(student.float(), teacher.float(), temperature=2.0, transforms=transforms, in_place=True)


@pytest.mark.parametrize("layout", ["without the last token", "transposed", "expanded"])
def test_strides(layout: str) -> None:
    """The operators take the strides as they come: the same bits as for contiguous rows of the same alignment."""
    student, teacher = (x.bfloat16() for x in logits(127))
    if layout == "without the last token":
        student = torch.cat([student, student[:, :1] * NAN], 1)[:, :-1]
    elif layout == "transposed":
        student = student.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        teacher = teacher[:1, :1].expand(B, L, -1)
    tail = torch.tensor(LABELS), torch.tensor(WEIGHTS), torch.tensor([2.0, 2, 4, 1, 1, 0, 0, 1, 0, 1]).double()
    tail = *tail, torch.ones(2).double(), -100, False, True
    rows, _, gradient = kd.kd_forward(student, teacher, *tail)
    expected, _, truth = fallback.kd_forward(student, teacher, *tail)
    assert gradient.is_contiguous()
    assert torch.allclose(rows, expected, rtol=1e-5, atol=2e-7)
    assert torch.allclose(gradient.double(), truth.double(), rtol=2**-7, atol=1e-7)


# -------------------------------------------------- precision


@pytest.mark.parametrize("kl", [1e-2, 1e-6])
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_close_to_the_teacher(kl: float, offset: float) -> None:
    student, teacher = logits(1000, kl)
    check((student + offset).float(), (teacher + offset).float())
    check((student + offset).float(), (teacher - offset).float(), labels=None, temperature=2.0)


def test_equal_logits() -> None:
    student = logits(257)[0].float()
    student[0, :, 8:40] = -INF
    rows, gradient = check(student, student, temperature=3.0)
    assert not rows[0].any()
    assert not gradient[0, 2].any()


def test_far_apart() -> None:
    student, teacher = (40 * x for x in logits(257))
    check(student.float(), teacher.flip(-1).float())


# -------------------------------------------------- masks and broken input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_masked_columns(dtype: torch.dtype, temperature: float) -> None:
    student, teacher = (x.to(dtype) for x in logits(127))
    student[0, :, 50:90] = -INF  # these by both, those by one
    teacher[0, :, 50:90] = teacher[1, 0, 8:40] = student[1, 2, 9] = -INF
    teacher[1, 2, 9] = -1000  # p underflows
    rows, gradient = check(student, teacher, temperature=temperature)
    assert rows[0].isinf().tolist() == [False] * 5 + [True]
    assert gradient.isfinite().all()
    assert not gradient[0, 0, 50:90].any()


def test_masked_rows() -> None:
    student, teacher = (x.float() for x in logits(127))
    student[0] = -INF
    rows, gradient = check(student, teacher)
    assert rows[:, 0].tolist() == [INF, INF]
    assert not gradient[0].any()


def test_masked_common_columns() -> None:
    student, teacher = (x.float() for x in logits(127))
    student[0, :, :100] = -INF
    rows, _ = check(student, teacher[..., :100], labels=(101, 0, -100, 3, -100, 120))
    assert rows[0, 0] == INF
    assert rows[1, 0].isfinite()


def test_label_out_of_range() -> None:
    student, teacher = (x.float() for x in logits(127))
    rows, gradient = check(student, teacher, labels=(127, -1, -100, 10**12, -100, 2), weights=(0.0, 0.0, 1, 0, 1, 1))
    assert rows[1].isnan().tolist() == [True, True, False, True, False, False]
    assert not gradient.flatten(0, 1)[[0, 1, 3]].any()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_rows_that_no_term_needs_are_not_read(bad: float) -> None:
    student, teacher = (x.float() for x in logits(257))
    teacher[0, 1, 7] = teacher[1, 1] = student[1, 1] = bad
    rows, gradient = check(student, teacher)
    assert rows.isfinite().all()
    assert not gradient[1, 1].any()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("column", [0, 100, 256])
def test_broken_logits_show(bad: float, column: int) -> None:
    student, teacher = (x.float() for x in logits(257))
    student[0, 0, column] = teacher[1, 2, column] = bad
    options = torch.tensor([2.0, 2, 4, 1, 1, 0, 0, 1, 0, 1]).double()
    rest = torch.tensor(LABELS), torch.tensor(WEIGHTS), options, torch.ones(2).double(), -100, False, True
    rows, _, _ = kd.kd_forward(student, teacher, *rest)
    assert (~rows.isfinite()).tolist() == [[True] + [False] * 4 + [True], [True] + [False] * 5]


# -------------------------------------------------- weights


MASKS = [
    None,
    torch.tensor([True, False] * 3),
    torch.tensor([1, 0, -2, 0, 3, 1]),
    torch.tensor([0.5, 0, 1, 0, 2, 1e-3]),
]
MASKS += [MASKS[2].to(torch.uint8), MASKS[3].double(), MASKS[3].bfloat16()]


@pytest.mark.parametrize("mask", MASKS, ids=lambda x: str(x.dtype) if x is not None else "None")
@pytest.mark.parametrize("labels", [None, LABELS])
def test_row_weights(mask: Tensor | None, labels: tuple[int, ...] | None) -> None:
    teacher = logits(300)[1].float()
    teacher[0, 2, :299] = teacher[1, 1, 1:] = teacher[1, 2] = -INF  # only the last of these has no column left
    teacher = between_nans(teacher)
    y = None if labels is None else torch.tensor(labels)
    weights = kd.kd_row_weights(teacher, y, mask, -100)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, fallback.kd_row_weights(teacher, y, mask, -100))
    assert weights[2] != 0 or labels is not None
    assert weights[5] == 0
    assert not kd.kd_row_weights(teacher[..., :0], y, mask, -100).any()


def test_no_rows() -> None:
    empty = torch.empty(0, 3, 7)
    w = kd.kd_row_weights(empty, None, None, -100)
    rows, stats, gradient = kd.kd_forward(
        empty, empty, None, w, torch.ones(10).double(), torch.ones(2).double(), -100, False, True
    )
    assert (rows.shape, stats.shape, gradient.shape) == ((2, 0), (0, 6), (0, 3, 7))
