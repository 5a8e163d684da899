"""The contrastive loss of hidden states."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedkd import checks as check
from fusedkd.checks import Real
from fusedkd.losses.layer_inputs import row_weights, total
from fusedkd.losses.linear_kd import linear_kd_loss
from fusedkd.losses.names import by_name
from fusedkd.losses.options import Reduction
from fusedkd.teachers import TeacherHead


@by_name
def contrastive_hidden_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Real = 0.07,
    negatives: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: Literal["l2"] | None = "l2",
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
) -> Tensor:
    """−log of the softmax of ⟨s_i, t_j⟩/τ at j = i: each row of the student should be told from its teacher's row among
    others (InfoNCE, arXiv:1807.03748, eq. 4; of intermediate layers: CoDIR, arXiv:2009.14167, and CILDA,
    arXiv:2204.07674). The rows are usually pooled: one per sequence.

    The N × N scores exist a tile of rows at a time: this is the cross-entropy of :func:`linear_kd_loss` whose head is
    the teacher's rows. Beside the tile there are copies of ``(N, H)`` where rows are normalised or masked, in the type
    of the input.

    Args:
        student, teacher: ``(*, H)`` each, of one type: float16, bfloat16, float32 or float64. The teacher never
            receives a gradient.
        temperature: τ > 0, a number or a 0-d tensor.
        negatives: what the teacher's row is told from. None: the selected rows of `teacher`, in the batch (CILDA);
            the loss of a single row is 0.
            ``(R, H)``: these rows, of a memory bank (CoDIR), and no row of the batch. On several devices, the rows of
            the others are what can be put here.
        mask: ``(*)``. Bool or integer: non-zero selects; float: weights, 0 is not selected. Rows that are not selected
            are not read, and are nobody's negatives. None: all rows.
        normalize: ``"l2"``: rows of both sides, and `negatives`, are divided by their norms; None: they are not.
        reduction: ``"mean"`` over the selected rows (float masks: over the sum of weights), ``"sum"``, or ``"none"``:
            ``(*)``.
        normalizer: replaces the count under ``"mean"``: a number or a 0-d tensor.

    Returns:
        float32 (float64 for float64 input): a scalar, or ``(*)`` under ``"none"``.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    check.float_rows("student", student)
    check.float_rows("teacher", teacher, like=student)
    check.real("temperature", temperature, open_low=True)
    check.reduction(reduction, normalizer=normalizer)
    if normalize not in ("l2", None):
        raise ValueError(f"normalize must be 'l2' or None, not {normalize!r}")
    check.frozen("teacher", teacher, student.requires_grad, never=True)
    flat_mask = check.row_vector("mask", mask, student)
    lead, H = student.shape[:-1], student.shape[-1]
    for name, rows in (("teacher", teacher), ("negatives", negatives)):
        if rows is not None and name == "negatives":
            check.float_rows(name, rows)
            if rows.dim() != 2 or rows.device != student.device or len(rows) == 0:
                kind = f"{tuple(rows.shape)} on {rows.device}"
                raise ValueError(f"negatives must be (R, {H}) with R ≥ 1 on the student's device, not {kind}")
        if rows is not None and rows.shape[-1] != H:
            sizes = f"{H} and {rows.shape[-1]}"
            raise ValueError(
                f"student and {name} must have the same last dimension, not {sizes}: project one of them first, with "
                f"torch.nn.Linear({sizes.replace(' and', ',')})"
            )
        if rows is not None and rows.dtype != student.dtype:
            raise TypeError(f"{name} must be {student.dtype} like the student, not {rows.dtype}")
    selected = None if flat_mask is None else flat_mask != 0
    ours, theirs = (_rows(x.reshape(-1, H), selected, normalize) for x in (student, teacher.detach()))
    weighted = flat_mask is not None and flat_mask.is_floating_point()
    options = {"logit_scale": 1 / temperature, "reduction": "none"}
    if negatives is None and not weighted:
        loss = _in_batch(ours, theirs, selected, **options | {"reduction": reduction, "ce_normalizer": normalizer})
        return loss.view(lead) if reduction == "none" else loss
    if negatives is None:
        losses = _in_batch(ours, theirs, selected, **options)
    else:
        losses = _against(ours, theirs, _rows(negatives.detach(), None, normalize), **options)
    weights, divisor = row_weights(flat_mask, student, normalizer if reduction == "mean" else 1.0)
    if weights is not None:
        losses = torch.where(weights != 0, weights * losses, 0)
    return losses.view(lead) if reduction == "none" else total(losses, divisor)


def _rows(x: Tensor, selected: Tensor | None, normalize: str | None) -> Tensor:
    """Those that are not selected become 0, and so does their gradient."""
    if selected is not None:
        x = torch.where(selected.unsqueeze(-1), x, 0)
    if normalize is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.normalize(x.to(wide), dim=-1).to(x.dtype)


def _in_batch(student: Tensor, teacher: Tensor, selected: Tensor | None, **options: Any) -> Tensor:
    """Of the selected rows of the teacher."""
    labels, bias = torch.arange(len(teacher), device=teacher.device), None
    if selected is not None:
        labels = torch.where(selected, labels, -100)
        bias = torch.where(selected, 0.0, -torch.inf).to(teacher.dtype)
    if len(teacher) < 2:  # nothing to be told from: 0, by a second column that no softmax sees
        teacher = F.pad(teacher, (0, 0, 0, 2 - len(teacher)))
        bias = torch.arange(2.0, device=teacher.device).log().flip(0).to(teacher.dtype)
    return _cross_entropy(student, teacher, labels, student_bias=bias, **options)


def _against(student: Tensor, teacher: Tensor, negatives: Tensor, **options: Any) -> Tensor:
    """Per row, of its teacher's row and the negatives: log(1 + e^(l − p)) with p its own score, and l = log Σ e^score
    of the negatives, which the cross-entropy of any of them gives.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    x, scale = student.to(wide), options["logit_scale"]
    own, first = ((x * rows.to(wide)).sum(-1) * scale for rows in (teacher, negatives[:1]))
    return F.softplus(_cross_entropy(student, negatives, labels, **options) + (first - own), threshold=1e4)


def _cross_entropy(student: Tensor, head: Tensor, labels: Tensor, **options: Any) -> Tensor:
    unread = TeacherHead(student.detach(), head)  # of a term whose weight is 0
    return linear_kd_loss(student, head, unread, labels, kd_weight=0.0, ce_weight=1.0, **options)
