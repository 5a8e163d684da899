"""What came out: the table, `results.json` and `curves.png`."""

import datetime
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from fusedkd import env
from fusedkd.backends import dispatch
from recipes.ablation.arms import ARMS

METRICS = {"loss": "held-out loss", "kl": "KL to teacher"}
LOWER_IS_BETTER = frozenset(METRICS)
SCORE = "mean score"  # of the tasks, their metrics × 100
Stage = dict[str, Any]  # of a model: its seed, steps, sizes, seconds per step and curve, and "tasks": their metrics
Numbers = dict[str, list[float]]  # metric: a value per seed


def write(
    folder: Path, settings: dict[str, Any], teachers: list[Stage], students: dict[str, list[Stage]], latency: Any
) -> None:
    """Compare the students; print the table, write JSON and picture."""
    results: dict[str, Any] = {
        **circumstances(),
        "settings": settings,
        "latency": latency,
        "teacher": teachers,
        "students": students,
    }
    finish(folder, results, [*tables(results), *findings(results)], plot)


def circumstances() -> dict[str, Any]:
    """Of any run: when, on which machine, with which versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": env.devices(),
        "versions": env.versions(),
        "backends": {operator: backend for (operator, _), (backend, _) in dispatch.serving.items()},
    }


def where(results: dict[str, Any]) -> str:
    """Machine, version and date, for a page."""
    return f"{results['machine']['CPU']}, torch {results['versions']['torch']}, {results['date'][:10]}"


def finish(
    folder: Path,
    results: dict[str, Any],
    lines: list[Any],
    plot: Callable[[dict[str, Any], Path], None],
    picture: str = "curves.png",
) -> None:
    """Write `results.json` and the picture; print tables and sentences."""
    files = folder / "results.json", folder / picture
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    plot(results, files[1])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for line in [*lines, f"numbers, picture: {', '.join(map(str, files))}"]:
        console.print(line)


# ---- numbers


def point(step: float, metrics: dict[str, float]) -> dict[str, float]:
    """Of a curve, from what the Trainer evaluated; without a teacher, the model is one, at KL 0 from itself."""
    return {"step": step, "loss": metrics["eval_ce"], "kl": metrics.get("eval_kl", 0.0)}


def numbers(stages: list[Stage]) -> Numbers:
    """Of one arm: held-out metrics after the last step; score of each task and their mean."""
    found: Numbers = {m: [stage["curve"][-1][m] for stage in stages] for m in METRICS}
    tasks = list(stages[0].get("tasks", {}))
    for task in tasks:
        found[task] = [score(stage["tasks"][task]) for stage in stages]
    if tasks:
        found[SCORE] = [mean(values) for values in zip(*(found[task] for task in tasks), strict=True)]
    return found


def score(task: Stage) -> float:
    """As in GLUE: the mean of the task's metrics × 100, after its last epoch."""
    return 100 * mean(task["metrics"].values())


def spread(values: list[float]) -> float:
    """The standard deviation over the seeds."""
    return stdev(values) if len(values) > 1 else 0.0


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip
"""97.5 % quantiles of Student's t with 1, 2, … degrees of freedom; the last one serves for more."""


def interval(count: int, error: float) -> float:
    """Half of the 95 % interval of a mean of `count` differences with this standard error."""
    return error * T95[min(count - 2, len(T95) - 1)]


def difference(arm: list[float], full: list[float]) -> tuple[float, float]:
    """Its mean over the seeds, which the two share, and its standard error."""
    changes = [ours - theirs for ours, theirs in zip(arm, full, strict=True)]
    return mean(changes), spread(changes) / math.sqrt(len(changes))


def verdict(arm: list[float], full: list[float], metric: str) -> str:
    """Whether an arm differs from the full loss beyond a 95 % interval."""
    change, error = difference(arm, full)
    worse = change > 0 if metric in LOWER_IS_BETTER else change < 0
    outcome = f"{'worse' if worse else 'better'} by {abs(change):.{2 if metric == SCORE else 4}f}"
    if len(full) == 1:
        return f"{outcome} (one seed)" if change else "equal (one seed)"
    if abs(change) <= interval(len(full), error):
        return f"not told apart ({change:+.3f} ± {error:.3f})"
    return f"{outcome} ± {error:.{2 if metric == SCORE else 4}f}"


