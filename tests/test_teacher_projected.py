"""A teacher of another vocabulary, whose probabilities a matrix takes to the student's columns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from families import at, families, top_k
from torch import Tensor
from truth import assert_gradient, assert_value, float64, kd_truth, operator_calls, pair, targets

from fusedkd import (
    GOLD,
    ULD,
    Divergence,
    LogitMSE,
    TeacherHead,
    TeacherLogits,
    TeacherProjected,
    TeacherSamples,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from fusedkd.backends import defined, vocabulary_map

V_S, V_T = 33, 41


def matrix(
    device: str, *, mass: float = 1.0, empty: tuple[int, ...] = (), sizes: tuple[int, int] = (V_S, V_T)
) -> Tensor:
    """Every student column is reached, each teacher column goes to two, but for `empty` ones."""
    generator = torch.Generator().manual_seed(5)
    W = torch.zeros(sizes, dtype=torch.float64)
    for t in range(sizes[1]):
        share = 0.2 + 0.6 * float(torch.rand((), generator=generator))
        W[t % sizes[0], t] += mass * share
        W[int(torch.randint(sizes[0], (), generator=generator)), t] += mass * (1 - share)
    W[:, list(empty)] = 0
    return W.to(device).to_sparse()


def sides(*lead: int, device: str, **more: Any) -> tuple[Tensor, Tensor]:
    return pair(*lead, V_S, device=device, **more)[0], pair(*lead, V_T, device=device, seed=7, **more)[1]


def equivalent(logits: Tensor, weight: Tensor, T: float = 1.0) -> TeacherLogits:
    """The teacher of the student's columns whose softmax at T is the projected one, in float64."""
    p = (float64(logits) / T).softmax(-1) @ float64(weight.to_dense()).T
    return TeacherLogits(T * p.log())


def check(student: Tensor, given: Any, same: Any, labels: Tensor | None, upstream: float = 1.0, **options: Any) -> None:
    """By the rule of `truth.py`, against the plain teacher that it should equal."""
    truth = kd_truth(student, same, labels, upstream=upstream, **options)
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf, given, labels, **options)
    assert_value(loss, truth.loss)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    assert_gradient(gradient, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_kl_is_that_of_the_projected_teacher(device: str, dtype: torch.dtype, temperature: float) -> None:
    student, teacher = sides(3, 5, device=device, dtype=dtype)
    labels, weight = targets(3, 5, classes=V_S, device=device), matrix(device)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)).to(device)
    given, same = TeacherProjected(teacher, weight), equivalent(teacher, weight, temperature)
    for options in (
        {},
        {"ce_weight": 0.3, "kd_weight": 0.7, "label_smoothing": 0.1, "kd_mask": mask > 0.3},
        {"kd_mask": mask, "reduction": "sum", "scale_by_t2": False},
        {"reduction": "none"},
        {"kd_normalizer": 7.0, "upstream": 0.5},
    ):
        check(student, given, same, labels, temperature=temperature, **options)


@families
def test_every_divergence(device: str, divergence: Divergence) -> None:
    student, teacher = sides(9, device=device)
    labels, weight = targets(9, classes=V_S, device=device), matrix(device)
    given, options = TeacherProjected(teacher, weight), at(divergence, 2.0)
    if isinstance(divergence, LogitMSE):
        with pytest.raises(ValueError, match="logit_mse does not compare probabilities column by column"):
            kd_loss(student, given, labels, **options)
        return
    check(student, given, equivalent(teacher, weight, 2.0), labels, **options)


def test_transforms_temperatures_and_padding(device: str) -> None:
    """The teacher's soft-cap and temperature come before W; padded heads have columns that W lacks, on both sides."""
    student, teacher = pair(4, V_S + 3, device=device)[0], pair(4, V_T + 2, device=device, seed=7)[1]
    weight, labels = matrix(device), targets(4, classes=V_S + 3, device=device)
    capped = 3 * (float64(teacher)[:, :V_T] * 0.5 / 3).tanh()
    options: dict[str, Any] = {"teacher_temperature": 1.5, "logit_softcap": 5.0, "ce_weight": 0.4}
    same = TeacherLogits(equivalent(capped, weight, 1.5).logits)
    check(student, TeacherProjected(TeacherLogits(teacher, 3.0, 0.5), weight), same, labels, **options)


def test_without_a_kernel(device: str) -> None:
    class OwnKL(Divergence):
        def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
            return (log_p.exp() * (log_p - log_q)).sum(-1)

    student, teacher = sides(5, device=device)
    found = [kd_loss(student, TeacherProjected(teacher, matrix(device)), divergence=d) for d in (OwnKL(), "forward_kl")]
    torch.testing.assert_close(*found)


