"""Teachers known at K columns per row, of any divergence: its `definition` runs on the K columns, and on all others as
one more, the tail. Of both sides there are the log-probabilities of these outcomes, ``(R, K + 1)``: never a row of the
teacher over the vocabulary. What they are for each ``tail`` is said in :class:`fusedkd.TeacherTopK`; forward and
reverse KL have kernels (:mod:`fusedkd.reference.sparse`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd.reference.softmax import log_softmax
from fusedkd.reference.sparse import tail_of_teacher


class Outcomes(NamedTuple):
    """What a definition sees of R rows, and how its gradient gets back to the student's logits."""

    log_p: Tensor
    """``(R, K)``, or ``(R, K + 1)`` with the tail; −inf at padding."""
    log_q: Tensor
    log_all: Tensor
    """``(R, V)``: log q of all columns; where both sides are renormalised, −inf off the list."""
    ids: Tensor
    """``(R, K)``, 0 at padding."""
    valid: Tensor
    listed: Tensor
    """``(R, V)``."""

    def chained(self, w: Tensor) -> Tensor:
        """∂D/∂s ``(R, V)``, s = z/T, of w = ∂D/∂log q of the outcomes: w_k − q·Σw, where the columns of the tail share
        its w as they share its q.
        """
        k = self.ids.shape[1]
        gradient = -self.log_all.exp() * w.sum(-1, keepdim=True)
        if w.shape[1] > k:
            log_tail = self.log_q[:, k:]
            share = torch.where(self.listed | (log_tail == -torch.inf), -torch.inf, self.log_all - log_tail)
            gradient = gradient + w[:, k:] * share.exp()
        return gradient.scatter_add(-1, self.ids, torch.where(self.valid, w[:, :k], 0))


def of(tail: str, ids: Tensor, logprobs: Tensor, s: Tensor, sharpening: Tensor) -> Outcomes:
    """Of ids ``(R, K)``, −1 for padding, the teacher's log-probabilities there, in the dtype in which they are known,
    and the student's s = z/T ``(R, V)`` float64. `sharpening` takes the log-probabilities to the loss's temperature.
    """
    valid = ids >= 0
    column = torch.where(valid, ids, 0)
    known = torch.where(valid, logprobs, -torch.inf)
    log_p, log_all = known.double(), log_softmax(s)
    listed = torch.zeros_like(s).scatter_add(-1, column, valid.to(s.dtype)) > 0
    if tail == "both_renormalized":
        log_all = log_softmax(torch.where(listed, log_all, -torch.inf))
    log_q = torch.where(valid, log_all.gather(-1, column), -torch.inf)
    if tail in ("renormalize", "both_renormalized"):
        log_p = log_softmax(log_p * sharpening)
    if tail in ("renormalize", "bucket"):
        log_tail_q = torch.where(listed, -torch.inf, log_all).logsumexp(-1, keepdim=True)
        log_tail_p = torch.full_like(log_tail_q, -torch.inf)
        if tail == "bucket":
            rest = tail_of_teacher(known, log_tail_q > -torch.inf)
            log_mass = (log_p.exp().sum(-1, keepdim=True) + rest).log()
            log_p, log_tail_p = log_p - log_mass, rest.log() - log_mass
        log_p, log_q = torch.cat([log_p, log_tail_p], -1), torch.cat([log_q, log_tail_q], -1)
    return Outcomes(log_p, log_q, log_all, column, valid, listed)
