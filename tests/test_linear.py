"""The numbers of linear_kd_loss, value and three gradients, by the rule of `linear_cases.py`: dtypes, families,
closeness, vocabularies, sizes, every teacher form, upstream gradients, strides. What the options mean is in
test_linear_rules.py, how the work is done in test_linear_tiles.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import TAILS, at, describe, families, samples, top_k
from linear_cases import (
    Problem,
    assert_gradients,
    check_linear,
    linear_truth,
    logits_of,
    problem,
    teacher_logits,
)
from torch import Tensor
from torch.nn import functional as F
from truth import DTYPES, assert_value, noise_for

from fusedkd import TeacherHead, TeacherLogits, TeacherTopK, kd_loss, linear_kd_loss

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=describe)
two_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)


@dtypes
@families
def test_families(device: str, dtype: torch.dtype, divergence: Any) -> None:
    p = problem(3, 5, dtype=dtype, device=device)
    check_linear(p, **at(divergence, 2.0, **BOTH))


@two_dtypes
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_temperatures(device: str, dtype: torch.dtype, temperature: float, ce_weight: float) -> None:
    p = problem(16, columns=(1037, 1037), dtype=dtype, device=device)
    check_linear(p, temperature=temperature, ce_weight=ce_weight)
    check_linear(p, temperature=temperature, ce_weight=ce_weight, teacher_temperature=1.5, scale_by_t2=False)


@dtypes
@pytest.mark.parametrize("kl", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_student_close_to_its_teacher(device: str, dtype: torch.dtype, kl: float, temperature: float) -> None:
    """Logits of 16 bit would lose the gradient long before the last of these."""
    p = problem(24, columns=(500, 500), dtype=dtype, device=device, noise=noise_for(kl, temperature), labels=False)
    truth = check_linear(p, temperature=temperature, scale_by_t2=False)
    assert kl / 3 < truth.loss.value < kl * 3


@pytest.mark.parametrize("kl", [1e-2, 1e-5])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl"])
def test_other_families_close_to_their_teacher(device: str, divergence: str, kl: float) -> None:
    check_linear(problem(16, device=device, noise=noise_for(kl), labels=False), divergence=divergence)


@two_dtypes
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_softcap_and_scale(device: str, dtype: torch.dtype, softcap: float | None, scale: float | None) -> None:
    p = problem(13, dtype=dtype, device=device)
    head, options = p.teacher, {"temperature": 2.0, **BOTH}
    check_linear(p, logit_softcap=softcap, logit_scale=scale, **options)
    p = p._replace(teacher=TeacherHead(head.hidden, head.weight, head.bias, softcap=softcap, scale=scale))
    check_linear(p, **options)
    check_linear(p, logit_softcap=7.0, logit_scale=1.5, **options)


@two_dtypes
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(device: str, dtype: torch.dtype, smoothing: float) -> None:
    check_linear(problem(13, dtype=dtype, device=device), label_smoothing=smoothing, temperature=2.0, **BOTH)


@two_dtypes
@pytest.mark.parametrize(
    "columns",
    [
        (1037, 1037),
        (128, 128),
        (101, 90),
        (90, 101),
        (1088, 1037),
        (2, 2),
        (7, 6),
        pytest.param((20011, 20020), marks=pytest.mark.wide),
    ],
)
def test_vocabularies(device: str, dtype: torch.dtype, columns: tuple[int, int]) -> None:
    """Labels may lie in the student's surplus columns, which keep their cross-entropy and get its gradient alone."""
    p = problem(2, 20, columns=columns, dtype=dtype, device=device)
    if columns[0] > columns[1]:
        p.labels[1] = columns[0] - 1
    options = {"temperature": 2.0, "vocab_mismatch": "truncate"}
    check_linear(p, **options, **BOTH)
    if columns[0] > columns[1]:
        leaves = p.leaves()
        gradient = leaves.gradients(leaves.loss(**options))
        assert not gradient["weight"][columns[1] :].any()
        assert not gradient["bias"][columns[1] :].any()
        assert gradient["weight"][: columns[1]].any()


def test_vocabularies_far_apart(device: str) -> None:
    p = problem(9, columns=(1200, 100), device=device)
    with pytest.raises(ValueError, match=r"1200 and 100.*tokenizer"):
        p.loss()
    with pytest.raises(ValueError, match="hidden states, which belong in a TeacherHead"):
        linear_kd_loss(p.hidden, p.weight, p.teacher.hidden)
    check_linear(p, vocab_mismatch="truncate", **BOTH)


