"""The tables and pictures of benchmark runs, from their JSON and nothing else.

    python -m benchmarks.report benchmarks/results            NAME.md and NAME.png beside each NAME.json of the folder
    python -m benchmarks.report benchmarks/results --check    fail if a page says other than these and the code

The pages quote benchmarks/results between the markers ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks -->``, and
list the divergences of the code between ``<!-- divergences -->`` and ``<!-- /divergences -->``; rendering that folder
renews both, rendering any other leaves the pages alone.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import accuracy, speed, step
from fusedkd.divergences import FAMILIES, Divergence

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results"  # what the pages quote
PAGES = (ROOT / "README.md", ROOT / "docs" / "distilbert.md")
BLOCK = re.compile(r"(<!-- benchmarks:([\w.-]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
SUBJECTS = {"accuracy": accuracy, "benchmarks": speed, "driver_step": step}  # by what the JSON has
DIVERGENCES = re.compile(r"(<!-- divergences -->\n).*?(<!-- /divergences -->)", re.DOTALL)


def machine(data: dict[str, Any]) -> str:
    info = data["machine_info"]
    device = info.get("CUDA 0", info["CPU"])
    return f"{device}, torch {info['versions']['torch']}, {data['datetime'][:10]}"


def subject(data: dict[str, Any]) -> Any:
    """The module that renders it; None for JSON of something else."""
    return next((module for name, module in SUBJECTS.items() if data.get(name)), None)


def text(data: dict[str, Any]) -> str | None:
    """Table and legend; None for JSON of something else."""
    if subject(data) is None:
        return None
    rows, legend = subject(data).table(data)
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join([*lines, "", f"{machine(data)}. {legend}"])


def plot(data: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(layout="constrained")
    title = subject(data).plot(data, figure)
    figure.suptitle(f"{title}\n{machine(data)}", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# -------------------------------------------------- divergences


def divergences() -> str:
    """A row per family: name, constructor with its defaults, what it is, k of T^k."""
    rows = ["| `divergence=` | or, with its defaults | D | k of T^k |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        rows.append(f'| `"{name}"` | `{constructor(family)}` | {summary(family)} | {family.temperature_power} |')
    return "\n".join(rows) + "\n"


def constructor(family: type[Divergence]) -> str:
    parameters = inspect.signature(family).parameters.values()
    return f"{family.__name__}({', '.join(f'{p.name}={p.default!r}' for p in parameters)})"


def summary(family: type[Divergence]) -> str:
    """The first paragraph of its docstring."""
    return " ".join((inspect.getdoc(family) or "").split("\n\n")[0].split()).replace("|", "\\|")


# -------------------------------------------------- files


def quote(name: str, page: Path) -> str:
    """What a page says about benchmarks/results/NAME.json."""
    picture = Path(os.path.relpath(RECORD / f"{name}.png", page.parent)).as_posix()
    data = json.loads((RECORD / f"{name}.json").read_text())
    found = text(data)
    if found is None:  # a run of the DistilBERT driver
        from recipes.ablation.report import markdown

        return f"![{name}: held-out loss, KL and tasks]({picture})\n\n{markdown(data)}\n"
    if not hasattr(subject(data), "plot"):
        return f"{found}\n"
    what = "errors of each loss and provider" if "accuracy" in data else "time of each loss and provider"
    return f"![{name}: {what}]({picture})\n\n{found}\n"


def with_quotes(page: Path) -> str:
    """Its text, renewed."""
    text = BLOCK.sub(lambda block: block[1] + quote(block[2], page) + block[3], page.read_text())
    return DIVERGENCES.sub(lambda block: block[1] + divergences() + block[2], text)


def render(folder: Path) -> Iterator[Path]:
    for source in sorted(folder.glob("*.json")):
        data = json.loads(source.read_text())
        found = text(data)
        if found is None:
            continue
        source.with_suffix(".md").write_text(f"# {source.stem}\n\n{found}\n")
        if hasattr(subject(data), "plot"):
            plot(data, source.with_suffix(".png"))
        yield source


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RECORD)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args()
    if options.check:
        for page in PAGES:
            if with_quotes(page) != page.read_text():
                raise SystemExit(f"{page.name} is out of date: python -m benchmarks.report")
        return
    for source in render(options.folder):
        print(f"\n{source.with_suffix('.md').read_text()}")
    if options.folder.resolve() == RECORD:
        for page in PAGES:
            page.write_text(with_quotes(page))


if __name__ == "__main__":
    main()
