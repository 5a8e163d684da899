"""Memory of a loss against the size of its input, beside eager PyTorch: what grows, and how.

    python -m benchmarks.memory benchmarks/results                  memory-cpu.json in the folder
    python -m benchmarks.memory benchmarks/results --device cuda    memory-cuda.json

Measured is the peak during value and gradient, beyond the inputs; the gradients are a part of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.attention import attention
from benchmarks.cases import Case
from benchmarks.linear import linear
from benchmarks.measure import evaluate, peak_bytes, set_malloc
from benchmarks.projected import projected
from benchmarks.providers import loss_of
from benchmarks.record import require, stamp, write
from benchmarks.speed import COLOURS, size
from fusedkd import env

PROVIDERS = ("fusedkd", "eager")

SERIES: dict[str, tuple[str, dict[int, Case]]] = {
    "attention_kl_loss, 12 heads of 64, float32": (
        "L",
        {length: attention("kl", 1, length) for length in (256, 512, 1024, 2048, 4096)},
    ),
    "hidden_loss behind a projection, 768 → 4096, float32": (
        "N",
        {rows: projected(rows, 768, 4096) for rows in (1024, 2048, 4096, 8192, 16384)},
    ),
    "linear_kd_loss, (256, 512) × 32000, with CE, float32": (
        "N",
        {rows: linear(rows, 256, 512, 32000, "float32") for rows in (256, 512, 1024, 2048, 4096)},
    ),
}
"""What a series is of: the name of the size that grows, and the case of each size."""


def record(series: dict[str, tuple[str, dict[int, Case]]], device: str, command: str) -> dict[str, Any]:
    found = []
    for name, (axis, cases) in series.items():
        for at, case in cases.items():
            for provider in PROVIDERS:
                loss, inputs = loss_of(provider, case), case.inputs(device)[0]
                evaluate(loss, case, inputs)  # what is lazy
                peak = peak_bytes(lambda loss=loss, case=case, inputs=inputs: evaluate(loss, case, inputs), device)
                found.append(
                    {
                        "series": name,
                        "axis": axis,
                        "at": at,
                        "provider": provider,
                        "peak_bytes": peak,
                        "gradient_bytes": case.gradient_bytes,
                    }
                )
    info = {**env.devices(), "versions": env.versions(), "memory": "fresh" if device == "cpu" else None}
    return {"machine_info": {**info, "command": command}, **stamp(), "memory_against_size": found}


def series(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The entries of each series."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in data["memory_against_size"]:
        found.setdefault(entry["series"], []).append(entry)
    return found


def table(data: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Header and a row per size; legend."""
    rows = [["", "size", *PROVIDERS, "gradients alone"]]
    for name, entries in series(data).items():
        for i, at in enumerate(dict.fromkeys(entry["at"] for entry in entries)):
            peaks = {entry["provider"]: entry for entry in entries if entry["at"] == at}
            ours, theirs = (size(peaks[provider]["peak_bytes"]) for provider in PROVIDERS)
            heading = name if i == 0 else ""
            gradients = size(peaks["fusedkd"]["gradient_bytes"])
            rows.append([heading, f"{entries[0]['axis']} = {at}", f"**{ours}**", theirs, gradients])
    return rows, "The peak during value and gradient, beyond the inputs; the gradients are a part of it."


def plot(data: dict[str, Any], figure: Any) -> str:
    """A panel per series, a line per provider. Returns the title."""
    panels = series(data)
    figure.set_size_inches(4.6 * len(panels), 3.8)
    for axes, (name, entries) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for provider in PROVIDERS:
            points = [
                (e["at"], e["peak_bytes"] / 1e6) for e in entries if e["provider"] == provider and e["peak_bytes"]
            ]
            axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[provider], label=provider)
        floor = {entry["at"]: entry["gradient_bytes"] / 1e6 for entry in entries}
        axes.plot(floor.keys(), floor.values(), linestyle=":", color="#212529", label="gradients alone")
        axes.set(xscale="log", yscale="log", xlabel=entries[0]["axis"])
        axes.set_title(name, fontsize=9)
        axes.set_xticks(list(floor), [str(at) for at in floor])
        axes.minorticks_off()
    first = figure.axes[0]
    first.set_ylabel("MB")
    first.legend(fontsize=8, frameon=False)
    return "Peak memory of value and gradient, beyond the inputs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    require(options.device)
    set_malloc("fresh")
    path = options.folder / f"memory-{options.device}.json"
    command = f"python -m benchmarks.memory {options.folder} --device {options.device}"
    write(path, record(SERIES, options.device, command))
    print(path)


if __name__ == "__main__":
    main()
