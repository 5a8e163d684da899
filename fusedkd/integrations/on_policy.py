"""Distillation on the text that the student writes: generated before each optimiser step, then distilled as any other.

GKD (arXiv:2306.13649, algorithm 1), MiniLLM's setting (arXiv:2306.08543) with exact divergences over the vocabulary in
the place of its reward, and on-policy distillation from the sampled token's log-probability.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fusedkd import checks as check
from fusedkd.divergences import parts_of
from fusedkd.integrations import refusals, rollouts, scored
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.kinds import IGNORE
from fusedkd.integrations.offline import COLUMNS, Batch
from fusedkd.integrations.pair import Form, Pair
from fusedkd.integrations.prompts import COMPLETION, PROMPT, PromptCollator
from fusedkd.integrations.states import States
from fusedkd.integrations.takes import media
from fusedkd.integrations.teacher import evaluating, known_tokens
from fusedkd.integrations.transformers import DistillationTrainer
from fusedkd.losses.options import KDTerms
from fusedkd.losses.sampled import ESTIMATORS, Estimator, linear_logprob, linear_sampled_kl_loss
from fusedkd.teachers import TeacherHead, TeacherTopK

OWN = "own_text"
"""Of a batch: the student wrote its completions."""


class OnPolicyTrainer(DistillationTrainer):
    """A :class:`DistillationTrainer` whose batches, or a share of them, are text that the student writes.

    Before each optimiser step the student completes the prompts of its batches, with its cache and in evaluation mode;
    then the step is that of DistillationTrainer on prompt and completion: any divergence over the whole vocabulary by
    hidden states, from one teacher or several, local or sharded, the tokens of the completion (its end of sequence
    among them) being the rows. Tokens are counted after they are written, so that a step has one gradient however it is
    cut into micro-batches and ranks. What is written depends on the weights, `args.seed`, the step, the micro-batch and
    the rank alone: a resumed training continues as one that was not interrupted.

    Logs, beside `kd` and `ce`: `completion_length` (tokens), `student_logprob` and `teacher_logprob` (means over the
    tokens that the student wrote; of a single teacher that is a model or gives the token's log-probability), and
    `on_policy`, the share of batches that it wrote. Evaluates on the completions of the data.

    Args:
        model: the student, a causal LM.
        teacher: as for DistillationTrainer, but that it must be able to score new text; or

            ``"base"``: the student, a PEFT model, with its adapters off;

            a function of (input_ids, attention_mask), ``(B, L)`` each and padded on the right, for a teacher that is
            served elsewhere. Row i of what it returns is about token i + 1: a :class:`fusedkd.TeacherTopK`
            ``(B, L, K)`` or a dict of the columns `teacher_ids` and `teacher_logprobs`; with `student_top_k` it is
            given ids ``(B, L, K)`` as a third argument, −1 at rows that are not asked for, and returns their
            log-probabilities; with `estimator` it returns those of the tokens, ``(B, L)``.
        data_collator: None: :class:`PromptCollator` where the data has a column `prompt` (and `completion`, if there is
            one), with `processing_class` as its tokenizer. Any other makes `input_ids` and `labels` as for
            DistillationTrainer: the prompt is what stands before the first label.
        kd: None: the reverse divergence at temperature 1, over listed columns with one more for the tail, and no
            cross-entropy. Its cross-entropy is that of given completions; the student's own text has none.
        lmbda: λ of GKD, the share of batches that the student writes; the others keep the completions of the data. One
            draw for each micro-batch, the same on all ranks.
        max_new_tokens, sampling_temperature: of what the student writes, from its whole distribution.
        generation: replaces both, and says how else it is written. What it leaves open is transformers' default, not
            what the model's own configuration has (a repetition penalty, for example); top_k is then 50.
        student_top_k: the K most probable tokens of the student, in each row, are what a served teacher is asked for.
        estimator: "policy", "k1", "k2" or "k3", of a teacher that gives the token's log-probability alone: see
            :func:`fusedkd.sampled_kl`. Only the student's own text is distilled then. A student with dropout is
            refused: what it writes without is no sample of its distribution with it.
        args, …: as for DistillationTrainer.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """

    own: bool
    """Whether the student wrote the batch of which the loss is computed."""
    written: Tensor
    """Of this rank since the last log: batches that the student wrote, and batches."""
    said: Any
    """Sequences that it wrote, their tokens, the sums of both sides' log-probabilities, and the tokens of which the
    teacher's are known.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teacher: Any = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        *more: Any,
        kd: KDConfig | None = None,
        lmbda: float = 1.0,
        max_new_tokens: int = 128,
        sampling_temperature: float = 1.0,
        generation: GenerationConfig | None = None,
        student_top_k: int | None = None,
        estimator: Estimator | None = None,
        **options: Any,
    ):
        if kd is None:
            kd = KDConfig(temperature=1.0, divergence="reverse_kl", kd_weight=1.0, ce_weight=0.0, tail="bucket")
        self.served = teacher if callable(teacher) and not isinstance(teacher, nn.Module) else None
        self.lmbda, self.student_top_k, self.estimator = lmbda, student_top_k, estimator
        if generation is None:
            check.integer("max_new_tokens", max_new_tokens)
            if max_new_tokens < 1:
                raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
            check.real("sampling_temperature", sampling_temperature, open_low=True)
            generation = rollouts.plain(max_new_tokens, sampling_temperature)
        _check(self, teacher, kd, generation, options)
        data = options.get("train_dataset", more[0] if more else None)
        if data_collator is None and PROMPT in (refusals.known_columns(data) or ()):
            data_collator = PromptCollator(options.get("processing_class"))
        super().__init__(model, None if self.served else teacher, args, data_collator, *more, kd=kd, **options)
        if not self.head.kind.causal:
            raise ValueError(f"OnPolicyTrainer's student must be a causal LM, but is {self.head.kind.noun}")
        if estimator is not None:
            rollouts.without_dropout(self.student)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("OnPolicyTrainer does not go with FSDP1: use FSDP2, fsdp_config={'version': 2}")
        end: Any = self.head
        mine, others = end.linear.out_features, self.teachers.distinct if self.teachers else ()
        known = min([known_tokens(each.model) for each in others], default=mine)
        self.generation = rollouts.completed(generation, self.student, self.processing_class, range(known, mine))
        self.warned |= {"ce"} if lmbda > 0 else set()  # of batches without a row of the term: they are meant to be so
        self.warned |= {"kd"} if estimator is not None else set()

    def use_columns(self) -> None:
        """Which the served teacher makes."""
        self.offline = self.estimator is None
        if self.offline:
            refusals.listed_options(self.kd)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: Any = self._signature_columns
        kept += [name for name in (PROMPT, COMPLETION) if name not in kept]

    # ---- the student's text

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The batches of an optimiser step, written and scored before their tokens are counted."""
        return super().get_batch_samples(map(self._written, epoch_iterator, itertools.count()), num_batches, device)

    def _written(self, batch: Batch, index: int) -> Batch:
        """The micro-batch of this index in the step, with the student's completions or its own."""
        draw = random.Random(f"{self.args.seed} {self.state.global_step} {index}")
        own = draw.random() < self.lmbda
        if batch.get("labels") is None:
            raise ValueError("the batch has no labels, which say where a prompt ends: −100 at the prompt's tokens")
        if own:
            batch = self.write(batch, draw.getrandbits(48) + self.args.process_index)
        elif not (batch["labels"] != IGNORE).any():
            raise ValueError(f"the data has no completions, but lmbda={self.lmbda} keeps some: pass lmbda=1")
        self.written = self.written + torch.tensor([own, 1.0], dtype=torch.float64)
        return self.score(batch, self.model_wrapped)

    def write(self, batch: Batch, seed: int) -> Batch:
        """The batch with completions by the student in the place of its own."""
        if names := media(batch):
            raise ValueError(f"the student writes to prompts of text alone, but the batch has {names[0]}: pass lmbda=0")
        batch = self._prepare_inputs(batch)
        ids, mask = rollouts.prompts(batch, self.attended(batch))
        devices = [ids.device] if ids.is_cuda else []
        with torch.random.fork_rng(devices), self.accelerator.autocast():
            torch.manual_seed(seed)
            model = self.accelerator.unwrap_model(self.model_wrapped)
            found = rollouts.write(model, ids, mask, self.generation)
        rows = batch["labels"].shape[:1]
        per_row = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.shape == rows}
        return per_row | found | {OWN: True}

    def score(self, batch: Batch, model: Any) -> Batch:
        """The batch with the columns of a served teacher."""
        if self.served is None or not self.needs_teacher or any(name in batch for name in COLUMNS):
            return batch
        batch = self._prepare_inputs(batch)
        if self.estimator is not None:
            return scored.logprob(self.served, batch, self.attended(batch)) if batch.get(OWN) else batch
        if self.student_top_k is None:
            return scored.columns(self.served, batch, self.attended(batch), self.kd)
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        rows, k = (labels != IGNORE) & self.attended(batch), self.student_top_k
        with torch.no_grad(), evaluating(self.accelerator.unwrap_model(model)):
            candidates, _ = self._run(
                model, batch, lambda pair: scored.best(pair.hidden, *pair.head, rows, k), False, False
            )
        return scored.of_candidates(self.served, batch, self.attended(batch), candidates)

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **options: Any) -> Any:
        return super().prediction_step(model, self.score(inputs, model), *args, **options)

    # ---- the loss

    def rows(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        labels, mask = super().rows(batch)
        if self.estimator is not None and scored.LOGPROB not in batch:
            mask = torch.zeros_like(mask)
        return labels, mask

    def masks(self, batch: Batch) -> list[Tensor]:
        """Of the student's own text no token has a cross-entropy."""
        kd, ce, *terms = super().masks(batch)
        return [kd, torch.zeros_like(ce) if batch.get(OWN) else ce, *terms]

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **options: Any) -> Any:
        self.own = bool(inputs.get(OWN))
        return super().compute_loss(model, inputs, *args, **options)

    def losses(self, pair: Pair, counts: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        if counts is not None and self.own:
            self._note(pair)
        return super().losses(pair, counts)

    def linear(self, pair: Pair, **options: Any) -> tuple[Tensor, KDTerms]:
        """With the cross-entropy of given text alone, and of a sampled teacher the estimate in the place of the KD."""
        sampled = pair.teacher if isinstance(pair.teacher, Tensor) else None
        hard = pair
        if pair.labels is not None and options.get("ce_weight", self.kd.ce_weight):
            hard = pair._replace(labels=pair.labels.masked_fill(~pair.masks[1], IGNORE))
        if sampled is None:
            return super().linear(hard, **options)
        loss = linear_sampled_kl_loss(
            pair.hidden,
            pair.weight,
            sampled,
            pair.labels,  # type: ignore[arg-type]
            student_bias=pair.bias,
            estimator=self.estimator,  # type: ignore[arg-type]
            mask=pair.masks[0],
            normalizer=options["kd_normalizer"],
            logit_softcap=self.head.softcap,
            logit_scale=self.head.scale,
            max_tile_bytes=self.kd.max_tile_bytes,
            max_rows=self.kd.max_rows,
        )
        ce = loss.new_zeros(())
        total = self.kd.kd_weight * loss
        if self.kd.ce_weight:
            hard_loss, (_, ce) = super().linear(hard._replace(teacher=None), **options)
            total = total + hard_loss
        return total, KDTerms(loss.detach(), ce)

    def _given(self, batch: Batch) -> Batch:
        return {name: x for name, x in super()._given(batch).items() if name not in (OWN, scored.LOGPROB)}

    def _teacher(self, inputs: Batch, given: Batch) -> tuple[Form | TeacherTopK | None, States | None]:
        if self.estimator is not None:
            return inputs.get(scored.LOGPROB), None
        return super()._teacher(inputs, given)

    # ---- logs

    def _start_writing(self) -> None:
        self.written, self.said = torch.zeros(2, dtype=torch.float64), 0

    def _start_sums(self) -> None:
        super()._start_sums()
        self._start_writing()

    @torch.no_grad()
    def _note(self, pair: Pair) -> None:
        """What both sides say of the tokens that the student wrote: a product with each head."""
        own = pair.masks[0]
        labels = pair.labels.masked_fill(~own, IGNORE)  # type: ignore[union-attr]
        tiles = {"max_tile_bytes": self.kd.max_tile_bytes, "max_rows": self.kd.max_rows}
        weight, bias = pair.head
        at = {"student_bias": bias, "logit_softcap": self.head.softcap, "logit_scale": self.head.scale, **tiles}
        mine, theirs, teacher = linear_logprob(pair.hidden, weight, labels, **at), None, pair.teacher
        if isinstance(teacher, Tensor):
            theirs = teacher.where(own, 0)
        elif isinstance(teacher, TeacherHead):
            at = {"student_bias": teacher.bias, "logit_softcap": teacher.softcap, "logit_scale": teacher.scale, **tiles}
            theirs = linear_logprob(teacher.hidden, teacher.weight, labels, **at)
        known = 0 * own if theirs is None else own
        parts = [own.any(1), own, mine, torch.zeros_like(mine) if theirs is None else theirs, known]
        self.said = self.said + torch.stack([each.double().sum() for each in parts])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.written[1]:
            said = self.said if isinstance(self.said, Tensor) else torch.zeros(5, dtype=torch.float64)
            sums = torch.cat([each.to(self.args.device) for each in (said, self.written)])
            sequences, tokens, mine, theirs, known, own, batches = self.accelerator.reduce(sums, "sum").tolist()
            logs["on_policy"] = own / batches
            if sequences:
                logs |= {"completion_length": tokens / sequences, "student_logprob": mine / tokens}
            if known:
                logs["teacher_logprob"] = theirs / known
            self._start_writing()
        super().log(logs, start_time)


def _check(trainer: OnPolicyTrainer, teacher: Any, kd: KDConfig, generation: Any, options: dict[str, Any]) -> None:
    """Arguments that are of another type, or do not go together."""
    estimator, top_k, served, lmbda = trainer.estimator, trainer.student_top_k, trainer.served, trainer.lmbda
    check.real("lmbda", lmbda, high=1.0)
    if not isinstance(kd, KDConfig):
        refusals.options(kd, teacher, True)
    if not isinstance(generation, GenerationConfig):
        raise TypeError(f"generation must be a GenerationConfig, not {type(generation).__name__}")
    if generation.max_new_tokens is None:
        raise ValueError("generation must have max_new_tokens, how much is written at most, but it is None")
    if (generation.num_return_sequences or 1) != 1 or generation.stop_strings:
        raise ValueError("generation must write one completion to a prompt, which ends with eos_token_id: no "
                         "num_return_sequences, no stop_strings")  # fmt: skip
    if estimator is not None and estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, or None, not {estimator!r}")
    if top_k is not None:
        check.integer("student_top_k", top_k)
        if not 1 <= top_k <= check.MAX_LISTED:
            raise ValueError(f"student_top_k must be in [1, {check.MAX_LISTED}], not {top_k}")
    own_ce = kd.ce_weight != 0 and lmbda > 0
    labelled = [part.name for part in parts_of(kd.divergence) if part.needs_labels]
    for wrong, message in (
        (teacher is None, "teacher must be able to score what the student writes, but is None"),
        (kd.kd_on != "labels", f"kd_on must be 'labels', the tokens of the completion, not {kd.kd_on!r}"),
        (own_ce and lmbda == 1, "ce_weight must be 0 with lmbda=1: what the student writes has no cross-entropy"),
        (own_ce and labelled,
         f"ce_weight must be 0 for {', '.join(labelled)}, which reads the labels of the student's own text"),
        (served is None and (estimator or top_k),
         "estimator and student_top_k are for a teacher that is a function: a model gives the whole distribution"),
        (estimator and top_k, "estimator and student_top_k exclude each other: one token or K of them"),
        (estimator and options.get("terms"), "terms compare distributions, of which estimator= has one token"),
        (estimator and kd.temperature != 1, f"temperature must be 1 with estimator=, not {kd.temperature}"),
        (estimator and lmbda < 1 and not kd.ce_weight,
         f"lmbda must be 1 with estimator= and ce_weight=0, not {lmbda}: given text is not the student's own sample"),
        (estimator and not rollouts.is_plain(generation),
         "estimator= is right for samples of the student's whole distribution alone: no other sampling_temperature "
         "than 1, no top_k, no top_p, no repetition_penalty, and do_sample=True"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
