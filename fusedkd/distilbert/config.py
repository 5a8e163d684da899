"""The options of the driver, as dataclasses that HfArgumentParser reads from flags and YAML files."""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from transformers.integrations import get_available_reporting_integrations

from fusedkd.divergences import FAMILIES
from fusedkd.integrations import presets
from fusedkd.integrations.command import UsageError, option, parse_divergence, parse_into
from fusedkd.integrations.interrupt import Arguments
from fusedkd.integrations.run_folder import by_name, shaping
from fusedkd.integrations.term import Term
from fusedkd.nn import DistilBertLoss

PUBLISHED_LOSS = DistilBertLoss()
METHODS = ("pkd", "tinybert", "minilm", "minilm_v2", "mobilebert", "ckd", "rail_kd", "alp_kd")
"""Those of :mod:`fusedkd.integrations.presets`."""


@dataclass
class TextOptions:
    _argument_group_name = "text"
    train_files: list[str] = option([], "text files, .gz too; default: the documentation that comes with Python")
    eval_files: list[str] = option([], "held-out text files; default: the last 5 % of the lines")
    dataset: str | None = option(None, "instead of files: a name or folder for datasets.load_dataset")
    dataset_config: str | None = option(None, "its configuration, e.g. wikitext-103-raw-v1")
    text_column: str = option("text", "its column of text")
    streaming: bool = option(False, "store and count nothing whole; held out: a validation split, or a twentieth")
    wikitext_escapes: bool = option(False, "map <unk> to [UNK] and undo @-@ @,@ @.@ (automatic where they are found)")
    vocab_file: str | None = option(None, "a BERT vocab.txt; default: train a WordPiece vocabulary on the text")
    vocab_size: int = option(4096, "size of the vocabulary that is trained")
    sequences: Literal["packed", "by_length"] = option(
        "packed", "packed: the lines joined and cut into blocks; by_length: a line each, in batches of like length"
    )
    block_size: int = option(None, "tokens per block, special ones included; default: 64, with --teacher 128")
    mlm_probability: float = option(None, "share of tokens masked; default: 0.4, with --teacher 0.15")
    mask_smoothing: float = option(None, "tokens are masked with p ~ count^-smoothing; default: 0, with --teacher 0.7")
    num_proc: int = option(1, "processes that tokenize")
    eval_blocks: int = option(256, "held-out blocks evaluated; 0: all")

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
        None, "a BERT, RoBERTa or GPT-2 with its tokenizer, folder or hub name; default: train a small BERT"
    )
    teacher_layers: int = option(4, "depth of the teacher that is trained")
    teacher_hidden: int = option(128, "its width")
    teacher_heads: int = option(4, "its attention heads")
    teacher_steps: int = option(900, "its optimiser steps")
    teacher_learning_rate: float = option(3e-3, "its peak learning rate")


@dataclass
class StudentOptions:
    _argument_group_name = "student"
    layers: str | None = option(None, "teacher layers to copy; default: alternate ones, 0,2,4,7,9,11 of 12")
    init: Literal["teacher", "random"] = option("teacher", "begin with the teacher's weights, or with random ones")
    fold_token_type: bool = option(False, "add BERT's token type 0 to the positions (exact) instead of dropping it")
    freeze_position_embeddings: bool = option(False, "keep the position embeddings as copied")
    freeze_token_embeddings: bool = option(False, "keep the token embeddings, and the head tied to them, as copied")


@dataclass
class LossOptions:
    _argument_group_name = "loss"
    temperature: float = option(PUBLISHED_LOSS.temperature, "softmax temperature of the KD term")
    alpha_distil: float = option(PUBLISHED_LOSS.alpha_distil, "weight of the KD term")
    alpha_mlm: float = option(PUBLISHED_LOSS.alpha_mlm, "weight of the masked-LM term (GPT-2: next token)")
    alpha_cos: float = option(PUBLISHED_LOSS.alpha_cos, "weight of the cosine term on hidden states")
    alpha_mse: float = option(0.0, "weight of the mean squared difference of the logits")
    divergence: str = option(
        "forward_kl", "of the KD term, parameters after a colon (jsd:beta=0.3): " + ", ".join(FAMILIES)
    )
    kd_on: Literal["attended", "masked"] = option("attended", "tokens of the KD term")
    terms: list[str] = option(
        [], "further terms, of the papers; a factor of their weights after a colon (minilm:0.5): " + ", ".join(METHODS)
    )
    cos_layers: Literal["last", "copied"] = option(
        "last", "hidden states of the cosine term: the last, or of each student layer and the one it was copied from"
    )


