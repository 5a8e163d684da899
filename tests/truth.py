"""The truth that kernels are held to, and the rule by which they are: the definitions in float64 on the same input.

The rule, row by row:

gradient  ‖error‖ ≤ 1.25 × ‖error of the true gradient rounded to the output's dtype‖ + 1e-6·S, S the sum of the norms
          of the terms subtracted, with their factors: KD ‖p‖ + ‖q‖ and what `bounds.py` adds to it, CE ‖q₁‖ + ‖1_y‖,
          hidden states ‖x̂‖ + ‖ŷ‖. Exactly 0 where S is 0.
value     |error| ≤ 1e-5·D + 1e-8·√D for KL and hidden states, and as in `bounds.py` for the other divergences,
          before T^k and weights; 1e-5·CE + 2e-7 for the cross-entropy, whose log l near 1 float32 does not resolve
          below 1.2e-7.

float64 is held to 1e-13·S and to 1e-11·D + 1e-14. A comparison that zeros would pass fails, unless zero is the truth.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import bounds
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedkd import TeacherLogits, TeacherSamples, TeacherTopK, hidden_loss, kd_loss
from fusedkd.backends.layout import KernelId
from fusedkd.divergences import resolve
from fusedkd.losses.kd import Teacher
from fusedkd.losses.options import DEFAULTS
from fusedkd.reference import hidden, softmax
from fusedkd.reference.divergences import Rows

INTERPRETED = os.environ.get("FUSEDKD_BACKEND") == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "ttsem" in sys.modules
"""Under `make sanitize`, which takes a millisecond for an operation on a block: long rows are few there."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Term(NamedTuple):
    """One term of a loss, reduced, and the error allowed to it."""

    value: Tensor
    tolerance: Tensor

    def __mul__(self, weight: float) -> Term:
        return Term(*(weight * x if weight else torch.zeros_like(x) for x in self))

    def plus(self, other: Term) -> Term:
        return Term(self.value + other.value, self.tolerance + other.tolerance)


class Truth(NamedTuple):
    """Float64 on the CPU. `subtracted` is S per row, `free` an error per element that is not counted."""

    loss: Term
    kd: Term
    ce: Term
    gradient: Tensor
    subtracted: Tensor
    free: Tensor | float = 0.0


