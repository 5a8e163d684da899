"""The options of the KD losses, once: their names, types, defaults and documentation. And what a loss makes of them
before an operator starts: the rules, the rows of each term, what its sum is divided by, and the real options in one
tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd import teachers
from fusedkd.backends.block import TeacherRows
from fusedkd.backends.call import pack
from fusedkd.backends.layout import OPTIONS, Option
from fusedkd.checks import Real
from fusedkd.divergences import Divergence, DivergenceName, resolve
from fusedkd.losses.names import by_name
from fusedkd.teachers import KnownTeacher

P = ParamSpec("P")
R = TypeVar("R")
Reduction: TypeAlias = Literal["mean", "sum", "none"]


class KDTerms(NamedTuple):
    """The terms of a KD loss, detached, for logging: ``kd`` includes T^k, neither includes its weight, both use the
    loss's normalisers.
    """

    kd: Tensor
    ce: Tensor


class KDOptions(TypedDict, total=False):
    """temperature, teacher_temperature: T > 0 of the KD term; the teacher's defaults to the student's. CE is always at
        temperature 1.
    divergence: a name of :data:`fusedkd.divergences.FAMILIES`, or an object where it has parameters:
        ``fusedkd.JSD(beta=0.1)``. ``logit_mse`` needs T = 1, ``dkd`` labels; a teacher of few columns serves
        ``forward_kl`` and, top-k, ``reverse_kl``.
    kd_weight, ce_weight: the weights of the two terms, ≥ 0. A term whose weight is the number 0 is not computed.
    scale_by_t2: the factor T^k in value and gradient, T the student's. False is the convention of TRL and Liger.
    kd_mask: ``(*)``, the rows of the KD term. Bool or integer: non-zero selects; float: weights, 0 is not selected.
        None: the rows whose label is not ``ignore_index``; without labels all rows. A teacher row that is all −inf
        counts as not selected.
    ignore_index, label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
    z_loss_weight: the cross-entropy has + z_loss_weight · (log Σe^z)², which keeps logits from drifting (PaLM,
        arXiv:2204.02311, §5); ≥ 0.
    reduction: ``"mean"``: each term over its own row count (float masks: the sum of weights); ``"sum"``; ``"none"``:
        ``(*)``.
    kd_normalizer, ce_normalizer: replace the counts under ``"mean"``. With the totals over an optimiser step and over
        all ranks they make gradient accumulation and data parallelism exact.
    logit_softcap, logit_scale: the student's logits are c·tanh(scale·z/c), for KD and CE alike.
    vocab_mismatch: ``"error"``: V_s and V_t may differ as paddings of one vocabulary do, by an eighth of the smaller
        and at most 1024, or where the larger is the smaller rounded up to a multiple of 64, 128 or 256, to no more than
        twice its size; ``"truncate"``: by anything.
    teacher_weights: for a list of teachers the KD term is Σ w_m D(p_m, q); 1/M each by default. Under ``"mean"`` each
        teacher's is divided by its own count of rows.
    """

    temperature: Real
    teacher_temperature: Real | None
    divergence: DivergenceName | Divergence
    kd_weight: Real
    ce_weight: Real
    scale_by_t2: bool
    kd_mask: Tensor | None
    ignore_index: int
    label_smoothing: Real
    z_loss_weight: Real
    reduction: Reduction
    kd_normalizer: Real | None
    ce_normalizer: Real | None
    logit_softcap: Real | None
    logit_scale: Real | None
    vocab_mismatch: Literal["error", "truncate"]
    teacher_weights: Sequence[Real] | None


DEFAULTS: KDOptions = {
    "temperature": 1.0,
    "teacher_temperature": None,
    "divergence": "forward_kl",
    "kd_weight": 1.0,
    "ce_weight": 0.0,
    "scale_by_t2": True,
    "kd_mask": None,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "z_loss_weight": 0.0,
    "reduction": "mean",
    "kd_normalizer": None,
    "ce_normalizer": None,
    "logit_softcap": None,
    "logit_scale": None,
    "vocab_mismatch": "error",
    "teacher_weights": None,
}


def with_options(loss: Callable[P, R]) -> Callable[P, R]:
    """A loss with ``**options: Unpack[KDOptions]``: they appear in its signature and, in the place of ``{options}``, in
    its docstring; an unknown keyword raises a TypeError that names our option.
    """
    types = get_type_hints(KDOptions)
    *own, var_keyword = inspect.signature(loss).parameters.values()
    assert var_keyword.kind == inspect.Parameter.VAR_KEYWORD
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword_only, default=default, annotation=types[name])
        for name, default in DEFAULTS.items()
    ]
    parameters = [*(p for p in own if p.kind != keyword_only), *options, *(p for p in own if p.kind == keyword_only)]
    loss.__signature__ = inspect.signature(loss).replace(parameters=parameters)  # type: ignore[attr-defined]
    described = "\n".join(f"        {line}" for line in inspect.cleandoc(f"    {KDOptions.__doc__}").splitlines())
    loss.__doc__ = (loss.__doc__ or "").replace("        {options}", described)
    return by_name(loss)


class Prepared(NamedTuple):
    """One teacher's part of a loss, checked."""

    known: KnownTeacher
    options: KDOptions
    family: Divergence
    labels: Tensor | None
    """``(N,)`` int64, None where no kernel needs them."""
    every_label: Tensor | None
    kd_mask: Tensor | None
    temperatures: tuple[Real, Real]
    kd: bool
    ce: bool
    transform: bool

    def teacher_rows(
        self, rows: Tensor, head: Tensor | None = None, bias: Tensor | None = None, like: Tensor | None = None
    ) -> TeacherRows:
        """What operators are given of the teacher's rows ``(B, L, C)``. `like`: rows that say which of them count, if
        these are not read or are hidden states.
        """
        options, device = self.options, rows.device
        row_weights, normalizers = torch.ops.fusedkd.kd_row_weights(
            teacher=rows if like is None else like,
            ids=self.known.ids,
            labels=self.every_label,
            kd_mask=self.kd_mask,
            ignore_index=options["ignore_index"],
            kd=self.kd,
        )
        if options["reduction"] != "mean":
            normalizers = pack([1.0, 1.0], device)
        elif options["kd_normalizer"] is not None or options["ce_normalizer"] is not None:
            kd_count = normalizers[0] if options["kd_normalizer"] is None else options["kd_normalizer"]
            ce_count = normalizers[1] if options["ce_normalizer"] is None else options["ce_normalizer"]
            normalizers = pack([kd_count, ce_count], device)
            normalizers = torch.where(normalizers <= 0, 1, normalizers)  # a NaN stays NaN
        return TeacherRows(
            rows=rows,
            head=head,
            bias=bias,
            ids=self.known.ids,
            row_weights=row_weights,
            options=pack(self.real_options(), device),
            normalizers=normalizers,
            kernel_id=int(self.known.kernel_id),
        )

    def real_options(self) -> list[Real]:
        """The options tensor."""
        options, known, power = self.options, self.known, self.family.temperature_power
        student_temperature, teacher_temperature = self.temperatures if power > 0 else (1.0, 1.0)
        values: dict[Option, Real | None] = {
            Option.TEMPERATURE: student_temperature,
            Option.TEACHER_TEMPERATURE: teacher_temperature,
            Option.KD_SCALE: check.exact(options["temperature"]) ** power if options["scale_by_t2"] else 1.0,
            Option.KD_WEIGHT: options["kd_weight"],
            Option.CE_WEIGHT: options["ce_weight"],
            Option.LABEL_SMOOTHING: options["label_smoothing"],
            Option.Z_LOSS_WEIGHT: options["z_loss_weight"],
            Option.SOFTCAP: options["logit_softcap"],
            Option.SCALE: 1.0 if options["logit_scale"] is None else options["logit_scale"],
            Option.TEACHER_SOFTCAP: known.softcap,
            Option.TEACHER_SCALE: 1.0 if known.scale is None else known.scale,
        }
        packed: list[Real] = [0.0] * OPTIONS
        for option, value in values.items():
            packed[option.value] = 0.0 if value is None else value  # torch.compile indexes no list by an IntEnum
        packed[Option.COEFFICIENTS : Option.COEFFICIENTS + len(known.coefficients)] = known.coefficients
        return packed


