"""The truth of the losses over several layers: the definitions in float64 on the same input, and the errors allowed to
them, by the rule of `truth`. Gradients are ``(layers, *, H)``, and held to the rule row by row and layer by layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from truth import Term, Truth, assert_gradient, assert_value, float64

from fusedkd import layer_attention_loss, pairwise_layer_mse
from fusedkd.reference import layers


def some_layers(
    M: int,
    K: int,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    noise: float = 1.0,
    spread: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Teacher layers that change by a tenth of their size from one to the next, as a residual stream does, and student
    layers beside some of them.
    """
    random = torch.Generator().manual_seed(seed)
    steps = torch.randn(K, *shape, generator=random, dtype=torch.float64)
    steps[1:] *= 0.1
    teacher = spread * steps.cumsum(0)
    near = teacher[torch.arange(M) * K // M]
    student = near + noise * spread * torch.randn(M, *shape, generator=random, dtype=torch.float64)
    return list(student.to(device, dtype)), list(teacher.to(device, teacher_dtype or dtype))


def stacked(side: list[Tensor]) -> Tensor:
    """``(layers, N, H)`` in float64."""
    return torch.stack([float64(x).reshape(-1, x.shape[-1]) for x in side])


def selection(student: list[Tensor], mask: Tensor | None, reduction: str, normalizer: Any) -> tuple[Tensor, float]:
    """Weights of the rows, and the normaliser."""
    n = student[0].shape[:-1].numel()
    w = torch.ones(n, dtype=torch.float64) if mask is None else float64(mask).flatten()
    if mask is not None and not mask.is_floating_point():
        w = (w != 0).double()
    count = 1.0 if reduction != "mean" else float(w.sum() if normalizer is None else normalizer)
    return w, count if count > 0 else 1.0


def table_of(buckets: Any, M: int, K: int) -> Tensor:
    inside = torch.zeros(M, K, dtype=torch.bool)
    for j, bucket in enumerate([range(K)] * M if buckets is None else buckets):
        inside[j, list(bucket)] = True
    return inside


def attention_truth(
    student: list[Tensor],
    teacher: list[Tensor],
    mask: Tensor | None = None,
    *,
    buckets: Any = None,
    reduction: str = "mean",
    normalizer: Any = None,
    upstream: Any = 1.0,
    **_: Any,
) -> tuple[Truth, Truth]:
    """Of :func:`fusedkd.layer_attention_loss`: with the gradient of the student, and with that of the teacher."""
    M, K, lead, H = len(student), len(teacher), student[0].shape[:-1], student[0].shape[-1]
    w, n = selection(student, mask, reduction, normalizer)
    x, y = (torch.where((w != 0).unsqueeze(-1), stacked(side), 0) for side in (student, teacher))
    inside = table_of(buckets, M, K)
    rows, of_student, of_teacher = layers.layer_attention(x, y, inside)
    exact = student[0].dtype == torch.float64
    alpha = layers.attention(x, y, inside)
    size = x.norm(dim=-1) + torch.einsum("jnk,kn->jn", alpha, y.norm(dim=-1))  # of the terms of r
    r = (x - torch.einsum("jnk,knh->jnh", alpha, y)).norm(dim=-1)
    free = 1e-14 * size**2 if exact else 1e-7 * r * size
    value = Term(w * rows, w * ((1e-11 if exact else 1e-5) * rows + free.sum(0) / H))
    if reduction == "none":
        value = Term(*(t.view(lead) for t in value))
    else:
        value = Term(*(t.sum() / n for t in value))
    # u_k is a product with r, whose rounding is that of its terms; e_k has the terms u_k and alpha_l u_l
    u = 2 / H * torch.einsum("jn,kn->jnk", r + size / H**0.5, y.norm(dim=-1))
    e = alpha * (u + (alpha * u).sum(-1, keepdim=True))
    s_student = 2 / H * size + torch.einsum("jnk,kn->jn", e, y.norm(dim=-1))
    s_teacher = torch.einsum("jnk,jn->kn", e, x.norm(dim=-1)) + 2 / H * torch.einsum("jnk,jn->kn", alpha, size)
    factor = w / n * float64(upstream).flatten()
    truths = []
    for gradient, subtracted in ((of_student, s_student), (of_teacher, s_teacher)):
        gradient, subtracted = factor.unsqueeze(-1) * gradient, factor.abs() * subtracted
        subtracted = subtracted.minimum(100 * gradient.norm(dim=-1))  # float32: 1e-4 of the gradient, whatever cancels
        truths.append(Truth(value, value, value, gradient.view(-1, *lead, H), subtracted.view(-1, *lead)))
    return truths[0], truths[1]


def check_attention(
    student: list[Tensor],
    teacher: list[Tensor],
    mask: Tensor | None = None,
    *,
    upstream: Any = 1.0,
    vacuous: bool = False,
    **options: Any,
) -> Truth:
    """Loss and gradients of one call by the rule."""
    of_student, of_teacher = attention_truth(student, teacher, mask, upstream=upstream, **options)
    ours, theirs = [x.detach().requires_grad_() for x in student], teacher
    if options.get("teacher_gradient"):
        theirs = [x.detach().requires_grad_() for x in teacher]
    loss = layer_attention_loss(ours, theirs, mask, **options)
    assert loss.dtype == (torch.float64 if student[0].dtype == torch.float64 else torch.float32)
    assert_value(loss, of_student.loss, vacuous=vacuous)
    wanted = [x for x in (*ours, *theirs) if x.requires_grad]
    given = torch.as_tensor(upstream).to(loss).expand_as(loss)
    found = torch.autograd.grad(loss, wanted, given)
    assert_gradient(torch.stack(found[: len(ours)]), of_student, vacuous=vacuous)
    if options.get("teacher_gradient"):
        assert found[-1].dtype == teacher[0].dtype
        assert_gradient(torch.stack(found[len(ours) :]), of_teacher, vacuous=vacuous)
    return of_student


def check_distances(
    student: list[Tensor],
    teacher: list[Tensor],
    mask: Tensor | None = None,
    *,
    normalizer: Any = None,
    upstream: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """D and its gradients by the rule, for an upstream ``(M, K)``."""
    M, K, lead, H = len(student), len(teacher), student[0].shape[:-1], student[0].shape[-1]
    w, n = selection(student, mask, "mean", normalizer)
    x, y = (torch.where((w != 0).unsqueeze(-1), stacked(side), 0) for side in (student, teacher))
    truth = torch.einsum("n,njk->jk", w, layers.pairwise_mse(x, y)) / n
    exact = student[0].dtype == torch.float64
    if upstream is None:
        upstream = torch.linspace(-1, 2, M * K).view(M, K)
    ours, theirs = [t.detach().requires_grad_() for t in student], teacher
    if options.get("teacher_gradient"):
        theirs = [t.detach().requires_grad_() for t in teacher]
    found = pairwise_layer_mse(ours, theirs, mask, normalizer=normalizer, **options)
    assert found.dtype == (torch.float64 if exact else torch.float32)
    assert_value(found, Term(truth, (1e-13 if exact else 1e-6) * truth))
    wanted = [t for t in (*ours, *theirs) if t.requires_grad]
    gradients = torch.autograd.grad(found, wanted, upstream.to(found))
    for side, (a, b, f) in enumerate(((x, y, upstream), (y, x, upstream.T))):
        part = gradients[:M] if side == 0 else gradients[M:]
        if not part:
            continue
        factor = w / n
        gradient = factor.unsqueeze(-1) * layers.pairwise_mse_gradient(a, b, f.double())
        apart = (a.unsqueeze(1) - b.unsqueeze(0)).norm(dim=-1)
        subtracted = factor * 2 / H * torch.einsum("jk,jkn->jn", f.double().abs(), apart)
        value = Term(truth, truth)
        shape = (-1, *lead)
        expected = Truth(value, value, value, gradient.view(*shape, H), subtracted.reshape(shape))
        assert_gradient(torch.stack(part), expected)
    return truth
