"""What the KD losses make of their arguments before a kernel starts: the rules, the rows of each term, what its sum is
divided by, and the real options in one tensor. Shared by the loss from logits and the loss from hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fusedkd import arguments as check
from fusedkd import teachers
from fusedkd.arguments import Real
from fusedkd.divergences import Divergence, resolve
from fusedkd.ops import OPTIONS

Reduction: TypeAlias = Literal["mean", "sum", "none"]


class KDTerms(NamedTuple):
    """The terms of a KD loss, detached, for logging: ``kd`` includes T^k, neither includes its weight, both use the
    loss's normalisers.
    """

    kd: Tensor
    ce: Tensor


class Options(NamedTuple):
    """The options of :func:`fusedkd.kd_loss` that say what is computed; their defaults are in its signature."""

    temperature: Real
    teacher_temperature: Real | None
    divergence: str | Divergence
    kd_weight: Real
    ce_weight: Real
    scale_by_t2: bool
    kd_mask: Tensor | None
    ignore_index: int
    label_smoothing: Real
    reduction: Reduction
    kd_normalizer: Real | None
    ce_normalizer: Real | None
    logit_softcap: Real | None
    logit_scale: Real | None
    vocab_mismatch: Literal["error", "truncate"]

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Options:
        """Those among the arguments of a loss."""
        return cls(*[arguments[name] for name in cls._fields])


class Prepared(NamedTuple):
    """One teacher's part of a loss, checked."""

    known: teachers.Known
    options: Options
    family: Divergence
    labels: Tensor | None
    """``(N,)`` int64, None where no kernel needs them."""
    every_label: Tensor | None
    kd_mask: Tensor | None
    temperatures: tuple[Real, Real]
    kd: bool
    ce: bool
    transform: bool

    def tensors(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the teacher's rows ``(B, L, C)``: their KD weights ``(N,)``, the options ``(16,)``, and what the sums of
        the two terms are divided by, ``(2,)``.
        """
        o, device = self.options, rows.device
        weights, counts = torch.ops.fusedkd.kd_row_weights(
            rows, self.known.ids, self.every_label, self.kd_mask, o.ignore_index, self.kd
        )
        if o.reduction != "mean":
            normalizers = check.pack([1.0, 1.0], device)
        elif o.kd_normalizer is None and o.ce_normalizer is None:
            normalizers = counts
        else:
            kd_count = counts[0] if o.kd_normalizer is None else o.kd_normalizer
            ce_count = counts[1] if o.ce_normalizer is None else o.ce_normalizer
            normalizers = check.pack([kd_count, ce_count], device)
            normalizers = torch.where(normalizers <= 0, 1, normalizers)  # a NaN stays one
        power, known = self.family.temperature_power, self.known
        real_options = [
            *(self.temperatures if power > 0 else (1.0, 1.0)),
            check.exact(o.temperature) ** power if o.scale_by_t2 else 1.0,
            o.kd_weight,
            o.ce_weight,
            o.label_smoothing,
            0.0 if o.logit_softcap is None else o.logit_softcap,
            1.0 if o.logit_scale is None else o.logit_scale,
            0.0 if known.softcap is None else known.softcap,
            1.0 if known.scale is None else known.scale,
            *known.coefficients,
        ]
        return weights, check.pack(real_options + [0.0] * (OPTIONS - len(real_options)), device), normalizers


def prepare(student: Tensor, teacher: teachers.Teacher, labels: Tensor | None, options: Options) -> Prepared:
    """`student`: the logits, or any tensor of their shape, type and device."""
    o, family = options, resolve(options.divergence)
    check.vocab_mismatch(o.vocab_mismatch)
    temperatures = (o.temperature, o.temperature if o.teacher_temperature is None else o.teacher_temperature)
    check.reduction(o.reduction, kd_normalizer=o.kd_normalizer, ce_normalizer=o.ce_normalizer)
    for name, value in zip(("temperature", "teacher_temperature"), temperatures, strict=True):
        check.real(name, value, open_low=True)
    for name, value in {"kd_weight": o.kd_weight, "ce_weight": o.ce_weight}.items():
        check.real(name, value)
    check.real("label_smoothing", o.label_smoothing, high=1.0)
    known = teachers.known(teacher, student, family, temperatures, o.vocab_mismatch)
    transforms = {
        "logit_softcap": o.logit_softcap,
        "logit_scale": o.logit_scale,
        "teacher.softcap": known.softcap,
        "teacher.scale": known.scale,
    }
    for name, transform in transforms.items():
        if transform is not None:
            check.real(name, transform, open_low=True)
    if student.shape[-1] == 1 and (family.temperature_power > 0 or not _is(0, o.ce_weight)):
        raise ValueError(
            "the student has one column, whose softmax is 1 whatever it holds: for a regression head use "
            "divergence='logit_mse' without cross-entropy, the mean squared error"
        )
    flat_labels = check.row_vector("labels", labels, student)
    mask = check.row_vector("kd_mask", o.kd_mask, student)
    wants_kd, wants_ce = not _is(0, o.kd_weight), not _is(0, o.ce_weight)
    if wants_ce and flat_labels is None:
        raise ValueError("ce_weight is not 0, so the cross-entropy term needs labels, which are None")
    targets = wants_kd and family.needs_labels
    if targets and flat_labels is None:
        raise ValueError(f"{family.name} needs labels, which are None")
    if targets and flat_labels is not None:
        mask = _with_target(mask, flat_labels, known.columns, student.shape[-1], o.ignore_index)
    check.class_indices(flat_labels, student.shape[-1] if wants_ce or targets else 2**62, o.ignore_index)
    return Prepared(
        known,
        o,
        family,
        flat_labels if wants_ce or targets else None,
        flat_labels,
        mask,
        temperatures,
        wants_kd,
        wants_ce,
        any(value is not None for value in transforms.values()),
    )


class Member(NamedTuple):
    """One of the teachers, its weight among them, and that of its term in the loss."""

    teacher: teachers.Teacher
    share: Real
    kd_weight: Real


def members(teacher: Any, teacher_weights: Sequence[Real] | None, kd_weight: Real) -> list[Member]:
    """The teachers of a loss. Its cross-entropy goes with the first."""
    if not isinstance(teacher, list | tuple):
        if teacher_weights is not None:
            raise ValueError("teacher_weights is for a list of teachers, but teacher is a single one")
        return [Member(teacher, 1.0, kd_weight)]
    if not teacher:
        raise ValueError("teacher is an empty list: it must hold at least one teacher")
    if not isinstance(teacher_weights, Sequence | None) or isinstance(teacher_weights, str):
        raise TypeError(f"teacher_weights must be a list of numbers, not {type(teacher_weights).__name__}")
    if teacher_weights is None:
        teacher_weights = [1.0 / len(teacher)] * len(teacher)
    if len(teacher_weights) != len(teacher):
        raise ValueError(
            f"teacher_weights must hold one weight per teacher: {len(teacher)}, not {len(teacher_weights)}"
        )
    for name, value in (("kd_weight", kd_weight), *(("teacher_weights", weight) for weight in teacher_weights)):
        check.real(name, value)
    pairs = zip(teacher, teacher_weights, strict=True)
    return [Member(each, share, check.exact(kd_weight) * check.exact(share)) for each, share in pairs]


def weighted(term: Tensor, weight: Real) -> Tensor:
    """weight · term for logging, where 0·∞ is 0."""
    product = weight * term
    return torch.where(product.isnan() & ~term.isnan(), 0, product)


def _with_target(mask: Tensor | None, labels: Tensor, common: int, classes: int, ignore_index: int) -> Tensor:
    """The KD rows of a divergence that needs a target: those selected whose label is a common column, or no column at
    all, for the kernel to make of it what it makes of any label out of range.
    """
    has = (labels != ignore_index) & ((labels < common) | (labels >= classes))
    if mask is None:
        return has
    return torch.where(has, mask, 0) if mask.is_floating_point() else has & (mask != 0)


def _is(number: float, value: Real) -> bool:
    return not isinstance(value, Tensor) and value == number