def kd_truth(
    student: Tensor,
    teacher: Teacher | list[Teacher],
    labels: Tensor | None = None,
    *,
    upstream: Any = 1.0,
    **options: Any,
) -> Truth:
    """:func:`fusedkd.kd_loss` with these options, its terms, and its gradient times `upstream`."""
    given = {**DEFAULTS, **options}
    if isinstance(teacher, list):
        return _several(student, teacher, labels, given, upstream)
    assert given.keys() == DEFAULTS.keys()
    reduction, ignore_index, kd_mask = given["reduction"], given["ignore_index"], given["kd_mask"]
    smoothing, z_loss = float(given["label_smoothing"]), float(given["z_loss_weight"])
    family = resolve(given["divergence"])
    kd_weight, ce_weight = float(given["kd_weight"]), float(given["ce_weight"])
    t_s = float(given["temperature"])
    t_t = t_s if given["teacher_temperature"] is None else float(given["teacher_temperature"])
    t_k = t_s**family.temperature_power if given["scale_by_t2"] else 1.0
    exact = student.dtype == torch.float64

    z, slope = _capped(student, given["logit_softcap"], given["logit_scale"])
    y = None if labels is None else labels.cpu().flatten()
    sparse = isinstance(teacher, TeacherTopK | TeacherSamples)
    if sparse:
        columns = z.shape[1]
        values = teacher.weights if isinstance(teacher, TeacherSamples) else teacher.logprobs
        known = ((teacher.ids >= 0) & (values != -torch.inf)).cpu().reshape(-1, values.shape[-1])
    else:
        form = teacher if isinstance(teacher, TeacherLogits) else TeacherLogits(teacher)
        v, _ = _capped(form.logits, form.softcap, form.scale)
        columns = min(z.shape[1], v.shape[1])
        v = v[:, :columns]
        known = v != -torch.inf
    z_kd = z[:, :columns]

    def column(x: Tensor) -> Tensor:
        return x.unsqueeze(-1)

    labelled = torch.ones(len(z)) if y is None else (y != ignore_index).double()
    w, summed = labelled.double(), kd_mask is not None and kd_mask.is_floating_point()
    if kd_mask is not None:
        w = float64(kd_mask if summed else kd_mask != 0).flatten()
    if family.kernel_id == KernelId.DKD and not sparse:
        w = torch.where((y != ignore_index) & (y < columns), w, 0)
    w = torch.where(known.any(-1), w, 0)
    n_kd = _divisor(reduction, given["kd_normalizer"], w.sum() if summed else (w != 0).sum())
    n_ce = _divisor(reduction, given["ce_normalizer"], labelled.sum())

    gradient, free, subtracted = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(w)
    kd = ce = Term(subtracted, subtracted)
    if kd_weight:
        on, factor = w != 0, column(kd_weight * t_k / n_kd / t_s * w) * slope[:, :columns]
        log_q = softmax.log_softmax(z_kd / t_s)
        if sparse:
            part = bounds.listed(teacher, family, z_kd, log_q, t_t, exact)
        else:
            part = bounds.dense(family, Rows(softmax.log_softmax(v / t_t), log_q, v, z_kd, y), exact)
        kd = Term(*(torch.where(on, w * t_k * x, 0) for x in (part.value, part.tolerance)))
        gradient[:, :columns] += torch.where(column(on), factor * part.gradient, 0)
        subtracted = torch.where(on, factor.amax(-1) * part.subtracted, 0)
        if part.free is not None:
            free[:, :columns] = torch.where(column(on), factor * part.free, 0)
    if ce_weight:
        on, factor = labelled != 0, column(ce_weight / n_ce * labelled) * slope
        nll = torch.where(on, softmax.cross_entropy(z, y, smoothing, z_loss), 0)
        ce = Term(nll, labelled * (1e-11 * nll + 1e-14 if exact else 1e-5 * nll + 2e-7))
        full = softmax.cross_entropy_gradient(z, y, smoothing, z_loss)
        gradient += torch.where(column(on), factor * full, 0)
        target = torch.zeros_like(z).scatter_(1, column(y.clamp(0, z.shape[1] - 1)), 1)
        share = 1 + 2 * z_loss * z.logsumexp(-1, keepdim=True).abs().nan_to_num(0, 0, 0)
        for x in (share * softmax.log_softmax(z).exp(), target):
            subtracted = subtracted + torch.where(on, (factor * x).norm(dim=-1), 0)

    kd, ce = (_reduced(term, n, student, reduction) for term, n in ((kd, n_kd), (ce, n_ce)))
    loss = (kd * kd_weight).plus(ce * ce_weight)
    return Truth(loss, kd, ce, *_with_upstream(gradient, subtracted, free, upstream, student))


def _several(
    student: Tensor, teachers: list[Teacher], labels: Tensor | None, options: dict[str, Any], upstream: Any
) -> Truth:
    """Σ w_m·D(p_m, q) + CE once."""
    weights, kd_weight, ce_weight = options["teacher_weights"], float(options["kd_weight"]), options["ce_weight"]
    given = [1 / len(teachers)] * len(teachers) if weights is None else [float(w) for w in weights]
    shared = {**options, "teacher_weights": None, "upstream": upstream}
    first, *rest = (
        kd_truth(student, t, labels, **{**shared, "kd_weight": kd_weight * w, "ce_weight": 0.0 if i else ce_weight})
        for i, (t, w) in enumerate(zip(teachers, given, strict=True))
    )
    total = first._replace(kd=first.kd * given[0])
    for part, weight in zip(rest, given[1:], strict=True):
        total = Truth(
            total.loss.plus(part.loss),
            total.kd.plus(part.kd * weight),
            total.ce,
            *(a + b for a, b in zip(total[3:], part[3:], strict=True)),
        )
    return total


def hidden_truth(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    distance: Any = "mse",
    normalize: Any = None,
    reduction: str = "mean",
    normalizer: Any = None,
    upstream: Any = 1.0,
) -> Truth:
    """:func:`fusedkd.hidden_loss` with these arguments, and its gradient times `upstream`."""
    x, y = (_rows(t) for t in (student, teacher))
    w = torch.ones(len(x), dtype=torch.float64)
    count: Any = len(x)
    if mask is not None:
        w = float64(mask if mask.is_floating_point() else mask != 0).flatten()
        count = w.sum()
    n, on = _divisor(reduction, normalizer, count), w != 0
    value = torch.where(on, hidden.hidden_distance(x, y, distance, normalize), 0)
    rows = Term(w * value, w * bounds.tolerance(value, student.dtype == torch.float64))
    factor = (w / n).unsqueeze(-1)
    slope = hidden.hidden_gradient(x, y, distance, normalize)
    gradient = torch.where(on.unsqueeze(-1), factor * slope, 0)
    subtracted = torch.where(on, factor.squeeze(-1) * _terms(x, y, slope, distance, normalize), 0)
    loss = _reduced(rows, n, student, reduction)
    scaled = _with_upstream(gradient, subtracted, torch.zeros(()), upstream, student)
    return Truth(loss, loss, loss, *scaled)


