"""The triple loss of DistilBERT in a Trainer: distillation, language modelling, cosine of hidden states.

DistillationTrainer makes it exact: each term is a sum over its own tokens divided by the number of such tokens in the
whole optimiser step, all micro-batches and all ranks. The same class trains the teacher, which has none, and the
student of the language-modelling term alone.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from fusedkd.distilbert.interrupt import Interruptible
from fusedkd.integrations.transformers import Batch, DistillationTrainer, KDConfig, Pair
from fusedkd.losses.hidden import cosine_hidden_loss


@dataclass
class TripleLoss(KDConfig):
    """kd_weight · T^k · D + ce_weight · CE + cos_weight · (1 − cos) + mse_weight · MSE (Sanh et al., arXiv:1910.01108,
    §3, whose weights these are).

    kd_on       as in KDConfig; "labels" of a masked LM: the masked tokens
    cos_layers  pairs of indices into the `hidden_states` of student and teacher, over attended tokens; their mean
    mse_weight  of the mean over the vocabulary of the squared difference of the logits, over the rows of the KD term

    cos and MSE know no temperature.
    """

    kd_weight: float = 5.0
    ce_weight: float = 2.0
    kd_on: Literal["labels", "attended"] = "attended"
    cos_weight: float = 1.0
    mse_weight: float = 0.0
    cos_layers: tuple[tuple[int, int], ...] = ((-1, -1),)

    @property
    def needs_teacher(self) -> bool:
        return any((self.kd_weight, self.cos_weight, self.mse_weight))


class DistilBertTrainer(Interruptible, DistillationTrainer):
    """A DistillationTrainer with the cosine term and the logit MSE, of which it logs the terms in use.

    Args:
        model, teacher, args, …: as there; teacher None is for a loss that needs none.
        loss: the loss's options.
        eval_collator: of the held-out blocks, always in the same way; None: the data collator.

    The head goes through `linear_kd_loss` at every size. On a CPU that takes as long as logits and `kd_loss` at 1024
    rows × 4096 columns, 5 % less at 512 × 30522, and less than half where the labelled tokens alone count; below a few
    hundred rows it loses a millisecond.

    Raises:
        Stopped: in training, when the loss is no number, on SIGTERM or Ctrl-C and where a checkpoint cannot be written;
            the last checkpoint is complete.
    """

    def __init__(self, *args: Any, loss: TripleLoss, eval_collator: Any = None, **options: Any):
        super().__init__(*args, kd=loss, **options)
        self.loss, self.eval_collator = loss, eval_collator
        self.add_callback(EpochSetter(self.data_collator))

    def use_columns(self) -> None:
        raise ValueError("teacher is None, but kd_weight, cos_weight or mse_weight is not 0")

    # ---- the loss

    def masks(self, batch: Batch) -> list[Tensor]:
        return [*super().masks(batch), self.attended(batch)]

    def parts(self) -> dict[str, tuple[float, int]]:
        loss = self.loss
        known = {**super().parts(), "cos": (loss.cos_weight, 2), "mse": (loss.mse_weight, 0)}
        return {name: part for name, part in known.items() if part[0] != 0}

    def wanted(self) -> dict[str, Any]:
        return {"output_hidden_states": True} if self.loss.cos_weight else {}

    def losses(self, pair: Pair, counts: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = super().losses(pair, counts)
        per_row: dict[str, Any] = {"reduction": "none"} if counts is None else {}
        if weight := self.loss.mse_weight:
            options: dict[str, Any] = {"divergence": "logit_mse", "temperature": 1.0, "teacher_temperature": None}
            options |= per_row or {"kd_normalizer": counts[0]}  # type: ignore[index]
            found, (terms["mse"], _) = self.linear(pair, kd_weight=weight, ce_weight=0.0, **options)
            loss = loss + found
        if weight := self.loss.cos_weight:
            options = per_row or {"normalizer": counts[2]}  # type: ignore[index]
            states = pair.outputs.hidden_states, pair.teacher_outputs.hidden_states
            pairs = [(states[0][i], states[1][j]) for i, j in self.loss.cos_layers]
            each = [cosine_hidden_loss(x, y, pair.masks[2], **options) for x, y in pairs]
            cos = torch.stack(each).mean(0)
            terms["cos"], loss = cos.detach(), loss + weight * cos
        return loss, terms

    # ---- the run

    def train(self, resume_from_checkpoint: Any = None, *more: Any, **options: Any) -> Any:
        if resume_from_checkpoint:  # the curve has its first point
            self.args.eval_on_start = False
        return super().train(resume_from_checkpoint, *more, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        collator = self.data_collator
        self.data_collator = self.eval_collator or collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


class EpochSetter(TrainerCallback):
    """Tells the collator which epoch it masks for."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.collator, "epoch"):
            self.collator.epoch = int(state.epoch or 0)
