"""transformers' Trainer with a distillation loss that never holds the logits, for causal and masked language models.

The backbones of student and teacher run, their maps onto the vocabulary do not: :func:`fusedkd.linear_kd_loss` takes
the hidden states and the two heads. Each term is a sum over its own rows divided by the number of such rows in the
whole optimiser step, all micro-batches and all ranks, so that one step has one gradient however it is cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from fusedkd.divergences import Divergence
from fusedkd.functional import linear_kd_loss
from fusedkd.integrations.heads import Head, replaced_forward
from fusedkd.teachers import TeacherHead, TeacherTopK

COLUMNS = ("teacher_ids", "teacher_logprobs")
IGNORE = -100

Batch = dict[str, Any]


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
        return {k: v for k, v in vars(self).items() if k not in ("kd_on", "tail", "logprobs_temperature")}


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the distillation of a teacher, for causal and masked LMs of transformers.

    Scales, soft-caps and biases of either model's logits are honoured (:class:`fusedkd.integrations.heads.Head`). Logs
    `kd` and `ce` without their weights beside `loss`, means over optimiser steps; evaluates `loss`, the KL divergence
    from the teacher and the perplexity, both at temperature 1 (`kl` of an offline teacher: at its log-probabilities').

    Runs alone, under DistributedDataParallel and under FSDP, with PEFT adapters anywhere but on the output head. Every
    rank holds the whole teacher.

    Args:
        model: the student.
        teacher: a model of any size and dtype, of the same kind and with the student's tokenizer; it is frozen, put
            into evaluation mode and moved to the device. Vocabularies may be padded to different sizes. None: the data
            sets have the columns ``teacher_ids`` (L, K) and ``teacher_logprobs`` (L, K), in whose row i is the
            teacher's distribution at position i: of a causal LM that of token i + 1. Id −1 is padding.
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
        self._refuse()
        with self.accelerator.autocast():
            self.head = Head.of(self.student)
        self.teacher: Any = None
        if teacher is None:
            self.data_collator = OfflineTeacherCollator(self.data_collator)
        else:
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
        """The sum of [kd, ce] over this rank's micro-batches since the last log."""
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

    def rows(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """(labels, KD mask), ``(B, L)`` each: of what position i predicts, which in a causal LM is token i + 1."""
        ids, labels, given = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
        if labels is None and (self.kd.kd_on == "labels" or self.kd.ce_weight != 0):
            raise ValueError("the batch has no labels: they select rows unless kd_on='attended' and ce_weight=0")
        attended = torch.ones_like(ids) if given is None or given.shape != ids.shape else given
        attended = attended != 0
        if self.head.causal and labels is not None:
            labels = batch["shift_labels"] if "shift_labels" in batch else F.pad(labels[:, 1:], (0, 1), value=IGNORE)
            labels = labels.masked_fill(~attended, IGNORE)  # padding on the left would predict the first token
        if self.kd.kd_on == "labels":
            mask = torch.as_tensor(labels != IGNORE)
        else:
            mask = attended & F.pad(attended[:, 1:], (0, 1)) if self.head.causal else attended
        if self.teacher is None:
            if any(name not in batch for name in COLUMNS):
                raise ValueError(f"without a teacher model the data set must have the columns {' and '.join(COLUMNS)}")
            mask = mask & (self._listed(batch) >= 0).any(-1)
        return labels, mask

    def _listed(self, batch: Batch) -> Tensor:
        """The ids that are the student's too: a teacher's vocabulary may be padded further."""
        ids: Tensor = batch["teacher_ids"]
        return ids.masked_fill(ids >= self.head.linear.out_features, -1)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """[KD rows, CE rows] of one optimiser step over all ranks."""
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batch_samples:
            labels, mask = self.rows(batch)
            selected = mask, torch.zeros_like(mask) if labels is None else labels != IGNORE
            counts += torch.stack([rows.sum() for rows in selected]).to(device)
        return self.accelerator.gather(counts).view(-1, 2).sum(0) if self.args.world_size > 1 else counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        kd_rows, ce_rows = num_items_in_batch
        normalizers = {"kd_normalizer": kd_rows, "ce_normalizer": ce_rows}
        [(loss, terms)], outputs = self._losses(model, inputs, [normalizers], return_outputs)
        if model.training and self.is_in_train:
            self.terms = self.terms + torch.stack(terms).double()
            self.steps += self.state.global_step != self.last_step
            self.last_step = self.state.global_step
        # Data parallelism averages the gradients of the ranks, each of which has its part of the sum.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _losses(
        self, model: nn.Module, inputs: Batch, variants: list[dict[str, Any]], with_logits: bool = False
    ) -> tuple[list[Any], Any]:
        """`linear_kd_loss` with each of the option sets, over one forward pass; and the student's outputs."""
        labels, kd_mask = self.rows(inputs)
        teacher = self._teacher(inputs)
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", *COLUMNS)}
        inner = self.accelerator.unwrap_model(model)
        forward = inner.forward

        def computation(**inputs: Any) -> tuple[list[Any], Any]:
            hidden, outputs = self.head.hidden_states(forward, inputs, with_logits)
            weight, bias = self.head.parameters()
            own = {"logit_softcap": self.head.softcap, "logit_scale": self.head.scale, "kd_mask": kd_mask}
            with self.accelerator.autocast():
                losses = [
                    linear_kd_loss(
                        hidden,
                        weight,
                        teacher,
                        labels,
                        student_bias=bias,
                        return_terms=True,
                        **{**self.kd.options(), **own, **variant},
                    )
                    for variant in variants
                ]
            return losses, outputs

        # Called through the wrapper, whose hooks gather sharded weights and prepare the reduction of gradients.
        with replaced_forward(inner, computation):
            return model(**inputs)

    @torch.no_grad()
    def _teacher(self, inputs: Batch) -> TeacherHead | TeacherTopK:
        kd = self.kd
        if self.teacher is None:
            ids, logprobs = self._listed(inputs), inputs["teacher_logprobs"]
            return TeacherTopK(ids, logprobs, tail=kd.tail, logprobs_temperature=kd.logprobs_temperature)
        own = {k: v for k, v in inputs.items() if k in self.teacher_arguments and k != "labels"}
        if "use_cache" in self.teacher_arguments:
            own["use_cache"] = False
        head = self.teacher_head
        with self.accelerator.autocast():
            hidden, _ = head.hidden_states(self.teacher, own)
        return TeacherHead(hidden, *head.parameters(), softcap=head.softcap, scale=head.scale)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the two terms beside the loss: means over the optimiser steps since the last time."""
        if "loss" in logs and self.steps:
            kd, ce = self.accelerator.reduce(self.terms / self.steps, "sum").tolist()
            logs |= {"kd": kd, "ce": ce}
            self.terms, self.steps = 0, 0
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Adds the batch to the sums of the evaluation, one row per sequence so that none is counted twice."""
        inputs = self._prepare_inputs(inputs)
        labels, mask = self.rows(inputs)
        plain: dict[str, Any] = {
            "temperature": 1.0 if self.teacher is not None else self.kd.logprobs_temperature,
            "teacher_temperature": None,
            "divergence": "forward_kl",
            "scale_by_t2": False,
            "kd_weight": 1.0,
            "ce_weight": float(labels is not None),
            "label_smoothing": 0.0,
        }
        with torch.no_grad(), self.compute_loss_context_manager():
            options = [{"reduction": "none"}, {"reduction": "none", **plain}]
            losses, outputs = self._losses(model, inputs, options, with_logits=not prediction_loss_only)
        labelled = torch.zeros_like(mask) if labels is None else labels != IGNORE
        columns = [*(term for _, terms in losses for term in terms), mask, labelled]
        sums = torch.stack([column.double().sum(1) for column in columns], 1)
        self.eval_sums.append(self.accelerator.gather_for_metrics(sums).sum(0))
        loss = torch.tensor(self._means(sums.sum(0))["loss"], device=self.args.device)
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits, inputs.get("labels"))

    def _means(self, sums: Tensor) -> dict[str, float]:
        """Of the sums of [kd, ce, kl, plain ce, KD rows, CE rows]."""
        kd, ce, kl, plain_ce, kd_rows, ce_rows = sums.tolist()
        kd_rows, ce_rows = max(kd_rows, 1.0), max(ce_rows, 1.0)
        loss = self.kd.kd_weight * kd / kd_rows + self.kd.ce_weight * ce / ce_rows
        perplexity = float(torch.tensor(plain_ce / ce_rows, dtype=torch.float64).exp())
        return {"loss": float(loss), "kl": kl / kd_rows, "perplexity": perplexity}

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