def _terms(x: Tensor, y: Tensor, slope: Tensor, distance: str, normalize: Any) -> Tensor:
    """S of a distance of hidden states: k·a·(‖x̂‖ + ‖ŷ‖), or of rows as they are the gradient's own norm."""
    if normalize is None and distance != "cosine":
        return slope.norm(dim=-1)
    a = torch.ones_like(x[:, :1])
    k = {"mse": 2 / x.shape[1], "smooth_l1": 1 / x.shape[1], "cosine": 1.0}[distance]
    if normalize is not None and (normalize, distance) != ("l2", "cosine"):
        a = hidden.inverse_norm(x) if normalize == "l2" else hidden.inverse_deviation(x)
        x, y = hidden.normalized(x, normalize), hidden.normalized(y, normalize)
    if distance == "cosine":
        a = a * hidden.inverse_norm(x)
        x, y = hidden.normalized(x, "l2"), hidden.normalized(y, "l2")
    return k * a.squeeze(-1) * (x.norm(dim=-1) + y.norm(dim=-1))


def float64(x: Any) -> Tensor:
    return torch.as_tensor(x).detach().to("cpu", torch.float64)


def _rows(x: Tensor) -> Tensor:
    return float64(x).reshape(x.shape[:-1].numel(), x.shape[-1])


def _capped(logits: Tensor, softcap: Any, scale: Any) -> tuple[Tensor, Tensor]:
    """The logits as ``(N, V)`` after soft-cap and scale, and the slope of these at each."""
    x = _rows(logits)
    options = float(softcap or 0.0), 1.0 if scale is None else float(scale)
    return softmax.cap_and_scale(x, *options), softmax.cap_and_scale_derivative(x, *options)


def _divisor(reduction: str, normalizer: Any, count: Any) -> float:
    n = float(count if normalizer is None else normalizer) if reduction == "mean" else 1.0
    return n if n > 0 else 1.0


def _reduced(rows: Term, n: float, student: Tensor, reduction: str) -> Term:
    return Term(*(x.view(student.shape[:-1]) if reduction == "none" else x.sum() / n for x in rows))


def _with_upstream(
    gradient: Tensor, subtracted: Tensor, free: Tensor, upstream: Any, student: Tensor
) -> tuple[Tensor, Tensor, Tensor | float]:
    factor = float64(upstream).flatten()
    column, lead = factor.unsqueeze(-1), student.shape[:-1]
    scaled = (free * column.abs()).view(student.shape) if free.any() else 0.0
    return (gradient * column).view(student.shape), (subtracted * factor.abs()).view(lead), scaled


# -------------------------------------------------- the rule


def assert_value(actual: Tensor, expected: Term, *, vacuous: bool = False) -> None:
    value, tolerance = expected
    actual = float64(actual)
    assert actual.shape == value.shape
    same = (actual == value) | (actual.isnan() & value.isnan())
    wrong = ~same & ~((actual - value).abs() <= torch.where(value.isfinite(), tolerance, 0))
    assert not wrong.any(), f"{actual[wrong][:4]} is not {value[wrong][:4]} within {tolerance[wrong][:4]}"
    assert vacuous or bool((~value.isfinite() | (value.abs() > 2 * tolerance)).any()), "zero would pass"


