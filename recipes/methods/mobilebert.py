"""MobileBERT's progressive knowledge transfer: one layer after another (Sun et al. 2020, arXiv:2004.02984, §3.3–3.4).

1. For the student's layers ℓ = 1 … M in turn, with embeddings and layers below ℓ frozen: 100 · the mean squared
   difference of the hidden states of ℓ and of the teacher's layer ℓ·N/M, each normalised over its columns without
   parameters, plus the KL divergence of their attention maps, a mean over heads and tokens.
2. The whole student: α·CE + (1 − α)·KL at temperature 1.

The weights are the published code's. Its student has as many layers as its teacher, a BERT-large with bottlenecks, and
is trained on general text; a teacher of more layers is what is added here. The code slows frozen layers down rather
than stop them, and has penalties of means and variances besides, which are left out.
"""

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from fusedkd.integrations import presets
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.students import LAYER
from fusedkd.integrations.term import Term
from fusedkd.integrations.terms import AttentionTerm, HiddenTerm
from recipes.glue.method import Method, Share, Weight
from recipes.glue.preset import by_preset
from recipes.glue.run import Run
from recipes.glue.step import Step


def mobilebert(
    run: Run,
    *,
    progressive: Share = 0.5,
    alpha: Share = 0.5,
    hidden_weight: Weight = 100.0,
    attention_weight: Weight = 1.0,
) -> PreTrainedModel:
    """`progressive`: the share of the steps in which layers are taught, the same for each."""
    weights = {"hidden_weight": hidden_weight, "attention_weight": attention_weight}
    recipe = presets.mobilebert(alpha=alpha, **weights)
    student = run.student()
    depth, of_teacher = student.config.num_hidden_layers, run.source.config.num_hidden_layers
    *counts, rest = run.split(*[progressive / depth] * depth, 1 - progressive)
    for layer, steps in enumerate(counts, start=1):
        only(student, layer)
        terms = of_layer(recipe["terms"], layer, layer * of_teacher // depth)
        run.fit(student, Step.terms, terms=terms, steps=steps)
    student.requires_grad_(True)
    return run.fit(student, by_preset({**recipe, "terms": []}), steps=rest)


def only(student: nn.Module, layer: int) -> None:
    """Freeze all but this layer, from 1. Those above it have no gradient anyway."""
    its = {name for name, _ in student.named_parameters() if (at := LAYER.search(name)) and int(at[2]) == layer - 1}
    if not its:
        raise UsageError(f"--method mobilebert: layer {layer} of {type(student).__name__} has no weights of its own")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in its)


def of_layer(terms: list[Term], student: int, teacher: int) -> list[Term]:
    """The same terms, of one pair of layers from 1."""
    pairs = {HiddenTerm: (student, teacher), AttentionTerm: (student - 1, teacher - 1)}
    return [replace(term, layers=[pairs[type(term)]]) for term in terms]  # type: ignore[call-arg, index]


METHODS = {
    "mobilebert": Method(
        mobilebert,
        "MobileBERT's progressive transfer",
        "arXiv:2004.02984",
        published="GLUE test, 24 thin layers from a BERT-large with bottlenecks, on general text: 78.5; 77.7 with ReLU "
        "and without layer norm, for speed",
        needs=("teacher", "width", "heads", "multiple"),
    )
}
