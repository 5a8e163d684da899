"""What a distilling Trainer refuses: what would change its loss in silence, or fail in the words of something else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from fusedkd import checks as check
from fusedkd.divergences import parts_of, resolve
from fusedkd.integrations.cache_store import PACKED
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.kinds import Kind, packed
from fusedkd.integrations.offline import COLUMNS, OfflineTeacherCollator
from fusedkd.integrations.routed import is_none
from fusedkd.integrations.sharded import units
from fusedkd.integrations.takes import media, refuse_media
from fusedkd.integrations.term import Term
from fusedkd.integrations.terms import LogitsTerm
from fusedkd.losses.linear_kd import checked_linear_options
from fusedkd.teachers import TeacherTopK


def options(kd: Any, teacher: Any, move_teacher: Any) -> None:
    """Arguments of another type."""
    if not isinstance(move_teacher, bool):
        raise TypeError(
            f"move_teacher must be True or False, not {move_teacher!r}: False leaves teachers where they are"
        )
    if not isinstance(kd, KDConfig):
        wish = "KDConfig(**kd)" if isinstance(kd, Mapping) else "KDConfig(…)"
        raise TypeError(f"kd must be a KDConfig, not {type(kd).__name__}: pass {wish}")
    several = isinstance(teacher, list | tuple | Mapping)
    models = list(teacher.values() if isinstance(teacher, Mapping) else teacher) if several else [teacher]
    for each in models:
        if not isinstance(each, str | Path | nn.Module) and (several or each is not None):
            raise TypeError(
                "teacher must be a model, its name or folder, a list or dict of these, or None, not "
                f"{type(each).__name__}{f' in a {type(teacher).__name__}' if several else ''}"
            )
    if not models:
        raise ValueError(f"teacher is an empty {type(teacher).__name__}: it must hold at least one model")
    if isinstance(teacher, Mapping):
        _keys(list(teacher))
    if teacher is None and not kd.needs_teacher:
        return
    listed = isinstance(teacher, list | tuple)
    found = "a list" if listed else "a dict" if several else "None" if teacher is None else "a single model"
    weights = kd.teacher_weights
    if weights is not None and not listed:
        raise ValueError(f"teacher_weights is for a list of teachers, which all teach every row, not for {found}")
    if weights is not None and len(weights) != len(models):
        raise ValueError(f"teacher_weights must hold one weight per teacher: {len(models)}, not {len(weights)}")
    if kd.teacher_column != KDConfig.teacher_column and not isinstance(teacher, Mapping):
        raise ValueError(f"teacher_column is for a dict of teachers, one of which each row names, not for {found}")


def _keys(keys: list[Any]) -> None:
    """Of a dict of teachers: what a row without a teacher has in its column, and two of which metrics have one name."""
    named: dict[str, Any] = {}
    for key in keys:
        if is_none(key):
            raise ValueError(
                f"a key of the dict teacher is {key!r}, which in the column means that a row has no teacher"
            )
        if str(key) in named:
            both = f"{named[str(key)]!r} and {key!r}"
            raise ValueError(f"the keys {both} of the dict teacher would have one name in the metrics, kl_{key}")
        named[str(key)] = key


def other_shares(model: nn.Module) -> None:
    """A teacher of which a rank holds a part in a way that is not known here."""
    if type(model).__name__ == "DeepSpeedEngine":
        raise ValueError("teacher must be a model, not a DeepSpeedEngine: pass engine.module")
    parameters = list(model.parameters())
    tensor_parallel = (getattr(model, "_tp_size", None) or 1) > 1
    for found, what in (
        (any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()), "FSDP1"),
        (tensor_parallel, "tensor parallelism"),
        (not units(model) and any(hasattr(p, "full_tensor") for p in parameters), "a DTensor plan of its own"),
    ):
        if found:
            raise ValueError(
                f"a teacher under {what} is not supported: shard it by FSDP2, torch.distributed.fsdp.fully_shard"
            )


def training_arguments(trainer: Any) -> None:
    """What the Trainer is asked for, beside the loss."""
    processes(trainer.accelerator.num_processes)
    config: Any = getattr(trainer.student, "config", None)
    parallel = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    for wrong, message in (
        (trainer.args.n_gpu > 1, "DataParallel is not supported: start one process per GPU with torchrun"),
        (parallel > 1, "tensor, context and sequence parallelism are not supported"),
        (trainer.is_deepspeed_enabled, "DeepSpeed is not supported: use FSDP"),
        (trainer.args.torch_compile, "torch_compile is not supported: compile the backbone, model.model.compile()"),
        (trainer.args.label_smoothing_factor, "label_smoothing_factor has no effect: use KDConfig(label_smoothing=…)"),
        (trainer.compute_loss_func, "compute_loss_func has no effect: the loss is that of KDConfig"),
        (
            getattr(config, "output_router_logits", False),
            f"the router loss of {type(trainer.student).__name__} would be left out: set output_router_logits=False",
        ),
    ):
        if wrong:
            raise ValueError(message)


def processes(found: int) -> None:
    """Processes that were started together and do not know of each other: each would train alone, on the same rows and
    into the same folder.
    """
    advice = "on a CPU start them with torchrun and pass TrainingArguments(use_cpu=True)"
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > found:
        raise ValueError(f"WORLD_SIZE is {started}, but accelerate sees {found}: {advice}")
    # What `accelerate launch --cpu --num_processes N` leaves in the environment of the one process that it starts.
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if found == 1 and on_cpu and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"accelerate launch --cpu was asked for several processes (MASTER_ADDR is set) and started one: {advice}"
        )


def shared_parameters(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses parameters that both models hold and the student trains: freezing the teacher would freeze them. Warns of
    shared ones that are frozen already.
    """
    teachers, adapted = {_memory(p) for p in teacher.parameters()}, hasattr(student, "disable_adapter")
    shared = {name: p for name, p in student.named_parameters() if _memory(p) in teachers}
    trained = [name for name, p in shared.items() if p.requires_grad]
    names = ", ".join((trained or list(shared))[:3]) + (", …" if len(trained or shared) > 3 else "")
    advice = "give the student copies of its own (copy.deepcopy)"
    if trained:
        if adapted:
            advice = "for the student's own weights with adapters off pass teacher=student.get_base_model()"
        raise ValueError(
            f"student and teacher share {len(trained)} parameters that are to be trained, and a teacher's are frozen "
            f"({names}): {advice}"
        )
    if shared and not adapted:
        check.warn(
            f"student and teacher share {len(shared)} frozen parameters ({names}), which stay as they are; if the "
            f"student is to train them, {advice}"
        )