def findings(results: dict[str, Any]) -> list[str]:
    """What follows from the numbers, a sentence each."""
    arms = {name: numbers(stages) for name, stages in results["students"].items()}
    lines, full = [], arms.get("full")
    if full:
        metrics = [*METRICS, *([SCORE] if SCORE in full else [])]
        for name in [name for name in arms if name != "full"]:
            outcomes = (f"{METRICS.get(m, m)} {verdict(arms[name][m], full[m], m)}" for m in metrics)
            lines.append(f"{ARMS[name].title} against the full loss: {'; '.join(outcomes)}.")
        compared = [name for name in arms if ARMS[name].paper is not None]
        if len(compared) > 1:
            ours = sorted(compared, key=lambda name: -mean(arms[name]["loss"]))
            paper = sorted(compared, key=lambda name: ARMS[name].paper or 0)
            found, published = (", ".join(ARMS[name].title for name in order) for order in (ours, paper))
            same = "as in the paper, by GLUE score" if ours == paper else f"in the paper, by GLUE score: {published}"
            lines.append(f"What costs most held-out loss, first to last: {found}; {same}.")
        lines += retention(results, full)
    return lines


def retention(results: dict[str, Any], full: Numbers) -> list[str]:
    """The student beside its teacher: score, parameters, time."""
    teacher, student = results["teacher"][0], results["students"]["full"][0]
    parts = [f"{1 - student['parameters'] / teacher['parameters']:.0%} fewer parameters"]
    if teacher.get("body") and student.get("body"):
        parts.append(f"{1 - student['body'] / teacher['body']:.0%} fewer outside the embeddings and the head")
    if SCORE in full and (whole := mean(numbers(results["teacher"])[SCORE])) > 0:  # 0: a collapsed teacher on CoLA
        parts.insert(0, f"{mean(full[SCORE]) / whole:.1%} of the teacher's mean score")
    if latency := results.get("latency"):
        times = latency["milliseconds"]
        parts.append(
            f"{times['student']:.2f} ms against {times['teacher']:.2f} ms for a sequence of {latency['length']} tokens "
            f"on the CPU ({times['teacher'] / times['student'] - 1:.0%} faster)"
        )
    return [f"The student of the full loss has {', '.join(parts)}."]


# ---- tables


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the models; and of the tasks, if there are any."""
    seeds = results["settings"]["seeds"]
    title = "Teacher and students" + (f", mean of {seeds} seeds ± standard deviation" if seeds > 1 else "")
    models = grid(title, "model", "steps", "parameters", *METRICS.values(), "s/step")
    students, teacher = results["students"], results["teacher"]
    models.add_row(*model_row("teacher", teacher[:1]))
    if "full" in students:
        first = students["full"][0]
        start = {"steps": 0, "parameters": first["parameters"], "curve": first["curve"][:1]}
        models.add_row(*model_row("student as copied", [start]))
    models.add_section()
    for name, stages in students.items():
        models.add_row(*model_row(ARMS[name].title, stages))
    return [models, task_table(results)] if teacher[0].get("tasks") else [models]


def grid(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    return table


def model_row(model: str, stages: list[Stage]) -> list[str]:
    found = numbers(stages)
    seconds = [s["seconds_per_step"] for s in stages if "seconds_per_step" in s]
    cells = [model, str(stages[0].get("steps", "")), f"{stages[0]['parameters']:,}"]
    return [*cells, *(cell(found[m], 3) for m in METRICS), f"{mean(seconds):.3f}" if seconds else ""]


def task_table(results: dict[str, Any]) -> Table:
    """Metric × 100 of each task; the change of their mean against the full loss, ours and the paper's."""
    arms = {name: numbers(stages) for name, stages in results["students"].items()}
    teacher, full = numbers(results["teacher"]), arms.get("full")
    tasks = [name for name in teacher if name not in METRICS]
    table = grid("Fine-tuned: metric × 100", "model", *tasks, *(["change", "in the paper"] if full else []))
    table.add_row("teacher", *(cell(teacher[task], 1) for task in tasks))
    table.add_section()
    for name, found in arms.items():
        cells = [cell(found[task], 1) for task in tasks]
        if full and name != "full":
            change, error = difference(found[SCORE], full[SCORE])
            paper = ARMS[name].paper
            cells += [f"{change:+.1f}" + (f" ± {error:.1f}" if error else ""), "" if paper is None else f"{paper:+.2f}"]
        table.add_row(ARMS[name].title, *cells)
    return table


