"""The papers' losses as arguments of a distilling Trainer.

>>> trainer = DistillationTrainer(student, teacher, training_arguments, train_dataset=blocks, **minilm())

Each returns the terms and the options of the logits' loss. Reductions differ from code to code; here every term is a
mean over the tokens (or sequences) of the whole optimiser step that are no padding, and every docstring says where the
published code differs. The terms are a list, which can be extended; ``dataclasses.replace(term, weight=…)`` is a term
of another weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.term import Term
from fusedkd.integrations.terms import AttentionTerm, HiddenTerm, LayerAttentionTerm, Pool


class Recipe(TypedDict):
    """Arguments of :class:`fusedkd.integrations.transformers.DistillationTrainer`."""

    terms: list[Term]
    kd: KDConfig


def without_logits() -> KDConfig:
    """No term of the logits: the heads are not run in training."""
    return KDConfig(kd_weight=0.0, ce_weight=0.0, kd_on="attended")


def pkd(
    variant: Literal["skip", "last"] = "skip", *, alpha: float = 0.7, temperature: float = 10.0, beta: float = 500.0
) -> Recipe:
    """Patient KD (arXiv:1908.09355, §3.2): (1 − α)·CE + α·T²·KL + β·PT, with PT the mean over layers, sequences
    and columns of the squared difference of the L2-normalised [CLS] states. Weights: one of the published runs.

    α is of a KL divergence summed over classes; the published code means over them too, so that its α = 0.7 is 0.7/V
    here. Student and teacher have one width. In a causal model the first token has seen nothing: there use
    ``pool="mean"``.
    """
    patience = HiddenTerm(variant, normalize="l2", pool="first", average=True, weight=beta, name="patience")
    return {"terms": [patience], "kd": KDConfig(temperature=temperature, kd_weight=alpha, ce_weight=1 - alpha)}


def tinybert(stage: Literal["intermediate", "prediction"] = "intermediate") -> Recipe:
    """TinyBERT (arXiv:1909.10351, §3.1): first the mean squared differences of attention scores and of hidden
    states, embeddings included, behind one projection; each is summed over layers. Then the cross-entropy with the
    teacher's predictions at temperature 1.

    The scores are compared as in the published code: those of padded keys are 0, and the queries of padding count. Of
    hidden states it compares padding too, which is left out here; and its cross-entropy is a mean over classes as well.
    Both models have equally many heads.
    """
    if stage == "prediction":
        return {"terms": [], "kd": KDConfig(temperature=1.0, kd_weight=1.0, ce_weight=0.0)}
    if stage != "intermediate":
        raise ValueError(f"stage must be 'intermediate' or 'prediction', not {stage!r}")
    attention = AttentionTerm("mse", layers="uniform_attention", padded_queries=True)
    return {"terms": [attention, HiddenTerm("uniform", projection=True, shared=True)], "kd": without_logits()}


def minilm(teacher_layer: int = -1) -> Recipe:
    """MiniLM (arXiv:2002.10957, §3): the KL divergence of the last layers' attention maps, and of their value relations
    softmax(V·Vᵀ/√d), means over heads and tokens. Both models have equally many heads, of any width.
    """
    relations = AttentionTerm(relations=("qk", "vv"), layers=((-1, teacher_layer),), name="relations")
    return {"terms": [relations], "kd": without_logits()}


def minilm_v2(teacher_layer: int = -1, *, relation_heads: int = 48) -> Recipe:
    """MiniLMv2 (arXiv:2012.15828, §3): the KL divergences of the relations of queries, of keys and of values with
    themselves, each with weight 1. The columns of both models are divided into `relation_heads` heads first: 48 for
    base-size teachers, 64 for large ones, of whose 24 layers the 21st is taken (`teacher_layer` = 20).
    """
    relations = AttentionTerm(
        relations=("qq", "kk", "vv"), layers=((-1, teacher_layer),), relation_heads=relation_heads, name="relations"
    )
    return {"terms": [relations], "kd": without_logits()}


def mobilebert(*, alpha: float = 0.5, hidden_weight: float = 100.0, attention_weight: float = 1.0) -> Recipe:
    """MobileBERT (arXiv:2004.02984, §3.3): of each layer the mean squared difference of the hidden states after a layer
    norm without parameters, and the KL divergence of the attention maps, a mean over heads; and
    α·CE + (1 − α)·KL at temperature 1. Both models have equally many layers, heads and columns.

    The weights are the published code's, which trains layer after layer first, takes the cross-entropy of the maps (of
    the same gradient), and has a penalty of means and variances besides.
    """
    each = HiddenTerm("regular", normalize="layer_norm", weight=hidden_weight)
    maps = AttentionTerm(layers="uniform_attention", weight=attention_weight)
    kd = KDConfig(temperature=1.0, kd_weight=1 - alpha, ce_weight=alpha)
    return {"terms": [each, maps], "kd": kd}


def ckd(
    variant: Literal["regular", "overlap", "skip_middle", "cross", "interleaved"] = "regular",
    *,
    alpha: float = 0.4,
    beta: float = 0.2,
    temperature: float = 1.0,
) -> Recipe:
    """Combinatorial KD (arXiv:2010.03034, §2): (1 − α − β)·CE + α·T²·KL + β·Σ|ŝ − t̂|², summed over the student's
    layers, each projected to the width of a group of the teacher's layers, whose states are concatenated; ŝ and t̂ are
    L2-normalised. |ŝ − t̂|² is 2·(1 − cos).

    The published code sums over tokens. The paper tunes α and β; the defaults are arbitrary.
    """
    group = HiddenTerm(variant, distance="cosine", projection=True, weight=2 * beta, name="combination")
    return {"terms": [group], "kd": KDConfig(temperature=temperature, kd_weight=alpha, ce_weight=1 - (alpha + beta))}


def rail_kd(*, projection: bool = False, temperature: float = 1.0) -> Recipe:
    """RAIL-KD, layer by layer (arXiv:2109.10164, §3): ⅓ CE + ⅓ T²·KL + ⅓ Σ|ŝ − t̂|², summed over the student's
    layers, of mean-pooled and L2-normalised hidden states, against as many layers of the teacher, drawn anew for each
    epoch. |ŝ − t̂|² is 2·(1 − cos). With `projection` the student's states are projected to the teacher's width.
    """
    drawn = HiddenTerm(
        "random_sorted", distance="cosine", pool="mean", projection=projection, weight=2 / 3, name="layers"
    )
    return {"terms": [drawn], "kd": KDConfig(temperature=temperature, kd_weight=1 / 3, ce_weight=1 / 3)}


def alp_kd(
    buckets: Sequence[Sequence[int]] | str | None = None,
    *,
    beta: float = 1 / 3,
    eta: float = 1 / 3,
    lambda_: float = 1 / 3,
    temperature: float = 1.0,
    pool: Pool | None = None,
) -> Recipe:
    """ALP-KD (arXiv:2012.14022, §3): β·CE + η·T²·KL + λ·Σ of the mean squared difference of each of the
    student's layers from an attention-weighted mean of the teacher's, all of them or those of a bucket (`buckets`:
    "regular" for consecutive ones). Student and teacher have one width.

    The paper tunes the weights; the defaults are arbitrary. It takes the [CLS] states, as with ``pool="first"``;
    without, all tokens count.
    """
    attentive = LayerAttentionTerm(buckets, pool, weight=lambda_)
    return {"terms": [attentive], "kd": KDConfig(temperature=temperature, kd_weight=eta, ce_weight=beta)}
