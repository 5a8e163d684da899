"""TRL's generalised Jensen–Shannon loss on the fused kernels: same signature, same values, same gradients.

>>> from trl.experimental.gkd import GKDTrainer
>>> GKDTrainer.generalized_jsd_loss = staticmethod(fusedkd.integrations.trl.generalized_jsd_loss)

The trainer remains TRL's. As of TRL 1.16 GKD divides by the token count of all processes without multiplying by their
number, so that under data parallelism loss and gradient are too small by that factor, which
:func:`fusedkd.integrations.check.kd_check` shows, and it leaves the loss's temperature at 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkd.divergences import JSD
from fusedkd.losses.kd import kd_loss
from fusedkd.reference.softmax import log_softmax


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
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

    Returns:
        float32 (float64 for float64 logits), where TRL returns the logits' type. Without a labelled position 0 that
        still has a graph (for ``"mean"`` TRL has NaN).

    Raises:
        ValueError, TypeError: as :func:`fusedkd.kd_loss`.
    """
    mask = None if labels is None else labels != -100
    vocabulary = student_logits.shape[-1]
    if num_items_in_batch is not None:
        count: Tensor | float = num_items_in_batch
    elif reduction == "batchmean":
        count = max(len(student_logits), 1) if mask is None else mask.sum()
    elif reduction == "mean":
        count = student_logits.numel() if mask is None else mask.sum() * vocabulary
    elif reduction == "sum":
        count = 1
    else:
        return _summands(student_logits, teacher_logits, mask, beta, temperature)
    return kd_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        divergence=JSD(beta),
        scale_by_t2=False,
        kd_mask=mask,
        kd_normalizer=count.to(student_logits.device) if isinstance(count, Tensor) else count,
    )


def _summands(student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float, temperature: float) -> Tensor:
    """What the other reductions add up."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    selected = slice(None) if mask is None else mask
    log_q = log_softmax(student[selected].to(dtype) / temperature)
    log_p = log_softmax(teacher[selected].detach().to(dtype) / temperature)
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    share = torch.tensor(beta, dtype=dtype, device=student.device)
    log_m = torch.logaddexp(log_p + share.log(), log_q + torch.log1p(-share))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True)
