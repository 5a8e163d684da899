"""What came out: the table, `results.json` and `curves.png`."""

import datetime
import io
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from fusedkd import env, ops
from fusedkd.distilbert.config import Config

TRIPLE, ALONE = "triple loss", "MLM alone"
METRICS = {"loss": "held-out loss", "accuracy": "accuracy", "kl": "KL to teacher"}
COLOURS = {TRIPLE: "#0b6e99", ALONE: "#d9730d"}
Stage = dict[str, Any]  # what driver.train returns
Points = list[dict[str, float]]  # one per seed


def write(config: Config, vocab: int, teacher: Stage, students: dict[str, list[Stage]], console: Console) -> None:
    """Compare the students at equal steps and at equal seconds; print the table, write JSON and picture."""
    steps = config.student.student_steps
    step_seconds = {name: mean(s["seconds_per_step"] for s in stages) for name, stages in students.items()}
    seconds = steps * min(step_seconds.values())
    by_steps = {name: [at(s, steps) for s in stages] for name, stages in students.items()}
    by_seconds = {name: [at(s, seconds / step_seconds[name]) for s in stages] for name, stages in students.items()}
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": env.devices(),
        "versions": env.versions(),
        "backends": {operator: backend for (operator, _), (backend, _) in ops.backends.items()},
        "settings": config.settings() | {"vocab_size": vocab, "seeds": config.student.seeds},
        "teacher": teacher,
        "equal_steps": {"steps": steps} | {name: summary(points) for name, points in by_steps.items()},
        "equal_seconds": {"seconds": seconds} | {name: summary(points) for name, points in by_seconds.items()},
        "triple_loss_against_mlm_alone": {metric: verdict(by_steps, metric) for metric in METRICS},
        "students": students,
    }
    files = {"results.json": config.folder / "results.json", "curves.png": config.folder / "curves.png"}
    files["results.json"].write_text(json.dumps(results, indent=1) + "\n")
    plot(config, results, files["curves.png"])
    console.print(table(results))
    for metric, outcome in results["triple_loss_against_mlm_alone"].items():
        console.print(f"{TRIPLE} against {ALONE} after {steps} steps, {METRICS[metric]}: {outcome}")
    console.print(f"student in {config.folder / 'student'}; numbers, picture: {', '.join(map(str, files.values()))}")


def at(stage: Stage, step: float) -> dict[str, float]:
    """The metrics at a step, interpolated between evaluations."""
    steps = [point["step"] for point in stage["curve"]]
    return {m: float(np.interp(step, steps, [point[m] for point in stage["curve"]])) for m in METRICS}


def summary(points: Points) -> dict[str, dict[str, float]]:
    """Mean over the seeds, and spread: largest minus smallest."""
    values = {m: [p[m] for p in points] for m in METRICS}
    return {m: {"mean": mean(v), "spread": max(v) - min(v)} for m, v in values.items()}


def verdict(points: dict[str, Points], metric: str) -> str:
    """Whether the triple loss wins, by more than its seeds or those of MLM alone differ."""
    triple, alone = (summary(points[name])[metric] for name in (TRIPLE, ALONE))
    gain = (triple["mean"] - alone["mean"]) * (1 if metric == "accuracy" else -1)
    outcome = f"{'better' if gain > 0 else 'worse'} by {abs(gain):.4f}"
    if len(points[TRIPLE]) == 1:
        return f"{outcome} (one seed)"
    spread = max(triple["spread"], alone["spread"])
    if abs(gain) <= spread:
        return f"no difference beyond the seeds' {spread:.4f}"
    return f"{outcome} (spread of the seeds {spread:.4f})"


