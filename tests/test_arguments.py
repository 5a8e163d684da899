"""Bad arguments raise before any kernel starts, and say which argument, what it was and what it must be."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from truth import operator_calls, pair, targets

from fusedkd import (
    DKD,
    JSD,
    AlphaBeta,
    Jeffreys,
    LogitMSE,
    SkewKL,
    SkewReverseKL,
    TeacherLogits,
    TeacherSamples,
    TeacherTopK,
    cosine_hidden_loss,
    hidden_loss,
    kd_loss,
    linear_kd_loss,
)

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
    ({"labels": Y.clamp(max=-1)}, ValueError, "labels must be -100 .ignored. or .*, but one is -1"),
    (
        {"labels": Y.clamp(max=-1), "ce_weight": 0.0},
        ValueError,
        r"labels must be -100 .ignored. or at least 0, but one is -1",
    ),
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
    ({"temperature": torch.ones(2)}, ValueError, r"temperature must have .*leading shape.* its shape is \(2,\)"),
    ({"temperature": torch.tensor(1.0, requires_grad=True)}, ValueError, "temperature must be .* without gradient"),
    ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be above 0"),
    ({"divergence": "kl"}, ValueError, "divergence must be a Divergence or one of forward_kl.*'kl'"),
    ({"kd_weight": -0.5}, ValueError, "kd_weight must be at least 0"),
    ({"kd_weight": NAN}, ValueError, "kd_weight must be at least 0"),
    ({"ce_weight": -1}, ValueError, "ce_weight must be at least 0"),
    ({"ce_weight": INF}, ValueError, "ce_weight must be at least 0 and finite"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be at least 0 and at most 1, not 1.5"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be 'mean', 'sum' or 'none', not 'batchmean'"),
    ({"ignore_index": -100.0}, TypeError, "ignore_index must be an integer, not float"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer, not NoneType"),
    ({"ignore_index": 1 << 63}, ValueError, "ignore_index must be an integer of 64 bits, not 9223372036854775808"),
    ({"scale_by_t2": "false"}, TypeError, "scale_by_t2 must be True or False, not 'false'"),
    ({"scale_by_t2": None}, TypeError, "scale_by_t2 must be True or False, not None"),
    ({"inplace": "no"}, TypeError, "inplace must be True or False, not 'no'"),
    ({"return_terms": "false"}, TypeError, "return_terms must be True or False, not 'false'"),
    ({"temperature": 10**400}, ValueError, "temperature must be above 0 and finite, not 1000"),
    ({"reduction": "sum", "kd_normalizer": 3}, ValueError, "kd_normalizer .*reduction='sum'"),
    ({"reduction": "none", "ce_normalizer": 3}, ValueError, "ce_normalizer .*reduction='none'"),
    ({"kd_normalizer": -3}, ValueError, "kd_normalizer must be at least 0"),
    ({"kd_mask": torch.ones(Y.shape, requires_grad=True)}, ValueError, "kd_mask must not require a gradient"),
    ({"ce_normalizer": torch.ones(3)}, ValueError, "ce_normalizer must be .*0-d"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be above 0"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale must be above 0"),
    ({"teacher": TeacherLogits(V, softcap=-1.0)}, ValueError, "teacher.softcap must be above 0"),
    ({"teacher": TeacherLogits(V, scale=0.0)}, ValueError, "teacher.scale must be above 0"),
    ({"divergence": 3}, ValueError, "divergence must be a Divergence or one of forward_kl.*nla, not 3"),
    ({"divergence": JSD}, ValueError, "divergence must be a Divergence or one of"),
    ({"divergence": "dkd", "labels": None, "ce_weight": 0.0}, ValueError, "dkd.*needs labels"),
    ({"divergence": "dkd", "labels": Y.clamp(min=0) + 10, "ce_weight": 0.0}, ValueError, "labels must be -100"),
    (
        {"divergence": "logit_mse", "temperature": 2.0},
        ValueError,
        "temperature must be 1 for logit_mse.*student's is 2.0, the teacher's 2.0",
    ),
    (
        {"divergence": "logit_mse", "teacher_temperature": 2},
        ValueError,
        "temperature must be 1 for logit_mse.*the teacher's 2",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), KD_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_kd_loss_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"student_logits": Z, "teacher": V, "labels": Y, "ce_weight": 1.0, **change}
    with operator_calls() as calls, pytest.raises(error, match=message):
        kd_loss(**arguments)
    assert not calls


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_numbers_of_numpy(dtype: Any) -> None:
    """No warning of a cast: what is compared is a float of Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kd_loss(Z, V, temperature=dtype(2)) == kd_loss(Z, V, temperature=2)


