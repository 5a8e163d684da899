"""What is told of a training: seconds per step, a bar, lines of metrics."""

import statistics
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Seconds per optimiser step, data included, evaluation and checkpoints not; medians, against a busy machine.

    The logs hold them as `step_time`, and so a resumed run knows those before it.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.durations: list[float] = []
        self.laps: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last, self.durations = None, []
        self.laps = [entry["step_time"] for entry in state.log_history if "step_time" in entry]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.durations.append(now - self.last)
        self.last = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    on_save = on_evaluate

    def lap(self) -> float | None:
        """Of the steps since the last one."""
        if not self.durations:
            return None
        self.laps.append(statistics.median(self.durations))
        self.durations.clear()
        return self.laps[-1]

    @property
    def median(self) -> float:
        return statistics.median(self.laps) if self.laps else float("nan")


class RichProgress(TrainerCallback):
    """A bar on a terminal, and everywhere a line for each evaluation."""

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, description=f"{self.name}  loss {logs['loss']:.3f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        m = kwargs["metrics"]
        line = f"  step {state.global_step:>5}  held-out loss {m['eval_ce']:.3f}  perplexity {m['eval_perplexity']:.1f}"
        kl = f"  KL to the teacher {m['eval_kl']:.3f}" if "eval_kl" in m else ""
        self.console.print(line + kl, highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
