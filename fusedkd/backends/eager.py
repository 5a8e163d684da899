"""Every operator of :mod:`fusedkd.backends.schema` answered by the reference, in float64: for a CPU without the C++
extension, and the truth the kernels are tested with. Memory and time are those of eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkd.backends.call import Call
from fusedkd.backends.composed import hidden_loss as hidden_loss
from fusedkd.backends.composed import in_turn, whole_loss
from fusedkd.backends.layout import (
    COUNTED,
    FINITE_GRADIENT,
    NORMALIZERS,
    OPTIONS,
    REVERSE,
    TOPK_KERNELS,
    HiddenDistance,
    HiddenNormalize,
    KernelId,
    Option,
    Stat,
    TopkKernelId,
)
from fusedkd.backends.schema import accumulation_dtype, by_layer, layers_and_stats
from fusedkd.backends.statistics import kd_statistics as kd_statistics
from fusedkd.reference import divergences, gumbel, hidden, layers, softmax, sparse
from fusedkd.reference.divergences import Rows
from fusedkd.reference.softmax import cap_and_scale, cap_and_scale_derivative, log_softmax

DEFINITIONS: dict[KernelId, Callable[[Rows, Tensor], tuple[Tensor, Tensor]]] = {
    KernelId.FORWARD_KL: divergences.forward_kl,
    KernelId.JEFFREYS: divergences.jeffreys,
    KernelId.MIXTURE: divergences.mixture,
    KernelId.ALPHA_BETA: divergences.alpha_beta,
    KernelId.TOTAL_VARIATION: divergences.total_variation,
    KernelId.LOGIT_MSE: divergences.logit_mse,
    KernelId.DKD: divergences.dkd,
    KernelId.SUM: divergences.total,
    KernelId.MIXED_SUM: divergences.mixed_total,
}
"""What each kernel computes, from the rows and the coefficients."""

TAILS = {kernel: (tail, reverse) for (tail, reverse), kernel in TOPK_KERNELS.items()}


def topk_definition(
    kernel_id: int, ids: Tensor, known: Tensor, log_q: Tensor, sharpening: Tensor | float
) -> tuple[Tensor, Tensor]:
    """(D, ∂D/∂s) of rows with ids ``(N, K)``: see :mod:`fusedkd.reference.sparse`."""
    if kernel_id == TopkKernelId.SAMPLES:
        return sparse.sampled_cross_entropy(ids, known, log_q)
    tail, reverse = TAILS[TopkKernelId(kernel_id)]
    return sparse.topk_kl(tail, reverse, ids, known, log_q, sharpening)


def kd_row_weights(
    teacher: Tensor,
    ids: Tensor | None,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    normalizers: Tensor | None,
    ignore_index: int,
    kd: bool,
    given: Tensor | None = None,
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
    options = counts[:0]
    if given is not None:
        assert normalizers is not None
        numbers, places, powers = normalizers.view(3, -1)
        values = torch.where(places < 0, numbers, given.double()[places.clamp(min=0).long()] ** powers)
        normalizers, options = values[:NORMALIZERS], values[NORMALIZERS:]
    if normalizers is not None:
        counts = torch.where(normalizers == COUNTED, counts, normalizers)
    return weights, torch.cat([torch.where(counts <= 0, 1, counts), options])


def kd_terms(row_losses: Tensor, options: Tensor, normalizers: Tensor, terms: Tensor | None, per_row: bool) -> Tensor:
    kd, ce = found = row_losses.to(torch.float64, copy=True) if per_row else row_losses.double().sum(1) / normalizers
    if terms is not None:
        terms.copy_(found)
    if options.dim() == 2:  # a weight per row
        own = options[:, Option.KD_WEIGHT]
        of_rows = torch.where(own == 0, 0, own * row_losses[0].double())
        weighted_kd = of_rows if per_row else of_rows.sum() / normalizers[0]
    else:
        kd_weight = options[Option.KD_WEIGHT]
        weighted_kd = torch.where(kd_weight == 0, 0, kd_weight * kd)
    ce_weight = options[..., Option.CE_WEIGHT].flatten()[:1].sum()
    loss = weighted_kd + torch.where(ce_weight == 0, 0, ce_weight * ce)
    return loss.to(row_losses.dtype)


class EagerCall(Call):
    """Its loss and gradient."""

    def option(self, option: int) -> Tensor:
        """``()``, or ``(N, 1)`` where rows have options of their own."""
        return self.options[option] if self.options.dim() == 1 else self.options[:, option].unsqueeze(-1)

    def shared(self, option: Option) -> Tensor:
        """``()``: an option that is the same in all rows."""
        return self.options.view(-1, OPTIONS)[:1, option].sum()

    def logits(self) -> tuple[Tensor, Tensor]:
        """Student and teacher in float64, ``(N, V)`` and ``(N, C)``, as the loss sees them."""
        z, v, option = self.student.flatten(0, 1).double(), self.teacher.flatten(0, 1).double(), self.option
        if self.transform:
            z = cap_and_scale(z, option(Option.SOFTCAP), option(Option.SCALE))
            if self.ids is None:
                v = cap_and_scale(v, option(Option.TEACHER_SOFTCAP), option(Option.TEACHER_SCALE))
        return z, v

    def divergence(self) -> tuple[Tensor, Tensor]:
        """D and ∂D/∂z per row."""
        z, v = self.logits()
        t_s, t_t = self.option(Option.TEMPERATURE), self.option(Option.TEACHER_TEMPERATURE)
        if self.ids is None:
            z = z[:, : v.shape[1]]
            rows = Rows(log_softmax(v / t_t), log_softmax(z / t_s), v, z, self.some_labels())
            value, gradient = self.definition(rows)
            finite = self.kernel_id in FINITE_GRADIENT
            illegal = torch.zeros_like(value, dtype=torch.bool)
        else:
            illegal = self.illegal()
            ids, known = torch.where(illegal.unsqueeze(-1), -1, self.ids), self.teacher.flatten(0, 1)
            log_q = log_softmax(z / t_s)
            value, gradient = topk_definition(self.kernel_id, ids, known, log_q, self.option(Option.COEFFICIENTS) / t_t)
            value = torch.where(illegal, torch.nan, value)
            finite = self.kernel_id not in REVERSE
        masked = (z == -torch.inf).all(-1)
        dead = illegal | masked | (value == torch.inf if not finite else False)
        return torch.where(masked & ~illegal, torch.inf, value), torch.where(dead.unsqueeze(-1), 0, gradient / t_s)

    def definition(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """D and ∂D/∂s; one row after the other where they have coefficients of their own."""
        function, a = DEFINITIONS[KernelId(self.kernel_id)], self.options[..., Option.COEFFICIENTS :]
        if a.dim() == 1 or len(a) == 0:
            return function(rows, a if a.dim() == 1 else a.new_zeros(a.shape[1]))
        each = [function(Rows(*[None if x is None else x[i : i + 1] for x in rows]), a[i]) for i in range(len(a))]  # type: ignore[arg-type]
        value, gradient = map(torch.cat, zip(*each, strict=True))
        return value, gradient

    def some_labels(self) -> Tensor:
        """Of a divergence that needs them. None are given where no row has its term: any do."""
        return torch.zeros_like(self.row_weights, dtype=torch.int64) if self.labels is None else self.labels

    def illegal(self) -> Tensor:
        """The rows with an id out of range."""
        assert self.ids is not None
        return ((self.ids < -1) | (self.ids >= self.student.shape[2])).any(-1)

    def labelled(self) -> Tensor:
        """The rows that have a cross-entropy."""
        if not self.ce or self.labels is None:
            return torch.zeros_like(self.row_weights, dtype=torch.bool)
        return self.labels != self.ignore_index

    def row_losses(self, divergence: Tensor) -> Tensor:
        z, _ = self.logits()
        losses = torch.zeros(2, len(z), dtype=torch.float64, device=z.device)
        scale = self.options[..., Option.KD_SCALE]
        kd = scale * self.row_weights.double() * divergence
        losses[0] = torch.where((self.row_weights != 0) & (scale != 0), kd, 0)
        if self.ce and self.labels is not None:
            smoothing, z_loss = self.shared(Option.LABEL_SMOOTHING), self.shared(Option.Z_LOSS_WEIGHT)
            ce = softmax.cross_entropy(z, self.labels, smoothing, z_loss)
            losses[1] = torch.where(self.labelled(), ce, 0)
        return losses

    def gradient(self, upstream: Tensor, slope: Tensor) -> Tensor:
        """In the student's type, from that of the divergence."""
        z, _ = self.logits()
        option, (n_kd, n_ce) = self.option, self.normalizers
        grad = torch.zeros_like(z)
        weights = self.row_weights.double().unsqueeze(-1)
        kd = option(Option.KD_WEIGHT) * option(Option.KD_SCALE) / n_kd * weights
        grad[:, : slope.shape[1]] = torch.where(kd != 0, kd * slope, 0)
        if self.ce and self.labels is not None:
            ce = (self.shared(Option.CE_WEIGHT) / n_ce * self.labelled()).unsqueeze(-1)
            smoothing, z_loss = self.shared(Option.LABEL_SMOOTHING), self.shared(Option.Z_LOSS_WEIGHT)
            grad += torch.where(ce != 0, ce * softmax.cross_entropy_gradient(z, self.labels, smoothing, z_loss), 0)
            grad[self.labelled() & ((self.labels < 0) | (self.labels >= z.shape[1]))] = 0  # its loss is NaN
        if self.ids is not None:
            grad[(self.row_weights != 0) & self.illegal()] = 0
        if self.transform:
            logits = self.student.flatten(0, 1).double()
            inner = cap_and_scale_derivative(logits, option(Option.SOFTCAP), option(Option.SCALE))
            grad *= torch.where(grad != 0, inner, 1)
        grad *= upstream.double().unsqueeze(-1) if upstream.dim() else upstream.double()
        return grad.to(self.student.dtype).view(self.student.shape)


