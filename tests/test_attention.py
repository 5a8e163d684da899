"""The losses between attention maps against the definitions in float64, and against the methods' own formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import Maps, attention_truth, check, maps, padding
from families import DEFAULTS, PARAMETERS, describe
from torch.nn import functional as F
from truth import DTYPES, assert_value

import fusedkd
from fusedkd import attention_kl_loss, attention_mse_loss
from fusedkd.backends import attention_loop

BOTH = pytest.mark.parametrize("mse", [False, True], ids=["kl", "mse"])
DIVERGENCES = [d for d in DEFAULTS + PARAMETERS if d.name not in ("logit_mse", "dkd")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop in Python, with tiles of some rows, of lengths that are no multiple of them."""
    monkeypatch.setattr(attention_loop, "_is_compiled", lambda operands, kernel_id: False)
    monkeypatch.setattr(attention_loop, "CPU_TILE", 5000)
    monkeypatch.setattr(attention_loop, "GPU_TILE", 5000)
    monkeypatch.setattr(attention_loop, "FEWEST", 3)
    monkeypatch.setattr(attention_loop, "FEWEST_CAUSAL", 3)


@BOTH
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", [None, "right", "left", "holes", "empty"])
@pytest.mark.parametrize("dtype", DTYPES, ids=describe)
def test_masks(device: str, dtype: torch.dtype, kind: str | None, causal: bool, mse: bool) -> None:
    for B, heads, L, d in ((3, 2, 37, 16), (1, 1, 13, 7)):
        mask = padding(kind, B, L, device)
        check(
            maps(B, heads, L, d, dtype=dtype, device=device),
            mask,
            mse=mse,
            causal=causal,
            vacuous=kind is not None and B == 1,
        )


@BOTH
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", [None, "right", "left", "holes", "empty"])
@pytest.mark.parametrize("padded_queries", [False, True], ids=["", "padded"])
def test_tiles(device: str, small: None, kind: str | None, causal: bool, mse: bool, padded_queries: bool) -> None:
    mask = padding(kind, 3, 43, device)
    options = {"mse": mse, "causal": causal, "padded_queries": padded_queries}
    for dtype in (torch.float32, torch.bfloat16):
        check(maps(3, 2, 43, dtype=dtype, device=device), mask, **options)


@BOTH
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", [None, "right", "left", "holes", "empty"])
def test_long_sequences(device: str, kind: str | None, causal: bool, mse: bool) -> None:
    """Of more than one tile as they are."""
    mask = padding(kind, 2, 421, device)
    for dtype in (torch.float32, torch.bfloat16):
        check(maps(2, 1, 421, 8, dtype=dtype, device=device), mask, mse=mse, causal=causal, upstream=2.0)


def test_threads_change_nothing() -> None:
    """As many pairs as threads, and fewer."""
    before = torch.get_num_threads()
    for heads in (1, 3):
        q, k, *teacher = (x.requires_grad_(i < 2) for i, x in enumerate(maps(1, heads, 421, 8)))
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = attention_kl_loss(q, k, *teacher, padding("holes", 1, 421), causal=True)
            found.append((loss, *torch.autograd.grad(loss, (q, k))))
        torch.set_num_threads(before)
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=describe)
def test_reductions_and_upstream(device: str, dtype: torch.dtype, reduction: str, mse: bool) -> None:
    m, mask = maps(2, 3, 21, dtype=dtype, device=device), padding("right", 2, 21, device)
    upstream: Any = 3.0
    if reduction == "none":
        upstream = torch.linspace(-1, 2, 2 * 3 * 21, dtype=torch.float64).view(2, 3, 21).to(device)
    check(m, mask, mse=mse, reduction=reduction, upstream=upstream)


@BOTH
def test_normalizer_is_of_queries(device: str, mse: bool) -> None:
    """Of batches that are halves of one, divided by the queries of both, the losses add up to that of the whole."""
    m, mask = maps(4, 3, 21, device=device), padding("right", 4, 21, device)
    assert mask is not None
    loss = attention_mse_loss if mse else attention_kl_loss
    whole, count = loss(*m, mask), mask.sum()
    parts = [loss(*(x[i] for x in m), mask[i], normalizer=n) for i, n in ((slice(2), count), (slice(2, 4), int(count)))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)
    check(m, mask, mse=mse, normalizer=7.5)
    check(m, mask, mse=mse, normalizer=torch.tensor(7, device=device))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=describe)
def test_divergences(device: str, divergence: Any) -> None:
    check(maps(2, 2, 19, device=device), padding("holes", 2, 19, device), divergence=divergence)


@BOTH
@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_near_convergence_and_offsets(device: str, noise: float, offset: float, mse: bool) -> None:
    """Down to KL of 1e-6; keys that share a large part move all scores of a query."""
    if mse and offset:
        pytest.skip("scores without a softmax are what they are")
    check(maps(2, 2, 33, 32, noise=noise, offset=offset, device=device), mse=mse, vacuous=noise < 1e-2 or offset != 0)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=describe)
