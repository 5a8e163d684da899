"""torch.compile(fullgraph=True): one graph, the same numbers, no recompilation by a schedule."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from compiled import fresh_compiler, graph  # noqa: F401
from families import TAILS, at, describe, samples, top_k
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from truth import Truth, assert_gradient, assert_value, hidden_truth, kd_truth, pair, targets

from fusedkd import DKD, JSD, AlphaBeta, Jeffreys, LogitMSE, SkewKL, TeacherLogits, hidden_loss, kd_loss
from fusedkd.divergences import Divergence
from fusedkd.nn import DistilBertLoss

OPTIONS = {"temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.7}


def check(loss: Tensor, leaf: Tensor, truth: Truth) -> None:
    assert_value(loss, truth.loss)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert_gradient(gradient, truth)


@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float16, "sum"), (torch.bfloat16, "none"), (torch.float32, "mean")], ids=str
)
def test_kd_loss(device: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher = pair(3, 5, 33, dtype=dtype, device=device)
    labels = targets(3, 5, classes=33, device=device)
    leaf = student.requires_grad_()
    options = {**OPTIONS, "reduction": reduction}
    loss = graph(kd_loss)(leaf, teacher, labels, **options)
    check(loss, leaf, kd_truth(student, teacher, labels, **options))


def test_kd_loss_with_inductor(device: str) -> None:
    """A head, a loss over all but the last token, terms, and a scaled total, in one graph."""

    def step(hidden: Tensor, weight: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T
        loss, terms = kd_loss(logits[:, :-1], teacher[:, :-1], labels[:, 1:], return_terms=True, **OPTIONS)
        return 3 * loss, terms.kd

    hidden, weight = pair(2, 6, 8, device=device)[0], pair(33, 8, device=device, seed=2)[0].requires_grad_()
    teacher, labels = pair(2, 6, 33, device=device, seed=3)[1], targets(2, 6, classes=33, device=device)
    results = []
    for function in (step, graph(step, "inductor")):
        loss, kd = function(hidden, weight, teacher, labels)
        results.append((loss, kd, torch.autograd.grad(loss, weight)[0]))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert results[0][2].norm() > 0.1
    assert not results[1][1].requires_grad


def test_every_option(device: str) -> None:
    student, teacher = pair(3, 5, 33, device=device, teacher_columns=35)
    labels = targets(3, 5, classes=33, device=device)
    options = {
        **OPTIONS,
        "teacher_temperature": 1.5,
        "scale_by_t2": False,
        "label_smoothing": 0.1,
        "kd_mask": torch.arange(15, device=device).view(3, 5) % 4,
        "kd_normalizer": 11,
        "ce_normalizer": torch.tensor(3, device=device),
        "logit_softcap": 9.0,
        "logit_scale": 0.5,
    }
    form, leaf = TeacherLogits(teacher, softcap=8.0), student.requires_grad_()

    def step(z: Tensor) -> Tensor:
        return kd_loss(z, form, labels, **options)

    check(graph(step)(leaf), leaf, kd_truth(student, form, labels, **options))


def test_several_teachers(device: str) -> None:
    student, teacher = pair(4, 33, device=device)
    leaf = student.requires_grad_()
    eager = kd_loss(leaf, [teacher, teacher.flip(0)], teacher_weights=[0.3, 0.7])
    compiled = graph(lambda z: kd_loss(z, [teacher, teacher.flip(0)], teacher_weights=[0.3, 0.7]))(leaf)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in (compiled, eager)))


def test_inplace_is_ignored(device: str) -> None:
    values, teacher = pair(4, 33, device=device)
    leaf = values.clone().requires_grad_()
    loss = graph(lambda z: kd_loss(z * 1, teacher, inplace=True))(leaf)
    check(loss, leaf, kd_truth(values, teacher))
    loss = graph(lambda z: kd_loss(z, teacher, inplace=True))(
        leaf
    )  # not even a leaf is refused: nothing is overwritten
    assert torch.equal(leaf, values)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden(device: str, reduction: str) -> None:
    student, teacher = pair(3, 5, 33, device=device)
    mask = torch.arange(15, device=device).view(3, 5) % 4
    leaf = student.requires_grad_()
    kind: Any = {"distance": "smooth_l1", "normalize": "layer_norm", "reduction": reduction}
    loss = graph(hidden_loss)(leaf, [teacher[..., :9].contiguous(), teacher[..., 9:].contiguous()], mask, **kind)
    check(loss, leaf, hidden_truth(student, teacher, mask, **kind))


def test_distilbert_loss(device: str) -> None:
    (student, teacher), (x, y) = pair(3, 5, 33, device=device), pair(3, 5, 8, device=device, seed=4)
    labels = targets(3, 5, classes=33, device=device)
    mask = (torch.arange(5, device=device) < 4).expand(3, 5)
    module, leaves = DistilBertLoss(), (student.requires_grad_(), x.requires_grad_())
    results = []
    for function in (module, graph(module)):
        loss, terms = function(student, teacher, labels, mask, x, y)
        results.append((loss, *terms, *torch.autograd.grad(loss, leaves)))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


def test_a_teacher_from_inference_mode(device: str) -> None:
    """A compiled graph cannot save one for backward: its own doing, without a word from here. A clone will do."""
    student, teacher = pair(3, 33, device=device)
    leaf = student.requires_grad_()
    with torch.inference_mode():
        inferred = teacher.clone()
    with pytest.raises(RuntimeError, match=r"Inference tensors cannot be saved for backward.*clone"):
        graph(kd_loss)(leaf, inferred, **{**OPTIONS, "ce_weight": 0.0})
    check(graph(kd_loss)(leaf, inferred.clone()), leaf, kd_truth(student, teacher))


def test_a_schedule_of_tensors_recompiles_nothing(device: str) -> None:
    student, teacher = pair(4, 33, device=device)
    labels = targets(4, classes=33, device=device)
    leaf, step = student.requires_grad_(), graph(kd_loss)

    def options(i: int) -> dict[str, float]:
        return {"temperature": 1.0 + i, "kd_weight": 0.5 / (i + 1), "ce_weight": 0.1 * i, "label_smoothing": 0.05 * i}

    for i in range(4):
        tensors = {name: torch.tensor(x, dtype=torch.float64, device=device) for name, x in options(i).items()}
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            loss = step(leaf, teacher, labels, **tensors)
            check(loss, leaf, kd_truth(student, teacher, labels, **options(i)))


def test_normalizers_of_tensors_recompile_nothing(device: str) -> None:
    student, teacher = pair(4, 33, device=device)
    leaf, step = student.requires_grad_(), graph(kd_loss)
    for n in range(3, 6):
        with torch.compiler.set_stance("default" if n == 3 else "fail_on_recompile"):
            loss = step(leaf, teacher, kd_normalizer=torch.tensor(n, device=device))
            check(loss, leaf, kd_truth(student, teacher, kd_normalizer=n))


def test_a_schedule_of_numbers_stays_one_graph(device: str) -> None:
    """Numbers are guarded: they may recompile, and the second time as symbols, but never break the graph."""
    student, teacher = pair(4, 33, device=device)
    leaf, step = student.requires_grad_(), graph(kd_loss)
    for temperature in (1.0, 2.5, 3.75):
        options = {"temperature": temperature, "kd_weight": temperature / 4, "kd_normalizer": 3 * temperature}
        check(step(leaf, teacher, **options), leaf, kd_truth(student, teacher, **options))


def test_dynamic_shapes(device: str) -> None:
    step = graph(kd_loss, dynamic=True)
    for n, length in ((3, 5), (4, 7), (2, 9)):
        student, teacher = pair(n, length, 33, device=device)
        labels = targets(n, length, classes=33, device=device)
        leaf = student.requires_grad_()
        with torch.compiler.set_stance("default" if n == 3 else "fail_on_recompile"):
            check(step(leaf, teacher, labels, **OPTIONS), leaf, kd_truth(student, teacher, labels, **OPTIONS))


@pytest.mark.parametrize("columns", [(33, 35), (35, 33), (101, 128)])
def test_dynamic_vocabularies(device: str, columns: tuple[int, int]) -> None:
    student, teacher = pair(5, columns[0], device=device, teacher_columns=columns[1])
    leaf = student.requires_grad_()
    check(graph(kd_loss, dynamic=True)(leaf, teacher), leaf, kd_truth(student, teacher))


def test_double_backward_raises(device: str) -> None:
    student, teacher = pair(4, 33, device=device)
    leaf = student.requires_grad_()
    loss = graph(kd_loss)(leaf, teacher)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)[0].sum().backward()


# -------------------------------------------------- divergences and teachers


@pytest.mark.parametrize(
    "divergence", [JSD(0.3), Jeffreys(), AlphaBeta(), SkewKL(0.2), LogitMSE(), DKD()], ids=describe
)
def test_divergences(device: str, divergence: Divergence) -> None:
    """Parameters, temperature and weight as tensors that change: one graph, no recompilation, the right numbers."""
    student, teacher = pair(4, 33, device=device)
    labels = targets(4, classes=33, device=device)
    leaf, kind = student.requires_grad_(), type(divergence)
    values = {each.name: getattr(divergence, each.name) for each in fields(divergence)}
    numbers = {k: x for k, x in values.items() if not isinstance(x, bool)}
    options, compilations = at(divergence, 2.0), []
    graphs = CompileCounterWithBackend("aot_eager")

    def step(z: Tensor, parameters: dict[str, Tensor], weight: Tensor) -> Tensor:
        return kd_loss(z, teacher, labels, **{**options, "divergence": kind(**parameters), "kd_weight": weight})

    compiled = graph(step, graphs)
    for i in range(3):
        fixed = {k: x / (1 + 0.5 * i) for k, x in numbers.items()}
        tensors = {k: torch.tensor(x, dtype=torch.float64, device=device) for k, x in fixed.items()}
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            loss = compiled(leaf, tensors, torch.tensor(1.0 + i, device=device))
        compilations.append(graphs.frame_count)
        check(
            loss,
            leaf,
            kd_truth(student, teacher, labels, **{**options, "divergence": kind(**fixed)}, kd_weight=1.0 + i),
        )
    assert compilations == compilations[:1] * 3


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", [*TAILS, "samples"])
def test_listed_teachers(device: str, tail: str, divergence: str) -> None:
    if tail == "samples" and divergence == "reverse_kl":
        return
    student, logits = pair(3, 4, 33, device=device)
    labels = targets(3, 4, classes=33, device=device)
    teacher = samples(logits, 6) if tail == "samples" else top_k(logits, 6, tail, 2.0, padding=1)
    leaf, options = student.requires_grad_(), {**OPTIONS, "divergence": divergence}
    check(graph(kd_loss)(leaf, teacher, labels, **options), leaf, kd_truth(student, teacher, labels, **options))