def test_some_rows_at_a_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient are the same in any tile, and no kernel is given more rows; in place as well."""
    student, teacher = sides(2, 9, device=device)
    given, found = TeacherProjected(teacher[:, :-1], matrix(device)), []
    for tile in (1 << 22, 3 * V_T):
        monkeypatch.setattr(vocabulary_map, "TILE", tile)
        for inplace in (False, True):
            leaf = student.clone().requires_grad_()
            with operator_calls() as calls:
                loss = kd_loss(leaf[:, :-1] + 0, given, divergence="reverse_kl", inplace=inplace)
            loss.backward()
            found.append((loss.detach(), leaf.grad))
            seen = [inputs["student"].shape[1] for name, inputs in calls if name == "kd_forward"]
            assert not seen or max(seen) == (16 if tile > 1000 else 3)
    assert found[0][1].any()
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-8)


def test_masked_columns_and_lost_rows(device: str) -> None:
    """−inf of the teacher is probability 0; a row that W loses adds nothing; what no row reads does not show."""
    student, teacher = sides(6, device=device)
    weight = matrix(device, empty=(2, 3))
    teacher[0, 5:9] = teacher[1] = -math.inf
    teacher[2] = -math.inf
    teacher[2, 2:4] = 1.0
    student[3, 0] = -math.inf
    student[4, 0] = teacher[4, 0] = math.nan
    mask = torch.tensor([1, 1, 1, 1, 0, 1], device=device)
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, TeacherProjected(teacher, weight), reduction="none", kd_mask=mask)
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    assert not rows[[1, 2, 4]].any()
    assert not gradient[[1, 2, 4]].any()
    assert rows[3].isinf()
    same = kd_truth(student, equivalent(teacher, weight), reduction="none", kd_mask=mask)
    some = [0, 5]
    torch.testing.assert_close(float64(rows)[some], same.loss.value[some], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(float64(gradient)[some], same.gradient[some], rtol=1e-4, atol=1e-7)
    teacher[5, 0] = math.nan
    assert kd_loss(student, TeacherProjected(teacher, weight), kd_mask=mask).isnan()


def test_a_column_that_nothing_reaches(device: str) -> None:
    """Reverse KL is infinite there and has no gradient; forward KL and a JSD are finite."""
    student, teacher = sides(4, device=device)
    weight = matrix(device).to_dense()
    weight[7] = 0
    given = TeacherProjected(teacher, weight.to_sparse())
    leaf = student.clone().requires_grad_()
    for divergence in ("forward_kl", "jsd", "reverse_kl"):
        loss = kd_loss(leaf, given, divergence=divergence)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert bool(loss.isinf()) == (divergence == "reverse_kl")
        assert bool(gradient.any()) != (divergence == "reverse_kl")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_hidden_states(device: str, dtype: torch.dtype, reduction: str) -> None:
    """The teacher's head is projected before W is; its hidden states are of another width."""
    x, w = (pair(*shape, device=device, dtype=dtype, noise=0.1)[0] for shape in ((9, 8), (V_S, 8)))
    y, u = (pair(*shape, device=device, dtype=dtype, seed=4, noise=0.1)[0] for shape in ((9, 6), (V_T, 6)))
    weight, labels = matrix(device), targets(9, classes=V_S, device=device)
    options: dict[str, Any] = {"labels": labels, "temperature": 2.0, "ce_weight": 0.5, "reduction": reduction}
    found = []
    same = equivalent(float64(y) @ float64(u).T, weight, 2.0).logits.to(device)
    for teacher in (TeacherProjected(TeacherHead(y, u), weight), same):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = linear_kd_loss(*leaves, teacher, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    tolerance = 1e-2 if dtype.itemsize == 2 else 1e-4
    for ours, expected in zip(*found, strict=True):
        assert expected.any()
        assert (float64(ours) - float64(expected)).norm() <= tolerance * float64(expected).norm()
    if reduction == "mean" and dtype == torch.float32:
        given = TeacherProjected(TeacherHead(y, u), weight)
        several = [linear_kd_loss(x, w, t, labels) for t in (given, same)]
        both = linear_kd_loss(x, w, [given, same], labels, teacher_weights=[0.3, 0.7])
        torch.testing.assert_close(both, 0.3 * several[0] + 0.7 * several[1])


def test_a_term_of_weight_0_reads_no_teacher(device: str) -> None:
    """Of logits and of hidden states, whose columns are not the student's."""
    x, w = pair(9, 8, device=device)[0], pair(V_S, 8, device=device)[0]
    head = TeacherHead(pair(9, 6, device=device)[0] * math.nan, pair(V_T, 6, device=device)[0])
    labels = targets(9, classes=V_S, device=device)
    expected = torch.nn.functional.cross_entropy(x @ w.T, labels)
    options: dict[str, Any] = {"kd_weight": 0, "ce_weight": 1.0}
    for teacher, divergence in ((TeacherProjected(head, matrix(device)), "forward_kl"), (head, ULD())):
        for found in (
            kd_loss(x @ w.T, teacher, labels, divergence=divergence, **options),
            linear_kd_loss(x.requires_grad_(), w, teacher, labels, divergence=divergence, **options),
        ):
            torch.testing.assert_close(found.detach(), expected.detach())


def test_a_list_is_projected_to_the_students_columns(device: str) -> None:
    """All of the teacher's columns: the same loss. A few: their probability, the rest in the tail."""
    student, teacher = sides(3, 4, device=device, dtype=torch.float64)
    weight, labels = matrix(device), targets(3, 4, classes=V_S, device=device)
    whole = kd_loss(student, TeacherProjected(teacher, weight), labels)
    every = TeacherProjected(top_k(teacher, V_T, "bucket"), weight, V_S)
    torch.testing.assert_close(kd_loss(student, every, labels), whole)
    few = top_k(teacher, 6, "bucket", padding=1)
    p = torch.zeros(3, 4, V_T, dtype=torch.float64, device=device)
    p.scatter_(-1, few.ids.clamp(min=0), torch.where(few.ids >= 0, few.logprobs.exp(), 0))
    image = p @ weight.to_dense().T
    stored = TeacherProjected(few, weight, 4).top_k()
    assert stored.ids.shape == (3, 4, 4)
    assert (stored.tail, stored.logprobs.dtype) == ("bucket", torch.float64)
    expected = image.topk(4, -1)
    torch.testing.assert_close(stored.logprobs.exp(), expected.values)
    torch.testing.assert_close(image.gather(-1, stored.ids.clamp(min=0)), expected.values)
    torch.testing.assert_close(
        kd_loss(student, TeacherProjected(few, weight, 4), labels), kd_loss(student, stored, labels)
    )
    nothing = TeacherProjected(dataclasses.replace(few, ids=torch.full_like(few.ids, -1)), weight).top_k()
    assert (nothing.ids == -1).all()
    assert kd_loss(student, nothing, labels) == 0


def test_alive_until_backward_and_no_longer(device: str) -> None:
    student, teacher = sides(4, device=device)
    leaf = student.clone().requires_grad_()
    before = len(defined._defined)
    rows = kd_loss(leaf, TeacherProjected(teacher, matrix(device)), divergence=ULDLike(), reduction="none")
    rows.sum().backward()
    assert leaf.grad.any()
    del rows
    assert len(defined._defined) <= before


class ULDLike(Divergence):
    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1)


