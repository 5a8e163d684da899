"""linear_kd_loss under torch.compile, torch.library.opcheck, autocast, inference mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import fresh_compiler, graph  # noqa: F401
from families import describe, top_k
from linear_cases import Problem, assert_gradients, linear_truth, logits_of, problem, small_tiles, tile_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from truth import assert_value, operator_calls

from fusedkd import JSD, TeacherHead, linear_kd_loss

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7, "temperature": 2.0}
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def check(p: Problem, function: Any, upstream: Any = 1.0, **options: Any) -> None:
    """A function of the tensors of `p` by the rule."""
    truth, leaves = linear_truth(p, upstream=upstream, **options), p.leaves()
    loss = function(leaves.hidden, leaves.weight, leaves.bias, **options)
    assert_value(loss, truth.loss)
    assert_gradients(leaves.gradients(loss, upstream), p, truth)


# -------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [(torch.float64, "mean"), (torch.float32, "sum"), (torch.bfloat16, "none")],
    ids=describe,
)
def test_one_graph(device: str, dtype: torch.dtype, reduction: str) -> None:
    p = problem(3, 5, dtype=dtype, device=device)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return linear_kd_loss(hidden, weight, p.teacher, p.labels, student_bias=bias, **options)

    check(p, graph(step), reduction=reduction, **BOTH)


def test_one_graph_of_every_option(device: str) -> None:
    p = problem(3, 5, columns=(101, 96), device=device)
    options = {
        **BOTH,
        "teacher_temperature": 1.5,
        "scale_by_t2": False,
        "divergence": JSD(0.3),
        "label_smoothing": 0.1,
        "kd_mask": torch.arange(15, device=device).view(3, 5) % 4,
        "kd_normalizer": 11,
        "ce_normalizer": torch.tensor(3, device=device),
        "logit_softcap": 9.0,
        "logit_scale": 0.5,
        "max_tile_bytes": tile_bytes(1100, 101, 101, 96, 101),
        "teacher_weights": [0.3, 0.7],
    }
    head = p.teacher
    other = problem(3, 5, device=device, seed=4).teacher
    p = p._replace(teacher=[TeacherHead(head.hidden, head.weight, head.bias, softcap=8.0), other])

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return linear_kd_loss(hidden, weight, p.teacher, p.labels, student_bias=bias, **options)

    check(p, graph(step), **options)


def test_one_graph_of_a_listed_teacher(device: str) -> None:
    p = problem(3, 5, device=device)
    p = p._replace(teacher=top_k(logits_of(p), 6, "bucket", 2.0, padding=1))

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return linear_kd_loss(hidden, weight, p.teacher, p.labels, student_bias=bias, **options)

    check(p, graph(step), upstream=3.0, **BOTH)


def test_inductor(device: str) -> None:
    """A layer before the loss, all but the last token, terms, and a scaled total, in one graph."""
    p = problem(2, 6, device=device)
    layer = torch.randn(24, 24, generator=torch.Generator().manual_seed(3)).to(device) / 5

    def step(layer: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(p.hidden @ layer)[:, :-1]
        head = TeacherHead(p.teacher.hidden[:, :-1], p.teacher.weight, p.teacher.bias)
        loss, terms = linear_kd_loss(
            hidden, weight, head, p.labels[:, 1:], student_bias=bias, return_terms=True, **BOTH
        )
        return 3 * loss, terms.kd

    results = []
    for function in (step, graph(step, "inductor")):
        leaves = [x.clone().requires_grad_() for x in (layer, p.weight, p.bias)]
        loss, kd = function(*leaves)
        results.append((loss, kd, *torch.autograd.grad(loss, leaves)))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
        assert eager.norm() > 0.1
    assert not results[1][1].requires_grad


def test_forward_alone(device: str) -> None:
    p = problem(3, 5, device=device)
    with torch.no_grad():
        loss = graph(p.leaves().loss)(**BOTH)
    assert_value(loss, linear_truth(p, **BOTH).loss)


def test_fake_tensors(device: str) -> None:
    """Memory estimators call with them: shapes and types, no products."""
    p = problem(3, 5, dtype=torch.bfloat16, device=device)
    with FakeTensorMode() as mode:
        hidden, weight = (mode.from_tensor(x).requires_grad_() for x in (p.hidden, p.weight))
        head = TeacherHead(mode.from_tensor(p.teacher.hidden), mode.from_tensor(p.teacher.weight))
        loss = linear_kd_loss(hidden, weight, head)
        loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    for x in (hidden, weight):
        assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)


def test_a_schedule_of_tensors_recompiles_nothing(device: str) -> None:
    p = problem(3, 5, device=device)

    @graph
    def step(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return linear_kd_loss(hidden, weight, p.teacher, p.labels, student_bias=bias, **options)

    for i in range(3):
        numbers = {"temperature": 1.0 + i, "kd_weight": 0.5 / (i + 1), "ce_weight": 0.1 * i}
        tensors = {name: torch.tensor(x, dtype=torch.float64, device=device) for name, x in numbers.items()}
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            leaves = p.leaves()
            loss = step(leaves.hidden, leaves.weight, leaves.bias, **tensors)
            gradients = leaves.gradients(loss)
        truth = linear_truth(p, **numbers)
        assert_value(loss, truth.loss)
        assert_gradients(gradients, p, truth)


def test_other_numbers_of_rows(device: str) -> None:
    """One graph for all of them."""

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return linear_kd_loss(hidden, weight, teacher, labels, student_bias=bias, **options)

    compiled = graph(step, dynamic=True)
    for n in (5, 9, 30):
        p = problem(n, device=device)
        p = p._replace(teacher=logits_of(p))
        with torch.compiler.set_stance("default" if n == 5 else "fail_on_recompile"):
            check(p, lambda x, w, b, p=p, **options: compiled(x, w, b, p.teacher, p.labels, **options), **BOTH)


# -------------------------------------------------- operators


def operator_arguments(device: str) -> dict[str, list[tuple[Any, ...]]]:
    """What losses with and without each optional argument call the operators with."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    cases = [
        (problem(3, 5, device=device), {}),
        (problem(3, 5, dtype=torch.bfloat16, device=device, bias=False), {"reduction": "none"}),
        (problem(7, dtype=torch.float16, device=device, labels=False), {"ce_weight": 0.0, "reduction": "sum"}),
    ]
    p = problem(7, device=device)
    several = [p.teacher, logits_of(p), top_k(logits_of(p), 4, "renormalize", 1.5, padding=1)]
    cases.append((p._replace(teacher=several), {"max_tile_bytes": tile_bytes(3, 101, 101, 101)}))
    for case, options in cases:
        for frozen in ((), ("hidden",)):
            leaves = case.leaves(*frozen)
            with small_tiles(), operator_calls() as calls:
                leaves.loss(**{**BOTH, **options}).sum().backward()
            with small_tiles(), operator_calls() as more, torch.no_grad():
                leaves.loss(**{**BOTH, **options})
            for name, arguments in calls + more:
                found.setdefault(name, []).append(tree_map_only(Tensor, Tensor.detach, arguments))
    return found