def jvp(function: Any, x: torch.Tensor) -> Any:
    return torch.func.jvp(function, (x,), (x,))


def dual(function: Any, x: torch.Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, x))


TRANSFORMS = {
    "jvp": jvp,
    "dual": dual,
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vmap": lambda function, x: torch.func.vmap(function)(x[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused(name: str) -> None:
    """Some would have given 0 for a derivative."""
    losses = {"student_logits": lambda z: kd_loss(z, V), "student": lambda z: hidden_loss(z, V)}
    losses["student_hidden"] = lambda z: linear_kd_loss(z, torch.ones(7, 10), V[..., :7])
    for argument, loss in losses.items():
        with pytest.raises(TypeError, match=f"{argument} must be an ordinary tensor, not one of torch.func"):
            TRANSFORMS[name](loss, Z)


PARAMETER_ERRORS: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
    (JSD, (1.5,), ValueError, "beta must be at least 0 and at most 1, not 1.5"),
    (JSD, (-0.1,), ValueError, "beta must be"),
    (JSD, (NAN,), ValueError, "beta must be"),
    (JSD, ("0.5",), TypeError, "beta must be a number or a 0-d tensor, not str"),
    (JSD, (torch.ones(2, requires_grad=True),), ValueError, r"beta must be .*shape \(2,\)"),
    (JSD, (torch.tensor(0.5, requires_grad=True),), ValueError, "beta must be .*without gradient"),
    (SkewKL, (2,), ValueError, "alpha must be at least 0 and at most 1"),
    (SkewReverseKL, (-1,), ValueError, "alpha must be"),
    (Jeffreys, (-1.0, 1.0), ValueError, "forward must be at least 0"),
    (Jeffreys, (1.0, INF), ValueError, "reverse must be at least 0 and finite"),
    (AlphaBeta, (INF, 1.0), ValueError, "alpha must be"),
    (AlphaBeta, (1.0, NAN), ValueError, "beta must be"),
    (AlphaBeta, (0.5, -0.5), ValueError, r"alpha \+ beta must be above 0"),
    (LogitMSE, (0.0,), ValueError, "scale must be above 0"),
    (DKD, (-1.0,), ValueError, "alpha must be at least 0"),
    (DKD, (1.0, True), TypeError, "beta must be a number"),
]


@pytest.mark.parametrize(("family", "parameters", "error", "message"), PARAMETER_ERRORS)
def test_parameters(family: Any, parameters: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        family(*parameters)


IDS, LP = (x[..., :3].contiguous() for x in (Y[..., None].clamp(min=0) * 0 + torch.arange(10), V.log_softmax(-1)))
REPEATED, FAR = IDS * 0 + 4, IDS + 8
TEACHER_ERRORS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (TeacherTopK([1], LP), {}, TypeError, "ids must be an int32 or int64 tensor, not list"),
    (TeacherTopK(IDS.to(torch.int16), LP), {}, TypeError, "ids must be .*int16"),
    (TeacherTopK(IDS, LP.long()), {}, TypeError, "logprobs must be float16.*int64"),
    (TeacherTopK(IDS, None), {}, TypeError, "logprobs must be a tensor"),
    (TeacherTopK(IDS[..., :2], LP), {}, ValueError, r"ids and logprobs must have the same shape, not \(3, 4, 2\)"),
    (TeacherTopK(IDS[:2], LP[:2]), {}, ValueError, "logprobs must have the student's leading shape"),
    (TeacherTopK(IDS[..., :0], LP[..., :0]), {}, ValueError, "logprobs must have a non-empty last dimension"),
    (TeacherTopK(FAR, LP), {}, ValueError, r"ids must be −1 \(padding\) or in \[0, 10\), but one is 10"),
    (TeacherTopK(IDS - 2, LP), {}, ValueError, "ids must be −1 .*but one is -2"),
    (TeacherTopK(REPEATED, LP), {}, ValueError, "ids must list a column at most once per row"),
    (
        TeacherTopK(IDS, LP, "drop"),
        {},
        ValueError,
        "tail must be one of renormalize, both_.*, not 'drop'",
    ),
    (TeacherTopK(IDS, LP, logprobs_temperature=0.0), {}, ValueError, "logprobs_temperature must be above 0"),
    (TeacherTopK(IDS, LP, "bucket", 2.0), {}, ValueError, r"'bucket'.*logprobs_temperature is 2.0, but .*\(1.0, 1.0\)"),
    (
        TeacherTopK(IDS, LP, "ignore"),
        {"temperature": 2.0},
        ValueError,
        r"'ignore'.*logprobs_temperature is 1.0, but .*\(2.0, 2.0\)",
    ),
    (TeacherTopK(IDS, LP), {"divergence": "logit_mse"}, ValueError, "TeacherTopK cannot serve logit_mse: it needs"),
    (TeacherTopK(IDS, LP), {"divergence": "dkd"}, ValueError, "TeacherTopK cannot serve dkd: it needs .* logits$"),
    (TeacherTopK(IDS, LP, "ignore"), {"divergence": "taid"}, ValueError, "'ignore' is for sums over columns, and taid"),
    (TeacherTopK(IDS, LP), {"divergence": "todi"}, ValueError, "'renormalize' leaves .*, where todi is then infinite"),
    (
        TeacherTopK(IDS.repeat(1, 1, 400), LP.repeat(1, 1, 400)),
        {},
        ValueError,
        "at most 1024 columns per row, not 1200",
    ),
    (TeacherSamples(IDS, LP.int()), {}, TypeError, "weights must be float16"),
    (TeacherSamples(IDS, LP[..., :2]), {}, ValueError, "ids and weights must have the same shape"),
    (TeacherSamples(FAR, LP), {}, ValueError, "ids must be −1"),
    (
        TeacherSamples(IDS, LP),
        {"divergence": "reverse_kl"},
        ValueError,
        "TeacherSamples estimates forward_kl alone, not reverse_kl",
    ),
]