def test_widths_and_scales_differ(device: str, dtype: torch.dtype, mse: bool) -> None:
    m = maps(2, 3, 20, 8, teacher=(3, 24), dtype=dtype, device=device)
    check(m, mse=mse)
    check(m, mse=mse, student_scale=0.7, teacher_scale=torch.tensor(0.3, device=device))


@BOTH
@pytest.mark.parametrize("relation_heads", [1, 2, 12])
def test_relation_heads(device: str, relation_heads: int, mse: bool) -> None:
    """Student and teacher of other numbers of heads, of other widths."""
    m, mask = maps(2, 3, 20, 8, teacher=(4, 12), device=device), padding("right", 2, 20, device)
    check(m, mask, mse=mse, relation_heads=relation_heads)


@BOTH
def test_strides(device: str, mse: bool) -> None:
    """Heads of a projection (B, L, heads·d) are strided views; a mask may be one."""
    m = Maps(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in maps(2, 3, 20, 8, device=device)))
    assert not m.student_q.is_contiguous()
    mask = padding("right", 2, 20, device)
    assert mask is not None
    check(m, mask.mT.contiguous().mT, mse=mse)
    check(m, mse=mse, relation_heads=4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=describe)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_queries_that_are_the_keys(device: str, reduction: str, dtype: torch.dtype, mse: bool) -> None:
    """The gradients add up, and are those of two tensors."""
    m, mask = maps(2, 3, 20, 8, dtype=dtype, device=device), padding("holes", 2, 20, device)
    same = m._replace(student_k=m.student_q, teacher_k=m.teacher_q)
    truth = attention_truth(same, mask, mse=mse, relation_heads=2, reduction=reduction)
    x = m.student_q.clone().requires_grad_()
    loss = attention_mse_loss if mse else attention_kl_loss
    found = loss(x, x, m.teacher_q, m.teacher_q, mask, relation_heads=2, reduction=reduction)
    assert_value(found, truth.loss)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    expected = sum(truth.gradients)
    error = (gradient.cpu().double() - expected).norm() / expected.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 3e-3)


@BOTH
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("tiles", ["small", "whole"])
def test_what_is_masked_is_not_read(
    request: pytest.FixtureRequest, device: str, tiles: str, kind: str, causal: bool, mse: bool
) -> None:
    if tiles == "small":
        request.getfixturevalue("small")
    m, mask = maps(2, 2, 43, device=device), padding(kind, 2, 43, device)
    assert mask is not None
    loss = attention_mse_loss if mse else attention_kl_loss
    found = []
    for fill in (0.0, math.nan, math.inf):
        q, k, t_q, t_k = (torch.where(mask[:, None, :, None], x, fill) for x in m)
        leaves = q.requires_grad_(), k.requires_grad_()
        value = loss(*leaves, t_q, t_k, mask, causal=causal)
        found.append((value, *torch.autograd.grad(value, leaves)))
        for gradient in found[-1][1:]:
            assert not gradient[~mask[:, None].expand(gradient.shape[:3])].any()
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_nan_of_a_token_shows(device: str) -> None:
    m = maps(1, 1, 8, device=device)
    m.student_q[0, 0, 3, 0] = math.nan
    rows = attention_kl_loss(*m, reduction="none")[0, 0]
    assert rows.isnan().tolist() == [i == 3 for i in range(8)]


@BOTH
def test_no_token_at_all(device: str, mse: bool) -> None:
    q, k, *teacher = maps(2, 2, 8, device=device)
    q, k = q.requires_grad_(), k.requires_grad_()
    loss = attention_mse_loss if mse else attention_kl_loss
    for shape in ((2, 8), (0, 8), (2, 0)):
        part = [x[: shape[0], :, : shape[1]] for x in (q, k, *teacher)]
        value = loss(*part, torch.zeros(shape, dtype=torch.bool, device=device))
        assert value == 0
        for gradient in torch.autograd.grad(value, (q, k)):
            assert not gradient.any()


