"""Glue to pytest-benchmark: options, one test per case and provider, and what its JSON says about the machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, providers
from benchmarks.measure import MALLOC, set_malloc
from benchmarks.providers import CASES
from benchmarks.record import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    help = "what becomes of freed memory on a CPU: back to the system (default), or kept by malloc"
    parser.addoption("--memory", default="fresh", choices=tuple(MALLOC), help=help)
    parser.addoption(
        "--cases",
        nargs="+",
        choices=tuple(CASES),
        help="lists of cases.py or a file beside it; the device's",
    )
    parser.addoption("--rounds", type=int, help=f"the most of a case; {measure.ROUNDS.stop}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but torch sees no GPU")
    if config.getoption("rounds"):
        measure.ROUNDS = range(min(measure.ROUNDS.start, config.getoption("rounds")), config.getoption("rounds"))
    if config.getoption("benchmark_json"):  # at the end of the run it would be late to find out
        Path(config.getoption("benchmark_json")).parent.mkdir(parents=True, exist_ok=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    if not set_malloc(session.config.getoption("memory")) and session.config.getoption("device") == "cpu":
        session.config.issue_config_time_warning(UserWarning("malloc cannot be told what to do with memory"), 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("device")
    cases = [case for name in metafunc.config.getoption("cases") or [device] for case in CASES[name]]
    tests = [(case, provider) for case in cases for provider in providers.available(case, device)]
    metafunc.parametrize(("case", "provider"), tests, ids=[f"{case}-{provider}" for case, provider in tests])


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    command = "python -m pytest " + shlex.join(config.invocation_params.args)
    return {**machine(config.getoption("device"), command), "memory": config.getoption("memory")}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    from pytest_benchmark.utils import get_commit_info

    return {name: value for name, value in get_commit_info().items() if name in ("id", "time", "dirty")}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for entry in output_json["benchmarks"]:
        del entry["stats"]["data"], entry["params"], entry["options"]
