"""The students that a run compares."""

from typing import Any, NamedTuple

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.config import KDConfig

PUBLISHED = (
    "Published beside it: DistilGPT2, with half of GPT-2's layers, has perplexity 21.1 on WikiText-103 against GPT-2's "
    "16.3, both fine-tuned there, after a week of distillation on eight V100 (its model card)."
)


class Arm(NamedTuple):
    title: str
    colour: str
    divergence: Any = None


ARMS = {
    "ce": Arm("no teacher", "#d9730d"),
    "forward_kl": Arm("forward KL", "#0b6e99", "forward_kl"),
    "reverse_kl": Arm("reverse KL", "#6940a5", "reverse_kl"),
    "jsd": Arm("JSD", "#448361", "jsd"),
}


def loss_of(arm: str, temperature: float, kd_weight: float, ce_weight: float) -> KDConfig:
    """UsageError for an arm that there is not, or a value out of range."""
    if arm not in ARMS:
        raise UsageError(f"--arms {arm}: it must be one of {', '.join(ARMS)}")
    if ARMS[arm].divergence is None:
        return KDConfig(kd_weight=0.0, ce_weight=1.0)
    try:
        return KDConfig(
            temperature=temperature, divergence=ARMS[arm].divergence, kd_weight=kd_weight, ce_weight=ce_weight
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"--{error}") from None
