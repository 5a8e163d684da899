"""csrc/cuda/kd_cluster.cu on a Hopper GPU. tests/test_kd_cluster_on_host.py runs the same kernels on the CPU; what only
a GPU shows is here: the real copies, barriers and clusters, their launch, today's vocabularies, streams and graphs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cluster_cases
import pytest
import torch
from cluster_cases import Case
from families import describe, divergences
from graphs import capture
from torch import Tensor
from truth import check_kd, pair, targets

from fusedkd import DKD, JSD, kd_loss
from fusedkd.backends.triton import choice


def hopper() -> bool:
    return torch.cuda.is_available() and choice.describe(torch.device("cuda", 0)).cluster


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper(), reason="needs a Hopper GPU and fusedkd._C_cuda")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=describe)
# Clusters of 1, 2, 4, 8 and 16 blocks; odd, padded, and the most that 16 bits and float32 are promised
VOCABULARIES = [8200, 30522, 50257, 65536, 119547, 128256, 151936, 160000, 262144]


def case(*arguments: Any, **options: Any) -> Case:
    return cluster_cases.case(torch.ops.fusedkd.kd_cluster, "cuda", *arguments, **options)


@DTYPES
@pytest.mark.parametrize("v", VOCABULARIES)
def test_vocabularies_of_today(v, dtype):
    case(v, dtype, v - 5, label_smoothing=0.1, temperature=2.0).check()
    case(v, dtype, v, JSD(0.3), masked=0.1).check()


@divergences
def test_every_divergence(divergence):
    case(50257, torch.bfloat16, 50250, divergence, temperature=2.0).check()
    case(20001, torch.float32, None, divergence, temperature=3.0, masked=0.1, ce=False).check()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
@pytest.mark.parametrize("kl", [1.0, 1e-3, 1e-6])
def test_near_and_far(divergence, kl):
    case(30522, divergence=divergence, kl=kl).check()
    case(30522, divergence=divergence, kl=kl, offset=1000, temperature=2.0).check()


@DTYPES
@pytest.mark.parametrize("starts", [(0, 0, 0), (1, 1, 1), (3, 0, 0), (0, 5, 0), (0, 0, 7), (1, 6, 3)], ids=str)
@pytest.mark.parametrize("v", [3, 17, 1003, 50257])
def test_rows_start_anywhere(dtype, starts, v):
    z, y, g = starts
    case(v, dtype, v - 1, student={"offset": z, "gap": 5}, teacher={"offset": y}).check(g, vacuous=True)


@DTYPES
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_sure_rows(divergence, dtype, temperature):
    case(50257, dtype, divergence=divergence, temperature=temperature).check_sure_rows()


@DTYPES
def test_soft_cap_and_scale(dtype):
    case(50257, dtype, 50250, logit_softcap=8.0, logit_scale=1.3, masked=0.1).check()


@pytest.mark.parametrize("divergence", ["forward_kl", JSD(0.5), DKD()], ids=describe)
@pytest.mark.parametrize("rows", [1, 64, 4099])
def test_chosen_for_large_vocabularies(divergence, rows):
    """From kd_loss down; the same bits each time."""
    student, teacher = pair(rows, 32000, dtype=torch.bfloat16, device="cuda")
    labels = targets(rows, classes=32000, device="cuda", ignored=None)
    options = {"divergence": divergence, "kd_weight": 0.5, "ce_weight": 0.5}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        kd_loss(student, teacher, labels, **options)
        torch.cuda.synchronize()
    assert any("kd_cluster_kernel" in event.key for event in profile.key_averages())
    if rows < 100:
        check_kd(student, teacher, labels, upstream=0.3, **options)
    student.requires_grad_()
    first, second = (torch.autograd.grad(kd_loss(student, teacher, labels, **options), student)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_masked_rows_are_not_read():
    c = case(50257, torch.bfloat16)
    rows, _, gradient = c.forward()
    assert rows.isfinite().all()
    assert not gradient[1, 2].any()


def test_in_a_graph():
    """Captured once and replayed on other data: no synchronisation, and nothing that a capture forbids."""
    student, teacher = pair(2, 64, 50257, dtype=torch.bfloat16, device="cuda")
    labels = targets(2, 64, classes=50257, device="cuda")
    student.requires_grad_()

    def step():
        loss = kd_loss(student, teacher, labels, temperature=2.0, kd_weight=0.5, ce_weight=0.5)
        return loss, torch.autograd.grad(loss, student)[0]

    graph, (loss, gradient) = capture(step)
    with torch.no_grad():
        student.copy_(student.flip(0) + 1)
        labels[0, :5] = -100
    graph.replay()
    replayed = loss.clone(), gradient.clone()
    for got, expected in zip(replayed, step(), strict=True):
        assert torch.equal(got, expected)


def test_two_threads_of_the_host():
    """Short rows and long ones, launched at once: what one needs of a kernel's shared memory is not taken from the
    other.
    """

    def step(columns: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            student, teacher = pair(8, columns, dtype=torch.bfloat16, device="cuda")
            student.requires_grad_()
            return [torch.autograd.grad(kd_loss(student, teacher), student)[0] for _ in range(100)]

    with ThreadPoolExecutor(2) as threads:
        for gradients in threads.map(step, (8200, 262144)):
            assert gradients[0].any()
            assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    torch.cuda.synchronize()


def test_offsets_past_2_31_elements():
    student, teacher = (torch.zeros(17000, 131072, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    student[-1], teacher[-1] = pair(131072, dtype=torch.bfloat16, device="cuda")
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, reduction="sum"), student)
    last = student[-1:].detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(kd_loss(last, teacher[-1:], reduction="sum"), last)
    torch.testing.assert_close(gradient[-1:], expected, rtol=1e-2, atol=1e-9)
    assert gradient[-1].any()
    assert not gradient[:-1].any()
