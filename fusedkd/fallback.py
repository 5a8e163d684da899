"""Every operator answered by the definitions, in float64: for a CPU without the C++ extension, and the truth the
kernels are tested with.

The signatures are the operators' (:mod:`fusedkd.ops`). Memory and time are those of eager PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkd import definitions
from fusedkd.definitions import cap_and_scale, cap_and_scale_derivative


def kd_row_weights(teacher: Tensor, labels: Tensor | None, kd_mask: Tensor | None, ignore_index: int) -> Tensor:
    rows = teacher.flatten(0, 1)
    if kd_mask is not None:
        weights = kd_mask.to(torch.float32) if kd_mask.is_floating_point() else (kd_mask != 0).to(torch.float32)
    elif labels is not None:
        weights = (labels != ignore_index).to(torch.float32)
    else:
        weights = torch.ones(len(rows), device=teacher.device)
    return torch.where((rows == -torch.inf).all(-1), 0, weights)


def kd_forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    ignore_index: int,
    transform: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    z, v = _transformed(student, teacher, options, transform)
    t_s, t_t, kd_scale, smoothing = options[0], options[1], options[2], options[5]
    prefix = z[:, : v.shape[1]]
    selected = weights != 0
    rows = torch.zeros(2, len(z), dtype=torch.float64, device=z.device)
    rows[0] = torch.where(selected, kd_scale * weights * definitions.forward_kl(prefix, v, t_s, t_t), 0)
    if labels is not None:
        rows[1] = torch.where(labels == ignore_index, 0, definitions.cross_entropy(z, labels, smoothing))
    stats = torch.stack([*_statistics(prefix, t_s), *_statistics(v, t_t), *_statistics(z, 1.0)], -1)
    one = torch.ones((), dtype=accumulate, device=z.device)
    out = student.new_empty(0)
    if gradient:
        out = kd_backward(one, student, teacher, labels, weights, options, normalizers, stats, ignore_index, transform)
    return rows.to(accumulate), stats.to(accumulate), out


def kd_forward_(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    ignore_index: int,
    transform: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (teacher, labels, weights, options, normalizers, ignore_index, transform)
    rows, stats, gradient = kd_forward(student, *arguments, True)
    student.copy_(gradient)
    return rows, stats


def kd_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    stats: Tensor,
    ignore_index: int,
    transform: bool,
) -> Tensor:
    z, v = _transformed(student, teacher, options, transform)
    t_s, t_t, kd_scale, kd_weight, ce_weight, smoothing = options[:6]
    columns = v.shape[1]
    grad = torch.zeros_like(z)
    kd = kd_weight * kd_scale / normalizers[0] * weights.double().unsqueeze(-1)
    grad[:, :columns] = torch.where(kd != 0, kd * definitions.forward_kl_gradient(z[:, :columns], v, t_s, t_t), 0)
    if labels is not None:
        ce = ce_weight / normalizers[1] * (labels != ignore_index).double().unsqueeze(-1)
        grad += torch.where(ce != 0, ce * definitions.cross_entropy_gradient(z, labels, smoothing), 0)
        grad[(labels != ignore_index) & ((labels < 0) | (labels >= z.shape[1]))] = 0  # its loss is NaN
    if transform:
        grad *= torch.where(
            grad != 0, cap_and_scale_derivative(student.flatten(0, 1).double(), options[6], options[7]), 1
        )
    grad *= upstream.double().unsqueeze(-1) if upstream.dim() else upstream.double()
    return grad.to(student.dtype).view(student.shape)


def kd_rescale_(
    gradient: Tensor,
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    stats: Tensor,
    ignore_index: int,
    transform: bool,
) -> None:
    if not upstream.is_cpu or upstream != 1:  # a GPU would have to be waited for
        arguments = (student, teacher, labels, weights, options, normalizers, stats, ignore_index, transform)
        gradient.copy_(kd_backward(upstream, *arguments))


def cosine_forward(
    student: Tensor, teacher: Tensor, weights: Tensor | None, normalizer: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    x, y = student.flatten(0, 1).double(), teacher.flatten(0, 1).double()
    w = torch.ones_like(x[:, 0]) if weights is None else weights.double()
    distance = torch.where(w != 0, w * definitions.cosine_distance(x, y), 0)
    a, b = definitions.inverse_norm(x)[:, 0], definitions.inverse_norm(y)[:, 0]
    stats = torch.stack([a, b, definitions.cosine_distance(x, y)], -1)
    one = torch.ones((), dtype=accumulate, device=x.device)
    out = cosine_backward(one, student, teacher, weights, normalizer, stats) if gradient else student.new_empty(0)
    return distance.to(accumulate), stats.to(accumulate), out


def cosine_backward(
    upstream: Tensor, student: Tensor, teacher: Tensor, weights: Tensor | None, normalizer: Tensor, stats: Tensor
) -> Tensor:
    x, y = student.flatten(0, 1).double(), teacher.flatten(0, 1).double()
    scale = (torch.ones_like(x[:, 0]) if weights is None else weights.double()) * upstream.double() / normalizer
    grad = torch.where(scale.unsqueeze(-1) != 0, scale.unsqueeze(-1) * definitions.cosine_distance_gradient(x, y), 0)
    return grad.to(student.dtype).view(student.shape)


def cosine_rescale_(
    gradient: Tensor,
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    normalizer: Tensor,
    stats: Tensor,
) -> None:
    if not upstream.is_cpu or upstream != 1:
        gradient.copy_(cosine_backward(upstream, student, teacher, weights, normalizer, stats))


def _transformed(student: Tensor, teacher: Tensor, options: Tensor, transform: bool) -> tuple[Tensor, Tensor]:
    z, v = student.flatten(0, 1).double(), teacher.flatten(0, 1).double()
    if transform:
        z, v = cap_and_scale(z, options[6], options[7]), cap_and_scale(v, options[8], options[9])
    return z, v


def _statistics(x: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m and Σ exp((x − m)/T) per row; (−inf, 0) for a row that is all −inf or empty."""
    m = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -torch.inf)
    shifted = torch.where(x == -torch.inf, -torch.inf, x - m.unsqueeze(-1))
    return m, (shifted / temperature).exp().sum(-1)