def skipped(upstream: Tensor, skip_if_one: bool) -> bool:
    return skip_if_one and upstream.is_cpu and bool((upstream == 1).all())  # a GPU would have to be waited for


def kd_forward(*, gradient: Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor]:
    call = EagerCall(**inputs)
    dtype = accumulation_dtype(call.student.dtype)
    value, slope = call.divergence()
    row_losses = call.row_losses(value).to(dtype)
    if gradient is not None:
        gradient.copy_(call.gradient(row_losses.new_ones(()), slope))
    return row_losses, row_losses.new_zeros(row_losses.shape[1], len(Stat))  # the statistics, which nothing here reads


def kd_backward(*, upstream: Tensor, stats: Tensor, gradient: Tensor, skip_if_one: bool, **inputs: Any) -> None:
    if not skipped(upstream, skip_if_one):
        call = EagerCall(**inputs)
        gradient.copy_(call.gradient(upstream, call.divergence()[1]))


kd_loss = whole_loss(kd_row_weights, in_turn(kd_forward, kd_terms))


def _rows_and_names(
    student: Tensor, teacher: list[Tensor], distance: int, normalize: int
) -> tuple[Tensor, Tensor, Any, Any]:
    """The rows ``(N, H)`` in float64, and what the reference calls distance and normalisation."""
    x, y = student.flatten(0, 1).double(), torch.cat([piece.flatten(0, 1).double() for piece in teacher], -1)
    by = None if normalize == HiddenNormalize.NONE else HiddenNormalize(normalize).name.lower()
    return x, y, HiddenDistance(distance).name.lower(), by


