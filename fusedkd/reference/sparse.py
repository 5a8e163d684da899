"""Teachers known at K columns per row: what the loss is.

p_k is the teacher's probability of column id_k, q the student's softmax over all V columns, δ = log p − log q on the K
columns, r_q = Σ q and r_p the two tails. The definitions scatter the teacher over the vocabulary, which no kernel does,
and return the value and its gradient with respect to s = z/T.

Of the teacher's tail no more is known than rounding leaves of 1 − Σp: e = ½ε·Σp|log p| + ε', by the rounding of the
log-probabilities, ε of their dtype, and of the softmax that they come from and of the sum, ε' = 2⁻²³ or, if they are
float64, 2⁻⁴⁶.
r_p is |1 − Σp|, at least e. Where the student has nothing off the list, as when K = V, it is 0 up to MOST_LOST: so
much the log_softmax of 16-bit logits may lose. Then p and r_p are divided by their sum, which is 1 unless they were
rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkd.reference.divergences import chain, kl_terms
from fusedkd.reference.softmax import log_softmax

MOST_LOST = 1 / 16
"""Of a teacher's probability, by rounding, where the student has nothing off the list."""


def sampled_cross_entropy(ids: Tensor, weights: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_k w_k·(−log q), and its gradient with respect to s, of rows with ids ``(N, K)``, −1 for padding."""
    q = log_q.exp()
    valid = ids >= 0
    weights = torch.where(valid, weights.to(q.dtype), 0)
    weights = torch.zeros_like(q).scatter_add(-1, torch.where(valid, ids, 0), weights)
    value = torch.where(weights == 0, 0, -weights * log_q).sum(-1)
    return value, weights.sum(-1, keepdim=True) * q - weights


def topk_kl(
    tail: str, reverse: bool, ids: Tensor, logprobs: Tensor, log_q: Tensor, sharpening: Tensor | float
) -> tuple[Tensor, Tensor]:
    """KL(p‖q), or with `reverse` KL(q‖p), and its gradient with respect to s, of rows with ids ``(N, K)``, −1 for
    padding, and the teacher's log-probabilities there, in the dtype in which they are known.

    ``tail``: see :class:`fusedkd.TeacherTopK`. ``sharpening``: T_lp/T, which takes the log-probabilities to the
    temperature T before ``renormalize`` and ``both_renormalized``.
    """
    valid = ids >= 0
    column = torch.where(valid, ids, 0)
    q = log_q.exp()
    listed = torch.zeros_like(q).scatter_add(-1, column, valid.to(q.dtype)) > 0
    lp = torch.where(valid, logprobs.to(q.dtype), -torch.inf)
    if tail in ("renormalize", "both_renormalized"):
        lp = (lp * sharpening).log_softmax(-1)
    log_p = torch.full_like(q, -torch.inf).scatter_reduce(-1, column, lp, "amax")
    p = log_p.exp()
    if tail == "renormalize" and not reverse:
        return kl_terms(log_p, log_q).sum(-1), q - p
    if tail in ("renormalize", "both_renormalized"):
        log_q = log_softmax(torch.where(listed, log_q, -torch.inf))
        if not reverse:
            masked = (log_q == -torch.inf).all(-1)
            gradient = torch.where(masked.unsqueeze(-1), 0, log_q.exp() - p)
            return torch.where(masked, torch.inf, kl_terms(log_p, log_q).sum(-1)), gradient
        value = torch.where((log_q == -torch.inf).all(-1), torch.inf, kl_terms(log_q, log_p).sum(-1))
        return value, chain(log_q.exp() * (log_q - log_p), log_q)
    if tail == "ignore" and not reverse:
        return kl_terms(log_p, log_q).sum(-1), p.sum(-1, keepdim=True) * q - p
    if tail == "ignore":
        value = torch.where(listed, kl_terms(log_q, log_p), 0).sum(-1)
        return value, chain(torch.where(listed, q * (1 + log_q - log_p), 0), log_q)

    log_tail_q = torch.where(listed, -torch.inf, log_q).logsumexp(-1, keepdim=True)
    rest = tail_of_teacher(torch.where(valid, logprobs, -torch.inf), log_tail_q > -torch.inf)
    log_mass = (p.sum(-1, keepdim=True) + rest).log()
    log_p, log_tail_p = log_p - log_mass, rest.log() - log_mass
    if not reverse:
        value = (kl_terms(log_p, log_q).sum(-1, keepdim=True) + kl_terms(log_tail_p, log_tail_q)).squeeze(-1)
        w = torch.where(listed, log_p.exp(), q * (log_tail_p - log_tail_q).exp())
        return value, q - torch.where(listed | (q > 0), w, 0)
    inside = torch.where(listed, kl_terms(log_q, log_p), 0).sum(-1, keepdim=True)
    value = (inside + kl_terms(log_tail_q, log_tail_p)).squeeze(-1)
    return value, chain(q * torch.where(listed, log_q - log_p, log_tail_q - log_tail_p), log_q)


def tail_of_teacher(logprobs: Tensor, possible: Tensor) -> Tensor:
    """r_p of log-probabilities ``(N, K)`` in the dtype in which they are known, −inf where there is none, not yet
    divided by Σp + r_p; float64 ``(N, 1)``. ``possible``: whether the student has anything off the list, ``(N, 1)``.
    """
    eps = torch.finfo(logprobs.dtype).eps
    log_p = logprobs.double()
    p = log_p.exp()
    rest = 1 - p.sum(-1, keepdim=True)
    error = eps / 2 * torch.where(p == 0, 0, p * log_p.abs()).sum(-1, keepdim=True)
    error += 2.0**-46 if logprobs.dtype == torch.float64 else 2.0**-23
    return torch.where(possible, rest.abs().maximum(error), torch.where(rest <= MOST_LOST, 0, rest))
