"""`make gpu` without a GPU: the order and limits of its plan, what a step that hangs costs, two steps on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import headline, report, smoke, visit  # noqa: E402
from benchmarks.visit import Step  # noqa: E402
from fusedkd.backends.triton import choice  # noqa: E402
from fusedkd.backends.triton.choice import Case  # noqa: E402


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_a_step_that_hangs_costs_its_limit_and_nothing_else(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    seen = f"import json; assert [s['state'] for s in json.load(open({str(tmp_path / 'visit.json')!r}))['steps']]"
    steps = [
        Step("first", python("print('a result')"), 3),
        Step("hangs", python(hang), 1),
        Step("fails", python("raise SystemExit('a reason')"), 3),
        Step("reads", python(f"{seen} == ['passed', 'killed', 'failed']"), 3),
        Step("late", python("open('never', 'w')"), 100),
    ]
    start, record = time.monotonic(), {"machine": "a test"}
    assert not visit.run(steps, tmp_path, start + 9.5, record)
    assert time.monotonic() - start < 9.5
    found = json.loads((tmp_path / "visit.json").read_text())
    assert found == record
    states = {step["name"]: step["state"] for step in found["steps"]}
    assert states == {"first": "passed", "hangs": "killed", "fails": "failed", "reads": "passed", "late": "skipped"}
    entries: dict[str, Any] = {step["name"]: step for step in found["steps"]}
    assert entries["first"]["log"] == ["a result"]
    assert entries["fails"]["log"] == ["a reason"]
    assert 1 <= entries["hangs"]["seconds"] < 4
    time.sleep(max(0, start + 3.5 - time.monotonic()))
    assert not late.exists(), "a process that a step had started survived it"


def test_minutes_are_kept(tmp_path: Path) -> None:
    start = time.monotonic()
    visit.run([Step("long", python("import time; time.sleep(60)"), 1.5)], tmp_path, start + 1.6, record := {})
    assert record["steps"][0]["state"] == "killed"
    visit.run([Step("long", python(""), 60)], tmp_path, time.monotonic() + 5, record)
    assert record["steps"] == [{"name": "long", "state": "skipped", "seconds": 0.0}]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_plan(device: str, tmp_path: Path) -> None:
    """The extension, every kernel, the headlines, tests, long benchmarks; of modules and cases that there are."""
    steps = visit.plan(tmp_path, device)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert all(0 < step.limit < 1e4 for step in steps)
    groups = [name.split("-")[0] for name in names]
    order = ["build", "environment", "smoke", "headline", "tests", "bench", "accuracy", "step", "report"]
    assert list(dict.fromkeys(groups)) == (order if device == "cuda" else order[2:4])
    shard = ["shard"] if device == "cuda" else []  # tests/test_shards.py
    cases = {"smoke": [*smoke.CASES[device], *shard], "headline": headline.CASES[device]}
    for group, expected in cases.items():
        assert {name for name in names if name.startswith(group)} == {f"{group}-{case}" for case in expected}
    for step in steps:
        assert step.command[0] == sys.executable
        assert step.command[1] != "-m" or find_spec(step.command[2])
    tests = {argument for step in steps for argument in step.command if argument.startswith("tests/gpu/")}
    assert tests == {str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py")} or device == "cpu"


@pytest.mark.parametrize("kernel", ["resident", "whole", "split", "cluster"])
def test_smoke_cases_are_of_their_kernel(kernel: str) -> None:
    import torch

    hopper = choice.Device(132, True, False)
    for each in smoke.CASES["cuda"][kernel]:
        dtype, form = getattr(torch, each.dtype), each.family.kernel_id
        case = Case(each.rows, each.columns, each.columns, dtype, dtype, form, False, True)
        assert choice.choose(case, hopper)[0] == kernel, str(each)


def test_a_visit_on_the_cpu(tmp_path: Path) -> None:
    only = ["smoke-cosine", "headline-cosine"]
    options = f"-m benchmarks.visit {tmp_path} --device cpu --minutes 5 --only"
    command = [sys.executable, *options.split(), *only]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "visit.json").read_text())
    assert [(step["name"], step["state"]) for step in record["steps"]] == [(name, "passed") for name in only]
    assert {"datetime", "machine", "command"} <= set(record)
    kernels = json.loads((tmp_path / "smoke-cosine.json").read_text())
    assert 0 < kernels["smoke"][0]["gradient_error"] < 0.01
    data = json.loads((tmp_path / "headline-cosine.json").read_text())
    assert {"CPU", "versions", "copy_gb_per_s", "command"} <= set(data["machine_info"])
    entries = [each["extra_info"] for each in data["benchmarks"]]
    assert [entry["provider"] for entry in entries] == ["fusedkd", "eager"]
    assert all(entry["of_copy"] > 0 and entry["median"] > 0 and entry["ratio"] > 0 for entry in entries)
    assert data["failed"] == {}
    assert data["absent"] == ["torch.compile"]
    assert "cosine_hidden_loss 6×20" in report.text(data)


def test_a_provider_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, path = headline.CASES["cpu"]["logits"], tmp_path / "headline.json"
    broken = {**headline.providers.PROVIDERS["kd_loss"], "liger": lambda case: 1 / 0}
    monkeypatch.setitem(headline.providers.PROVIDERS, "kd_loss", broken)
    monkeypatch.setattr(headline, "machine", lambda device, command: {"versions": {}, "command": command})
    assert headline.run(case, path, "cpu", ["liger", "eager"], "as a test")
    data = json.loads(path.read_text())
    assert [each["extra_info"]["provider"] for each in data["benchmarks"]] == ["fusedkd", "eager"]
    assert data["failed"] == {"liger": "ZeroDivisionError: division by zero"}


def test_an_unknown_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["visit", str(tmp_path), "--only", "smoke-clusters"])
    with pytest.raises(SystemExit):
        visit.main()
    assert "no such step: smoke-clusters; there are build, " in capsys.readouterr().err
