"""Rows for the KD operators of Triton, and the check of them against the definitions in float64 by the rule of
`truth.py`, for `triton_operators.py` and `triton_launches.py`, under the interpreter.

The interpreter rounds bfloat16 towards zero, which no GPU does, and multiplies its bits as if they were integers: its
cast is replaced by PyTorch's, operands of products are converted first, and bfloat16 is held to the rule like all
else. Stray reads do not fault here, so every row lies between NaNs. Blocks are of 512 columns, so that short rows have
several.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import operators
import pytest
import torch
import triton.language as tl
from bounds import dense, norm
from families import describe
from operators import Inputs, options_tensor
from torch import Tensor
from triton.runtime import interpreter
from truth import between_nans

from fusedkd import DKD, JSD, AlphaBeta, Jeffreys, LogitMSE, TotalVariation
from fusedkd.backends import eager
from fusedkd.backends.layout import KernelId, Option
from fusedkd.backends.triton import choice, kd, launch
from fusedkd.divergences import Divergence, ForwardKL
from fusedkd.reference.divergences import Rows
from fusedkd.reference.softmax import cap_and_scale, log_softmax

NAN, INF = float("nan"), float("inf")
B, L = 2, 3
LABELS = (5, 0, -100, 3, -100, 2)  # modulo V
WEIGHTS = (1.0, 0.0, 1.0, 0.25, 0.0, 1.0)  # with the labels: both terms, CE alone, KD alone, weighted, neither, both
KERNELS = {"whole": 1, "resident": 1, "split": 3}  # and into how many parts a row is split
FORMS = [ForwardKL(), Jeffreys(0.3, 1.2), JSD(0.3), AlphaBeta(), TotalVariation(), LogitMSE(0.9), DKD()]


def in_turn(first: int) -> pytest.MarkDecorator:
    """The forms, each with one of the kernels."""
    pairs = [(form, [*KERNELS][(first + i) % 3]) for i, form in enumerate(FORMS)]
    return pytest.mark.parametrize(("divergence", "kernel"), pairs, ids=describe)


truncating = interpreter._convert_float


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
    if (source, target) != (tl.float32, tl.bfloat16):
        return truncating(data, source, target, mode)
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = convert
multiplying = interpreter.InterpreterBuilder.create_dot


def dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
    a, b = (self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
    return multiplying(self, a, b, *more)


interpreter.InterpreterBuilder.create_dot = dot


def surroundings(view: Tensor) -> Tensor:
    """The buffer of `between_nans` with the rows themselves blanked out."""
    base = view._base.clone()
    base.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(0)
    return base


def logits(V: int, kl: float = 0.1, b: int = 1) -> tuple[Tensor, Tensor]:
    """Float64 student and teacher about `kl` apart at T = 1."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(b, L, V, generator=generator, dtype=torch.float64)
    return teacher + (2 * kl) ** 0.5 * torch.randn(b, L, V, generator=generator, dtype=torch.float64), teacher


def inputs_of(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    options: Tensor | None = None,
    normalizers: tuple[float, float] = (1.0, 1.0),
    *,
    transform: bool = False,
    ce: bool = True,
) -> Inputs:
    return {
        "student": student,
        "teacher": teacher,
        "ids": None,
        "labels": labels,
        "row_weights": weights,
        "options": options_for(divergence) if options is None else options,
        "normalizers": torch.tensor(normalizers, dtype=torch.float64),
        "ignore_index": -100,
        "kernel_id": int(divergence.kernel_id),
        "transform": transform,
        "ce": ce,
    }


def options_for(
    divergence: Divergence,
    temperature: float = 2.0,
    weights: tuple[float, float] = (0.6, 0.8),
    rest: Any = (),
    z_loss: float = 0.0,
) -> Tensor:
    """The options tensor; `rest`: teacher temperature, smoothing, soft-caps and scales, which may be missing."""
    names = ("teacher_temperature", "label_smoothing", "softcap", "scale", "teacher_softcap", "teacher_scale")
    given = dict(zip(names, (*rest, *(temperature, 0.0, NAN, NAN, NAN, NAN)[len(rest) :]), strict=True))
    return options_tensor(
        divergence.coefficients(),
        temperature=temperature,
        kd_scale=temperature**divergence.temperature_power,
        kd_weight=weights[0],
        ce_weight=weights[1],
        z_loss_weight=z_loss,
        **given,
    )


