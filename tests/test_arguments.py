"""Bad arguments raise before any kernel starts, and say which argument, what it was and what it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from truth import operator_calls, pair, targets

from fusedkd import TeacherLogits, cosine_hidden_loss, kd_loss
from fusedkd.arguments import as_rows, pack
from fusedkd.ops import Option

Z, V = pair(3, 4, 10)
Y = targets(3, 4, classes=10)
NAN = float("nan")
INF = float("inf")

KD_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_logits": [[1.0, 2.0]]}, TypeError, "student_logits must be a tensor, not list"),
    ({"student_logits": Z.long()}, TypeError, "student_logits must be float16.*torch.int64"),
    ({"student_logits": Z.to(torch.complex64)}, TypeError, "student_logits must be .*complex64"),
    ({"student_logits": torch.tensor(1.0)}, ValueError, r"student_logits must have a non-empty last dimension.*\(\)"),
    ({"student_logits": Z[..., :0]}, ValueError, r"student_logits .*\(3, 4, 0\)"),
    ({"student_logits": Z.mT.contiguous().mT}, ValueError, "student_logits must be contiguous in its last.*strides"),
    ({"teacher": V.mT.contiguous().mT}, ValueError, "teacher must be contiguous in its last"),
    ({"teacher": V[:2]}, ValueError, r"teacher must have the student's leading shape \(3, 4\), but.*\(2, 4, 10\)"),
    ({"teacher": V.flatten(0, 1)}, ValueError, r"teacher must have .*leading shape"),
    ({"teacher": V.int()}, TypeError, "teacher must be float16.*int32"),
    ({"teacher": TeacherLogits(V.int())}, TypeError, "teacher must be float16"),
    ({"teacher": "bert"}, TypeError, "teacher must be a tensor, not str"),
    ({"teacher": None}, TypeError, "teacher must be a tensor"),
    ({"teacher": []}, ValueError, "teacher is an empty list"),
    ({"teacher": [V, V], "teacher_weights": [1.0]}, ValueError, "teacher_weights must hold one weight per teacher: 2"),
    ({"teacher": [V, V], "teacher_weights": [1.0, -1.0]}, ValueError, "teacher_weights must be at least 0"),
    ({"teacher": [V, V[:2]]}, ValueError, "teacher must have"),
    ({"teacher_weights": [1.0]}, ValueError, "teacher_weights is for a list"),
    ({"teacher": pair(3, 4, 1035)[1]}, ValueError, "vocabularies of 10 and 1035.*tokenizer"),
    ({"vocab_mismatch": "pad"}, ValueError, "vocab_mismatch must be 'error' or 'truncate', not 'pad'"),
    ({"labels": Y[:2]}, ValueError, r"labels must have .*\(3, 4\).*\(2, 4\)"),
    ({"labels": Y.int()}, TypeError, "labels must be int64, not torch.int32"),
    ({"labels": Y.tolist()}, TypeError, "labels must be a tensor, not list"),
    ({"labels": Y.clamp(min=0) + 10}, ValueError, r"labels must be -100 \(ignored\) or in \[0, 10\), but one is 1\d"),
    ({"labels": Y.clamp(max=-1)}, ValueError, "labels must be -100.*but one is -1"),
    ({"labels": None, "ce_weight": 1.0}, ValueError, "ce_weight is not 0.*needs labels"),
    ({"kd_mask": Y[:2]}, ValueError, "kd_mask must have"),
    ({"kd_mask": torch.ones(3, 4, dtype=torch.complex64)}, TypeError, "kd_mask must be bool, integer or floating"),
    ({"kd_mask": [1]}, TypeError, "kd_mask must be a tensor"),
    ({"temperature": 0}, ValueError, "temperature must be above 0 and finite, not 0"),
    ({"temperature": -1.0}, ValueError, "temperature must be above 0"),
    ({"temperature": NAN}, ValueError, "temperature must be above 0.*nan"),
    ({"temperature": INF}, ValueError, "temperature must be above 0 and finite"),
    ({"temperature": "2"}, TypeError, "temperature must be a number or a 0-d tensor, not str"),
    ({"temperature": True}, TypeError, "temperature must be a number"),
    ({"temperature": None}, TypeError, "temperature must be a number"),
    ({"temperature": torch.ones(2)}, ValueError, r"temperature must be .*0-d tensor.*shape \(2,\)"),
    ({"temperature": torch.tensor(1.0, requires_grad=True)}, ValueError, "temperature must be .* without gradient"),
    ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be above 0"),
    ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl.*'kl'"),
    ({"kd_weight": -0.5}, ValueError, "kd_weight must be at least 0"),
    ({"kd_weight": NAN}, ValueError, "kd_weight must be at least 0"),
    ({"ce_weight": -1}, ValueError, "ce_weight must be at least 0"),
    ({"ce_weight": INF}, ValueError, "ce_weight must be at least 0 and finite"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be at least 0 and at most 1, not 1.5"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be 'mean', 'sum' or 'none', not 'batchmean'"),
    ({"reduction": "sum", "kd_normalizer": 3}, ValueError, "kd_normalizer .*reduction='sum'"),
    ({"reduction": "none", "ce_normalizer": 3}, ValueError, "ce_normalizer .*reduction='none'"),
    ({"kd_normalizer": -3}, ValueError, "kd_normalizer must be at least 0"),
    ({"kd_mask": torch.ones(Y.shape, requires_grad=True)}, ValueError, "kd_mask must not require a gradient"),
    ({"ce_normalizer": torch.ones(3)}, ValueError, "ce_normalizer must be .*0-d"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be above 0"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale must be above 0"),
    ({"teacher": TeacherLogits(V, softcap=-1.0)}, ValueError, "teacher.softcap must be above 0"),
    ({"teacher": TeacherLogits(V, scale=0.0)}, ValueError, "teacher.scale must be above 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), KD_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_kd_loss_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"student_logits": Z, "teacher": V, "labels": Y, "ce_weight": 1.0, **change}
    with operator_calls() as calls, pytest.raises(error, match=message):
        kd_loss(**arguments)
    assert not calls or isinstance(change["teacher"], list)  # the first of several teachers is done by then


COSINE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": None}, TypeError, "student_hidden must be a tensor"),
    ({"student_hidden": Z.bool()}, TypeError, "student_hidden must be float16.*bool"),
    ({"student_hidden": Z.mT.contiguous().mT}, ValueError, "student_hidden must be contiguous"),
    ({"teacher_hidden": V.int()}, TypeError, "teacher_hidden must be float16"),
    ({"teacher_hidden": V[:, :2]}, ValueError, "teacher_hidden must have the student's leading shape"),
    ({"teacher_hidden": V[..., :5]}, ValueError, "same last dimension, not 10 and 5.*project"),
    ({"mask": Y[:1]}, ValueError, "mask must have"),
    ({"mask": 1}, TypeError, "mask must be a tensor"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be"),
    ({"reduction": "sum", "normalizer": 2}, ValueError, "normalizer .*reduction='sum'"),
    ({"normalizer": -1}, ValueError, "normalizer must be at least 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), COSINE_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_cosine_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with operator_calls() as calls, pytest.raises(error, match=message):
        cosine_hidden_loss(**{"student_hidden": Z, "teacher_hidden": V, **change})
    assert not calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_two_devices() -> None:
    z, v, y = Z.cuda(), V.cuda(), Y.cuda()
    for name, arguments in {"teacher": (z, V), "labels": (z, v, Y)}.items():
        with pytest.raises(ValueError, match=f"{name} must be on the student's device cuda:0, not on cpu"):
            kd_loss(*arguments)
    with pytest.raises(ValueError, match="kd_mask must be on"):
        kd_loss(z, v, y, kd_mask=Y)


def test_labels_of_a_term_that_is_off_are_only_row_marks(device: str) -> None:
    """Without cross-entropy a label may be any number: it says which rows the KD term takes."""
    labels = torch.tensor([7, -100, 12345], device=device)
    student, teacher = pair(3, 10, device=device)
    rows = kd_loss(student, teacher, labels, reduction="none")
    assert (rows != 0).tolist() == [True, False, True]


def test_label_out_of_range_inside_the_operator(device: str) -> None:
    """What a GPU or a compiled graph cannot raise for: NaN for the row, gradient 0, nothing read past the row."""
    student, teacher = (x[None] for x in pair(4, 10, device=device))
    labels = torch.tensor([10, -1, 2**40, 3], device=device)
    values = dict.fromkeys(Option, 1.0) | {o: 0.0 for o in Option if o >= Option.LABEL_SMOOTHING}
    options, ones = pack(list(values.values()), student.device), pack([1.0, 1.0], student.device)
    weights = torch.zeros(4, device=device)
    rows, _, gradient = torch.ops.fusedkd.kd_forward(
        student, teacher, labels, weights, options, ones, -100, False, True
    )
    assert rows[1].isnan().tolist() == [True, True, True, False]
    assert gradient[0].any(-1).tolist() == [False, False, False, True]


def test_one_grid_without_a_copy() -> None:
    base, other = torch.zeros(2, 5, 7), torch.zeros(2, 4, 9)
    student, teacher, grid = as_rows(base[:, :-1], other)
    assert grid == (2, 4)
    assert (student.data_ptr(), teacher.data_ptr()) == (base.data_ptr(), other.data_ptr())
    assert as_rows(other, other)[2] == (1, 8)
    assert as_rows(other[0, 0], other[0, 0])[2] == (1, 1)
    assert as_rows(torch.zeros(3, 1, 1, 7), torch.zeros(1, 1, 1, 7).expand(3, 1, 1, 7))[2] == (1, 3)


def test_numbers_are_copied_to_a_device_once() -> None:
    device = torch.device("cpu")
    assert pack([1.0, 2.0], device) is pack([1, 2.0], device)
    schedule = torch.tensor(3.0)
    assert pack([1.0, schedule], device).tolist() == [1.0, 3.0]


def test_fake_tensors_leave_no_trace(device: str) -> None:
    """Memory estimators and tracers call with fake tensors between real calls."""
    student, teacher = pair(3, 10, device=device)
    real = kd_loss(student, teacher, temperature=1.75)
    for temperature in (1.75, 1.875):
        with FakeTensorMode() as mode:
            fake = kd_loss(mode.from_tensor(student), mode.from_tensor(teacher), temperature=temperature)
        assert fake.shape == real.shape
    assert torch.equal(kd_loss(student, teacher, temperature=1.75), real)
    assert kd_loss(student, teacher, temperature=1.875) > 0
