"""Every operator answered by the definitions, in float64: for a CPU without the C++ extension, and the truth the
kernels are tested with.

The signatures are the operators' (:mod:`fusedkd.ops`). Memory and time are those of eager PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import definitions, sparse
from fusedkd.definitions import cap_and_scale, cap_and_scale_derivative, log_softmax
from fusedkd.divergences import DEFINITIONS, FINITE_GRADIENT, Form, Rows
from fusedkd.sparse import SparseForm


def kd_row_weights(
    teacher: Tensor, ids: Tensor | None, labels: Tensor | None, kd_mask: Tensor | None, ignore_index: int, kd: bool
) -> tuple[Tensor, Tensor]:
    n, device = teacher.shape[0] * teacher.shape[1], teacher.device
    labelled = torch.zeros(n, device=device) if labels is None else (labels != ignore_index).to(torch.float32)
    if not kd:
        weights = torch.zeros(n, device=device)
    elif kd_mask is not None:
        weights = kd_mask.to(torch.float32) if kd_mask.is_floating_point() else (kd_mask != 0).to(torch.float32)
    else:
        weights = torch.ones(n, device=device) if labels is None else labelled
    if kd:
        known = teacher.flatten(0, 1) != -torch.inf
        weights = torch.where((known if ids is None else known & (ids >= 0)).any(-1), weights, 0)
    summed = kd_mask is not None and kd_mask.is_floating_point()
    selected = weights.double() if summed else (weights != 0).double()
    counts = torch.stack([selected.sum(), labelled.double().sum()])
    return weights, torch.where(counts <= 0, 1, counts)


def kd_terms(rows: Tensor, options: Tensor, normalizers: Tensor, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    kd, ce = rows.to(torch.float64, copy=True) if per_row else rows.double().sum(1) / normalizers
    kd_weight, ce_weight = options[3], options[4]
    loss = torch.where(kd_weight == 0, 0, kd_weight * kd) + torch.where(ce_weight == 0, 0, ce_weight * ce)
    return loss.to(rows.dtype), kd.to(rows.dtype), ce.to(rows.dtype)


class _Call(NamedTuple):
    """The arguments of a KD operator from the student on, without stats."""

    student: Tensor
    teacher: Tensor
    ids: Tensor | None
    labels: Tensor | None
    weights: Tensor
    options: Tensor
    normalizers: Tensor
    ignore_index: int
    form: int
    transform: bool
    ce: bool

    def rows(self) -> tuple[Tensor, Tensor]:
        """Student and teacher in float64, ``(N, V)`` and ``(N, C)``, as the loss sees them."""
        z, v = self.student.flatten(0, 1).double(), self.teacher.flatten(0, 1).double()
        if self.transform:
            z = cap_and_scale(z, self.options[6], self.options[7])
            v = v if self.ids is not None else cap_and_scale(v, self.options[8], self.options[9])
        return z, v

    def divergence(self) -> tuple[Tensor, Tensor]:
        """D and ∂D/∂z per row."""
        z, v = self.rows()
        t_s, t_t, a = self.options[0], self.options[1], self.options[10:]
        if self.ids is not None:
            illegal = self.illegal()
            ids = torch.where(illegal.unsqueeze(-1), -1, self.ids)
            log_q = log_softmax(z / t_s)
            known = self.teacher.flatten(0, 1)
            value, gradient = sparse.definition(SparseForm(self.form), ids, known, log_q, a[0] / t_t)
            value = torch.where(illegal, torch.nan, value)
            finite = self.form not in sparse.REVERSE
        else:
            z = z[:, : v.shape[1]]
            rows = Rows(log_softmax(v / t_t), log_softmax(z / t_s), v, z, self.labels)
            value, gradient = DEFINITIONS[Form(self.form)](rows, a)
            finite = self.form in FINITE_GRADIENT
            illegal = torch.zeros_like(value, dtype=torch.bool)
        masked = (z == -torch.inf).all(-1)
        dead = illegal | masked | (value == torch.inf if not finite else False)
        return torch.where(masked & ~illegal, torch.inf, value), torch.where(dead.unsqueeze(-1), 0, gradient / t_s)

    def illegal(self) -> Tensor:
        """The rows with an id that is no column."""
        assert self.ids is not None
        return ((self.ids < -1) | (self.ids >= self.student.shape[2])).any(-1)

    def labelled(self) -> Tensor:
        """The rows that have a cross-entropy."""
        if not self.ce or self.labels is None:
            return torch.zeros_like(self.weights, dtype=torch.bool)
        return self.labels != self.ignore_index

    def forward(self, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        accumulate = torch.float64 if self.student.dtype == torch.float64 else torch.float32
        z, _ = self.rows()
        rows = torch.zeros(2, len(z), dtype=torch.float64, device=z.device)
        rows[0] = torch.where(self.weights != 0, self.options[2] * self.weights * self.divergence()[0], 0)
        if self.ce and self.labels is not None:
            ce = definitions.cross_entropy(z, self.labels, self.options[5])
            rows[1] = torch.where(self.labelled(), ce, 0)
        stats = torch.zeros(len(z), 8, dtype=accumulate, device=z.device)  # nothing here reads them
        out = self.gradient(torch.ones((), device=z.device)) if gradient else self.student.new_empty(0)
        return rows.to(accumulate), stats, out

    def gradient(self, upstream: Tensor) -> Tensor:
        z, v = self.rows()
        _, _, kd_scale, kd_weight, ce_weight, smoothing = self.options[:6]
        grad = torch.zeros_like(z)
        kd = (kd_weight * kd_scale / self.normalizers[0] * self.weights.double()).unsqueeze(-1)
        columns = v.shape[1] if self.ids is None else z.shape[1]
        grad[:, :columns] = torch.where(kd != 0, kd * self.divergence()[1], 0)
        if self.ce and self.labels is not None:
            ce = (ce_weight / self.normalizers[1] * self.labelled()).unsqueeze(-1)
            grad += torch.where(ce != 0, ce * definitions.cross_entropy_gradient(z, self.labels, smoothing), 0)
            grad[self.labelled() & ((self.labels < 0) | (self.labels >= z.shape[1]))] = 0  # its loss is NaN
        if self.ids is not None:
            grad[(self.weights != 0) & self.illegal()] = 0
        if self.transform:
            slope = cap_and_scale_derivative(self.student.flatten(0, 1).double(), self.options[6], self.options[7])
            grad *= torch.where(grad != 0, slope, 1)
        grad *= upstream.double().unsqueeze(-1) if upstream.dim() else upstream.double()
        return grad.to(self.student.dtype).view(self.student.shape)

    def rescale(self, gradient: Tensor, upstream: Tensor) -> None:
        if not upstream.is_cpu or upstream != 1:  # a GPU would have to be waited for
            gradient.copy_(self.gradient(upstream))


# -------------------------------------------------- the operators of fusedkd.ops


def topk_forward(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Call(student, *arguments[:-1]).forward(arguments[-1])


def topk_forward_(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows, stats, gradient = _Call(student, *arguments).forward(True)
    student.copy_(gradient)
    return rows, stats


def topk_backward(upstream: Tensor, *arguments: Any) -> Tensor:
    return _Call(*_without_stats(arguments)).gradient(upstream)


def topk_rescale_(gradient: Tensor, upstream: Tensor, *arguments: Any) -> None:
    _Call(*_without_stats(arguments)).rescale(gradient, upstream)


def kd_forward(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return topk_forward(student, teacher, None, *arguments)


def kd_forward_(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return topk_forward_(student, teacher, None, *arguments)


def kd_backward(upstream: Tensor, student: Tensor, teacher: Tensor, *arguments: Any) -> Tensor:
    return topk_backward(upstream, student, teacher, None, *arguments)


def kd_rescale_(gradient: Tensor, upstream: Tensor, student: Tensor, teacher: Tensor, *arguments: Any) -> None:
    topk_rescale_(gradient, upstream, student, teacher, None, *arguments)


def _without_stats(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return *arguments[:7], *arguments[8:]


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