def check(
    student: Tensor,
    teacher: Tensor,
    *,
    divergence: Divergence = FORMS[0],
    kernel: str = "whole",
    labels: tuple[int, ...] | None = LABELS,
    weights: tuple[float, ...] = WEIGHTS,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    transforms: tuple[float, float, float, float] | None = None,
    ce: bool = True,
    in_place: bool = False,
    small_blocks: bool = True,
) -> tuple[Tensor, Tensor]:
    """Forward and backward on these rows by the rule, on request also what writes in place, and the forward call
    without gradient. Returns rows and gradient for more.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "choose", lambda *_: (kernel, KERNELS[kernel]))
        if small_blocks and kernel != "resident":
            patch.setattr(
                kd, "layout", lambda dtype, V, *form, **flags: choice.layout(dtype, min(V, 512), *form, **flags)
            )
        return _check(
            *(student, teacher, divergence, labels, weights, temperature, teacher_temperature, smoothing, z_loss),
            transforms,
            ce and labels is not None,
            in_place,
        )


def _check(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    labels: tuple[int, ...] | None,
    weights: tuple[float, ...],
    temperature: float,
    teacher_temperature: float | None,
    smoothing: float,
    z_loss: float,
    transforms: tuple[float, float, float, float] | None,
    ce: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    n, V, C = student.shape[0] * student.shape[1], student.shape[2], teacher.shape[2]
    student, teacher = between_nans(student), between_nans(teacher, before=11 if V % 2 else 4)
    y = None if labels is None else torch.tensor([i % V if 0 <= i < 10 else i for i in labels[:n]])
    w = torch.tensor(weights[:n])
    if divergence.kernel_id == KernelId.DKD:
        w = torch.where((y >= 0) & (y < C), w, 0)
    if divergence.kernel_id == KernelId.LOGIT_MSE:
        temperature, teacher_temperature = 1.0, None
    rest = teacher_temperature or temperature, smoothing, *(transforms or ())
    options = options_for(divergence, temperature, rest=rest, z_loss=z_loss)
    kd_scale, kd_weight, ce_weight, n_kd, n_ce = options[Option.KD_SCALE].item(), 0.6, 0.8, 3.5, 4.0
    inputs = inputs_of(
        divergence, student, teacher, y, w, options, (n_kd, n_ce), transform=transforms is not None, ce=ce
    )
    wide = inputs | {"student": student.double()}
    exact = student.dtype == torch.float64

    # What is true, and how far off one may be: values
    z, v = student.double().flatten(0, 1), teacher.double().flatten(0, 1)
    if transforms is not None:
        z, v = cap_and_scale(z, *transforms[:2]), cap_and_scale(v, *transforms[2:])
    kd_rows = Rows(
        log_softmax(v / options[Option.TEACHER_TEMPERATURE]),
        log_softmax(z[:, :C] / options[Option.TEMPERATURE]),
        v,
        z[:, :C],
        y,
    )
    part = dense(divergence, kd_rows, exact)
    expected, _ = operators.truth(inputs, gradient=False)
    rows, stats, gradient = operators.forward(inputs, ops=launch)
    assert_close(rows[0].double(), expected[0], kd_scale * w * torch.nan_to_num(part.tolerance))
    assert_close(rows[1].double(), expected[1], 1e-11 * expected[1] + 1e-14 if exact else 1e-5 * expected[1] + 2e-7)

    # Gradients, and S: the norms of the terms subtracted
    slope = 1.0 if transforms is None else transforms[1]
    factor = slope * kd_weight * kd_scale / n_kd * w / temperature
    s = torch.where(w != 0, factor * part.subtracted, 0)
    free = torch.zeros_like(z)
    if part.free is not None:
        free[:, :C] = torch.where(w.unsqueeze(-1) != 0, factor.unsqueeze(-1) * part.free, 0)
    if ce:
        share = 1 + 2 * z_loss * z.logsumexp(-1).nan_to_num(0, 0, 0).abs()
        s += torch.where(y != -100, slope * ce_weight / n_ce * (share * norm(log_softmax(z).exp()) + 1), 0)

    def assert_gradient(actual: Tensor, upstream: Tensor) -> None:
        up = upstream.double()
        truth = operators.backward(up, wide, stats.double(), eager).flatten(0, 1)
        got = actual.double().flatten(0, 1)
        rounding = norm(truth.to(actual.dtype).double() - truth)
        bound = 1.25 * rounding + (1e-13 if exact else 1e-6) * s * up.abs()
        allowed = free * up.abs().unsqueeze(-1)
        error = norm(((got - truth).abs() - allowed.nan_to_num()).clamp(min=0))
        assert (error <= bound).all(), f"{error / bound}"
        assert not got[norm(truth) == 0].any()
        if V > 1:
            size = norm((truth.abs() - allowed.nan_to_num()).clamp(min=0))
            assert (size > 2 * bound).any(), "zero would pass"

    one = torch.ones((), dtype=stats.dtype)
    upstream = torch.tensor([1.0, -0.3, 2.0, 0.7, 5.0, 0.0], dtype=stats.dtype)[:n]
    assert_gradient(gradient, one)
    assert_gradient(operators.backward(upstream, inputs, stats, launch), upstream)
    if not in_place:
        return rows, gradient

    # The same bits again, and nothing outside the rows
    only, same, _ = operators.forward(inputs, gradient=False, ops=launch)
    assert torch.equal(rows.nan_to_num(-1), only.nan_to_num(-1))
    assert torch.equal(stats.nan_to_num(-1), same.nan_to_num(-1))
    scaled = operators.backward(one * 0.3, inputs, stats, launch)
    assert_gradient(scaled, one * 0.3)
    target = between_nans(gradient)
    poison = {"student": torch.full_like(student, NAN), "teacher": torch.full_like(teacher, NAN)}
    operators.rescale_(target, one, inputs | poison, stats * NAN, launch)
    assert torch.equal(target, gradient)
    operators.rescale_(target, one * 0.3, inputs, stats, launch)
    assert torch.equal(target, scaled)
    assert surroundings(target).isnan().sum() == target._base.numel() - target.numel()
    overwritten = between_nans(student)
    again, same = operators.forward_(inputs | {"student": overwritten}, launch)
    assert torch.equal(overwritten, gradient)
    assert torch.equal(again.nan_to_num(-1), rows.nan_to_num(-1))
    assert torch.equal(same.nan_to_num(-1), stats.nan_to_num(-1))
    assert surroundings(overwritten).isnan().sum() == overwritten._base.numel() - overwritten.numel()
    return rows, gradient


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = ~same & ~((actual - expected).abs() <= torch.where(expected.isfinite(), tolerance, 0))
    assert not wrong.any(), f"{actual[wrong]} is not {expected[wrong]} within {tolerance[wrong]}"
