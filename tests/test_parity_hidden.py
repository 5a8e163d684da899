"""Losses of hidden states and attention maps as DistillKit, TinyBERT, PKD and MiniLM have them, by formula with their
reductions, and the options of fusedkd that give the same value and the same gradient. Everything is float64 on both
sides.
"""

from __future__ import annotations

import pytest
import torch
from parity import HEADS, LENGTHS, WIDE, B, D, H, L, draw, entropy, mask, masked, same, scores
from torch import Tensor
from torch.nn import functional as F

from fusedkd import attention_kl_loss, attention_mse_loss, hidden_loss, kd_loss

# -------------------------------------------------- DistillKit


@masked
@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("wide", [H, WIDE])
def test_distillkit_hidden_states(mask: Tensor | None, distance: str, wide: int) -> None:
    """`hs_mse` and `hs_cosine`: the mean over the layer mapping of means over tokens, each pair behind a projection of
    its own without a bias where the widths differ.
    """
    x, y = [draw(B, L, H, seed=seed) for seed in (0, 1)], [draw(B, L, wide, seed=seed) for seed in (2, 3)]
    projections = [draw(wide, H, seed=seed) / H**0.5 for seed in (4, 5)] if wide != H else []
    rows = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()

    def ours(a: Tensor, b: Tensor, *w: Tensor) -> Tensor:
        options = {"distance": distance, "projection": list(w) or None, "layer_weights": [0.5, 0.5]}
        return hidden_loss([a, b], y, mask, **options)

    def formula(a: Tensor, b: Tensor, *w: Tensor) -> Tensor:
        layers = [(each @ w[i].T if w else each)[rows] for i, each in enumerate((a, b))]
        if distance == "mse":
            values = [(each - t[rows]).square().sum() / (rows.sum() * wide) for each, t in zip(layers, y, strict=True)]
        else:
            dots = [(each * t[rows]).sum(-1) for each, t in zip(layers, y, strict=True)]
            norms = [each.norm(dim=-1) * t[rows].norm(dim=-1) for each, t in zip(layers, y, strict=True)]
            values = [(1 - dot / norm).mean() for dot, norm in zip(dots, norms, strict=True)]
        return sum(values) / 2

    same(ours, formula, *x, *projections)


# -------------------------------------------------- the papers' codes


def test_tinybert() -> None:
    """Summed over layers: scores, of which those ≤ −100 are 0 on both sides, and hidden states behind one Linear. Both
    are means over all positions, padding too.
    """
    layers = range(2)
    q, k, tq, tk = ([draw(B, HEADS, L, D, seed=4 * i + part) for i in layers] for part in range(4))
    teacher = [scores(tq[i], tk[i], mask()) for i in layers]

    def ours(*qk: Tensor) -> Tensor:
        each = [(*qk[2 * i : 2 * i + 2], tq[i], tk[i], mask()) for i in layers]
        return sum(attention_mse_loss(*x, padded_queries=True) for x in each)

    def formula(*qk: Tensor) -> Tensor:
        found = 0
        for i in layers:
            sides = [scores(*qk[2 * i : 2 * i + 2], mask()), teacher[i]]
            found = found + F.mse_loss(*(x.where(x > -100, 0) for x in sides))
        return found

    same(ours, formula, *(x for i in layers for x in (q[i], k[i])))

    x, y = [draw(B, L, H, seed=seed) for seed in (0, 1)], [draw(B, L, WIDE, seed=seed) for seed in (2, 3)]
    same(
        lambda a, b, w, c: hidden_loss([a, b], y, projection=w, bias=c),
        lambda a, b, w, c: F.mse_loss(F.linear(a, w, c), y[0]) + F.mse_loss(F.linear(b, w, c), y[1]),
        *x,
        draw(WIDE, H, seed=4),
        draw(WIDE, seed=5),
    )


