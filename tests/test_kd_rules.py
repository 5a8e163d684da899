"""What the options of kd_loss mean: which rows count, what each term is divided by, which columns are common, how
terms, weights and teachers combine. Values and gradients by the test rule.
"""

from __future__ import annotations

import pytest
import torch
from truth import DTYPES, assert_gradient, assert_value, check_kd, kd_truth, pair, targets

from fusedkd import TeacherLogits, cosine_hidden_loss, kd_loss
from fusedkd.checks import vocabularies

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7, "temperature": 2.0}
N, V = 12, 50


def masks(device: str) -> dict[str, torch.Tensor]:
    on = (torch.arange(N, device=device) % 3 != 1).view(3, 4)
    return {"bool": on, "int": 2 * on.int(), "int64": -on.long(), "float": on * 0.25, "half": on.half() * 1.5}


@pytest.mark.parametrize("kind", ["bool", "int", "int64", "float", "half"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks(device: str, kind: str, reduction: str) -> None:
    """Independent of the labels, whose ignored rows keep their KD term, and selected rows of the other keep theirs."""
    student, teacher = pair(3, 4, V, device=device)
    labels, mask = targets(3, 4, classes=V, device=device), masks(device)[kind]
    check_kd(student, teacher, labels, kd_mask=mask, reduction=reduction, **BOTH)
    check_kd(student, teacher, kd_mask=mask, reduction=reduction)


def test_float_masks_weight_rows(device: str) -> None:
    student, teacher = pair(N, V, device=device)
    weights = torch.linspace(0, 2.75, N, device=device)
    check_kd(student, teacher, kd_mask=weights)
    check_kd(student, teacher, kd_mask=weights, reduction="none", upstream=torch.linspace(-1, 1, N))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_selected_row(device: str, reduction: str) -> None:
    """Loss 0 that still has a graph, and zero gradients, whatever the rows hold."""
    student, teacher = pair(N, V, device=device)
    student[0], teacher[1] = torch.nan, torch.nan
    labels = torch.full((N,), -100, device=device)
    leaf = student.requires_grad_()
    loss, terms = kd_loss(leaf, teacher, labels, reduction=reduction, return_terms=True, **BOTH)
    assert (loss, *terms) == (0, 0, 0)
    loss.backward()
    assert leaf.grad.shape == student.shape
    assert not leaf.grad.any()


def test_all_rows_selected_for_one_term_alone(device: str) -> None:
    student, teacher = pair(N, V, device=device)
    off, on = torch.zeros(N, dtype=torch.bool, device=device), torch.ones(N, dtype=torch.bool, device=device)
    labels = targets(N, classes=V, device=device)
    check_kd(student, teacher, labels, kd_mask=off, **BOTH)
    check_kd(student, teacher, torch.full_like(labels, -100), kd_mask=on, **BOTH)


def test_labels_select_the_kd_rows_without_a_mask(device: str) -> None:
    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    assert check_kd(student, teacher, labels).loss.value == kd_truth(student, teacher, kd_mask=labels >= 0).loss.value


@pytest.mark.parametrize("ignore_index", [-1, 3, 1000])
def test_ignore_index(device: str, ignore_index: int) -> None:
    """Tested first: it may be a legal class."""
    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device, ignored=ignore_index)
    check_kd(student, teacher, labels, ignore_index=ignore_index, **BOTH)
    check_kd(student, teacher, labels, ignore_index=ignore_index, reduction="none", **BOTH)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("column", [0, 17, V - 1])
def test_not_a_number_shows_in_selected_rows_alone(device: str, bad: float, side: str, column: int) -> None:
    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    selected = labels != -100
    clean = kd_truth(student, teacher, labels, reduction="none", **BOTH)
    dirty = [x.clone() for x in (student, teacher)]
    for x in dirty if side == "both" else [dirty[side == "teacher"]]:
        x[~selected, column] = bad  # the unselected rows
    check_kd(*dirty, labels, **BOTH)
    check_kd(*dirty, labels, reduction="none", **BOTH)
    assert_value(kd_loss(*dirty, labels, reduction="none", **BOTH), clean.loss)

    for x in dirty if side == "both" else [dirty[side == "teacher"]]:
        x[1, column] = bad
    assert not kd_loss(*dirty, labels, **BOTH).isfinite()
    leaf = dirty[0].requires_grad_()
    rows = kd_loss(leaf, dirty[1], labels, reduction="none", **BOTH)
    assert rows.isfinite().tolist() == [i != 1 for i in range(N)]
    rows.sum().backward()
    others = torch.arange(N) != 1
    kept = clean._replace(gradient=clean.gradient[others], subtracted=clean.subtracted[others])
    assert_gradient(leaf.grad[others.to(device)], kept)


def test_a_row_with_one_term_reads_what_that_term_needs(device: str) -> None:
    """Only CE: a NaN in the teacher stays out. Only KD: the label is not looked at."""
    student, teacher = pair(N, V, device=device)
    labels, mask = targets(N, classes=V, device=device), torch.ones(N, dtype=torch.bool, device=device)
    mask[0], teacher[0] = False, torch.nan
    check_kd(student, teacher, labels, kd_mask=mask, **BOTH)


@pytest.mark.parametrize("teacher_columns", [43, 49, 51, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_padded_vocabularies(device: str, dtype: torch.dtype, teacher_columns: int, temperature: float) -> None:
    """The common prefix is distilled; the student's surplus columns keep their cross-entropy, and labels there."""
    student, teacher = pair(N, V, dtype=dtype, device=device, teacher_columns=teacher_columns)
    student[1, 43:] += 60  # the largest logit of the row lies in the surplus
    labels = targets(N, classes=V, device=device)
    labels[:2] = V - 1
    options = {"temperature": temperature, "vocab_mismatch": "truncate"}
    check_kd(student, teacher, labels, **BOTH | options)
    check_kd(student, teacher, labels, reduction="none", label_smoothing=0.1, **BOTH | options)
    gradient_of_kd = check_kd(student, teacher, **options).gradient
    assert not gradient_of_kd[:, teacher_columns:].any()


def test_teacher_masked_on_the_common_columns(device: str) -> None:
    """A teacher that is finite in its surplus alone has no distribution to distil."""
    student, teacher = pair(N, V, device=device, teacher_columns=V + 6)
    teacher[2, :V] = -torch.inf
    labels = targets(N, classes=V, device=device)
    check_kd(student, teacher, labels, kd_mask=torch.ones_like(labels), **BOTH)


def test_large_vocabulary_differences(device: str) -> None:
    student, teacher = pair(2, 2000, device=device)
    check_kd(student, teacher[:, :100], targets(2, classes=2000, device=device), vocab_mismatch="truncate", **BOTH)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        *[(50257, 50304), (151646, 152064), (151936, 152064), (32000, 32002), (8192, 9216), (30522, 30528)],
        *[(65, 128), (33, 64), (100, 104), (100, 128), (256, 260), (260, 384), (1000, 1024), (5000, 5120)],
    ],
)
def test_paddings(small: int, large: int) -> None:
    """Of real vocabularies, to the multiples that heads are padded to, or by added tokens."""
    vocabularies(small, large, "error")
    vocabularies(large, small, "error")


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(130, 100), (2, 3), (4, 5), (10, 64), (10, 1000), (1024, 1300), (30522, 32000)],
)
def test_differences_that_no_padding_explains(student: int, teacher: int) -> None:
    for sizes in ((student, teacher), (teacher, student)):
        with pytest.raises(ValueError, match="{} and {} columns.*tokenizer".format(*sizes)):
            vocabularies(*sizes, "error")
        vocabularies(*sizes, "truncate")


