"""What the loss from the hidden states saves: the same step with whole logits and torch's own losses beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import peak_bytes
from fusedkd.integrations.config import KDConfig
from recipes.causal.training import Budget, Shared, batch_of


def eager_loss(student: Any, teacher: Any, batch: dict[str, Tensor], kd: KDConfig) -> Tensor:
    """kd_weight · T² · KL(p‖q) + ce_weight · CE, a mean over the tokens that are predicted."""
    ids, attended = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        v = teacher(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1].flatten(0, 1)
    z = student(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1].flatten(0, 1)
    log_q, log_p = ((logits / kd.temperature).log_softmax(-1) for logits in (z, v))
    loss = kd.kd_weight * kd.temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return loss + kd.ce_weight * F.cross_entropy(z, batch["labels"][:, 1:].flatten()) if kd.ce_weight else loss


def compare(shared: Shared, student: PreTrainedModel, kd: KDConfig, rounds: int = 5) -> dict[str, Any]:
    """Forward and backward of one batch, fused and eager in turn: medians of seconds, and peaks beyond models and
    gradients.
    """
    trainer, batch = shared.trainer(student, kd, Budget(steps=1)), batch_of(shared)
    student.train()
    losses: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: trainer.compute_loss(student, batch),
        "eager": lambda: eager_loss(student, trainer.teacher, batch, kd),
    }

    def run(name: str) -> float:
        loss = losses[name]()
        loss.backward()
        return float(loss.detach())

    values = {name: run(name) for name in losses}
    device = shared.arguments.device.type
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in losses}
    for turn in range(rounds):
        for name in sorted(losses, reverse=bool(turn % 2)):
            before = Budget.now()
            run(name)
            seconds[name].append({clock: now - before[clock] for clock, now in Budget.now().items()})
    peaks = {name: peak_bytes(lambda name=name: run(name), device) for name in losses}  # type: ignore[misc]
    student.zero_grad()
    return {
        name: {
            "loss": values[name],
            "seconds": {clock: statistics.median(each[clock] for each in seconds[name]) for clock in seconds[name][0]},
            "peak_mb": None if peaks[name] is None else peaks[name] / 2**20,  # type: ignore[operator]
        }
        for name in losses
    }
