"""What a distilling Trainer reports of an evaluation: sums over its rows, by name, and the means that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from fusedkd.integrations import refusals
from fusedkd.integrations.offline import Batch
from fusedkd.integrations.pair import Pair, Routed

AT_ONE: dict[str, Any] = {
    "temperature": 1.0,
    "teacher_temperature": None,
    "divergence": "forward_kl",
    "scale_by_t2": False,
    "kd_weight": 1.0,
    "label_smoothing": 0.0,
    "z_loss_weight": 0.0,
    "reduction": "none",
}
"""The options under which the KD term is the KL divergence, and the cross-entropy the model's own."""


class EvaluatingTrainer(Trainer):
    """The evaluation of :class:`fusedkd.integrations.transformers.DistillationTrainer`."""

    _run: Any
    _bind: Any
    eval_sums: dict[str, Tensor]

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Adds the batch to the sums of the evaluation, one row per sequence so that none is counted twice."""
        inputs = self._prepare_inputs(inputs)
        names: list[str] = []

        def compute(pair: Pair) -> Tensor:
            found = sums(self, pair)
            names.extend(found)
            return torch.stack(list(found.values()), 1)

        with torch.no_grad(), self.compute_loss_context_manager():
            columns, outputs = self._run(model, inputs, compute, not prediction_loss_only, True)
        end = self.accelerator.gradient_state
        if self.args.world_size > 1 and end.end_of_dataloader and end.remainder > 0:
            refusals.flattened_evaluation(len(columns), self.args.per_device_eval_batch_size)
        of_all = self.accelerator.gather_for_metrics(columns).sum(0)
        for name, value in zip(names, of_all, strict=True):
            self.eval_sums[name] = self.eval_sums.get(name, 0) + value
        mine = dict(zip(names, columns.sum(0).tolist(), strict=True))
        loss = torch.tensor(means(self, mine)["loss"], device=self.args.device)
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits, inputs.get("labels"))

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> Any:
        self._bind()
        if self.args.world_size > 1 and has_length(dataloader):
            length = torch.tensor([len(dataloader)], device=self.args.device)
            refusals.uneven_evaluation(self.accelerator.gather(length).tolist())
        self.eval_sums = {}
        options["metric_key_prefix"] = metric_key_prefix
        output: Any = super().evaluation_loop(dataloader, description, *args, **options)
        if self.eval_sums:
            found = means(self, {name: float(value) for name, value in self.eval_sums.items()})
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output


def sums(trainer: Any, pair: Pair) -> dict[str, Tensor]:
    """Of a batch, ``(B,)`` float64: of the terms of the loss, of the KL divergence and the cross-entropy at temperature
    1, of the divergence from each of several teachers, and the numbers of rows of each.
    """
    options = AT_ONE | ({"temperature": trainer.kd.logprobs_temperature} if trainer.offline else {})
    _, terms = trainer.losses(pair, None)
    _, plain = trainer.linear(pair, **options, ce_weight=float(pair.labels is not None))
    rows = {f"term {name}": terms[name] for name in trainer.parts()} | {"kl": plain.kd, "ce": plain.ce}
    rows |= {f"rows {i}": mask for i, mask in enumerate(pair.masks)}
    for index, key in enumerate(trainer.teacher_keys):
        own = pair.masks[0]
        if isinstance(pair.teacher, Routed):
            own = own & (pair.teacher.routes == index)[:, None]
            kl = plain.kd.where(own, 0)
        elif isinstance(pair.teacher, list):
            _, (kl, _) = trainer.linear(pair._replace(teacher=pair.teacher[index]), **options, ce_weight=0.0)
        rows |= {f"kl {key}": kl, f"rows of {key}": own}
    return {name: each.double().sum(1) for name, each in rows.items()}


def means(trainer: Any, sums: Mapping[str, float]) -> dict[str, float]:
    """Those that have rows; the loss is NaN if none of its terms has any."""
    used = {name: part for name, part in trainer.parts().items() if part[0] != 0 and sums[f"rows {part[1]}"]}
    found = [weight * sums[f"term {name}"] / sums[f"rows {i}"] for name, (weight, i) in used.items()]
    result = {"loss": float(sum(found)) if found else math.nan}
    result |= {
        name: sums[f"term {name}"] / sums[f"rows {used[name][1]}"] for name in trainer.parts_of_terms() if name in used
    }
    if sums["rows 1"]:
        ce = sums["ce"] / sums["rows 1"]
        result["ce"] = ce
        if not trainer.head.kind.classes:
            result["perplexity"] = float(torch.tensor(ce, dtype=torch.float64).exp())
    kl = "kl_top_k" if trainer.offline else "kl"
    if sums["rows 0"] and (trainer.offline or trainer.teacher is not None):
        result[kl] = sums["kl"] / sums["rows 0"]
    named = {key: sums.get(f"rows of {key}") for key in trainer.teacher_keys}
    return result | {f"{kl}_{key}": sums[f"kl {key}"] / count for key, count in named.items() if count}
