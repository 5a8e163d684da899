"""What the times of a case have been: one line of JSON per date, machine and case, in history.jsonl beside the results.

Results are overwritten by the next run, lines of the history never: a case that became slower shows in
``grep kd_loss-512x30522-float32-T2 benchmarks/results/history.jsonl``. `benchmarks.report` appends what is new in its
folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "history.jsonl"


def lines(data: dict[str, Any]) -> Iterator[str]:
    """Those of one result; none for a result without times."""
    if not (times := _times(data)):
        return
    info = data["machine_info"]
    run = {
        "date": data["datetime"],
        "commit": _commit(data),
        "machine": info.get("CUDA 0", info["CPU"]),
        "threads": info.get("threads"),
        "memory": info.get("memory"),
        "torch": info["versions"]["torch"],
        "load": round(info.get("load_before") or 0, 2),
    }
    for case, seconds in times.items():
        medians = {provider: float(f"{value * 1e3:.4g}") for provider, value in seconds.items()}
        yield json.dumps({**run, "case": case, "median_ms": medians}, ensure_ascii=False)


def append(folder: Path) -> None:
    """The lines of the folder's results that its history does not have yet."""
    path = folder / NAME
    known = set(path.read_text().splitlines()) if path.exists() else set()
    found = [line for source in sorted(folder.glob("*.json")) for line in lines(json.loads(source.read_text()))]
    if new := [line for line in found if line not in known]:
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in new)


def _commit(data: dict[str, Any]) -> str:
    """As `git describe` names it; pytest-benchmark's record of it is longer."""
    found = data.get("commit_info") or {}
    return data.get("commit") or str(found.get("id", ""))[:7] + ("-dirty" if found.get("dirty") else "")


def _times(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds per case and provider."""
    times: dict[str, dict[str, float]] = {}
    for benchmark in data.get("benchmarks", []):
        entry = benchmark["extra_info"]
        times.setdefault(benchmark["group"], {})[entry["provider"]] = entry["median"]
    for entry in data.get("driver_step", []):
        for part in ("step", "loss"):
            times.setdefault(f"driver {part}: {entry['shape']}", {})[entry["provider"]] = entry[part]["median"]
    return times