def test_a_second_backward_is_the_first(device: str) -> None:
    m = maps(2, 2, 20, device=device)
    q, k = (x.requires_grad_() for x in m[:2])
    loss = attention_kl_loss(*m)
    first = torch.autograd.grad(loss, (q, k), retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    for a, b in zip(kept, torch.autograd.grad(loss, (q, k)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(attention_kl_loss(*m), (q, k), create_graph=True)


def test_frozen_sides_get_no_gradient(device: str) -> None:
    q, k, *teacher = maps(2, 2, 20, device=device)
    both = torch.autograd.grad(attention_kl_loss(q.requires_grad_(), k.requires_grad_(), *teacher), (q, k))
    for i in range(2):
        sides = [x.detach().requires_grad_(j == i) for j, x in enumerate((q, k))]
        (gradient,) = torch.autograd.grad(attention_kl_loss(*sides, *teacher), sides[i])
        assert torch.equal(gradient, both[i])
    with torch.no_grad():
        assert not attention_kl_loss(q, k, *teacher).requires_grad


# -------------------------------------------------- the methods' own formulas


def eager(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def same(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_minilm() -> None:
    """1/(A·L)·ΣΣ KL(teacher's row ‖ student's row) of queries and keys, and of values with values: arXiv:2002.10957,
    eq. 5–9.
    """
    (q, k, t_q, t_k), (v, _, t_v, _) = (maps(2, 3, 9, 8, dtype=torch.float64, seed=i) for i in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def distance(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        A, L = s.shape[1:3]
        rows = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return rows.sum((1, 2)).mean() / (A * L)

    ours = attention_kl_loss(q, k, t_q, t_k) + attention_kl_loss(v, v, t_v, t_v)
    same(ours, distance(eager(q, k), eager(t_q, t_k)) + distance(eager(v, v), eager(t_v, t_v)), leaves)


def test_minilm_v2() -> None:
    """The same for relation heads of (Q, Q), (K, K) and (V, V): arXiv:2012.15828, eq. 5–8."""
    student = [x.requires_grad_() for x in maps(2, 3, 9, 8, dtype=torch.float64)[:3]]
    teacher = list(maps(2, 4, 9, 12, dtype=torch.float64, seed=1)[:3])
    ours = sum(attention_kl_loss(x, x, t, t, relation_heads=6) for x, t in zip(student, teacher, strict=True))
    theirs: Any = 0.0
    for x, t in zip(student, teacher, strict=True):
        sides = [y.transpose(1, 2).reshape(2, 9, 6, -1).transpose(1, 2) for y in (x, t)]
        s, p = (eager(y, y) for y in sides)
        theirs = theirs + F.kl_div(s.log_softmax(-1), p.softmax(-1), reduction="sum") / (2 * 6 * 9)
    same(ours, theirs, student)


def test_tinybert() -> None:
    """MSE of scores, mask added, where what is at most −1e2 counts as 0: the mean over all B·heads·L·L entries, rows of
    padding among them (TinyBERT's task_distill.py).
    """
    q, k, t_q, t_k = maps(2, 3, 9, 8, dtype=torch.float64)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    mask = padding("right", 2, 9)
    assert mask is not None
    added = -10000.0 * (~mask[:, None, None, :]).double()
    s, t = eager(q, k) + added, eager(t_q, t_k) + added
    theirs = F.mse_loss(torch.where(s <= -1e2, 0.0, s), torch.where(t <= -1e2, 0.0, t))
    same(attention_mse_loss(q, k, t_q, t_k, mask, padded_queries=True), theirs, leaves)


def test_mobilebert() -> None:
    """Mean over heads and rows of −Σ p log q, which is KL but for the teacher's entropy: arXiv:2004.02984, §3.3."""
    q, k, t_q, t_k = maps(2, 3, 9, 8, dtype=torch.float64)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    log_p = eager(t_q, t_k).log_softmax(-1)
    theirs = -(log_p.exp() * eager(q, k).log_softmax(-1)).sum(-1).mean()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    same(attention_kl_loss(q, k, t_q, t_k), theirs - entropy, leaves)


# -------------------------------------------------- given maps


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("padded_queries", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", [None, "right", "holes", "empty"])
def test_given_maps(kind: str | None, padded_queries: bool, reduction: str, mse: bool) -> None:
    """The same loss from queries and keys and from the maps that they make."""
    m, mask = maps(2, 3, 9, 8, dtype=torch.float64), padding(kind, 2, 9)
    q, k = (x.requires_grad_() for x in m[:2])
    options: dict[str, Any] = {"padded_queries": padded_queries, "reduction": reduction}
    if reduction == "mean" and kind == "right":
        options["normalizer"] = 5
    ours = (attention_mse_loss if mse else attention_kl_loss)(*m, mask, **options)
    s, t = eager(q, k), eager(m.teacher_q, m.teacher_k)
    if mse:
        found = [fusedkd.attention_mse_from_maps(s, t, mask, **options)]
    else:
        hidden = torch.zeros(9, dtype=torch.bool) if mask is None else ~mask[:, None, None, :]
        maps_of = [x.masked_fill(hidden, -1e4).softmax(-1) for x in (s, t)]
        found = [fusedkd.attention_kl_from_maps(*maps_of, mask, **options)]
        found.append(fusedkd.attention_kl_from_maps(s, t, mask, form="scores", **options))
    weights = torch.linspace(1, 2, ours.numel(), dtype=torch.float64).view(ours.shape)
    expected = torch.autograd.grad((ours * weights).sum(), (q, k))
    for each in found:
        torch.testing.assert_close(each, ours, rtol=1e-9, atol=1e-12)
        for a, b in zip(torch.autograd.grad((each * weights).sum(), (q, k), retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)
