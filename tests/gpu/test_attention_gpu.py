"""The losses between attention maps by their kernels on a GPU: every type, width and mask by the rule; and where only a
GPU shows it: CUDA graphs, memory, determinism.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import Maps, assert_gradient, attention_truth, check, maps, padding
from families import describe
from graphs import capture
from torch import Tensor
from truth import assert_value

from fusedkd import attention_kl_loss, attention_mse_loss
from fusedkd.backends import attention_loop, dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BOTH = pytest.mark.parametrize("mse", [False, True], ids=["kl", "mse"])


@BOTH
@pytest.mark.parametrize(
    ("dtype", "widths", "kind", "causal"),
    [
        (BF16, (64, 128), "holes", True),
        (F16, (80, 72), "right", False),
        (F32, (24, 64), "empty", True),
        (F32, (16, 16), None, False),
    ],
    ids=describe,
)
def test_kernels(
    dtype: torch.dtype,
    widths: tuple[int, int],
    kind: str | None,
    causal: bool,
    mse: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No test is passed by the loop."""
    assert dispatch.serving["attention_pairs", "CUDA"][0] == "Triton", dispatch.serving["attention_pairs", "CUDA"]
    monkeypatch.delattr(attention_loop, "_groups")
    m = maps(2, 1, 70, widths[0], teacher=(1, widths[1]), dtype=dtype, device="cuda")
    check(m, padding(kind, 2, 70, "cuda"), mse=mse, causal=causal, upstream=3.0)
    check(m, padding(kind, 2, 70, "cuda"), mse=mse, reduction="none", upstream=torch.linspace(-1, 2, 70).cuda())


@pytest.mark.parametrize("kind", [None, "left"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_float16_of_what_the_loop_serves(divergence: str, kind: str | None) -> None:
    """In units that all heads and queries share, of weights that are repeated."""
    m = maps(2, 3, 37, 20, dtype=F16, device="cuda")
    check(m, padding(kind, 2, 37, "cuda"), divergence=divergence, upstream=3.0)


def test_deterministic() -> None:
    q, k, *teacher = maps(1, 2, 130, 64, dtype=BF16, device="cuda")
    leaves = [q.requires_grad_(), k.requires_grad_()]
    for loss in (attention_kl_loss, attention_mse_loss):
        first, second = (torch.autograd.grad(loss(*leaves, *teacher), leaves) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_in_a_cuda_graph() -> None:
    q, k, *teacher = maps(2, 3, 130, 64, dtype=BF16, device="cuda")
    leaves = [q.requires_grad_(), k.requires_grad_()]
    mask = torch.ones(2, 130, device="cuda", dtype=torch.bool)

    def step() -> tuple[Tensor, ...]:
        loss = attention_kl_loss(*leaves, *teacher, mask)
        return loss, *torch.autograd.grad(loss, leaves)

    graph, (loss, *gradients) = capture(step)
    with torch.no_grad():
        q.copy_(q.flip(0) * 0.5)
        mask[1, 100:] = False
    graph.replay()
    m = Maps(q.detach(), k.detach(), *teacher)
    truth = attention_truth(m, mask)
    assert_value(loss, truth.loss)
    for found in zip(gradients, truth.gradients, truth.subtracted, truth.oracle, strict=True):
        assert_gradient(*found)


@BOTH
def test_memory_of_long_sequences(mse: bool) -> None:
    """Gradients in float32 and a few floats for each query: nothing of L × L."""
    q, k, *teacher = (torch.randn(1, 4, 8192, 64, dtype=BF16, device="cuda") for _ in range(4))
    leaves = [q.requires_grad_(), k.requires_grad_()]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (attention_mse_loss if mse else attention_kl_loss)(*leaves, *teacher, causal=True).backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * q.numel()
