"""transformers' Trainer with a distillation loss that never holds the logits of a vocabulary.

The backbones of student and teacher run, their maps onto the vocabulary do not: :func:`fusedkd.linear_kd_loss` takes
the hidden states and the two heads. Classifiers, whose classes are few, run whole, and :func:`fusedkd.kd_loss` takes
the logits. Each term is a sum over its rows divided by their number in the whole optimiser step, all micro-batches and
all ranks, so that one step has one gradient however it is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedkd.divergences import parts_of
from fusedkd.integrations import kinds, refusals
from fusedkd.integrations.cache_store import PACKED
from fusedkd.integrations.classes import End, current_end
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.heads import base_model, replaced_forward
from fusedkd.integrations.kinds import IGNORE
from fusedkd.integrations.offline import COLUMNS, Batch, OfflineTeacherCollator
from fusedkd.integrations.pair import Form, Pair, Routed, compared, joined
from fusedkd.integrations.routed import NONE, TeacherColumnCollator
from fusedkd.integrations.several import Teachers, loaded
from fusedkd.integrations.states import States
from fusedkd.integrations.takes import Takes, refuse_parts
from fusedkd.integrations.teacher import listed
from fusedkd.integrations.term import Term
from fusedkd.integrations.term_trainer import TermTrainer
from fusedkd.integrations.tokenizers import check_teachers
from fusedkd.losses.options import KDTerms
from fusedkd.teachers import TeacherTopK


class DistillationTrainer(TermTrainer):
    """A Trainer whose loss is the distillation of a teacher, for language models of transformers: causal and masked
    ones, encoder–decoders and vision–language models; and for classifiers of sequences and of tokens.

    Scales, soft-caps and biases of either model's logits are honoured (:class:`fusedkd.integrations.heads.Head`). Logs
    `kd` and `ce` without their weights beside `loss`, means over optimiser steps. Evaluates `loss`, and at temperature
    1 the cross-entropy `ce`, its `perplexity` (not of classes), and `kl`, the divergence from the teacher; an offline
    teacher's is called `kl_top_k`, for it is that from the listed columns, with KDConfig's `tail` and at the
    temperature of their log-probabilities. Of several teachers also `kl_0`, `kl_1`, … or `kl_name`, the divergence from
    each. What has no row in the whole data set is absent (`loss`: NaN).

    Runs alone, under DistributedDataParallel and under FSDP, with PEFT adapters anywhere but on the output head of a
    language model. Every rank holds the whole teacher, or its share, of FSDP2
    (:func:`torch.distributed.fsdp.fully_shard`) or of DeepSpeed ZeRO-3 (``engine.module``).

    An encoder–decoder's rows are its decoder's positions: `labels` ``(B, L_t)`` are not shifted, and where the batch
    has no `decoder_input_ids` the student makes them of the labels. A classifier of sequences has one row for each of
    them and labels ``(B,)``, one of tokens labels ``(B, L)``, not shifted. Further inputs, such as `pixel_values`, are
    given to both models; with kd_on="attended" a row that predicts an image's placeholder is left out.

    Args:
        model: the student.
        teacher: a model of any size and dtype, of the same kind and with the student's tokenizer, or the name or folder
            of one; it is frozen, put into evaluation mode and moved to the device. Vocabularies may be padded to
            different sizes. ``"base"``, or ``student.get_base_model()``, is the student with adapters off, where it is
            a PEFT model: the weights are held once. Else the teacher shares no parameter with the student that is to be
            trained. None: the data sets have the columns ``teacher_ids`` (L, K) and ``teacher_logprobs`` (L, K), in
            whose row i is the teacher's distribution at position i: of a causal LM that of token i + 1, of an
            encoder–decoder that of label i. Id −1 is padding. Or they have the compact column that
            :mod:`fusedkd.integrations.cache_teacher` writes. Data without these columns is evaluated by cross-entropy
            alone. With a kd_weight of 0 a teacher is asked in evaluation only, and None is no teacher at all.

            A list of these: all teach every row, with KDConfig's `teacher_weights`. A dict of these: each example has
            one teacher, whose key stands in the data set's column `teacher` (KDConfig's `teacher_column`); None or −1
            there is no teacher, and the example has its cross-entropy alone. So has evaluation data without the column.
            A teacher runs on its own rows only.
        kd: the loss's options.
        terms: further terms of the loss, of :mod:`fusedkd.integrations.terms` or its presets: hidden states, attention
            maps, layers, other divergences. Each is logged, evaluated as `eval_…`, and a mean over its rows of the
            whole optimiser step. What compares more than logits takes a single teacher. Projections are trained with
            the student, under its optimiser and gradient norm, are saved in checkpoints, and are no part of the student
            that is saved.
        move_teacher: False leaves teachers on the devices on which they are. Their hidden states come to the student's
            device, to which their heads are copied once.
        teacher_tokenizer: the teacher's, or a list or dict of several teachers': refused if it gives other ids to the
            tokens of `processing_class` (:func:`fusedkd.integrations.tokenizers.check_same_vocabulary`), which no loss
            sees where the vocabularies are of one size.
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
    names = ("kd", "ce")
    """Of KDConfig's terms, in the logs."""

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teacher: Any = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        *more: Any,
        kd: KDConfig | None = None,
        terms: Sequence[Term] = (),
        move_teacher: bool = True,
        teacher_tokenizer: Any = None,
        **options: Any,
    ):
        self.kd = KDConfig() if kd is None else kd
        refusals.options(self.kd, teacher, move_teacher)
        refusals.terms_given(terms, self.kd, teacher)
        self._start_terms(terms)
        super().__init__(model, args, data_collator, *more, **options)
        if teacher_tokenizer is not None:
            check_teachers(self.processing_class, teacher_tokenizer)
        self.offline = teacher is None and self.needs_teacher
        refusals.training_arguments(self)
        self.known_head: End | None = None
        kind = self.head.kind  # refuses a student of none, with a teacher or without
        self.teacher: Any = loaded(teacher, kind, self.student)
        self.teachers: Teachers | None = None
        if self.offline:
            self.use_columns()
        elif self.routed:
            self.data_collator = TeacherColumnCollator(self.data_collator, self.kd.teacher_column, self.teacher)
        if self.teacher is not None:
            device = self.args.device if move_teacher else None
            with self.accelerator.autocast():
                self.teachers = Teachers(self.teacher, self.student, kind, device)
                refusals.teachers(self)
                self._bind_terms()
        self._start_sums()
        self.warned: set[str] = set()  # names of terms

    def use_columns(self) -> None:
        """Of the data sets, as the teacher."""
        refusals.no_columns(self.head.kind)
        refusals.offline_data(self.kd, self.train_dataset, self.data_collator)
        of = "labels" if self.head.kind.decoder else "input_ids"
        at = self.kd.logprobs_temperature
        self.data_collator = OfflineTeacherCollator(self.data_collator, of=of, logprobs_temperature=at)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss compares student and teacher."""
        return self.kd.needs_teacher or bool(self.given_terms)

    @property
    def routed(self) -> bool:
        """Whether a column of the data names the teacher of each row."""
        return isinstance(self.teacher, dict)

    @property
    def teacher_keys(self) -> list[Any]:
        """What tells several teachers apart: of a list the index, of a dict the name."""
        return list(self.teachers.models) if self.teachers and self.teachers.several else []

    @property
    def student(self) -> Any:
        return self.model

    @property
    def head(self) -> End:
        """Of the student as it is: `model_init` makes other models, `resize_token_embeddings` another head."""
        with self.accelerator.autocast():
            self.known_head = current_end(self.known_head, self.student)
        return self.known_head

    def _inner_training_loop(self, *args: Any, **options: Any) -> Any:
        self._bind()
        self._start_sums()
        with self.training_projections():
            return super()._inner_training_loop(*args, **options)

    def _bind(self) -> None:
        """To the models as they are now, before anything wraps them."""
        with self.accelerator.autocast():
            _ = self.head
            if self.teachers:
                self.teachers.bind()
                self._bind_terms()
        for each in self.teachers.distinct if self.teachers and self.model_init is not None else ():
            refusals.shared_parameters(self.student, each.model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: Any = self._signature_columns
        ours = (*COLUMNS, PACKED) if self.offline else (self.kd.teacher_column,) if self.routed else ()
        kept += [name for name in ours if name not in kept]

    def attended(self, batch: Batch) -> Tensor:
        """The tokens that are no padding, ``(B, L)``: of an encoder–decoder the decoder's."""
        return kinds.attended_rows(self.head.kind, batch)

    def rows(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """(labels, KD mask), ``(B, L)`` each: of what position i predicts, which in a causal LM is token i + 1. Of a
        classifier of sequences ``(B, 1)``.
        """
        refusals.batch(batch, self.student)
        kind, attended = self.head.kind, self.attended(batch)
        labels = kinds.labels_of(kind, batch, attended)
        on_labels = self.kd.kd_on == "labels" or any([part.needs_labels for part in parts_of(self.kd.divergence)])
        if labels is None and (on_labels or self.kd.ce_weight != 0):
            hint = "" if kind.classes else ": transformers' DataCollatorForLanguageModeling makes them"
            raise ValueError(
                f"the batch has no labels, which select rows unless kd_on='attended' and ce_weight=0{hint}"
            )
        if on_labels:
            mask = torch.as_tensor(labels != IGNORE)
        else:
            mask = kinds.predicting(kind, batch, attended, base_model(self.student).config)
        if self.offline:
            teacher = self._listed(batch)
            mask = torch.zeros_like(mask) if teacher is None else mask & (teacher.ids >= 0).any(-1)
        if self.routed:
            routes = batch.get(self.kd.teacher_column)
            mask = torch.zeros_like(mask) if routes is None else mask & (routes != NONE)[:, None]
        return labels, mask

    def _listed(self, batch: Batch) -> TeacherTopK | None:
        return listed(batch, self.kd, self.head.columns)

    def masks(self, batch: Batch) -> list[Tensor]:
        """The rows ``(B, …)`` over which terms are means: those of KD, of the cross-entropy, of further terms."""
        labels, mask = self.rows(batch)
        hard = torch.zeros_like(mask) if labels is None else labels != IGNORE
        return [mask, hard, *self.masks_of_terms(self.attended(batch))]

    def parts(self) -> dict[str, tuple[float, int]]:
        """Of each term of the loss, by its name in the logs: its weight, and the number of its rows among `masks`."""
        kd, ce = self.names
        return {kd: (self.kd.kd_weight, 0), ce: (self.kd.ce_weight, 1)} | self.parts_of_terms()

    def losses(self, pair: Pair, counts: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The loss, and the terms that `parts` names, detached and without their weights.

        Sums divided by `counts`, which are those of `masks` in the whole optimiser step; with None no loss, and terms
        per row.
        """
        if counts is None:
            loss, terms = self.linear(pair, reduction="none")
        elif self.kd.kd_weight or self.kd.ce_weight:
            loss, terms = self.linear(pair, kd_normalizer=counts[0], ce_normalizer=counts[1])
        else:
            loss = pair.hidden.new_zeros((), dtype=torch.float32)
            terms = KDTerms(loss, loss)
        found = dict(zip(self.names, terms, strict=True))
        for name, weighted in self.losses_of_terms(pair, counts, self.linear).items():
            loss = loss + weighted if counts is not None else loss
            found[name] = weighted.detach() / self.parts_of_terms()[name][0]
        return (None if counts is None else loss), found

    def linear(self, pair: Pair, **options: Any) -> tuple[Tensor, KDTerms]:
        """`linear_kd_loss` of the pair, of classifiers `kd_loss`, with the options of KDConfig where none are given."""
        if isinstance(pair.teacher, Routed):
            return joined(pair, pair.teacher.groups, self.linear, options)
        if pair.teacher is None:
            options["kd_weight"] = 0.0
        if not isinstance(pair.teacher, list):
            options["teacher_weights"] = None
        return compared(pair, self.head.softcap, self.head.scale, self.kd.options() | options)

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """Those of an optimiser step. A stream may end within one: the Trainer would take no step then, and leave the
        gradient to the next.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if 0 < len(batches) < num_batches:
            refusals.warn_of_stream()
            batches = []
        return super().get_batch_samples(iter(batches), len(batches), device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """The numbers of rows of `masks` in one optimiser step over all ranks."""
        of_batches = [torch.stack([mask.sum() for mask in self.masks(batch)]) for batch in batch_samples]
        nothing = torch.zeros(0, 2 + len(self.kinds), dtype=torch.int64)  # where a stream ends: of a step that is none
        counts = torch.stack(of_batches) if of_batches else nothing.to(device)
        self.blank = self.blank + (counts == 0).sum(0)
        total = counts.sum(0).to(device)
        if self.args.world_size == 1:
            return total
        mine = len(batch_samples)
        of_ranks = self.accelerator.gather(F.pad(total, (0, 1), value=mine)).view(-1, len(total) + 1)
        if self.teachers and self.teachers.sharded:
            self.teachers.begin_step(mine, int(of_ranks[:, -1].max()))
        return of_ranks[:, :-1].sum(0)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.offline and COLUMNS[0] not in inputs:
            raise ValueError(f"without a teacher model the data set must have the columns {' and '.join(COLUMNS)}")
        if self.routed and self.needs_teacher and self.kd.teacher_column not in inputs:
            raise ValueError(f"with a dict of teachers the data set must have the column {self.kd.teacher_column}")
        counts = num_items_in_batch
        if counts is None:
            counts = self._get_num_items_in_batch([inputs], self.args.device)
        if self.needs_teacher and self.teachers and self.teachers.sharded:
            with torch.no_grad(), self.accelerator.autocast():
                self.teachers.keep_up(self._given(inputs), self.attended(inputs))

        def compute(pair: Pair) -> tuple[Tensor | None, dict[str, Tensor]]:
            return self.losses(pair, counts)

        (loss, terms), outputs = self._run(model, inputs, compute, return_outputs, self.needs_teacher)
        if model.training and self.is_in_train:
            self._add(terms)
        # Data parallelism averages the gradients of the ranks, each of which has its part of the sum.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _run(
        self, model: nn.Module, inputs: Batch, compute: Callable[[Pair], Any], with_logits: bool, with_teacher: bool
    ) -> tuple[Any, Any]:
        """What `compute` makes of the batch, and the student's outputs."""
        (labels, _), masks, attended = self.rows(inputs), self.masks(inputs), self.attended(inputs)
        given = self._given(inputs)
        teacher, teacher_states = self._teacher(inputs, given) if with_teacher else (None, None)
        inner = self.accelerator.unwrap_model(model)
        given |= Takes(inner).cache
        forward = inner.forward

        def computation(**inputs: Any) -> tuple[Any, Any]:
            with self.recording() as states:
                hidden, outputs = self.head.hidden_states(forward, inputs, with_logits)
            weight, bias = self.head.parameters()
            pair = Pair(hidden, weight, bias, teacher, labels, masks, attended, states(outputs), teacher_states)
            with self.accelerator.autocast():
                return compute(pair), outputs

        # Called through the wrapper, whose hooks gather sharded weights and prepare the reduction of gradients.
        with replaced_forward(inner, computation):
            found: tuple[Any, Any] = model(**given)
        if self.teachers and with_teacher:
            self.teachers.release()
        return found

    def _given(self, batch: Batch) -> Batch:
        """What of a batch the models are given."""
        ours = ("labels", "shift_labels", *COLUMNS, *((self.kd.teacher_column,) if self.routed else ()))
        given = {name: value for name, value in batch.items() if name not in ours}
        if "attention_mask" in given and self.head.kind.causal and kinds.packed(batch):
            del given["attention_mask"]  # with it, transformers does not go by the positions
        given |= self.wanted(given)
        if self.head.kind.tokens not in given:
            given[self.head.kind.tokens] = kinds.decoder_inputs(base_model(self.student), batch["labels"])
        if self.teachers:
            refuse_parts(given, self.teachers)
        return given

    @torch.no_grad()
    def _teacher(self, inputs: Batch, given: Batch) -> tuple[Form | TeacherTopK | None, States | None]:
        """Of the batch, of which the student is `given` a part."""
        if self.offline:
            return self._listed(inputs), None
        if self.teachers is None:
            return None, None
        with self.accelerator.autocast():
            return self.teachers(given, self.attended(inputs), inputs.get(self.kd.teacher_column))
