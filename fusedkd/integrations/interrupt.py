"""How training ends early: a loss that is no number, SIGTERM or Ctrl-C, a checkpoint that cannot be written.

Each ends in :class:`Stopped`, one line, and leaves the last checkpoint complete.
"""

import json
import math
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from fusedkd.integrations.command import UsageError, option

STATE = "trainer_state.json"
"""Written last: a checkpoint without it is torn."""


class Stopped(UsageError):
    """Training ended before its time, for a reason that is one line."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Arguments(TrainingArguments):
    """Those of an Interruptible on the command line: what every Trainer takes."""

    _argument_group_name = "training: what every Trainer takes"
    resume_from_checkpoint: bool = option(False, "go on from the last checkpoint")  # type: ignore[assignment]
    save_total_limit: int | None = option(1, "checkpoints that are kept")
    remove_unused_columns: bool = option(False, "of the data")
    ddp_find_unused_parameters: bool | None = option(False, "each parameter has a gradient")
    ddp_timeout: int = option(2 * 24 * 3600, "seconds that the other ranks wait while the first one reads the text")

    def __post_init__(self) -> None:
        if self.deepspeed:
            raise ValueError("--deepspeed is not supported: use --fsdp")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()


class Interruptible(Trainer):
    """A Trainer, or what comes before one in a list of bases, that ends so.

    Raises:
        Stopped: in training, when the loss is no number, on SIGTERM and SIGINT (Ctrl-C), and where a model or a
            checkpoint cannot be written.
        UsageError: for a training without a batch.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.args.logging_nan_inf_filter = False  # it waits for the device at every step, and hides what is to be seen
        self.interrupt = StopOnSignal(self)
        self.add_callback(self.interrupt)

    def train(self, *args: Any, **options: Any) -> Any:
        with self.interrupt:
            return super().train(*args, **options)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.args.dataloader_drop_last and has_length(loader) and not len(loader):
            rows: Any = self.train_dataset
            count, batch = len(rows), self.args.train_batch_size * self.args.world_size
            raise UsageError(
                f"--dataloader_drop_last must be false, not true: {count} examples fill no batch of {batch}"
            )
        return loader

    def get_eval_dataloader(self, *given: Any) -> Any:
        """Of all rows: in transformers `dataloader_drop_last` drops held-out ones, too."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*given)
        finally:
            self.args.dataloader_drop_last = dropped

    def final_evaluation(self) -> dict[str, float]:
        """Of the model that training left: that of the log, or a new one where the log's last is of another model, or
        there is none.
        """
        logged = [entry for entry in self.state.log_history if "eval_loss" in entry]
        if self.args.load_best_model_at_end or not logged or logged[-1]["step"] < self.state.global_step:
            self.evaluate()
            logged.append(self.state.log_history[-1])
        return logged[-1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            check_finite(self, logs)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with writing(self, f"the checkpoint of step {step}", folder):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # of a checkpoint
            return super().save_model(output_dir, _internal_call)
        with writing(self, "the model"):
            super().save_model(output_dir)


# -------------------------------------------------- checkpoints


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint: a kill or a full disk may have left a torn one after it."""
    named = ((f.name.partition("-")[2], f) for f in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    found = {int(step): f for step, f in named if step.isdigit()}
    return next((str(found[step]) for step in sorted(found, reverse=True) if complete(found[step])), None)


def complete(checkpoint: Path) -> bool:
    """Every file of a checkpoint is there to its end."""
    try:
        json.loads((checkpoint / STATE).read_bytes())
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(file) for ending in ("bin", "pt", "pth") for file in checkpoint.glob(f"*.{ending}"))


@contextmanager
def writing(trainer: Any, what: str, checkpoint: Path | None = None) -> Iterator[None]:
    """Around the writing of a model or a checkpoint.

    Raises:
        Stopped: where it fails; what was written of the checkpoint is removed, the ones before it are as they were.
    """
    if checkpoint and trainer.args.should_save:
        (checkpoint / STATE).unlink(missing_ok=True)  # of an earlier run: not complete while it is written again
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not (reason := cannot_write(error)):
            raise
        if checkpoint:
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise Stopped(f"cannot save {what}: {reason}; {last(trainer)}") from error


def cannot_write(error: Exception) -> str | None:
    """Why a file could not be written, if that is the error; PyTorch does not hand on what the system said."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error).rpartition("I/O error: ")[2]
    if any(part in str(error) for part in ("PytorchStreamWriter", "inline_container", "iostream")):
        return "writing failed (is the disk full?)"
    return None


def last(trainer: Any) -> str:
    checkpoint = last_checkpoint(trainer.args.output_dir)
    return f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"


# -------------------------------------------------- numbers


def check_finite(trainer: Any, logs: dict[str, float]) -> None:
    """Of the means that are logged, as they are before each checkpoint (:class:`StopOnSignal`).

    Raises:
        Stopped: where the loss or the norm of the gradient is infinite or no number.
    """
    scaled = getattr(trainer.accelerator, "scaler", None) is not None  # a step of too large a gradient is then skipped
    for name in ("loss",) if scaled else ("loss", "grad_norm"):
        value = logs.get(name, 0.0)
        if not math.isfinite(value):
            what, step = name.replace("grad_norm", "norm of the gradient"), trainer.state.global_step
            advice = "try a lower learning rate or a longer warm-up"
            raise Stopped(f"the {what} is {value} at step {step}: {advice}; {last(trainer)}")


# -------------------------------------------------- SIGTERM, SIGINT


class StopOnSignal(TrainerCallback):
    """Within its context, SIGTERM or SIGINT (Ctrl-C) on any rank ends training after the step, with a checkpoint; and
    no checkpoint is written but after a log, so that a resumed run logs means over the same steps. A second Ctrl-C ends
    it at once, with a KeyboardInterrupt.

    (`enable_jit_checkpoint` of transformers waits seconds before it does anything, saves in the middle of a step, each
    rank for itself, and lets `train` return as if training were complete.)
    """

    def __init__(self, trainer: Any):
        self.trainer, self.requested, self.stopped = trainer, 0, 0  # numbers of signals
        self.main = threading.current_thread() is threading.main_thread()  # the only one that may handle signals

    def __enter__(self) -> None:
        self.requested, self.stopped, self.process = 0, 0, os.getpid()
        self.before: dict[int, Any] = {}
        if self.main:
            handled = (s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) != signal.SIG_IGN)  # of nohup
            self.before = {number: signal.signal(number, self._request) for number in handled}

    def __exit__(self, kind: Any, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        number = self.stopped or self.requested  # requested alone: after the last step, which is in a checkpoint
        if kind is None and number:
            name, step = signal.Signals(number).name, self.trainer.state.global_step
            raise Stopped(f"{name} ended the training after step {step}; {last(self.trainer)}", 128 + number)

    def _request(self, number: int, *_: Any) -> None:
        self.requested = number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])
            if os.getpid() == self.process and self.trainer.is_world_process_zero():  # not a worker that loads data
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again: at once, without one\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = self.requested
        if args.world_size > 1:  # all ranks after the same step
            self.stopped = int(self.trainer.accelerator.gather(torch.tensor(self.stopped, device=args.device)).max())
        if self.stopped:
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save
        if self.stopped:  # the checkpoint is that of the step; an evaluation would draw random numbers
            control.should_evaluate = control.should_save = False
