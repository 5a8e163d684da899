"""The terms of papers (`fusedkd.integrations.presets`), and reductions of other kits, against the plain formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fusedkd.integrations import presets
from fusedkd.integrations.terms import HiddenTerm, LayerAttentionTerm

from . import term_step
from .term_step import models, step
from .term_truth import Run, compare, kl


def test_patient_kd():
    def formulas(s, t, _):
        student, teacher = (torch.stack([h[:, 0] for h in side], 1) for side in ([s.hidden[1]], [t.hidden[2]]))
        return {"patience": F.mse_loss(F.normalize(student, dim=2), F.normalize(teacher, dim=2))}

    recipe = presets.pkd()
    compare("bert", recipe["terms"], formulas, width=32)
    assert (recipe["kd"].kd_weight, recipe["kd"].temperature) == (0.7, 10.0)


def test_tinybert():
    def formulas(s, t, linears):
        (dense,) = linears["hidden"]
        hidden = sum(F.mse_loss(dense(s.hidden[i])[s.mask], t.hidden[2 * i][s.mask]) for i in range(3))
        return {"attention": sum(F.mse_loss(s.scores(i), t.scores(2 * i + 1)) for i in range(2)), "hidden": hidden}

    compare("bert", presets.tinybert()["terms"], formulas, batch=2, accumulation=4)
    assert presets.tinybert("prediction")["kd"].kd_weight == 1.0


def test_minilm():
    def formulas(s, t, _):
        values = kl(t.relation(3, "v", 2), s.relation(1, "v", 2), s.mask)
        return {"relations": kl(t.maps[3], s.maps[1], s.mask) + values}

    compare("bert", presets.minilm()["terms"], formulas)


def test_minilm_v2():
    def formulas(s, t, _):
        return {"relations": sum(kl(t.relation(2, n, 4), s.relation(1, n, 4), s.mask) for n in "qkv")}

    compare("bert", presets.minilm_v2(2, relation_heads=4)["terms"], formulas)


def test_mobilebert():
    def formulas(s, t, _):
        normed = [[F.layer_norm(h, h.shape[-1:])[s.mask] for h in side.hidden[1:]] for side in (s, t)]
        maps = sum(kl(b, a, s.mask) for a, b in zip(s.maps, t.maps, strict=True))
        return {"hidden": sum(F.mse_loss(*pair) for pair in zip(*normed, strict=True)), "attention": maps}

    student, teacher = term_step.make("bert", 0, 2, 32), term_step.make("bert", 1, 2, 32)
    terms = presets.mobilebert()["terms"]
    _, logs, _ = step(copy.deepcopy(student), copy.deepcopy(teacher), terms)
    with torch.no_grad():
        for name, value in formulas(Run("bert", student), Run("bert", teacher), None).items():
            assert logs[name] == pytest.approx(value.item(), rel=1e-4), name


def test_combinatorial_kd():
    def formulas(s, t, linears):
        found = 0
        for n, (i, group) in enumerate(((1, (1, 2)), (2, (3, 4)))):
            x = F.normalize(linears["combination"][n](s.hidden[i]), dim=-1)
            y = F.normalize(torch.cat([t.hidden[j] for j in group], -1), dim=-1)
            found = found + (x - y).square().sum(-1)[s.mask].mean()
        return {"combination": found / 2}

    compare("bert", presets.ckd()["terms"], formulas, batch=2, accumulation=4)


def test_rail_and_alp_have_terms_that_are_tested_above():
    assert presets.rail_kd()["terms"] == [
        HiddenTerm("random_sorted", distance="cosine", pool="mean", weight=2 / 3, name="layers")
    ]
    assert presets.alp_kd("regular")["terms"] == [LayerAttentionTerm("regular", weight=1 / 3)]


def test_reductions_of_other_kits():
    """TextBrewer 0.2.1 and DistillKit: the functions of hidden states, written by their formulas."""
    student, teacher = (Run("bert", model) for model in models(width=32))
    x, y, mask = student.hidden[2], teacher.hidden[4], student.mask
    terms = [
        HiddenTerm(name="hid_mse"),
        HiddenTerm(distance="cosine", name="cos"),
        HiddenTerm(normalize="l2", pool="first", name="pkd"),
    ]
    _, logs, _ = step(*models(width=32), terms)
    weights = mask.float()
    hid_mse = (F.mse_loss(x, y, reduction="none") * weights[..., None]).sum() / (weights.sum() * x.shape[-1])
    assert logs["hid_mse"] == pytest.approx(hid_mse.item(), rel=1e-5)
    cos = F.cosine_embedding_loss(x[mask], y[mask], torch.ones(int(mask.sum())))
    assert logs["cos"] == pytest.approx(cos.item(), rel=1e-5)
    first = [side[:, 0] / side[:, 0].norm(dim=1, keepdim=True) for side in (x, y)]
    summed = (first[0] - first[1]).pow(2).sum(-1).mean()  # TextBrewer's pkd_loss: the sum over columns
    assert logs["pkd"] * 32 == pytest.approx(summed.item(), rel=1e-4)
