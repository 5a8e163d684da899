"""Options by the names that other libraries and papers give them: an error says what they are called here."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

OTHERS_NAMES = {
    "alpha": "kd_weight and ce_weight",
    "lam": "kd_weight and ce_weight",
    "beta": "divergence=JSD(beta)",
    "T": "temperature",
    "tau": "temperature",
    "temp": "temperature",
    "loss_type": "divergence",
    "mask": "kd_mask",
    "attention_mask": "kd_mask",
    "num_items_in_batch": "kd_normalizer and ce_normalizer",
    "teacher_logits": "teacher",
    "target": "labels",
    "softcap": "logit_softcap",
}
"""What options are called elsewhere, and here."""


def unknown(who: str, given: Collection[str], options: Collection[str]) -> str:
    """What to say of options that it does not have."""
    told = []
    for name in sorted(given):
        here = OTHERS_NAMES.get(name, "")
        known = (near for near in (here, here.removeprefix("kd_")) if re.split("[ =]", near)[0] in options)
        near = next(known, next(iter(get_close_matches(name, options)), ""))
        told.append(f"{name} ({near}?)" if near else name)
    return f"{who} has no option {', '.join(told)}; it has {', '.join(options)}"
