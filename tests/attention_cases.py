"""What the losses between attention maps are held to: the definitions in float64 on scores = scale·Q·Kᵀ, the gradient
taken back through the product in float64, and the rule of `truth.py` carried over to it.

value     that of `truth.py`, and what float32 products leave open, as in `linear_cases.py`: a score is right to 2^-22
          of scale·‖Q_i‖‖K_j‖.
gradient  ‖error‖ ≤ 1.25 × ‖error of the true gradient rounded‖ + 1e-6·S, S the norms of terms subtracted in ∂scores,
          taken through the product: S·scale·max‖K_j‖ for queries, (Σ S²‖Q_i‖²)^½·scale for keys. float64: 1e-13·S.
          16 bit: 1.75 × rounding, or 1.1 × what the oracle of `linear_cases.py` errs, that rounds the true ∂scores once
          and their exact product once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import bounds
import torch
from linear_cases import HALF, PHASES
from torch import Tensor
from truth import Term, assert_value, float64

import fusedkd
from fusedkd import LogitMSE
from fusedkd.divergences import resolve
from fusedkd.reference import attention as reference


class Maps(NamedTuple):
    """Queries and keys of both sides."""

    student_q: Tensor
    student_k: Tensor
    teacher_q: Tensor
    teacher_k: Tensor


class Truth(NamedTuple):
    """Float64. `subtracted` is what the gradients' errors are relative to besides."""

    loss: Term
    gradients: tuple[Tensor, Tensor]
    subtracted: tuple[Tensor, Tensor]
    oracle: tuple[Tensor, Tensor]
    """Errors of the oracle, by head; 0 but of 16 bits."""


