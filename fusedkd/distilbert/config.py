"""The options of the driver, one dataclass per group of `--help`, and the settings that guard an output folder."""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import gzip
import json
import zlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import xxhash
from accelerate import PartialState

from fusedkd.distilbert.options import UsageError, check_signs, check_tracker, option, parse_into
from fusedkd.divergences import FAMILIES, Divergence
from fusedkd.nn import DistilBertLoss

PUBLISHED_LOSS = DistilBertLoss()

__all__ = ["Config", "UsageError", "check_folder", "option", "parse", "parse_divergence", "parse_into"]


@dataclass
class TextOptions:
    _argument_group_name = "text"
    train_files: list[str] = option(
        [], "text files to train on, .gz too; default: the documentation that comes with Python", metavar="FILE"
    )
    eval_files: list[str] = option([], "held-out text files; default: the last 5 % of the lines", metavar="FILE")
    dataset: str | None = option(None, "instead of files: a name or folder for datasets.load_dataset", metavar="NAME")
    dataset_config: str | None = option(None, "its configuration, e.g. wikitext-103-raw-v1", metavar="NAME")
    text_column: str = option("text", "its column of text", metavar="NAME")
    streaming: bool = option(
        False, "read the text as a stream: nothing is stored or counted whole; held out is a twentieth of the lines "
        "unless there is a validation split"
    )  # fmt: skip
    wikitext_escapes: bool = option(False, "map <unk> to [UNK] and undo @-@ @,@ @.@ (automatic where they are found)")
    vocab_file: str | None = option(
        None, "a BERT vocab.txt; default: train a WordPiece vocabulary on the text", metavar="FILE"
    )
    vocab_size: int = option(4096, "size of the vocabulary that is trained")
    sequences: Literal["packed", "by_length"] = option(
        "packed", "packed: the lines joined and cut into blocks; by_length: a line each, in batches of like length"
    )
    block_size: int = option(None, "tokens per block, special ones included; default: 64, with --teacher 128")
    mlm_probability: float = option(None, "share of tokens masked; default: 0.4, with --teacher 0.15")
    mask_smoothing: float = option(None, "tokens are masked with p ~ count^-smoothing; default: 0, with --teacher 0.7")
    num_proc: int = option(1, "processes that tokenize")

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """TrainingArguments without which the Trainer would not read `data.in_order`'s data set in its order."""
        if self.streaming:
            return {"accelerator_config": {"dispatch_batches": False}}  # batches differ in length
        return {"train_sampling_strategy": "sequential"} if self.sequences == "by_length" else {}


@dataclass
class TeacherOptions:
    _argument_group_name = "teacher"
    teacher: str | None = option(
        None, "a BERT, RoBERTa or GPT-2 with its tokenizer, folder or hub name; default: train a small BERT",
        metavar="NAME",
    )  # fmt: skip
    teacher_layers: int = option(4, "depth of the teacher that is trained")
    teacher_hidden: int = option(128, "its width")
    teacher_heads: int = option(4, "its attention heads")
    teacher_steps: int = option(900, "its optimiser steps")
    teacher_learning_rate: float = option(3e-3, "its peak learning rate")


@dataclass
class StudentOptions:
    _argument_group_name = "student"
    layers: str | None = option(
        None, "teacher layers to copy; default: alternate ones, 0,2,4,7,9,11 of 12", metavar="I,J,..."
    )
    init: Literal["teacher", "random"] = option(
        "teacher", "start from copies of the teacher's weights, or from random ones"
    )
    fold_token_type: bool = option(False, "add BERT's token type 0 to the positions (exact) instead of dropping it")
    freeze_position_embeddings: bool = option(False, "keep the position embeddings as copied")
    freeze_token_embeddings: bool = option(False, "keep the token embeddings, and the head tied to them, as copied")


