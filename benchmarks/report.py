"""The table and the picture of a benchmark run, from its JSON and nothing else.

    python -m benchmarks.report benchmarks/results            NAME.md and NAME.png beside each NAME.json of the folder
    python -m benchmarks.report benchmarks/results --check    fail if README.md quotes other numbers than these

The README quotes benchmarks/results between the markers ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks -->``;
rendering that folder renews the quotes, rendering any other leaves the README alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results"  # what the README quotes
BLOCK = re.compile(r"(<!-- benchmarks:([\w.-]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
COLOURS = {"fusedkd": "#0b7285", "eager": "#adb5bd", "torch.compile": "#868e96"}
OTHER_COLOUR = "#ced4da"
RESOLUTION = 0.2e6  # bytes: Linux counts resident pages in batches per core


# -------------------------------------------------- words and numbers


def label(entry: Entry) -> str:
    """The case, as a heading."""
    kd = f", T = {entry['temperature']:g}" + (", with CE" if entry["ce"] else "") if entry["loss"] == "kd_loss" else ""
    direction = "" if entry["backward"] else ", forward only"
    return f"{entry['loss']} {entry['rows']}×{entry['columns']} {entry['dtype']}{kd}{direction}"


def temporaries(entry: Entry) -> int | None:
    """Peak memory beyond the inputs and the gradient."""
    return None if entry["peak_bytes"] is None else max(entry["peak_bytes"] - entry["gradient_bytes"], 0)


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def size(count: int | None) -> str:
    if count is None:
        return "–"
    if count < RESOLUTION:
        return "< 0.2 MB"
    if count > 1e10:
        return f"{count / 1e9:.0f} GB"
    return f"{count / 1e6:.{0 if count > 1e7 else 1}f} MB"


def relative(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}".replace("e-0", "e-")


def cases(data: dict[str, Any]) -> list[list[Entry]]:
    """The entries of each case, in the order in which they were measured."""
    groups: dict[str, list[Entry]] = {}
    for benchmark in data["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark["extra_info"])
    return list(groups.values())


def machine(data: dict[str, Any]) -> str:
    info = data["machine_info"]
    device = info.get("CUDA 0", info["CPU"])
    return f"{device}, torch {info['versions']['torch']}, {data['datetime'][:10]}"


# -------------------------------------------------- table


def table(data: dict[str, Any]) -> str:
    """Markdown: a row per case, the providers side by side."""
    groups = cases(data)
    providers = list(dict.fromkeys(entry["provider"] for group in groups for entry in group))
    order = " / ".join(providers)
    header = ["", *providers, "of a copy", f"temporaries: {order}", f"error of the gradient: {order}"]
    rows = [header, ["---"] * len(header)]
    for group in groups:
        entries = [{entry["provider"]: entry for entry in group}.get(name) for name in providers]
        fused = entries[0] if providers[0] == "fusedkd" else None
        rows.append(
            [
                label(group[0]),
                *(_time(entry) for entry in entries),
                f"{fused['of_copy']:.0%}" if fused else "–",
                " / ".join(size(temporaries(entry)) if entry else "–" for entry in entries),
                " / ".join(relative(entry["gradient_error"]) if entry else "–" for entry in entries),
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", f"{machine(data)}. {_legend(data)}"])


def _time(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    if entry["provider"] == "fusedkd" or entry["ratio"] is None:
        return f"**{duration(entry['median'])}**"
    return f"{duration(entry['median'])} ({entry['ratio']:.1f}×)"


def _legend(data: dict[str, Any]) -> str:
    rounds = [benchmark["extra_info"]["rounds"] for benchmark in data["benchmarks"]]
    return (
        f"Medians of {min(rounds)} to {max(rounds)} rounds in which the providers took turns; in brackets the time "
        "relative to fusedkd's, its median over the rounds. Of a copy: fusedkd's bytes per second, inputs and gradient "
        f"counted once, relative to a plain copy in the same run ({data['machine_info']['copy_gb_per_s']:.0f} GB/s). "
        "Temporaries: peak memory beyond the inputs and the gradient. Error: relative L2 distance to the float64 "
        "gradient."
    )


# -------------------------------------------------- picture


def plot(data: dict[str, Any], path: Path) -> None:
    """A panel per case, a bar per provider: time with its p20–p80, ratio, temporaries and error."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = cases(data)
    columns = 2 if len(groups) > 1 else 1
    rows = -(-len(groups) // columns)
    bars = max(len(group) for group in groups)
    figure, grid = plt.subplots(
        rows, columns, figsize=(6.4 * columns, 1 + rows * (0.55 + 0.3 * bars)), squeeze=False, layout="constrained"
    )
    for axes, group in zip(grid.flat, groups, strict=False):
        _panel(axes, group)
    for axes in grid.flat[len(groups) :]:
        axes.axis("off")
    figure.suptitle(f"Forward + backward unless noted: shorter is better\n{machine(data)}", fontsize=12)
    figure.supxlabel(
        "bar: median of interleaved rounds, line: p20–p80, ×: relative to fusedkd, MB: peak memory beyond inputs and "
        "gradient, error: of the gradient (forward only: of the value) against float64",
        fontsize=8,
        color="#495057",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axes: Any, group: list[Entry]) -> None:
    longest = max(entry["p80"] for entry in group) * 1e3
    for i, entry in enumerate(group):
        fused = entry["provider"] == "fusedkd"
        low, median, high = (entry[name] * 1e3 for name in ("p20", "median", "p80"))
        axes.barh(i, median, height=0.72, color=COLOURS.get(entry["provider"], OTHER_COLOUR))
        axes.plot([low, high], [i, i], color="#212529", linewidth=1, solid_capstyle="butt")
        ratio = "" if fused or entry["ratio"] is None else f" ({entry['ratio']:.1f}×)"
        time = axes.annotate(
            duration(entry["median"]) + ratio,
            (max(median, high), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold" if fused else "normal",
        )
        error = entry["gradient_error"] if entry["backward"] else entry["value_error"]
        axes.annotate(
            f"{size(temporaries(entry))}, error {relative(error)}",
            (1, 0.5),
            xycoords=time,
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#868e96",
        )
    axes.set_yticks(range(len(group)), [entry["provider"] for entry in group], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.9)  # room for the annotations of the longest bar
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_title(label(group[0]), fontsize=9.5, loc="left")


# -------------------------------------------------- files


def quote(name: str) -> str:
    """What the README says about benchmarks/results/NAME.json."""
    folder = RECORD.relative_to(ROOT).as_posix()
    data = json.loads((RECORD / f"{name}.json").read_text())
    if "benchmarks" not in data:  # a run of the DistilBERT driver
        from fusedkd.distilbert.report import markdown

        return f"![{name}: held-out loss, accuracy and KL]({folder}/{name}.png)\n\n{markdown(data)}\n"
    return f"![{name}: time of each loss and provider]({folder}/{name}.png)\n\n{table(data)}\n"


def with_quotes(readme: str) -> str:
    return BLOCK.sub(lambda block: block[1] + quote(block[2]) + block[3], readme)


def render(folder: Path) -> Iterator[Path]:
    for source in sorted(folder.glob("*.json")):
        data = json.loads(source.read_text())
        if "benchmarks" not in data:  # something else's results
            continue
        source.with_suffix(".md").write_text(f"# {source.stem}\n\n{table(data)}\n")
        plot(data, source.with_suffix(".png"))
        yield source


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RECORD)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if options.check:
        if with_quotes(text) != text:
            raise SystemExit("README.md does not say what benchmarks/results does: python -m benchmarks.report")
        return
    for source in render(options.folder):
        print(f"\n{source.with_suffix('.md').read_text()}\n{source.with_suffix('.png')}")
    if options.folder.resolve() == RECORD and with_quotes(text) != text:
        readme.write_text(with_quotes(text))


if __name__ == "__main__":
    main()
