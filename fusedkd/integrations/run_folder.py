"""Whose a folder is: a run's, with its settings, and no other run takes what it holds for its own."""

import fnmatch
import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.interrupt import STATE, last_checkpoint

# -------------------------------------------------- settings

SHAPING = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
           "learning_rate", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay", "max_grad_norm",
           "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16",
           "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha",
           "eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model",
           "greater_is_better")  # fmt: skip
"""Of TrainingArguments, what the result of a training depends on: its model, and the curve of its evaluations."""

MODEL = ("*config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "*token*.json", "vocab*", "merges.txt",
         "*.model", "chat_template*")  # fmt: skip
"""In the folder of a model, the files of which it is loaded; beside them are those that tell of it."""

PIECE, PIECES = 2**20, 64
"""Of a larger file, so many bytes in so many places are read: weights of gigabytes take a fraction of a second."""


def shaping(arguments: Any, *without: str) -> dict[str, Any]:
    """The settings of a training, but for these."""
    its = {name: getattr(arguments, name) for name in SHAPING} | {"processes": arguments.world_size}
    return {name: value for name, value in its.items() if name not in without}


def by_name(value: Any) -> Any:
    """A local file or folder without those it is in."""
    if isinstance(value, list):
        return [by_name(each) for each in value]
    return Path(value).resolve().name if value and Path(value).exists() else value


def contents(inputs: dict[str, Any]) -> dict[str, str]:
    """What names do not tell: `NAME_sha256` of each input that is a local file or folder, or a list of them."""
    found = {}
    for name, value in inputs.items():
        paths = [Path(each) for each in (value if isinstance(value, list) else [value]) if each]
        if files := [file for path in paths for file in _files(path)]:
            found[f"{name}_sha256"] = _digest(files)
    return found


def _files(path: Path) -> Iterator[Path]:
    """The file, or those of a folder: of a model, or of data without what `datasets` has made of it."""
    if path.is_file():
        yield path
    elif (path / "config.json").is_file():
        yield from sorted(f for f in path.iterdir() if any(fnmatch.fnmatch(f.name, kind) for kind in MODEL))
    else:
        yield from sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith((".", "cache-", "tmp")))


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        count = min(PIECES, -(-size // PIECE))
        with file.open("rb") as content:
            for i in range(count):  # the last one ends where the file does
                content.seek(i * (size - PIECE) // max(count - 1, 1))
                found.update(content.read(PIECE))
    return found.hexdigest()[:16]


def check_settings(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """UsageError where they are not those of the run that the folder holds. What is not written of that one was the
    Trainer's default.
    """
    unwritten = {field.name: field.default for field in fields(TrainingArguments)} | {"processes": 1}
    for name, now in json.loads(json.dumps(settings)).items():
        if (was := before.get(name, unwritten.get(name))) != now:
            raise UsageError(f"{folder} holds a run with {name} {was}, not {now}: choose another --output_dir")


# -------------------------------------------------- folders


def claim(folder: Path, settings: dict[str, Any], resume: bool, kept: bool | None = None) -> str | None:
    """Make the folder that of a run with these settings, kept in its run.json; the checkpoint to go on from.

    UsageError where the folder holds anything else, also a run with other settings of which something is kept, or a
    checkpoint that is not wanted, since training would replace it. `kept`: whether something is; None: whether a
    finished model or a checkpoint is.
    """
    file, checkpoint = folder / "run.json", last_checkpoint(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not file.is_file()):
        raise UsageError(f"{folder} holds something else (no run.json): choose another --output_dir")
    kept = is_kept(folder) if kept is None else kept
    if kept:
        try:
            before = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise UsageError(f"{folder} holds something else (its run.json is not ours): choose another") from None
        check_settings(folder, before, settings)
    if checkpoint and not resume and not is_finished(folder):
        raise UsageError(
            f"{folder} holds a run that did not end: --resume_from_checkpoint goes on from {Path(checkpoint).name}; to "
            "start again, remove the folder or choose another --output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not kept:
            file.write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write to --output_dir {folder}: {error.strerror}") from error
    return checkpoint if resume else None


def is_finished(folder: Path) -> bool:
    """The Trainer's state is what a finished model's folder gets last."""
    return (folder / STATE).is_file()


def is_kept(folder: Path) -> bool:
    """Whether the folder holds something that a run must not replace."""
    return is_finished(folder) or last_checkpoint(folder) is not None
