"""torch.compile(fullgraph=True) and torch.library.opcheck: one graph, the same numbers, no recompilation by a
schedule.
"""

from __future__ import annotations

from typing import Any

import gumbel_cases
import pytest
import torch
from compiled import fresh_compiler, graph  # noqa: F401
from families import at, families, samples, top_k
from operators import Inputs, forward, options_tensor
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from truth import Truth, assert_gradient, assert_value, hidden_truth, kd_truth, pair, targets

from fusedkd import TeacherLogits, hidden_loss, kd_loss
from fusedkd.backends import defined
from fusedkd.backends.call import pack
from fusedkd.backends.layout import KernelId, TopkKernelId
from fusedkd.backends.schema import SCHEMAS
from fusedkd.divergences import Divergence
from fusedkd.nn import DistilBertLoss
from fusedkd.teachers import TAILS

OPTIONS = {"temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.7}


def check(loss: Tensor, leaf: Tensor, truth: Truth) -> None:
    assert_value(loss, truth.loss)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert_gradient(gradient, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
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


@families
def test_divergences(device: str, divergence: Divergence) -> None:
    """Parameters, temperature and weight as tensors that change: one graph, no recompilation, the right numbers."""
    student, teacher = pair(4, 33, device=device)
    labels = targets(4, classes=33, device=device)
    leaf, kind = student.requires_grad_(), type(divergence)
    numbers = {k: x for k, x in vars(divergence).items() if not isinstance(x, bool)}
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


# -------------------------------------------------- operators


class Own(Divergence):
    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1)


OWN = Own()
"""Has no kernel."""


def operator_arguments(device: str) -> dict[str, list[dict[str, Any]]]:
    """Arguments for every operator, dense and strided, with and without what is optional."""
    ops = torch.ops.fusedkd
    cases: dict[str, list[dict[str, Any]]] = {name: [] for name in SCHEMAS}
    for dtype, strided, some, form in (
        (torch.float32, False, True, KernelId.FORWARD_KL),
        (torch.bfloat16, True, True, KernelId.DKD),
        (torch.float16, True, False, KernelId.MIXTURE),
    ):
        student, teacher = (x[:, :-1] if strided else x for x in pair(2, 4, 19, dtype=dtype, device=device))
        n = student.shape[0] * student.shape[1]
        labels = targets(n, classes=19, device=device) if some else None
        mask = torch.arange(n, device=device) % 3 if form == KernelId.FORWARD_KL else None
        options = options_tensor(
            (0.5, 0.5, 0.5, 0.0),
            temperature=2.0,
            teacher_temperature=1.5,
            kd_scale=4.0,
            kd_weight=0.5,
            ce_weight=0.7 if some else 0.0,
            label_smoothing=0.1,
            softcap=8.0,
            scale=0.5,
            teacher_scale=1.0,
        ).to(student.device)
        normalizers, upstream = pack([n, n], student.device), torch.full((), 0.3, device=device)
        listed = top_k(teacher, 4, "renormalize", 1.5, padding=1)
        ids = listed.ids.view(n, 4)
        shared = {"labels": labels, "ignore_index": -100}
        for known, columns in ((teacher, None), (listed.logprobs, ids)):
            given = {**shared, "teacher": known, "ids": columns, "kd_mask": mask, "normalizers": None, "kd": True}
            cases["kd_row_weights"].append(given)
            weights, _ = ops.kd_row_weights(**given)
            inputs = {
                **shared,
                "student": student,
                "teacher": known,
                "ids": columns,
                "row_weights": weights,
                "options": options,
                "normalizers": normalizers,
                "kernel_id": form if columns is None else TopkKernelId.BUCKET,
                "transform": some,
                "ce": some,
            }
            rows, stats, gradient = forward(inputs)
            add_calls(cases, "kd", inputs, stats, gradient, upstream, n)
            whole = {name: value for name, value in inputs.items() if name != "row_weights"} | given
            whole |= {"needs_labels": form == KernelId.DKD, "gradient": torch.full_like(gradient, torch.nan)}
            per_row = {"terms": torch.full((2, n), torch.nan, device=device), "per_row": True}
            counted = {"terms": None, "per_row": False}
            cases["kd_loss"].extend({**whole, **x, "checked": some} for x in (per_row, counted))
            if columns is None:
                own = {**inputs, "kernel_id": defined.number(OWN)}
                add_calls(cases, "defined", own, stats, gradient, upstream, n)
                cases["defined_loss"].append({**whole, **counted, "kernel_id": defined.number(OWN), "checked": some})
        unread = {"teacher": teacher, "ids": None, "kd_mask": mask, "normalizers": normalizers, "kd": False}
        cases["kd_row_weights"].append({**shared, **unread})
        terms = {"row_losses": rows, "options": options, "normalizers": normalizers}
        cases["kd_terms"].extend({**terms, **x} for x in (per_row, counted))

        hidden, heads = torch.randn(n, 5, device=device).to(dtype), torch.randn(2, 19, 5, device=device).to(dtype)
        linear = {
            **shared,
            "hidden": hidden,
            "weight": heads[0],
            "bias": heads[0, :, 0],
            "teachers": [hidden[None], listed.logprobs.reshape(1, n, 4)],
            "heads": [heads[1], None],
            "biases": [None, None],
            "ids": [None, ids],
            "row_weights": [weights] * 2,
            "options": [options] * 2,
            "normalizers": [normalizers] * 2,
            "kernel_ids": [form, TopkKernelId.BUCKET],
            "transform": some,
            "ce": some,
            "tile": 3,
            "tile_dtype": torch.float32,
            "dtype": dtype,
            "max_rows": None,
        }
        slopes = [torch.ones((), dtype=torch.float64, device=device)] * 2
        cases["linear_unit"].append(
            {name: linear[name] for name in ("row_weights", "options", "normalizers")} | {"slopes": slopes}
        )
        for u, wanted in ((None, [some, True, False]), (torch.rand(n, device=device), [True] * 3), (None, [False] * 3)):
            cases["linear_kd"].append({**linear, "slopes": slopes, "upstream": u, "wanted": wanted})

        sides = {"student": student, "teacher": list(teacher.split(9, -1)), "distance": int(some), "normalize": 2}
        inputs = {**sides, "weights": weights if some else None, "normalizer": normalizers[0].clone()}
        _, stats, gradient = forward(inputs)
        add_calls(cases, "hidden", inputs, stats, gradient, upstream, n)
        whole = {**sides, "mask": mask, "normalizers": normalizers}
        to = torch.full_like(gradient, torch.nan)
        cases["hidden_loss"].extend({**whole, "gradient": g, "per_row": x} for g, x in ((to, False), (None, True)))

        several = {"student": [student, student * 2], "teacher": [teacher, teacher * 2, teacher / 2]}
        several |= {"weights": weights if some else None, "normalizer": normalizers[0].clone()}
        table = torch.rand(2, 3, dtype=torch.float64, device=device)
        cases["layer_distances"].append(several)
        cases["layer_distances_backward"].append({**several, "upstream": table})
        to, of_teacher = (torch.full((m, *student.shape), torch.nan).to(student) for m in (2, 3))
        for u, own, others in ((None, to, None), (upstream, to, of_teacher), (rows[0], None, of_teacher)):
            outputs = {"gradient": own, "teacher_gradient": others, "skip_if_one": u is upstream}
            cases["layer_attention"].append({**several, "buckets": table, "upstream": u, **outputs})
    return cases | gumbel_cases.operator_arguments(device)


def add_calls(
    cases: dict[str, list[dict[str, Any]]],
    name: str,
    inputs: Inputs,
    stats: Tensor,
    gradient: Tensor,
    upstream: Tensor,
    rows: int,
) -> None:
    """Forward with and without a gradient; backward of one number or of every row, and as a rescaling."""
    empty = torch.full_like(gradient, torch.nan)
    cases[f"{name}_forward"].extend({**inputs, "gradient": g} for g in (empty, None))
    per_row = torch.rand(rows, device=upstream.device)
    for up, to, skip in ((upstream, empty, False), (per_row, empty, False), (upstream, gradient, True)):
        call = {**inputs, "upstream": up, "stats": stats, "gradient": to, "skip_if_one": skip}
        cases[f"{name}_backward"].append(call)


OF_THEIR_OWN = {"linear_hidden", "attention"}
"""Checked with the arguments that their losses give them: test_projection_compile.py, test_attention_rules.py."""


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name not in OF_THEIR_OWN])
def test_opcheck(device: str, name: str) -> None:
    found = operator_arguments(device)[name]
    assert found
    for arguments in found:
        torch.library.opcheck(getattr(torch.ops.fusedkd, name).default, (), arguments)
