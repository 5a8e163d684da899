"""TextBrewer's losses of hidden states, attention maps and logits, with their reductions, and the options of fusedkd
that give the same value and the same gradient.

Theirs are written here by formula, and are the functions of the package too where it is installed (0.2.1.post1, for
which what it requires is not needed). Everything is float64 on both sides.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from parity import HEADS, LENGTHS, WIDE, B, D, H, L, draw, entropy, masked, same, scores
from torch import Tensor
from torch.nn import functional as F

from fusedkd import attention_kl_loss, attention_mse_from_maps, attention_mse_loss, hidden_loss, kd_loss


def sentences(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Without their padding: the second dimension from the end, and of maps ``(…, L, L)`` the last one too."""
    return list(x) if mask is None else [each[..., : int(n), :] for each, n in zip(x, mask.sum(1), strict=True)]


def squares(s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the (query, key) pairs of all sentences, and over heads."""
    pairs = zip(sentences(s - t, mask), [L] * B if mask is None else LENGTHS, strict=True)
    return torch.cat([each[..., :n].flatten() for each, n in pairs]).square().mean()


def cross_entropies(s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over queries and heads of a sum over keys, whose softmax is over all of them."""
    rows = (-t.softmax(-1) * s.log_softmax(-1)).unbind()
    pairs = zip(rows, [L] * B if mask is None else LENGTHS, strict=True)
    return torch.cat([each[..., :n, :n].sum(-1).flatten() for each, n in pairs]).mean()


def gram(x: list[Tensor], mask: Tensor | None) -> Tensor:
    a, b = x if mask is None else (each * mask[..., None] for each in x)
    lengths = torch.full((B,), L) if mask is None else mask.sum(1)
    return torch.einsum("bli,blj->bij", a, b) / lengths[:, None, None]


def similarity(x: list[Tensor], mask: Tensor | None) -> Tensor:
    return torch.einsum("blh,bmh->blm", *x) / (x[0].shape[-1] if mask is None else L)


def cosines(s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    return torch.cat([1 - F.cosine_similarity(*x) for x in zip(sentences(s, mask), sentences(t, mask), strict=True)])


FORMULAS = SimpleNamespace(
    hid_mse_loss=lambda s, t, mask=None: torch.cat(sentences(s - t, mask)).square().mean(),
    cos_loss=lambda s, t, mask=None: cosines(s, t, mask).mean(),
    pkd_loss=lambda s, t, mask=None: (F.normalize(s[:, 0]) - F.normalize(t[:, 0])).square().sum(-1).mean(),
    fsp_loss=lambda s, t, mask=None: (gram(s, mask) - gram(t, mask)).square().mean(),
    mmd_loss=lambda s, t, mask=None: squares(similarity(s, mask), similarity(t, mask), mask),
    att_mse_loss=squares,
    att_mse_sum_loss=lambda s, t, mask=None: squares(s.sum(1), t.sum(1), mask),
    att_ce_loss=lambda s, t, mask=None: cross_entropies(s, t, mask),
    att_ce_mean_loss=lambda s, t, mask=None: cross_entropies(s.mean(1), t.mean(1), mask),
    kd_mse_loss=lambda s, t, T=1.0: ((s - t) / T).square().mean(),
    kd_ce_loss=lambda s, t, T=1.0: -((t / T).softmax(-1) * (s / T).log_softmax(-1)).sum(-1).mean(),
)


@pytest.fixture(params=["formula", "package"])
def theirs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The losses of TextBrewer: formulas, or its module without the rest of the package, which wants tensorboard."""
    if request.param == "formula":
        return FORMULAS
    spec = find_spec("textbrewer")
    if spec is None:
        pytest.skip("needs textbrewer")
    package = ModuleType("textbrewer")
    package.__path__ = list(spec.submodule_search_locations or ())
    monkeypatch.setitem(sys.modules, "textbrewer", package)
    return importlib.import_module("textbrewer.losses")


@masked
def test_textbrewer_hidden_mse_and_cos(theirs: Any, mask: Tensor | None) -> None:
    x, y = draw(B, L, H, seed=0), draw(B, L, H, seed=1)
    same(lambda s: hidden_loss(s, y, mask), lambda s: theirs.hid_mse_loss(s, y, mask), x)
    same(lambda s: hidden_loss(s, y, mask, distance="cosine"), lambda s: theirs.cos_loss(s, y, mask), x)


@masked
def test_textbrewer_proj(theirs: Any, mask: Tensor | None) -> None:
    """`proj: ["linear", H, WIDE]` of an intermediate match, a Linear with a bias in front of its loss."""
    x, y = draw(B, L, H, seed=0), draw(B, L, WIDE, seed=1)
    same(
        lambda s, w, b: hidden_loss(s, y, mask, projection=w, bias=b),
        lambda s, w, b: theirs.hid_mse_loss(F.linear(s, w, b), y, mask),
        x,
        draw(WIDE, H, seed=2),
        draw(WIDE, seed=3),
    )


def test_textbrewer_pkd(theirs: Any) -> None:
    """The sum over columns: PKD's code, and `hidden_loss`, have the mean."""
    x, y = draw(B, L, H, seed=0), draw(B, L, H, seed=1)
    same(lambda s: H * hidden_loss(s[:, 0], y[:, 0], normalize="l2"), lambda s: theirs.pkd_loss(s, y), x)


@masked
def test_textbrewer_attention_mse(theirs: Any, mask: Tensor | None) -> None:
    """The mean over the keys of each sentence alone, where ours is one over L keys: a normaliser of Σ n²/L queries.
    Without a mask TextBrewer takes scores below −0.001 for padding: here they are 0.
    """
    q, k, tq, tk = (draw(B, HEADS, L, D, seed=seed).abs() for seed in range(4))
    normalizer = None if mask is None else sum(n * n for n in LENGTHS) / L
    options = {"mask": mask, "normalizer": normalizer}
    same(
        lambda q, k: attention_mse_loss(q, k, tq, tk, **options),
        lambda q, k: theirs.att_mse_loss(scores(q, k), scores(tq, tk), mask),
        q,
        k,
    )
    maps = scores(q, k)
    same(
        lambda s: attention_mse_from_maps(s, scores(tq, tk), **options),
        lambda s: theirs.att_mse_loss(s, scores(tq, tk), mask),
        maps,
    )
    one = {"relation_heads": 1, "student_scale": D**-0.5, "teacher_scale": D**-0.5}  # the sum over heads
    same(
        lambda q, k: attention_mse_loss(q, k, tq, tk, **options, **one),
        lambda q, k: theirs.att_mse_sum_loss(scores(q, k), scores(tq, tk), mask),
        q,
        k,
    )


@masked
def test_textbrewer_attention_ce(theirs: Any, mask: Tensor | None) -> None:
    """The cross-entropy, whose gradient is that of the KL divergence. Without a mask it too leaves out the teacher's
    scores below −0.001.
    """
    q, k, tq, tk = (draw(B, HEADS, L, D, seed=seed) for seed in range(4))
    tq, tk = (tq, tk) if mask is not None else (tq.abs(), tk.abs())
    teacher = scores(tq, tk, mask)
    rows = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
    constant = entropy(teacher).mean(1)[rows].mean()
    same(
        lambda q, k: attention_kl_loss(q, k, tq, tk, mask) + constant,
        lambda q, k: theirs.att_ce_loss(scores(q, k, mask), teacher, mask),
        q,
        k,
    )
    scale = D**-0.5 / HEADS  # the mean of the heads' scores is that of one head of all columns
    one = {"relation_heads": 1, "student_scale": scale, "teacher_scale": scale}
    constant = entropy(teacher.mean(1))[rows].mean()
    same(
        lambda q, k: attention_kl_loss(q, k, tq, tk, mask, **one) + constant,
        lambda q, k: theirs.att_ce_mean_loss(scores(q, k, mask), teacher, mask),
        q,
        k,
    )


@masked
def test_textbrewer_nst_and_fsp(theirs: Any, mask: Tensor | None) -> None:
    """Similarities of two layers' hidden states are scores: of tokens (`nst`, `mmd`), where the widths may differ; of
    columns (`fsp`, `gram`), which are the rows of the transposed states.
    """
    x, y = [draw(B, L, H, seed=seed) for seed in (0, 1)], [draw(B, L, WIDE, seed=seed) for seed in (2, 3)]
    scale = {"student_scale": 1 / H, "teacher_scale": 1 / WIDE}
    if mask is not None:
        scale = {"student_scale": 1 / L, "teacher_scale": 1 / L}
        scale["normalizer"] = sum(n * n for n in LENGTHS) / L
    heads = [each[:, None] for each in y]
    same(
        lambda a, b: attention_mse_loss(a[:, None], b[:, None], *heads, mask, **scale),
        lambda a, b: theirs.mmd_loss([a, b], y, mask),
        *x,
    )
    rows = torch.ones(B, L, 1) if mask is None else mask[..., None]
    weights = rows.double() / rows.sum(1, keepdim=True)

    def columns(first: Tensor, second: Tensor) -> list[Tensor]:
        return [each.mT.contiguous()[:, None] for each in (first * weights, second)]

    y = [draw(B, L, H, seed=seed) for seed in (2, 3)]
    options = {"student_scale": 1.0, "teacher_scale": 1.0}
    same(
        lambda a, b: attention_mse_loss(*columns(a, b), *columns(*y), **options),
        lambda a, b: theirs.fsp_loss([a, b], y, mask),
        *x,
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_textbrewer_kd(theirs: Any, temperature: float) -> None:
    """Its `kd_loss_type`: without T² (`kd_loss_weight` may have it), and the squared error of logits over T."""
    x, y = draw(B, 10, seed=0), draw(B, 10, seed=1)
    constant = entropy(y / temperature).mean()
    same(
        lambda s: kd_loss(s, y, temperature=temperature, scale_by_t2=False) + constant,
        lambda s: theirs.kd_ce_loss(s, y, temperature),
        x,
    )
    same(
        lambda s: kd_loss(s, y, divergence="logit_mse", kd_weight=temperature**-2),
        lambda s: theirs.kd_mse_loss(s, y, temperature),
        x,
    )
