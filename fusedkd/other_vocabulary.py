"""A teacher of another vocabulary: what can be compared where column j of the teacher is not the student's token j.

:class:`ULD` compares the sorted probabilities, :class:`GOLD` shared tokens by their ids and sorts the rest, and
:class:`TeacherProjected` carries the teacher's probabilities over to the student's tokens, for any divergence. Which
rows of the two belong together, which ids are shared, and a projection are found by
:mod:`fusedkd.integrations.tokenizers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.vocabulary_map import TILE
from fusedkd.checks import Real
from fusedkd.divergences import Divergence

TAILS = ("bucket", "ignore")


@dataclass(frozen=True, eq=False)
class ULD(Divergence):
    """Σ_r |p_(r) − q_(r)|, the probabilities of each side sorted, the shorter row padded with zeros: universal logit
    distillation (Boizard et al. 2024, arXiv:2402.12030, eq. 4).

    The vocabularies may be of any size; a teacher of few columns is a :class:`TeacherSorted`. The ids of tokens play no
    part: a student that gives the right probabilities to the wrong tokens has loss 0. k of T^k is 1, as for total
    variation; ``scale_by_t2=False`` is the paper's. Without a kernel: it costs two sorts in float64.
    """

    name = "uld"
    temperature_power = 1
    same_columns = False
    bounded = True

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return sorted_l1(log_p.exp(), log_q.exp())


@dataclass(frozen=True, eq=False)
class SortedList(Divergence):
    """:class:`ULD` from the probabilities of a :class:`TeacherSorted`."""

    tail: str = "bucket"
    name = "uld"
    temperature_power = 1
    same_columns = False
    bounded = True

    def teacher_logprobs(self, rows: Tensor, temperature: Tensor) -> Tensor:
        return rows

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        p, q = log_p.exp().sort(-1, descending=True).values, log_q.exp()
        q = q.topk(min(p.shape[-1], q.shape[-1]), -1).values
        q = torch.where(p[..., : q.shape[-1]] > 0, q, 0)  # ranks that are not listed
        listed = sorted_l1(p, q)
        if self.tail == "ignore":
            return listed
        return listed + ((1 - p.sum(-1)).clamp(min=0) - (1 - q.sum(-1))).abs()


@dataclass(frozen=True, eq=False)
class GOLD(Divergence):
    """matched·JSD_β of the shared tokens + unmatched·:class:`ULD` of the others: GOLD's hybrid loss (Patiño et al.
    2025, "Unlocking On-Policy Distillation for Any Model Family"; TRL's ``uld_use_hybrid_loss``).

    Neither part is renormalised, so the first may be negative. k of T^k is 1; ``scale_by_t2=False`` is TRL's.

    Args:
        student_ids, teacher_ids: ``(S,)`` int64, the columns of the shared tokens on either side, each at most once
            (:func:`fusedkd.integrations.tokenizers.shared_ids`).
        beta: of β·KL(p‖m) + (1 − β)·KL(q‖m), m = βp + (1 − β)q, a number in [0, 1]; 0 is KL(p‖q), 1 is KL(q‖p).
        matched, unmatched: the weights ≥ 0; None, both: S/V_t and 1 − S/V_t.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    beta: float = 0.5
    matched: float | None = None
    unmatched: float | None = None
    name = "gold"
    temperature_power = 1
    same_columns = False

    def __post_init__(self) -> None:
        for name in ("student_ids", "teacher_ids"):
            ids: Any = getattr(self, name)
            if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
                raise TypeError(f"{name} must be an int64 tensor (S,), not {getattr(ids, 'dtype', type(ids).__name__)}")
            if check.readable(ids) and len(ids.unique()) != len(ids):
                raise ValueError(f"{name} must list each token at most once, but some id is repeated")
        if len(self.student_ids) != len(self.teacher_ids):
            sizes = len(self.student_ids), len(self.teacher_ids)
            raise ValueError("student_ids and teacher_ids must be of one length, not {} and {}".format(*sizes))
        if isinstance(self.beta, Tensor):
            raise TypeError("beta must be a number, not a tensor")
        check.real("beta", self.beta, high=1.0)
        if (self.matched is None) != (self.unmatched is None):
            raise ValueError("matched and unmatched must both be weights, or both be None")
        for name in ("matched", "unmatched"):
            check.real(name, 0.0 if getattr(self, name) is None else getattr(self, name))

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        of_teacher, of_student = (ids.to(log_p.device) for ids in (self.teacher_ids, self.student_ids))
        share = len(of_teacher) / log_p.shape[-1]
        matched = share if self.matched is None else self.matched
        unmatched = 1 - share if self.unmatched is None else self.unmatched
        rest_p, rest_q = log_p.exp().index_fill(-1, of_teacher, 0), log_q.exp().index_fill(-1, of_student, 0)
        shared = self._jsd(log_p[..., of_teacher], log_q[..., of_student])
        return matched * shared + unmatched * sorted_l1(rest_p, rest_q)

    def _jsd(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q, beta = log_p.exp(), log_q.exp(), self.beta
        if beta == 0:
            return (p * (log_p - log_q)).sum(-1)
        if beta == 1:
            return (q * (log_q - log_p)).sum(-1)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def sorted_l1(p: Tensor, q: Tensor) -> Tensor:
    """Σ_r |p_(r) − q_(r)| over the last dimension, the shorter row padded with zeros."""
    p, q = (x.sort(-1, descending=True).values for x in (p, q))
    least = min(p.shape[-1], q.shape[-1])
    return (p[..., :least] - q[..., :least]).abs().sum(-1) + p[..., least:].sum(-1) + q[..., least:].sum(-1)


@dataclass(frozen=True, eq=False)
class TeacherSorted:
    """The log-probabilities of a teacher's most probable tokens, without their ids: what :class:`ULD` compares, of a
    teacher that was cached or is served.

    Args:
        logprobs: ``(*, K)``, floating point, in any order; log p of the teacher's whole vocabulary at the temperature
            of the loss. −inf is padding. A cache's ``teacher_logprobs`` is one.
        tail: what becomes of the ranks that are not listed.

            ``"bucket"``: they are one class on each side, |(1 − Σ_K p) − (1 − Σ_K q)| more. Of a complete list that is
            ULD itself; of a shorter one at most that, and 0 where both sides agree.

            ``"ignore"``: they are left out.
        logprobs_temperature: the temperature at which they were taken, which must be the loss's teacher temperature.
    """

    logprobs: Tensor
    tail: Literal["bucket", "ignore"] = "bucket"
    logprobs_temperature: Real = 1.0

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        logits: Tensor,
        columns: int | None = None,
        mass: float | None = None,
        *,
        temperature: float = 1.0,
        tail: Literal["bucket", "ignore"] = "bucket",
    ) -> TeacherSorted:
        """The `columns` most probable tokens of each row, or as many as it takes to hold `mass`, or both.

        Args:
            logits: ``(*, V_t)``, floating point.
            columns: at most so many; None: all.
            mass: in (0, 1]: the first ranks whose probability adds up to this, at least one; None: all.
        """
        check.float_rows("logits", logits)
        check.real("temperature", temperature, open_low=True)
        if columns is not None:
            check.count("columns", columns)
        if mass is not None:
            check.real("mass", mass, high=1.0, open_low=True)
        rows = logits.reshape(-1, logits.shape[-1])
        k = rows.shape[1] if columns is None else min(columns, rows.shape[1])
        found = rows.new_empty(len(rows), k, dtype=torch.promote_types(rows.dtype, torch.float32))
        step = max(1, TILE // rows.shape[1])
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            logprobs = (rows[some].to(found.dtype) / temperature).log_softmax(-1).topk(k, -1).values
            if mass is not None:
                before = logprobs.double().exp().cumsum(-1) - logprobs.double().exp()
                logprobs = logprobs.masked_fill(before >= mass, -torch.inf)
            found[some] = logprobs
        return cls(found.view(*logits.shape[:-1], k), tail, temperature)

    def divergence(self, student: Tensor, family: Divergence, temperatures: tuple[Real, Real]) -> Divergence:
        """What compares it with the student, checked."""
        check.float_rows("logprobs", self.logprobs, like=student)
        if not isinstance(family, ULD):
            raise ValueError(f"TeacherSorted has no ids and serves fusedkd.ULD() alone, not {family.name}")
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, not {self.tail!r}")
        taken = self.logprobs_temperature
        check.real("logprobs_temperature", taken, open_low=True)
        if len({t for t in (taken, temperatures[1]) if not isinstance(t, Tensor)}) > 1:
            raise ValueError(
                "logprobs_temperature must be the teacher's temperature in the loss, to which a list cannot be taken, "
                f"but they are {taken} and {temperatures[1]}"
            )
        if check.readable(self.logprobs) and (self.logprobs > 1e-3).any():
            raise ValueError(
                f"logprobs must be log-probabilities, at most 0, but one is {self.logprobs.max().item():g}: "
                "TeacherSorted.of takes logits"
            )
        return SortedList(self.tail)


@dataclass(frozen=True, eq=False)
class TeacherProjected:
    """A teacher whose probabilities are carried over to the student's tokens, p' = W·p / Σ W·p, some rows at a time: of
    any divergence on the student's columns (X-Token's p_kl, arXiv:2605.21699).

    A student token that W reaches from nowhere has p' = 0: forward KL, a JSD or a skew divergence asks for q = 0 there,
    reverse KL is infinite with gradient 0. A row whose whole probability W loses adds nothing to the KD term. The
    teacher's temperature comes before W.

    Args:
        teacher: logits ``(*, V_t)``, a :class:`~fusedkd.TeacherLogits`, a :class:`~fusedkd.TeacherHead`, or a
            :class:`~fusedkd.TeacherTopK` of the teacher's columns.
        weight: W, ``(V_s, V_t)``, a sparse COO tensor (float64 saves a conversion), ≥ 0, whose columns have a sum of at
            most 1 (:func:`fusedkd.integrations.tokenizers.projection`). Heads may be padded to more columns on both
            sides; those have no part in it.
        columns: of a :class:`~fusedkd.TeacherTopK`: how many of the student's columns are kept, the most probable;
            None: as many as the teacher lists.
    """

    teacher: Any
    weight: Tensor
    columns: int | None = None

    def checked_weight(self, student: Tensor, vocab_mismatch: str) -> Tensor:
        """W in float64, coalesced, for the columns of these student logits."""
        weight = self._weight()
        if weight.device != student.device:
            raise ValueError(f"weight must be on the student's device {student.device}, not on {weight.device}")
        if weight.shape[0] > student.shape[-1]:
            raise ValueError(f"weight has {weight.shape[0]} rows, but the student {student.shape[-1]} columns")
        check.vocabularies(student.shape[-1], weight.shape[0], vocab_mismatch)
        return weight

    def _weight(self) -> Tensor:
        weight: Any = self.weight
        if not isinstance(weight, Tensor) or weight.layout is not torch.sparse_coo or weight.dim() != 2:
            what = f"{weight.layout} tensor" if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight must be a sparse COO tensor (V_s, V_t), not a {what}: to_sparse() makes one")
        if weight.dtype not in check.FLOATING:
            raise TypeError(f"weight must be of floating point, not {weight.dtype}")
        weight = weight.detach().double().coalesce()
        values = weight.values()
        if check.readable(values) and len(values):
            if not values.min().item() >= 0:
                raise ValueError(f"weight must be at least 0, but one element is {values.min().item():g}")
            mass = values.new_zeros(weight.shape[1]).index_add_(0, weight.indices()[1], values).max().item()
            if mass > 1 + 1e-6:
                raise ValueError(f"the columns of weight must have a sum of at most 1, but one has {mass:g}")
        return weight

    @torch.no_grad()
    def top_k(self) -> Any:
        """The :class:`~fusedkd.TeacherTopK` of the student's columns, of one of the teacher's: to be kept on disk.

        Probability that the teacher does not list, that W loses, or that lies beyond `columns` becomes a part of the
        tail. The temperature stays that of the list.
        """
        given, weight = self.teacher, self._weight()
        if not hasattr(given, "ids") or not hasattr(given, "logprobs"):
            raise TypeError(f"top_k needs a TeacherTopK, not a {type(given).__name__}")
        k = given.ids.shape[-1] if self.columns is None else self.columns
        check.count("columns", k)
        k = min(k, weight.shape[0])
        ids, logprobs = (x.reshape(-1, given.ids.shape[-1]) for x in (given.ids.long(), given.logprobs))
        beyond = ids >= weight.shape[1]
        if check.readable(ids) and beyond.any():
            raise ValueError(f"ids must be columns of weight, fewer than {weight.shape[1]}, but one is {ids.max()}")
        p = torch.where((ids >= 0) & ~beyond, logprobs.double().exp(), 0)
        found = ids.new_empty(len(ids), k), logprobs.new_empty(len(ids), k)
        step = max(1, TILE // max(weight.shape))
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            of_teacher = p.new_zeros(len(ids[part]), weight.shape[1]).scatter_add_(1, ids[part].clamp(0), p[part])
            best = torch.sparse.mm(weight, of_teacher.t()).t().topk(k, -1)
            found[0][part] = best.indices.masked_fill(best.values <= 0, -1)
            found[1][part] = best.values.log()
        lead = given.ids.shape[:-1]
        return replace(given, ids=found[0].view(*lead, k), logprobs=found[1].view(*lead, k))

    @check.outside_graphs
    def listed(self, student: Tensor, temperatures: tuple[Real, Real], vocab_mismatch: str) -> Any:
        """`top_k` for the loss, checked."""
        self.checked_weight(student, vocab_mismatch)
        check.listed("logprobs", self.teacher.ids, self.teacher.logprobs, student)
        taken = self.teacher.logprobs_temperature
        if len({t for t in (taken, *temperatures) if not isinstance(t, Tensor)}) > 1:
            raise ValueError(
                "logprobs_temperature must be the loss's for a TeacherTopK that is projected, which commutes with no "
                f"change of the temperature, but it is {taken}, and the student's and the teacher's are {temperatures}"
            )
        return self.top_k()


OtherVocabulary = TeacherSorted | TeacherProjected
