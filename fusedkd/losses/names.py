"""Options by the names that other libraries and papers give them: an error says what they are called here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

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


def by_name(loss: Callable[P, R]) -> Callable[P, R]:
    """The loss; an unknown keyword raises a TypeError that names our option."""
    options = list(inspect.signature(loss).parameters)
    known = frozenset(options)

    @wraps(loss)
    def named(*arguments: P.args, **given: P.kwargs) -> R:
        if not known.issuperset(given):
            raise TypeError(unknown(loss.__name__, given.keys() - known, options))
        return loss(*arguments, **given)

    return named


def unknown(who: str, given: Collection[str], options: Collection[str]) -> str:
    """What to say of options that it does not have."""
    told = []
    for name in sorted(given):
        here = OTHERS_NAMES.get(name, "")
        known = (near for near in (here, here.removeprefix("kd_")) if re.split("[ =]", near)[0] in options)
        near = next(known, next(iter(get_close_matches(name, options)), ""))
        told.append(f"{name} ({near}?)" if near else name)
    return f"{who} has no option {', '.join(told)}; it has {', '.join(options)}"