@two_dtypes
@pytest.mark.parametrize("sizes", [(32, 24), (32, 32), (3, 130), (1, 2)])
def test_hidden_sizes(device: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    check_linear(problem(13, sizes=sizes, dtype=dtype, device=device), temperature=2.0, **BOTH)


@dtypes
@pytest.mark.parametrize("biased", ["student", "teacher", "neither"])
def test_biases(device: str, dtype: torch.dtype, biased: str) -> None:
    p = problem(13, dtype=dtype, device=device)
    if biased != "student":
        p = p._replace(bias=None)
    if biased != "teacher":
        p = p._replace(teacher=TeacherHead(p.teacher.hidden, p.teacher.weight))
    check_linear(p, temperature=2.0, **BOTH)


def test_columns_masked_by_a_bias(device: str) -> None:
    """−inf there: neither NaN nor gradient."""
    p = problem(13, device=device)
    p.labels.clamp_(max=90)
    for bias in (p.bias, p.teacher.bias):
        bias[91:] = -torch.inf
    check_linear(p, temperature=2.0, **BOTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=describe)
def test_equals_kd_loss_on_projected_logits(device: str, dtype: torch.dtype) -> None:
    p, found = problem(3, 7, columns=(203, 201), dtype=dtype, device=device), []
    options = {"temperature": 2.0, "label_smoothing": 0.1, "logit_softcap": 20.0, "return_terms": True, **BOTH}
    for linear in (True, False):
        q = p.leaves()
        if linear:
            loss, terms = q.loss(**options)
        else:
            head = TeacherLogits(F.linear(p.teacher.hidden, p.teacher.weight, p.teacher.bias))
            loss, terms = kd_loss(F.linear(q.hidden, q.weight, q.bias), head, p.labels, **options)
        found.append((loss.detach(), *terms, *q.gradients(loss).values()))
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **close)
        assert b.norm() > 0.01


@two_dtypes
def test_tied_weights(device: str, dtype: torch.dtype) -> None:
    """The head is the embedding, too: both uses add up."""
    p, ids = problem(13, sizes=(24, 24), dtype=dtype, device=device), torch.arange(13, device=device) * 7
    weight = p.weight.clone().requires_grad_()
    tied = p._replace(hidden=F.embedding(ids, weight), weight=weight)
    tied.loss(**BOTH).backward()
    apart = p._replace(hidden=p.weight[ids])
    truth = linear_truth(apart, **BOTH)
    expected = truth.gradients["weight"].index_add(0, ids.cpu(), truth.gradients["hidden"])
    error = (weight.grad.double().cpu() - expected).norm() / expected.norm()
    assert error <= (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert truth.gradients["hidden"].norm() > 0.1 * expected.norm()


# -------------------------------------------------- teacher forms


def listed(p: Problem, tail: str, t: float = 1.0) -> TeacherTopK:
    return top_k(logits_of(p), 8, tail, t, padding=1)


@dtypes
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32], ids=describe)
def test_teacher_logits(device: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    p = problem(2, 7, columns=(101, 96), dtype=dtype, device=device)
    logits = logits_of(p, teacher_dtype)
    check_linear(p._replace(teacher=logits), temperature=2.0, **BOTH)
    check_linear(p._replace(teacher=TeacherLogits(logits, softcap=6.0, scale=0.5)), temperature=2.0, **BOTH)


def test_teacher_head_of_another_dtype(device: str) -> None:
    """A teacher in 16 bit beside a student in 32, and the other way round."""
    for ours, theirs in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        p = problem(13, dtype=ours, device=device)
        head = TeacherHead(*(x.to(theirs) for x in (p.teacher.hidden, p.teacher.weight, p.teacher.bias)))
        check_linear(p._replace(teacher=head), temperature=2.0, **BOTH)


@two_dtypes
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_top_k(device: str, dtype: torch.dtype, tail: str, divergence: str) -> None:
    p = problem(2, 7, dtype=dtype, device=device)
    for t in (1.0, 2.0):
        teacher = listed(p, tail, t)
        check_linear(p._replace(teacher=teacher), temperature=t, divergence=divergence, **BOTH)


@dtypes
def test_samples(device: str, dtype: torch.dtype) -> None:
    p = problem(2, 7, dtype=dtype, device=device)
    check_linear(p._replace(teacher=samples(logits_of(p), 8)), **BOTH)


@two_dtypes
def test_several_teachers(device: str, dtype: torch.dtype) -> None:
    """Heads of several sizes, and every form beside the others."""
    p = problem(2, 7, dtype=dtype, device=device)
    other = problem(2, 7, sizes=(24, 40), columns=(101, 96), dtype=dtype, device=device, seed=5).teacher
    heads = [p.teacher, TeacherHead(other.hidden, other.weight, None, softcap=9.0)]
    options = {"temperature": 2.0, **BOTH}
    check_linear(p._replace(teacher=heads), **options)
    check_linear(p._replace(teacher=heads), teacher_weights=[3.0, 0.5], divergence="reverse_kl", **options)
    mixed = [listed(p, "bucket", 2.0), other, logits_of(p), samples(logits_of(p), 8)]
    check_linear(p._replace(teacher=mixed), **options)
    check_linear(p._replace(teacher=mixed), teacher_weights=[0.25, 2.0, 0.0, 1.0], **options)
    check_linear(p._replace(teacher=mixed[::-1]), teacher_weights=[1.0, 0.0, 2.0, 0.25], reduction="none", **options)


# -------------------------------------------------- upstream gradients


@dtypes
@pytest.mark.parametrize("upstream", [0.37, -3.0, 1e4])
def test_upstream(device: str, dtype: torch.dtype, upstream: float) -> None:
    p, options = problem(2, 7, dtype=dtype, device=device), {"temperature": 2.0, **BOTH}
    if dtype == torch.float16:
        upstream = max(-3.0, min(upstream, 100.0))  # 65504 is float16's last number
    check_linear(p, upstream=upstream, **options)
    check_linear(p, upstream=upstream, reduction="sum", **options)
    check_linear(p, upstream=torch.linspace(-1, 2, 14).view(2, 7), reduction="none", **options)


@dtypes
def test_backward_again(device: str, dtype: torch.dtype) -> None:
    p, options = problem(13, dtype=dtype, device=device), {"temperature": 2.0, **BOTH}
    for reduction in ("mean", "none"):
        leaves = p.leaves()
        loss = leaves.loss(reduction=reduction, **options)
        found = [leaves.gradients(loss, u, retain_graph=True) for u in (1.0, 3.0, 1.0)]
        for gradients, upstream in zip(found, (1.0, 3.0, 1.0), strict=True):
            truth = linear_truth(p, upstream=upstream, reduction=reduction, **options)
            assert_gradients(gradients, p, truth)
        assert all(torch.equal(found[0][name], found[2][name]) for name in found[0])
        with pytest.raises(RuntimeError, match="second derivative"):
            leaves.gradients(loss, create_graph=True)


def test_gradients_accumulate(device: str) -> None:
    p = problem(13, device=device)
    leaves = p.leaves()
    loss = leaves.loss(**BOTH)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    gradients = {name: x.grad for name, x in leaves.operands.items()}
    assert_gradients(gradients, p, linear_truth(p, upstream=3.0, **BOTH))


def test_float16_with_a_loss_scale(device: str) -> None:
    """The mean over 4096 rows alone is below what float16 resolves; times 2^14 it is not."""
    p = problem(4096, sizes=(8, 8), columns=(64, 64), dtype=torch.float16, device=device, noise=0.01, labels=False)
    truth = check_linear(p, upstream=2.0**14)
    unscaled = truth.gradients["hidden"] / 2**14
    assert (unscaled.to(torch.float16).double() - unscaled).norm() > 0.01 * unscaled.norm()


@dtypes
@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("weight", "bias")])
def test_frozen_operands(device: str, dtype: torch.dtype, frozen: tuple[str, ...]) -> None:
    p = problem(13, dtype=dtype, device=device)
    check_linear(p, *frozen, temperature=2.0, **BOTH)


