"""One hidden state beside the logits: the last of the student is to be like the last of the teacher.

(1 − α)·CE + α·T²·KL + weight·D(h_S·W + b, h_T), a mean over tokens, with D = 1 − cos (DistilBERT, Sanh et al. 2019,
arXiv:1910.01108, §3) or the mean squared difference (hints of FitNets, Romero et al. 2015, arXiv:1412.6550, eq. 3).
The projection is there where the widths differ, and is trained with the student; DistilBERT, as wide as its teacher,
has none.
"""

from typing import Literal

from transformers import PreTrainedModel

from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.presets import Recipe
from fusedkd.integrations.terms import HiddenTerm
from recipes.glue.method import Method, Positive, Share, Weight
from recipes.glue.preset import by_preset, other_width
from recipes.glue.run import Run


def hidden(
    run: Run,
    *,
    distance: Literal["cosine", "mse"] = "cosine",
    weight: Weight = 1.0,
    alpha: Share = 0.5,
    temperature: Positive = 2.0,
) -> PreTrainedModel:
    student = run.student()
    last = HiddenTerm(distance=distance, projection=other_width(student, run.teacher), weight=weight)
    kd = KDConfig(temperature=temperature, kd_weight=alpha, ce_weight=1 - alpha)
    recipe: Recipe = {"terms": [last], "kd": kd}
    return run.fit(student, by_preset(recipe), terms=recipe["terms"])


METHODS = {
    "hidden": Method(
        hidden,
        "last hidden state",
        "arXiv:1412.6550",
        published="−1.46 points of GLUE's mean without the cosine in DistilBERT's pre-training (arXiv:1910.01108)",
    )
}
