"""transformers' Trainer with a distillation loss that never holds the logits, for causal and masked language models.

The backbones of student and teacher run, their maps onto the vocabulary do not: :func:`fusedkd.linear_kd_loss` takes
the hidden states and the two heads. Each term is a sum over its own rows divided by the number of such rows in the
whole optimiser step, all micro-batches and all ranks, so that one step has one gradient however it is cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from fusedkd.divergences import Divergence, resolve
from fusedkd.functional import linear_kd_loss
from fusedkd.integrations.heads import Head, replaced_forward
from fusedkd.integrations.offline import COLUMNS, Batch, OfflineTeacherCollator
from fusedkd.prepared import KDTerms
from fusedkd.teachers import TeacherHead, TeacherTopK

IGNORE = -100


@dataclass
class KDConfig:
    """What :class:`DistillationTrainer` minimises: kd_weight · T^k · D + ce_weight · CE.

    The options of :func:`fusedkd.linear_kd_loss`, by their names there, and:

    kd_on                       the rows of the KD term: "labels", those whose label is not −100 (so not the prompt's),
                                or "attended", all that the attention mask selects
    tail, logprobs_temperature  of an offline teacher, as for :class:`fusedkd.TeacherTopK`
    """

    temperature: float = 2.0
    teacher_temperature: float | None = None
    divergence: str | Divergence = "forward_kl"
    kd_weight: float = 0.5
    ce_weight: float = 0.5
    scale_by_t2: bool = True
    label_smoothing: float = 0.0
    kd_on: Literal["labels", "attended"] = "labels"
    vocab_mismatch: Literal["error", "truncate"] = "error"
    max_tile_bytes: int = 4 << 30
    max_rows: int | None = None
    tail: Literal["renormalize", "bucket", "ignore"] = "renormalize"
    logprobs_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kd_on not in ("labels", "attended"):
            raise ValueError(f"kd_on must be 'labels' or 'attended', not {self.kd_on!r}")

    def options(self) -> dict[str, Any]:
        """Those of :func:`fusedkd.linear_kd_loss`."""
        own = ("kd_on", "tail", "logprobs_temperature")
        return {f.name: getattr(self, f.name) for f in fields(KDConfig) if f.name not in own}

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares student and teacher."""
        return self.kd_weight != 0


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
    `kd` and `ce` without their weights beside `loss`, means over optimiser steps; evaluates `loss`, and at temperature
    1 the cross-entropy `ce`, its `perplexity`, and `kl`, the divergence from the teacher (of an offline teacher: at the
    temperature of its log-probabilities).

    Runs alone, under DistributedDataParallel and under FSDP, with PEFT adapters anywhere but on the output head. Every
    rank holds the whole teacher.

    Args:
        model: the student.
        teacher: a model of any size and dtype, of the same kind and with the student's tokenizer; it is frozen, put
            into evaluation mode and moved to the device. Vocabularies may be padded to different sizes. None: the data
            sets have the columns ``teacher_ids`` (L, K) and ``teacher_logprobs`` (L, K), in whose row i is the
            teacher's distribution at position i: of a causal LM that of token i + 1. Id −1 is padding. With a
            kd_weight of 0 a teacher is asked in evaluation only, and None is no teacher at all.
        kd: the loss's options.
        args, data_collator, …: as for :class:`transformers.Trainer`. For an offline teacher the collator is wrapped in
            :class:`OfflineTeacherCollator`.

    `compute_loss(…, return_outputs=True)` computes the logits as well, and so do `predict` and a `compute_metrics`.

    Raises:
        ValueError: naming the model's class, where something lies between head and logits that is not understood, or
            where the Trainer is asked for what would change the loss in silence.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole optimiser step

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        teacher: PreTrainedModel | nn.Module | None = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        *more: Any,
        kd: KDConfig | None = None,
        **options: Any,
    ):
        super().__init__(model, args, data_collator, *more, **options)
        self.kd = KDConfig() if kd is None else kd
        self.offline = teacher is None and self.kd.needs_teacher
        self._refuse()
        with self.accelerator.autocast():
            self.head = Head.of(self.student)
        self.teacher: Any = None
        if self.offline:
            self.data_collator = OfflineTeacherCollator(self.data_collator)
        if teacher is not None:
            if getattr(teacher, "hf_device_map", None) is None:
                teacher = teacher.to(self.args.device)
            self.teacher = teacher
            with self.accelerator.autocast():
                self.teacher_head = Head.of(self.teacher)
            self.teacher.eval().requires_grad_(False)
            if self.teacher_head.causal != self.head.causal:
                kinds = [f"{h.model} is {'causal' if h.causal else 'masked'}" for h in (self.head, self.teacher_head)]
                raise ValueError(f"student and teacher must be of one kind, but {kinds[0]} and {kinds[1]}")
            self.teacher_arguments = inspect.signature(self.teacher.forward).parameters
        self.terms: Any = 0
        """The sums of the terms over this rank's micro-batches since the last log."""
        self.steps, self.last_step = 0, -1  # optimiser steps in that sum
        self.eval_sums: list[Tensor] = []

    @property
    def student(self) -> Any:
        return self.model

    def _refuse(self) -> None:
        """What would change the loss in silence."""
        parallel = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        for wrong, message in (
            (self.args.n_gpu > 1, "DataParallel is not supported: start one process per GPU with torchrun"),
            (parallel > 1, "tensor, context and sequence parallelism are not supported"),
            (self.is_deepspeed_enabled, "DeepSpeed is not supported: use FSDP"),
            (self.args.torch_compile, "torch_compile is not supported: compile the backbone, model.model.compile()"),
            (self.args.label_smoothing_factor, "label_smoothing_factor has no effect: use KDConfig(label_smoothing=…)"),
            (self.compute_loss_func, "compute_loss_func has no effect: the loss is that of KDConfig"),
            (
                getattr(self.student.config, "output_router_logits", False),
                f"the router loss of {type(self.student).__name__} would be left out: set output_router_logits=False",
            ),
        ):
            if wrong:
                raise ValueError(message)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: Any = self._signature_columns
        kept += [name for name in COLUMNS if name not in kept]

    @staticmethod
    def attended(batch: Batch) -> Tensor:
        """The tokens that are no padding, ``(B, L)``."""
        ids, given = batch["input_ids"], batch.get("attention_mask")
        return (torch.ones_like(ids) if given is None or given.shape != ids.shape else given) != 0

    def rows(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """(labels, KD mask), ``(B, L)`` each: of what position i predicts, which in a causal LM is token i + 1."""
        labels, attended = batch.get("labels"), self.attended(batch)
        on_labels = self.kd.kd_on == "labels" or resolve(self.kd.divergence).needs_labels
        if labels is None and (on_labels or self.kd.ce_weight != 0):
            raise ValueError("the batch has no labels: they select rows unless kd_on='attended' and ce_weight=0")
        if self.head.causal and labels is not None:
            labels = batch["shift_labels"] if "shift_labels" in batch else F.pad(labels[:, 1:], (0, 1), value=IGNORE)
            labels = labels.masked_fill(~attended, IGNORE)  # padding on the left would predict the first token
        if on_labels:
            mask = torch.as_tensor(labels != IGNORE)
        else:
            mask = attended & F.pad(attended[:, 1:], (0, 1)) if self.head.causal else attended
        if self.offline:
            if any(name not in batch for name in COLUMNS):
                raise ValueError(f"without a teacher model the data set must have the columns {' and '.join(COLUMNS)}")
            mask = mask & (self._listed(batch) >= 0).any(-1)
        return labels, mask

    def _listed(self, batch: Batch) -> Tensor:
        """The ids that are the student's too: a teacher's vocabulary may be padded further."""
        ids: Tensor = batch["teacher_ids"]
        return ids.masked_fill(ids >= self.head.linear.out_features, -1)

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
        counts = [torch.stack([mask.sum() for mask in self.masks(batch)]) for batch in batch_samples]
        total = torch.stack(counts).sum(0).to(device)
        return self.accelerator.gather(total).view(-1, len(total)).sum(0) if self.args.world_size > 1 else total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        counts = num_items_in_batch
        if counts is None:
            counts = self._get_num_items_in_batch([inputs], self.args.device)

        def compute(pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
            return self.losses(pair, counts)

        (loss, terms), outputs = self._run(model, inputs, compute, return_outputs, self.kd.needs_teacher)
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
        teacher, teacher_outputs = self._teacher(inputs) if with_teacher else (None, None)
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", *COLUMNS)} | self.wanted()
        inner = self.accelerator.unwrap_model(model)
        forward = inner.forward

        def computation(**inputs: Any) -> tuple[Any, Any]:
            hidden, outputs = self.head.hidden_states(forward, inputs, with_logits)
            weight, bias = self.head.parameters()
            with self.accelerator.autocast():
                return compute(Pair(hidden, weight, bias, outputs, teacher, teacher_outputs, labels, masks)), outputs

        # Called through the wrapper, whose hooks gather sharded weights and prepare the reduction of gradients.
        with replaced_forward(inner, computation):
            return model(**inputs)  # type: ignore[no-any-return]

    def wanted(self) -> dict[str, Any]:
        """Further arguments of both models."""
        return {}

    @torch.no_grad()
    def _teacher(self, inputs: Batch) -> tuple[TeacherHead | TeacherTopK | None, Any]:
        kd = self.kd
        if self.offline:
            ids, logprobs = self._listed(inputs), inputs["teacher_logprobs"]
            return TeacherTopK(ids, logprobs, tail=kd.tail, logprobs_temperature=kd.logprobs_temperature), None
        if self.teacher is None:
            return None, None
        own = {k: v for k, v in inputs.items() if k in self.teacher_arguments and k != "labels"} | self.wanted()
        if "use_cache" in self.teacher_arguments:
            own["use_cache"] = False
        head = self.teacher_head
        with self.accelerator.autocast():
            hidden, outputs = head.hidden_states(self.teacher, own)
        return TeacherHead(hidden, *head.parameters(), softcap=head.softcap, scale=head.scale), outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the terms beside the loss: means over the optimiser steps since the last time."""
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
        """Of the sums of [the terms, kl, plain ce, the rows of `masks`]."""
        parts = self.parts()
        *terms, kl, ce = sums[: len(parts) + 2].tolist()
        counts = sums[len(parts) + 2 :].clamp(min=1).tolist()
        loss = sum(weight * term / counts[i] for term, (weight, i) in zip(terms, parts.values(), strict=True))
        ce /= counts[1]
        found = {"loss": float(loss), "ce": ce, "perplexity": float(torch.tensor(ce, dtype=torch.float64).exp())}
        return found | ({"kl": kl / counts[0]} if self.offline or self.teacher is not None else {})

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> Any:
        self.eval_sums.clear()
        options["metric_key_prefix"] = metric_key_prefix
        output: Any = super().evaluation_loop(dataloader, description, *args, **options)
        if self.eval_sums:
            means = self._means(torch.stack(self.eval_sums).sum(0))
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output