def prepare(student: Tensor, teacher: teachers.Teacher, labels: Tensor | None, options: KDOptions) -> Prepared:
    """`student`: the logits, or any tensor of their shape, type and device. `options`: all of them."""
    family = resolve(options["divergence"])
    check.vocab_mismatch(options["vocab_mismatch"])
    check.reduction(
        options["reduction"], kd_normalizer=options["kd_normalizer"], ce_normalizer=options["ce_normalizer"]
    )
    temperature, teacher_temperature = options["temperature"], options["teacher_temperature"]
    temperatures = temperature, temperature if teacher_temperature is None else teacher_temperature
    for name, value in zip(("temperature", "teacher_temperature"), temperatures, strict=True):
        check.real(name, value, open_low=True)
    check.real("kd_weight", options["kd_weight"])
    check.real("ce_weight", options["ce_weight"])
    check.real("label_smoothing", options["label_smoothing"], high=1.0)
    check.real("z_loss_weight", options["z_loss_weight"])
    known = teachers.known(teacher, student, family, temperatures, options["vocab_mismatch"])
    transforms = {
        "logit_softcap": options["logit_softcap"],
        "logit_scale": options["logit_scale"],
        "teacher.softcap": known.softcap,
        "teacher.scale": known.scale,
    }
    for name, transform in transforms.items():
        if transform is not None:
            check.real(name, transform, open_low=True)
    wants_kd, wants_ce = not _is(0, options["kd_weight"]), not _is(0, options["ce_weight"])
    if student.shape[-1] == 1 and (family.temperature_power > 0 or wants_ce):
        raise ValueError(
            "the student has one column, whose softmax is 1 whatever it holds: for a regression head use "
            "divergence='logit_mse' without cross-entropy, the mean squared error"
        )
    flat_labels = check.row_vector("labels", labels, student)
    mask = check.row_vector("kd_mask", options["kd_mask"], student)
    if wants_ce and flat_labels is None:
        raise ValueError("ce_weight is not 0, so the cross-entropy term needs labels, which are None")
    needs_labels, ignore_index = wants_kd and family.needs_labels, options["ignore_index"]
    if needs_labels and flat_labels is None:
        raise ValueError(f"{family.name} needs labels, which are None")
    if needs_labels and flat_labels is not None:
        mask = _with_label(mask, flat_labels, known.columns, student.shape[-1], ignore_index)
    check.class_indices(flat_labels, student.shape[-1] if wants_ce or needs_labels else 2**62, ignore_index)
    return Prepared(
        known=known,
        options=options,
        family=family,
        labels=flat_labels if wants_ce or needs_labels else None,
        every_label=flat_labels,
        kd_mask=mask,
        temperatures=temperatures,
        kd=wants_kd,
        ce=wants_ce,
        transform=any(value is not None for value in transforms.values()),
    )