def hidden_forward(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
    layer_weights: Tensor,
    gradient: list[Tensor],
    distance: int,
    normalize: int,
) -> tuple[Tensor, Tensor]:
    row_losses, stats = layers_and_stats(student)
    stats.zero_()  # which nothing here reads
    for j, (x, pieces) in enumerate(by_layer(student, teacher)):
        found = hidden.hidden_distance(*_rows_and_names(x, pieces, distance, normalize))
        w = torch.ones_like(found) if weights is None else weights.double()
        row_losses[j] = torch.where(w != 0, layer_weights[j] * w * found, 0)
    if gradient:
        inputs: dict[str, Any] = {"student": student, "teacher": teacher, "weights": weights, "normalizer": normalizer}
        inputs |= {"layer_weights": layer_weights, "stats": stats, "gradient": gradient}
        hidden_backward(row_losses.new_ones(()), **inputs, distance=distance, normalize=normalize, skip_if_one=False)
    return row_losses, stats


def hidden_backward(
    upstream: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
    layer_weights: Tensor,
    stats: Tensor,
    gradient: list[Tensor],
    distance: int,
    normalize: int,
    skip_if_one: bool,
) -> None:
    if skipped(upstream, skip_if_one):
        return
    for j, (x, pieces) in enumerate(by_layer(student, teacher)):
        if gradient[j].numel() == 0:
            continue
        compared = _rows_and_names(x, pieces, distance, normalize)
        w = torch.ones_like(compared[0][:, 0]) if weights is None else weights.double()
        scale = (layer_weights[j] * w * upstream.double() / normalizer).unsqueeze(-1)
        grad = torch.where(scale != 0, scale * hidden.hidden_gradient(*compared), 0)
        gradient[j].copy_(grad.view(x.shape))


