"""How long models take, measured so that whatever else the machine does strikes all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.inference_mode()
def seconds_in_turns(
    models: dict[str, Any], inputs: Sequence[dict[str, Any]], clock: Callable[[], float], warm: int
) -> dict[str, list[float]]:
    """Of each model the seconds for each input, without the first `warm` ones. The models take turns at each input."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for given in inputs:
        for name, model in models.items():
            start = clock()
            model(**given)
            seconds[name].append(clock() - start)
    return {name: times[warm:] for name, times in seconds.items()}
