"""Table and picture of a run of ``benchmarks/test_losses.py``: time, memory and error of each case and provider."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from benchmarks import layers
from benchmarks.attention import AttentionCase
from benchmarks.cases import Case
from benchmarks.linear import LinearCase
from benchmarks.projected import ProjectedCase
from benchmarks.providers import PRODUCTS

Entry = dict[str, Any]

BOUND_BY_PRODUCTS: dict[str, type[Case]] = {
    "linear_kd_loss": LinearCase,
    "projected_hidden_loss": ProjectedCase,
    "attention_kl_loss": AttentionCase,
    "attention_mse_loss": AttentionCase,
}
KINDS = BOUND_BY_PRODUCTS | dict.fromkeys(layers.PROVIDERS, layers.LayersCase)
"""The losses that have cases of their own; all others have those of `cases.py`."""
COLOURS = {"fusedkd": "#0b7285", "eager": "#adb5bd", "torch.compile": "#868e96", "liger": "#e8590c"}
OTHER_COLOUR = "#ced4da"
MEMORY = {
    "fresh": "Tensors above 32 MB are made of fresh pages, which the system zeroes: glibc's default. ",
    "kept": "Freed memory is kept and reused, as by jemalloc: no pages to zero. ",
}
RESOLUTION = 0.2e6  # bytes: Linux counts resident pages in batches per core


# -------------------------------------------------- words and numbers


def label(entry: Entry) -> str:
    """The case, as a heading."""
    kind = KINDS.get(entry["loss"], Case)
    return kind(**{field.name: entry[field.name] for field in fields(kind) if field.name in entry}).label


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


# -------------------------------------------------- table


def table(data: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Header and a row per case, the providers side by side; legend."""
    groups = cases(data)
    providers = list(dict.fromkeys(entry["provider"] for group in groups for entry in group))
    order = " / ".join(providers)
    of_products = groups[0][0]["loss"] in BOUND_BY_PRODUCTS
    bound = "of the products" if of_products else "of a copy"
    rows = [["", *providers, bound, f"temporaries: {order}", f"error of the gradient: {order}"]]
    for group in groups:
        entries = [{entry["provider"]: entry for entry in group}.get(name) for name in providers]
        rows.append(
            [
                label(group[0]),
                *(_time(entry) for entry in entries),
                _of_bound(group),
                " / ".join(size(temporaries(entry)) if entry else "–" for entry in entries),
                " / ".join(relative(entry["gradient_error"]) if entry else "–" for entry in entries),
            ]
        )
    return rows, _legend(data)


def _of_bound(group: list[Entry]) -> str:
    """How much of its time fusedkd would need at the speed of what bounds it."""
    entries = {entry["provider"]: entry for entry in group}
    if PRODUCTS in entries and "fusedkd" in entries:
        return f"{entries[PRODUCTS]['ratio']:.0%}"
    return f"{entries['fusedkd']['of_copy']:.0%}" if "of_copy" in entries.get("fusedkd", {}) else "–"


def _time(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    if entry["provider"] == "fusedkd" or entry["ratio"] is None:
        return f"**{duration(entry['median'])}**"
    marked = " ▼" if entry["ratio"] < 1 and entry["provider"] != PRODUCTS else ""
    return f"{duration(entry['median'])} ({entry['ratio']:.{1 if entry['ratio'] >= 1 else 2}f}×{marked})"


def _legend(data: dict[str, Any]) -> str:
    rounds = [benchmark["extra_info"]["rounds"] for benchmark in data["benchmarks"]]
    bound = (
        "Of a copy: fusedkd's bytes per second, inputs and gradient counted once, relative to a plain copy in the same "
        f"run ({data['machine_info']['copy_gb_per_s']:.0f} GB/s)."
    )
    if data["benchmarks"][0]["extra_info"]["loss"] in BOUND_BY_PRODUCTS:
        bound = (
            "Of the products: the time of the matrix products alone, in the operands' type, in the same rounds, "
            "relative to fusedkd's."
        )
    return MEMORY.get(data["machine_info"].get("memory"), "") + (
        f"Medians of {min(rounds)} to {max(rounds)} rounds in which the providers took turns; in brackets the time "
        f"relative to fusedkd's, its median over the rounds; ▼: faster than fusedkd. {bound} "
        "Temporaries: peak memory beyond the inputs and the gradient. Error: relative L2 distance to the float64 "
        "gradient."
    )


def sentence(data: dict[str, Any]) -> str:
    """The first case in words: time and temporaries of each provider."""
    group = cases(data)[0]
    measured = [f"{entry['provider']} {_time(entry)} and {size(temporaries(entry))}" for entry in group]
    return f"{label(group[0])}, time and temporary memory: {', '.join(measured)}"


# -------------------------------------------------- picture


def plot(data: dict[str, Any], figure: Any) -> str:
    """A panel per case, a bar per provider: time with its p20–p80, ratio, temporaries and error. Returns the title."""
    groups = cases(data)
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    bars = max(len(group) for group in groups)
    figure.set_size_inches(6.4 * columns, 1 + rows * (0.55 + 0.3 * bars))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, group in zip(grid.flat, groups, strict=False):
        _panel(axes, group)
    for axes in grid.flat[len(groups) :]:
        axes.axis("off")
    figure.supxlabel(
        "bar: median of interleaved rounds, line: p20–p80, ×: relative to fusedkd, MB: peak memory beyond inputs and "
        "gradient, error: of the gradient (forward only: of the value) against float64",
        fontsize=8,
        color="#495057",
    )
    return "Forward + backward unless noted: shorter is better"


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
