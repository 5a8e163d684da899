"""The table, `results.json` and the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from recipes.ablation.report import circumstances, finish, grid, markdown_table, where

Results = dict[str, Any]


def write(folder: Path, runs: dict[str, Results]) -> None:
    """`runs`: of each its name and what `fusedkd distil` wrote of it."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"recipe": "chat", **circumstances(), "runs": runs}
    finish(folder, results, [table(results)], plot, "curves.png")


def table(results: Results) -> Table:
    found = grid("Held out", "model", "mode", "steps", "perplexity", "KL to teacher")
    for name, run in results["runs"].items():
        mode, last = run["settings"]["mode"], run["log"][-1]
        for when, steps in (("before", 0), ("after", last["step"])):
            kl = next((value for key, value in run[when].items() if key.startswith("kl")), float("nan"))
            row = [f"{name}, {when}", mode, str(steps), f"{run[when]['perplexity']:,.1f}", f"{kl:.3f}"]
            found.add_row(*row)
    return found


def markdown(results: Results) -> str:
    """The table, for a page."""
    first = next(iter(results["runs"].values()))
    its, sizes = first["settings"], first["parameters"]
    models = f"{sizes['student'] / 1e6:.0f} M parameters of the teacher's {sizes.get('teacher', 0) / 1e6:.0f} M"
    batch = its["per_device_train_batch_size"]
    trained = f"batches of {batch} conversations, learning rate {its['learning_rate']:g}"
    legend = f"{where(results)}. Student: {models}; {trained}."
    return "\n".join([*markdown_table(table(results)), "", legend])


def plot(results: Results, file: Path) -> None:
    """The KD term of each run over its steps."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, run in results["runs"].items():
        log = [entry for entry in run["log"] if "kd" in entry]
        axis.plot([e["step"] for e in log], [e["kd"] for e in log], "o-", ms=3, lw=1.4, label=name)
    axis.set_xlabel("optimiser steps")
    axis.set_ylabel("KD term in training (nats per token)")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
