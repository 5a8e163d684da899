"""One student: trained for so many steps or so many seconds, evaluated on the way, and what it took."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import datasets
import numpy as np
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from benchmarks.measure import peak_bytes
from fusedkd.integrations.blocks import CausalCollator
from fusedkd.integrations.command import UsageError, refused
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.interrupt import Arguments, Interruptible
from fusedkd.integrations.transformers import DistillationTrainer

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
WARMUP = 0.05
"""Share of the training with a rising learning rate; it falls linearly afterwards."""
EVALUATIONS = 3
"""In a training, beside the one before it."""


@dataclass
class Budget(TrainerCallback):
    """Of a training: `steps`, or `seconds` of a clock. Its learning rate ends where it ends.

    Evaluations cost none of it.
    """

    steps: int | None = None
    seconds: float | None = None
    clock: Literal["wall", "processor"] = "wall"

    def __post_init__(self) -> None:
        self.spent = dict.fromkeys(CLOCKS, 0.0)
        self.begun: dict[str, float] | None = None
        self.done = self.evaluated = 0

    @staticmethod
    def now() -> dict[str, float]:
        return {name: read() for name, read in CLOCKS.items()}

    def seconds_spent(self) -> dict[str, float]:
        if self.begun is None:
            return self.spent
        return {name: self.spent[name] + now - self.begun[name] for name, now in self.now().items()}

    def share(self, steps: int) -> float:
        """Of the budget, that is spent after so many steps."""
        if self.seconds is None:
            assert self.steps is not None
            return steps / self.steps
        return self.seconds_spent()[self.clock] / self.seconds

    def learning_rate(self, steps: int) -> float:
        """Share of the peak."""
        share = min(self.share(steps), 1.0)
        return min(share / WARMUP, (1 - share) / (1 - WARMUP))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent, self.begun = self.seconds_spent(), None
        self.done += 1
        share = self.share(self.done)
        if int(min(share, 1) * EVALUATIONS) > self.evaluated:
            self.evaluated = int(min(share, 1) * EVALUATIONS)
            control.should_evaluate = True
        control.should_training_stop |= share >= 1


class BudgetTrainer(Interruptible, DistillationTrainer):
    """Arguments of DistillationTrainer, and `budget`."""

    def __init__(self, *args: Any, budget: Budget, **more: Any):
        super().__init__(*args, **more)
        self.budget = budget
        self.add_callback(budget)
        self.remove_callback(PrinterCallback)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.budget.learning_rate)  # type: ignore[arg-type]
        return self.lr_scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """None, not even when a signal ends the training: a student that is not finished is trained again."""


@dataclass(frozen=True)
class Shared:
    """What all students have in common."""

    teacher: PreTrainedModel
    tokenizer: Tokenizer
    train: datasets.Dataset
    held_out: datasets.Dataset
    arguments: Arguments

    def trainer(self, student: PreTrainedModel, kd: KDConfig, budget: Budget) -> BudgetTrainer:
        """The teacher is there for the evaluation, too; without a weight for it, training does not ask it. It may be
        the student, to be evaluated.
        """
        most = 10**6 if budget.steps is None else budget.steps
        with refused():
            return BudgetTrainer(
                student,
                None if student is self.teacher else self.teacher,
                replace(self.arguments, max_steps=most),
                CausalCollator(self.tokenizer),
                self.train,
                self.held_out,
                kd=kd,
                budget=budget,
            )


def blocks_of(text: Any, tokenizer: Tokenizer, size: int, what: str) -> datasets.Dataset:
    """The lines, joined and cut into blocks of exactly so many tokens; the rest is left out."""
    lines = [f"{line.strip()}\n".replace("[UNK]", "<unk>") for line in text["text"] if line.strip()]
    ids = tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []
    tokens = np.fromiter(chain.from_iterable(ids), np.int64)
    count = len(tokens) // size
    if not count:
        raise UsageError(f"the {what} text has {len(tokens)} tokens, less than one block of {size}")
    return datasets.Dataset.from_dict({"input_ids": tokens[: count * size].reshape(count, size)})


def train(shared: Shared, student: PreTrainedModel, kd: KDConfig, budget: Budget) -> dict[str, Any]:
    """Held-out `ce`, `perplexity` and `kl` at each evaluation, seconds per step on both clocks, peak memory."""
    trainer = shared.trainer(student, kd, budget)
    gc.collect()
    peak = peak_bytes(trainer.train, trainer.args.device.type)
    curve = []
    for entry in trainer.state.log_history:
        if "eval_ce" in entry:
            found = {name: entry[f"eval_{name}"] for name in ("ce", "perplexity", "kl")}
            curve.append({"step": entry["step"], **found})
    return {
        "steps": budget.done,
        "tokens": budget.done * tokens_per_step(shared),
        "seconds": budget.spent,
        "seconds_per_step": {name: spent / budget.done for name, spent in budget.spent.items()},
        "peak_mb": None if peak is None else peak / 2**20,
        "parameters": student.num_parameters(),
        "curve": curve,
        **curve[-1],
    }


def tokens_per_step(shared: Shared) -> int:
    batch = shared.arguments.train_batch_size * shared.arguments.gradient_accumulation_steps
    return batch * len(shared.train[0]["input_ids"])


def batch_of(shared: Shared) -> dict[str, Tensor]:
    """The first of the training data, on the device."""
    rows = [shared.train[i] for i in range(min(shared.arguments.train_batch_size, len(shared.train)))]
    return {k: v.to(shared.arguments.device) for k, v in CausalCollator(shared.tokenizer)(rows).items()}