def teachers(trainer: Any) -> None:
    """Where a teacher that is the student with adapters off is not known to be right, and a column that names teachers
    where it is missing, or would not be read.
    """
    column, data = trainer.kd.teacher_column, trainer.train_dataset
    if trainer.routed and trainer.needs_teacher:
        base = trainer.data_collator.base_collator
        has_columns(data, base, [column], "with a dict of teachers", "it names the teacher of each row")
    if isinstance(trainer.teacher, list) and column in (known_columns(data) or ()):
        raise ValueError(
            f"train_dataset has a column {column}, but a list of teachers teaches every row: pass a dict for a teacher "
            "per row, or remove the column"
        )
    if not trainer.teachers.several and column in (known_columns(data) or ()):
        check.warn(
            f"train_dataset has a column {column}, which is not read: teacher is a single model, which teaches every "
            "row; pass a dict for a teacher per row"
        )
    if all(each.adapted is None for each in trainer.teachers.models.values()):
        return
    for wrong, message in (
        (trainer.is_fsdp_enabled, "FSDP, which shards the weights of both"),
        (trainer.model_init is not None, "model_init, which makes other students"),
    ):
        if wrong:
            raise ValueError(f"a teacher that is the student with adapters off does not go with {message}: pass a copy")


def _memory(parameter: Tensor) -> Any:
    plain = type(parameter) in (nn.Parameter, Tensor) and not parameter.is_meta and parameter.numel() > 0
    return (parameter.device, parameter.data_ptr()) if plain else id(parameter)