def test_compiled(device: str) -> None:
    student, teacher = sides(4, device=device)
    weight = matrix(device)
    leaf = student.clone().requires_grad_()
    loss = torch.compile(lambda z: kd_loss(z, TeacherProjected(teacher, weight)), backend="eager")(leaf)
    expected = kd_loss(leaf, TeacherProjected(teacher, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (loss, expected)))


def test_refusals(device: str) -> None:
    student, teacher = sides(4, device=device)
    weight, listed = matrix(device), top_k(teacher, 5)
    samples = TeacherSamples.draw(teacher, 3)
    far = TeacherTopK(listed.ids.clamp(min=50), listed.logprobs)
    heavy, negative = weight.to_dense().clone(), weight.to_dense().clone()
    heavy[0, 4], negative[0, 4] = 3.0, -0.1
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, "must be a sparse COO tensor .* not a torch.strided tensor", (teacher, weight.to_dense()), {}),
        (TypeError, "must be of floating point, not torch.int64", (teacher, weight.long()), {}),
        (TypeError, "or a TeacherTopK, not a TeacherSamples", (samples, weight), {}),
        (ValueError, "has 40 rows, but the student 33 columns", (teacher, matrix(device, sizes=(40, V_T))), {}),
        (ValueError, "vocabularies of 33 and 20 columns", (teacher, matrix(device, sizes=(20, V_T))), {}),
        (ValueError, "at least as many, not 41", (teacher, matrix(device, sizes=(V_S, 44))), {}),
        (ValueError, "vocabularies of 20 and 41 columns", (teacher, matrix(device, sizes=(V_S, 20))), {}),
        (ValueError, "uld does not compare", (teacher, weight), {"divergence": ULD()}),
        (ValueError, "gold does not compare", (teacher, weight), {"divergence": GOLD(*[torch.arange(3)] * 2)}),
        (ValueError, "logprobs_temperature must be the loss's", (listed, weight), {"temperature": 2.0}),
        (TypeError, "not a TeacherProjected", (teacher, weight), {"teacher_gradient": True}),
    ]
    if device == "cpu":  # where values are looked at
        cases += [
            (ValueError, "have a sum of at most 1, but one has", (teacher, heavy.to_sparse()), {}),
            (ValueError, "must be at least 0, but one element is -0.1", (teacher, negative.to_sparse()), {}),
            (ValueError, "fewer than 41, but one is 50", (far, weight), {}),
        ]
    for kind, message, given, options in cases:
        with pytest.raises(kind, match=message):
            kd_loss(student.requires_grad_(), TeacherProjected(*given), **options)
    with pytest.raises(TypeError, match="top_k needs a TeacherTopK"):
        TeacherProjected(teacher, weight).top_k()
    assert TeacherProjected in torch.serialization.get_safe_globals()