def test_tinybert_prediction() -> None:
    """The cross-entropy with the teacher's probabilities at temperature T, a mean over rows and classes, without T²;
    and for STS-B the squared error from the label itself.
    """
    x, y = draw(8, 3, seed=0), draw(8, 3, seed=1)
    constant = entropy(y / 2).sum() / 24
    same(
        lambda s: kd_loss(s, y, temperature=2.0, scale_by_t2=False, kd_normalizer=24) + constant,
        lambda s: -((y / 2).softmax(-1) * (s / 2).log_softmax(-1)).mean(),
        x,
    )
    same(
        lambda s: kd_loss(s[:, None], y[:, :1], divergence="logit_mse"),
        lambda s: F.mse_loss(s, y[:, 0]),
        draw(8, seed=2),
    )


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
def test_pkd() -> None:
    """(1 − α)·CE + α·T²·KL, of which KLDivLoss takes the mean over classes too, + β·MSE of the normalised [CLS] states
    ``(B, layers, H)``.
    """
    alpha, beta, temperature, classes = 0.7, 500.0, 10.0, 3
    z, v = draw(8, classes, seed=0), draw(8, classes, seed=1)
    label = torch.arange(8) % classes
    x, y = draw(8, 5, H, seed=2), draw(8, 5, H, seed=3)

    def ours(z: Tensor, x: Tensor) -> Tensor:
        options = {"temperature": temperature, "kd_weight": alpha, "ce_weight": 1 - alpha}
        return kd_loss(z, v, label, **options, kd_normalizer=8 * classes) + beta * hidden_loss(x, y, normalize="l2")

    def formula(z: Tensor, x: Tensor) -> Tensor:
        kl = F.kl_div((z / temperature).log_softmax(1), (v / temperature).softmax(1), reduction="mean")
        patience = F.mse_loss(F.normalize(x, dim=2), F.normalize(y, dim=2))
        return alpha * kl * temperature**2 + (1 - alpha) * F.cross_entropy(z, label) + beta * patience

    same(ours, formula, z, x)


def divergence(s: Tensor, t: Tensor) -> Tensor:
    """1/(heads·tokens) Σ KL, of log-probabilities of the keys seen."""
    rows = [(t.exp() * (t - s)).nan_to_num(0).sum(-1)[b, :, :n] for b, n in enumerate(LENGTHS)]
    return sum(x.sum() for x in rows) / (s.shape[1] * sum(LENGTHS))


def seen(q: Tensor, k: Tensor, heads: int = HEADS) -> Tensor:
    q, k = (x.transpose(1, 2).reshape(B, L, heads, -1).transpose(1, 2) for x in (q, k))
    found = q @ k.mT / q.shape[-1] ** 0.5
    return found.masked_fill(mask()[:, None, None] == 0, -torch.inf).log_softmax(-1)


def test_minilm() -> None:
    """Eq. 4 and 6: the last layer's attention, and its value relation, of another width per head."""
    q, k, v = (draw(B, HEADS, L, D, seed=seed) for seed in range(3))
    teacher = [draw(B, HEADS, L, 2 * D, seed=seed) for seed in range(3, 6)]
    tq, tk, tv = teacher
    same(
        lambda q, k, v: attention_kl_loss(q, k, tq, tk, mask()) + attention_kl_loss(v, v, tv, tv, mask()),
        lambda q, k, v: divergence(seen(q, k), seen(tq, tk)) + divergence(seen(v, v), seen(tv, tv)),
        q,
        k,
        v,
    )


def test_minilm_v2() -> None:
    """Relations of queries, of keys and of values, of other heads than either model has."""
    student = [draw(B, HEADS, L, D, seed=seed) for seed in range(3)]
    teacher = [draw(B, 2 * HEADS, L, D, seed=seed) for seed in range(3, 6)]
    heads = 12

    def ours(*parts: Tensor) -> Tensor:
        both = zip(parts, teacher, strict=True)
        return sum(attention_kl_loss(s, s, t, t, mask(), relation_heads=heads) for s, t in both)

    def formula(*parts: Tensor) -> Tensor:
        both = zip(parts, teacher, strict=True)
        return sum(divergence(seen(s, s, heads), seen(t, t, heads)) for s, t in both)

    same(ours, formula, *student)