@dataclass
class LossOptions:
    _argument_group_name = "loss"
    temperature: float = option(PUBLISHED_LOSS.temperature, "softmax temperature of the KD term")
    alpha_distil: float = option(PUBLISHED_LOSS.alpha_distil, "weight of the KD term")
    alpha_mlm: float = option(
        PUBLISHED_LOSS.alpha_mlm, "weight of the masked-language-modelling term (GPT-2: next token)"
    )
    alpha_cos: float = option(PUBLISHED_LOSS.alpha_cos, "weight of the cosine term on hidden states")
    alpha_mse: float = option(0.0, "weight of the mean squared difference of the logits")
    divergence: str = option(
        "forward_kl", "of the KD term, parameters after a colon (jsd:beta=0.3): " + ", ".join(FAMILIES), metavar="NAME"
    )
    kd_on: Literal["attended", "masked"] = option("attended", "tokens of the KD term")
    cos_layers: Literal["last", "copied"] = option(
        "last", "hidden states of the cosine term: the last, or of each student layer and the one it was copied from"
    )


@dataclass
class RunOptions:
    _argument_group_name = "training (teacher and students)"
    output_dir: str = option(
        "runs/distilbert", "where everything goes; finished stages found there are reused", metavar="FOLDER"
    )
    student_steps: int = option(120, "optimiser steps of each student")
    learning_rate: float = option(None, "peak learning rate of the students; default: 1e-3, with --teacher 5e-4")
    seeds: int = option(None, "repeat the students with this many seeds; default: 1, of ablate 3")
    arms: list[str] | None = option(
        None, "students to compare, see the description; default: full and mlm_alone, with --teacher full, "
        "of ablate all but mlm_alone", metavar="ARM"
    )  # fmt: skip
    per_device_train_batch_size: int = option(32, "blocks per device and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per optimiser step")
    warmup_ratio: float = option(0.05, "share of the steps with a rising learning rate; it falls linearly afterwards")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    max_grad_norm: float = option(5.0, "gradient clipping")
    bf16: bool = option(False, "mixed precision, bfloat16")
    fp16: bool = option(False, "mixed precision, float16")
    fsdp: bool = option(False, "shard parameters, gradients and optimiser over the devices (FSDP2)")
    eval_steps: int = option(20, "evaluate the students every so many steps (the teacher at the same number of points)")
    eval_blocks: int = option(256, "held-out blocks evaluated; 0: all")
    logging_steps: int = option(10, "log every so many steps")
    save_steps: int = option(
        None, "checkpoint every so many steps; default: five times per model, and every 200 steps at least"
    )
    report_to: str = option("tensorboard", "trackers of the Trainer: tensorboard, wandb, ..., none", metavar="NAME")
    dataloader_num_workers: int = option(0, "processes that mask and pad")
    seed: int = option(56, "first seed")
    resume_from_checkpoint: bool = option(False, "continue an interrupted stage from its last checkpoint")


@dataclass
class TaskOptions:
    _argument_group_name = "tasks (fine-tuning of the teacher and every student, as by finetune)"
    tasks: list[str] | None = option(
        None, "sst2, cola, rte, stsb, ...; default: none, of ablate sst2 stsb", metavar="TASK"
    )
    glue_dir: str | None = option(None, "folder of GLUE's files; default: the hub's nyu-mll/glue", metavar="FOLDER")
    task_epochs: int = option(3, "passes over a task's training data")
    task_examples: int = option(0, "training examples of a task; 0: all")
    task_learning_rate: float = option(5e-5, "peak learning rate")
    task_batch_size: int = option(32, "examples per step")

    @property
    def finetune(self) -> dict[str, Any]:
        """As options of `finetune`."""
        return {
            "glue_dir": self.glue_dir,
            "epochs": self.task_epochs,
            "max_train_examples": self.task_examples,
            "learning_rate": self.task_learning_rate,
            "per_device_train_batch_size": self.task_batch_size,
        }


# A teacher trained here sees few tokens: mask many, and all alike, since 40 % of the rarest would leave no context.
# A teacher from elsewhere brings the published recipe. These fill in what the command line leaves at None.
TRAINED_HERE: dict[str, Any] = {"block_size": 64, "mlm_probability": 0.4, "mask_smoothing": 0.0, "learning_rate": 1e-3}
PUBLISHED: dict[str, Any] = {"block_size": 128, "mlm_probability": 0.15, "mask_smoothing": 0.7, "learning_rate": 5e-4}
TRAINED_HERE |= {"arms": ["full", "mlm_alone"], "seeds": 1, "tasks": []}
PUBLISHED |= {"arms": ["full"], "seeds": 1, "tasks": []}
ABLATION = {"arms": ["full", "no_cos", "no_mlm", "no_distil", "random_init"], "seeds": 3, "tasks": ["sst2", "stsb"]}

