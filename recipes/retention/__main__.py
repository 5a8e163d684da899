"""`python -m recipes.retention --runs runs/sst2 runs/cola --glue_dir GLUE`: tables 1 and 3 of the DistilBERT paper.

Of finished comparisons of `recipes.glue`, one a task: the mean score of each method's students, what share of the
teacher's they keep, their parameters, and the time of one pass over the held-out pairs of STS-B at batch 1 on one core:
of the models that the first of the folders holds.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from fusedkd.integrations.command import UsageError, command_line, loading, option, parse_into
from recipes import teachers
from recipes.finetune.tasks import TASKS, read
from recipes.glue.compare import finished
from recipes.glue.method import parse_method
from recipes.glue.report import score
from recipes.retention import report
from recipes.turns import seconds_in_turns


@dataclass
class RetentionOptions:
    _argument_group_name = "retention"
    runs: list[str] = option([], "output folders of recipes.glue, of one teacher, one of each task")
    teacher: str | None = option(None, "the teacher that came as a classifier; default: of the name in the first run")
    glue_dir: str | None = option(None, "folder with the files of GLUE's download; default: the hub's nyu-mll/glue")
    output_dir: str = option("runs/retention", "where table and picture go")
    pairs: int = option(0, "of STS-B's held-out pairs, whose time is measured; 0: all")
    max_length: int = option(128, "tokens of a pair; longer ones are cut")


def run(options: RetentionOptions) -> None:
    comparisons = [finished_run(Path(folder)) for folder in options.runs]
    if not comparisons:
        raise UsageError("--runs are missing: output folders of recipes.glue")
    first = comparisons[0]
    for name, each in zip(options.runs, comparisons, strict=True):
        if each["teacher"]["name"] != first["teacher"]["name"]:
            raise UsageError(f"--runs {name}: its teacher is {each['teacher']['name']}, not {first['teacher']['name']}")
    tasks = [each["task"] for each in comparisons]
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise UsageError(f"--runs has {', '.join(twice)} twice: give one run of each task")
    shared = [name for name in first["students"] if all(name in each["students"] for each in comparisons)]
    methods = [name for name in shared if is_whole(name)]
    folders = {"teacher": teacher_folder(Path(options.runs[0]), options.teacher or first["settings"]["teacher"])}
    folders |= {name: folder for name in methods if (folder := student_folder(Path(options.runs[0]), name, first))}
    rows = [
        {
            "model": name,
            "parameters": (first["teacher"] if name == "teacher" else first["students"][name][0])["parameters"],
            "scores": {each["task"]: scores_of(each, name, methods) for each in comparisons},
        }
        for name in ("teacher", *methods)
    ]
    seconds = latencies(folders, pairs_of(options), options.max_length)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"runs": [Path(name).resolve().name for name in options.runs], "max_length": options.max_length}
    report.write(folder, settings, first["teacher"], rows, seconds)


def finished_run(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        raise UsageError(f"--runs {folder}: there is no results.json of recipes.glue") from None
    if found.get("recipe") != "glue" or found["metrics"][0] not in found["teacher"]:
        raise UsageError(f"--runs {folder}: it must be of recipes.glue, with a teacher that was fine-tuned")
    return found


def is_whole(method: str) -> bool:
    """Whether what is saved of its students, whose time is measured, is all that their scores are of."""
    if absent := parse_method(method).method.not_loaded:
        print(f"left out: {method}, which is saved without {absent}", flush=True)
    return not absent


def teacher_folder(run: Path, given: str) -> Path:
    """Of the one that was fine-tuned in the run, or that came as a classifier."""
    own = run / "teacher"
    return own if own.is_dir() else Path(teachers.folder_of(given))


def student_folder(run: Path, method: str, results: dict[str, Any]) -> Path | None:
    """Of a method's first student, if its model was kept."""
    folder = run / f"{parse_method(method).folder}-seed{results['students'][method][0]['seed']}"
    if finished(folder, method) and (folder / "config.json").is_file():
        return folder
    print(f"no time of {method}: there is no model in {folder}", flush=True)
    return None


def scores_of(results: dict[str, Any], model: str, methods: list[str]) -> list[float]:
    """× 100, of each seed that all the methods have: a seed is worth more than most differences between methods."""
    if model == "teacher":
        return [score(results, results["teacher"])]
    seeds = set.intersection(*({found["seed"] for found in results["students"][name]} for name in methods))
    if not seeds:
        raise UsageError(f"--runs: of {results['task']} there is no seed that all of {', '.join(methods)} have")
    return [score(results, found) for found in results["students"][model] if found["seed"] in seeds]


# ---- time


def pairs_of(options: RetentionOptions) -> list[tuple[str, str]]:
    task = TASKS["stsb"]
    held_out = read(task, None, options.glue_dir, [])[1]
    first, second = (held_out[name][: options.pairs or None] for name in task.texts)
    return list(zip(first, second, strict=True))


def latencies(folders: dict[str, Path], pairs: list[tuple[str, str]], max_length: int) -> dict[str, Any]:
    """Of each model the processor's seconds, one thread, for a pass over the pairs one by one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with loading("--runs", str(folders["teacher"])):
        tokenizer = AutoTokenizer.from_pretrained(folders["teacher"])
    options: dict[str, Any] = {"truncation": True, "max_length": max_length, "return_tensors": "pt"}
    inputs = [dict(tokenizer(*pair, **options)) for pair in [pairs[0], *pairs]]
    models = {name: loaded(folder) for name, folder in folders.items()}
    seconds = seconds_in_turns(models, inputs, time.process_time, warm=1)
    torch.set_num_threads(threads)
    return {
        "pairs": len(pairs),
        "seconds": {name: sum(times) for name, times in seconds.items()},
        "median_ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
    }


def loaded(folder: Path) -> PreTrainedModel:
    with loading("--runs", str(folder)):
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> int:
    return command_line(lambda: run(*parse_into([RetentionOptions], argv, "python -m recipes.retention")))


if __name__ == "__main__":
    sys.exit(main())
