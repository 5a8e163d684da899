"""Launches of the Triton kernels of hidden states, layers, attention maps and straight-through samples, for
`test_triton_launch.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import operators
import torch
from operators import Inputs
from torch import Tensor

from fusedkd.backends.layout import HIDDEN_STATS, OPTIONS, HiddenDistance, HiddenNormalize, KernelId
from fusedkd.backends.triton import attention, gumbel, hidden, layers

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def vector(n: int, dtype: torch.dtype = F32, aligned: bool = True) -> Tensor:
    """Ones, which start on 16 bytes or one element after."""
    return torch.ones(n + 1, dtype=dtype)[0 if aligned else 1 :][:n]


def rows(n: int, columns: int, dtype: torch.dtype, gap: int = 0) -> Tensor:
    """Logits ``(1, n, columns)``, with a gap after each row."""
    return torch.zeros(1, n, columns + gap, dtype=dtype)[:, :, :columns]


def call(operator: str, inputs: Inputs, upstream: Tensor, stats: Tensor, gradient: bool, launch: Any) -> None:
    """What `operators` calls forward, forward_, backward or rescale_."""
    if operator == "forward":
        operators.forward(inputs, gradient, launch)
    elif operator == "forward_":
        operators.forward_(inputs, launch)
    elif operator == "backward":
        operators.backward(upstream, inputs, stats, launch)
    else:
        operators.rescale_(torch.empty_like(inputs["student"]), upstream, inputs, stats, launch)


def launch_hidden(
    operator: str,
    columns: int,
    distance: HiddenDistance,
    normalize: HiddenNormalize,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    layers: int = 1,
    pieces: int | list[int] = 1,
    gap: int = 0,
    weights: bool = True,
    gradient: bool = True,
    aligned: bool = True,
) -> None:
    """``pieces``: so many, or their columns."""
    n, exact = 300, F64 if dtypes[0] == F64 else F32
    widths = pieces if isinstance(pieces, list) else [columns // pieces] * pieces
    given: dict[str, Any] = {
        "student": [rows(n, columns, dtypes[0], gap) for _ in range(layers)],
        "teacher": [rows(n, width, dtypes[1], gap) for _ in range(layers) for width in widths],
        "weights": vector(n, F32, aligned) if weights else None,
        "normalizer": vector(1, F64, aligned).squeeze(0),
        "layer_weights": vector(layers, F64, aligned),
        "gradient": [torch.zeros(1, n, columns, dtype=dtypes[0]) for _ in range(layers)] if gradient else [],
        "distance": distance,
        "normalize": normalize,
    }
    if operator == "forward":
        hidden.hidden_forward(**given)
        return
    stats = vector(layers * n * HIDDEN_STATS, exact, aligned).view(layers, n, -1)
    up = vector(n, exact, aligned)
    hidden.hidden_backward(**given, stats=stats, upstream=up, skip_if_one=operator == "rescale")


def launch_layers(
    operator: str,
    *,
    n: int = 300,
    H: int = 768,
    M: int = 4,
    K: int = 12,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    gradient: bool = False,
    teacher_gradient: bool = False,
    upstream: bool = False,
    weights: bool = False,
    aligned: bool = True,
) -> None:
    """M and K layers of n rows."""
    exact = F64 if dtypes[0] == F64 else F32
    given: dict[str, Any] = {
        "student": [rows(n, H, dtypes[0])] * M,
        "teacher": [rows(n, H, dtypes[1])] * K,
        "weights": vector(n, F32, aligned) if weights or not aligned else None,
        "normalizer": vector(1, F64, aligned).squeeze(0),
    }
    if operator == "layer_attention":
        given |= {
            "upstream": vector(n, exact, aligned) if upstream else None,
            "buckets": vector(M * K, F64, aligned).view(M, K),
            "gradient": torch.zeros(M, 1, n, H, dtype=dtypes[0]) if gradient else None,
            "teacher_gradient": torch.zeros(K, 1, n, H, dtype=dtypes[1]) if teacher_gradient else None,
            "skip_if_one": upstream,
        }
    elif upstream:
        given["upstream"] = vector(M * K, F64, aligned).view(M, K)
    getattr(layers, operator)(**given)


def launch_gumbel(operator: str, dtype: torch.dtype, columns: int = 30522, aligned: bool = True) -> None:
    n, start = 300, 0 if aligned else 1
    logits, slopes = (torch.zeros(1, n, columns + 1, dtype=dtype)[:, :, start:][:, :, :columns] for _ in range(2))
    seed, temperature = vector(1, torch.int64, aligned).squeeze(0), vector(1, F64, aligned).squeeze(0)
    given = {"seed": seed, "temperature": temperature, "first_row": 7}
    if operator == "forward":
        gumbel.gumbel_forward(logits, **given)
        return
    ids, stats = vector(n, torch.int64, aligned), vector(2 * n, dtype, aligned).view(n, 2)
    gumbel.gumbel_backward(logits, slopes, ids, stats, scale=temperature, **given)


def launch_attention(
    kernel_id: KernelId = KernelId.FORWARD_KL,
    *,
    L: int = 300,
    heads: int = 3,
    widths: tuple[int, int] = (64, 64),
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    causal: bool = False,
    mask: bool = True,
    itself: bool = False,
    gradient: bool = True,
    upstream: bool = False,
    aligned: bool = True,
) -> None:
    """Two entries; `itself`: the keys are the queries."""
    shape, gap = (2, heads, L), 0 if aligned else 1
    q, k, t_q, t_k = (torch.zeros(*shape, widths[i] + gap, dtype=dtypes[i])[..., : widths[i]] for i in (0, 0, 1, 1))
    counted = vector(2 * L, torch.bool, aligned).view(2, L) if mask else None
    d_q, d_k = (torch.zeros(*shape, widths[0]) if gradient else None for _ in range(2))
    assert attention.attention_pairs(
        student_q=q,
        student_k=q if itself else k,
        teacher_q=t_q,
        teacher_k=t_q if itself else t_k,
        rows=counted,
        keys=counted,
        options=vector(OPTIONS, F64, aligned),
        normalizers=vector(2, F64, aligned),
        upstream=vector(2 * heads * L, F32, aligned).view(shape) if upstream else None,
        row_losses=vector(2 * heads * L, F32, aligned).view(shape),
        d_q=d_q,
        d_k=d_q if itself else d_k,
        kernel_id=kernel_id,
        causal=causal,
    )


MSE, COSINE, SMOOTH_L1 = HiddenDistance
NONE, L2, LAYER_NORM = HiddenNormalize
HIDDEN = {
    "forward": partial(launch_hidden, "forward", 768, COSINE, NONE),
    "pieces": partial(launch_hidden, "forward", 4096, MSE, LAYER_NORM, pieces=2),
    "as long as is held": partial(launch_hidden, "forward", 8192, COSINE, LAYER_NORM, dtypes=(F32, F32)),
    "not held": partial(launch_hidden, "forward", 16384, MSE, L2, dtypes=(F16, F32)),
    "no gradient": partial(launch_hidden, "forward", 1024, SMOOTH_L1, NONE, gradient=False, weights=False),
    "backward": partial(launch_hidden, "backward", 768, SMOOTH_L1, L2),
    "rescale": partial(launch_hidden, "rescale", 768, COSINE, LAYER_NORM),
    "float64": partial(launch_hidden, "forward", 4096, COSINE, LAYER_NORM, dtypes=(F64, F64)),
    "one element": partial(launch_hidden, "forward", 1, MSE, L2),
    "unaligned": partial(launch_hidden, "forward", 777, MSE, NONE, gap=1, aligned=False),
    "twelve layers": partial(launch_hidden, "forward", 768, MSE, L2, layers=12),
    "twelve layers, backward": partial(launch_hidden, "backward", 768, SMOOTH_L1, LAYER_NORM, layers=12, pieces=2),
}
LAYERS = {
    "attention": partial(launch_layers, "layer_attention", gradient=True, weights=True),
    "attention, of the teacher": partial(launch_layers, "layer_attention", gradient=True, teacher_gradient=True, H=770),
    "attention, no gradient": partial(launch_layers, "layer_attention", M=1, K=1, dtypes=(F32, BF16)),
    "attention, float64": partial(launch_layers, "layer_attention", gradient=True, dtypes=(F64, F32), H=4096),
    "attention, widest": partial(launch_layers, "layer_attention", gradient=True, H=8192),
    "attention, unaligned": partial(launch_layers, "layer_attention", gradient=True, upstream=True, aligned=False),
    "distances": partial(launch_layers, "layer_distances", weights=True),
    "distances, widest": partial(launch_layers, "layer_distances", dtypes=(F32, F32), H=16384),
    "distances, backward": partial(launch_layers, "layer_distances_backward", upstream=True, weights=True),
}
GUMBEL = {
    "forward": partial(launch_gumbel, "forward", F32),
    "forward, float64": partial(launch_gumbel, "forward", F64),
    "backward": partial(launch_gumbel, "backward", F32),
    "backward, float64": partial(launch_gumbel, "backward", F64, columns=300),
    "forward, unaligned": partial(launch_gumbel, "forward", F32, aligned=False),
    "backward, unaligned": partial(launch_gumbel, "backward", F32, aligned=False),
}
ATTENTION = {
    "kl": launch_attention,
    "kl, no gradient": partial(launch_attention, gradient=False, causal=True, mask=False),
    "kl, of itself": partial(launch_attention, itself=True, widths=(80, 128), upstream=True),
    "mse": partial(launch_attention, KernelId.LOGIT_MSE, dtypes=(F32, BF16), causal=True),
    "unaligned": partial(launch_attention, widths=(24, 40), dtypes=(F16, BF16), upstream=True, aligned=False),
}
