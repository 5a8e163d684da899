"""The triple loss of DistilBERT in a Trainer: distillation, language modelling, cosine of hidden states.

DistillationTrainer makes it exact: each term is a sum over its own tokens divided by the number of such tokens in the
whole optimiser step, all micro-batches and all ranks. The same class trains the teacher, which has none, and the
student of the language-modelling term alone.
"""

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from fusedkd.divergences import Divergence, DivergenceName
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.interrupt import Interruptible
from fusedkd.integrations.pair import Pair
from fusedkd.integrations.transformers import Batch, DistillationTrainer
from fusedkd.nn import DistilBertLoss


class DistilBertTrainer(Interruptible, DistillationTrainer):
    """A DistillationTrainer of the triple loss, of which it logs the terms in use: distil, mlm, cos, mse.

    Args:
        model, teacher, args, …: as there; teacher None is for a loss that needs none.
        loss: its weights and temperature.
        divergence: of the KD term, in place of the KL divergence.
        alpha_mse: weight of the mean over the vocabulary of the squared difference of the logits, over the rows of the
            KD term. It knows no temperature.
        cos_layers: pairs of indices into the `hidden_states` of student and teacher; the cosine term is their mean.
        eval_collator: of the held-out blocks, always in the same way; None: the data collator.

    The head goes through `linear_kd_loss` at every size. On a CPU that takes as long as logits and `kd_loss` at 1024
    rows × 4096 columns, 5 % less at 512 × 30522, and less than half where the labelled tokens alone count; below a few
    hundred rows it loses a millisecond.

    Raises:
        Stopped: in training, when the loss is no number, on SIGTERM or Ctrl-C and where a checkpoint cannot be written;
            the last checkpoint is complete.
    """

    def __init__(
        self,
        *args: Any,
        loss: DistilBertLoss | None = None,
        divergence: DivergenceName | Divergence = "forward_kl",
        alpha_mse: float = 0.0,
        cos_layers: tuple[tuple[int, int], ...] = ((-1, -1),),
        eval_collator: Any = None,
        **options: Any,
    ):
        self.loss = loss = DistilBertLoss() if loss is None else loss
        self.alpha_mse, self.cos_layers, self.eval_collator = alpha_mse, cos_layers, eval_collator
        kd = KDConfig(
            temperature=loss.temperature,
            divergence=divergence,
            kd_weight=loss.alpha_distil,
            ce_weight=loss.alpha_mlm,
            kd_on="labels" if loss.kd_on == "masked" else "attended",
        )
        super().__init__(*args, kd=kd, **options)
        if self.teachers and self.teachers.several:
            raise ValueError(f"teacher must be one model for the triple loss, not a {type(self.teacher).__name__}")
        self.add_callback(EpochSetter(self.data_collator))

    @property
    def needs_teacher(self) -> bool:
        return any((self.loss.alpha_distil, self.loss.alpha_cos, self.alpha_mse))

    def use_columns(self) -> None:
        raise ValueError("teacher is None, but alpha_distil, alpha_cos or alpha_mse is not 0")

    # ---- the loss

    def masks(self, batch: Batch) -> list[Tensor]:
        return [*super().masks(batch), self.attended(batch)]

    def parts(self) -> dict[str, tuple[float, int]]:
        loss = self.loss
        known = {"distil": (loss.alpha_distil, 0), "mlm": (loss.alpha_mlm, 1), "cos": (loss.alpha_cos, 2)}
        return {name: part for name, part in (known | {"mse": (self.alpha_mse, 0)}).items() if part[0] != 0}

    def wanted(self) -> dict[str, Any]:
        return {"output_hidden_states": True} if self.loss.alpha_cos else {}

    def losses(self, pair: Pair, counts: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        kd, mlm, cos = [None] * 3 if counts is None else counts
        hidden = []
        if self.loss.alpha_cos:
            states = pair.outputs.hidden_states, pair.teacher_outputs.hidden_states
            hidden = [(states[0][i], states[1][j]) for i, j in self.cos_layers]
        reduction: Any = "none" if counts is None else "mean"
        normalizers: Any = {"kd_normalizer": kd, "mlm_normalizer": mlm, "cos_normalizer": cos}
        distil = partial(self.linear, pair)
        loss, found = self.loss.of(distil, hidden, pair.masks[2], reduction=reduction, **normalizers)
        terms = found._asdict()
        if self.alpha_mse:
            distil = partial(distil, divergence="logit_mse", temperature=1.0, reduction=reduction)
            mse, (terms["mse"], _) = distil(kd_weight=self.alpha_mse, ce_weight=0.0, kd_normalizer=kd)
            loss = loss + mse
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
