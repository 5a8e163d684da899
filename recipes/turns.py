"""How long models take, measured so that whatever else the machine does strikes all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from recipes.finetune.trainer import takes


@torch.inference_mode()
def seconds_in_turns(
    models: dict[str, Any], inputs: Sequence[dict[str, Any]], clock: Callable[[], float], warm: int
) -> dict[str, list[float]]:
    """Of each model the seconds for each input, without the first `warm` ones. The models take turns at each input, and
    are given the columns of it that they take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    columns = {name: takes(model) for name, model in models.items()}
    for given in inputs:
        for name, model in models.items():
            own = {column: value for column, value in given.items() if column in columns[name]}
            start = clock()
            model(**own)
            seconds[name].append(clock() - start)
    return {name: times[warm:] for name, times in seconds.items()}
