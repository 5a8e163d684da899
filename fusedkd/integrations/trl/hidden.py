"""Losses of hidden states and heads, whose logits exist a tile of rows at a time: the stable ``DistillationTrainer``,
and the asynchronous trainer of served teachers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.divergences import JSD
from fusedkd.integrations.trl.lists import closed
from fusedkd.losses.linear_kd import linear_kd_loss
from fusedkd.teachers import TeacherHead, TeacherTopK


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The generalised JSD (GKD, arXiv:2306.13649, eq. 1) of TRL's ``DistillationTrainer``, without T².

    Args:
        student_hidden_states, teacher_hidden_states: ``(B, K, H)`` each with its own H.
        student_lm_head_weight, teacher_lm_head_weight: ``(V, H)``; of FSDP2's shares each process gathers its own.
        completion_mask: ``(B, K)``, non-zero selects.
        beta: 0 is KL(p‖q), 1 is KL(q‖p).
        num_items_in_batch: what the sum is divided by; None: the selected positions.
        student_lm_head_bias, teacher_lm_head_bias: ``(V,)`` or None.
        student_logit_scale, student_final_logit_softcapping: z' = c·tanh(scale·z/c); the teacher's likewise.
        temperature: T > 0 of both sides.

    Returns:
        The loss; the sum of the student's entropies, in nats and at `temperature`, as TRL has it; how many positions
        were selected.
    """
    valid = completion_mask.reshape(-1) != 0
    student, teacher = (x.reshape(-1, x.shape[-1])[valid] for x in (student_hidden_states, teacher_hidden_states))
    rows = Rows(
        student,
        student_lm_head_weight,
        student_lm_head_bias,
        student_logit_scale,
        student_final_logit_softcapping,
        temperature,
    )
    with torch.no_grad():
        weight, bias = head_of(teacher, teacher_lm_head_weight, teacher_lm_head_bias)
    form = TeacherHead(teacher, weight, bias, teacher_final_logit_softcapping, _scale(teacher_logit_scale))
    count = valid.sum()
    items = count if num_items_in_batch is None else num_items_in_batch
    items = items.to(student.device) if isinstance(items, Tensor) else items
    loss, entropies = rows.loss(form, divergence=JSD(beta), kd_normalizer=items)
    return loss, entropies.sum(), count


def chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The generalised JSD over the columns that a server lists, of TRL's ``AsyncDistillationTrainer``: sums.

    Args:
        hidden_valid: ``(N, H)``.
        lm_head_weight, lm_head_bias: ``(V, H)``, ``(V,)`` or None.
        logit_scale, final_logit_softcapping, temperature: as for :func:`chunked_divergence_loss`.
        target_ids, teacher_target_logps, valid_candidate_mask: ``(N, K)``: columns, log p there, whether they count.
        beta: 0 is KL(p‖q), 1 is KL(q‖p).
        add_tail_bucket: all other columns are one more; else both sides are renormalised over the listed ones.
        teacher_id_idx: ``(N,)``, of which teacher a row is, or None; `num_teachers`: how many there are.
        chunk_size: has no effect: see `max_tile_bytes` of :func:`fusedkd.linear_kd_loss`.

    Returns:
        The loss; the same without gradient; the sums of the student's entropies at `temperature` and of the teacher's
        over the listed columns; ``(3·num_teachers,)``: rows, loss and teacher's entropy of each.

    Raises:
        ValueError: where :class:`fusedkd.TeacherTopK` does not serve the divergence, or not without the tail.
    """
    rows = Rows(hidden_valid, lm_head_weight, lm_head_bias, logit_scale, final_logit_softcapping, temperature)
    family: Any = "forward_kl" if beta == 0 else "reverse_kl" if beta == 1 else JSD(beta)
    tail: Any = "bucket" if add_tail_bucket else "renormalize" if beta == 1 else "both_renormalized"
    ids = target_ids.masked_fill(~valid_candidate_mask, -1)
    teacher = TeacherTopK(ids, teacher_target_logps, tail=tail, logprobs_temperature=temperature)
    each, own_entropies = rows.loss(
        teacher, divergence=family, reduction="none" if teacher_id_idx is not None else "sum"
    )
    listed = closed(teacher_target_logps, valid_candidate_mask, add_tail_bucket)
    loss, entropies = each.sum(), torch.special.entr(listed.exp()).sum(-1)
    stats = loss.new_zeros(3 * num_teachers)
    if teacher_id_idx is not None:
        own = torch.stack([torch.ones_like(entropies), each.detach(), entropies], -1)
        stats = stats.view(-1, 3).index_add(0, teacher_id_idx, own.to(stats.dtype)).view(-1)
    return loss, loss.detach(), own_entropies.sum(), entropies.sum(), stats


class Rows:
    """A student's rows ``(N, H)`` with their head, and what its logits are on the way to the softmax."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        temperature: float,
    ):
        self.hidden = hidden
        self.weight, self.bias = head_of(hidden, weight, bias)
        self.options: dict[str, Any] = {"temperature": temperature, "scale_by_t2": False}
        self.options |= {"logit_scale": _scale(scale), "logit_softcap": softcap}

    def loss(self, teacher: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """And the student's entropies, ``(N,)``, in nats."""
        options |= self.options | {"return_terms": True, "statistics": ["student_entropy"]}
        loss, terms = linear_kd_loss(self.hidden, self.weight, teacher, student_bias=self.bias, **options)
        return loss, terms.statistics["student_entropy"]  # type: ignore[union-attr]


def head_of(hidden: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, whole and of the hidden states' type, which autocast sees to by itself."""
    tensors = [None if x is None else _whole(x) for x in (weight, bias)]
    if check.autocast_dtype(hidden.device) is None:
        tensors = [None if x is None else x.to(hidden.dtype) for x in tensors]
    return tensors[0], tensors[1]  # type: ignore[return-value]


def _whole(tensor: Any) -> Tensor:
    """Of FSDP2's shares. Each process has a gradient of its own rows, and of those the share is the mean."""
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise ValueError("a head that DeepSpeed ZeRO-3 shards is not served: leave the trainer unpatched")
    if not check.is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)  # type: ignore[no-any-return]


def _scale(scale: float) -> float | None:
    return None if scale == 1 else scale
