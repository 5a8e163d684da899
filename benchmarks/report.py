"""The tables and pictures of benchmark runs, from their JSON and nothing else.

    python -m benchmarks.report benchmarks/results            prints the tables; NAME.png beside each NAME.json
    python -m benchmarks.report benchmarks/results --check    fail if a page says other than these and the code

The pages quote benchmarks/results between the markers ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks -->``, where
NAME is that of a JSON file or of an excerpt below, and list the divergences of the code between the markers
``<!-- divergences -->`` and ``<!-- /divergences -->``, the methods of the recipes between ``<!-- methods -->`` and
``<!-- /methods -->``; rendering that folder renews them, any other leaves them alone.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import accuracy, gumbel, history, memory, speed, step
from fusedkd.divergences import FAMILIES, Divergence

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results"  # what the pages quote
NAMES = ("losses", "numbers", "chat", "recipes", "evidence")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES))
BLOCK = re.compile(r"(<!-- benchmarks:([\w.-]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
EXCERPTS = {
    "headline": (
        "cpu",
        (
            "kd_loss-512x30522-float32-T2-ce-fwd+bwd",
            "kd_loss-512x30522-float32-jsd-T2-fwd+bwd",
            "kd_loss-512x30522-float32-bucket64-T1-fwd+bwd",
            "kd_loss-512x30522-bfloat16-T2-ce-fwd+bwd",
        ),
    ),
}
"""Of the record: a few groups of a JSON file, under a name of their own, quoted by a picture and the first in words."""
SUBJECTS = {
    "accuracy": accuracy,
    "benchmarks": speed,
    "driver_step": step,
    "straight_through": gumbel,
    "memory_against_size": memory,
}  # by what the JSON has
METHODS = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)
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
    """In benchmarks/results, only if a page shows it: git keeps each version of a picture."""
    if path.parent.resolve() == RECORD and not shown(path.name):
        return
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


def shown(picture: str) -> bool:
    return any(f"/{picture})" in page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))


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


def methods() -> str:
    """A row per method of recipes.glue: its name and options, what it is, its source and the source's own number."""
    from recipes.glue.method import methods

    rows = ["| `--method`, and its options | method | source | as published |", "|---|---|---|---|"]
    for name, method in sorted(methods().items()):
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in method.options.items()}
        options = ", ".join(f"{key}={value}" for key, value in values.items())
        rows.append(
            f"| `{name}`{f': `{options}`' if options else ''} | {method.title} | {method.paper} | {method.published} |"
        )
    return "\n".join(rows) + "\n"


# -------------------------------------------------- files


def load(name: str, folder: Path = RECORD) -> dict[str, Any]:
    """A JSON file of the folder, or an excerpt of one."""
    source, groups = EXCERPTS.get(name, (name, None))
    data: dict[str, Any] = json.loads((folder / f"{source}.json").read_text())
    if groups is not None:
        data["benchmarks"] = [benchmark for benchmark in data["benchmarks"] if benchmark["group"] in groups]
    return data


def quote(name: str, page: Path) -> str:
    """What a page says about benchmarks/results/NAME.json, or an excerpt."""
    picture = Path(os.path.relpath(RECORD / f"{name}.png", page.parent)).as_posix()
    data = load(name)
    found = text(data)
    if found is None:
        module = importlib.import_module(f"recipes.{data.get('recipe', 'ablation')}.report")
        return f"![{name}: results of the recipe]({picture})\n\n{module.markdown(data)}\n"
    if not hasattr(subject(data), "plot"):
        return f"{found}\n"
    measured = "errors" if "accuracy" in data else "memory" if "memory_against_size" in data else "time"
    what = f"{measured} of each loss and provider"
    if name in EXCERPTS:
        found = f"{speed.sentence(data)} ({machine(data)})."
    return f"![{name}: {what}]({picture})\n\n{found}\n"


def with_quotes(page: Path) -> str:
    """Its text, renewed."""
    text = BLOCK.sub(lambda block: block[1] + quote(block[2], page) + block[3], page.read_text())
    text = METHODS.sub(lambda block: block[1] + methods() + block[2], text)
    return DIVERGENCES.sub(lambda block: block[1] + divergences() + block[2], text)


def render(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and table of each JSON file of the folder, and of the excerpts, once its picture is written."""
    names = sorted(source.stem for source in folder.glob("*.json"))
    for name in [*names, *(EXCERPTS if folder.resolve() == RECORD else [])]:
        data = load(name, folder)
        found = text(data)
        if found is None:
            continue
        if hasattr(subject(data), "plot"):
            plot(data, folder / f"{name}.png")
        yield name, found


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
    for name, table in render(options.folder):
        print(f"\n# {name}\n\n{table}")
    if options.folder.resolve() == RECORD:
        for page in PAGES:
            page.write_text(with_quotes(page))
    history.append(options.folder)


if __name__ == "__main__":
    main()