@dataclass
class DistilArguments(Arguments):
    """With DistilBERT's optimiser. Steps of evaluation, logs and checkpoints: below 1 a share of all steps."""

    output_dir: str | None = option("runs/distilbert", "where everything goes; what is finished there is reused")
    max_steps: int = option(120, "optimiser steps of the student")
    learning_rate: float = option(None, "peak learning rate of the student; default: 1e-3, with --teacher 5e-4")
    per_device_train_batch_size: int = option(32, "blocks per device and forward pass")
    per_device_eval_batch_size: int = option(32, "the same in evaluation")
    warmup_steps: float = option(0.05, "steps with a rising learning rate; it falls linearly afterwards")
    max_grad_norm: float = option(5.0, "gradient clipping")
    adam_beta2: float = option(0.98, "of AdamW")
    adam_epsilon: float = option(1e-6, "of AdamW")
    eval_strategy: str = option("steps", "when to evaluate")
    eval_steps: float | None = option(0.2, "evaluate every so many steps")
    eval_on_start: bool = option(True, "evaluate the model as it begins")
    logging_steps: float = option(10, "log every so many steps")
    save_steps: float = option(0.2, "a checkpoint every so many steps")
    report_to: None | str | list[str] = option("tensorboard", "tensorboard, wandb, ..., none")  # noqa: RUF036 (parser)
    seed: int = option(56, "of the student's training")
    use_cache: bool = option(True, "what the exported GPT-2 says of generation; training makes no cache")


@dataclass
class Config:
    text: TextOptions
    teacher: TeacherOptions
    student: StudentOptions
    loss: LossOptions
    training: DistilArguments

    @property
    def folder(self) -> Path:
        return Path(str(self.training.output_dir))

    def settings(self) -> dict[str, Any]:
        """What a student depends on, flat; local inputs by their last names, since a run adds checksums of what it has
        read.
        """
        groups = (self.text, self.teacher, self.student, self.loss)
        flat: dict[str, Any] = {name: value for group in groups for name, value in asdict(group).items()}
        flat |= shaping(self.training)
        return {name: by_name(value) if name in INPUTS else value for name, value in flat.items()}

    def teacher_settings(self) -> dict[str, Any]:
        """What a teacher that is trained here depends on."""
        others = {*asdict(self.student), *asdict(self.loss), "max_steps", "learning_rate"}
        return {name: value for name, value in self.settings().items() if name not in others}


# A teacher trained here sees few tokens: mask many, and all alike, since 40 % of the rarest would leave no context.
# A teacher from elsewhere brings the published recipe.
TRAINED_HERE: dict[str, Any] = {"block_size": 64, "mlm_probability": 0.4, "mask_smoothing": 0.0, "learning_rate": 1e-3}
PUBLISHED: dict[str, Any] = {"block_size": 128, "mlm_probability": 0.15, "mask_smoothing": 0.7, "learning_rate": 5e-4}

INPUTS = ("train_files", "eval_files", "vocab_file", "dataset", "teacher")
POSITIVE = {"vocab_size", "num_proc", "teacher_layers", "teacher_hidden", "teacher_heads", "teacher_steps"}
POSITIVE |= {"teacher_learning_rate", "learning_rate", "temperature", "per_device_train_batch_size", "eval_steps"}
POSITIVE |= {"gradient_accumulation_steps", "num_train_epochs", "max_length", "per_device_eval_batch_size"}
NOT_NEGATIVE = {"alpha_distil", "alpha_mlm", "alpha_cos", "alpha_mse", "alpha_kd", "alpha_hard", "mask_smoothing"}
NOT_NEGATIVE |= {"eval_blocks", "weight_decay", "max_grad_norm", "doc_stride", "max_train_examples"}


