"""A visit to a GPU that is worth something whenever it is cut short: what `make gpu` runs.

    python -m benchmarks.visit benchmarks/results                  all of it
    python -m benchmarks.visit benchmarks/results --minutes 8      as much as these minutes allow
    python -m benchmarks.visit somewhere --device cpu              small shapes: tests the harness

What matters most comes first: the extension, each kernel once, the headline benchmarks, the tests, the long benchmarks.
Every step is a process of its own with a limit, so that one that hangs costs its limit and no more, and leaves its
results in the folder as soon as it has them. visit.json says after every step how each of them ended; what there was no
time for is listed as skipped. Logs are in visit/. Nothing is installed, and no network is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LEAST = 10.0
"""Seconds: with less left, no step is started, for a process that imports torch needs as much."""
TAIL = 12
"""Lines of a log that visit.json quotes."""


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    limit: float
    """Seconds, unless fewer are left."""


# -------------------------------------------------- plan


def plan(folder: Path, device: str) -> list[Step]:
    """What a visit does, in order. It writes smoke-*.json, headline-*.json, then what `make bench` does."""
    module = [sys.executable, "-m"]
    on = ["--device", device]

    def smoke(kernel: str) -> Step:
        return Step(f"smoke-{kernel}", [*module, "benchmarks.smoke", kernel, f"{folder}/smoke-{kernel}.json", *on], 60)

    def headline(case: str, limit: float, *options: str) -> Step:
        name = f"headline-{case}"
        return Step(name, [*module, "benchmarks.headline", case, f"{folder}/{name}.json", *on, *options], limit)

    cases = ("logits", "logits-kl", "linear", "cosine")
    if device == "cpu":
        quick = [headline(case, 60, "--providers", "eager") for case in cases]
        return [*map(smoke, ("kd", "topk", "linear", "cosine", "hidden", "attention")), *quick]
    pytest = [*module, "pytest", "-p", "no:cacheprovider"]
    tests = [*pytest, "-m", "gpu", *(["-n", "auto", "--dist", "worksteal"] if find_spec("xdist") else [])]
    speed = [*pytest, "benchmarks", "--disable-warnings", *on, "--benchmark-columns=median,iqr,rounds"]
    return [
        Step("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], 300),
        Step("environment", [*module, "fusedkd.env"], 60),
        *map(smoke, ("cluster", "resident", "whole", "split", "topk", "linear", "cosine", "hidden", "attention")),
        Step("smoke-shard", [*tests, "tests/test_shards.py"], 120),
        *(headline(case, 150) for case in cases),
        *(
            Step(f"tests-{name}", [*tests, f"tests/gpu/test_{name}.py"], 600)
            for name in ("kd_cluster", "kd_gpu", "linear_gpu", "hidden_gpu", "attention_gpu")
        ),
        Step("tests", [*tests, "tests", "--ignore=tests/gpu"], 3600),
        Step("bench", [*speed, f"--benchmark-json={folder}/{device}.json"], 1800),
        Step(
            "bench-linear",
            [*speed, "--cases", f"{device}-linear", f"--benchmark-json={folder}/{device}-linear.json"],
            1800,
        ),
        Step("bench-gumbel", [*module, "benchmarks.gumbel", str(folder), *on], 300),
        Step("accuracy", [*module, "benchmarks.accuracy", str(folder), *on], 600),
        Step("step", [*module, "benchmarks.step", str(folder), *on], 600),
        Step("report", [*module, "benchmarks.report", str(folder)], 120),
    ]


# -------------------------------------------------- running


def run(steps: Sequence[Step], folder: Path, deadline: float, record: dict[str, Any]) -> bool:
    """Whether all that were started passed. `deadline`: by `time.monotonic`. `record` grows by an entry per step and is
    on disk after each.
    """
    record["steps"] = []
    for step in steps:
        left = deadline - time.monotonic()
        if left < min(LEAST, step.limit):
            entry: dict[str, Any] = {"name": step.name, "state": "skipped", "seconds": 0.0}
        else:
            print(f"== {step.name}", flush=True)
            entry = {"name": step.name, **_run(step, folder / "visit" / f"{step.name}.log", min(step.limit, left))}
        record["steps"].append(entry)
        path = folder / "visit.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(path)
    return all(entry["state"] in ("passed", "skipped") for entry in record["steps"])


def _run(step: Step, log: Path, limit: float) -> dict[str, Any]:
    """How a step ended. It leads a process group, of which nothing survives it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            state = "passed" if child.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "killed"
        finally:  # of an interrupted visit, too
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # what hangs inside the driver may not die: the visit goes on without it
        child.wait(5)
    tail = log.read_text(errors="replace").splitlines()[-TAIL:]
    seconds = round(time.monotonic() - start, 1)
    print("\n".join([*tail, f"== {step.name} {state} after {seconds} s, of {limit:.0f}"]), flush=True)
    code = child.returncode if state == "failed" else None
    return {"state": state, "seconds": seconds, "limit": round(limit, 1), "code": code, "log": tail}


def gpus() -> str:
    """Name and driver of each."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "no nvidia-smi"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.visit", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for results; the pages quote benchmarks/results")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing runs any more")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="*", metavar="STEP", help="some of the steps, in the plan's order")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a step has a session of its own: it is ended by the visit
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps = plan(folder, options.device)
    unknown = set(options.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}")
    if options.only is not None:
        steps = [step for step in steps if step.name in options.only]
    record: dict[str, Any] = {
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.node()}, {os.cpu_count()} cores, python {platform.python_version()}, {gpus()}",
        "command": "python -m benchmarks.visit " + " ".join(sys.argv[1:]),
    }
    passed = run(steps, folder, deadline, record)
    for entry in record["steps"]:
        print(f"{entry['state']:<8} {entry['seconds']:7.1f} s  {entry['name']}")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
