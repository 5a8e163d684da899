"""Losses of a few columns per row, the rest as one more column or left out of both sides: top-k self-distillation
(SDFT, SDPO), IW-OPD's top-k, and what the trainers of served teachers compare.

The log-softmax over the vocabulary that those of served teachers make before their loss remains TRL's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd.divergences import JSD
from fusedkd.losses.kd import kd_loss
from fusedkd.teachers import TeacherTopK

LEAST_TAIL = 1e-7
"""−log of the largest probability that the listed columns have together, for the teacher of a mixture."""


def jsd_of_lists(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    beta: float,
    tail: bool,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    reduction: Any = "mean",
) -> Tensor:
    """The generalised JSD over the columns `ids`, ``(*, K)``, −1 for none, of logits ``(*, V)`` at `temperature` and
    the teacher's log-probabilities there.
    """
    options: dict[str, Any] = {"kd_mask": mask, "kd_normalizer": normalizer, "reduction": reduction}
    if tail and beta in (0, 1):
        teacher = TeacherTopK(ids, logprobs, tail="bucket", logprobs_temperature=temperature)
        family: Any = "reverse_kl" if beta else "forward_kl"
        return kd_loss(student, teacher, temperature=temperature, divergence=family, scale_by_t2=False, **options)
    unlisted, some = ids < 0, ids[..., :1].clamp_min(0)
    columns = ids.where(~unlisted, some)
    listed = student.gather(-1, columns).masked_fill(unlisted, -torch.inf) / temperature
    if tail:
        rest = (student / temperature).scatter(-1, columns, -torch.inf).logsumexp(-1, keepdim=True)
        listed = torch.cat([listed, rest], -1)
    return kd_loss(listed, closed(logprobs, ~unlisted, tail), divergence=JSD(beta), scale_by_t2=False, **options)


def closed(logprobs: Tensor, valid: Tensor, tail: bool) -> Tensor:
    """Log-probabilities whose sum is 1: with that of all other columns as one more, or renormalised; without a valid
    one all −inf then.
    """
    logprobs = logprobs.masked_fill(~valid, -torch.inf)
    held = logprobs.logsumexp(-1, keepdim=True)
    if not tail:
        return logprobs - held.clamp_min(torch.finfo(held.dtype).min)
    return torch.cat([logprobs, (-torch.expm1(held.clamp_max(-LEAST_TAIL))).log()], -1)


@torch.no_grad()
def shared_columns(student: Tensor, teacher: Tensor, beta: float, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The columns that IW-OPD compares, the second of a pair −1, and the teacher's log-probabilities there."""
    sides = [side for side, wanted in ((teacher, beta != 1), (student, beta != 0)) if wanted]
    ids = torch.cat([side.topk(k, dim=-1).indices for side in sides], -1)
    logprobs = logprobs_at(teacher, ids, temperature)
    again = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).tril(-1).any(-1)
    return ids.masked_fill(again, -1), logprobs


def logprobs_at(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) of some columns ``(*, K)``, without gradient, in float32 or float64."""
    logits = logits.detach()
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scaled = logits.to(dtype) / temperature
    return scaled.gather(-1, ids) - scaled.logsumexp(-1, keepdim=True)


def topk_self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """The generalised JSD of each row, ``(*)``, over the student's K largest columns of logits ``(*, V)``; β is
    `distillation_alpha`. `distillation_add_tail`: all other columns are one more; else both sides are renormalised over
    the listed ones (SDFT, arXiv:2601.19897; SDPO, arXiv:2601.20802).
    """
    ids = student_logits.detach().topk(distillation_topk, dim=-1).indices
    logprobs = logprobs_at(teacher_logits, ids)
    return jsd_of_lists(student_logits, ids, logprobs, distillation_alpha, distillation_add_tail, reduction="none")


def server_forward_kl_loss(
    self: Any, teacher_result: dict[str, Tensor], student_log_probs: Tensor, labels: Tensor
) -> Tensor:
    """KL(p‖q) over the K columns that a server lists (trainers of served teachers, β = 0)."""
    logprobs = teacher_result["topk_logprobs"]
    ids = teacher_result["topk_token_ids"].masked_fill(logprobs == -torch.inf, -1)
    mask = labels != -100
    return jsd_of_lists(student_log_probs, ids, logprobs, 0, self.loss_add_tail, mask=mask, normalizer=mask.sum())


def sparse_top_1_divergence_loss(
    self: Any,
    student_log_probs: Tensor,
    teacher_top1_token_ids: Tensor,
    teacher_top1_logprobs: Tensor,
    reverse_token_ids: Tensor,
    reverse_teacher_logprobs: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The generalised JSD over the text's token, and for β < 1 the teacher's first (trainers of served teachers; IW-OPD
    with K = 1).
    """
    ids, logprobs = reverse_token_ids.unsqueeze(-1), reverse_teacher_logprobs.unsqueeze(-1)
    if self.beta != 1:
        text = ids.masked_fill(ids == teacher_top1_token_ids.unsqueeze(-1), -1)
        ids = torch.cat([teacher_top1_token_ids.unsqueeze(-1), text], -1)
        logprobs = torch.cat([teacher_top1_logprobs.unsqueeze(-1), logprobs], -1)
    mask = labels != -100
    count = mask.sum() if num_items_in_batch is None else num_items_in_batch
    count = count.to(mask.device) if isinstance(count, Tensor) else count
    return jsd_of_lists(student_log_probs, ids, logprobs, self.beta, self.loss_add_tail, mask=mask, normalizer=count)


def local_sparse_top_1_divergence_loss(
    self: Any,
    student_logits: Tensor,
    teacher_logits: Tensor,
    completion_tokens: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The same with a teacher at hand, without the log-softmax of either side (IW-OPD)."""
    first = teacher_logits.argmax(-1)
    text = self._get_reverse_kl_top_1_tokens(student_logits, completion_tokens)
    logprobs = logprobs_at(teacher_logits, torch.stack([first, text], -1), self.temperature)
    student = student_logits if self.temperature == 1 else student_logits / self.temperature
    taken = {"teacher_top1_logprobs": logprobs[..., 0], "reverse_teacher_logprobs": logprobs[..., 1]}
    taken |= {"teacher_top1_token_ids": first, "reverse_token_ids": text}
    return sparse_top_1_divergence_loss(self, student, labels=labels, num_items_in_batch=num_items_in_batch, **taken)
