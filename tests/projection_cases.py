"""What `hidden_loss` with a projection is held to: the definitions in float64 on y = x·Wᵀ + b, differentiated by
autograd in float64, and the rule of `linear_cases.py`, with S the sum of the norms of the terms subtracted in ∂y, taken
through the product: S·max‖W_j‖ for hidden states, (Σ S²‖x‖²)^½ for the projection, (Σ S²)^½ for the bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from truth import float64

from fusedkd import hidden_loss
from fusedkd.reference import hidden

HALF = (torch.float16, torch.bfloat16)
H_S, H_T = 24, 33


class Given(NamedTuple):
    """The tensors of one call."""

    student: Tensor
    projection: Tensor
    bias: Tensor | None
    teacher: Tensor | list[Tensor]

    def leaves(self, *frozen: str) -> Given:
        def leaf(name: str, x: Any) -> Any:
            return x if x is None or isinstance(x, list) else x.detach().clone().requires_grad_(name not in frozen)

        return Given(*[leaf(name, x) for name, x in self._asdict().items()])

    def loss(self, *mask: Tensor, **options: Any) -> Tensor:
        return hidden_loss(self.student, self.teacher, *mask, projection=self.projection, bias=self.bias, **options)

    def gradients(self, loss: Tensor, upstream: Any = 1.0) -> dict[str, Tensor]:
        named = {k: x for k, x in self._asdict().items() if isinstance(x, Tensor) and x.requires_grad}
        upstream = torch.as_tensor(upstream).to(loss).expand_as(loss)
        return dict(zip(named, torch.autograd.grad(loss, [*named.values()], upstream), strict=True))


def given(
    *lead: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sizes: tuple[int, int] = (H_S, H_T),
    noise: float = 1.0,
    bias: bool = True,
    seed: int = 0,
) -> Given:
    """A teacher that the projected student is near, by `noise`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, w, b = normal(*lead, sizes[0]), 2 * normal(sizes[1], sizes[0]) / sizes[0] ** 0.5, normal(sizes[1])
    teacher = F.linear(x, w, b if bias else None) + noise * normal(*lead, sizes[1])
    return Given(*[t.to(device, dtype) for t in (x, w, b, teacher)])._replace(**{} if bias else {"bias": None})


class Truth(NamedTuple):
    """Float64 on the CPU: the loss, the error allowed to it, gradients, and S of each."""

    loss: Tensor
    tolerance: Tensor
    gradients: dict[str, Tensor]
    subtracted: dict[str, Tensor]
    rows: Tensor


