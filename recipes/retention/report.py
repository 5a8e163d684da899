"""The table, `results.json` and the picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from recipes.ablation.report import cell, circumstances, finish, grid, markdown_table, where

Results = dict[str, Any]
PUBLISHED = (
    "In the paper DistilBERT keeps 97 % of BERT's mean score with 60 % of its parameters (66 of 110 million), and a "
    "pass over STS-B at batch 1 takes 410 seconds instead of 668."
)
"""arXiv:1910.01108, tables 1 and 3."""


def write(folder: Path, settings: Results, teacher: Results, rows: list[Results], seconds: Results) -> None:
    """`rows`: of each model its name, parameters and, by task, the scores of its seeds; the teacher comes first."""
    results = {"recipe": "retention", **circumstances(), "settings": settings, "teacher": teacher}
    results |= {"models": rows, "latency": seconds}
    finish(folder, results, [table(results), *findings(results)], plot, "retention.png")


def means(row: Results) -> float:
    return mean(mean(scores) for scores in row["scores"].values())


def table(results: Results) -> Table:
    teacher, latency = results["models"][0], results["latency"]
    tasks = list(teacher["scores"])
    seeds = sorted({len(scores) for row in results["models"][1:] for scores in row["scores"].values()})
    count = " to ".join(str(n) for n in sorted({*seeds[:1], *seeds[-1:]}))
    title = "Scores × 100, " + ("of one seed" if count == "1" else f"mean of {count} seeds ± standard deviation")
    found = grid(title, "model", "parameters", f"s for {latency['pairs']:,} pairs", *tasks, "mean", "of the teacher's")
    for row in results["models"]:
        time = latency["seconds"].get(row["model"])
        cells = [row["model"], f"{row['parameters']:,}", "" if time is None else f"{time:.1f}"]
        cells += [cell(row["scores"][task], 1) for task in tasks]
        found.add_row(*cells, f"{means(row):.1f}", f"{means(row) / means(teacher):.1%}" if means(teacher) > 0 else "")
    return found


def findings(results: Results) -> list[str]:
    """A sentence each."""
    teacher, *students = results["models"]
    seconds = results["latency"]["seconds"]
    if not students:
        return []
    best = max(students, key=means)
    change = best["parameters"] / teacher["parameters"] - 1
    line = f"The best students by mean score are those of {best['model']}"
    if means(teacher) > 0:
        line += f": they keep {means(best) / means(teacher):.1%} of the teacher's mean score"
    line += f", with {abs(change):.0%} {'more' if change > 0 else 'fewer'} parameters"
    if best["model"] in seconds:
        line += f", and are {seconds['teacher'] / seconds[best['model']]:.2f} times as fast"
    return [f"{line}.", PUBLISHED]


def markdown(results: Results) -> str:
    """The table and what follows from it, for a page."""
    shown = table(results)
    legend = f"{where(results)}. {shown.title}; seconds of one core for the held-out pairs of STS-B, one by one."
    return "\n".join([*markdown_table(shown), "", legend, "", *(f"- {line}" for line in findings(results))])


def plot(results: Results, file: Path) -> None:
    """Mean score over the time of the pass."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for row in results["models"]:
        if row["model"] not in results["latency"]["seconds"]:
            continue
        at = results["latency"]["seconds"][row["model"]], means(row)
        axis.plot(
            *at, "s" if row["model"] == "teacher" else "o", color="0.35" if row["model"] == "teacher" else "#0b6e99"
        )
        axis.annotate(row["model"], at, xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.set_xlabel(f"seconds of one core for {results['latency']['pairs']:,} pairs, one by one")
    axis.set_ylabel("mean score × 100")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