def maps(
    B: int,
    heads: int,
    L: int,
    d: int = 16,
    *,
    teacher: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    noise: float | None = None,
    offset: float = 0.0,
    seed: int = 0,
) -> Maps:
    """Standard normal; `teacher`: its heads and d, the student's unless given; `noise`: the student is the teacher and
    so much of something else; `offset`: of all teacher's keys, which moves every score of a query alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, d: int) -> list[Tensor]:
        return [torch.randn(B, heads, L, d, generator=generator, dtype=torch.float64) for _ in range(2)]

    q, k = normal(heads, d)
    t_q, t_k = normal(*(teacher or (heads, d)))
    if noise is not None:
        q, k = (t + noise * x for t, x in ((t_q, q), (t_k, k)))
    return Maps(*(x.to(dtype).to(device) for x in (q, k + offset, t_q, t_k + offset)))


def padding(kind: str | None, B: int, L: int, device: str = "cpu") -> Tensor | None:
    """A mask whose entries differ: ``right``, ``left``, ``holes``; in ``empty`` the first has no token."""
    if kind is None:
        return None
    place, entry = torch.arange(L), torch.arange(B).unsqueeze(1)
    mask = {
        "right": place < L - 1 - entry,
        "left": place > entry,
        "holes": (place + entry) % 3 != 1,
        "empty": (place < L // 2) & (entry > 0),
    }[kind]
    return mask.to(device)


def regrouped(x: Tensor, heads: int | None) -> Tensor:
    """``(B, heads, L, d)`` with the columns in so many heads, by the definition: their concatenation, cut anew."""
    return x if heads is None else torch.stack(torch.cat(x.unbind(1), -1).chunk(heads, -1), 1)


def attention_truth(
    m: Maps,
    mask: Tensor | None = None,
    *,
    mse: bool = False,
    causal: bool = False,
    relation_heads: int | None = None,
    student_scale: Any = None,
    teacher_scale: Any = None,
    divergence: Any = "forward_kl",
    padded_queries: bool = False,
    reduction: str = "mean",
    normalizer: Any = None,
    upstream: Any = 1.0,
) -> Truth:
    exact = m.student_q.dtype == torch.float64
    leaves = [float64(x) for x in m]
    q, k, t_q, t_k = (regrouped(x, relation_heads) for x in leaves)
    B, heads, L, _ = q.shape
    scales = [x.shape[-1] ** -0.5 if s is None else float(s) for x, s in ((q, student_scale), (t_q, teacher_scale))]
    given = None if mask is None else mask.cpu() != 0
    seen = reference.visible(given, L, causal)
    rows = torch.ones(B, L) if given is None or padded_queries else given
    rows = rows.double()[:, None].expand(B, heads, L)
    some = seen.any(-1)
    if not mse:
        rows = rows * some
    z, t = reference.scores(q, k, scales[0], seen), reference.scores(t_q, t_k, scales[1], seen)
    family = LogitMSE() if mse else resolve(divergence)
    part = bounds.dense(family, reference.rows(z, t), exact)
    value, d_scores, tolerance, S = (
        torch.where(some & (rows != 0), x.view(*rows.shape), 0)
        if x.dim() == 1
        else torch.where((some & (rows != 0)).unsqueeze(-1), x.view(z.shape), 0)
        for x in (part.value, part.gradient, part.tolerance, part.subtracted)
    )
    norms = [
        scale * torch.einsum("bhi,bhj->bhij", a.norm(dim=-1), b.norm(dim=-1))
        for scale, a, b in ((scales[0], q, k), (scales[1], t_q, t_k))
    ]
    unit = 2.0**-50 if exact else 2.0**-22
    tolerance = tolerance + unit * (d_scores * (norms[0] + norms[1])).norm(dim=-1)
    n = rows[:, 0].sum() if normalizer is None else float(normalizer)
    n = n * heads if reduction == "mean" and n > 0 else 1.0
    loss = Term(value, tolerance)
    if reduction != "none":
        loss = Term(value.sum() / n, tolerance.sum() / n)
    factor = float64(upstream).expand(B, heads, L) / n
    d_scores = d_scores * factor.unsqueeze(-1)
    gradients = d_q, d_k = reference.gradients(d_scores, q, k, scales[0])
    dtype, oracle = m.student_q.dtype, [torch.zeros(1), torch.zeros(1)]
    for phase in PHASES if dtype in HALF else ():
        unit_of = phase * 2.0 ** (4096 / d_scores.abs().amax().clamp(min=1e-30)).log2().floor()
        rounded = (d_scores * unit_of).to(dtype).double() / unit_of
        for i, (x, truth) in enumerate(zip(reference.gradients(rounded, q, k, scales[0]), gradients, strict=True)):
            error = (x.to(dtype).double() - truth).flatten(2).norm(dim=-1)
            oracle[i] = torch.maximum(oracle[i], error)
    S = S * factor.abs() * scales[0]
    if mse:  # the scores' own rounding
        S = S + factor.abs() * scales[0] * norms[0].amax(-1) / L**0.5
    s_q = S * k.norm(dim=-1).amax(-1, keepdim=True)
    s_k = (S**2 * q.norm(dim=-1) ** 2).sum(-1, keepdim=True).sqrt().expand_as(S)
    if relation_heads is not None:
        h = m.student_q.shape[1]
        d_q, d_k = (regrouped(x, h) for x in (d_q, d_k))
        s_q, s_k = (x.amax(1, keepdim=True).expand(B, h, L) for x in (s_q, s_k))
        oracle = [x.norm(dim=-1, keepdim=True).expand(-1, h) if x.dim() > 1 else x for x in oracle]
    return Truth(loss, (d_q, d_k), (s_q, s_k), (oracle[0], oracle[1]))


def assert_gradient(
    actual: Tensor, truth: Tensor, subtracted: Tensor, oracle: Tensor, *, vacuous: bool = False
) -> None:
    """Head by head: the keys' gradient is a sum over queries, and so has one size."""
    assert actual.shape == truth.shape
    got, half = float64(actual), actual.dtype in HALF
    rounding = (1.75 if half else 1.25) * (float64(truth.to(actual.dtype)) - truth).flatten(2).norm(dim=-1)
    error = (got - truth).flatten(2).norm(dim=-1)
    bound = torch.maximum(rounding, 1.1 * oracle) + (
        1e-13 if actual.dtype == torch.float64 else 1e-6
    ) * subtracted.norm(dim=-1)
    assert (error <= bound).all(), f"worst {float((error / bound).max()):.3g} × the bound"
    assert vacuous or (truth.flatten(2).norm(dim=-1) > 2 * bound).any(), "an all-zero gradient would pass"


def check(
    m: Maps,
    mask: Tensor | None = None,
    *,
    mse: bool = False,
    upstream: Any = 1.0,
    vacuous: bool = False,
    **options: Any,
) -> Truth:
    """Loss and gradients of one call by the rule."""
    truth = attention_truth(m, mask, mse=mse, upstream=upstream, **options)
    q, k = (x.detach().requires_grad_() for x in m[:2])
    loss = (fusedkd.attention_mse_loss if mse else fusedkd.attention_kl_loss)(q, k, *m[2:], mask, **options)
    assert loss.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert_value(loss, truth.loss, vacuous=vacuous)
    found = torch.autograd.grad(loss, (q, k), torch.as_tensor(upstream).to(loss).expand_as(loss))
    for x, gradient, *expected in zip(m, found, truth.gradients, truth.subtracted, truth.oracle, strict=False):
        assert gradient.dtype == x.dtype
        assert_gradient(gradient, *expected, vacuous=vacuous)
    return truth