@pytest.mark.parametrize(("teacher", "options", "error", "message"), TEACHER_ERRORS, ids=lambda x: None)
def test_teachers(teacher: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    for wrong in (teacher, [V, teacher]):
        with operator_calls() as calls, pytest.raises(error, match=message):
            kd_loss(Z, wrong, Y, ce_weight=1.0, **options)
        assert not calls


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


HIDDEN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": None}, TypeError, "student must be a tensor"),
    ({"teacher": V[..., :5]}, ValueError, "student and teacher must have the same last dimension, not 10 and 5"),
    ({"teacher": [V, V]}, ValueError, r"not 10 and 20, the sum of \[10, 10\]"),
    ({"teacher": []}, ValueError, "teacher must be a tensor or a list of at least one"),
    ({"teacher": [V[..., :5].contiguous(), V.int()]}, TypeError, r"teacher\[1\] must be float16"),
    ({"student": [Z, Z]}, ValueError, "as many layers as student.*2 layers and Tensor"),
    ({"student": [Z, Z], "teacher": [V]}, ValueError, "2 layers and 1 layers"),
    ({"student": [Z, Z], "teacher": [V, V[:1]]}, ValueError, r"teacher\[1\] must have the student's leading shape"),
    ({"student": [Z], "teacher": [V], "layer_weights": [1, 2]}, ValueError, "one for each of 1 layers, not 2"),
    ({"student": [Z], "teacher": [V], "layer_weights": [-1]}, ValueError, r"layer_weights\[0\] must be at least 0"),
    ({"student": [Z], "teacher": [V], "layer_weights": torch.ones(1)}, TypeError, "must be a list of numbers.*Tensor"),
    ({"layer_weights": [1.0]}, ValueError, "layer_weights are given, but student is one tensor"),
    ({"distance": "l2"}, ValueError, "distance must be one of .*'mse'.*not 'l2'"),
    ({"normalize": "batch"}, ValueError, "normalize must be None or one of .*not 'batch'"),
    ({"pool": "max"}, ValueError, "pool must be None or 'mean', not 'max'"),
    ({"student": Z[0, 0], "teacher": V[0, 0], "pool": "mean"}, ValueError, r"pool='mean' needs sequences"),
    ({"bias": V[0, 0]}, ValueError, "bias is given, but no projection"),
    ({"teacher_gradient": "yes"}, TypeError, "teacher_gradient must be True or False"),
    ({"mask": Y[:1]}, ValueError, "mask must have"),
    ({"mask": Y.to(torch.uint16)}, TypeError, "mask must be bool, integer or floating point.*uint16"),
    ({"mask": Y.float().to(torch.float8_e4m3fn)}, TypeError, "mask must be bool, integer or floating point.*float8"),
    ({"reduction": "sum", "normalizer": 2}, ValueError, "normalizer .*reduction='sum'"),
]


@pytest.mark.parametrize(("change", "error", "message"), HIDDEN_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_hidden_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with operator_calls() as calls, pytest.raises(error, match=message):
        hidden_loss(**{"student": Z, "teacher": V, **change})
    assert not calls


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
