"""The options of a call as kernels read them: each group where it is first used, for what is read early occupies a
register of every thread until then.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import (
    CE_WEIGHT,
    COEFFICIENTS,
    KD_SCALE,
    KD_WEIGHT,
    LABEL_SMOOTHING,
    SCALE,
    SOFTCAP,
    TEACHER_SCALE,
    TEACHER_SOFTCAP,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
    Z_LOSS_WEIGHT,
)
from fusedkd.backends.triton.math import LOG2E


class Options(NamedTuple):
    """What every pass needs: scalars of :class:`fusedkd.backends.layout.Option`. Only what is used is loaded."""

    temperature: Any
    teacher_temperature: Any
    softcap: Any
    scale: Any
    teacher_softcap: Any
    teacher_scale: Any
    label_smoothing: Any


class Weights(NamedTuple):
    """What values and gradients need."""

    kd_scale: Any
    kd_weight: Any
    ce_weight: Any
    label_smoothing: Any
    z_loss_weight: Any


class Coefficients(NamedTuple):
    """Of the divergence."""

    a0: Any
    a1: Any
    a2: Any
    a3: Any
    a4: Any
    a5: Any
    a6: Any


@triton.jit
def options_of(real_options, i_row, options_stride):
    """Those of a row: `options_stride` is 0 where all share them."""
    return real_options + i_row.to(tl.int64) * options_stride


@triton.jit
def load_options(real_options, A: tl.constexpr):
    return Options(
        temperature=tl.load(real_options + TEMPERATURE).to(A),
        teacher_temperature=tl.load(real_options + TEACHER_TEMPERATURE).to(A),
        softcap=tl.load(real_options + SOFTCAP).to(A),
        scale=tl.load(real_options + SCALE).to(A),
        teacher_softcap=tl.load(real_options + TEACHER_SOFTCAP).to(A),
        teacher_scale=tl.load(real_options + TEACHER_SCALE).to(A),
        label_smoothing=tl.load(real_options + LABEL_SMOOTHING).to(A),
    )


@triton.jit
def load_weights(real_options, A: tl.constexpr):
    return Weights(
        kd_scale=tl.load(real_options + KD_SCALE).to(A),
        kd_weight=tl.load(real_options + KD_WEIGHT).to(A),
        ce_weight=tl.load(real_options + CE_WEIGHT).to(A),
        label_smoothing=tl.load(real_options + LABEL_SMOOTHING).to(A),
        z_loss_weight=tl.load(real_options + Z_LOSS_WEIGHT).to(A),
    )


@triton.jit
def load_coefficients(real_options, A: tl.constexpr):
    return Coefficients(
        a0=tl.load(real_options + COEFFICIENTS).to(A),
        a1=tl.load(real_options + COEFFICIENTS + 1).to(A),
        a2=tl.load(real_options + COEFFICIENTS + 2).to(A),
        a3=tl.load(real_options + COEFFICIENTS + 3).to(A),
        a4=tl.load(real_options + COEFFICIENTS + 4).to(A),
        a5=tl.load(real_options + COEFFICIENTS + 5).to(A),
        a6=tl.load(real_options + COEFFICIENTS + 6).to(A),
    )


@triton.jit
def exponent_scale(temperature):
    """k: e^{x/T} = 2^{k·x}."""
    return 1.0 / temperature * LOG2E


@triton.jit
def power_of(temperature):
    """T where e^x is a power of e^{x/T} that costs a multiplication or two, else 0: for `math.exp_at_one`."""
    cheap = (temperature == 1) | (temperature == 2) | (temperature == 4)
    return tl.where(cheap, temperature, 0).to(tl.int32)