class Member(NamedTuple):
    """One of the teachers of a loss."""

    teacher: teachers.Teacher
    weight: Real
    """Among the teachers."""
    options: KDOptions
    """Of its call: the weights of the terms are those of this teacher in the loss."""


def members(teacher: Any, options: KDOptions) -> list[Member]:
    """The teachers of a loss. Its cross-entropy goes with the first."""
    weights, kd_weight = options["teacher_weights"], options["kd_weight"]
    if not isinstance(teacher, list | tuple):
        if weights is not None:
            raise ValueError("teacher_weights is for a list of teachers, but teacher is a single one")
        return [Member(teacher, 1.0, options)]
    if not teacher:
        raise ValueError("teacher is an empty list: it must hold at least one teacher")
    if not isinstance(weights, Sequence | None) or isinstance(weights, str):
        raise TypeError(f"teacher_weights must be a list of numbers, not {type(weights).__name__}")
    if weights is not None and len(weights) == 0:
        raise ValueError("teacher_weights is empty: it must hold one weight per teacher")
    if weights is None:
        weights = [1.0 / len(teacher)] * len(teacher)
    if len(weights) != len(teacher):
        raise ValueError(f"teacher_weights must hold one weight per teacher: {len(teacher)}, not {len(weights)}")
    for name, value in (("kd_weight", kd_weight), *(("teacher_weights", weight) for weight in weights)):
        check.real(name, value)
    found: list[Member] = []
    for each, weight in zip(teacher, weights, strict=True):
        own: KDOptions = {**options, "kd_weight": check.exact(kd_weight) * check.exact(weight)}
        if found:
            own["ce_weight"] = 0.0
        found.append(Member(each, weight, own))
    return found


def checked_options(options: Mapping[str, Any], teacher: teachers.Teacher | None = None) -> None:
    """Refuses the options that `kd_loss` would refuse whatever its tensors are.

    Args:
        teacher: one row of it, where options depend on its form; None: logits.

    Raises:
        ValueError, TypeError: as the loss.
    """
    given: KDOptions = {**DEFAULTS, **options, "kd_mask": None}  # type: ignore[typeddict-item]
    weights, row = given["teacher_weights"], torch.zeros(1, 2, device="cpu")
    several = [row] * max(len(weights), 1) if isinstance(weights, Sequence) else [row]
    members(row if weights is None else several, given)
    needs_labels = resolve(given["divergence"]).needs_labels or not _is(0, given["ce_weight"])
    labels = torch.zeros(1, dtype=torch.int64, device="cpu") if needs_labels else None
    prepare(row, row if teacher is None else teacher, labels, given)


def weighted(term: Tensor, weight: Real) -> Tensor:
    """weight · term for logging, where 0·∞ is 0."""
    product = weight * term
    return torch.where(product.isnan() & ~term.isnan(), 0, product)


def _with_label(mask: Tensor | None, labels: Tensor, common: int, classes: int, ignore_index: int) -> Tensor:
    """The KD rows of a divergence that needs a label: those selected whose label is a common column. A label out of
    range counts as well: the kernel gives its row NaN, as any other loss does.
    """
    has = (labels != ignore_index) & ((labels < common) | (labels >= classes))
    if mask is None:
        return has
    return torch.where(has, mask, 0) if mask.is_floating_point() else has & (mask != 0)


def _is(number: float, value: Real) -> bool:
    return not isinstance(value, Tensor) and value == number
