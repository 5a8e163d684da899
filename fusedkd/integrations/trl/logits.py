"""Losses of whole rows of logits: ``generalized_jsd_loss`` of GKD, GOLD and IW-OPD, full-logit self-distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd.divergences import JSD
from fusedkd.integrations.trl.lists import jsd_of_lists, shared_columns
from fusedkd.losses.kd import kd_loss
from fusedkd.reference.softmax import log_softmax

LEAST = 1e-8
"""Probabilities below this count as this, where probabilities are given."""


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
    *,
    logits_are_probs: bool = False,
    top_k: int = 0,
    add_tail: bool = True,
) -> Tensor:
    """β·KL(p‖m) + (1 − β)·KL(q‖m), m = βp + (1 − β)q (GKD, arXiv:2306.13649, eq. 1), with TRL's conventions: β = 0 is
    KL(p‖q), β = 1 is KL(q‖p), and there is no factor T².

    Args:
        student_logits, teacher_logits: ``(B, L, V)``, of any floating type; the teacher's may be padded to another V.
            The teacher gets no gradient.
        labels: ``(B, L)``, already shifted; positions that are −100 are left out. None: all positions count.
        beta: in [0, 1].
        temperature: T > 0 of both sides.
        reduction: ``"batchmean"``: the sum over the number of labelled positions, without labels over B. ``"sum"``.
            ``"mean"``: over positions and vocabulary. ``"none"``: every summand, ``(n, V)`` with labels and
            ``(B, L, V)`` without, by PyTorch's operators; for one value per position use :func:`fusedkd.kd_loss`.
        num_items_in_batch: labelled positions in the whole optimiser step. If given, the sum over it is returned,
            whatever `reduction` says.
        logits_are_probs: both sides are probabilities, which need not sum to 1 (GOLD gives those of the ids that two
            vocabularies share). `temperature` has no effect then. By PyTorch's operators.
        top_k: K > 0, where V is larger: the columns compared are the teacher's K largest for β = 0, the student's for
            β = 1, else both (IW-OPD). Without ``"none"``.
        add_tail: with `top_k`: all other columns are one more; else both sides are renormalised over the listed ones.

    Returns:
        float32 (float64 for float64 logits), where TRL returns the logits' type. Without a labelled position 0 that
        still has a graph (for ``"mean"`` TRL has NaN).

    Raises:
        ValueError, TypeError: as :func:`fusedkd.kd_loss`.
    """
    mask = None if labels is None else labels != -100
    columns = student_logits.shape[-1]
    listed = 0 < top_k < columns
    if listed:
        if logits_are_probs or (reduction == "none" and num_items_in_batch is None):
            given = "logits_are_probs=True" if logits_are_probs else 'reduction="none"'
            raise ValueError(f"top_k must be 0 with {given}, not {top_k}")
        columns = top_k * (1 if beta in (0, 1) else 2) + bool(add_tail)
    if num_items_in_batch is not None:
        count: Tensor | float = num_items_in_batch
    elif reduction == "batchmean":
        count = max(len(student_logits), 1) if mask is None else mask.sum()
    elif reduction == "mean":
        rows = student_logits[..., 0].numel() if mask is None else mask.sum()
        count = rows * columns
    elif reduction == "sum":
        count = 1
    else:
        return _summands(student_logits, teacher_logits, mask, beta, temperature, logits_are_probs)
    if logits_are_probs:
        summands = _summands(student_logits, teacher_logits, mask, beta, temperature, logits_are_probs)
        return summands.sum() / (count.clamp_min(1) if isinstance(count, Tensor) else count)
    normalizer = count.to(student_logits.device) if isinstance(count, Tensor) else count
    if listed:
        ids, logprobs = shared_columns(student_logits, teacher_logits, beta, top_k, temperature)
        rules: dict[str, Any] = {"temperature": temperature, "mask": mask, "normalizer": normalizer}
        return jsd_of_lists(student_logits, ids, logprobs, beta, add_tail, **rules)
    return kd_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        divergence=JSD(beta),
        scale_by_t2=False,
        kd_mask=mask,
        kd_normalizer=normalizer,
    )


def full_logit_self_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float
) -> Tensor:
    """The generalised JSD of each row, ``(*)``, of logits ``(*, V)``; β is `distillation_alpha` (SDFT,
    arXiv:2601.19897; SDPO, arXiv:2601.20802).
    """
    family = JSD(distillation_alpha)
    return kd_loss(student_logits, teacher_logits, divergence=family, scale_by_t2=False, reduction="none")


def _summands(
    student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float, temperature: float, probabilities: bool
) -> Tensor:
    """What the other reductions add up."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    selected = slice(None) if mask is None else mask
    student, teacher = student[selected].to(dtype), teacher[selected].detach().to(dtype)
    if probabilities:
        log_q, log_p = student.clamp_min(LEAST).log(), teacher.clamp_min(LEAST).log()
    else:
        log_q, log_p = log_softmax(student / temperature), log_softmax(teacher / temperature)
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    share = torch.tensor(beta, dtype=dtype, device=student.device)
    log_m = torch.logaddexp(log_p + share.log(), log_q + torch.log1p(-share))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True)
