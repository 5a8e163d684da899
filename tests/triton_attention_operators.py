"""The Triton kernels of attention maps by the test rule, on lengths that are no multiple of a tile. Not collected by
itself: `test_triton.py` runs it under the interpreter, with FUSEDKD_BACKEND=triton.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_cases  # noqa: F401  the interpreter, mended
from attention_cases import attention_truth, check, maps, padding
from families import describe
from torch import Tensor
from truth import between_nans

from fusedkd import attention_kl_loss, attention_mse_loss
from fusedkd.backends import attention_loop
from fusedkd.backends.triton import attention
from fusedkd.backends.triton.attention import Tile

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BOTH = pytest.mark.parametrize("mse", [False, True], ids=["kl", "mse"])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way; and no test is passed by the loop."""
    monkeypatch.setattr(attention, "TILES", {key: Tile(16, 32, 4, 1) for key in attention.TILES})
    monkeypatch.delattr(attention_loop, "_groups")


@pytest.mark.parametrize(
    ("dtype", "kind", "causal", "mse"),
    [
        (F32, "holes", False, False),
        (BF16, None, True, False),
        (F16, "right", True, True),
        (F32, "empty", True, False),
        (BF16, "left", False, True),
    ],
    ids=describe,
)
def test_masks(dtype: torch.dtype, kind: str | None, causal: bool, mse: bool) -> None:
    m = maps(2, 2, 37, 20, teacher=(2, 8), dtype=dtype)
    check(m, padding(kind, 2, 37), mse=mse, causal=causal, upstream=3.0)


@BOTH
def test_padded_queries(mse: bool) -> None:
    """Left padding under a causal mask: the first queries see no key."""
    check(maps(2, 1, 37, 8), padding("left", 2, 37), mse=mse, causal=True, padded_queries=True)


@pytest.mark.parametrize(("dtype", "mse"), [(F32, False), (F16, True), (BF16, False)], ids=describe)
def test_each_row_by_itself(dtype: torch.dtype, mse: bool) -> None:
    upstream: Any = torch.linspace(-1e-3, 2, 34, dtype=torch.float64).view(1, 2, 17)
    check(maps(1, 2, 17, 16, dtype=dtype), padding("holes", 1, 17), mse=mse, reduction="none", upstream=upstream)


@pytest.mark.parametrize(("noise", "offset"), [(1e-1, 0.0), (1e-3, 0.0), (1e-2, 30.0)])
def test_near_convergence_and_offsets(noise: float, offset: float) -> None:
    for dtype in (F32, F16):
        check(maps(1, 1, 33, 24, noise=noise, offset=offset, dtype=dtype), vacuous=True)


@pytest.mark.parametrize("scale", [8.0, 40.0])
def test_sure_rows(scale: float) -> None:
    """One key has nearly all of a row."""
    check(maps(1, 1, 33, 16, noise=0.1), student_scale=scale, teacher_scale=scale, vacuous=True)


@pytest.mark.parametrize(("dtype", "mse"), [(F32, True), (BF16, False)], ids=describe)
def test_keys_that_are_the_queries(dtype: torch.dtype, mse: bool) -> None:
    m = maps(2, 1, 35, 8, dtype=dtype)
    m = type(m)(m.student_q, m.student_q, m.teacher_q, m.teacher_q)
    mask, truth = padding("right", 2, 35), attention_truth(m, padding("right", 2, 35), mse=mse)
    x = m.student_q.requires_grad_()
    loss = (attention_mse_loss if mse else attention_kl_loss)(x, x, m.teacher_q, m.teacher_q, mask)
    (gradient,) = torch.autograd.grad(loss, x)
    total = sum(truth.gradients)
    assert abs(loss.double() - truth.loss.value) <= truth.loss.tolerance
    assert (gradient.double() - total).norm() <= (2**-8 if dtype == BF16 else 2e-6) * total.norm()


@BOTH
def test_one_gradient_and_none(mse: bool) -> None:
    m, mask = maps(1, 2, 37, 8), padding("holes", 1, 37)
    truth, loss = attention_truth(m, mask, mse=mse), attention_mse_loss if mse else attention_kl_loss
    assert abs(loss(*m, mask).double() - truth.loss.value) <= truth.loss.tolerance
    for i in range(2):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(m[:2])]
        (gradient,) = torch.autograd.grad(loss(*leaves, *m[2:], mask), leaves[i])
        torch.testing.assert_close(gradient.double(), truth.gradients[i], rtol=1e-4, atol=1e-7)


@BOTH
def test_what_is_not_selected_is_not_read(mse: bool) -> None:
    """Padding that holds NaN, rows between NaNs."""
    mask = padding("holes", 2, 37)
    assert mask is not None
    hidden = ~mask[:, None, :, None]
    m = maps(2, 1, 37, 20)
    broken = [between_nans(x.masked_fill(hidden, torch.nan).flatten(0, 1)).view(x.shape) for x in m]
    loss = attention_mse_loss if mse else attention_kl_loss

    def found(sides: list[Tensor]) -> list[Tensor]:
        q, k = (x.detach().requires_grad_() for x in sides[:2])
        value = loss(q, k, *sides[2:], mask)
        return [value, *torch.autograd.grad(value, (q, k))]

    for a, b in zip(found(broken), found([*m]), strict=True):
        assert torch.equal(a, b)
        assert a.any()


@BOTH
def test_broken_rows_show(mse: bool) -> None:
    m, loss = maps(1, 1, 20, 8), attention_mse_loss if mse else attention_kl_loss
    m.student_q[0, 0, 3] = torch.nan
    m.teacher_q[0, 0, 18] = torch.nan
    assert loss(*m, reduction="none").isnan().nonzero()[:, 2].tolist() == [3, 18]


def test_no_length() -> None:
    m = maps(1, 1, 0, 8)
    assert attention_kl_loss(m.student_q.requires_grad_(), *m[1:]) == 0


def test_what_is_left_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    m = maps(1, 1, 9, 8)
    check(m, divergence="reverse_kl")
    check(maps(1, 1, 9, 8, dtype=torch.float64))
    check(maps(1, 1, 9, 72))
    check(maps(1, 1, 9, 136, dtype=BF16))
    assert attention.tile_of(*m) is not None
    assert attention.tile_of(*maps(1, 1, 9, 72)) is None
