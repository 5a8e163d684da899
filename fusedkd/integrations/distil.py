"""`fusedkd distil`: an instruction-tuned teacher into a smaller student, on conversations.

    fusedkd distil --teacher Qwen/Qwen3-4B --student Qwen/Qwen3-0.6B --dataset chat.jsonl
    fusedkd cache --teacher Qwen/Qwen3-4B --dataset chat.jsonl --output cache
    fusedkd distil --mode offline --student Qwen/Qwen3-0.6B --dataset cache
    fusedkd distil --mode on_policy --teacher Qwen/Qwen3-4B --student Qwen/Qwen3-0.6B --dataset chat.jsonl

A row of the data has a column of messages, ``[{"role": "user", "content": …}, {"role": "assistant", …}]``. The
tokenizer's chat template makes tokens of them, and what the assistant says is what is learnt. The loss is
:class:`fusedkd.integrations.transformers.DistillationTrainer`'s, on-policy that of
:class:`fusedkd.integrations.on_policy.OnPolicyTrainer`. What comes out is `OUTPUT_DIR`, a folder for
``from_pretrained``, and in it `results.json`: held-out perplexity and KL to the teacher before and after, and the logs.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from rich.console import Console
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd import env
from fusedkd.divergences import FAMILIES
from fusedkd.integrations.command import UsageError, command_line, option, parse_divergence, parse_into, refused
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.distil_data import DataOptions, each_turn, rows_of
from fusedkd.integrations.interrupt import Arguments, Interruptible
from fusedkd.integrations.on_policy import OnPolicyTrainer
from fusedkd.integrations.run_folder import claim, contents, is_finished, shaping
from fusedkd.integrations.students import causal_model, spread_layers, student_of
from fusedkd.integrations.tokenizers import check_same_vocabulary
from fusedkd.integrations.transformers import DistillationTrainer
from fusedkd.teachers import TAILS


@dataclass
class ModelOptions:
    _argument_group_name = "models"
    teacher: str | None = option(None, "a causal language model: a folder, a name on the hub, or a .gguf file")
    student: str | None = option(None, "the same, with the teacher's tokenizer; default: made of the teacher's layers")
    student_layers: int = option(0, "of the teacher, evenly spread, for a student that is made; 0: half of them")
    lora_rank: int = option(0, "train adapters of this rank on all linear layers (needs peft); 0: all weights")
    dtype: Literal["float32", "bfloat16", "auto"] = option("float32", "of the student's weights; the teacher's is auto")


@dataclass
class LossOptions:
    _argument_group_name = "loss"
    mode: Literal["online", "offline", "on_policy"] = option(
        "online",
        "online: the teacher runs beside the student; offline: from the columns of the data; on_policy: on what the "
        "student itself answers",
    )
    divergence: str | None = option(
        None,
        "default: forward_kl, on_policy reverse_kl; parameters after a colon (jsd:beta=0.3): " + ", ".join(FAMILIES),
    )
    temperature: float = option(1.0, "softmax temperature of the KD term")
    kd_weight: float = option(1.0, "weight of the KD term")
    ce_weight: float = option(0.0, "weight of the cross-entropy with the given answers")
    tail: Literal[TAILS] = option("bucket", "offline: what becomes of the teacher's mass off the list")  # type: ignore[valid-type]
    logprobs_temperature: float = option(1.0, "offline: --temperature of `fusedkd cache`")
    max_new_tokens: int = option(128, "on_policy: of an answer")
    lmbda: float = option(1.0, "on_policy: share of the batches with the student's own answers; the rest: given ones")


@dataclass
class ChatArguments(Arguments):
    output_dir: str | None = option("runs/chat", "where everything goes")
    learning_rate: float = option(2e-5, "peak learning rate; adapters want about ten times as much")
    warmup_steps: float = option(0.05, "below 1: share of the steps with a rising learning rate; it falls afterwards")
    lr_scheduler_type: str = option("cosine", "how it falls")
    num_train_epochs: float = option(1.0, "passes over the conversations")
    per_device_train_batch_size: int = option(8, "conversations per device and forward pass")
    per_device_eval_batch_size: int = option(8, "the same in evaluation")
    max_grad_norm: float = option(1.0, "gradient clipping")
    logging_steps: float = option(10, "log every so many steps")
    report_to: None | str | list[str] = option("none", "tensorboard, wandb, ..., none")  # noqa: RUF036 (parser)


class ChatTrainer(Interruptible, DistillationTrainer):
    """Online and offline."""


class AnswerTrainer(Interruptible, OnPolicyTrainer):
    """On-policy."""

    def write(self, *given: Any) -> Any:
        with refused():  # prompts that leave no room for an answer, and none at all
            return super().write(*given)


Options = tuple[ModelOptions, DataOptions, LossOptions, ChatArguments]


def parse(argv: list[str] | None = None) -> Options:
    """The options of the command line; UsageError for what no run can have."""
    kinds = [ModelOptions, DataOptions, LossOptions, ChatArguments]
    models, data, loss, _ = found = parse_into(kinds, argv, "fusedkd distil")
    offline = loss.mode == "offline"
    wrong = {
        "--dataset is missing": not data.dataset,
        "--teacher is missing; without one there is --mode offline": not (models.teacher or offline),
        "--teacher does not go with --mode offline, whose teacher is in the data": models.teacher and offline,
        "--student is missing: --mode offline has no teacher from whose layers one is made": not models.student
        and offline,
        "--student_layers goes without --student, which is as it is": models.student and models.student_layers,
        "--student_layers must not be negative": models.student_layers < 0,
        "--lora_rank must not be negative": models.lora_rank < 0,
        "--lora_rank needs --student: adapters are saved without the model that they belong to": models.lora_rank
        and not models.student,
        "--held_out must not be negative": data.held_out < 0,
        "--max_length must be at least 2": data.max_length < 2,
        f"--lmbda must be in [0, 1], not {loss.lmbda:g}": not 0 <= loss.lmbda <= 1,
        "--packing does not go with --mode on_policy, whose answers are padded": data.packing
        and loss.mode == "on_policy",
        "--ce_weight does not go with --mode on_policy and --lmbda 1: the student would learn its own answers": (
            loss.ce_weight and loss.mode == "on_policy" and loss.lmbda == 1
        ),
    }
    if sentence := next((sentence for sentence, holds in wrong.items() if holds), None):
        raise UsageError(sentence)
    with refused():
        config_of(loss)
    return found  # type: ignore[return-value]


def distil(options: Options) -> dict[str, Any]:
    """Train, or find trained: what `results.json` holds."""
    models, data, loss, arguments = options
    folder, first = Path(str(arguments.output_dir)), arguments.process_index == 0
    console = Console(highlight=False, width=120, quiet=not first)
    settings = {**asdict(models), **asdict(data), **asdict(loss)}
    settings |= contents({name: settings[name] for name in ("teacher", "student", "dataset")}) | shaping(arguments)
    checkpoint = claim(folder, settings, arguments.resume_from_checkpoint)
    if is_finished(folder):
        console.print(f"finished: {folder}")
        return dict(json.loads((folder / "results.json").read_text()))
    teacher, student, tokenizer = models_of(models)
    with arguments.main_process_first():
        train, held_out = rows_of(data, tokenizer, loss.mode == "offline", console)
        train = each_turn(train) if loss.mode == "on_policy" else train
    with refused():
        trainer = trainer_of(options, student, teacher, tokenizer, train, held_out)
        trainer.data_collator([train[0]])  # refuses a cache of another temperature
    if trainer.pop_callback(PrinterCallback):  # there is no progress bar
        trainer.add_callback(Lines(console))
    found: dict[str, Any] = {"settings": settings, "versions": env.versions(), "machine": env.devices()}
    found["parameters"] = {"student": parameters(student)} | ({"teacher": parameters(teacher)} if teacher else {})
    if len(held_out):
        found["before"] = evaluated(trainer)
        console.print(f"[bold]before[/bold]: {shown(found['before'])}")
    found["seconds"] = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    if len(held_out):
        found["after"] = evaluated(trainer)
        console.print(f"[bold]after[/bold]: {shown(found['after'])}")
    found["log"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model()
    tokenizer.save_pretrained(folder)
    if trainer.is_world_process_zero():
        (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    trainer.save_state()  # last: now it is finished
    console.print(f"model, results.json: {folder}")
    return found


class Lines(TrainerCallback):
    """A line for each log, where no progress bar shows it."""

    def __init__(self, console: Console):
        self.console = console

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            found = {name: logs[name] for name in ("loss", "kd", "ce", "completion_length") if logs.get(name)}
            self.console.print(f"step {state.global_step:,} of {state.max_steps:,}: {shown(found)}")


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def evaluated(trainer: Any) -> dict[str, float]:
    found = trainer.evaluate()
    return {
        name.removeprefix("eval_"): found[name]
        for name in found
        if name.startswith(("eval_perp", "eval_kl", "eval_ce"))
    }


def shown(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


# ---- models


def models_of(options: ModelOptions) -> tuple[Any, Any, Tokenizer]:
    """Teacher, or None, student and the tokenizer of both."""
    teacher: Any = None
    tokenizer: Any = None
    if options.teacher:
        teacher, tokenizer = causal_model(options.teacher, "--teacher", "auto")
    if options.student:
        student, own = causal_model(options.student, "--student", options.dtype)
        if tokenizer is not None:
            try:
                check_same_vocabulary(own, tokenizer)
            except ValueError as error:
                raise UsageError(f"--student {options.student} has another vocabulary: {error}") from None
        tokenizer = own
    else:
        if teacher.config.get_text_config() is not teacher.config:
            raise UsageError(
                f"--student is missing: of {type(teacher).__name__}, which takes more than text, none is made"
            )
        depth = teacher.config.num_hidden_layers
        kept = options.student_layers or max(depth // 2, 1)
        if kept > depth:
            raise UsageError(f"--student_layers {kept}: the teacher has {depth}")
        student = student_of(teacher, spread_layers(depth, kept))
        student = student if options.dtype == "auto" else student.to(getattr(torch, options.dtype))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UsageError(f"the tokenizer of {tokenizer.name_or_path} has neither a pad_token nor an eos_token: set one")
    return teacher, adapted(student, options.lora_rank), tokenizer


def adapted(student: PreTrainedModel, rank: int) -> Any:
    """The student, or with adapters of this rank."""
    if not rank:
        return student
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise UsageError("--lora_rank needs the package peft") from None
    options: Any = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(student, LoraConfig(**options))


# ---- training


def config_of(options: LossOptions) -> KDConfig:
    name = options.divergence or ("reverse_kl" if options.mode == "on_policy" else "forward_kl")
    return KDConfig(
        temperature=options.temperature,
        divergence=parse_divergence(name, options.temperature),
        kd_weight=options.kd_weight,
        ce_weight=options.ce_weight,
        tail=options.tail,
        logprobs_temperature=options.logprobs_temperature,
    )


def trainer_of(
    options: Options,
    student: Any,
    teacher: Any,
    tokenizer: Tokenizer,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
) -> Any:
    _, data, loss, arguments = options
    common: dict[str, Any] = {"teacher": teacher, "args": arguments, "kd": config_of(loss)}
    common |= {"train_dataset": train, "processing_class": tokenizer}
    common["eval_dataset"] = held_out if len(held_out) else None
    common["data_collator"] = DataCollatorWithFlattening() if data.packing else DataCollatorForSeq2Seq(tokenizer)
    if loss.mode == "on_policy":
        return AnswerTrainer(student, max_new_tokens=loss.max_new_tokens, lmbda=loss.lmbda, **common)
    return ChatTrainer(student, **common)


def main(argv: list[str] | None = None) -> int:
    def run() -> None:
        distil(parse(argv))

    return command_line(run)


if __name__ == "__main__":
    sys.exit(main())
