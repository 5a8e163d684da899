"""What came out: the table, `results.json` and `methods.png`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from recipes.ablation.report import cell, circumstances, finish, grid, interval, markdown_table, spread, where
from recipes.finetune.tasks import Task
from recipes.glue.compare import Result
from recipes.glue.method import Chosen, parse_method

BESIDE = {"nll": "NLL", "kl_to_teacher": "KL to teacher"}
Results = dict[str, Any]


def write(
    folder: Path,
    settings: dict[str, Any],
    chosen: Sequence[Chosen],
    task: Task,
    teacher: Result,
    students: dict[str, list[Result]],
) -> None:
    """Compare the students; print the table, write JSON and picture."""
    results: Results = {
        "recipe": "glue",
        **circumstances(),
        "settings": settings,
        "task": task.name,
        "metrics": list(task.metrics),
        "teacher": teacher,
        "published": {each.text: each.method.published for each in chosen if each.method.published},
        "students": students,
    }
    published = [f"{name}, as published: {text}" for name, text in results["published"].items()]
    finish(folder, results, [table(results), *findings(results), *published], plot, "methods.png")


# ---- numbers


def score(results: Results, found: Result) -> float:
    """As in GLUE: the mean of the task's metrics × 100."""
    return 100 * mean(found[metric] for metric in results["metrics"])


def paired(ours: Sequence[Result], base: Sequence[Result], results: Results) -> tuple[float, float | None]:
    """The mean difference of two methods' scores over the seeds that both have, and its standard error; None of one
    seed. A seed is one set of new weights, and for methods that read the same rows one order of them.
    """
    other = {found["seed"]: score(results, found) for found in base}
    differences = [score(results, found) - other[found["seed"]] for found in ours if found["seed"] in other]
    if not differences:
        return math.nan, None
    if len(differences) == 1:
        return differences[0], None
    return mean(differences), spread(differences) / math.sqrt(len(differences))


def findings(results: Results) -> list[str]:
    """What follows from the numbers, a sentence each: the differences beyond a 95 % interval, and the rest."""
    (first, base), *others = results["students"].items()
    if not others:
        return []
    seeds = {found["seed"] for found in base}
    told: dict[str, list[str]] = {"better": [], "worse": []}
    within, alone = [], []
    for name, students in others:
        change, error = paired(students, base, results)
        if error is None:
            alone.append(f"{name} ({change:+.1f})")
        elif abs(change) > interval(len(seeds & {found["seed"] for found in students}), error):
            told["better" if change > 0 else "worse"].append(f"{name} ({change:+.1f} ± {error:.1f})")
        else:
            within.append(f"{name} ({change:+.1f} ± {error:.1f})")
    lines = [f"Beyond a 95 % interval {what} than {first}: {', '.join(each)}." for what, each in told.items() if each]
    if within:
        lines.append(f"Not told apart from {first}: {', '.join(within)}.")
    if alone:
        lines.append(f"One seed, whose difference from {first} has no error: {', '.join(alone)}.")
    return lines


# ---- table


def table(results: Results) -> Table:
    """A row per method: score, its median, the difference from the first method; and what it costs."""
    students, metrics = results["students"], results["metrics"]
    first, base = next(iter(students.items()))
    beside = {name: title for name, title in BESIDE.items() if name in base[0]}
    fewest, seeds = (function(map(len, students.values())) for function in (min, max))
    title = f"{results['task']}: {' and '.join(metrics)} × 100"
    if seeds > 1:
        count = str(seeds) if fewest == seeds else f"{fewest} to {seeds}"
        title += f", mean of {count} seeds ± standard deviation; differences ± their standard error"
    found = grid(title, "model", "score", "median", f"from {first}", *beside.values(), "seconds", "MB", "parameters")
    teacher = results["teacher"]
    if metrics[0] in teacher:
        cells = ["teacher", f"{score(results, teacher):.1f}", "", "", *(f"{teacher[n]:.3f}" for n in beside), "", ""]
        found.add_row(*cells, f"{teacher['parameters']:,}")
        found.add_section()
    for name, its in students.items():
        values = [score(results, each) for each in its]
        change, error = paired(its, base, results)
        difference = "" if name == first else f"{change:+.1f}" + ("" if error is None else f" ± {error:.1f}")
        peaks = [each["peak_mb"] for each in its if each["peak_mb"] is not None]
        cells = [name, cell(values, 1), f"{median(values):.1f}", difference]
        cells += [cell([each[n] for each in its], 3) for n in beside]
        cells += [f"{median(e['seconds'] for e in its):.0f}", f"{median(peaks):.0f}" if peaks else ""]
        found.add_row(*cells, f"{its[0]['parameters']:,}")
    return found


def markdown(results: Results) -> str:
    """The table and what follows from it, for a page."""
    its, shown = results["settings"], table(results)
    counts = its.get("counts", its)
    texts = f"{counts['examples']:,} training examples" if counts["examples"] else "all training examples"
    some = counts["labels"] and counts["labels"] != counts["examples"]
    labels = f", {counts['labels']:,} of them with their label" if some else ""
    source = results["teacher"]
    package = (
        f" ({source['distribution']} {source['version']}, {source['licence']})" if "distribution" in source else ""
    )
    long = f"{its['max_steps']} steps" if its["max_steps"] > 0 else f"{its['num_train_epochs']:g} epochs in steps"
    batch = its["per_device_train_batch_size"] * its["gradient_accumulation_steps"]
    alike = " texts of like length" if its["train_sampling_strategy"] == "group_by_length" else ""
    trained = f"{long} of {batch}{alike} at {its['learning_rate']:g}"
    each = [one["seconds"] for students in results["students"].values() for one in students]
    form = its["student"] or f"of {its['layers'] or 'every other'} layers, {its['init']}"
    lines = [
        f"{where(results)}. {shown.title}; seconds (of the processor) and MB, the growth of memory, are medians.",
        f"Teacher {source['name']}{package}; students {form};",
        f"{texts}{labels}; {trained}.",
        f"{len(each)} students, {sum(each) / 60:.0f} processor minutes.",
    ]
    return "\n".join([*markdown_table(shown), "", *lines, "", *(f"- {line}" for line in findings(results))])


# ---- picture


def plot(results: Results, file: Path) -> None:
    """A line per method: every seed a point, the mean a bar; the teacher dashed."""
    students = results["students"]
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(students)), layout="constrained")
    axis = figure.subplots()
    for row, its in enumerate(students.values()):
        values = [score(results, each) for each in its]
        axis.plot(values, [row] * len(values), "o", color="#0b6e99", ms=4, alpha=0.6)
        axis.plot([mean(values)] * 2, [row - 0.3, row + 0.3], color="#c4554d", lw=2)
    if results["metrics"][0] in results["teacher"]:
        axis.axvline(score(results, results["teacher"]), color="0.35", ls="--", lw=1.2, label="teacher")
        axis.legend(frameon=False, fontsize=8)
    titles = [name if ":" in name else parse_method(name).method.title for name in students]
    axis.set_yticks(range(len(students)), titles)
    axis.invert_yaxis()
    axis.set_xlabel(f"{' and '.join(results['metrics'])} × 100, {results['task']}")
    axis.grid(alpha=0.25, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
