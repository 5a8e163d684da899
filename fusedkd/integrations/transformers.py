"""transformers' Trainer with a distillation loss that never holds the logits, for causal and masked language models.

The backbones of student and teacher run, their maps onto the vocabulary do not: :func:`fusedkd.linear_kd_loss` takes
the hidden states and the two heads. Each term is a sum over its rows divided by their number in the whole optimiser
step, all micro-batches and all ranks, so that one step has one gradient however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from fusedkd.divergences import resolve
from fusedkd.integrations import refusals
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.heads import Head, replaced_forward
from fusedkd.integrations.offline import COLUMNS, Batch, OfflineTeacherCollator
from fusedkd.integrations.teacher import Takes, TeacherModel, listed, load
from fusedkd.losses.linear_kd import linear_kd_loss
from fusedkd.losses.options import KDTerms
from fusedkd.teachers import TeacherHead, TeacherTopK

IGNORE = -100


class Pair(NamedTuple):
    """Student and teacher on one batch ``(B, L)``, at the ends of their backbones."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    outputs: Any
    teacher: TeacherHead | TeacherTopK | None
    teacher_outputs: Any
    labels: Tensor | None
    masks: list[Tensor]
    """The rows that :meth:`DistillationTrainer.masks` names."""


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the distillation of a teacher, for causal and masked LMs of transformers.

    Scales, soft-caps and biases of either model's logits are honoured (:class:`fusedkd.integrations.heads.Head`). Logs
    `kd` and `ce` without their weights beside `loss`, means over optimiser steps. Evaluates `loss`, and at temperature
    1 the cross-entropy `ce`, its `perplexity`, and `kl`, the divergence from the teacher; an offline teacher's is
    called `kl_top_k`, for it is that from the listed columns, with KDConfig's `tail` and at the temperature of their
    log-probabilities. What has no row in the whole data set is absent (`loss`: NaN).

    Runs alone, under DistributedDataParallel and under FSDP, with PEFT adapters anywhere but on the output head. Every
    rank holds the whole teacher. Text alone: vision–language models are distilled by their tokens.

    Args:
        model: the student.
        teacher: a model of any size and dtype, of the same kind and with the student's tokenizer, or the name or folder
            of one; it is frozen, put into evaluation mode and moved to the device. Vocabularies may be padded to
            different sizes. The student's own base model, where the student is a PEFT model
            (``student.get_base_model()``), is the student with adapters off: the weights are held once. Else it shares
            no parameter with the student that is to be trained. None: the data sets have the columns ``teacher_ids``
            (L, K) and ``teacher_logprobs`` (L, K), in whose row i is the teacher's distribution at position i: of a
            causal LM that of token i + 1. Id −1 is padding. Data without these columns is evaluated by cross-entropy
            alone. With a kd_weight of 0 a teacher is asked in evaluation only, and None is no teacher at all.
        kd: the loss's options.
        args, data_collator, …: as for :class:`transformers.Trainer`. For an offline teacher the collator is wrapped in
            :class:`OfflineTeacherCollator`.

    A teacher is given what the student is given, as far as its forward takes it; a warning names what it does not take.
    Tokens that its vocabulary does not hold may be padding; elsewhere they are an error, and on a GPU, where finding
    them would wait for the device, the loss is NaN. So it is with an offline teacher's ids that the student's
    vocabulary does not hold, but those that may be padding of the teacher's are left out.

    `compute_loss(…, return_outputs=True)` computes the logits as well, and so do `predict` and a `compute_metrics`.

    Raises:
        ValueError: naming the model's class, where something lies between head and logits that is not understood, or
            where the Trainer is asked for what would change the loss in silence.
        TypeError: for a teacher or options of another type.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole optimiser step

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teacher: PreTrainedModel | nn.Module | str | Path | None = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        *more: Any,
        kd: KDConfig | None = None,
        **options: Any,
    ):
        self.kd = KDConfig() if kd is None else kd
        refusals.options(self.kd, teacher)
        super().__init__(model, args, data_collator, *more, **options)
        self.offline = teacher is None and self.needs_teacher
        refusals.training_arguments(self)
        self.known_head: Head | None = None
        causal = self.head.causal  # refuses a student that is neither, with a teacher or without
        self.teacher: Any = load(teacher, causal) if isinstance(teacher, str | Path) else teacher
        self.teacher_model: Any = None
        if self.offline:
            self.use_columns()
        if self.teacher is not None:
            with self.accelerator.autocast():
                self.teacher_model = TeacherModel(self.teacher, self.student, causal, self.args.device)
            if self.teacher_model.adapted is not None:
                refusals.adapters_off(self)
        self._start_sums()
        self.eval_sums: list[Tensor] = []
        self.warned: set[str] = set()  # names of terms

    def use_columns(self) -> None:
        """Of the data sets, as the teacher."""
        refusals.offline_data(self.kd, self.train_dataset, self.data_collator)
        self.data_collator = OfflineTeacherCollator(self.data_collator)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss compares student and teacher."""
        return self.kd.needs_teacher

    @property
    def student(self) -> Any:
        return self.model

    @property
    def head(self) -> Head:
        """Of the student as it is: `model_init` makes other models, `resize_token_embeddings` another head."""
        with self.accelerator.autocast():
            self.known_head = Head.current(self.known_head, self.student)
        return self.known_head

    def _start_sums(self) -> None:
        self.terms: Any = 0
        """The sums of the terms over this rank's micro-batches since the last log."""
        self.steps, self.last_step = 0, -1  # optimiser steps in that sum
        self.blank: Any = 0
        """How many of this rank's batches had no row of each of `masks`."""

    def _inner_training_loop(self, *args: Any, **options: Any) -> Any:
        self._bind()
        self._start_sums()
        return super()._inner_training_loop(*args, **options)

    def _bind(self) -> None:
        """To the models as they are now, before anything wraps them."""
        with self.accelerator.autocast():
            _ = self.head, self.teacher_model and self.teacher_model.head
        if self.teacher_model and self.model_init is not None:
            refusals.shared_parameters(self.student, self.teacher)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: Any = self._signature_columns
        if self.offline:
            kept += [name for name in COLUMNS if name not in kept]

    @staticmethod
    def attended(batch: Batch) -> Tensor:
        """The tokens that are no padding, ``(B, L)``."""
        ids, given = batch["input_ids"], batch.get("attention_mask")
        return (torch.ones_like(ids) if given is None or given.shape != ids.shape else given) != 0

    def rows(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """(labels, KD mask), ``(B, L)`` each: of what position i predicts, which in a causal LM is token i + 1."""
        refusals.batch(batch)
        labels, attended = batch.get("labels"), self.attended(batch)
        on_labels = self.kd.kd_on == "labels" or resolve(self.kd.divergence).needs_labels
        if labels is None and (on_labels or self.kd.ce_weight != 0):
            raise ValueError(
                "the batch has no labels, which select rows unless kd_on='attended' and ce_weight=0: "
                "transformers' DataCollatorForLanguageModeling makes them"
            )
        if self.head.causal and labels is not None:
            labels = batch["shift_labels"] if "shift_labels" in batch else F.pad(labels[:, 1:], (0, 1), value=IGNORE)
            labels = labels.masked_fill(~attended, IGNORE)  # padding on the left would predict the first token
        if on_labels:
            mask = torch.as_tensor(labels != IGNORE)
        else:
            mask = attended & F.pad(attended[:, 1:], (0, 1)) if self.head.causal else attended
        if self.offline:
            teacher = self._listed(batch)
            mask = torch.zeros_like(mask) if teacher is None else mask & (teacher.ids >= 0).any(-1)
        return labels, mask

    def _listed(self, batch: Batch) -> TeacherTopK | None:
        return listed(batch, self.kd, self.head.linear.out_features)

    def masks(self, batch: Batch) -> list[Tensor]:
        """The rows ``(B, L)`` over which terms are means: those of KD and of the cross-entropy."""
        labels, mask = self.rows(batch)
        return [mask, torch.zeros_like(mask) if labels is None else labels != IGNORE]

    def parts(self) -> dict[str, tuple[float, int]]:
        """Of each term of the loss, by its name in the logs: its weight, and the number of its rows among `masks`."""
        return {"kd": (self.kd.kd_weight, 0), "ce": (self.kd.ce_weight, 1)}

    def losses(self, pair: Pair, counts: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the terms that `parts` names, detached and without their weights.

        Sums divided by `counts`, which are those of `masks` in the whole optimiser step; with None ``(B, L)``, a loss
        and terms per row.
        """
        if counts is None:
            loss, terms = self.linear(pair, reduction="none")
        else:
            loss, terms = self.linear(pair, kd_normalizer=counts[0], ce_normalizer=counts[1])
        return loss, terms._asdict()

    def linear(self, pair: Pair, **options: Any) -> tuple[Tensor, KDTerms]:
        """`linear_kd_loss` of the pair, with the options of KDConfig where none are given."""
        if pair.teacher is None:
            options["kd_weight"] = 0.0
        return linear_kd_loss(  # type: ignore[no-any-return]
            pair.hidden,
            pair.weight,
            pair.teacher or TeacherHead(pair.hidden.detach(), pair.weight.detach()),  # unread
            pair.labels,
            student_bias=pair.bias,
            kd_mask=pair.masks[0],
            logit_softcap=self.head.softcap,
            logit_scale=self.head.scale,
            return_terms=True,
            **{**self.kd.options(), **options},
        )

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """The numbers of rows of `masks` in one optimiser step over all ranks."""
        counts = torch.stack([torch.stack([mask.sum() for mask in self.masks(batch)]) for batch in batch_samples])
        self.blank = self.blank + (counts == 0).sum(0)
        total = counts.sum(0).to(device)
        return self.accelerator.gather(total).view(-1, len(total)).sum(0) if self.args.world_size > 1 else total

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.offline and COLUMNS[0] not in inputs:
            raise ValueError(f"without a teacher model the data set must have the columns {' and '.join(COLUMNS)}")
        counts = num_items_in_batch
        if counts is None:
            counts = self._get_num_items_in_batch([inputs], self.args.device)

        def compute(pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
            return self.losses(pair, counts)

        (loss, terms), outputs = self._run(model, inputs, compute, return_outputs, self.needs_teacher)
        if model.training and self.is_in_train:
            self.terms = self.terms + torch.stack([terms[name] for name in self.parts()]).double()
            self.steps += self.state.global_step != self.last_step
            self.last_step = self.state.global_step
        # Data parallelism averages the gradients of the ranks, each of which has its part of the sum.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _run(
        self, model: nn.Module, inputs: Batch, compute: Callable[[Pair], Any], with_logits: bool, with_teacher: bool
    ) -> tuple[Any, Any]:
        """What `compute` makes of the batch, and the student's outputs."""
        (labels, _), masks = self.rows(inputs), self.masks(inputs)
        given = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", *COLUMNS)} | self.wanted()
        teacher, teacher_outputs = self._teacher(inputs, given) if with_teacher else (None, None)
        inner = self.accelerator.unwrap_model(model)
        given |= Takes(inner).cache
        forward = inner.forward

        def computation(**inputs: Any) -> tuple[Any, Any]:
            hidden, outputs = self.head.hidden_states(forward, inputs, with_logits)
            weight, bias = self.head.parameters()
            with self.accelerator.autocast():
                return compute(Pair(hidden, weight, bias, outputs, teacher, teacher_outputs, labels, masks)), outputs

        # Called through the wrapper, whose hooks gather sharded weights and prepare the reduction of gradients.
        with replaced_forward(inner, computation):
            return model(**given)  # type: ignore[no-any-return]

    def wanted(self) -> dict[str, Any]:
        """Further arguments of both models."""
        return {}

    @torch.no_grad()
    def _teacher(self, inputs: Batch, given: Batch) -> tuple[TeacherHead | TeacherTopK | None, Any]:
        """Of the batch, of which the student is `given` a part."""
        if self.offline:
            return self._listed(inputs), None
        if self.teacher_model is None:
            return None, None
        with self.accelerator.autocast():
            return self.teacher_model(given, self.attended(inputs))  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the terms beside the loss: means over the optimiser steps since the last time."""
        if isinstance(self.blank, Tensor):
            blank, self.blank = self.blank.tolist(), 0  # waits for the device, as a log does anyway
            names = {name for name, (weight, i) in self.parts().items() if weight != 0 and blank[i]} - self.warned
            refusals.warn_of_blank(names)
            self.warned |= names
        if "loss" in logs and self.steps:
            means = self.accelerator.reduce(self.terms / self.steps, "sum").tolist()
            logs |= dict(zip(self.parts(), means, strict=True))
            self.terms, self.steps = 0, 0
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Adds the batch to the sums of the evaluation, one row per sequence so that none is counted twice."""
        inputs = self._prepare_inputs(inputs)
        plain: dict[str, Any] = {
            "temperature": self.kd.logprobs_temperature if self.offline else 1.0,
            "teacher_temperature": None,
            "divergence": "forward_kl",
            "scale_by_t2": False,
            "kd_weight": 1.0,
            "label_smoothing": 0.0,
        }

        def compute(pair: Pair) -> list[Tensor]:
            _, terms = self.losses(pair, None)
            _, at_one = self.linear(pair, reduction="none", **plain, ce_weight=float(pair.labels is not None))
            rows = [*(terms[name] for name in self.parts()), *at_one, *pair.masks]
            return [each.double().sum(1) for each in rows]

        with torch.no_grad(), self.compute_loss_context_manager():
            columns, outputs = self._run(model, inputs, compute, not prediction_loss_only, True)
        sums = torch.stack(columns, 1)
        self.eval_sums.append(self.accelerator.gather_for_metrics(sums).sum(0))
        loss = torch.tensor(self._means(sums.sum(0))["loss"], device=self.args.device)
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits, inputs.get("labels"))

    def _means(self, sums: Tensor) -> dict[str, float]:
        """Of the sums of [the terms, kl, plain ce, the rows of `masks`], those that have rows."""
        parts = self.parts()
        *terms, kl, ce = sums[: len(parts) + 2].tolist()
        counts = sums[len(parts) + 2 :].tolist()
        of_parts = zip(terms, parts.values(), strict=True)
        found = [weight * term / counts[i] for term, (weight, i) in of_parts if weight != 0 and counts[i]]
        means = {"loss": float(sum(found)) if found else math.nan}
        if counts[1]:
            ce /= counts[1]
            means |= {"ce": ce, "perplexity": float(torch.tensor(ce, dtype=torch.float64).exp())}
        if counts[0] and (self.offline or self.teacher is not None):
            means["kl_top_k" if self.offline else "kl"] = kl / counts[0]
        return means

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> Any:
        self._bind()
        self.eval_sums.clear()
        options["metric_key_prefix"] = metric_key_prefix
        output: Any = super().evaluation_loop(dataloader, description, *args, **options)
        if self.eval_sums:
            means = self._means(torch.stack(self.eval_sums).sum(0))
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output
