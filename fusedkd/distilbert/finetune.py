"""The second step: fine-tune on a task of GLUE or on SQuAD, with or without a teacher that was fine-tuned before.

With a teacher and on SQuAD this is DistilBERT(D) (Sanh et al. 2019, section 3): half the task's loss, half the
divergence from the teacher's outputs.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.distilbert import squad, tasks
from fusedkd.distilbert.card import Facts, write_card
from fusedkd.distilbert.config import check_folder, contents, parse_divergence
from fusedkd.distilbert.data import ByLength
from fusedkd.distilbert.export import tokenizer_for, usable_positions
from fusedkd.distilbert.interrupt import resume, training_arguments
from fusedkd.distilbert.options import UsageError, check_signs, check_tracker, option
from fusedkd.distilbert.progress import RichProgress
from fusedkd.distilbert.student import loading
from fusedkd.distilbert.task_trainer import Padding, TaskTrainer
from fusedkd.distilbert.tasks import TASKS, Task

Stage = dict[str, Any]

# Options that may change between two runs in the same folder, and those that name files: known by content.
FREE = {"output_dir", "report_to", "logging_steps", "resume_from_checkpoint"}
FREE |= {"dataloader_num_workers", "per_device_eval_batch_size"}
WEIGHTS = ("model", "pytorch_model", "config.json", "tokenizer", "vocab", "merges")  # what counts of a model's folder
POSITIVE = {"epochs", "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size"}
POSITIVE |= {"gradient_accumulation_steps", "temperature", "max_length", "logging_steps"}
NOT_NEGATIVE = {"alpha_kd", "alpha_hard", "weight_decay", "warmup_ratio", "max_grad_norm", "doc_stride"}
NOT_NEGATIVE |= {"max_train_examples", "dataloader_num_workers"}


@dataclass
class FinetuneOptions:
    _argument_group_name = "fine-tuning"
    task: Literal[tuple(TASKS)] = option("sst2", "the task")  # type: ignore[valid-type]
    model: str = option("", "what to fine-tune, with its tokenizer: folder or hub name", metavar="NAME")
    teacher: str | None = option(None, "a model fine-tuned on the task: distil it on the way", metavar="NAME")
    glue_dir: str | None = option(
        None, "folder with the files of GLUE's download (SST-2/train.tsv, ...; .gz too)", metavar="FOLDER"
    )
    squad_files: list[str] = option([], "instead of the hub: train-v1.1.json dev-v1.1.json", metavar="FILE")
    dataset: str | None = option(
        None, "hub name or folder of that form; default: nyu-mll/glue, rajpurkar/squad", metavar="NAME"
    )
    max_train_examples: int = option(0, "train on so many examples, the same for every seed; 0: all")
    max_length: int = option(None, "tokens per example, the rest is cut; default: 128, of squad 384")
    doc_stride: int = option(128, "squad: tokens that neighbouring windows of a context share")
    temperature: float = option(2.0, "softmax temperature of the KD term")
    alpha_kd: float = option(0.5, "weight of the KD term (stsb: squared difference of the outputs)")
    alpha_hard: float = option(0.5, "weight of the labels' term beside it; without --teacher always 1")
    divergence: str = option("forward_kl", "of the KD term, parameters after a colon: jsd:beta=0.3", metavar="NAME")
    output_dir: str = option(
        "runs/finetune", "where the model goes; a finished one found there is reused", metavar="FOLDER"
    )
    epochs: float = option(3.0, "passes over the training examples")
    learning_rate: float = option(5e-5, "peak learning rate")
    per_device_train_batch_size: int = option(32, "examples per device and forward pass")
    per_device_eval_batch_size: int = option(64, "the same in evaluation")
    gradient_accumulation_steps: int = option(1, "forward passes per optimiser step")
    warmup_ratio: float = option(0.1, "share of the steps with a rising learning rate; it falls linearly afterwards")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradient clipping")
    by_length: bool = option(False, "batches of like length: less padding")
    bf16: bool = option(False, "mixed precision, bfloat16")
    fp16: bool = option(False, "mixed precision, float16")
    logging_steps: int = option(50, "log every so many steps")
    report_to: str = option("tensorboard", "trackers of the Trainer: tensorboard, wandb, ..., none", metavar="NAME")
    dataloader_num_workers: int = option(0, "processes that pad")
    seed: int = option(56, "of the new head, the order and the dropout")
    resume_from_checkpoint: bool = option(False, "continue an interrupted run from its last checkpoint")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def settings(self) -> dict[str, Any]:
        """What the results depend on; local inputs by name, without their folders, and by content under `inputs`."""
        flat, inputs = {k: v for k, v in asdict(self).items() if k not in FREE}, []
        for name in ("model", "teacher", "glue_dir", "dataset", "squad_files"):
            given = flat[name] if isinstance(flat[name], list) else [flat[name]] if flat[name] else []
            names = []
            for path in map(Path, given):
                names.append(path.resolve().name if path.exists() else str(path))
                files = contents(path / TASKS[self.task].folder if name == "glue_dir" else path)
                kept = (f for f in files if name not in ("model", "teacher") or f.startswith(WEIGHTS))
                inputs += [f"--{name} {file}" for file in kept] if path.exists() else []
            flat[name] = names if isinstance(flat[name], list) else names[0] if names else None
        return flat | {"inputs": inputs}


def check(options: FinetuneOptions) -> None:
    """Fill in what depends on the task; refuse what can be refused without reading anything."""
    if options.task not in TASKS:
        raise UsageError(f"--task {options.task}: it must be one of {', '.join(TASKS)}")
    if not options.model:
        raise UsageError("--model is missing: a folder or hub name to start from")
    if options.max_length is None:
        options.max_length = 384 if options.task == "squad" else 128
    check_signs(options, POSITIVE, NOT_NEGATIVE)
    check_tracker(options.report_to)
    if options.bf16 and options.fp16:
        raise UsageError("--bf16 and --fp16 exclude each other")
    if parse_divergence(options.divergence).temperature_power == 0 and options.temperature != 1:
        raise UsageError(f"--divergence {options.divergence} needs --temperature 1")
    if options.teacher and not options.alpha_kd + options.alpha_hard:
        raise UsageError("--alpha_kd and --alpha_hard are both 0: there is nothing to learn")


def finetune(options: FinetuneOptions, console: Console) -> Stage:
    """Train, evaluate after each epoch, save the model of the last one; or read what an earlier run left there.

    `metrics` are those after the last epoch, `best` those of the epoch with the best first metric of the task: it is
    reported, never selected. All are fractions (F1 0.86, not 86).
    """
    check(options)
    state = PartialState(cpu=not torch.accelerator.is_available())
    task, folder, finished = TASKS[options.task], options.folder, options.folder / "stage.json"
    with state.main_process_first():  # the other ranks find what the first one wrote
        begun = finished.is_file() or any(folder.glob("checkpoint-*"))
        check_folder(options, () if begun else None)  # type: ignore[arg-type]
        if finished.is_file():
            console.print(f"[bold]{task.name}[/bold]: reusing {folder}")
            return dict(json.loads(finished.read_text()))
        transformers.set_seed(options.seed)
        model, tokenizer = load_model(options.model, task, options.max_length, "--model")
        teacher = None
        if options.teacher:
            teacher, other = load_model(options.teacher, task, options.max_length, "--teacher")
            if other.get_vocab() != tokenizer.get_vocab():
                raise UsageError(f"--teacher {options.teacher} has another vocabulary than --model {options.model}")
        rows = tasks.read(task, options.dataset, options.glue_dir, options.squad_files)
        if 0 < options.max_train_examples < len(rows[0]):
            rows[0] = rows[0].shuffle(seed=0).select(range(options.max_train_examples))
        if task.name == "squad":
            train, held_out = (squad.windows(part, tokenizer, options.max_length, options.doc_stride) for part in rows)
        else:
            train, held_out = (tasks.tokenized(task, part, tokenizer, options.max_length) for part in rows)
        held_out = held_out.select(np.argsort(held_out["length"], kind="stable"))  # less padding
        if not len(train) or not len(held_out):
            raise UsageError(f"there are no {'held-out' if len(train) else 'training'} examples")
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").write_text(json.dumps(options.settings(), indent=1) + "\n")

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits: Any = prediction.predictions
        if any(np.isnan(part).any() for part in (logits if isinstance(logits, tuple) else [logits])):
            raise UsageError("the outputs are not numbers: training diverged, try a smaller --learning_rate")
        if isinstance(logits, tuple):
            start, end = logits
            return squad.score(squad.answers(start, end, held_out, rows[1]), rows[1])
        return tasks.score(task, logits, prediction.label_ids)  # type: ignore[arg-type]

    arguments = training_arguments(
        folder,
        options,
        num_train_epochs=options.epochs,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        warmup_steps=options.warmup_ratio,
        train_sampling_strategy="sequential" if options.by_length else "random",
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    batch = arguments.train_batch_size * arguments.world_size
    trainer = TaskTrainer(
        model,
        arguments,
        Padding(tokenizer),
        ByLength(train, batch, options.seed) if options.by_length else train,
        held_out,
        tokenizer,
        compute_metrics=metrics,
        teacher=teacher,
        temperature=options.temperature,
        divergence=parse_divergence(options.divergence),
        alpha_kd=options.alpha_kd,
        alpha_hard=options.alpha_hard,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(console, task.name))
    checkpoint, start = resume(folder, options.resume_from_checkpoint)
    what = f" taught by {options.teacher}" if teacher else ""
    size = f"{model.num_parameters():,} parameters, {len(rows[0]):,} examples{start}"
    console.print(f"[bold]{task.name}[/bold]: {options.model}{what}, {size}")
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - begin
    trainer.save_model()
    curve = [
        {"epoch": h["epoch"], "step": h["step"], "loss": h["eval_loss"]} | {m: h[f"eval_{m}"] for m in task.metrics}
        for h in trainer.state.log_history
        if "eval_loss" in h
    ]
    best = max(curve, key=lambda point: point[task.metrics[0]])
    stage: Stage = {
        "task": task.name,
        "metrics": {name: curve[-1][name] for name in task.metrics},
        "best": {name: best[name] for name in ("epoch", *task.metrics)},
        "parameters": model.num_parameters(),
        "seed": options.seed,
        "steps": trainer.state.global_step,
        "epochs": options.epochs,
        "train_examples": len(rows[0]),
        "eval_examples": len(rows[1]),
        "seconds": seconds,
        "seconds_per_step": trainer.clock.median,
        "curve": curve,
    }
    if trainer.is_world_process_zero():
        write_card(folder, card(options, stage))
        finished.write_text(json.dumps(stage, indent=1) + "\n")
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
    trainer.accelerator.wait_for_everyone()
    return stage


def card(options: FinetuneOptions, stage: Stage) -> Facts:
    """What the model card says."""
    squad, kd = options.task == "squad", options.teacher is not None
    files = options.squad_files if squad else options.glue_dir
    source = "local files" if files else options.dataset or ("rajpurkar/squad" if squad else "nyu-mll/glue")
    names = ("temperature", "alpha_kd", "alpha_hard", "divergence")
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * PartialState().num_processes
    return {
        "parameters": stage["parameters"],
        "base_model": options.model,
        "teacher": options.teacher,  # type: ignore[typeddict-item]
        "task": options.task,
        "data": [source],
        "loss": {name: getattr(options, name) for name in names} if kd else {},
        "training": {"steps": stage["steps"], "batch": batch, "optimiser": "AdamW"}
        | {k: getattr(options, k) for k in ("epochs", "learning_rate", "warmup_ratio", "weight_decay", "seed")}
        | {"examples": stage["train_examples"]},
        "metrics": stage["metrics"],
        "evaluation": {"dataset": source, "split": TASKS[options.task].held_out[0]}
        | ({} if squad or files else {"config": options.task}),
    }


def load_model(name: str, task: Task, max_length: int, flag: str) -> tuple[PreTrainedModel, Tokenizer]:
    """A model for the task, in float32, and its tokenizer.

    From a language model: its whole body must arrive, only the head is new. `--teacher` must have its head as well.
    """
    sizes: dict[str, Any] = {}
    kind: Any = AutoModelForQuestionAnswering
    if task.name != "squad":
        kind = AutoModelForSequenceClassification
        names = task.labels or ("score",)
        sizes = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
        sizes |= {"problem_type": "single_label_classification" if task.labels else "regression"}
    with loading(flag, name):
        config = AutoConfig.from_pretrained(name, **sizes)
        tokenizer = AutoTokenizer.from_pretrained(name)
        more = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = kind.from_pretrained(name, config=config, dtype=torch.float32, **more)
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    body = [k for k in absent if k.startswith(f"{model.base_model_prefix}.") and ".pooler." not in k]
    if body:
        raise UsageError(f"{flag} {name}: {len(body)} weights missing or of another size, {body[0]} the first")
    if absent and flag == "--teacher":
        raise UsageError(f"{flag} {name} is not fine-tuned on {task.name}: it has no {absent[0]}, or of another size")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what the library makes of a folder without one
        raise UsageError(f"{flag} {name} has no tokenizer")
    if len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"{flag} {name} has {config.vocab_size} vocabulary rows, its tokenizer {len(tokenizer)} tokens"
        )
    if max_length > (positions := usable_positions(config)):
        raise UsageError(f"--max_length {max_length} exceeds the {positions} positions of {flag} {name}")
    if task.name == "squad" and tokenizer.cls_token is None:
        raise UsageError(f"{flag} {name}: squad needs a model that reads in both directions, not {config.model_type}")
    if tokenizer.pad_token is None:  # GPT-2, which then classifies at the last token that is not this one
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer_for(config, tokenizer)


class Progress(RichProgress):
    """With a line of the task's metrics after each epoch."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = {k.removeprefix("eval_"): v for k, v in kwargs["metrics"].items()}
        shown = [f"{name.replace('_', ' ')} {metrics[name]:.3f}" for name in ("loss", *TASKS[self.name].metrics)]
        self.console.print(f"  epoch {state.epoch:g}  {'  '.join(shown)}", highlight=False)