def _layers(layers: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """``(layers, N, H)`` in float64. Rows that are not selected are 0, whatever they hold."""
    stacked = torch.stack([layer.flatten(0, 1).double() for layer in layers])
    return stacked if weights is None else torch.where((weights != 0).unsqueeze(-1), stacked, 0)


def layer_attention(
    upstream: Tensor | None,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
    buckets: Tensor,
    gradient: Tensor | None,
    teacher_gradient: Tensor | None,
    skip_if_one: bool,
) -> Tensor:
    x, y = _layers(student, weights), _layers(teacher, weights)
    losses, of_student, of_teacher = layers.layer_attention(x, y, buckets != 0)
    w = torch.ones_like(losses) if weights is None else weights.double()
    if upstream is None or not skipped(upstream, skip_if_one):
        scale = (w * (1.0 if upstream is None else upstream.double()) / normalizer).unsqueeze(-1)
        for to, of in ((gradient, of_student), (teacher_gradient, of_teacher)):
            if to is not None:
                to.copy_(torch.where(scale != 0, scale * of, 0).view(to.shape))
    return torch.where(w != 0, w * losses, 0).to(accumulation_dtype(student[0].dtype))


def layer_distances(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor | None, normalizer: Tensor
) -> Tensor:
    rows = layers.pairwise_mse(_layers(student, weights), _layers(teacher, weights))
    w = torch.ones_like(rows[:, 0, 0]) if weights is None else weights.double()
    return (torch.einsum("n,njk->jk", w, rows) / normalizer).to(accumulation_dtype(student[0].dtype))


def layer_distances_backward(
    upstream: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor | None,
    normalizer: Tensor,
) -> Tensor:
    x, y = _layers(student, weights), _layers(teacher, weights)
    gradient = layers.pairwise_mse_gradient(x, y, upstream) / normalizer
    if weights is not None:
        gradient *= weights.double().unsqueeze(-1)
    return gradient.to(student[0].dtype).view(len(student), *student[0].shape)


def gumbel_forward(logits: Tensor, seed: Tensor, temperature: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    noisy = _noisy(logits, seed, first_row)
    most = noisy.amax(1)
    total = ((noisy - most.unsqueeze(1)) / temperature).exp().sum(1)
    total = torch.where(most == -torch.inf, 0, total)  # of nothing but −inf
    return gumbel.choice(noisy), torch.stack([most, total], 1).to(logits.dtype)


def gumbel_backward(
    logits: Tensor,
    slopes: Tensor,
    ids: Tensor,
    stats: Tensor,
    seed: Tensor,
    temperature: Tensor,
    scale: Tensor,
    first_row: int,
) -> None:
    gradient = gumbel.relaxed_gradient(_noisy(logits, seed, first_row), slopes[0].double(), temperature)
    logits.copy_((gradient * (scale * temperature)).unsqueeze(0))


def _noisy(logits: Tensor, seed: Tensor, first_row: int) -> Tensor:
    """In float64, of sums in the logits' type: the order of columns is that of the kernels, ties included."""
    _, rows, columns = logits.shape
    return (logits[0] + gumbel.noise(seed, rows, columns, first_row)).double()
