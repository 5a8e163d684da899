"""cosine_hidden_loss on a GPU against torch.nn.functional.cosine_embedding_loss in float64 on the selected rows.

tests/test_cuda_on_host.py runs the same kernels on the CPU; what only a GPU shows is here: the real loads and barriers,
streams, graphs, autograd.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fusedkd
from fusedkd.backends import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# One element; odd (re-read); DistilBERT and BERT; usual models; the widest that are used.
SIZES = [1, 7, 127, 768, 1024, 4096, 5120, 8192, 12288]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def hidden_states(*shape: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(shape[-1])
    y = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)
    x = 3 * y + torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)
    return x.to(dtype), y.to(teacher_dtype or dtype)


def truth(x: Tensor, y: Tensor, mask: Tensor | None = None, divisor: float | None = None) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in float64 over the rows that the mask selects; the mean unless a divisor is given."""
    rows = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask != 0
    student = x.detach().double().requires_grad_()
    target = torch.ones(int(rows.sum()), device=x.device, dtype=torch.float64)
    loss = torch.nn.functional.cosine_embedding_loss(student[rows], y.double()[rows], target, reduction="sum")
    loss = loss / (divisor or len(target))
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def check(loss: Tensor, gradient: Tensor, x: Tensor, expected: tuple[Tensor, Tensor], scale: float = 1.0) -> None:
    """Value: 1e-5 relative. Gradient: relative L2 error at most 1.25 × rounding + 1e-6 of the terms subtracted."""
    value, exact = expected[0], expected[1] * scale
    precise = x.dtype == torch.float64
    assert loss.dtype == (torch.float64 if precise else torch.float32)
    torch.testing.assert_close(loss.detach().double(), value, rtol=1e-12 if precise else 1e-5, atol=1e-13)
    if x.shape[-1] == 1:
        return  # no direction to turn to: the distance is 0 or 2, the gradient 0 but for ε
    assert gradient.dtype == x.dtype
    assert exact.norm() > 0
    rounding = (exact.to(x.dtype).double() - exact).norm()
    row_scale = exact.flatten(0, -2).norm(dim=-1).max()
    terms = (
        20 * row_scale * exact.flatten(0, -2).shape[0] ** 0.5
    )  # x = 3y + noise: the terms are < 10 times their difference
    assert (gradient.double() - exact).norm() <= 1.25 * rounding + (1e-14 if precise else 1e-6) * terms