@two_dtypes
def test_strides(device: str, dtype: torch.dtype) -> None:
    """All but the last token and class, NaN after each row's end: what is not asked for is not read."""
    p = problem(3, 5, dtype=dtype, device=device)

    def wide(x: Tensor) -> Tensor:
        padded = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), torch.nan).to(x)
        padded[..., :-1, :-3] = x
        return padded[..., :-1, :-3]

    head = TeacherHead(wide(p.teacher.hidden), p.teacher.weight, p.teacher.bias)
    strided = p._replace(hidden=wide(p.hidden), teacher=head)
    assert not strided.hidden.is_contiguous()
    truth, loss = linear_truth(p, **BOTH), strided.loss(**BOTH)
    assert_value(loss, truth.loss)
    hidden, weight = (x.detach().requires_grad_() for x in (strided.hidden, wide(p.weight)))
    leaves = strided._replace(hidden=hidden, weight=weight)
    assert_gradients(leaves.gradients(leaves.loss(**BOTH)), p, truth)


def test_teacher_gets_no_gradient(device: str) -> None:
    p = problem(13, device=device)
    head = [x.requires_grad_() for x in (p.teacher.hidden, p.teacher.weight, p.teacher.bias)]
    leaves = p.leaves()
    with pytest.warns(UserWarning, match="teacher requires a gradient, but gets none"):
        leaves.loss(**BOTH).backward()
    assert all(x.grad is None for x in head)
    assert all(x.grad.any() for x in leaves.operands.values())
    with pytest.raises(ValueError, match=r"student does not: are the two swapped"):
        p.loss(**BOTH)
    p.teacher.hidden.requires_grad_(False)  # a head that nobody froze is nothing to tell of
    assert not p.loss(**BOTH).requires_grad
    assert teacher_logits(p.teacher).logits.shape == (13, 101)
