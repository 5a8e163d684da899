"""PKD: patient knowledge distillation (Sun et al. 2019, arXiv:1908.09355), §3.2."""

from typing import Literal

from transformers import PreTrainedModel

from fusedkd.integrations import presets
from recipes.glue.method import Method
from recipes.glue.preset import by_preset
from recipes.glue.run import Run


def pkd(
    run: Run,
    *,
    variant: Literal["skip", "last"] = "skip",
    alpha: float = 0.7,
    temperature: float = 10.0,
    beta: float = 500.0,
) -> PreTrainedModel:
    recipe = presets.pkd(variant, alpha=alpha, temperature=temperature, beta=beta)
    return run.fit(run.student(), by_preset(recipe), terms=recipe["terms"])


METHODS = {"pkd": Method(pkd, "PKD", "arXiv:1908.09355", needs=("teacher", "width", "multiple"))}
