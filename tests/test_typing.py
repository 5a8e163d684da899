"""A type checker sees what a user of the installed package calls: results of their own type, options by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USES = """
import fusedkd
import torch
from fusedkd.nn import KDLoss, LinearKDLoss
from torch import Tensor
from typing_extensions import assert_type

z, v, y = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
assert_type(fusedkd.kd_loss(z, v, y, temperature=2.0, ce_weight=0.5), Tensor)
assert_type(fusedkd.kd_loss(z, v, divergence=fusedkd.JSD(0.1), return_terms=True), tuple[Tensor, fusedkd.KDTerms])
assert_type(fusedkd.linear_kd_loss(z, v, v, max_rows=2), Tensor)
assert_type(fusedkd.kd_loss(z, v, divergence=[(1.0, "forward_kl"), (z[:, 0], fusedkd.TotalVariation())]), Tensor)
told = fusedkd.kd_loss(z, v, return_terms=True, statistics=["student_entropy"])
assert_type(told, tuple[Tensor, fusedkd.KDTermsAndStatistics])
assert_type(KDLoss(temperature=2.0, divergence="jsd")(z, v, y), Tensor)
assert_type(KDLoss()(z, v, y, return_terms=True), tuple[Tensor, fusedkd.KDTerms])
assert_type(LinearKDLoss(reduction="none")(z, v, v), Tensor)
"""
MISTAKES = {
    "fusedkd.kd_loss(z, v).backwrad()": "attr-defined",
    "KDLoss(temprature=2.0)": "call-arg",
    'KDLoss(divergence="kl")': "arg-type",
    "fusedkd.kd_loss(z, v, temprature=2.0)": "call-overload",
}

UNREAD = ("_dynamo", "_inductor", "distributed", "fx", "export", "_export", "ao", "onnx", "utils", "jit", "_functorch")
UNREAD += ("_higher_order_ops", "_subclasses", "cuda", "optim", "backends")
"""Of torch, what no user's call of ours has a type of: two thirds of the time."""


def installed(folder: Path) -> Path:
    """The package as pip puts it there, without its libraries, from a copy: a build leaves files behind."""
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "runs", "*.egg-info", "__pycache__")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(checkout)]
    environment = {**os.environ, "FUSEDKD_CPU": "0", "FUSEDKD_CUDA": "0"}
    subprocess.run(command, env=environment, check=True)
    return folder / "site"


def test_uses_pass_and_mistakes_fail(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    user = tmp_path / "user.py"
    user.write_text(USES + "\n".join(MISTAKES))
    first = len(USES.splitlines()) + 1
    expected = {first + i: code for i, code in enumerate(MISTAKES.values())}
    environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
    environment["PYTHONPATH"] = str(installed(tmp_path))
    config = tmp_path / "mypy.ini"
    unread = ",".join(["numpy.*", "sympy.*", *(f"torch.{name}.*" for name in UNREAD)])
    config.write_text(f"[mypy]\n[mypy-{unread}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", f"--config-file={config}", "--strict", "--follow-imports=silent"]
    command += ["--hide-error-context", "--no-error-summary", f"--cache-dir={tmp_path / 'cache'}", user.name]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [line for line in run.stdout.splitlines() if ": error: " in line]
    assert run.returncode == 1, run.stdout + run.stderr
    found = {int(line.split(":")[1]): line.rsplit("[", 1)[1].rstrip("]") for line in errors}
    assert found == expected, run.stdout
