"""How long a model takes for one sequence, side by side with others."""

import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def latencies(models: dict[str, PreTrainedModel], length: int, repeats: int = 100) -> dict[str, Any]:
    """Milliseconds of the body (no output head) at batch 1: the median of runs that take turns, on the CPU."""
    ids = torch.randint(5, min(m.config.vocab_size for m in models.values()), (1, length))
    bodies: dict[str, Any] = {name: model.cpu().eval().base_model for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 10):
        for name, body in bodies.items():
            start = time.perf_counter()
            body(input_ids=ids, attention_mask=torch.ones_like(ids))
            if turn >= 10:  # the first ones warm up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {"batch": 1, "length": length, "threads": torch.get_num_threads(), "milliseconds": medians}
