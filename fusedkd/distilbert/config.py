"""The options of the driver, one dataclass per group of `--help`, and the settings that guard an output folder."""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser


class UsageError(Exception):
    """Something the user can put right: one line on stderr, exit code 2."""


def option(default: Any, text: str) -> Any:
    """A dataclass field with its line of `--help`."""
    text = text.replace("%", "%%")  # argparse formats help with %
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TextOptions:
    _argument_group_name = "text"
    train_files: list[str] = option(
        [], "text files to train on, .gz too; none: the documentation that comes with Python"
    )
    eval_files: list[str] = option([], "held-out text files; none: the last 5 % of the lines")
    dataset: str | None = option(None, "instead of files: a name or folder for datasets.load_dataset")
    dataset_config: str | None = option(None, "its configuration, e.g. wikitext-103-raw-v1")
    text_column: str = option("text", "its column of text")
    wikitext_escapes: bool = option(False, "map <unk> to [UNK] and undo @-@ @,@ @.@ (automatic where they are found)")
    vocab_file: str | None = option(None, "a BERT vocab.txt; None: train a WordPiece vocabulary on the text")
    vocab_size: int = option(4096, "size of the vocabulary that is trained")
    block_size: int = option(None, "tokens per block with [CLS] and [SEP]; None: 64, with --teacher 128")
    mlm_probability: float = option(None, "share of tokens masked; None: 0.4, with --teacher 0.15")
    mask_smoothing: float = option(None, "tokens are masked with p ~ count^-smoothing; None: 0, with --teacher 0.7")


@dataclass
class TeacherOptions:
    _argument_group_name = "teacher"
    teacher: str | None = option(None, "a BertForMaskedLM with tokenizer, folder or hub name; None: train a small one")
    teacher_layers: int = option(4, "depth of the teacher that is trained")
    teacher_hidden: int = option(128, "its width")
    teacher_heads: int = option(4, "its attention heads")
    teacher_steps: int = option(1200, "its optimiser steps")
    teacher_learning_rate: float = option(3e-3, "its peak learning rate")


@dataclass
class StudentOptions:
    _argument_group_name = "distillation"
    student_steps: int = option(120, "optimiser steps of each student")
    learning_rate: float = option(None, "peak learning rate of the students; None: 1e-3, with --teacher 5e-4")
    seeds: int = option(1, "repeat both students with this many seeds and report mean and spread")
    temperature: float = option(2.0, "softmax temperature of the KD term")
    alpha_distil: float = option(5.0, "weight of the KD term")
    alpha_mlm: float = option(2.0, "weight of the masked-language-modelling term")
    alpha_cos: float = option(1.0, "weight of the cosine term on the last hidden states")
    kd_on: Literal["attended", "masked"] = option("attended", "tokens of the KD term")


@dataclass
class RunOptions:
    _argument_group_name = "training (teacher and students)"
    output_dir: str = option("runs/distilbert", "where everything goes; finished stages found there are reused")
    per_device_train_batch_size: int = option(32, "blocks per device and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per optimiser step")
    warmup_ratio: float = option(0.05, "share of the steps with a rising learning rate; it falls linearly afterwards")
    max_grad_norm: float = option(5.0, "gradient clipping")
    bf16: bool = option(False, "mixed precision, bfloat16")
    fp16: bool = option(False, "mixed precision, float16")
    eval_steps: int = option(20, "evaluate the students every so many steps (the teacher at the same number of points)")
    eval_blocks: int = option(256, "held-out blocks evaluated (0: all)")
    logging_steps: int = option(10, "log every so many steps")
    save_steps: int = option(200, "checkpoint every so many steps")
    report_to: str = option("tensorboard", "trackers of the Trainer: tensorboard, wandb, ..., none")
    dataloader_num_workers: int = option(0, "processes that mask and pad")
    seed: int = option(56, "first seed")
    resume_from_checkpoint: bool = option(False, "continue an interrupted stage from its last checkpoint")


# A teacher trained here sees few tokens: mask many, and all alike, since 40 % of the rarest would leave no context.
# A teacher from elsewhere brings the published recipe. These fill in what the command line leaves at None.
TRAINED_HERE = {"block_size": 64, "mlm_probability": 0.4, "mask_smoothing": 0.0, "learning_rate": 1e-3}
PUBLISHED = {"block_size": 128, "mlm_probability": 0.15, "mask_smoothing": 0.7, "learning_rate": 5e-4}