def no_columns(kind: Kind) -> None:
    """Offline teachers, of which a data set has a row for each token."""
    if kind.pooled:
        raise ValueError(
            f"teacher is None, but {kind.noun} needs a teacher model: columns of a data set are of tokens; pass "
            "teacher=, or kd=KDConfig(kd_weight=0)"
        )


def offline_data(kd: KDConfig, data: Any, collator: Any) -> None:
    """Training data that is known to be without the columns of an offline teacher, and options that such a teacher
    cannot serve.
    """
    listed_options(kd)
    if PACKED in (known_columns(data) or ()):
        return
    has_columns(data, collator, COLUMNS, "without a teacher model", "pass teacher=, or kd=KDConfig(kd_weight=0)")


def listed_options(kd: KDConfig) -> None:
    """Options that a teacher of listed columns cannot serve."""
    like = {"tail": kd.tail, "logprobs_temperature": kd.logprobs_temperature}
    listed = TeacherTopK(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), **like)  # type: ignore[arg-type]
    checked_linear_options(kd.options(), listed)


def has_columns(data: Any, collator: Any, names: Sequence[str], why: str, advice: str) -> None:
    """Training data that is known to be without these columns."""
    base = collator.base_collator if isinstance(collator, OfflineTeacherCollator) else collator
    if not getattr(base, "__module__", "").startswith("transformers."):
        return  # a collator of one's own may make the columns
    columns = known_columns(data)
    if columns is not None and any(name not in columns for name in names):
        several = "s" if len(names) > 1 else ""
        raise ValueError(
            f"{why} the data set must have the column{several} {' and '.join(names)}, but train_dataset has "
            f"{', '.join(map(str, columns))}: {advice}"
        )


def known_columns(data: Any) -> list[str] | None:
    """Of a data set, as far as can be told without reading it."""
    listed = isinstance(data, list | tuple | Dataset) and not isinstance(data, IterableDataset)
    first = data[0] if listed and len(data) else None  # type: ignore[arg-type]
    return getattr(data, "column_names", None) or (list(first) if isinstance(first, Mapping) else None)


def batch(inputs: Mapping[str, Any], student: Any) -> None:
    """A batch that is not text by its tokens, or has one of the teacher's columns without the other."""
    if inputs.get("input_ids") is None:
        other = " instead of inputs_embeds, which mean nothing to a teacher" if "inputs_embeds" in inputs else ""
        raise ValueError(f"the batch must have input_ids{other}, but it has {', '.join(inputs)}")
    refuse_media(inputs, student)
    if sum(name in inputs for name in COLUMNS) == 1:
        raise ValueError(f"the batch must have both or none of the columns {' and '.join(COLUMNS)}")


def uneven_evaluation(batches: list[int]) -> None:
    """Where the ranks would wait for each other for ever: they gather after every batch."""
    if len(set(batches)) > 1:
        raise ValueError(
            f"the processes have {' and '.join(map(str, batches))} batches to evaluate, and must have equally many: "
            "leave even_batches of accelerator_config as it is, True"
        )


def flattened_evaluation(rows: int, examples: int) -> None:
    """At the end of data that were repeated to give each rank as many: what is repeated is cut off by rows."""
    if rows == 1 < examples:
        raise ValueError(
            "the data to evaluate must have a multiple of processes × per_device_eval_batch_size examples, where a "
            "collator puts several into one row: pad them instead, or evaluate in one process"
        )


RESERVED = (
    "loss",
    "kd",
    "ce",
    "kl",
    "kl_top_k",
    "perplexity",
    "distil",
    "mlm",
    "epoch",
    "step",
    "learning_rate",
    "grad_norm",
)
"""Names that mean something else in logs."""


