"""The terms of a distilling Trainer's loss beside those of the logits: of hidden states, attention maps, layers.

A term is a sum over its rows divided by their number in the whole optimiser step, all micro-batches and all ranks, as
those of :class:`fusedkd.integrations.config.KDConfig` are. The papers' own are in :mod:`fusedkd.integrations.presets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.divergences import Divergence, DivergenceName, resolve
from fusedkd.integrations.layer_pairs import Layers, Pairs, of_attention, of_hidden, of_student
from fusedkd.integrations.states import Attention, Recorder
from fusedkd.integrations.term import Given, Rows, Term
from fusedkd.losses.attention import attention_kl_loss, attention_mse_loss
from fusedkd.losses.contrastive import contrastive_hidden_loss
from fusedkd.losses.hidden import comparison, hidden_loss
from fusedkd.losses.layers import layer_attention_loss
from fusedkd.losses.pool import pooled, token_weights

Pool: TypeAlias = Literal["mean", "first"]


@dataclass(frozen=True)
class LogitsTerm(Term):
    """Another divergence of the logits, on the rows of KDConfig's: :func:`fusedkd.linear_kd_loss`.

    Args:
        divergence, temperature, scale_by_t2: as there. Of "logit_mse" the temperature is 1.
    """

    divergence: DivergenceName | Divergence = "logit_mse"
    temperature: float = 1.0
    scale_by_t2: bool = True
    name: str = field(default="logits", kw_only=True)
    of_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve(self.divergence)
        check.real("temperature", self.temperature, open_low=True)

    @property
    def rows(self) -> Rows:
        return "kd"

    def loss(self, given: Given) -> Tensor:
        options: dict[str, Any] = {"kd_weight": self.weight, "ce_weight": 0.0, "teacher_temperature": None}
        options |= {"divergence": self.divergence, "temperature": self.temperature, "scale_by_t2": self.scale_by_t2}
        options |= {"label_smoothing": 0.0, "z_loss_weight": 0.0}
        options |= {"reduction": "none"} if given.normalizer is None else {"kd_normalizer": given.normalizer}
        loss, _ = given.linear(**options)
        return loss  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _OfHiddenStates(Term):
    """Layers of both models in pairs, projected where their widths differ."""

    layers: Layers = ((-1, -1),)
    projection: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("projection", "shared"):
            check.flag(name, getattr(self, name))
        if self.shared and not self.projection:
            raise ValueError("shared is True, but projection is False: there is nothing to share")

    def pairs(self, student: Recorder, teacher: Recorder, draw: torch.Generator) -> Pairs:
        student.hidden = teacher.hidden = True
        return of_hidden(self.name, self.layers, student, teacher, draw)

    def widths(self, pairs: Pairs, student: Recorder, teacher: Recorder) -> list[tuple[int, int]]:
        found = [(student.widths[i], sum(teacher.widths[j] for j in group)) for i, group in pairs]
        if self.shared and len(set(found)) > 1:
            raise ValueError(f"a shared projection needs layers of one width, but those of {self.name!r} are {found}")
        if self.projection:
            return found[:1] if self.shared else found
        for (mine, theirs), (i, group) in zip(found, pairs, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"the term {self.name!r} compares hidden state {i} of the student, {mine} wide, with "
                    f"{', '.join(map(str, group))} of the teacher, {theirs} wide: pass projection=True"
                )
        return []


@dataclass(frozen=True)
class HiddenTerm(_OfHiddenStates):
    """A distance between hidden states, of one pair of layers or the sum over several: :func:`fusedkd.hidden_loss`.

    Args:
        layers: pairs of an index into the student's `hidden_states` (0: the embeddings; −1: the last) and one into the
            teacher's, or several whose states are concatenated; or the name of a map of :mod:`fusedkd.layer_maps`, such
            as "uniform". "random_sorted" is drawn anew for each epoch, from the Trainer's seed.
        distance, normalize: as there.
        projection: whether a linear map with bias from the student's width to the teacher's, one for each pair, is
            trained with the student; `shared`: one for all pairs. Its values begin as those of `torch.nn.Linear`, drawn
            from the Trainer's seed.
        pool: "mean" compares the means over the tokens of each sequence that are no padding, "first" the first of them
            (a BERT's [CLS]); the term is then a mean over sequences.
        average: the mean over the pairs instead of their sum.
    """

    distance: Literal["mse", "cosine", "smooth_l1"] = "mse"
    normalize: Literal["l2", "layer_norm"] | None = None
    pool: Pool | None = None
    average: bool = False
    name: str = field(default="hidden", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        comparison(self.distance, self.normalize)
        check.flag("average", self.average)
        _check_pool(self.pool)

    @property
    def rows(self) -> Rows:
        return "attended" if self.pool is None else "sequences"

    def loss(self, given: Given) -> Tensor:
        attended, share = given.attended, self.weight / (len(given.pairs) if self.average else 1)
        student = [given.student.hidden[i] for i, _ in given.pairs]
        teacher = [[given.teacher.hidden[j] for j in group] for _, group in given.pairs]
        if self.pool == "first":
            student, teacher = [first(h, attended) for h in student], [[first(h, attended) for h in t] for t in teacher]
            attended = attended.any(1)
        linears = given.linears
        loss = hidden_loss(
            student,
            teacher,
            attended,
            distance=self.distance,
            normalize=self.normalize,
            projection=[linear.weight for linear in linears] or None,
            bias=[linear.bias for linear in linears] or None,
            pool="mean" if self.pool == "mean" else None,
            layer_weights=[share] * len(student),
            **given.reduced,
        )
        return loss[:, None] if loss.dim() == 1 else loss


@dataclass(frozen=True)
class ContrastiveTerm(_OfHiddenStates):
    """InfoNCE of mean-pooled hidden states, summed over pairs of layers: :func:`fusedkd.contrastive_hidden_loss`.

    A sequence's negatives are the other sequences of its micro-batch, on its rank: the term depends on how a step is
    cut.

    Args:
        layers, projection, shared: as for :class:`HiddenTerm`, one layer of the teacher in a pair.
        temperature: as there.
    """

    temperature: float = 0.07
    name: str = field(default="contrastive", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check.real("temperature", self.temperature, open_low=True)

    @property
    def rows(self) -> Rows:
        return "sequences"

    def pairs(self, student: Recorder, teacher: Recorder, draw: torch.Generator) -> Pairs:
        found = super().pairs(student, teacher, draw)
        for i, group in found:
            if len(group) > 1:
                raise ValueError(f"layers of {self.name!r} must pair {i} with one layer of the teacher, not {group}")
        return found

    def loss(self, given: Given) -> Tensor:
        losses = []
        for n, (i, (j,)) in enumerate(given.pairs):
            h = given.student.hidden[i]
            h = given.linears[n](h) if given.linears else h
            shares, selected = token_weights(h, given.attended)
            sides = pooled(h, shares), pooled(given.teacher.hidden[j].to(h.dtype), shares)
            options: Any = {"temperature": self.temperature, "mask": selected, **given.reduced}
            losses.append(contrastive_hidden_loss(*sides, **options))
        loss = self.weight * torch.stack(losses).sum(0)
        return loss[:, None] if loss.dim() == 1 else loss


@dataclass(frozen=True)
class LayerAttentionTerm(Term):
    """Each of the student's layers against a mixture of the teacher's: :func:`fusedkd.layer_attention_loss` (ALP-KD).

    Args:
        buckets: for each of the student's layers 1 … M the indices of the teacher's `hidden_states` that it attends to;
            or the name of a map of :mod:`fusedkd.layer_maps`, such as "regular". None: all of its layers.
        pool: as for :class:`HiddenTerm`.
    """

    buckets: Sequence[Sequence[int]] | str | None = None
    pool: Pool | None = None
    name: str = field(default="layers", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pool(self.pool)

    @property
    def rows(self) -> Rows:
        return "attended" if self.pool is None else "sequences"

    def pairs(self, student: Recorder, teacher: Recorder, draw: torch.Generator) -> Pairs:
        student.hidden = teacher.hidden = True
        if len({*student.widths, *teacher.widths}) > 1:
            raise ValueError(
                f"the term {self.name!r} needs hidden states of one width, but the student's are "
                f"{student.widths[-1]} wide and the teacher's {teacher.widths[-1]}"
            )
        return of_student(self.name, self.buckets, student, teacher, draw)

    def loss(self, given: Given) -> Tensor:
        student, buckets = [given.student.hidden[i] for i, _ in given.pairs], [group for _, group in given.pairs]
        teacher, attended = [*given.teacher.hidden], given.attended
        if self.pool == "first":
            student, teacher = ([first(h, attended) for h in side] for side in (student, teacher))
        elif self.pool == "mean":
            shares, _ = token_weights(student[0], attended)
            student, teacher = ([pooled(h, shares) for h in side] for side in (student, teacher))
        attended = attended if self.pool is None else attended.any(1)
        loss = self.weight * layer_attention_loss(student, teacher, attended, buckets=buckets, **given.reduced)
        return loss[:, None] if loss.dim() == 1 else loss


@dataclass(frozen=True)
class AttentionTerm(Term):
    """The attention maps of layers, from queries, keys and values: :func:`fusedkd.attention_kl_loss` and
    :func:`fusedkd.attention_mse_loss`. The sum over relations and pairs of layers.

    Args:
        kind: "kl", the divergence of the maps, or "mse", the squared difference of their scores: a mean over all keys
            of a batch, padded ones too, which depends on how a step is cut into micro-batches of other lengths.
        relations: of what the maps are made: "qk" of queries and keys, "qq", "kk" and "vv" of one with itself. Queries
            and keys are taken after rotary embeddings.
        layers: pairs of indices of attention layers, from 0, or the name of a map of :mod:`fusedkd.layer_maps`:
            "uniform_attention", or one whose layers are numbered from 1.
        relation_heads, padded_queries: as there. With `padded_queries` the term is a mean over all positions.
        average: the mean over the pairs of layers instead of their sum.
    """

    kind: Literal["kl", "mse"] = "kl"
    relations: Sequence[Literal["qk", "qq", "kk", "vv"]] = ("qk",)
    layers: Layers = ((-1, -1),)
    relation_heads: int | None = None
    padded_queries: bool = False
    average: bool = False
    name: str = field(default="attention", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("kl", "mse"):
            raise ValueError(f"kind must be 'kl' or 'mse', not {self.kind!r}")
        known, given = ("qk", "qq", "kk", "vv"), self.relations
        if isinstance(given, str) or not given or any(each not in known for each in given):
            raise ValueError(f"relations must be a tuple of {', '.join(known)}, at least one, not {given!r}")
        check.flag("padded_queries", self.padded_queries)
        check.flag("average", self.average)

    @property
    def rows(self) -> Rows:
        return "positions" if self.padded_queries else "attended"

    def pairs(self, student: Recorder, teacher: Recorder, draw: torch.Generator) -> Pairs:
        return of_attention(self.name, self.layers, student, teacher, draw, "qk" in self.relations)

    def loss(self, given: Given) -> Tensor:
        loss_of = attention_kl_loss if self.kind == "kl" else attention_mse_loss
        share = self.weight / (len(given.pairs) if self.average else 1)
        options: dict[str, Any] = {"causal": given.causal, "relation_heads": self.relation_heads, **given.reduced}
        options |= {"padded_queries": self.padded_queries}
        losses = []
        for i, (j,) in given.pairs:
            sides = given.student.attention[i], given.teacher.attention[j]
            for relation in self.relations:
                scales: dict[str, Any] = {}
                if relation == "qk":
                    _refuse_windows(self.name, sides, given.causal)
                    if self.relation_heads is None:
                        scales = {"student_scale": sides[0].scale, "teacher_scale": sides[1].scale}
                (q, k), (of_teacher, k_of_teacher) = (side.relation(relation) for side in sides)
                loss = loss_of(q, k, of_teacher, k_of_teacher, given.attended, **options, **scales)
                losses.append(loss.mean(1) if loss.dim() else loss)  # over heads, of which grouped values have fewer
        return share * torch.stack(losses).sum(0)


def _check_pool(pool: Any) -> None:
    if pool not in (None, "mean", "first"):
        raise ValueError(f"pool must be None, 'mean' or 'first', not {pool!r}")


def first(hidden: Tensor, attended: Tensor) -> Tensor:
    """Of each sequence ``(B, L, H)`` the first token that is no padding, ``(B, H)``."""
    return hidden[torch.arange(len(hidden), device=hidden.device), attended.int().argmax(1)]


def _refuse_windows(name: str, sides: tuple[Attention, ...], causal: bool) -> None:
    for side, who in zip(sides, ("student", "teacher"), strict=True):
        length = side.query.shape[2]
        if side.window is not None and length > (side.window if causal else side.window // 2):
            raise ValueError(
                f"the term {name!r} knows no sliding window, but the {who} has one of {side.window} tokens, and the "
                f"batch {length}: use shorter sequences, or relations without 'qk'"
            )