@pytest.mark.parametrize("h", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(h, dtype):
    x, y = hidden_states(3, 41, h, dtype=dtype)
    x.requires_grad_()
    loss = fusedkd.cosine_hidden_loss(x, y)
    (gradient,) = torch.autograd.grad(loss, x)
    check(loss, gradient, x, truth(x, y))


@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_pairs_of_dtypes(student, teacher):
    x, y = hidden_states(5, 9, 1096, dtype=student, teacher_dtype=teacher)
    if teacher == torch.float64 and student != torch.float64:
        y = y.float().double()  # the teacher is read in the accumulation type
    x.requires_grad_()
    loss = fusedkd.cosine_hidden_loss(x, y)
    (gradient,) = torch.autograd.grad(loss, x)
    check(loss, gradient, x, truth(x, y))


@pytest.mark.parametrize("h", [767, 768, 4096])
@pytest.mark.parametrize("where", ["shifted rows", "odd start", "odd stride"])
def test_views(h, where):
    base = hidden_states(4, 17, h + 1, dtype=torch.bfloat16)
    cut = {
        "shifted rows": lambda t: t[:, :-1, :h],
        "odd start": lambda t: t.flatten()[1 : 1 + 68 * h].view(4, 17, h),
        "odd stride": lambda t: t[:, :, 1:],
    }[where]
    x, y = base[0].requires_grad_(), base[1]
    loss = fusedkd.cosine_hidden_loss(cut(x), cut(y))
    loss.backward()
    expected = truth(cut(x.detach()), cut(y))
    check(loss, cut(x.grad), cut(x.detach()), expected)
    assert x.grad.count_nonzero() <= cut(x.grad).numel()


@pytest.mark.parametrize("h", [127, 768, 4096])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_mask(h, kind):
    x, y = hidden_states(4, 33, h, dtype=torch.bfloat16)
    mask = (torch.arange(132, device="cuda").view(4, 33) % 3 != 1).to(kind)
    x[mask == 0], y[mask == 0] = torch.nan, torch.inf  # not read
    x.requires_grad_()
    loss = fusedkd.cosine_hidden_loss(x, y, mask)
    loss.backward()
    clean_x, clean_y = x.detach().nan_to_num(1.0), y.nan_to_num(1.0, 1.0)
    check(loss, x.grad, clean_x, truth(clean_x, clean_y, mask))
    assert (x.grad[mask == 0] == 0).all()


def test_no_row_selected():
    x, y = hidden_states(2, 5, 768, dtype=torch.float32)
    x.requires_grad_()
    loss = fusedkd.cosine_hidden_loss(x, y, torch.zeros(2, 5, device="cuda"))
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_upstream_and_repeated_backward(dtype):
    x, y = hidden_states(3, 41, 1024, dtype=dtype)
    x.requires_grad_()
    loss = fusedkd.cosine_hidden_loss(x, y, normalizer=50.0)
    expected = truth(x, y, divisor=50.0)
    for scale in (-3.0, 1.0, 0.3):  # each from the same graph: the first overwrote what the forward call left
        (gradient,) = torch.autograd.grad(loss * scale, x, retain_graph=True)
        check(loss, gradient, x, expected, scale)


def test_per_row():
    x, y = hidden_states(3, 41, 768, dtype=torch.float32)
    x.requires_grad_()
    rows = fusedkd.cosine_hidden_loss(x, y, reduction="none")
    weights = torch.rand(3, 41, device="cuda")
    (gradient,) = torch.autograd.grad((rows * weights).sum(), x)
    student = x.detach().double().requires_grad_()
    target = torch.ones(123, device="cuda", dtype=torch.float64)
    exact = torch.nn.functional.cosine_embedding_loss(
        student.flatten(0, 1), y.double().flatten(0, 1), target, reduction="none"
    )
    torch.testing.assert_close(rows.detach().double(), exact.view(3, 41), rtol=1e-5, atol=0)
    (expected,) = torch.autograd.grad((exact.view(3, 41) * weights.double()).sum(), student)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_in_a_graph():
    """Captured once and replayed on other data: no synchronisation, no allocation that outlives the capture."""
    x, y = hidden_states(4, 33, 768, dtype=torch.bfloat16)
    mask = torch.ones(4, 33, device="cuda", dtype=torch.bool)
    x.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = fusedkd.cosine_hidden_loss(x, y, mask)
        return loss, torch.autograd.grad(loss, x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    with torch.no_grad():
        x.copy_(x.flip(0) + 1)
        mask[2] = False
    graph.replay()
    check(loss, gradient, x, truth(x, y, mask))


def test_deterministic_and_served_by_cuda():
    assert dispatch.serving["cosine_forward", "CUDA"][0] == "CUDA C++", dispatch.serving["cosine_forward", "CUDA"]
    x, y = hidden_states(64, 64, 4096, dtype=torch.bfloat16)
    x.requires_grad_()
    first, second = (torch.autograd.grad(fusedkd.cosine_hidden_loss(x, y), x)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_many_rows():
    """More rows than a grid has in y or z, and offsets past 2³¹ elements."""
    x = torch.randn(280_000, 8192, dtype=torch.bfloat16, device="cuda")
    y = x.clone()
    y[-1] = hidden_states(1, 8192, dtype=torch.bfloat16)[1]
    x.requires_grad_()
    loss = fusedkd.cosine_hidden_loss(x, y, reduction="sum")
    loss.backward()
    check(loss, x.grad[-1:], x[-1:], truth(x[-1:], y[-1:]))
    assert x.grad[:-1].abs().max() < 1e-6 * x.grad[-1].abs().max()
