"""TinyBERT, its task-specific part: first the layers, then the predictions (Jiao et al. 2020, arXiv:1909.10351, §3).

1. The mean squared differences of the attention scores before their softmax and of the hidden states, embeddings
   included, summed over the student's layers i = 0 … M against the teacher's i·N/M. One projection, trained with the
   student, stands before all of its hidden states. Labels and logits have no part.
2. The cross-entropy with the teacher's predictions at temperature 1. Its gradient is that of the KL divergence, which
   is what is computed here.

As in the published code, the mean over attention scores counts padded keys and queries: the first stage's loss depends
on the padding, and so on how a step is cut into micro-batches of other lengths.

Differences from that code: hidden states of padding are left out; the cross-entropy is a mean over examples,
there over examples and classes; with scores, as in STS-B, the target is the teacher's score, there the label. The code
trains 10 to 20 epochs of the first stage and 3 of the second, on augmented data (here `--method tinybert:augment=20`),
starting from a TinyBERT that was distilled on general text; here two thirds of the steps are of the first.
"""

from transformers import PreTrainedModel

from fusedkd.integrations import presets
from recipes.glue.method import Method, Share
from recipes.glue.preset import by_preset
from recipes.glue.run import Run


def tinybert(run: Run, *, intermediate: Share = 2 / 3) -> PreTrainedModel:
    """`intermediate`: the first stage's share of the steps."""
    student = run.student()
    steps = run.split(intermediate, 1 - intermediate)
    for recipe, count in zip((presets.tinybert("intermediate"), presets.tinybert("prediction")), steps, strict=True):
        run.fit(student, by_preset(recipe), terms=recipe["terms"], steps=count)
    return student


METHODS = {
    "tinybert": Method(
        tinybert,
        "TinyBERT",
        "arXiv:1909.10351",
        published="78.1 on GLUE's leaderboard, BERT of 12 layers → 6, with augmented data and general distillation",
        needs=("teacher", "heads", "multiple"),
    )
}
