"""The members of a loss: each of its teachers with each of its divergences, calls of their own into one gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd import teachers
from fusedkd.backends.statistics import OF_LABEL, OF_TEACHER
from fusedkd.checks import Real
from fusedkd.divergences import Divergence, resolve
from fusedkd.divergences.sums import summed
from fusedkd.losses.options import DEFAULTS, KDOptions
from fusedkd.losses.rules import Prepared, Rules, prepare, rules_of

WITH_LOGITS = (Tensor, teachers.TeacherLogits, teachers.TeacherHead)
"""Teachers that kernels compare with the student column by column."""


class Member(NamedTuple):
    """One of the teachers of a loss, with one of its divergences."""

    teacher: teachers.Teacher
    weight: Real
    """Of its KD term among all, where it is not in the term: see `Rules.share`."""
    rules: Rules
    """Of its call: the weights of the terms are those of this member in the loss."""
    first: int = 0
    """The number of the first member with this teacher."""


def members(teacher: Any, options: KDOptions) -> list[Member]:
    """Each teacher of a loss with each of its divergences, from the options that are given. The cross-entropy goes with
    the first.
    """
    divergence = options.get("divergence", DEFAULTS["divergence"])
    if not isinstance(teacher, list | tuple) and not isinstance(divergence, list | tuple):
        _teachers(teacher, options)
        return [Member(teacher, 1.0, rules_of(options))]
    kd_weight = options.get("kd_weight", DEFAULTS["kd_weight"])
    check.real("kd_weight", kd_weight, per_row=True)
    found: list[Member] = []
    for each, weight in _teachers(teacher, options):
        first = len(found)
        for share, part in _divergences(divergence, each, options):
            own: KDOptions = {**options, "divergence": part, "teacher_weights": None}  # type: ignore[typeddict-item]
            if found:
                own["ce_weight"] = 0.0
            of_all = _product(weight, share)
            if isinstance(of_all, Tensor) and of_all.dim() > 0:
                rules = rules_of(own)._replace(share=of_all, constants={})
                found.append(Member(each, 1.0, rules, first))
            else:
                own["kd_weight"] = _product(kd_weight, of_all)
                found.append(Member(each, of_all, rules_of(own), first))
    return found


def _product(a: Real, b: Real) -> Real:
    """Of two weights: the number 0, of a term that is not computed, where either is."""
    zero = any([not isinstance(x, Tensor) and x == 0 for x in (a, b)])
    return 0.0 if zero else check.exact(a) * check.exact(b)


def _divergences(divergence: Any, teacher: Any, options: KDOptions) -> list[tuple[Real, Any]]:
    """(weight, divergence) of a list of them, or of a single one; those that one kernel sums up are one."""
    if not isinstance(divergence, list | tuple):
        return [(1.0, divergence)]
    if not divergence:
        raise ValueError("divergence is an empty list: it must hold at least one pair (weight, divergence)")
    for pair in divergence:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or isinstance(pair[0], str | Divergence):
            raise TypeError(f"a list of divergences must hold pairs (weight, divergence), but one is {pair!r}")
        check.real("the weight of a divergence", pair[0], per_row=True)
    parts = [(weight, resolve(each)) for weight, each in divergence]
    if not isinstance(teacher, WITH_LOGITS):
        return parts
    scaled = options.get("scale_by_t2", DEFAULTS["scale_by_t2"])
    return summed(parts, options.get("temperature", DEFAULTS["temperature"]) if scaled else 1.0)


def _teachers(teacher: Any, options: KDOptions) -> list[tuple[Any, Real]]:
    """(teacher, weight) of a list of teachers, or of a single one."""
    weights = options.get("teacher_weights")
    if not isinstance(teacher, list | tuple):
        if weights is not None:
            raise ValueError("teacher_weights is for a list of teachers, but teacher is a single one")
        return [(teacher, 1.0)]
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
    for weight in weights:
        check.real("teacher_weights", weight, per_row=True)
    return list(zip(teacher, weights, strict=True))


def refuse_statistics(names: Sequence[str], asked: Sequence[Member], part: Prepared) -> None:
    """Where the rows or the side of which they are is not there."""
    if names and not part.rules.kd:
        raise ValueError("statistics are of the rows of the (first) KD term, whose weight is 0")
    if part.labels is None and not OF_LABEL.isdisjoint(names):
        raise ValueError(f"statistics {', '.join(sorted(OF_LABEL.intersection(names)))} need labels, which are None")
    of_teacher = sorted(OF_TEACHER.intersection(names))
    if of_teacher and part.known.ids is not None:
        raise ValueError(f"statistics {', '.join(of_teacher)} need the teacher's logits, not a list of columns")
    if of_teacher and (part.known.own is not None or not part.rules.family.same_columns):
        raise ValueError(f"statistics {', '.join(of_teacher)} need a teacher with the student's columns")
    if of_teacher and asked[-1].first > 0:
        raise ValueError(f"statistics {', '.join(of_teacher)} are of one teacher, but there are several")


def checked_options(options: Mapping[str, Any], teacher: teachers.Teacher | None = None) -> None:
    """Refuses the options that `kd_loss` would refuse whatever its tensors are.

    Args:
        teacher: one row of it, where options depend on its form; None: logits.

    Raises:
        ValueError, TypeError: as the loss.
    """
    given: KDOptions = {name: value for name, value in options.items() if name != "kd_mask"}  # type: ignore[assignment]
    weights, row = given.get("teacher_weights"), torch.zeros(1, 2, device="cpu")
    several = [row] * max(len(weights), 1) if isinstance(weights, Sequence) else [row]
    labels = torch.zeros(1, dtype=torch.int64, device="cpu")
    for member in members(row if weights is None else several, given):
        prepare(row, row if teacher is None else teacher, labels, None, member.rules, known_rows=False)
