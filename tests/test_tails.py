"""What a bucket makes of a teacher whose list holds all of its probability but for rounding: a tail that rounding alone
decides, in each dtype of log-probabilities, with Σp below 1, at it and above.
"""

from __future__ import annotations

from typing import Any

import linear_cases
import pytest
import torch
from families import describe, top_k
from torch import Tensor
from truth import Truth, check_kd, float64, kd_truth, pair

from fusedkd import TeacherTopK, kd_loss
from fusedkd.reference.sparse import tail_of_teacher

N, V, K = 64, 61, 8
directions = pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=describe)


def sure(dtype: torch.dtype, device: str = "cpu", below: float = 20.0) -> tuple[Tensor, Tensor, TeacherTopK]:
    """Student, teacher, and the K best columns of it, which hold all but 1e-9: the others are `below`."""
    student, teacher = pair(N, V, device=device, noise=0.5)
    teacher = torch.where(teacher >= teacher.topk(K).values[:, -1:], teacher, teacher - below)
    logprobs, ids = teacher.to(torch.float64 if dtype == torch.float64 else torch.float32).log_softmax(-1).topk(K)
    return student, teacher, TeacherTopK(ids, logprobs.to(dtype), "bucket")


@pytest.mark.parametrize("eps", [2.0**-7, 2.0**-10, 2.0**-23, 2.0**-52])
def test_the_tail(eps: float) -> None:
    """|1 − Σp|, at least ½ε·Σp|log p| + ε'; where the student has nothing there, 0 up to 1/16."""
    dtype = next(t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64) if torch.finfo(t).eps == eps)
    half = torch.tensor([[0.5, 0.5], [0.25, 0.25], [2.0, 0.5]], dtype=torch.float64).log().to(dtype)
    half = torch.cat([half, torch.full((3, 1), -torch.inf, dtype=dtype)], 1)  # padding
    p = half.double().exp()
    rest = 1 - p.sum(-1, keepdim=True)
    error = eps / 2 * (p * half.double().abs()).nan_to_num(0).sum(-1, keepdim=True)
    error += 2.0**-46 if dtype == torch.float64 else 2.0**-23
    some, none = (tail_of_teacher(half, torch.full((3, 1), x)).flatten() for x in (True, False))
    torch.testing.assert_close(some, torch.stack([error[0, 0].maximum(rest[0].abs()[0]), rest[1, 0], -rest[2, 0]]))
    torch.testing.assert_close(none, torch.stack([0 * rest[0, 0], rest[1, 0], 0 * rest[2, 0]]))


@directions
@dtypes
def test_a_list_that_holds_all(device: str, divergence: str, dtype: torch.dtype) -> None:
    """Finite, not negative, and a gradient that lowers the divergence from the whole teacher."""
    student, teacher, listed = sure(dtype, device)
    value = kd_loss(student, listed, divergence=divergence, reduction="none")
    assert value.isfinite().all()
    assert (value > 0).all()
    wanted = kd_truth(student, teacher, divergence=divergence, reduction="none").gradient
    alike = torch.cosine_similarity(gradient_of(student, listed, divergence), wanted)
    assert alike.min() > 0.4
    assert alike.mean() > 0.9
    if dtype != torch.float64:  # a tail of 1e-9 there has the digits of the sum, 7, in whatever order that is taken
        for z in (student, student.double(), student.bfloat16()):
            check_kd(z, listed, divergence=divergence, reduction="none")


def gradient_of(student: Tensor, teacher: TeacherTopK, divergence: str) -> Tensor:
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(leaf, teacher, divergence=divergence), leaf)
    return float64(gradient)


@directions
@dtypes
@pytest.mark.parametrize("scale", [0.9, 1.0, 1.01])
def test_all_columns(device: str, divergence: str, dtype: torch.dtype, scale: float) -> None:
    """K = V, Σp as rounding leaves it and above: the dense loss. Below by more than that, the rest is nowhere on the
    student's side, and so forward KL infinite.
    """
    student, logits = pair(8, V, device=device)
    listed = top_k(logits.double(), V)
    logprobs = (listed.logprobs + torch.tensor(scale).double().log()).to(dtype)
    listed = TeacherTopK(listed.ids, logprobs, "bucket")
    whole = torch.empty(8, V, dtype=torch.float64, device=device).scatter(1, listed.ids, logprobs.double())
    truth = check_kd(student, listed, divergence=divergence, reduction="none")
    if scale < 1:
        assert truth.loss.value.isinf().all() == (divergence == "forward_kl")
    else:
        same(truth, kd_truth(student, whole, divergence=divergence, reduction="none"))


@directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=describe)
@pytest.mark.parametrize("carrier", [None, torch.float32, torch.float64], ids=describe)
def test_all_columns_of_a_rounded_softmax(device: str, divergence: str, dtype: torch.dtype, carrier: Any) -> None:
    """PyTorch's own log_softmax errs by more than the rounding of its result; a cache may hold it in a wider type."""
    student, logits = pair(N, 1024, device=device)
    logits[:, 3] = torch.linspace(0, 25, N, device=device)
    logprobs, ids = (logits + 12).to(dtype).log_softmax(-1).sort(-1, descending=True)
    assert (1 - float64(logprobs).exp().sum(-1)).max() > 1e-7
    listed = TeacherTopK(ids, logprobs.to(carrier or dtype), "bucket")
    truth = check_kd(student, listed, divergence=divergence, reduction="none")
    assert truth.loss.value.isfinite().all()


def same(a: Truth, b: Truth) -> None:
    torch.testing.assert_close(a.loss.value, b.loss.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-9, atol=1e-12)


@directions
@dtypes
def test_a_vocabulary_that_both_mask(device: str, divergence: str, dtype: torch.dtype) -> None:
    """As constrained decoding does: the student has nothing off the list, the teacher neither but for rounding."""
    student, _, listed = sure(dtype, device, torch.inf)
    off = torch.ones(N, V, dtype=torch.bool, device=device).scatter(1, listed.ids, False)
    student = student.masked_fill(off, -torch.inf)
    truth = check_kd(student, listed, divergence=divergence, reduction="none")
    assert truth.loss.value.isfinite().all()


@directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=describe)
def test_quantised_caches(device: str, divergence: str, dtype: torch.dtype) -> None:
    """Σp is above 1 in a part of the rows. A student that is the teacher has none, and no negative one."""
    student, logits = pair(N, V, device=device)
    listed = top_k((3 * logits).to(dtype).double(), 24, "bucket")
    listed = TeacherTopK(listed.ids, listed.logprobs.to(dtype), "bucket")
    assert 0.1 < (float64(listed.logprobs).exp().sum(-1) >= 1).double().mean() < 0.9
    truth = check_kd(student, listed, divergence=divergence, reduction="none")
    assert (truth.loss.value > 0).all()
    near = kd_loss(3 * logits, listed, divergence=divergence, reduction="none")
    assert (near >= 0).all()
    assert near.max() < 0.05


@directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=describe)
def test_linear(device: str, divergence: str, dtype: torch.dtype) -> None:
    """The log-probabilities reach the kernel in their own dtype."""
    p = linear_cases.problem(9, device=device)
    logits = linear_cases.logits_of(p)
    logits = torch.where(logits >= logits.topk(K).values[:, -1:], logits, logits - 20)
    logprobs, ids = logits.log_softmax(-1).topk(K)
    linear_cases.check_linear(p._replace(teacher=TeacherTopK(ids, logprobs.to(dtype), "bucket")), divergence=divergence)
