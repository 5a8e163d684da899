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
    ids: Tensor
    """``(R, K)``, 0 at padding."""
    valid: Tensor
    off: Tensor
    """``(R, V)``: log q of the columns off the list, over that of all of them; −inf on the list."""
    log_off: Tensor
    """``(R, 1)``: log q of all of them; −inf where both sides are renormalised."""

    def chained(self, w: Tensor) -> Tensor:
        """∂D/∂s ``(R, V)``, s = z/T, of w = ∂D/∂log q of the outcomes: w_k − q·Σw, of which the columns of the tail
        have their shares. In the memory of `off`.
        """
        k, total = self.ids.shape[1], w.sum(-1, keepdim=True)
        of_tail = -self.log_off.exp() * total
        if w.shape[1] > k:
            of_tail = of_tail + w[:, k:]
        listed = w[:, :k] - self.log_q[:, :k].exp() * total
        return self.off.exp_().mul_(of_tail).scatter_add_(-1, self.ids, torch.where(self.valid, listed, 0))


def of(tail: str, ids: Tensor, logprobs: Tensor, s: Tensor, sharpening: Tensor) -> Outcomes:
    """Of ids ``(R, K)``, −1 for padding, the teacher's log-probabilities there, in the dtype in which they are known,
    and the student's s = z/T ``(R, V)`` float64. `sharpening` takes the log-probabilities to the loss's temperature.
    """
    valid = ids >= 0
    column = torch.where(valid, ids, 0)
    known = torch.where(valid, logprobs, -torch.inf)
    log_p, s_k = known.double(), torch.where(valid, s.gather(-1, column), -torch.inf)
    # padding stands for the highest id; a row of nothing but padding has no term
    off = s.scatter(-1, torch.where(valid, ids, ids.amax(-1, keepdim=True).clamp(min=0)), -torch.inf)
    log_off = off.logsumexp(-1, keepdim=True)
    off = off.sub_(torch.where(log_off == -torch.inf, 0, log_off))
    if tail in ("renormalize", "both_renormalized"):
        log_p = log_softmax(log_p * sharpening)
    if tail == "both_renormalized":
        lost = torch.where(log_off < torch.inf, 0, torch.nan)  # NaN off the list shows, though nothing there counts
        return Outcomes(log_p, log_softmax(s_k) + lost, column, valid, off, torch.full_like(log_off, -torch.inf))
    log_all = torch.logaddexp(log_off, s_k.logsumexp(-1, keepdim=True))
    log_all = torch.where(log_all == -torch.inf, 0, log_all)
    log_q, log_off = s_k - log_all, log_off - log_all
    if tail != "ignore":
        log_rest = torch.full_like(log_off, -torch.inf)
        if tail == "bucket":
            rest = tail_of_teacher(known, log_off > -torch.inf)
            log_mass = (log_p.exp().sum(-1, keepdim=True) + rest).log()
            log_p, log_rest = log_p - log_mass, rest.log() - log_mass
        log_p, log_q = torch.cat([log_p, log_rest], -1), torch.cat([log_q, log_off], -1)
    return Outcomes(log_p, log_q, column, valid, off, log_off)
