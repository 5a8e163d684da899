"""The stages, in order: text, tokenizer, teacher, students with the triple loss and with MLM alone, report.

Each model leaves a folder with a `stage.json` under --output_dir; one that is there is not trained again.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertForMaskedLM, PreTrainedModel, PrinterCallback, TrainingArguments
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.trainer_utils import get_last_checkpoint

from fusedkd.distilbert import report
from fusedkd.distilbert.config import Config, UsageError, check_folder, parse
from fusedkd.distilbert.data import MaskingCollator, load_vocab, pack, read_text, token_counts, train_tokenizer
from fusedkd.distilbert.student import load_teacher, new_teacher, student_from_teacher
from fusedkd.distilbert.trainer import DistilBertTrainer, RichProgress, held_out_means, held_out_sums
from fusedkd.nn import DistilBertLoss

EVAL_SEED = 0  # the held-out masks are the same for every model and every run


def main(argv: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    state = PartialState(cpu=not torch.accelerator.is_available())  # without it, torchrun on CPUs is not noticed
    console = Console(quiet=not state.is_main_process, highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        config = parse(argv)
        with state.main_process_first():  # the other ranks find what the first one wrote
            run = prepare(config, console)
        distil(run)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass
class Run:
    """What all stages share."""

    config: Config
    console: Console
    tokenizer: Tokenizer
    teacher: BertForMaskedLM | None  # None: to be trained here
    train: datasets.Dataset
    held_out: datasets.Dataset
    counts: np.ndarray  # how often each token occurs in the training blocks

    def collator(self, seed: int) -> MaskingCollator:
        text = self.config.text
        return MaskingCollator(self.tokenizer, self.counts, text.mlm_probability, text.mask_smoothing, seed)


def prepare(config: Config, console: Console) -> Run:
    """Text, tokenizer, blocks and a teacher from elsewhere. Nothing is written before everything has been read."""
    text, saved = config.text, config.folder / "tokenizer"
    check_folder(config)
    source = text.dataset or ", ".join(text.train_files) or "the documentation that comes with Python"
    console.print(f"[bold]Text[/bold]: {source}")
    tokenizer = load_vocab(text.vocab_file) if text.vocab_file else None
    teacher = None
    if config.teacher.teacher:
        console.print(f"[bold]Teacher[/bold]: {config.teacher.teacher}")
        vocab = tokenizer.get_vocab() if tokenizer else None
        teacher, tokenizer = load_teacher(config.teacher.teacher, text.block_size, vocab)
    elif saved.is_dir():
        console.print(f"[bold]Tokenizer[/bold]: reusing {saved}")
        tokenizer = AutoTokenizer.from_pretrained(saved)
    train_text, eval_text = read_text(text)
    if tokenizer is None:
        console.print(f"[bold]Tokenizer[/bold]: training a WordPiece vocabulary of {text.vocab_size}")
        tokenizer = train_tokenizer(train_text, text.vocab_size)
    if teacher is None:
        tokenizer.model_max_length = text.block_size
    train = pack(train_text, tokenizer, text.block_size, "training")
    held_out = pack(eval_text, tokenizer, text.block_size, "held-out")
    if 0 < config.run.eval_blocks < len(held_out):
        held_out = held_out.shuffle(seed=EVAL_SEED).select(range(config.run.eval_blocks))
    counts = token_counts(train, teacher.config.vocab_size if teacher else len(tokenizer))
    console.print(f"      {counts.sum():,} tokens in {len(train):,} blocks; {len(held_out):,} blocks held out")
    if PartialState().is_main_process:
        try:
            config.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make --output_dir {config.folder}: {error.strerror}") from error
        (config.folder / "run.json").write_text(json.dumps(config.settings(), indent=1) + "\n")
        tokenizer.save_pretrained(saved)
    return Run(config, console, tokenizer, teacher, train, held_out, counts)


def distil(run: Run) -> None:
    """Teacher, students, report."""
    config, options, seed = run.config, run.config.student, run.config.run.seed
    alone = DistilBertLoss(alpha_distil=0.0, alpha_mlm=1.0, alpha_cos=0.0)
    weights = (options.alpha_distil, options.alpha_mlm, options.alpha_cos)
    triple = DistilBertLoss(options.temperature, *weights, kd_on=options.kd_on)
    teacher = run.teacher
    if teacher is not None:
        stage: report.Stage = {"parameters": teacher.num_parameters(), "curve": [evaluate(run, teacher)]}
    else:
        size = (len(run.tokenizer), config.text.block_size)
        stage = train(run, "teacher", lambda: new_teacher(config.teacher, *size), alone, None, seed)
        teacher = BertForMaskedLM.from_pretrained(config.folder / "teacher")
    students: dict[str, list[report.Stage]] = {report.TRIPLE: [], report.ALONE: []}
    for s in range(seed, seed + options.seeds):
        for kind, name, loss in ((report.TRIPLE, "student", triple), (report.ALONE, "student-mlm", alone)):
            folder = name if s == seed else f"{name}-seed{s}"
            students[kind].append(train(run, folder, lambda: student_from_teacher(teacher), loss, teacher, s))
    if PartialState().is_main_process:
        report.write(config, len(run.tokenizer), stage, students, run.console)


def train(
    run: Run,
    name: str,
    make: Callable[[], PreTrainedModel],
    criterion: DistilBertLoss,
    teacher: PreTrainedModel | None,
    seed: int,
) -> report.Stage:
    """Train one model into the folder `name`, or read what an earlier run left there; its curve and its speed."""
    config, options, folder = run.config, run.config.run, run.config.folder / name
    finished = folder / "stage.json"
    if finished.is_file():
        run.console.print(f"[bold]{name}[/bold]: reusing {folder}")
        return json.loads(finished.read_text())
    students = config.student
    steps = students.student_steps if teacher else config.teacher.teacher_steps
    eval_steps = max(steps * options.eval_steps // students.student_steps, 1)
    transformers.set_seed(seed)
    model = make()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        max_steps=steps,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_train_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=students.learning_rate if teacher else config.teacher.teacher_learning_rate,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        lr_scheduler_type="linear",
        warmup_steps=int(options.warmup_ratio * steps),
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        fp16=options.fp16,
        eval_strategy="steps",
        eval_steps=eval_steps,
        eval_on_start=True,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        save_total_limit=1,
        report_to=options.report_to,
        dataloader_num_workers=options.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=seed,
    )
    trainer = DistilBertTrainer(
        model,
        arguments,
        run.collator(seed),
        run.train,
        run.held_out,
        run.tokenizer,
        criterion=criterion,
        teacher=teacher,
        eval_collator=run.collator(EVAL_SEED),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RichProgress(run.console, name))
    checkpoint = get_last_checkpoint(folder) if options.resume_from_checkpoint and folder.is_dir() else None
    what = "triple loss" if criterion.alpha_distil else "masked-language modelling alone"
    resumed = f", resumed from {checkpoint}" if checkpoint else ""
    run.console.print(f"[bold]{name}[/bold]: {model.num_parameters():,} parameters, {what}, {steps} steps{resumed}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    tokens = run.counts.sum() / len(run.train) * arguments.train_batch_size * arguments.world_size
    stage = {
        "parameters": model.num_parameters(),
        "seed": seed,
        "steps": steps,
        "seconds_per_step": trainer.clock.median,
        "tokens_per_second": tokens * arguments.gradient_accumulation_steps / trainer.clock.median,
        "curve": [
            {"step": h["step"]} | {metric: h[f"eval_{metric}"] for metric in report.METRICS}
            for h in trainer.state.log_history
            if "eval_loss" in h
        ],
    }
    if trainer.is_world_process_zero():
        finished.write_text(json.dumps(stage, indent=1) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()
    return stage


def evaluate(run: Run, teacher: PreTrainedModel) -> dict[str, float]:
    """The held-out metrics of a teacher that was not trained here."""
    model: Any = teacher
    device = PartialState().device
    loader: Any = run.held_out
    batches = DataLoader(loader, run.config.run.per_device_train_batch_size, collate_fn=run.collator(EVAL_SEED))
    return held_out_means(held_out_sums(model.to(device), None, batches, device))