def cell(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {spread(values):.{digits}f}" if len(values) > 1 else "")


def markdown(results: dict[str, Any]) -> str:
    """The tables and what follows from them, for a page."""
    lines = [line for table in tables(results) for line in [*markdown_table(table), ""]]
    settings = results["settings"]
    seeds = f"Mean of {settings['seeds']} seeds ± standard deviation; loss" if settings["seeds"] > 1 else "Loss"
    masked = f"{settings['mlm_probability']:.0%} masked"
    legend = f"{where(results)}. {seeds} per predicted token ({masked}) and KL on held-out text."
    if settings["tasks"]:
        legend += " Tasks: on the development set, after the last epoch; change: ± its standard error."
    return "\n".join([*lines, legend, "", *(f"- {line}" for line in findings(results))])


def markdown_table(table: Table) -> list[str]:
    """Its lines on a page."""
    table.box, table.title = box.MARKDOWN, None
    page = io.StringIO()
    Console(width=250, file=page, color_system=None).print(table)
    head, _, *rows = [line.strip() for line in page.getvalue().splitlines() if line.strip()]
    rules = "|".join(["", *("---" if c.justify == "left" else "---:" for c in table.columns), ""])
    return [head, rules, *(row for row in rows if row.strip(" |-"))]


# ---- picture


def plot(results: dict[str, Any], file: Path) -> None:
    """Loss over steps and over seconds, KL over steps, every seed; and the tasks, if any, with error bars."""
    tasks = SCORE in numbers(next(iter(results["students"].values())))
    figure = Figure(figsize=(11, 8) if tasks else (14, 4.4), layout="constrained")
    axes = list(figure.subplots(2, 2).flat if tasks else figure.subplots(1, 3).flat)
    for axis, (metric, unit) in zip(axes, [("loss", "steps"), ("kl", "steps"), ("loss", "seconds")], strict=False):
        curves(axis, results, metric, unit)
    if tasks:
        scores(axes[3], results)
    axes[0].legend(frameon=False, fontsize=8)
    s, first = results["settings"], next(iter(results["students"].values()))[0]
    source = s["dataset"] or ", ".join(s["train_files"][:2]) or "Python's documentation"
    source += f" and {len(s['train_files']) - 2} more files" if len(s["train_files"]) > 2 else ""
    millions = [f"{stage['parameters'] / 1e6:.2f} M" for stage in (results["teacher"][0], first)]
    weights = ", ".join(f"{s[name]:g}" for name in ("alpha_distil", "alpha_mlm", "alpha_cos"))
    figure.suptitle(
        f"DistilBERT student ({millions[1]} parameters) of a teacher ({millions[0]}) on {source}\n"
        f"vocabulary {s['vocab_size']:,}, {s['mlm_probability']:.0%} masked, T = {s['temperature']:g}, "
        f"weights {weights}, {s['seeds']} seed{'s' * (s['seeds'] > 1)}",
        fontsize=11,
    )
    figure.savefig(file, dpi=130)


def curves(axis: Any, results: dict[str, Any], metric: str, unit: str) -> None:
    trained = []
    for name, stages in results["students"].items():
        for seed, stage in enumerate(stages):
            scale = stage["seconds_per_step"] if unit == "seconds" else 1
            x, y = [p["step"] * scale for p in stage["curve"]], [p[metric] for p in stage["curve"]]
            label = ARMS[name].title if seed == 0 else None
            axis.plot(x, y, "o-", color=ARMS[name].colour, lw=1.4, ms=2.5, alpha=0.4 if seed else 1.0, label=label)
            trained += y[1:]
    if metric == "kl":
        axis.set_yscale("log")
    else:
        level = results["teacher"][0]["curve"][-1][metric]
        axis.axhline(level, color="0.35", ls="--", lw=1.2, label="teacher")
        low, high = min(*trained, level), max(*trained, level)  # the untrained student falls out of the frame
        margin = 0.06 * (high - low) or 0.01
        axis.set_ylim(low - margin, high + margin)
    axis.set_xlabel("seconds of training" if unit == "seconds" else "optimiser steps")
    axis.set_ylabel(f"{METRICS[metric]} (nats per token)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def scores(axis: Any, results: dict[str, Any]) -> None:
    """A group of bars per task, one bar per arm, error bars over the seeds, the teacher a line."""
    arms = {name: numbers(stages) for name, stages in results["students"].items()}
    teacher = numbers(results["teacher"])
    tasks = [name for name in next(iter(arms.values())) if name not in METRICS]
    width = 0.8 / len(arms)
    for i, (name, found) in enumerate(arms.items()):
        x = [t - 0.4 + (i + 0.5) * width for t in range(len(tasks))]
        y, error = ([f(found[task]) for task in tasks] for f in (mean, spread))
        axis.bar(x, y, width, yerr=error, color=ARMS[name].colour, capsize=2, error_kw={"lw": 1})
    for t, task in enumerate(tasks):
        axis.hlines(mean(teacher[task]), t - 0.42, t + 0.42, color="0.35", ls="--", lw=1.2)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_ylabel("metric × 100")
    axis.grid(alpha=0.25, axis="y")
    axis.spines[["top", "right"]].set_visible(False)