# Options that may change between two runs in the same folder: they do not change what a finished stage is.
FREE = {"output_dir", "seeds", "logging_steps", "save_steps", "report_to", "resume_from_checkpoint"}
FREE |= {"dataloader_num_workers"}

POSITIVE = {"vocab_size", "teacher_layers", "teacher_hidden", "teacher_heads", "teacher_steps", "student_steps"}
POSITIVE |= {"per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "logging_steps", "save_steps"}
POSITIVE |= {"learning_rate", "teacher_learning_rate", "seeds", "temperature"}


@dataclass
class Config:
    text: TextOptions
    teacher: TeacherOptions
    student: StudentOptions
    run: RunOptions

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)

    def settings(self, everything: bool = False) -> dict[str, Any]:
        """What the results depend on (or all there is); input files by name only, so that results can be published."""
        flat: dict[str, Any] = {}
        for group in fields(self):
            flat |= {k: v for k, v in asdict(getattr(self, group.name)).items() if everything or k not in FREE}
        for name in ("train_files", "eval_files"):
            flat[name] = [Path(f).name for f in flat[name]]
        for name in ("vocab_file", "teacher", "dataset"):
            if flat[name] and Path(flat[name]).exists():
                flat[name] = Path(flat[name]).name
        return flat


def parse(argv: list[str] | None) -> Config:
    """Read the command line, fill in the recipe and refuse what can be refused without reading any text."""
    groups: Any = (TextOptions, TeacherOptions, StudentOptions, RunOptions)
    parser = HfArgumentParser(
        groups,
        prog="python -m fusedkd.distilbert",
        usage="%(prog)s [options]",
        description="Distil a BertForMaskedLM into a DistilBERT student, and measure it against the same student "
        "trained by masked-language modelling alone. Without arguments: everything, teacher included, from "
        "Python's own documentation, in a few minutes on a CPU.",
    )
    *options, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise UsageError(f"no such option: {' '.join(unknown)} (see --help)")
    config = Config(*options)
    for name, value in (PUBLISHED if config.teacher.teacher else TRAINED_HERE).items():
        for group in (config.text, config.student):
            if getattr(group, name, 0) is None:
                setattr(group, name, value)

    text = config.text
    if text.dataset and text.train_files:
        raise UsageError("--dataset and --train_files exclude each other")
    if text.eval_files and not text.train_files:
        raise UsageError("--eval_files needs --train_files")
    for name in [*text.train_files, *text.eval_files, *([text.vocab_file] if text.vocab_file else [])]:
        if not Path(name).is_file():
            raise UsageError(f"no such file: {name}")
    if text.block_size < 8:
        raise UsageError(f"--block_size must be at least 8, not {text.block_size}")
    if not 0 < text.mlm_probability < 1:
        raise UsageError(f"--mlm_probability must lie between 0 and 1, not {text.mlm_probability}")
    values = config.settings(everything=True)
    for name in sorted(POSITIVE):
        if values[name] <= 0:
            raise UsageError(f"--{name} must be positive")
    for name in ("alpha_distil", "alpha_mlm", "alpha_cos"):
        if values[name] < 0:
            raise UsageError(f"--{name} must not be negative")
    if config.teacher.teacher_hidden % (2 * config.teacher.teacher_heads):
        raise UsageError("--teacher_hidden must be a multiple of twice --teacher_heads")
    if config.run.bf16 and config.run.fp16:
        raise UsageError("--bf16 and --fp16 exclude each other")
    return config


def check_folder(config: Config) -> None:
    """Refuse an output folder that holds anything but an earlier run with the same settings."""
    folder, run = config.folder, config.folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file")
    if run.is_file():
        try:
            before = dict(json.loads(run.read_text()))
        except (ValueError, TypeError):
            raise UsageError(f"{folder} holds something else (its run.json is not ours): choose another") from None
        now = json.loads(json.dumps(config.settings()))
        for name in now:
            if before.get(name) != now[name]:
                was = f"--{name} {before.get(name)}, not {now[name]}"
                raise UsageError(f"{folder} holds a run with {was}: choose another --output_dir")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something else (no run.json): choose another --output_dir")
