"""Means over the selected tokens of each sequence, which a loss of hidden states may be of."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkd.backends.schema import accumulation_dtype


def token_weights(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of hidden states ``(*, L, H)`` and a mask ``(*, L)``: the share of each token in its sequence's mean, ``(*, L)``,
    and which sequences have one, ``(*)`` bool. The shares of one that has none are 0.
    """
    dtype = accumulation_dtype(hidden.dtype)
    if mask is None:
        weights = torch.ones(hidden.shape[:-1], dtype=dtype, device=hidden.device)
    else:
        weights = (mask if mask.is_floating_point() else mask != 0).to(dtype)
    total = weights.sum(-1, keepdim=True)
    return weights / total.where(total > 0, 1), (total > 0).squeeze(-1)


def pooled(hidden: Tensor, shares: Tensor) -> Tensor:
    """Σ_l share_l · hidden_l, ``(*, H)``, in float32 (float64 for float64). Tokens of share 0 count as zeros, whatever
    they hold.
    """
    selected = hidden.where(shares.unsqueeze(-1) != 0, 0).to(accumulation_dtype(hidden.dtype))
    with torch.autocast(hidden.device.type, enabled=False):  # which would round the means
        return (shares.to(selected.dtype).unsqueeze(-2) @ selected).squeeze(-2)
