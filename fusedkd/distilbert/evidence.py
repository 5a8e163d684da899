"""What is measured of finished models: tasks they are fine-tuned on, and the time of one sequence."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from fusedkd.distilbert.config import Config, UsageError
from fusedkd.distilbert.finetune import FinetuneOptions, check, finetune
from fusedkd.distilbert.tasks import TASKS, read

Models = list[tuple[Path, dict[str, Any]]]  # folder and stage of each


def check_tasks(config: Config) -> None:
    """Refuse what would fail after hours: unknown tasks, data that cannot be read."""
    for task in config.tasks.tasks or []:
        options = task_options(config, task, Path("model"), config.run.seed)
        check(options)
        read(TASKS[task], options.dataset, options.glue_dir, options.squad_files)


def add_tasks(config: Config, models: Models, console: Console) -> None:
    """Fine-tune every model on each of --tasks, with its seed; what came out goes into its stage. On all ranks."""
    for folder, stage in models:
        options = {task: task_options(config, task, folder, stage["seed"]) for task in config.tasks.tasks or []}
        stage["tasks"] = {task: finetune(its, console) for task, its in options.items()}


def task_options(config: Config, task: str, model: Path, seed: int) -> FinetuneOptions:
    """Of the fine-tuning of a model, into a folder named after what it depends on."""
    if task == "squad":
        raise UsageError("--tasks squad: its texts are longer than these blocks; use the command finetune")
    chosen = {**config.tasks.finetune, "max_length": min(128, config.text.block_size), "by_length": True, "seed": seed}
    chosen["resume_from_checkpoint"] = config.run.resume_from_checkpoint
    name = "-".join([task, *(f"{value:g}" for value in chosen.values() if type(value) in (int, float))])
    folder = config.folder / "tasks" / model.name / name
    return FinetuneOptions(task=task, model=str(model), output_dir=str(folder), report_to="none", **chosen)


@torch.inference_mode()
def latencies(models: dict[str, PreTrainedModel], length: int, repeats: int = 100) -> dict[str, Any]:
    """Milliseconds of the body (no output head) at batch 1: the median of runs that take turns, on the CPU."""
    ids = torch.randint(5, min(m.config.vocab_size for m in models.values()), (1, length))
    bodies: dict[str, Any] = {name: model.cpu().eval().base_model for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 10):
        for name, body in bodies.items():
            start = time.perf_counter()
            body(input_ids=ids, attention_mask=torch.ones_like(ids))
            if turn >= 10:  # the first ones warm up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {"batch": 1, "length": length, "threads": torch.get_num_threads(), "milliseconds": medians}