@pytest.mark.parametrize("as_tensor", [False, True])
def test_normalizers(device: str, as_tensor: bool) -> None:
    def number(x: float) -> object:
        return torch.tensor(x, device=device) if as_tensor else x

    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    check_kd(student, teacher, labels, kd_normalizer=number(37), ce_normalizer=number(5.5), **BOTH)
    check_kd(student, teacher, labels, kd_normalizer=number(37), **BOTH)
    check_kd(student, teacher, labels, ce_normalizer=number(3), **BOTH)


def test_a_normalizer_that_is_not_a_number_shows(device: str) -> None:
    """0, no row, divides by 1; a NaN, from whatever counted the rows, does not."""
    student, teacher = pair(N, V, device=device)
    for divisor, finite in ((0.0, True), (float("nan"), False)):
        normalizer = torch.tensor(divisor, device=device)
        assert kd_loss(student, teacher, kd_normalizer=normalizer).isfinite() == finite
        assert cosine_hidden_loss(student, teacher, normalizer=normalizer).isfinite() == finite


def test_accumulation_is_exact_with_the_normalizers_of_the_step(device: str) -> None:
    """Micro-batches of unequal numbers of rows: what one large batch gives, in value, gradient and terms."""
    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    whole = kd_truth(student, teacher, labels, **BOTH)
    count = (labels != -100).sum()
    leaf = student.clone().requires_grad_()
    losses, kds = [], []
    for rows in (slice(0, 2), slice(2, 3), slice(3, N)):  # the second has no label at all
        loss, terms = kd_loss(
            leaf[rows], teacher[rows], labels[rows], kd_normalizer=count, ce_normalizer=count, return_terms=True, **BOTH
        )
        loss.backward()
        losses.append(loss.detach())
        kds.append(terms.kd)
    assert_value(torch.stack(losses).sum(), whole.loss)
    assert_value(torch.stack(kds).sum(), whole.kd)
    assert_gradient(leaf.grad, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(device: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher = pair(3, 4, V, dtype=dtype, device=device)
    labels = targets(3, 4, classes=V, device=device)
    check_kd(student, teacher, labels, reduction=reduction, **BOTH)


def test_rows_are_differentiable_one_by_one(device: str) -> None:
    student, teacher = pair(3, 4, V, device=device)
    labels = targets(3, 4, classes=V, device=device)
    upstream = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    upstream[1, 1] = 0
    gradient = check_kd(student, teacher, labels, reduction="none", upstream=upstream, **BOTH).gradient
    assert not gradient[1, 1].any()
    mask = torch.ones_like(labels)
    check_kd(student, teacher, labels, reduction="none", upstream=upstream.T.contiguous().T, kd_mask=mask, **BOTH)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
def test_t_squared_in_value_and_gradient(device: str, temperature: float) -> None:
    """With the factor the gradient is T·(q − p), without it (q − p)/T: written out here."""
    student, teacher = pair(N, V, device=device)
    for scale_by_t2 in (True, False):
        leaf = student.clone().requires_grad_()
        truth = check_kd(student, teacher, temperature=temperature, scale_by_t2=scale_by_t2, reduction="sum")
        kd_loss(leaf, teacher, temperature=temperature, scale_by_t2=scale_by_t2, reduction="sum").backward()
        q, p = (torch.softmax(x.double() / temperature, -1) for x in (student, teacher))
        factor = temperature if scale_by_t2 else 1 / temperature
        torch.testing.assert_close(leaf.grad.double(), factor * (q - p), rtol=1e-4, atol=1e-6 * factor)
        assert_gradient(leaf.grad, truth)


@pytest.mark.parametrize("kd_weight", [0.0, 0.3])
@pytest.mark.parametrize("ce_weight", [0.0, 2.0])
def test_weights_as_numbers_and_tensors(device: str, kd_weight: float, ce_weight: float) -> None:
    """Tensors change nothing but that a term of weight 0 is still computed, for logging."""
    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    nothing = kd_weight == ce_weight == 0
    truth = check_kd(student, teacher, labels, kd_weight=kd_weight, ce_weight=ce_weight, vacuous=nothing)
    leaf = student.clone().requires_grad_()
    weights = {"kd_weight": torch.tensor(kd_weight, device=device), "ce_weight": torch.tensor(ce_weight, device=device)}
    loss, terms = kd_loss(leaf, teacher, labels, return_terms=True, **weights)
    assert_value(loss, truth.loss, vacuous=nothing)
    loss.backward()
    assert_gradient(leaf.grad, truth, vacuous=nothing)
    both = kd_truth(student, teacher, labels, ce_weight=1.0)
    assert_value(terms.kd, both.kd)
    assert_value(terms.ce, both.ce)


@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_every_real_option_as_a_tensor(device: str, temperature: float) -> None:
    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    options = {
        "temperature": temperature,
        "teacher_temperature": 1.5,
        "kd_weight": 0.25,
        "ce_weight": 0.75,
        "label_smoothing": 0.125,
        "logit_softcap": 6.0,
        "logit_scale": 0.5,
        "kd_normalizer": 5.0,
        "ce_normalizer": 7.0,
    }
    check_kd(student, TeacherLogits(teacher, 4.0, 0.25), labels, **options)
    tensors = {name: torch.tensor(value, device=device) for name, value in options.items()}
    form = TeacherLogits(teacher, torch.tensor(4.0, device=device), torch.tensor(0.25, device=device))
    check_kd(student, form, labels, **tensors)


def test_a_zero_weight_hides_an_infinite_term(device: str) -> None:
    student, teacher = pair(N, V, device=device)
    student[0, 3] = -torch.inf
    labels = torch.full((N,), 5, device=device)
    loss = kd_loss(student, teacher, labels, kd_weight=torch.tensor(0.0, device=device), ce_weight=1.0)
    assert_value(loss, kd_truth(student, teacher, labels, kd_weight=0.0, ce_weight=1.0).loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("teacher_weights", [None, [0.25, 2.0, 0.0]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_several_teachers(device: str, dtype: torch.dtype, reduction: str, teacher_weights: list | None) -> None:
    """Σ w_m D(p_m, q) + CE once, with one rounding of the gradient."""
    student, first = pair(3, 4, V, dtype=dtype, device=device)
    second, third = (pair(3, 4, V, dtype=dtype, device=device, seed=s, teacher_columns=V + 3)[1] for s in (5, 6))
    teachers = [first, TeacherLogits(second, softcap=8.0), third]
    labels = targets(3, 4, classes=V, device=device)
    check_kd(student, teachers, labels, teacher_weights=teacher_weights, reduction=reduction, **BOTH)
    check_kd(student, teachers, labels, teacher_weights=teacher_weights, reduction=reduction, temperature=2.0)