# Options that may change between two runs in the same folder: they do not change what a finished stage is.
FREE = {"output_dir", "seeds", "arms", "logging_steps", "save_steps", "report_to", "resume_from_checkpoint"}
FREE |= {"dataloader_num_workers", *TaskOptions.__dataclass_fields__}

# Options that matter to students alone: they may change as long as none has begun.
OF_STUDENTS = {
    *StudentOptions.__dataclass_fields__,
    *LossOptions.__dataclass_fields__,
    "student_steps",
    "learning_rate",
}

INPUTS = ("train_files", "eval_files", "vocab_file", "dataset", "teacher")  # may name files: known by content

POSITIVE = {"vocab_size", "teacher_layers", "teacher_hidden", "teacher_heads", "teacher_steps", "student_steps"}
POSITIVE |= {"per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "logging_steps", "save_steps"}
POSITIVE |= {"learning_rate", "teacher_learning_rate", "seeds", "temperature", "num_proc"}
POSITIVE |= {"task_epochs", "task_learning_rate", "task_batch_size"}

NOT_NEGATIVE = {"alpha_distil", "alpha_mlm", "alpha_cos", "alpha_mse", "mask_smoothing", "weight_decay", "warmup_ratio"}
NOT_NEGATIVE |= {"eval_blocks", "max_grad_norm", "dataloader_num_workers", "task_examples"}


@dataclass
class Config:
    text: TextOptions
    teacher: TeacherOptions
    student: StudentOptions
    loss: LossOptions
    run: RunOptions
    tasks: TaskOptions

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)

    def settings(self, everything: bool = False) -> dict[str, Any]:
        """What the results depend on (or all there is); local inputs by name, without their folders, and by content.

        `inputs` has a line for each local file: option, name, size, hash.
        """
        flat: dict[str, Any] = {}
        for group in fields(self):
            flat |= {k: v for k, v in asdict(getattr(self, group.name)).items() if everything or k not in FREE}
        inputs: list[str] = []
        for name in INPUTS:
            values = flat[name] if isinstance(flat[name], list) else [flat[name]]
            local = [Path(value).exists() if value else False for value in values]
            for value in (v for v, here in zip(values, local, strict=True) if here):
                inputs += [f"--{name} {file}" for file in contents(Path(value))]
            names = [Path(v).resolve().name if here else v for v, here in zip(values, local, strict=True)]
            flat[name] = names if isinstance(flat[name], list) else names[0]
        return flat | {"processes": PartialState().num_processes, "inputs": inputs}