class OfflineTeacherCollator:
    """Pads the columns of an offline teacher to the batch that another collator makes of the other columns.

    Each example may have ``teacher_ids`` (L, K) and ``teacher_logprobs`` (L, K), L that of its ``input_ids``. They
    become ``(B, L, K)``, padded on the tokenizer's side with ids of −1. Batches without these columns pass.
    """

    def __init__(self, base_collator: Callable[[list[Any]], Batch]):
        self.base_collator = base_collator

    def __call__(self, examples: list[Any]) -> Batch:
        if isinstance(self.base_collator, OfflineTeacherCollator) or any(c not in examples[0] for c in COLUMNS):
            return self.base_collator(examples)
        rest = [{k: v for k, v in example.items() if k not in COLUMNS} for example in examples]
        lengths = [len(example["input_ids"]) for example in rest]
        batch = self.base_collator(rest)
        length = batch["input_ids"].shape[1]
        left = getattr(getattr(self.base_collator, "tokenizer", None), "padding_side", "right") == "left"
        for name, padding in zip(COLUMNS, (-1, 0.0), strict=True):
            rows = [torch.as_tensor(example[name]) for example in examples]
            for row, tokens in zip(rows, lengths, strict=True):
                if row.dim() != 2 or row.shape[0] != tokens:
                    raise ValueError(f"{name} must have a row for each of the {tokens} tokens, not {tuple(row.shape)}")
            shape = (len(rows), length, max(row.shape[1] for row in rows))
            batch[name] = padded = torch.full(shape, padding, dtype=rows[0].dtype)
            for i, row in enumerate(rows):
                start = length - len(row) if left else 0
                padded[i, start : start + len(row), : row.shape[1]] = row
        return batch
