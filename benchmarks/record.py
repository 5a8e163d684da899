"""What a benchmark's JSON says: the machine and versions it ran on, and an entry per case and provider."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import providers
from benchmarks.attention import AttentionCase
from benchmarks.cases import Case
from benchmarks.linear import LinearCase
from benchmarks.measure import Measurement, copy_bandwidth
from fusedkd import env

ROOT = Path(__file__).parents[1]
LOAD = os.getloadavg()[0]  # before the run adds its own: the record of a busy machine says so
LARGEST_ERROR = 0.01  # relative, of a gradient; bfloat16 rounds to 0.002. Being wrong fast is no result.


def require(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but torch sees no GPU")


def process(command: str) -> dict[str, Any]:
    """What `machine_info` says of the process and where it runs."""
    return {
        **env.devices(),
        "threads": torch.get_num_threads(),
        "load_before": LOAD,
        "versions": env.versions(),
        "command": command,
    }


def machine(device: str, command: str) -> dict[str, Any]:
    """With what else the comparison of providers depends on."""
    found = process(command)
    found["versions"] |= providers.versions()
    return found | {"copy_gb_per_s": copy_bandwidth(device) / 1e9}


def entry_of(case: Case, provider: str, measured: Measurement, device: str) -> dict[str, Any]:
    fifths = statistics.quantiles(measured.seconds, n=5)
    median = statistics.median(measured.seconds)
    return {
        **asdict(case),
        "provider": provider,
        "rounds": len(measured.seconds),
        "median": median,
        "p20": fifths[0],
        "p80": fifths[-1],
        "ratio": statistics.median(measured.ratios) if measured.ratios else None,
        "peak_bytes": measured.peak_bytes,
        "gradient_bytes": case.gradient_bytes,
        "value_error": measured.value_error,
        "gradient_error": measured.gradient_error,
        "bytes_moved": case.bytes_moved,
        **_speed(case, median, device),
    }


def _speed(case: Case, median: float, device: str) -> dict[str, float]:
    """In the units of what bounds it."""
    if isinstance(case, LinearCase | AttentionCase):
        return {"tflop_per_s": case.operations / median / 1e12}
    rate = case.bytes_moved / median
    return {"gb_per_s": rate / 1e9, "of_copy": rate / copy_bandwidth(device)}


def commit() -> str:
    """Empty where this is no repository."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def stamp() -> dict[str, str]:
    return {"datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit()}


def write(path: Path, data: dict[str, Any]) -> None:
    """In one step: whoever is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)