def contents(path: Path) -> Iterator[str]:
    """`name: bytes, hash` of a file, or of every file of a folder."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    for file in files:
        stat = file.stat()
        name = path.resolve().name if file == path else file.relative_to(path).as_posix()
        yield f"{name}: {stat.st_size} bytes, xxh3 {digest(file, stat.st_size, stat.st_mtime_ns)}"


@cache
def digest(file: Path, size: int, changed: int) -> str:
    """A hash of the content, computed once while size and time of change stay."""
    content = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            content.update(part)
    return content.hexdigest()


def parse_divergence(text: str) -> Divergence:
    """The divergence that `name` or `name:parameter=value,...` describes."""
    name, _, parameters = text.partition(":")
    if name not in FAMILIES:
        raise UsageError(f"--divergence {name}: it must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    values: dict[str, Any] = {}
    for item in parameters.split(",") if parameters else []:
        key, _, value = item.partition("=")
        if key not in (known := {f.name: f.type for f in fields(family)}):
            has = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
            raise UsageError(f"--divergence {text}: {name} has no {key!r}; {has}")
        try:
            values[key] = json.loads(value.lower())
        except ValueError:
            raise UsageError(f"--divergence {text}: {key} must be a number, not {value!r}") from None
    try:
        return family(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--divergence {text}: {error}") from None


DISTIL = """Distil BERT, RoBERTa or GPT-2 into a student of half the layers. Without arguments: everything, teacher
included, from Python's own documentation, in a few minutes on a CPU. --arms names the students that are compared: full
(the loss of the options), no_cos, no_mlm, no_distil (without that term), random_init, mlm_alone."""
ABLATE = """Table 4 of the DistilBERT paper: students without one of the terms each, and one from random weights,
several seeds, then fine-tuning on tasks; a table and a picture. The options are those of distil."""


def parse(argv: list[str] | None, prog: str = "python -m fusedkd.distilbert", ablation: bool = False) -> Config:
    """Read the command line, fill in the recipe and refuse what can be refused without reading any text."""
    classes = [f.type for f in fields(Config)]
    config = Config(*parse_into(classes, argv, prog, " ".join((ABLATE if ablation else DISTIL).split())))
    recipe = PUBLISHED if config.teacher.teacher else TRAINED_HERE
    for name, value in (recipe | (ABLATION if ablation else {})).items():
        for group in (config.text, config.run, config.tasks):
            if getattr(group, name, 0) is None:
                setattr(group, name, value)
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse values that no run can have."""
    text, loss = config.text, config.loss
    if text.dataset and text.train_files:
        raise UsageError("--dataset and --train_files exclude each other (--dataset '' undoes that of a --config)")
    if text.eval_files and not text.train_files:
        raise UsageError("--eval_files needs --train_files")
    if text.streaming and not (text.dataset or text.train_files):
        raise UsageError("--streaming needs --train_files or --dataset")
    if text.streaming and text.sequences == "by_length":
        raise UsageError("--streaming needs --sequences packed: the lengths of a stream are not known")
    for name in [*text.train_files, *text.eval_files, *([text.vocab_file] if text.vocab_file else [])]:
        if Path(name).is_dir():
            raise UsageError(f"{name} is a folder, not a file (a folder of text can be a --dataset)")
        if not Path(name).is_file():
            raise UsageError(f"no such file: {name}")
    for which, files in (("training", text.train_files), ("held-out", text.eval_files)):
        if files and all(map(is_empty, files)):
            raise UsageError(f"the {which} text is empty: {', '.join(files)}")
    if text.block_size < 8:
        raise UsageError(f"--block_size must be at least 8, not {text.block_size}")
    if not 0 < text.mlm_probability < 1:
        raise UsageError(f"--mlm_probability must lie between 0 and 1, not {text.mlm_probability}")
    for group in fields(config):
        check_signs(getattr(config, group.name), POSITIVE, NOT_NEGATIVE)
    if config.teacher.teacher_hidden % (2 * config.teacher.teacher_heads):
        raise UsageError("--teacher_hidden must be a multiple of twice --teacher_heads")
    check_tracker(config.run.report_to)
    if config.run.bf16 and config.run.fp16:
        raise UsageError("--bf16 and --fp16 exclude each other")
    if parse_divergence(loss.divergence).temperature_power == 0 and loss.temperature != 1:
        raise UsageError(f"--divergence {loss.divergence} needs --temperature 1")


def is_empty(file: str) -> bool:
    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as stream:
            return not stream.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None


def check_folder(config: Config, free: Collection[str] | None = ()) -> None:
    """Refuse an output folder that holds anything but an earlier run with the same settings.

    Those in `free` may have changed (None: all, and the inputs), since nothing kept there depends on them.
    """
    folder, run = config.folder, config.folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file")
    if run.is_file():
        try:
            before = dict(json.loads(run.read_text()))
        except (ValueError, TypeError):
            raise UsageError(f"{folder} holds something else (its run.json is not ours): choose another") from None
        if free is None:
            return
        now = json.loads(json.dumps(config.settings()))
        inputs = now.pop("inputs")
        for name in (name for name in now if name not in free):
            if before.get(name) != now[name]:
                was = f"--{name} {before.get(name)}, not {now[name]}"
                raise UsageError(f"{folder} holds a run with {was}: choose another --output_dir")
        if changed := set(inputs) ^ set(before.get("inputs", [])):
            which = min(changed).split(":")[0]
            raise UsageError(f"{folder} holds a run with another content of {which}: choose another --output_dir")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something else (no run.json): choose another --output_dir")