def terms_given(terms: Any, kd: KDConfig, teacher: Any) -> None:
    """Arguments of another type, and terms that these teachers cannot serve."""
    if isinstance(terms, Term) or not isinstance(terms, list | tuple):
        raise TypeError(f"terms must be a list of terms, not {type(terms).__name__}")
    names = set(RESERVED)
    for term in terms:
        if not isinstance(term, Term):
            raise TypeError(f"terms must hold terms of fusedkd.integrations.terms, not {type(term).__name__}")
        if term.name in names:
            raise ValueError(f"the name {term.name!r} of a term is taken: pass another name= to each")
        names.add(term.name)
        if term.weight == 0:
            continue
        if isinstance(term, LogitsTerm):
            needs_labels = resolve(term.divergence).needs_labels
            by_labels = kd.kd_on == "labels" or any([part.needs_labels for part in parts_of(kd.divergence)])
            if needs_labels and not by_labels:
                raise ValueError(
                    f"divergence {resolve(term.divergence).name} of the term {term.name!r} needs labels, and its rows "
                    f"are those of kd_on={kd.kd_on!r}: pass KDConfig(kd_on='labels')"
                )
        elif teacher is None or isinstance(teacher, list | tuple | Mapping):
            what = f"the term {term.name!r}, a {type(term).__name__}, compares more than logits"
            if teacher is None:
                raise ValueError(f"teacher is None, but {what}")
            raise ValueError(f"teacher must be a single model, not a {type(teacher).__name__}: {what}")


def projections(trainer: Any) -> None:
    if trainer.projections and trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "projection=True does not go with FSDP1: use FSDP2, fsdp_config={'version': 2}, or DistributedDataParallel"
        )


def own_units(name: str, projections: Iterable[nn.Linear]) -> None:
    """Projections of the term that are a share in the forward of the whole model, whose gradients nobody would add."""
    if any(hasattr(linear.weight, "full_tensor") for linear in projections):
        raise RuntimeError(
            f"the projections of the term {name!r} are an FSDP unit of their own, whose forward is not called: leave "
            "them to the unit of the whole model, as transformer_layer_cls_to_wrap does"
        )


def constant(name: str, loss: Tensor) -> None:
    """A term of which training would get nothing."""
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            f"the term {name!r} has no gradient: everything that it compares is frozen, or checkpointed with "
            "use_reentrant=True (pass False)"
        )


def attention_batch(inputs: Mapping[str, Any]) -> None:
    """A batch of which attention maps are not those of one text per row."""
    for name in media(inputs):
        raise ValueError(f"an AttentionTerm knows the attention of text alone, but the batch has {name}")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 2:
        raise ValueError(f"an AttentionTerm needs an attention_mask (B, L), not {tuple(mask.shape)}")
    if packed(inputs):
        raise ValueError(
            "an AttentionTerm knows no packed documents, but position_ids start anew within a row: pad them instead"
        )


def warn_of_blank(terms: set[str]) -> None:
    """Of the terms that had no row in a whole batch."""
    if terms:
        check.warn(
            f"a batch without a row of {' and '.join(sorted(terms))}, to which it adds nothing: every label is −100 "
            "(ignored), or the teacher has nothing to say"
        )


def warn_of_stream() -> None:
    """Of batches that no step is made of."""
    check.warn(
        "the training stream ended within an optimiser step: its last batches, fewer than gradient_accumulation_steps, "
        "are left out"
    )


def unknown_ids(ids: Tensor, unknown: Tensor, name: str, vocabulary: int) -> None:
    """On a CPU: on a GPU it would wait for the device, and what is unknown shows as a NaN instead."""
    if ids.is_cpu and unknown.any():
        raise ValueError(
            f"{name} must be below {vocabulary}, the size of the {'student' if name == COLUMNS[0] else 'teacher'}'s "
            f"vocabulary, but one is {ids[unknown][0].item()}"
        )