def table(results: dict[str, Any]) -> Table:
    seeds = results["settings"]["seeds"]
    grid = Table(title="Teacher and students" + (f", mean of {seeds} seeds ± spread" if seeds > 1 else ""))
    for column in ("model", "after", "parameters", *METRICS.values(), "tokens/s"):
        grid.add_column(column, justify="left" if column in ("model", "after") else "right", no_wrap=True)

    def row(model: str, after: str, stages: list[Stage], point: dict[str, Any]) -> None:
        cells = [f"{v['mean']:.4f}" + (f" ± {v['spread']:.4f}" if v["spread"] else "") for v in point.values()]
        speeds = [s["tokens_per_second"] for s in stages if "tokens_per_second" in s]
        grid.add_row(model, after, f"{stages[0]['parameters']:,}", *cells, f"{mean(speeds):,.0f}" if speeds else "")

    teacher, first = results["teacher"], results["students"][TRIPLE][0]
    row(
        "teacher", f"{teacher['steps']} steps" if "steps" in teacher else "", [teacher], summary([teacher["curve"][-1]])
    )
    row("student as copied", "0 steps", [{"parameters": first["parameters"]}], summary([first["curve"][0]]))
    for key, unit in (("equal_steps", "steps"), ("equal_seconds", "seconds")):
        grid.add_section()
        for name in (TRIPLE, ALONE):
            row(f"student, {name}", f"{results[key][unit]:.0f} {unit}", results["students"][name], results[key][name])
    return grid


def markdown(results: dict[str, Any]) -> str:
    """The table and what follows from it, for a page."""
    grid = table(results)
    grid.box, grid.title = box.MARKDOWN, None
    page = io.StringIO()
    Console(width=200, file=page, color_system=None).print(grid)
    lines = [line.strip() for line in page.getvalue().splitlines() if line.strip(" |")]
    settings, steps = results["settings"], results["equal_steps"]["steps"]
    outcomes = "; ".join(f"{METRICS[m]} {v}" for m, v in results["triple_loss_against_mlm_alone"].items())
    where = f"{results['machine']['CPU']}, torch {results['versions']['torch']}, {results['date'][:10]}"
    seeds = f"Mean of {settings['seeds']} seeds ± spread, on" if settings["seeds"] > 1 else "On"
    share = f"{settings['mlm_probability']:.0%}"
    legend = f"{where}. {seeds} the masked tokens ({share}) of held-out text. After {steps} steps the triple loss is, "
    return "\n".join([*lines, "", f"{legend}against MLM alone: {outcomes}."])


def plot(config: Config, results: dict[str, Any], file: Path) -> None:
    """Loss over steps and over seconds, accuracy and KL over steps: both students, every seed, the teacher a line."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    teacher = results["teacher"]
    panels = [("loss", "steps"), ("loss", "seconds"), ("accuracy", "steps"), ("kl", "steps")]
    axes = figure.subplots(2, 2).flat
    for axis, (metric, unit) in zip(axes, panels, strict=True):
        trained = []
        for name, stages in results["students"].items():
            for seed, stage in enumerate(stages):
                scale = stage["seconds_per_step"] if unit == "seconds" else 1
                x, y = [p["step"] * scale for p in stage["curve"]], [p[metric] for p in stage["curve"]]
                label = f"student, {name}" if seed == 0 else None
                axis.plot(x, y, "o-", color=COLOURS[name], lw=1.6, ms=3, alpha=0.5 if seed else 1.0, label=label)
                trained += y[1:]
        if metric == "kl":
            axis.set_yscale("log")
        else:
            level = teacher["curve"][-1][metric]
            axis.axhline(level, color="0.35", ls="--", lw=1.2, label="teacher")
            low, high = min(*trained, level), max(*trained, level)  # the untrained student falls out of the frame
            margin = 0.06 * (high - low) or 0.01
            axis.set_ylim(low - margin, high + margin)
        axis.set_xlabel("seconds of training" if unit == "seconds" else "optimiser steps")
        axis.set_ylabel(METRICS[metric] + ("" if metric == "accuracy" else " (nats per masked token)"))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    s, first = results["settings"], results["students"][TRIPLE][0]
    source = s["dataset"] or ", ".join(s["train_files"]) or "Python's documentation"
    millions = [f"{stage['parameters'] / 1e6:.2f} M" for stage in (teacher, first)]
    weights = f"{s['alpha_distil']:g}, {s['alpha_mlm']:g}, {s['alpha_cos']:g}"
    figure.suptitle(
        f"DistilBERT student ({millions[1]} parameters) of a BERT teacher ({millions[0]}) on {source}\n"
        f"vocabulary {s['vocab_size']:,}, {s['mlm_probability']:.0%} masked, T = {s['temperature']:g}, "
        f"weights {weights}, {s['seeds']} seed{'s' * (s['seeds'] > 1)}"
    )
    figure.savefig(file, dpi=130)