def parse(argv: list[str] | None, prog: str = "python -m fusedkd.distilbert", more: Sequence[Any] = ()) -> Any:
    """The driver's options, and in a tuple with them those of `more` dataclasses; refuses what no run can have."""
    classes = [*(f.type for f in fields(Config)), *more]
    options = parse_into(classes, argv, prog, lambda given: PUBLISHED if given.teacher else TRAINED_HERE)
    count = len(classes) - len(more)
    config = Config(*options[:count])
    check(config)
    return (config, *options[count:]) if more else config


# ---- what is refused


def check(config: Config) -> None:
    text, loss, teacher, training = config.text, config.loss, config.teacher, config.training
    files = [*text.train_files, *text.eval_files, *([text.vocab_file] if text.vocab_file else [])]
    absent = next((name for name in files if not Path(name).is_file()), None)
    wrong = {
        "--dataset and --train_files exclude each other": text.dataset and text.train_files,
        "--eval_files needs --train_files": text.eval_files and not text.train_files,
        "--streaming needs --train_files or --dataset": text.streaming and not (text.dataset or text.train_files),
        "--streaming needs --sequences packed": text.streaming and text.sequences == "by_length",
        f"no such file: {absent} (a folder of text can be a --dataset)": absent,
        f"--block_size must be at least 8, not {text.block_size}": text.block_size < 8,
        f"--mlm_probability must lie between 0 and 1, not {text.mlm_probability}": not 0 < text.mlm_probability < 1,
        "--teacher_hidden must be a multiple of twice --teacher_heads": teacher.teacher_hidden
        % (2 * max(teacher.teacher_heads, 1)),
        "--max_steps must be positive": training.max_steps <= 0,
        "--fsdp needs an accelerator: on CPUs it would be data parallelism alone": training.fsdp and training.use_cpu,
        "several accelerators: torchrun --nproc_per_node N -m ..., or CUDA_VISIBLE_DEVICES=0": training.n_gpu > 1,
        "every weight of the loss is 0": not any(
            (loss.alpha_distil, loss.alpha_mlm, loss.alpha_cos, loss.alpha_mse, loss.terms)
        ),
    }
    refuse(wrong, *(getattr(config, f.name) for f in fields(config)))
    parse_divergence(loss.divergence, loss.temperature)
    parse_terms(loss)


def refuse(wrong: dict[str, Any], *groups: Any) -> None:
    """UsageError for the first sentence that holds, or the first option of a group that is out of range."""
    found, trackers = [sentence for sentence, holds in wrong.items() if holds], get_available_reporting_integrations()
    for group in groups:
        given = {name: value for name, value in vars(group).items() if isinstance(value, int | float)}
        found += [f"--{name} must be positive" for name, value in given.items() if name in POSITIVE and value <= 0]
        found += [f"--{n} must not be negative" for n, value in given.items() if n in NOT_NEGATIVE and value < 0]
        if smoothing := getattr(group, "label_smoothing_factor", 0):
            found.append(f"--label_smoothing_factor must be 0, not {smoothing:g}: the losses here have none")
        absent = set(getattr(group, "report_to", [])) - set(trackers)
        found += [f"--report_to {name}: not installed; there are {', '.join(trackers)}, none" for name in absent]
    if found:
        raise UsageError(found[0])


def parse_terms(options: Any) -> list[Term]:
    """The terms that `name` or `name:factor` describe."""
    found = []
    for text in options.terms:
        name, _, given = text.partition(":")
        if name not in METHODS:
            raise UsageError(f"--terms {name}: it must be one of {', '.join(METHODS)}")
        try:
            factor = float(given or 1)
        except ValueError:
            raise UsageError(f"--terms {text}: a factor must follow the colon, not {given!r}") from None
        if not 0 < factor < math.inf:
            raise UsageError(f"--terms {text}: the factor must be positive")
        found += [replace(term, weight=factor * term.weight) for term in getattr(presets, name)()["terms"]]
    return found