def test_opcheck(device: str) -> None:
    found = operator_arguments(device)
    assert found["linear_kd"]
    for arguments in found["linear_kd"]:
        with small_tiles():
            torch.library.opcheck(torch.ops.fusedkd.linear_kd.default, (), arguments)


# -------------------------------------------------- autocast, inference mode


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=describe)
@REDUCTIONS
def test_autocast(device: str, hidden_dtype: torch.dtype, reduction: str) -> None:
    """Operands in bfloat16, whatever they come as, the teacher's too; the loss float32; each gradient in the dtype of
    its input.
    """
    p, options = problem(3, 5, device=device), {"reduction": reduction, **BOTH}
    cast = p._replace(
        hidden=p.hidden.bfloat16(),
        weight=p.weight.bfloat16(),
        teacher=TeacherHead(p.teacher.hidden.bfloat16(), p.teacher.weight.bfloat16(), p.teacher.bias),
    )
    truth = linear_truth(cast, **options)
    head = TeacherHead(p.teacher.hidden.to(hidden_dtype), p.teacher.weight, p.teacher.bias)
    p = p._replace(hidden=p.hidden.to(hidden_dtype), teacher=head)
    leaves = p.leaves()
    with torch.autocast(device, torch.bfloat16):
        loss = leaves.loss(**options)
    assert loss.dtype == torch.float32
    assert_value(loss, truth.loss)
    assert_gradients(leaves.gradients(loss), p, truth, dtype=torch.bfloat16)


def test_autocast_of_a_model(device: str) -> None:
    """A layer whose output is bfloat16, a head of float32 parameters: backward outside the region."""
    p = problem(3, 5, device=device)
    layer, leaves = torch.nn.Linear(24, 24).to(device), p.leaves("hidden")
    with torch.autocast(device, torch.bfloat16):
        hidden = layer(leaves.hidden)
        loss = leaves._replace(hidden=hidden).loss(**BOTH)
    assert hidden.dtype == torch.bfloat16
    loss.backward()
    for x in (layer.weight, leaves.weight, leaves.bias):
        assert x.grad.dtype == torch.float32
        assert x.grad.norm() > 0.01


@REDUCTIONS
def test_a_teacher_from_inference_mode(device: str, reduction: str) -> None:
    """Whose tensors autograd refuses to save."""
    p = problem(3, 5, device=device)
    with torch.inference_mode():
        head = TeacherHead(*(x.clone() for x in (p.teacher.hidden, p.teacher.weight, p.teacher.bias)))
        labels, mask = p.labels.clone(), p.labels > 50
    assert head.hidden.is_inference()
    assert mask.is_inference()
    leaves = p.leaves()._replace(teacher=head, labels=labels)
    loss = leaves.loss(kd_mask=mask, reduction=reduction, **BOTH)
    for _ in range(2):
        gradients = leaves.gradients(loss, retain_graph=True)
        assert_gradients(gradients, p, linear_truth(p, kd_mask=p.labels > 50, reduction=reduction, **BOTH))


def test_few_rows_per_tile_are_compiled_without_a_word(device: str) -> None:
    """Dynamo cannot trace the warning that an eager call gives."""
    p = problem(1100, columns=(40, 40), device=device)
    few = {"max_tile_bytes": 2 * 64 * 4 * 100}
    with pytest.warns(UserWarning, match="rows per tile"):
        expected = linear_kd_loss(p.hidden, p.weight, p.teacher, p.labels, **few)
    torch.testing.assert_close(graph(linear_kd_loss)(p.hidden, p.weight, p.teacher, p.labels, **few), expected)
