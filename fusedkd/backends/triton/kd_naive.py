"""The first lesson: forward KL and cross-entropy, values and gradient, by one program per row in three plain loops.

    q = softmax(z/T), p = softmax(v/T), q₁ = softmax(z)      KD = T²·Σ p·(log p − log q)      CE = log Σe^z − z_y
    ∂/∂z = kd_weight·T·(q − p) + ce_weight·(q₁ − 1_y)

Nothing in the package calls it: `kd_kernel.py` is tested against it, and read after it. Bytes per logit in 16 bit:
4 for each loop and 2 for the gradient, 14. What it leaves out, and why the real kernel has it:

- A row that does not start on 16 bytes is read element by element here (`row.py`).
- Loops 1 and 2 are one with running maxima (`softmax.py`); the last runs backwards, while its end is in the L2 cache.
- Σ p·(log p − log q) subtracts what is nearly equal: near convergence, nothing is left of it (`divergences.py`).
- Every row has both terms: no masks, no ignored labels, no smoothing, no other divergence, no surplus columns.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedkd.backends.triton.choice import FUSED


@triton.jit(
    do_not_specialize=["V"], do_not_specialize_on_alignment=["student", "teacher", "labels", "kd", "ce", "gradient"]
)
def kd_naive_kernel(
    student, teacher, labels, kd, ce, gradient, V, temperature, kd_weight, ce_weight, BLOCK: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    p_student = student + i_row * V  # [V], as the two below
    p_teacher = teacher + i_row * V
    p_gradient = gradient + i_row * V

    max_s = -float("inf")
    max_t = -float("inf")
    for start in range(0, V, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_z = tl.load(p_student + o, o < V, other=-float("inf")).to(tl.float32)  # [BLOCK], as all blocks
        b_v = tl.load(p_teacher + o, o < V, other=-float("inf")).to(tl.float32)
        max_s = tl.maximum(max_s, tl.max(b_z, 0))
        max_t = tl.maximum(max_t, tl.max(b_v, 0))

    sum_s = 0.0
    sum_t = 0.0
    sum_1 = 0.0
    for start in range(0, V, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_z = tl.load(p_student + o, o < V, other=-float("inf")).to(tl.float32)
        b_v = tl.load(p_teacher + o, o < V, other=-float("inf")).to(tl.float32)
        sum_s += tl.sum(tl.exp((b_z - max_s) / temperature), 0)
        sum_t += tl.sum(tl.exp((b_v - max_t) / temperature), 0)
        sum_1 += tl.sum(tl.exp(b_z - max_s), 0)

    y = tl.load(labels + i_row)
    z_y = tl.load(p_student + y).to(tl.float32)  # before loop 3 may overwrite it
    kl = 0.0
    for start in range(0, V, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_z = tl.load(p_student + o, o < V, other=-float("inf")).to(tl.float32)
        b_v = tl.load(p_teacher + o, o < V, other=-float("inf")).to(tl.float32)
        b_log_q = (b_z - max_s) / temperature - tl.log(sum_s)
        b_log_p = (b_v - max_t) / temperature - tl.log(sum_t)
        b_p = tl.exp(b_log_p)
        kl += tl.sum(tl.where(b_p > 0, b_p * (b_log_p - b_log_q), 0.0), 0)
        b_g = kd_weight * temperature * (tl.exp(b_log_q) - b_p)
        b_g += ce_weight * (tl.exp(b_z - max_s) / sum_1 - tl.where(o == y, 1.0, 0.0))
        tl.store(p_gradient + o, b_g.to(gradient.dtype.element_ty), o < V)
    tl.store(kd + i_row, temperature * temperature * kl)
    tl.store(ce + i_row, tl.log(sum_1) + max_s - z_y)


def kd_naive(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, kd_weight: float, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Both terms per row, float32 ``(N,)``, and the gradient of their weighted sum, from contiguous logits ``(N, V)``
    of any dtype and labels ``(N,)`` in [0, V).
    """
    N, V = student.shape
    kd, ce = (student.new_empty(N, dtype=torch.float32) for _ in range(2))
    gradient = torch.empty_like(student)
    with torch.cuda.device_of(student):
        kd_naive_kernel[(N,)](
            *(student, teacher, labels, kd, ce, gradient, V, temperature, kd_weight, ce_weight), BLOCK=1024, **FUSED
        )
    return kd, ce, gradient
