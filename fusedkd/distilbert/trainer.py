"""The triple loss of DistilBERT in a Trainer: distillation, language modelling, cosine of hidden states.

DistillationTrainer makes it exact: each term is a sum over its own tokens divided by the number of such tokens in the
whole optimiser step, all micro-batches and all ranks. The same class trains the teacher, which has none, and the
student of the language-modelling term alone.
"""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback

from fusedkd.divergences import Divergence, DivergenceName
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.interrupt import Interruptible
from fusedkd.integrations.term import Term
from fusedkd.integrations.terms import HiddenTerm, LogitsTerm
from fusedkd.integrations.transformers import DistillationTrainer
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
        terms: further ones.

    The head goes through `linear_kd_loss` at every size. On a CPU that takes as long as logits and `kd_loss` at 1024
    rows × 4096 columns, 5 % less at 512 × 30522, and less than half where the labelled tokens alone count; below a few
    hundred rows it loses a millisecond.

    Raises:
        Stopped: in training, when the loss is no number, on SIGTERM or Ctrl-C and where a checkpoint cannot be written;
            the last checkpoint is complete.
    """

    names = ("distil", "mlm")

    def __init__(
        self,
        *args: Any,
        loss: DistilBertLoss | None = None,
        divergence: DivergenceName | Divergence = "forward_kl",
        alpha_mse: float = 0.0,
        cos_layers: tuple[tuple[int, int], ...] = ((-1, -1),),
        eval_collator: Any = None,
        terms: Sequence[Term] = (),
        **options: Any,
    ):
        self.loss, self.eval_collator = DistilBertLoss() if loss is None else loss, eval_collator
        loss = self.loss
        kd = KDConfig(
            temperature=loss.temperature,
            divergence=divergence,
            kd_weight=loss.alpha_distil,
            ce_weight=loss.alpha_mlm,
            kd_on="labels" if loss.kd_on == "masked" else "attended",
        )
        teacher = options.get("teacher", args[1] if len(args) > 1 else None)
        if isinstance(teacher, list | tuple | dict):
            raise ValueError(f"teacher must be one model for the triple loss, not a {type(teacher).__name__}")
        own = [
            HiddenTerm(cos_layers, distance="cosine", average=True, weight=loss.alpha_cos, name="cos"),
            LogitsTerm("logit_mse", weight=alpha_mse, name="mse"),
        ]
        super().__init__(*args, kd=kd, terms=[*own, *terms], **options)
        self.add_callback(EpochSetter(self.data_collator))

    def use_columns(self) -> None:
        raise ValueError("teacher is None, but alpha_distil or alpha_mse is not 0")

    def parts(self) -> dict[str, tuple[float, int]]:
        return {name: part for name, part in super().parts().items() if part[0] != 0}

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
