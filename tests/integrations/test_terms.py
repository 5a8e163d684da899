"""The terms of DistillationTrainer beside the logits', against the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.terms import AttentionTerm, ContrastiveTerm, HiddenTerm, LayerAttentionTerm, LogitsTerm

from .distil_step import rows
from .term_step import KINDS, models, step
from .term_truth import compare, kl
from .test_transformers import Padding, top_k


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_behind_projections(kind):
    """Every layer with a projection of its own; at one cut, in which the rows are uneven."""

    def formulas(s, t, linears):
        pairs = [(0, 0), (1, 2), (2, 4)]
        sides = [(linears["hidden"][n](s.hidden[i])[s.mask], t.hidden[j][s.mask]) for n, (i, j) in enumerate(pairs)]
        return {"hidden": sum(F.mse_loss(*side) for side in sides)}

    compare(kind, [HiddenTerm("uniform", projection=True, weight=0.5)], formulas, batch=2, accumulation=4)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_are_the_models_own(kind):
    """With rotary embeddings and grouped keys, padding and causal masks; the student runs under sdpa."""

    def formulas(s, t, _):
        return {"attention": sum(kl(t.maps[j], s.maps[i], s.mask) for i, j in ((0, 1), (1, 3)))}

    compare(kind, [AttentionTerm(layers="uniform_attention", weight=2.0)], formulas)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_relations_of_other_numbers_of_heads(kind):
    def formulas(s, t, _):
        names = ("v",) if kind == "llama" else ("q", "k", "v")  # others are rotated
        return {"relations": sum(kl(t.relation(3, n, 8), s.relation(1, n, 8), s.mask) for n in names)}

    relations = ("vv",) if kind == "llama" else ("qq", "kk", "vv")
    terms = [AttentionTerm(relations=relations, relation_heads=8, name="relations")]
    compare(kind, terms, formulas)


def test_other_distances_and_poolings():
    def formulas(s, t, _):
        def normed(x):
            return F.layer_norm(x, x.shape[-1:])

        m = s.mask
        cosines = [1 - F.cosine_similarity(s.hidden[i], t.hidden[j], -1)[m].mean() for i, j in ((1, 1), (2, 4))]
        return {
            "cosine": sum(cosines) / 2,
            "ln": F.mse_loss(normed(s.hidden[2])[m], normed(t.hidden[4])[m]),
            "smooth": F.smooth_l1_loss(s.hidden[1][:, 0], t.hidden[2][:, 0]),
            "means": F.mse_loss(F.normalize(s.pooled(1)), F.normalize(t.pooled(3))),
        }

    terms = [
        HiddenTerm(((1, 1), (-1, -1)), distance="cosine", average=True, name="cosine"),
        HiddenTerm(normalize="layer_norm", name="ln"),
        HiddenTerm([(1, 2)], distance="smooth_l1", pool="first", name="smooth"),
        HiddenTerm([(1, 3)], normalize="l2", pool="mean", name="means"),
    ]
    compare("bert", terms, formulas, width=32, batch=2, accumulation=4)


def test_layers_by_attention_and_contrast():
    def formulas(s, t, _):
        found = 0
        for i, bucket in ((1, (1, 2)), (2, (3, 4))):
            scores = torch.stack([(s.hidden[i] * t.hidden[j]).sum(-1) for j in bucket], -1).softmax(-1)
            mixture = sum(scores[..., n, None] * t.hidden[j] for n, j in enumerate(bucket))
            found = found + F.mse_loss(s.hidden[i][s.mask], mixture[s.mask])
        scores = F.normalize(s.pooled(2)) @ F.normalize(t.pooled(4)).T / 0.07
        return {"layers": found, "contrastive": F.cross_entropy(scores, torch.arange(8))}

    compare("bert", [LayerAttentionTerm("regular"), ContrastiveTerm(weight=0.3)], formulas, width=32)


def test_layers_by_attention_of_pooled_states():
    def formulas(s, t, _):
        found = {}
        for name, pooled in (("firsts", lambda run, i: run.hidden[i][:, 0]), ("means", lambda run, i: run.pooled(i))):
            found[name] = 0
            for i in (1, 2):
                layers = torch.stack([pooled(t, j) for j in range(1, 5)], 1)
                weights = torch.einsum("bh,bkh->bk", pooled(s, i), layers).softmax(-1)
                found[name] = found[name] + F.mse_loss(pooled(s, i), (weights[..., None] * layers).sum(1))
        return found

    terms = [LayerAttentionTerm(pool="first", name="firsts"), LayerAttentionTerm(pool="mean", name="means")]
    compare("bert", terms, formulas, width=32, batch=2, accumulation=4)


def test_logits_have_several_divergences():
    """Of several teachers as well, of one for each row, and of those on disk."""
    student, (teacher, other) = models()[0], (models(width=width)[1] for width in (48, 32))
    terms = [LogitsTerm("reverse_kl", temperature=2.0, weight=0.4)]
    _, logs, _ = step(student, teacher, terms, KDConfig())
    expected = step(models()[0], teacher, [], KDConfig(divergence="reverse_kl"))[1]["kd"]
    assert logs["logits"] == pytest.approx(expected, rel=1e-5)
    weights = KDConfig(teacher_weights=[0.5, 0.25])
    _, logs, _ = step(models()[0], [teacher, other], [LogitsTerm("reverse_kl", temperature=2.0)], weights)
    alone = step(models()[0], other, [], KDConfig(divergence="reverse_kl"))[1]["kd"]
    assert logs["logits"] == pytest.approx(0.5 * expected + 0.25 * alone, rel=1e-5)
    data = [row | {"teacher": "a"} for row in rows()]
    _, logs, _ = step(models()[0], {"a": teacher, "b": other}, terms, KDConfig(), data=data)
    assert logs["logits"] == pytest.approx(expected, rel=1e-5)
    stored, collator = list(top_k(teacher, rows(), 5)), Padding("right")
    _, logs, _ = step(models()[0], None, terms, KDConfig(), data=stored, collator=collator)
    kd = KDConfig(divergence="reverse_kl")
    assert logs["logits"] == pytest.approx(step(models()[0], None, [], kd, data=stored, collator=collator)[1]["kd"])
