"""PKD: the student follows the teacher's [CLS] states layer by layer (Sun et al. 2019, arXiv:1908.09355, §3.2, eq. 7).

(1 − α)·CE + α·T²·KL + β·PT. PT is the mean, over the student's layers but the last, examples and columns, of the
squared difference of the [CLS] states, each divided by its L2 norm first. A student of M layers has the teacher's
layers k, 2k, … (`skip`, k = N/M) or the M − 1 before its last one (`last`).

The paper writes PT as a sum; its published code takes the mean, as here. For the KL divergence that code takes the mean
over classes, too, so that its α weighs a term C times smaller. The weights are those of one of its runs.
"""

from typing import Literal

from transformers import PreTrainedModel

from fusedkd.integrations import presets
from recipes.glue.method import Method, Positive, Share, Weight
from recipes.glue.preset import by_preset
from recipes.glue.run import Run


def pkd(
    run: Run,
    *,
    variant: Literal["skip", "last"] = "skip",
    alpha: Share = 0.7,
    temperature: Positive = 10.0,
    beta: Weight = 500.0,
) -> PreTrainedModel:
    recipe = presets.pkd(variant, alpha=alpha, temperature=temperature, beta=beta)
    return run.fit(run.student(), by_preset(recipe), terms=recipe["terms"])


METHODS = {
    "pkd": Method(
        pkd,
        "PKD",
        "arXiv:1908.09355",
        published="76.44, mean over GLUE's tasks, BERT of 12 layers → 4 (KD 76.02, labels 74.61; arXiv:2012.14022)",
        needs=("teacher", "width", "multiple", "both_directions"),
    )
}
