"""kd_loss on a GPU: what only a GPU shows. The conformance tests run there as well (``pytest -m gpu tests``); here are
host synchronisation, CUDA graphs, memory, launch sizes, vocabularies of today's models, and labels nobody can check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import capture
from torch import Tensor
from truth import EMULATED, assert_gradient, assert_value, check_kd, kd_truth, noise_for, pair, targets

from fusedkd import TeacherLogits, kd_loss
from fusedkd.backends import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS = {"temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.7}
GIB = 2**30
FEW = (1, 2) if EMULATED else (2, 3)


def batch(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    labels = targets(*shape[:-1], classes=shape[-1], device="cuda", seed=seed + 1)
    return *pair(*shape, dtype=dtype, device="cuda", seed=seed), labels


def test_served_by_triton() -> None:
    assert {dispatch.serving[name, "CUDA"][0] for name in dispatch.KERNEL_OPERATORS["launch"]} == {"Triton"}


@pytest.mark.parametrize("vocabulary", [32000, 119547, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_vocabularies_of_today(vocabulary: int, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(*FEW, vocabulary, dtype=dtype)
    check_kd(student, teacher, labels, **OPTIONS)
    check_kd(student, teacher, labels, upstream=0.37, temperature=3.0, ce_weight=0.7)
    upstream = torch.linspace(-1, 2, labels.numel()).view(FEW)
    check_kd(student, teacher, labels, reduction="none", upstream=upstream, **OPTIONS)


@pytest.mark.parametrize("vocabulary", [128256, 262144])
@pytest.mark.parametrize("kl", [1e-2, 1e-6])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_close_at_large_vocabularies(vocabulary: int, kl: float, offset: float) -> None:
    student, teacher = pair(FEW[1], vocabulary, device="cuda", noise=noise_for(kl), offset=offset)
    check_kd(student, teacher, reduction="none")


def test_padded_vocabularies() -> None:
    """Qwen's two paddings of one vocabulary, either way round."""
    for student_columns, teacher_columns in ((151936, 152064), (152064, 151936)):
        student, teacher = pair(
            4, student_columns, dtype=torch.bfloat16, device="cuda", teacher_columns=teacher_columns
        )
        labels = targets(4, classes=student_columns, device="cuda")
        labels[0] = student_columns - 1
        check_kd(student, teacher, labels, **OPTIONS)


@pytest.mark.parametrize("rows", [1, 3] if EMULATED else [1, 3, 131, 133, 4099])
@pytest.mark.parametrize("vocabulary", [2, 1000, 8191, 8193])
def test_row_counts(rows: int, vocabulary: int) -> None:
    """Fewer rows than SMs, one more than that, many."""
    check_kd(*batch(rows, vocabulary, dtype=torch.float32), **OPTIONS)


def test_offsets_past_two_to_the_31() -> None:
    rows, vocabulary = 2**31 // 131072 + 8, 131072
    if torch.cuda.get_device_properties(0).total_memory < 24 * GIB:
        pytest.skip("needs 18 GiB of GPU memory")
    student = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros_like(student)
    student[-4:], teacher[-4:] = pair(4, vocabulary, dtype=torch.bfloat16, device="cuda")
    truth = kd_truth(student[-4:], teacher[-4:], reduction="sum", temperature=2.0)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, reduction="sum", temperature=2.0)
    assert_value(loss, truth.loss)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert_gradient(gradient[-4:], truth)
    assert gradient[:-4].abs().amax() <= 1e-9


# -------------------------------------------------- what a step of training may cost

