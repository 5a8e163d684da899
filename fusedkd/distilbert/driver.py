"""The stages, in order: text, tokenizer, teacher, a student for each arm and seed, tasks, report.

Each model leaves a folder with a `stage.json` under --output_dir; one that is there is not trained again.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, PreTrainedModel, PrinterCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.distilbert import report
from fusedkd.distilbert.arms import changed
from fusedkd.distilbert.card import write_card
from fusedkd.distilbert.config import OF_STUDENTS, Config, UsageError, check_folder, parse_divergence
from fusedkd.distilbert.data import (
    CausalCollator,
    MaskingCollator,
    by_length,
    in_order,
    load_vocab,
    pack,
    read_text,
    token_counts,
    train_tokenizer,
)
from fusedkd.distilbert.evidence import Models, add_tasks, check_tasks, latencies
from fusedkd.distilbert.export import as_exported, tokenizer_for
from fusedkd.distilbert.interrupt import resume, training_arguments
from fusedkd.distilbert.progress import RichProgress
from fusedkd.distilbert.student import (
    Teacher,
    check_folding,
    layers_of,
    load_teacher,
    new_teacher,
    student_from_teacher,
)
from fusedkd.distilbert.trainer import DistilBertTrainer
from fusedkd.nn import DistilBertLoss

EVAL_SEED = 0  # the held-out masks are the same for every model and every run
PLAIN: dict[str, Any] = {
    "loss": DistilBertLoss(alpha_distil=0.0, alpha_mlm=1.0, alpha_cos=0.0)
}  # language modelling alone
Stage = report.Stage


@dataclass
class Run:
    """What all stages share."""

    config: Config
    console: Console
    tokenizer: Tokenizer
    teacher: Teacher | None  # None: to be trained here
    train: Any
    held_out: Any
    counts: np.ndarray  # how often each token occurs in the training blocks

    def collator(self, seed: int) -> Any:
        if self.tokenizer.mask_token_id is None:
            return CausalCollator(self.tokenizer)
        text = self.config.text
        return MaskingCollator(self.tokenizer, self.counts, text.mlm_probability, text.mask_smoothing, seed)


def run(config: Config, console: Console) -> None:
    """Everything, from the text to the report."""
    arms = config.run.arms or []
    for arm in arms:
        weights = asdict(changed(config, arm).loss)
        if not any(weights[name] for name in weights if name.startswith("alpha")):
            raise UsageError(f"--arms {arm}: every weight of its loss is 0")
    if config.run.fsdp and not torch.accelerator.is_available():
        raise UsageError("--fsdp needs an accelerator: on CPUs it would be data parallelism alone")
    state = PartialState()
    with state.main_process_first():  # the other ranks find what the first one wrote
        shared = prepare(config, console)
    teacher, teacher_stage = teacher_of(shared)
    students: dict[str, list[Stage]] = {arm: [] for arm in arms}
    for seed in range(config.run.seed, config.run.seed + config.run.seeds):
        for arm, stages in students.items():
            stages.append(student_of(shared, arm, teacher, seed))
    teachers = [{**teacher_stage, "seed": config.run.seed + i} for i in range(config.run.seeds)]
    if config.tasks.tasks:
        add_tasks(config, with_folders(shared, teacher, teachers, students), console)
    if state.is_main_process:
        latency = None
        if "full" in students:
            student = AutoModel.from_pretrained(config.folder / folder_name(config, "full", config.run.seed))
            latency = latencies({"teacher": teacher, "student": student}, config.text.block_size)
        report.write(config, len(shared.tokenizer), teachers, students, latency, console)


def prepare(config: Config, console: Console) -> Run:
    """Text, tokenizer, blocks and a teacher from elsewhere. Nothing is written before everything has been read."""
    text, saved = config.text, config.folder / "tokenizer"
    begun = {f.parent.name for name in ("stage.json", "checkpoint-*") for f in config.folder.glob(f"*/{name}")}
    students = any(name.startswith("student") for name in begun)
    check_folder(config, () if students else OF_STUDENTS if begun else None)
    source = text.dataset or ", ".join(Path(f).name for f in text.train_files) or "the documentation of Python"
    console.print(f"[bold]Text[/bold]: {source}")
    tokenizer = load_vocab(text.vocab_file) if text.vocab_file else None
    teacher = None
    if config.teacher.teacher:
        console.print(f"[bold]Teacher[/bold]: {config.teacher.teacher}")
        vocab = tokenizer.get_vocab() if tokenizer else None
        teacher, tokenizer = load_teacher(config.teacher.teacher, text.block_size, vocab)
        check_folding(config.student.fold_token_type, teacher.config.model_type)
    layers_of(config.student, depth_of(config, teacher))  # refuses what cannot be
    check_tasks(config)
    if teacher is None and saved.is_dir() and (begun or not PartialState().is_main_process):
        console.print(f"[bold]Tokenizer[/bold]: reusing {saved}")
        tokenizer = AutoTokenizer.from_pretrained(saved)
    train_text, eval_text = read_text(text)
    if tokenizer is None:
        console.print(f"[bold]Tokenizer[/bold]: training a WordPiece vocabulary of {text.vocab_size}")
        tokenizer = train_tokenizer(train_text, text.vocab_size)
    if teacher is None:
        tokenizer.model_max_length = text.block_size
    cut = by_length if text.sequences == "by_length" else pack
    train = cut(train_text, tokenizer, text.block_size, "training", text.num_proc)
    held_out = cut(eval_text, tokenizer, text.block_size, "held-out", text.num_proc)
    if 0 < config.run.eval_blocks < len(held_out):
        held_out = held_out.shuffle(seed=EVAL_SEED).select(range(config.run.eval_blocks))
    counts = token_counts(train, teacher.config.vocab_size if teacher else len(tokenizer))
    size = "a stream" if text.streaming else f"{counts.sum():,} tokens in {len(train):,} blocks"
    console.print(f"      {size}; {len(held_out):,} blocks held out")
    if PartialState().is_main_process:
        try:
            config.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make --output_dir {config.folder}: {error.strerror}") from error
        (config.folder / "run.json").write_text(json.dumps(config.settings(), indent=1) + "\n")
        tokenizer.save_pretrained(saved)
    return Run(config, console, tokenizer, teacher, train, held_out, counts)


# ---- models


def depth_of(config: Config, teacher: Teacher | None) -> int:
    """Layers of the teacher, given or to be trained here."""
    return teacher.config.num_hidden_layers if teacher else config.teacher.teacher_layers


def teacher_of(shared: Run) -> tuple[Teacher, Stage]:
    """The teacher, given or trained here, and what its stage found."""
    config, teacher = shared.config, shared.teacher
    if teacher is not None:
        # Not sharded: it is needed whole.
        whole = replace(shared, config=replace(config, run=replace(config.run, fsdp=False)))
        trainer = make_trainer(whole, config.folder / "teacher", teacher, PLAIN, None, config.run.seed, 1)
        return teacher, sizes(teacher) | {"curve": [report.point(0, trainer.evaluate())]}
    size = (len(shared.tokenizer), config.text.block_size)
    steps = config.teacher.teacher_steps
    stage = train(shared, "teacher", lambda: new_teacher(config.teacher, *size), PLAIN, None, config.run.seed, steps)
    return BertForMaskedLM.from_pretrained(config.folder / "teacher"), stage


def student_of(shared: Run, arm: str, teacher: Teacher, seed: int) -> Stage:
    """The student of one arm and one seed."""
    config = changed(shared.config, arm)
    student = config.student
    layers = layers_of(student, depth_of(config, teacher))
    frozen = student.freeze_position_embeddings, student.freeze_token_embeddings

    def make() -> PreTrainedModel:
        return student_from_teacher(teacher, layers, student.init, student.fold_token_type, *frozen)

    name, steps = folder_name(shared.config, arm, seed), config.run.student_steps
    return train(shared, name, make, loss_of(config, layers), teacher, seed, steps) | {"arm": arm}


def folder_name(config: Config, arm: str, seed: int) -> str:
    name = "student" if arm == "full" else f"student-{arm}"
    return name if seed == config.run.seed else f"{name}-seed{seed}"


def loss_of(config: Config, layers: list[int]) -> dict[str, Any]:
    """As arguments of the Trainer, for a student whose layers were copied from `layers`."""
    of = config.loss
    copied = tuple((i + 1, layer + 1) for i, layer in enumerate(layers))  # hidden state 0 is the embeddings'
    return {
        "loss": DistilBertLoss(of.temperature, of.alpha_distil, of.alpha_mlm, of.alpha_cos, of.kd_on),
        "divergence": parse_divergence(of.divergence),
        "alpha_mse": of.alpha_mse,
        "cos_layers": copied if of.cos_layers == "copied" else ((-1, -1),),
    }


def make_trainer(
    shared: Run,
    folder: Path,
    model: PreTrainedModel,
    loss: dict[str, Any],
    teacher: Teacher | None,
    seed: int,
    steps: int,
) -> DistilBertTrainer:
    config, options = shared.config, shared.config.run
    arguments = training_arguments(
        folder,
        options,
        max_steps=steps,
        per_device_eval_batch_size=options.per_device_train_batch_size,
        learning_rate=config.teacher.teacher_learning_rate if teacher is None else options.learning_rate,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        lr_scheduler_type="linear",
        warmup_steps=int(options.warmup_ratio * steps),
        eval_strategy="steps",
        eval_steps=max(steps * options.eval_steps // options.student_steps, 1),
        eval_on_start=True,
        save_steps=options.save_steps or max(min(steps // 5, 200), 1),
        seed=seed,
        fsdp=options.fsdp,
        **config.text.trainer_arguments,
    )
    trainer = DistilBertTrainer(
        model,
        teacher,
        arguments,
        shared.collator(seed),
        in_order(shared.train, arguments.train_batch_size * arguments.world_size, seed),
        shared.held_out,
        tokenizer_for(model.config, shared.tokenizer),
        **loss,
        eval_collator=shared.collator(EVAL_SEED),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RichProgress(shared.console, folder.name))
    return trainer


def train(
    shared: Run,
    name: str,
    make: Callable[[], PreTrainedModel],
    loss: dict[str, Any],
    teacher: Teacher | None,
    seed: int,
    steps: int,
) -> Stage:
    """Train one model into the folder `name`, or read what an earlier run left there; its curve and its speed."""
    config, folder = shared.config, shared.config.folder / name
    finished = folder / "stage.json"
    if finished.is_file():
        shared.console.print(f"[bold]{name}[/bold]: reusing {folder}")
        return json.loads(finished.read_text())
    torch.manual_seed(seed)
    model = make()
    trainer = make_trainer(shared, folder, model, loss, teacher, seed, steps)
    checkpoint, begin = resume(folder, config.run.resume_from_checkpoint)
    shared.console.print(f"[bold]{name}[/bold]: {model.num_parameters():,} parameters, {steps} steps{begin}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    stage = sizes(model) | {
        "seed": seed,
        "steps": steps,
        "seconds_per_step": trainer.clock.median,
        "curve": [report.point(h["step"], h) for h in trainer.state.log_history if "eval_ce" in h],
    }
    if trainer.is_world_process_zero():
        card(shared, folder, stage, loss, teacher)
        finished.write_text(json.dumps(stage, indent=1) + "\n")
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover)
    trainer.accelerator.wait_for_everyone()
    return stage


def sizes(model: PreTrainedModel) -> Stage:
    """Parameters: all of them, and those of the layers alone."""
    body = sum(p.numel() for name, p in model.base_model.named_parameters() if "layer." in name or ".h." in name)
    return {"parameters": model.num_parameters(), "body": body}


# ---- what comes after training


def with_folders(shared: Run, teacher: Teacher, teachers: list[Stage], students: dict[str, list[Stage]]) -> Models:
    """Every model to fine-tune: its folder, and the stage that its seed is in."""
    folder = shared.config.folder / "teacher"
    with PartialState().main_process_first():
        if not (folder / "config.json").is_file():
            with as_exported(teacher):
                teacher.save_pretrained(folder)
            tokenizer_for(teacher.config, shared.tokenizer).save_pretrained(folder)
    models = [(folder, stage) for stage in teachers]
    for arm, stages in students.items():
        models += [(shared.config.folder / folder_name(shared.config, arm, s["seed"]), s) for s in stages]
    return models


def card(shared: Run, folder: Path, stage: Stage, loss: dict[str, Any], teacher: Teacher | None) -> None:
    """The README of an exported model."""
    config, text = shared.config, shared.config.text
    data = [text.dataset] if text.dataset else text.train_files or ["the documentation that comes with Python"]
    triple = loss["loss"]
    weights = (triple.alpha_distil, triple.alpha_mlm, triple.alpha_cos, loss.get("alpha_mse", 0.0))
    names = ("KD", "language modelling", "cosine", "logit MSE")
    terms = {f"weight of {n}": f"{w:g}" for n, w in zip(names, weights, strict=True) if w}
    if triple.alpha_distil:
        terms |= {"divergence": config.loss.divergence, "temperature": f"{triple.temperature:g}"}
        terms |= {"tokens of the KD term": config.loss.kd_on}
    run, source = config.run, config.teacher.teacher or "a BERT trained on the same text"
    copied = teacher is not None and config.student.init == "teacher"
    distilled = teacher is not None and any((weights[0], *weights[2:]))
    write_card(
        folder,
        {
            "parameters": stage["parameters"],
            "teacher": source if distilled else None,
            "teacher_parameters": teacher.num_parameters() if teacher and distilled else None,
            "base_model": source if copied and not distilled else None,
            "init": config.student.init if teacher else None,
            "layers": layers_of(config.student, depth_of(config, teacher)) if copied else None,
            "data": data,
            "loss": terms,
            "training": {
                "optimiser steps": stage["steps"],
                "batch per device": run.per_device_train_batch_size,
                "gradient accumulation": run.gradient_accumulation_steps,
                "devices": PartialState().num_processes,
                "tokens per block": text.block_size,
                "optimiser": "AdamW, betas 0.9 and 0.98, epsilon 1e-6",
                "learning rate": run.learning_rate if teacher else config.teacher.teacher_learning_rate,
                "seed": stage["seed"],
            },
            "metrics": {report.METRICS[m]: stage["curve"][-1][m] for m in report.METRICS if teacher or m != "kl"},
        },
    )
