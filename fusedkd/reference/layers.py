"""The losses over several layers, in plain PyTorch, in the precision of their input: student layers ``(M, N, H)`` and
teacher layers ``(K, N, H)`` of N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_attention(student: Tensor, teacher: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ALP-KD (arXiv:2012.14022, §3): per row ``(N,)`` Σ_j |s_j − c_j|²/H with c_j = Σ_k α_jk t_k and α_j = softmax of
    ⟨s_j, t_k⟩ over the teacher layers k of the bucket j, a row of `buckets` ``(M, K)`` bool; and its derivatives by
    student and teacher, also through α:

    r = s − c,  u_k = −2 r·t_k/H,  e_k = α_k (u_k − Σα u),
    ∂/∂s = 2r/H + Σ_k e_k t_k,  ∂/∂t_k = Σ_j (e_jk s_j − 2 α_jk r_j/H)
    """
    H = student.shape[-1]
    alpha = attention(student, teacher, buckets)
    r = student - torch.einsum("jnk,knh->jnh", alpha, teacher)
    u = torch.einsum("jnh,knh->jnk", r, teacher) * (-2 / H)
    e = alpha * (u - (alpha * u).sum(-1, keepdim=True))
    of_student = 2 / H * r + torch.einsum("jnk,knh->jnh", e, teacher)
    of_teacher = torch.einsum("jnk,jnh->knh", e, student) - 2 / H * torch.einsum("jnk,jnh->knh", alpha, r)
    return r.square().mean(-1).sum(0), of_student, of_teacher


def attention(student: Tensor, teacher: Tensor, buckets: Tensor) -> Tensor:
    """α ``(M, N, K)``."""
    scores = torch.einsum("jnh,knh->jnk", student, teacher)
    return scores.masked_fill(~buckets.unsqueeze(1), -torch.inf).softmax(-1)


def pairwise_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """|s_j − t_k|²/H per row, ``(N, M, K)`` (BERT-EMD, arXiv:2010.06133, §3.2: the distance D of two layers)."""
    pairs = [[(s - t).square().mean(-1) for t in teacher] for s in student]
    return torch.stack([torch.stack(row, -1) for row in pairs], -2)


def pairwise_mse_gradient(student: Tensor, teacher: Tensor, upstream: Tensor) -> Tensor:
    """Σ_k F_jk · 2(s_j − t_k)/H, of the student's layers, for the upstream F ``(M, K)`` of every row."""
    sums = torch.zeros_like(student)
    for j, row in enumerate(upstream):
        for f, t in zip(row, teacher, strict=True):
            sums[j] += f * (student[j] - t)
    return 2 / student.shape[-1] * sums


def info_nce(student: Tensor, candidates: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """−log of the softmax of ⟨s_i, candidate_j⟩/τ at the candidate `positive`_i (CPC, arXiv:1807.03748, eq. 4)."""
    scores = student @ candidates.T / temperature
    return scores.logsumexp(-1) - scores.gather(-1, positive.unsqueeze(-1)).squeeze(-1)