STEPS: dict[str, Callable[..., Tensor]] = {
    "mean": lambda z, v, y: kd_loss(z, v, y, **OPTIONS),
    "scaled": lambda z, v, y: 0.25 * kd_loss(z, v, y, **OPTIONS),
    "sum": lambda z, v, y: kd_loss(z, v, y, reduction="sum", **OPTIONS),
    "none": lambda z, v, y: (kd_loss(z, v, y, reduction="none", **OPTIONS) * torch.arange(12, device=z.device)).sum(),
    "mask": lambda z, v, y: kd_loss(z, v, y, kd_mask=y % 3, **OPTIONS),
    "float mask": lambda z, v, y: kd_loss(z, v, kd_mask=(y % 3).float()),
    "normalisers": lambda z, v, y: kd_loss(z, v, y, kd_normalizer=(y > 9).sum(), ce_normalizer=17, **OPTIONS),
    "tensor options": lambda z, v, y: kd_loss(z, v, y, temperature=z.new_full((), 2), ce_weight=z.new_full((), 0.5)),
    "soft-cap": lambda z, v, y: kd_loss(z, TeacherLogits(v, softcap=9.0), y, logit_softcap=8.0, **OPTIONS),
    "smoothing": lambda z, v, y: kd_loss(z, v, y, label_smoothing=0.1, **OPTIONS),
    "inplace": lambda z, v, y: kd_loss(z * 1, v, y, inplace=True, **OPTIONS),
    "inplace, scaled": lambda z, v, y: 0.25 * kd_loss(z * 1, v, y, inplace=True, **OPTIONS),
    "teachers": lambda z, v, y: kd_loss(z, [v, v.flip(0)], y, **OPTIONS),
    "terms": lambda z, v, y: kd_loss(z, v, y, return_terms=True, **OPTIONS)[0],
}
steps = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


@steps
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_host_synchronisation(step: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """After a first call, which compiles kernels and copies the options, nothing waits for the device."""
    student, teacher, labels = batch(12, 1000, dtype=dtype)
    leaf = student.requires_grad_()
    (expected,) = torch.autograd.grad(step(leaf, teacher, labels), leaf)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (actual,) = torch.autograd.grad(step(leaf, teacher, labels), leaf)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual, expected)
    assert actual.any()


@steps
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_graph(step: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Captured once, replayed on other numbers and labels: the bits an eager call gives."""
    student, teacher, labels = batch(12, 1000, dtype=dtype)
    leaf = student.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = step(leaf, teacher, labels)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    before = run()
    graph, captured = capture(run)
    for new, old in zip(batch(12, 1000, dtype=dtype, seed=7), (student, teacher, labels), strict=True):
        old.data.copy_(new)
    for _ in range(2):
        graph.replay()
    expected = run()
    torch.cuda.synchronize()
    for actual, eager, stale in zip(captured, expected, before, strict=True):
        assert torch.equal(actual, eager)
        assert not torch.equal(actual, stale)


@steps
def test_compiled_into_cuda_graphs(step: Callable[..., Tensor]) -> None:
    """By torch.compile, which warms up on a stream and in a pool of its own."""
    student, teacher, labels = batch(12, 1000, dtype=torch.bfloat16)
    compiled = torch.compile(step, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        leaf = student.detach().requires_grad_()
        (found,) = torch.autograd.grad(compiled(leaf, teacher, labels), leaf)
        (expected,) = torch.autograd.grad(step(leaf, teacher, labels), leaf)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [2, 5] if EMULATED else [3, 600])
def test_deterministic(rows: int) -> None:
    student, teacher, labels = batch(rows, 50257)
    leaf = student.requires_grad_()
    runs = []
    for _ in range(4):
        loss = kd_loss(leaf, teacher, labels, **OPTIONS)
        runs.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for loss, gradient in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert torch.equal(gradient, runs[0][1])


@pytest.mark.parametrize(("inplace", "gradients"), [(False, 1), (True, 0)])
def test_memory(inplace: bool, gradients: int) -> None:
    """One gradient in the logits' dtype, or none with `inplace`; everything else is a few numbers per row."""
    student, teacher, labels = batch(1024, 50257)
    logits = student.requires_grad_() + 0  # whose backward hands its gradient through
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = kd_loss(logits, teacher, labels, inplace=inplace, **OPTIONS)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= gradients * logits.nbytes + 2**20
    assert gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_label_out_of_range(reduction: str, dtype: torch.dtype) -> None:
    """The row is NaN, its gradient 0; its neighbours do not notice."""
    student, teacher, labels = batch(6, 300, dtype=dtype)
    labels[:] = torch.tensor([5, 300, -1, 2**40, 7, -100], device="cuda")
    bad = [False, True, True, True, False, False]
    leaf = student.requires_grad_()
    options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "reduction": reduction}
    loss = kd_loss(leaf, teacher, labels, **options)
    assert loss.isnan().tolist() == (bad if reduction == "none" else True)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.any(-1).tolist() == [True, False, False, False, True, False]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one() -> None:
    student, teacher, labels = (x.to("cuda:1") for x in batch(12, 1000))
    assert torch.cuda.current_device() == 0
    check_kd(student, teacher, labels, **OPTIONS)
    check_kd(student, teacher, labels, reduction="none", **OPTIONS)
