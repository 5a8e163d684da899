"""CKD: combinatorial distillation, a layer for several (Wu et al. 2020, arXiv:2010.03034, §2).

(1 − α − β)·CE + α·T²·KL + β·Σ_i |ŝ_i − t̂_i|². Layer i of the student is projected to the width of a group of the
teacher's layers, whose hidden states are concatenated; both sides are divided by their L2 norms, and the loss is a mean
over tokens. Which layers are a group:

regular       k = N/M layers that follow each other: of 12 layers and a student of 4, 1–3, 4–6, 7–9 and 10–12
overlap       these and the next layer below and above: 1–4, 3–7, 6–10 and 9–12
skip_middle   k − 1 layers that follow each other, so that some in the middle are in no group: 1–2, 3–4, 9–10 and 11–12
cross         every other layer of the regular groups: 1 and 3, 4 and 6, …
interleaved   every M-th layer: 1, 5 and 9; 2, 6 and 10; …

The published code is of translation and sums over tokens. The paper tunes α and β; the defaults are arbitrary.
"""

from typing import Literal

from transformers import PreTrainedModel

from fusedkd.integrations import presets
from fusedkd.integrations.command import UsageError
from recipes.glue.method import Method, Positive, Share
from recipes.glue.preset import by_preset
from recipes.glue.run import Run


def ckd(
    run: Run,
    *,
    variant: Literal["regular", "overlap", "skip_middle", "cross", "interleaved"] = "regular",
    alpha: Share = 0.4,
    beta: Share = 0.2,
    temperature: Positive = 1.0,
) -> PreTrainedModel:
    if alpha + beta > 1:
        raise UsageError(f"alpha + beta must be at most 1, for 1 − alpha − beta weighs the labels, not {alpha + beta}")
    recipe = presets.ckd(variant, alpha=alpha, beta=beta, temperature=temperature)
    return run.fit(run.student(), by_preset(recipe), terms=recipe["terms"])


METHODS = {
    "ckd": Method(
        ckd,
        "CKD",
        "arXiv:2010.03034",
        published="76.37 regular, 76.73 overlap, mean over GLUE's tasks, BERT of 12 layers → 4 (KD 76.02; in "
        "arXiv:2012.14022)",
        needs=("teacher", "multiple"),
    )
}