def assert_gradient(actual: Tensor, expected: Truth, *, vacuous: bool = False) -> None:
    truth, subtracted = expected.gradient, expected.subtracted
    assert actual.shape == truth.shape
    on, exact = subtracted != 0, actual.dtype == torch.float64
    got = float64(actual)
    assert not got[~on].any(), "a row without a term has a gradient"
    error = ((got - truth).abs() - expected.free).clamp(min=0).norm(dim=-1)
    rounding = 1.25 * (float64(truth.to(actual.dtype)) - truth).norm(dim=-1)
    if INTERPRETED and actual.dtype == torch.bfloat16:
        rounding = 2.0**-7 * truth.norm(dim=-1)  # the interpreter's casts truncate
    bound = rounding + (1e-13 if exact else 1e-6) * subtracted
    wrong = on & ~(error <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {int(on.sum())} rows, worst {float((error / bound)[wrong].max()):.3g} × the bound; "
        f"errors {error[wrong][:4]}, bounds {bound[wrong][:4]}, norms {truth.norm(dim=-1)[wrong][:4]}"
    )
    size = (truth.abs() - expected.free).clamp(min=0).norm(dim=-1)
    assert vacuous or bool((size > 2 * bound)[on].any()), "an all-zero gradient would pass"


def check_kd(
    student: Tensor,
    teacher: Teacher | list[Teacher],
    labels: Tensor | None = None,
    *,
    upstream: Any = 1.0,
    vacuous: bool = False,
    **options: Any,
) -> Truth:
    """Loss, terms and gradient of one call by the rule; the strides of `student` are those the kernel sees."""
    truth = kd_truth(student, teacher, labels, upstream=upstream, **options)
    leaf = student.detach().requires_grad_()
    loss, terms = kd_loss(leaf, teacher, labels, return_terms=True, **options)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    for actual, expected in zip((loss, *terms), truth, strict=False):
        assert_value(actual, expected, vacuous=vacuous or expected is not truth.loss)
    assert not terms.kd.requires_grad
    assert not terms.ce.requires_grad
    (gradient,) = torch.autograd.grad(loss, leaf, torch.as_tensor(upstream).to(loss).expand_as(loss))
    assert gradient.dtype == student.dtype
    assert_gradient(gradient, truth, vacuous=vacuous)
    return truth


def check_hidden(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    upstream: Any = 1.0,
    vacuous: bool = False,
    pieces: int = 1,
    **options: Any,
) -> Truth:
    """Loss and gradient of one call by the rule; `pieces`: into so many the teacher is cut."""
    truth = hidden_truth(student, teacher, mask, upstream=upstream, **options)
    leaf = student.detach().requires_grad_()
    given = teacher if pieces == 1 else [part.contiguous() for part in teacher.tensor_split(pieces, -1)]
    loss = hidden_loss(leaf, given, mask, **options)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert_value(loss, truth.loss, vacuous=vacuous)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.as_tensor(upstream).to(loss).expand_as(loss))
    assert gradient.dtype == student.dtype
    assert_gradient(gradient, truth, vacuous=vacuous)
    return truth


# -------------------------------------------------- input


def pair(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    noise: float = 1.0,
    offset: float = 0.0,
    seed: int = 0,
    teacher_dtype: torch.dtype | None = None,
    teacher_columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Student and teacher rows of spread 2: teacher + `noise` is the student, both around `offset`."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    student = teacher + noise * torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    if teacher_columns is not None:
        surplus = torch.randn(*shape[:-1], max(0, teacher_columns - shape[-1]), generator=generator)
        teacher = torch.cat([teacher, surplus], -1)[..., :teacher_columns]
    return student.to(device, dtype), (teacher + offset).to(device, teacher_dtype or dtype)


def between_nans(rows: Tensor, before: int = 11, after: int = 6) -> Tensor:
    """The same values [B, L, n] in rows that nothing aligns, with NaN before and after each, and a gap per batch."""
    stride = before + rows.shape[2] + after
    buffer = torch.full((rows.shape[0], rows.shape[1] * stride + 3), torch.nan, dtype=rows.dtype, device=rows.device)
    view = buffer[:, : rows.shape[1] * stride].unflatten(1, (-1, stride))[:, :, before : before + rows.shape[2]]
    view.copy_(rows)
    return view


def targets(*shape: int, classes: int, device: str = "cpu", ignored: int | None = -100, seed: int = 1) -> Tensor:
    """Random labels; every third is ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, shape, generator=generator)
    if ignored is not None:
        labels.view(-1)[2::3] = ignored
    return labels.to(device)


def noise_for(kl: float, temperature: float = 1.0) -> float:
    """The noise between logits that makes KL(p‖q) about `kl` at this temperature: half its variance."""
    return temperature * (2 * kl) ** 0.5


@contextmanager
def operator_calls() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The fusedkd operators that did their work inside, with their arguments by name. One that raised did not."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function.namespace == "fusedkd":
                calls.append((function._opname, kwargs))
            return result

    with Record():
        yield calls
