"""ALP-KD: each layer of the student follows a mixture of the teacher's (Passban et al. 2021, arXiv:2012.14022, §3).

β·CE + η·T²·KL + λ·Σ_i MSE(s_i, c_i), where c_i = Σ_k α_ik·t_k mixes the teacher's layers k of a bucket, and α_ik is the
softmax over k of ⟨s_i, t_k⟩. The states are those of [CLS]; the mean squared difference is over examples and columns.
The bucket of layer i of the student (M layers) is: all N layers of the teacher (`all`, ALP-KD); the i-th N/M of them,
so that no layer is in two buckets (`regular`, ALP-NO); or these and the next layer below and above (`overlap`, ALP-PO).

The paper tunes the weights; the defaults are arbitrary. No official code is known.
"""

from typing import Literal

from transformers import PreTrainedModel

from fusedkd.integrations import presets
from recipes.glue.method import Method, Positive, Weight
from recipes.glue.preset import by_preset
from recipes.glue.run import Run


def alp_kd(
    run: Run,
    *,
    buckets: Literal["all", "regular", "overlap"] = "all",
    beta: Weight = 1 / 3,
    eta: Weight = 1 / 3,
    lambda_: Weight = 1 / 3,
    temperature: Positive = 1.0,
) -> PreTrainedModel:
    options = {"beta": beta, "eta": eta, "lambda_": lambda_, "temperature": temperature}
    recipe = presets.alp_kd(None if buckets == "all" else buckets, pool="first", **options)
    return run.fit(run.student(), by_preset(recipe), terms=recipe["terms"])


METHODS = {
    "alp_kd": Method(
        alp_kd,
        "ALP-KD",
        "arXiv:2012.14022",
        published="77.01, mean over GLUE's tasks, BERT of 12 layers → 4 (PKD 76.44, KD 76.02, labels alone 74.61)",
        needs=("teacher", "width", "both_directions"),
    )
}
