"""The table and the picture of the students, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from recipes.ablation.report import circumstances, finish, grid, markdown_table, where
from recipes.causal.arms import ARMS, PUBLISHED

Results = dict[str, Any]


def write(folder: Path, results: Results) -> None:
    """`results`: settings, teacher, of each budget its arms, and the eager step."""
    results = {"recipe": "causal", **circumstances(), **results}
    finish(folder, results, [*tables(results), *findings(results)], plot)


def tables(results: Results) -> list[Table]:
    clock = results["settings"]["clock"]
    columns = ("model", "at equal", "steps", "s", "s/step", "MB beyond models", "perplexity", "KL to teacher")
    table = grid(f"Half of the layers; {clock} seconds", *columns)
    teacher = results["teacher"]
    table.add_row("teacher", "", "", "", "", "", f"{teacher['perplexity']:,.2f}", "0")
    for budget, arms in results["students"].items():
        table.add_section()
        for name, found in arms.items():
            row = [ARMS[name].title, budget, str(found["steps"]), f"{found['seconds'][clock]:.0f}"]
            row += [f"{found['seconds_per_step'][clock]:.2f}", megabytes(found["peak_mb"])]
            table.add_row(*row, f"{found['perplexity']:,.2f}", f"{found['kl']:.3f}")
    first = next(iter(next(iter(results["students"].values())).values()))["curve"][0]
    table.add_section()
    table.add_row("student as copied", "", "0", "", "", "", f"{first['perplexity']:,.2f}", f"{first['kl']:.3f}")
    step = grid(
        "Forward and backward of one batch, forward KL", "model", f"{clock} s", "MB beyond models and gradients"
    )
    for name, found in results["step"].items():
        title = {"fused": "from the hidden states", "eager": "whole logits, F.kl_div"}[name]
        step.add_row(title, f"{found['seconds'][clock]:.2f}", megabytes(found["peak_mb"]))
    return [table, step]


def megabytes(number: float | None) -> str:
    return "" if number is None else f"{number:.0f}"


def findings(results: Results) -> list[str]:
    """A sentence each."""
    lines = []
    for budget, arms in results["students"].items():
        order = sorted(arms, key=lambda name: arms[name]["perplexity"])
        shown = ", ".join(f"{ARMS[name].title} {arms[name]['perplexity']:,.2f}" for name in order)
        lines.append(f"At equal {budget}, perplexity from the best to the worst: {shown} (one seed).")
    fused, eager = (results["step"][name] for name in ("fused", "eager"))
    clock = results["settings"]["clock"]
    line = f"The eager loss takes {eager['seconds'][clock] / fused['seconds'][clock]:.2f} times as long for one batch"
    if fused["peak_mb"] and eager["peak_mb"]:
        line += f" and {eager['peak_mb'] - fused['peak_mb']:.0f} MB more memory"
    return [*lines, f"{line}.", PUBLISHED]


def markdown(results: Results) -> str:
    """The tables and what follows from them, for a page."""
    lines = [line for table in tables(results) for line in [*markdown_table(table), ""]]
    its, of = results["settings"], results["teacher"]
    package = f" ({of['distribution']} {of['version']}, {of['licence']})" if "distribution" in of else ""
    batch = f"{its['per_device_train_batch_size']} blocks of {its['block_size']} tokens"
    models = f"Teacher {of['name']}{package}, {of['layers']} layers; students of {len(its['layers'])}"
    legend = f"{where(results)}. {models}; batches of {batch}; seconds: {its['clock']}."
    return "\n".join([*lines, legend, "", *(f"- {line}" for line in findings(results))])


def plot(results: Results, file: Path) -> None:
    """Perplexity and KL of each arm over its budget."""
    budgets, clock = results["students"], results["settings"]["clock"]
    figure = Figure(figsize=(11, 4 * len(budgets)), layout="constrained")
    axes = figure.subplots(len(budgets), 2, squeeze=False)
    for row, (budget, arms) in zip(axes, budgets.items(), strict=True):
        for axis, metric in zip(row, ("perplexity", "kl"), strict=True):
            for name, found in arms.items():
                scale = found["seconds_per_step"][clock] if budget == "seconds" else 1
                x, y = [p["step"] * scale for p in found["curve"]], [p[metric] for p in found["curve"]]
                axis.plot(x, y, "o-", color=ARMS[name].colour, lw=1.4, ms=3, label=ARMS[name].title)
            if metric == "perplexity":
                axis.axhline(results["teacher"]["perplexity"], color="0.35", ls="--", lw=1.2, label="teacher")
                axis.set_yscale("log")
            axis.set_xlabel(f"seconds of training ({clock})" if budget == "seconds" else "optimiser steps")
            axis.set_ylabel("held-out perplexity" if metric == "perplexity" else "KL to teacher (nats per token)")
            axis.grid(alpha=0.25, which="both")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    settings, of = results["settings"], results["teacher"]
    some = next(iter(next(iter(budgets.values())).values()))
    figure.suptitle(
        f"{of['name']}: {of['parameters'] / 1e6:.0f} M parameters, {of['layers']} layers; students "
        f"{some['parameters'] / 1e6:.0f} M, {len(settings['layers'])} layers\n"
        f"blocks of {settings['block_size']} tokens, {settings['per_device_train_batch_size']} in a batch, "
        f"T = {settings['temperature']:g}",
        fontsize=11,
    )
    figure.savefig(file, dpi=130)
