"""The options of the KD losses, once: their names, types, defaults and documentation; and the terms of a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.statistics import OF_TEACHER, STATISTICS
from fusedkd.checks import Real
from fusedkd.divergences import Divergences
from fusedkd.losses.names import by_name

P = ParamSpec("P")
R = TypeVar("R")
Reduction: TypeAlias = Literal["mean", "sum", "none"]


class KDTerms(NamedTuple):
    """The terms of a KD loss, detached, for logging: ``kd`` includes T^k, neither includes its weight, both use the
    loss's normalisers.
    """

    kd: Tensor
    ce: Tensor


class KDTermsAndStatistics(NamedTuple):
    """:class:`KDTerms`, and the `statistics` that were asked for: detached tensors ``(*)`` by their names."""

    kd: Tensor
    ce: Tensor
    statistics: dict[str, Tensor]


class KDOptions(TypedDict, total=False):
    """temperature, teacher_temperature: T > 0 of the KD term; the teacher's defaults to the student's. CE is always at
        temperature 1. A tensor ``(*)`` has one for each row.
    divergence: a name of :data:`fusedkd.divergences.FAMILIES`, or an object where it has parameters, numbers or tensors
        as of `temperature`: ``fusedkd.JSD(beta=0.1)``. ``logit_mse`` needs T = 1, ``dkd`` labels; neither is for a
        teacher of few columns, nor is ``adaptive_kl``, and :class:`~fusedkd.TeacherSamples` serve ``forward_kl`` alone.
        Or a list of pairs (weight, divergence): the KD term is their weighted sum, each with its own T^k.
    kd_weight, ce_weight: the weights of the two terms, ≥ 0. A term whose weight is the number 0 is not computed. A
        tensor `kd_weight` ``(*)`` has one for each row, which no count of rows knows of: `kd_mask` has weights that
        ``"mean"`` divides by.
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
        teacher's is divided by its own count of rows. A weight may be a tensor ``(*)``: each row has its own.
    teacher_gradient: the loss is differentiable in the teacher as well (its logits, or its hidden states, head and
        bias): for methods that train what both models read. From logits it costs about as much again, on a CPU two
        thirds to seven eighths of that, from heads its two products. Not for teachers of few
        columns, nor with `inplace` or a split vocabulary.
    vocab_group: the ``torch.distributed.ProcessGroup`` over which the vocabulary is split evenly: each rank passes its
        own columns of both sides' logits, or its rows of the heads and biases; all else, labels and ids of listed
        teachers among it, counts over the whole vocabulary and is the same on each rank, as is the loss. DTensors that
        are split over the vocabulary say so themselves. See ``docs/parallel.md``.
    vocab_size: of the split vocabulary, where the last shards are shorter or padded: columns from there on are no part
        of it, whatever they hold, and get gradient 0. None: all shards are full.
    """

    temperature: Real
    teacher_temperature: Real | None
    divergence: Divergences
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
    teacher_gradient: bool
    vocab_group: Any
    vocab_size: int | None


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
    "teacher_gradient": False,
    "vocab_group": None,
    "vocab_size": None,
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


def logged(terms: Tensor, weights: Sequence[Real], statistics: dict[str, Tensor]) -> KDTerms | KDTermsAndStatistics:
    """The terms ``(teachers, 2, …)``, of which the KD terms are weighted; with the statistics, if there are any."""
    kd, ce = terms[:, 0], terms[0, 1]
    alone = len(weights) == 1 and not isinstance(weights[0], Tensor) and weights[0] == 1
    kd = kd[0] if alone else torch.stack(list(map(weighted, kd.unbind(), weights))).sum(0).to(kd.dtype)
    return KDTermsAndStatistics(kd, ce, statistics) if statistics else KDTerms(kd, ce)


def checked_statistics(names: Any, return_terms: bool, split: bool) -> tuple[bool, bool]:
    """(whether any are asked for, whether any is of the teacher), of statistics that can be had."""
    check.flag("return_terms", return_terms)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"statistics must be a list of names of {', '.join(STATISTICS)}, not {type(names).__name__}")
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"statistics must be of {', '.join(STATISTICS)}, but one is {name!r}")
    if names and not return_terms:
        raise ValueError("statistics are among the terms: pass return_terms=True")
    if names and split:
        raise ValueError("statistics are not available for a split vocabulary: gather the logits first")
    return len(names) > 0, not OF_TEACHER.isdisjoint(names)


def by_statistic(found: Tensor, names: Sequence[str], lead: torch.Size) -> dict[str, Tensor]:
    """Those that are asked for, of what the operator found."""
    return {name: found[STATISTICS.index(name)].view(lead) for name in names}


def weighted(term: Tensor, weight: Real) -> Tensor:
    """weight · term for logging, where 0·∞ is 0."""
    product = weight * term
    return torch.where(product.isnan() & ~term.isnan(), 0, product)