def truth(
    p: Given,
    mask: Tensor | None = None,
    distance: str = "mse",
    normalize: str | None = None,
    pool: str | None = None,
    reduction: str = "mean",
    normalizer: Any = None,
    upstream: Any = 1.0,
) -> Truth:
    pieces = p.teacher if isinstance(p.teacher, list) else [p.teacher]
    x, w = float64(p.student).requires_grad_(), float64(p.projection).requires_grad_()
    b = torch.zeros(len(w), dtype=torch.float64) if p.bias is None else float64(p.bias)
    b.requires_grad_()
    t = torch.cat([float64(piece) for piece in pieces], -1).requires_grad_()
    weights = torch.ones(x.shape[:-1], dtype=torch.float64)
    if mask is not None:
        weights = float64(mask if mask.is_floating_point() else mask != 0)
    selected = (weights != 0).unsqueeze(-1)
    y, v, h = F.linear(x.where(selected, 0), w, b), t.where(selected, 0), x.where(selected, 0)
    if pool:
        shares = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        y, v, h = ((shares.unsqueeze(-1) * each).sum(-2) for each in (y, v, h))
        weights = (weights.sum(-1) > 0).double()
    lead = y.shape[:-1]
    y, v, h, weights = y.flatten(0, -2), v.flatten(0, -2), h.flatten(0, -2), weights.flatten()
    rows = torch.where(weights != 0, weights * hidden.hidden_distance(y, v, distance, normalize), 0)
    n = float(weights.sum() if normalizer is None else normalizer) if reduction == "mean" else 1.0
    loss = rows.view(lead) if reduction == "none" else rows.sum() / (n if n > 0 else 1.0)
    factor = float64(upstream).expand_as(loss)
    g = torch.autograd.grad(loss, y, torch.ones_like(loss), retain_graph=True)[0]
    named = {"student": x, "projection": w, "bias": b, "teacher": t}
    gradients = dict(zip(named, torch.autograd.grad(loss, [*named.values()], factor), strict=True))

    exact = p.student.dtype == torch.float64
    with torch.no_grad():
        sizes = h.norm(dim=-1, keepdim=True) * w.norm(dim=-1) + b.abs()
        moved = (2.0**-50 if exact else 2.0**-22) * (g * sizes).norm(dim=-1)
        moved = moved.view(lead) if reduction == "none" else moved.norm()
        by = "l2" if distance == "cosine" and normalize is None else normalize
        scale = {None: torch.ones_like, "l2": hidden.inverse_norm, "layer_norm": hidden.inverse_deviation}[by](y[:, :1])
        norms = [hidden.normalized(each, by).norm(dim=-1) for each in (y, v)]
        slope = scale[:, 0] if distance != "cosine" else scale[:, 0] * (1 if by == "l2" else len(w) ** -0.5)
        S = weights / (n if n > 0 else 1.0) * slope * sum(norms) * ({"cosine": 1.0}.get(distance, 2 / len(w)))
        S = S * factor.flatten().abs()
        subtracted = {
            "student": S.norm() * w.norm(dim=-1).max(),
            "projection": (S * h.norm(dim=-1)).norm(),
            "bias": S.norm(),
            "teacher": S.norm(),
        }
        return Truth(
            loss.detach(), (1e-11 if exact else 1e-5) * loss.detach() + moved, gradients, subtracted, weights != 0
        )


def check(p: Given, *mask: Tensor, frozen: tuple[str, ...] = ("teacher",), upstream: Any = 1.0, **options: Any) -> None:
    """Loss and gradients of one call by the rule."""
    expected = truth(p, *mask, upstream=upstream, **options)
    leaves = p.leaves(*frozen)
    loss = leaves.loss(*mask, teacher_gradient="teacher" not in frozen, **options)
    assert loss.dtype == (torch.float64 if p.student.dtype == torch.float64 else torch.float32)
    assert ((float64(loss) - expected.loss).abs() <= expected.tolerance).all()
    found = leaves.gradients(loss, upstream)
    assert set(found) == {k for k, x in p._asdict().items() if x is not None and k not in frozen} - (
        {"teacher"} if isinstance(p.teacher, list) else set()
    )
    assert_gradients(found, p, expected)


def assert_gradients(found: dict[str, Tensor], p: Given, expected: Truth, dtype: torch.dtype | None = None) -> None:
    for name, gradient in found.items():
        operand, exact = p._asdict()[name], expected.gradients[name]
        assert (gradient.dtype, gradient.shape) == (operand.dtype, operand.shape)
        rounded = dtype or gradient.dtype
        rounding = (float64(exact.to(rounded)) - exact).norm()
        bound = (1.75 if rounded in HALF else 1.25) * rounding
        unit = 2.0 ** (-53 if rounded == torch.float64 else -24)
        bound += (1e-13 if rounded == torch.float64 else 1e-6) * expected.subtracted[name]
        bound += unit * len(expected.rows) ** 0.5 * exact.norm()
        error = (float64(gradient) - exact).norm()
        assert error <= bound, f"{name}: {error / bound:.3g} × the bound, {error / exact.norm():.3g} of the gradient"
        assert exact.norm() > 2 * bound, f"{name}: an all-zero gradient would pass"
