"""`python -m recipes.ablation`: students without one part of the recipe each, several seeds, a table and a picture.

Table 4 of the DistilBERT paper. The options are those of `python -m fusedkd.distilbert`, and which students are
compared; with --tasks, every model is fine-tuned as by `recipes.finetune`.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from fusedkd.distilbert import distil
from fusedkd.distilbert.config import Config, parse
from fusedkd.distilbert.student import tokenizer_for
from fusedkd.integrations.command import UsageError, command_line, option
from recipes.ablation import report
from recipes.ablation.arms import ARMS, changed
from recipes.finetune.__main__ import GlueArguments, GlueOptions, finetune
from recipes.finetune.__main__ import check as check_task
from recipes.finetune.tasks import TASKS, read
from recipes.turns import seconds_in_turns


@dataclass
class AblationOptions:
    _argument_group_name = "ablation"
    arms: list[str] = option(["full", "no_cos", "no_mlm", "no_distil", "random_init"], f"of {', '.join(ARMS)}")
    seeds: int = option(3, "repeat the students with this many seeds, from --seed on")
    tasks: list[str] = option([], "tasks that every model is fine-tuned on: sst2, cola, rte, stsb, ...")
    glue_dir: str | None = option(None, "folder of GLUE's files; default: the hub's nyu-mll/glue")
    task_epochs: float = option(3.0, "passes over a task's training data")
    task_examples: int = option(0, "training examples of a task; 0: all")
    task_learning_rate: float = option(5e-5, "peak learning rate")
    task_batch_size: int = option(32, "examples per step")


def run(config: Config, options: AblationOptions) -> None:
    arms = {arm: changed(config, arm) for arm in options.arms}
    if options.seeds < 1:
        raise UsageError("--seeds must be positive")
    check_tasks(config, options)
    shared, seeds = distil.prepare(config), range(config.training.seed, config.training.seed + options.seeds)
    students = {
        folder_name(config, arm, seed): (arm, replace(its, training=replace(its.training, seed=seed)))
        for seed in seeds
        for arm, its in arms.items()
    }
    for name, (_, its) in students.items():  # refuses a folder that is taken before the teacher is trained
        distil.begin_folder(shared, its, name)
    teacher, logs = distil.teacher_of(shared)
    teachers = [{**stage_of(teacher, logs, seed), "tasks": {}} for seed in seeds]
    stages: dict[str, list[report.Stage]] = {arm: [] for arm in arms}
    kind: Any = AutoModelForCausalLM if teacher.can_generate() else AutoModelForMaskedLM
    for name, (arm, its) in students.items():
        logs = distil.student_of(shared, its, teacher, name)
        student = kind.from_pretrained(config.folder / name)
        stages[arm].append({**stage_of(student, logs, its.training.seed), "arm": arm, "tasks": {}})
    models = [(config.folder / folder_name(config, arm, s["seed"]), s) for arm, found in stages.items() for s in found]
    models = [*((teacher_folder(shared, teacher), stage) for stage in teachers if options.tasks), *models]
    for folder, stage in models:
        for task in options.tasks:
            stage["tasks"][task] = {"metrics": finetune(*of_task(config, options, task, folder, stage["seed"]))}
    if config.training.process_index == 0:
        latency = None
        if "full" in stages:
            student = kind.from_pretrained(config.folder / "student")
            latency = latencies({"teacher": teacher, "student": student}, config.text.block_size)
        settings = config.settings() | asdict(options) | {"vocab_size": len(shared.tokenizer), "glue_dir": None}
        report.write(config.folder, settings, teachers, stages, latency)


def folder_name(config: Config, arm: str, seed: int) -> str:
    name = "student" if arm == "full" else f"student-{arm}"
    return name if seed == config.training.seed else f"{name}-seed{seed}"


def stage_of(model: PreTrainedModel, logs: distil.Logs, seed: int) -> report.Stage:
    """What the report needs of a model: parameters, also of its layers alone, curve, seconds per step."""
    names: Any = model.base_model.named_parameters()
    stage: report.Stage = {
        "seed": seed,
        "parameters": model.num_parameters(),
        "body": sum(p.numel() for name, p in names if "layer." in name or ".h." in name or name.startswith("h.")),
        "curve": [report.point(entry.get("step", 0), entry) for entry in distil.evaluations(logs)],
    }
    whole = [entry["train_runtime"] for entry in logs if "train_runtime" in entry]  # a resumed run has none
    if steps := stage["curve"][-1]["step"]:
        stage["steps"] = steps
        if whole:
            evaluated = sum(entry["eval_runtime"] for entry in distil.evaluations(logs))
            stage["seconds_per_step"] = (whole[-1] - evaluated) / steps
    return stage


# ---- tasks


def check_tasks(config: Config, options: AblationOptions) -> None:
    """Refuse what would fail after hours: unknown tasks, data that cannot be read."""
    for task in options.tasks:
        if task not in TASKS or task == "squad":
            raise UsageError(f"--tasks {task}: it must be one of {', '.join(t for t in TASKS if t != 'squad')}")
        its, arguments = of_task(config, options, task, Path("model"), config.training.seed)
        check_task(its, arguments)
        read(TASKS[task], its.dataset, its.glue_dir, its.squad_files)


def of_task(
    config: Config, options: AblationOptions, task: str, model: Path, seed: int
) -> tuple[GlueOptions, GlueArguments]:
    """Of the fine-tuning of a model, into a folder named after what it depends on."""
    length = min(128, config.text.block_size)
    numbers = (options.task_epochs, options.task_examples, options.task_learning_rate, options.task_batch_size)
    folder = "-".join([task, *(f"{number:g}" for number in (*numbers, length, seed))])
    arguments = GlueArguments(
        output_dir=str(config.folder / "tasks" / model.name / folder),
        num_train_epochs=options.task_epochs,
        learning_rate=options.task_learning_rate,
        per_device_train_batch_size=options.task_batch_size,
        train_sampling_strategy="group_by_length",
        seed=seed,
        report_to="none",
        resume_from_checkpoint=config.training.resume_from_checkpoint,
    )
    its = {"glue_dir": options.glue_dir, "max_train_examples": options.task_examples, "max_length": length}
    return GlueOptions(task=task, model=str(model), **its), arguments  # type: ignore[arg-type]


def teacher_folder(shared: distil.Run, teacher: distil.Teacher) -> Path:
    """That of the teacher, one from elsewhere saved there."""
    folder = shared.config.folder / "teacher"
    with shared.config.training.main_process_first(local=False):
        if not (folder / "config.json").is_file():
            teacher.save_pretrained(folder)
            tokenizer_for(teacher.config, shared.tokenizer).save_pretrained(folder)
    return folder


# ---- time


def latencies(models: dict[str, PreTrainedModel], length: int, repeats: int = 100) -> dict[str, Any]:
    """Milliseconds of the body (no output head) at batch 1: the median of runs that take turns, on the CPU."""
    ids = torch.randint(5, min(m.config.vocab_size for m in models.values()), (1, length))
    bodies: dict[str, Any] = {name: model.cpu().eval().base_model for name, model in models.items()}
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * (repeats + 10)
    seconds = seconds_in_turns(bodies, inputs, time.perf_counter, warm=10)
    medians = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {"batch": 1, "length": length, "threads": torch.get_num_threads(), "milliseconds": medians}


def main(argv: list[str] | None = None) -> int:
    return command_line(lambda: run(*parse(argv, "python -m recipes.ablation", [AblationOptions])))


if __name__ == "__main__":
    sys.exit(main())
