"""What a loss makes of its options and tensors before an operator starts: the rules, the rows of each term, what its
sum is divided by, and the real options in one tensor. Rules of plain values are made once, and found again by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd import teachers
from fusedkd.backends import block
from fusedkd.backends.block import Flags, TeacherRows, WholeTeacher
from fusedkd.backends.call import RECIPE_POWERS, kept, made, own_rows, pack, recipe
from fusedkd.backends.layout import COUNTED, NORMALIZERS, OPTIONS, Option, TopkKernelId
from fusedkd.backends.shard import Shard
from fusedkd.checks import Real
from fusedkd.divergences import FAMILIES, Divergence, resolve
from fusedkd.divergences.sums import Sum
from fusedkd.losses.options import DEFAULTS, KDOptions
from fusedkd.teachers import KnownTeacher


class Rules(NamedTuple):
    """What the options alone decide, checked."""

    options: KDOptions
    """All of them but the mask."""
    family: Divergence
    coefficients: tuple[Real, ...]
    temperatures: tuple[Real, Real]
    normalizers: tuple[Real, Real] | None
    """Those that are given, else COUNTED; None where both are."""
    kd: bool
    ce: bool
    needs_labels: bool
    """Whether the divergence does."""
    labels_read: bool
    """By a kernel."""
    flags: Flags
    """Of a teacher without a transform of its logits."""
    per_row: bool
    constants: dict[torch.device, tuple[Tensor, Tensor | None]]
    """Real options and normalisers of a teacher without options of its own, once they are on a device."""
    own: bool
    """Whether rows have values of their own of any option or coefficient."""
    share: Tensor | None = None
    """The weight of each row, ``(*)``, among several teachers or divergences, where rows have their own."""

    @classmethod
    def of(cls, options: KDOptions) -> Rules:
        """From all options."""
        family = resolve(options["divergence"])  # type: ignore[arg-type]  # of a list, one by one
        check.vocab_mismatch(options["vocab_mismatch"])
        reduction, given = options["reduction"], (options["kd_normalizer"], options["ce_normalizer"])
        check.reduction(reduction, kd_normalizer=given[0], ce_normalizer=given[1])
        temperature, teacher_temperature = options["temperature"], options["teacher_temperature"]
        temperatures = temperature, temperature if teacher_temperature is None else teacher_temperature
        for name, value in zip(("temperature", "teacher_temperature"), temperatures, strict=True):
            check.real(name, value, open_low=True, per_row=True)
        check.flag("scale_by_t2", options["scale_by_t2"])
        check.integer("ignore_index", options["ignore_index"])
        check.real("kd_weight", options["kd_weight"], per_row=True)
        check.real("ce_weight", options["ce_weight"])
        check.real("label_smoothing", options["label_smoothing"], high=1.0)
        check.real("z_loss_weight", options["z_loss_weight"])
        transforms = {"logit_softcap": options["logit_softcap"], "logit_scale": options["logit_scale"]}
        _check_transforms(transforms)
        kd, ce = not _is(0, options["kd_weight"]), not _is(0, options["ce_weight"])
        needs_labels, transform = kd and family.needs_labels, any([value is not None for value in transforms.values()])
        counted = tuple([COUNTED if each is None else each for each in given])
        normalizers = (1.0, 1.0) if reduction != "mean" else None if given == (None, None) else counted
        coefficients = family.coefficients()
        return cls(
            options=options,
            family=family,
            coefficients=coefficients,
            temperatures=temperatures,
            normalizers=normalizers,  # type: ignore[arg-type]
            kd=kd,
            ce=ce,
            needs_labels=needs_labels,
            labels_read=ce or needs_labels,
            flags=Flags(ignore_index=options["ignore_index"], transform=transform, ce=ce),
            per_row=reduction == "none",
            constants={},
            own=own_rows([*coefficients, *temperatures, options["kd_weight"]]) is not None,
        )

    def tensors(self, known: KnownTeacher, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Real options and normalisers as the operator kd_loss takes them, and those that are tensors on a GPU."""
        own = known.softcap is not None or known.scale is not None or known.coefficients is not self.coefficients
        keep = not own and not check.tracing()
        if keep and device in self.constants:
            constants, normalizers = self.constants[device]
            return kept(constants), None if normalizers is None else kept(normalizers), None
        values, power = self.real_options(known), self.family.temperature_power
        table = [*(self.normalizers or (COUNTED, COUNTED)), *values]
        tensors = [value for value in table if isinstance(value, Tensor)]
        shared = [value for value in tensors if value.dim() == 0 and value.is_cuda]
        if tensors and len(shared) == len(tensors) and not check.tracing():
            scale, powers = NORMALIZERS + Option.KD_SCALE.value, {}
            if self.scale_follows and power in RECIPE_POWERS:
                table[scale], powers[scale] = self.options["temperature"], power
            elif self.scale_follows:
                table[scale] = check.exact(self.options["temperature"]) ** power
            constants, given = recipe(table, powers, device)
            return constants, None, given
        options = pack(values, device)
        if self.scale_follows:
            torch.pow(options[..., Option.TEMPERATURE], power, out=options[..., Option.KD_SCALE])
        found = options, None if self.normalizers is None else pack(self.normalizers, device)
        if keep:
            self.constants[device] = found
        return *found, None

    @property
    def scale_follows(self) -> bool:
        """Whether T^k is computed where T has arrived. (What is traced is computed before.)"""
        T, power = self.options["temperature"], self.family.temperature_power
        follows = isinstance(T, Tensor) and self.options["scale_by_t2"] and power > 0
        return follows and self.share is None and not check.tracing()

    def kd_scale(self) -> Real:
        """T^k, or 1, times the share."""
        scale: Real = 1.0
        if self.options["scale_by_t2"]:
            scale = check.exact(self.options["temperature"]) ** self.family.temperature_power
        return scale if self.share is None else check.exact(self.share) * scale

    def own_values(self, student: Tensor) -> None:
        """That what rows have of their own is one value for each of the student's rows."""
        options, family = self.options, self.family
        for name in ("temperature", "teacher_temperature", "kd_weight"):
            check.own_values(name, options[name], student)  # type: ignore[literal-required]
        check.own_values("the weight of a teacher or divergence", self.share, student)
        parts = family.parts if isinstance(family, Sum) else [(None, family)]
        for weight, part in parts:
            check.own_values("the weight of a teacher or divergence", weight, student)
            for name, value in vars(part).items() if type(part) is FAMILIES.get(part.name) else ():
                check.own_values(f"divergence.{name}", value, student)
        for value in self.coefficients:
            check.own_values(f"a coefficient of {family.name}", value, student)

    def real_options(self, known: KnownTeacher) -> list[Real]:
        """The options tensor."""
        options, power = self.options, self.family.temperature_power
        student_temperature, teacher_temperature = self.temperatures if power > 0 else (1.0, 1.0)
        scale = 0.0 if self.scale_follows else self.kd_scale()
        values: dict[Option, Real | None] = {
            Option.TEMPERATURE: student_temperature,
            Option.TEACHER_TEMPERATURE: teacher_temperature,
            Option.KD_SCALE: scale,
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


PLAIN = frozenset({float, int, bool, str, type(None)})
"""Types of options that are known by their value."""
MOST_RULES = 256

_rules: dict[Any, Rules] = {}


def rules_of(options: KDOptions) -> Rules:
    """Of the options that are given; those of plain values are made once."""
    key = None if torch.compiler.is_compiling() else _key(options)
    found = None if key is None else _rules.get(key)
    if found is None:
        found = Rules.of({**DEFAULTS, **options})
        if key is not None:
            if len(_rules) >= MOST_RULES:
                _rules.pop(next(iter(_rules)), None)
            _rules[key] = found
    return found


def _key(options: Mapping[str, Any]) -> Any:
    """What the rules depend on: names, values and their types, for 1 is no temperature where it is True. None where
    values may change under way, as a tensor's can.
    """
    divergence = options.get("divergence")
    if isinstance(divergence, Divergence):
        parameters = _parameters(divergence)
        if parameters is None:
            return None
        options = {**options, "divergence": divergence.name, **parameters}
    types = tuple(map(type, options.values()))
    return (*options.items(), types) if PLAIN.issuperset(types) else None


def _parameters(divergence: Divergence) -> dict[str, Any] | None:
    """What a divergence of ours depends on, beside its name."""
    if isinstance(divergence, Sum):
        found: dict[str, Any] = {"divergence.temperature": divergence.temperature}
        for i, (weight, part) in enumerate(divergence.parts):
            its = _parameters(part)
            if its is None:
                return None
            found |= {f"{i}.weight": weight, f"{i}.name": part.name} | {f"{i}.{name}": x for name, x in its.items()}
        return found
    if type(divergence) is not FAMILIES.get(divergence.name):
        return None
    return {f"divergence.{name}": value for name, value in vars(divergence).items()}


class Prepared(NamedTuple):
    """One teacher's part of a loss, checked."""

    known: KnownTeacher
    rules: Rules
    labels: Tensor | None
    """``(N,)`` int64."""
    kd_mask: Tensor | None
    flags: Flags

    @property
    def family(self) -> Any:
        """What the number of the kernel stands for: to be kept alive until backward."""
        return self.rules.family if self.known.own is None else self.known.own

    def common(self, columns: int) -> int:
        """How many of so many columns of the student the KD term reads."""
        every = self.known.ids is not None or not self.rules.family.same_columns
        return columns if every else self.known.common

    def whole_teacher(self, rows: Tensor) -> WholeTeacher:
        """What the operator kd_loss is given of the teacher's rows ``(B, L, C)``."""
        known, rules = self.known, self.rules
        numbers = rules.tensors(known, rows.device)
        return WholeTeacher(rows, known.ids, self.kd_mask, *numbers, int(known.kernel_id), rules.kd, rules.needs_labels)

    def teacher_rows(
        self, rows: Tensor, head: Tensor | None = None, bias: Tensor | None = None, like: Tensor | None = None
    ) -> TeacherRows:
        """What the other operators are given. `like`: rows that say which of the teacher's count, if these are not read
        or are hidden states.
        """
        whole = self.whole_teacher(rows)
        shard = None if like is not None and like is not rows else self.flags.shard
        row_weights, normalizers = block.row_weights(
            shard,
            teacher=rows if like is None else like,
            ids=whole.ids,
            labels=self.labels,
            kd_mask=whole.kd_mask,
            normalizers=whole.normalizers if whole.given is None else whole.options,
            given=whole.given,
            ignore_index=self.rules.options["ignore_index"],
            kd=whole.kd,
        )
        normalizers, options = made(normalizers, whole.options, whole.given)
        return TeacherRows(
            rows=rows,
            head=head,
            bias=bias,
            ids=whole.ids,
            row_weights=row_weights,
            options=options,
            normalizers=normalizers,
            kernel_id=whole.kernel_id,
        )

    def check_values(self, columns: int) -> None:
        """That labels and lists hold what they may, for a student of so many columns. They are on a CPU."""
        known, rules = self.known, self.rules
        if known.ids is not None:
            check.listed_values(known.ids, known.rows.flatten(0, -2), columns, known.kernel_id == TopkKernelId.SAMPLES)
        classes = columns if rules.labels_read else check.ANY_CLASS
        check.class_range(self.labels, classes, rules.options["ignore_index"])


def prepare(
    student: Tensor,
    teacher: teachers.Teacher,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    rules: Rules,
    shard: Shard | None = None,
    known_rows: bool = True,
) -> Prepared:
    """`student`: the logits, or any tensor of their shape, type and device. `shard`: where these are the columns of one
    rank. Not `known_rows`: the rows are others than those that options of a value per row are for.
    """
    family, options = rules.family, rules.options
    columns = student.shape[-1] if shard is None else shard.columns
    if shard is not None and (isinstance(teacher, teachers.OtherVocabulary) or not family.same_columns):
        what = family.name if not family.same_columns else type(teacher).__name__
        raise ValueError(f"{what} is not available for a split vocabulary: gather the logits first")
    known = teachers.known(
        teacher, student, family, rules.coefficients, rules.temperatures, options["vocab_mismatch"], columns
    )
    if known_rows and (rules.own or rules.share is not None):
        rules.own_values(student)
    flags = rules.flags if shard is None else rules.flags._replace(shard=shard)
    if known.softcap is not None or known.scale is not None:
        flags = flags._replace(transform=True)
        _check_transforms({"teacher.softcap": known.softcap, "teacher.scale": known.scale})
    if columns == 1 and (family.temperature_power > 0 or rules.ce):
        raise ValueError(
            "the student has one column, whose softmax is 1 whatever it holds: for a regression head use "
            "divergence='logit_mse' without cross-entropy, the mean squared error"
        )
    flat_labels = check.row_vector("labels", labels, student)
    mask = check.row_vector("kd_mask", kd_mask, student)
    if flat_labels is None:
        if rules.ce:
            raise ValueError("ce_weight is not 0, so the cross-entropy term needs labels, which are None")
        if rules.needs_labels:
            raise ValueError(f"{family.name} needs labels, which are None")
    else:
        check.class_indices(flat_labels)
        if rules.needs_labels:
            common = known.common if shard is None else columns
            mask = _with_label(mask, flat_labels, common, columns, options["ignore_index"])
    return Prepared(known=known, rules=rules, labels=flat_labels, kd_mask=mask, flags=flags)


def _check_transforms(transforms: Mapping[str, Real | None]) -> None:
    for name, transform in transforms.items():
        if transform is not None:
            check.real(name, transform, open_low=True)


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
