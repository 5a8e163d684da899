"""Rows whose teacher is known at K columns, and the check of a backend's KD operators on them against the definitions
in float64 by the rule of `truth.py`; for `test_topk_kernels.py` (C++) and `triton_topk_operators.py` (Triton,
interpreted).

Σ p·δ over the list alone (ignore) and Σ −ω·log q (samples) have terms of both signs, or no upper bound from D: their
tolerance is that of the cross-entropy, 1e-5·D + 2e-7 of the mass on the list, for log l is rounded at 6e-8. The δ of a
bucket is the logarithm of a float32 sum: 1e-6·√D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import operators
import torch
from operators import Inputs, options_tensor
from torch import Tensor

from fusedkd.backends import eager
from fusedkd.backends.layout import REVERSE, Option, TopkKernelId
from fusedkd.reference.softmax import cap_and_scale, log_softmax

NAN, INF = float("nan"), float("inf")
B, L = 2, 3
N = B * L
LABELS = (5, 0, -100, 3, -100, 2)  # modulo V
WEIGHTS = (1.0, 0.0, 1.0, 0.25, 0.0, 1.0)  # with the labels: both terms, CE alone, KD alone, weighted, neither, both
CANCELLING = (TopkKernelId.IGNORE, TopkKernelId.IGNORE_REVERSE, TopkKernelId.SAMPLES)


class Case(NamedTuple):
    student: Tensor  # [B, L, V]
    teacher: Tensor  # [B, L, K]
    ids: Tensor  # [N, K]


def case(
    form: int, V: int, K: int, *, noise: float = 0.5, temperature: float = 1.0, spread: float = 3.0, seed: int = 0
) -> Case:
    """Float64 rows: the teacher is the student but for `noise`; its K likeliest columns in random order, one of them
    padding (anywhere), for samples K draws, with repetition.
    """
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(N, V, generator=generator, dtype=torch.float64)
    teacher = student + noise * torch.randn(N, V, generator=generator, dtype=torch.float64)
    lp = (teacher / temperature).log_softmax(-1)
    if form == TopkKernelId.SAMPLES:
        ids = torch.multinomial(lp.exp(), K, replacement=True, generator=generator)
        values = torch.rand(N, K, generator=generator, dtype=torch.float64) / K
    else:
        ids = teacher.topk(K).indices
        ids = ids.gather(1, torch.rand(N, K, generator=generator).argsort(-1))
        values = lp.gather(1, ids)
    if K > 1:
        ids[:, K // 3] = -1
        values[:, K // 3] = NAN  # padding is not read
    return Case(student.view(B, L, V), values.view(B, L, K), ids)


def between_nans(rows: Tensor, before: int = 11, after: int = 6) -> Tensor:
    """The same values [B, L, n] in rows that nothing aligns, with NaN before and after each, and a gap per batch."""
    stride = before + rows.shape[2] + after
    buffer = torch.full((rows.shape[0], rows.shape[1] * stride + 3), NAN, dtype=rows.dtype)
    view = buffer[:, : rows.shape[1] * stride].unflatten(1, (-1, stride))[:, :, before : before + rows.shape[2]]
    return view.copy_(rows)


def outside_is_nan(view: Tensor) -> bool:
    base = view._base.clone()
    base.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(0)
    return bool(base.isnan().sum() == view._base.numel() - view.numel())


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def inputs_of(
    form: int,
    rows: Case,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor,
    normalizers: Tensor,
    transform: bool = False,
) -> Inputs:
    """Cross-entropy where there are labels."""
    return rows._asdict() | {
        "labels": labels,
        "row_weights": weights,
        "options": options,
        "normalizers": normalizers,
        "ignore_index": -100,
        "kernel_id": int(form),
        "transform": transform,
        "ce": labels is not None,
    }


def check(
    ops: Any,
    form: int,
    rows: Case,
    dtype: torch.dtype = torch.float32,
    *,
    teacher_dtype: torch.dtype | None = None,
    labels: tuple[int, ...] | None = LABELS,
    weights: tuple[float, ...] = WEIGHTS,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logprobs_temperature: float = 1.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    transform: tuple[float, float] | None = None,
    all_four: bool = False,
) -> tuple[Tensor, Tensor]:
    """Forward and backward on these rows by the rule; on request what the other operators say too, to the bit. Returns
    rows and gradient for more.
    """
    V = rows.student.shape[2]
    student = between_nans(rows.student.to(dtype))
    teacher = between_nans(rows.teacher.to(teacher_dtype or dtype), before=4)
    y = None if labels is None else torch.tensor([i % V if 0 <= i < 10 else i for i in labels])
    w = torch.tensor(weights)
    kd_scale, kd_weight, ce_weight, n_kd, n_ce = temperature**2, 0.6, 0.8, 3.5, 4.0
    options = options_tensor(
        [logprobs_temperature] if form < TopkKernelId.SAMPLES else [],
        NAN,  # what is not meant for a call is not read
        temperature=temperature,
        teacher_temperature=teacher_temperature or temperature,
        kd_scale=kd_scale,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=smoothing,
        z_loss_weight=z_loss,
        **({"softcap": transform[0], "scale": transform[1]} if transform else {}),
    )
    normalizers = torch.tensor([n_kd, n_ce], dtype=torch.float64)
    inputs = inputs_of(form, Case(student, teacher, rows.ids), y, w, options, normalizers, transform is not None)
    wide = inputs | {"student": student.double()}

    # Values
    found, stats, gradient = operators.forward(inputs, ops=ops)
    assert found.dtype == stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth, _ = operators.truth(inputs, gradient=False)
    subtracted, mass = sizes(form, wide, transform)
    divergence = truth[0].abs() / kd_scale
    if dtype == torch.float64:
        tolerance = 1e-11 * divergence + 1e-14 + 1e-13 * mass * w
        tolerance_ce = 1e-11 * truth[1] + 1e-14
    else:
        root = 1e-6 if form in (TopkKernelId.BUCKET, TopkKernelId.BUCKET_REVERSE) else 1e-8
        extra = 2e-7 * mass * w if form in CANCELLING else root * w * (divergence / w).nan_to_num().sqrt()
        tolerance = 1e-5 * divergence + extra + 1e-15  # the definition's own last bit
        tolerance_ce = 1e-5 * truth[1] + 2e-7
    assert_close(found[0].double() / kd_scale, truth[0] / kd_scale, tolerance)
    assert_close(found[1].double(), truth[1], tolerance_ce)

    # Gradients
    slope = transform[1] if transform else 1.0
    s = torch.where(w != 0, slope * kd_weight * temperature / n_kd * w * subtracted, 0)
    if y is not None:
        z = student.double().flatten(0, 1)
        q_1 = log_softmax(cap_and_scale(z, *transform) if transform else z).exp()
        share = 1 + 2 * z_loss * (cap_and_scale(z, *transform) if transform else z).logsumexp(-1).abs()
        s += torch.where(y != -100, slope * ce_weight / n_ce * (share * q_1.norm(dim=1) + 1), 0)

    def assert_gradient(actual: Tensor, upstream: Tensor) -> None:
        assert actual.dtype == dtype
        up = upstream.double()
        expected = operators.backward(up, wide, stats, eager).flatten(0, 1)
        got = actual.double().flatten(0, 1)
        rounding = (expected.to(dtype).double() - expected).norm(dim=1)
        bound = 1.25 * rounding + (1e-13 if dtype == torch.float64 else 1e-6) * s * up.abs()
        error = (got - expected).norm(dim=1)
        assert (error <= bound).all(), f"{error / bound}"
        equal = (w != 0) & (truth[0] == 0)  # p = q in float64: what float32 leaves of it is within the bound
        assert not got[(expected.norm(dim=1) == 0) & ~equal].any()
        if V > 1 and expected.any():
            assert (expected.norm(dim=1) > 2 * bound).any(), "zero would pass"

    one = torch.ones((), dtype=stats.dtype)
    upstream = torch.tensor([1.0, -0.3, 2.0, 0.7, 5.0, 0.0], dtype=stats.dtype)
    assert_gradient(gradient, one)
    assert_gradient(operators.backward(upstream, inputs, stats, ops), upstream)
    if not all_four:
        return found, gradient

    # The same bits again, and nothing outside the rows
    only, again, _ = operators.forward(inputs, gradient=False, ops=ops)
    assert same(only, found)
    assert same(again, stats)
    assert same(operators.backward(one, inputs, stats, ops), gradient)
    scaled = operators.backward(one * 0.3, inputs, stats, ops)
    assert_gradient(scaled, one * 0.3)
    target = between_nans(gradient)
    poison = {"student": torch.full_like(student, NAN), "teacher": torch.full_like(teacher, NAN)}
    operators.rescale_(target, one, inputs | poison, stats * NAN, ops)
    assert same(target, gradient)
    operators.rescale_(target, one * 0.3, inputs, stats, ops)
    assert same(target, scaled)
    assert outside_is_nan(target)
    overwritten = between_nans(student)
    in_place, stats_in_place = operators.forward_(inputs | {"student": overwritten}, ops)
    assert same(overwritten, gradient)
    assert same(in_place, found)
    assert same(stats_in_place, stats)
    assert outside_is_nan(overwritten)
    return found, gradient


def sizes(form: int, inputs: Inputs, transform: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Per row the sum of the norms of what the gradient with respect to z/T subtracts; and the mass on the list."""
    ids, options = inputs["ids"], inputs["options"]
    z, v = inputs["student"].flatten(0, 1), inputs["teacher"].flatten(0, 1).double()
    log_q = log_softmax((cap_and_scale(z, *transform) if transform else z) / options[Option.TEMPERATURE])
    legal = (ids >= 0) & (ids < z.shape[1])
    column = torch.where(legal, ids, 0)
    q, q_k, lq_k = log_q.exp(), torch.where(legal, log_q.exp().gather(1, column), 0), log_q.gather(1, column)
    if form == TopkKernelId.SAMPLES:
        p = torch.where(legal, v, 0)
        return p.sum(1) * (q.norm(dim=1) + 1), p.sum(1)
    lp = torch.where(legal, v, -INF)
    if form in (TopkKernelId.RENORMALIZE, TopkKernelId.RENORMALIZE_REVERSE):
        lp = log_softmax(lp * options[Option.COEFFICIENTS] / options[Option.TEACHER_TEMPERATURE])
    p = lp.exp()
    listed = q_k.sum(1)
    if form == TopkKernelId.RENORMALIZE_REVERSE:
        q, lq_k = q_k / q_k.sum(1, keepdim=True), log_softmax(torch.where(legal, lq_k, -INF))
        q_k = q
    forward = p.norm(dim=1) + p.sum(1).clamp(min=1) * q.norm(dim=1)
    if form == TopkKernelId.BUCKET:  # the complement's share, at most
        forward = forward + (1 - p.sum(1)).clamp(min=0)
    w_k = torch.where(q_k == 0, 0, q_k * (1 + (lq_k - lp).abs()).nan_to_num(0, 0, 0))
    reverse = w_k.norm(dim=1) + w_k.sum(1).abs() * q.norm(dim=1) + q.norm(dim=1) + p.norm(dim=1)
    is_reverse = form in REVERSE
    return (reverse if is_reverse else forward), (listed if is_reverse else p.sum(1))


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    equal = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = ~equal & ~((actual - expected).abs() <= torch.where(expected.isfinite(), tolerance, 0))
    assert not wrong.any(), f"{actual[wrong]} is not {expected[wrong]} within {tolerance[wrong]}"


def run(ops: Any, form: int, rows: Case, **options: Any) -> tuple[Tensor, Tensor]:
    """Values and gradient, unchecked."""
    y = torch.tensor(options.get("labels", LABELS))
    w = torch.tensor(options.get("weights", WEIGHTS))
    ones = dict.fromkeys(("temperature", "teacher_temperature", "kd_scale", "scale", "teacher_scale"), 1.0)
    numbers = options_tensor([1.0], kd_weight=0.6, ce_weight=0.8, **ones)
    rows = rows._replace(student=rows.student.float(), teacher=rows.teacher.float())
    inputs = inputs_of(form, rows, y, w, numbers, torch.ones(2, dtype=torch.float64))
    found, _, gradient = operators.forward(inputs, ops=ops)
    return found, gradient
