"""The students that a run compares, and what the paper says of them (Sanh et al. 2019, arXiv:1910.01108, table 4)."""

from dataclasses import fields, replace
from typing import Any, NamedTuple

from fusedkd.distilbert.config import Config, check
from fusedkd.integrations.command import UsageError


class Arm(NamedTuple):
    title: str
    changes: dict[str, Any]  # of the options that the command line gives
    colour: str
    paper: float | None = None  # change of the GLUE macro-score against the triple loss


ARMS = {
    "full": Arm("full loss", {}, "#0b6e99"),
    "no_cos": Arm("without cosine", {"alpha_cos": 0.0}, "#6940a5", -1.46),
    "no_mlm": Arm("without MLM", {"alpha_mlm": 0.0}, "#448361", -0.31),
    "no_distil": Arm("without the distillation loss", {"alpha_distil": 0.0}, "#c29343", -2.96),
    "random_init": Arm("random initialisation", {"init": "random"}, "#c4554d", -3.69),
    "mlm_alone": Arm("MLM alone", {"alpha_distil": 0.0, "alpha_cos": 0.0, "alpha_mse": 0.0, "terms": []}, "#d9730d"),
}


def changed(config: Config, arm: str) -> Config:
    """The options of one arm. UsageError where it has none, or a loss without a term."""
    if arm not in ARMS:
        raise UsageError(f"--arms {arm}: it must be one of {', '.join(ARMS)}")
    changes = ARMS[arm].changes

    def group(options: Any) -> Any:
        return replace(options, **{f.name: changes[f.name] for f in fields(options) if f.name in changes})

    config = replace(config, loss=group(config.loss), student=group(config.student))
    try:
        check(config)
    except UsageError as error:
        raise UsageError(f"--arms {arm}: {error}") from None
    return config
