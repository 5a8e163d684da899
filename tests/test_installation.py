"""What an installation builds with, what it says where it cannot, and what is in a source distribution."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusedkd import env
from fusedkd.backends import dispatch
from fusedkd.backends.layout import OPTIONS

ROOT = Path(__file__).parent.parent
UNBUILT = ("*.so", "__pycache__", ".git", ".venv", "build", "dist", "runs", "*.egg-info", ".*_cache")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone in which nothing is built."""
    return Path(shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(*UNBUILT)))


@pytest.fixture
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("backend", ROOT / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_import_is_that_of_torch() -> None:
    """torch._dynamo takes as long again, the others longer: they wait until something needs them."""
    heavy = "torch._dynamo", "torch._inductor", "triton", "transformers", "datasets"
    code = f"import fusedkd, fusedkd.nn, sys; assert not [name for name in {heavy} if name in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------- a checkout that hides what is installed


def installed(folder: Path, library: str | None) -> Path:
    (folder / "fusedkd").mkdir(parents=True)
    if library:
        (folder / "fusedkd" / library).touch()
    return folder


def slow_call() -> str:
    """What the first call says where the libraries are missing."""
    reason = dispatch.load("_C")
    assert reason is not None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        dispatch._Slow(reason).kd_terms(
            row_losses=torch.ones(2, 3),
            options=torch.ones(OPTIONS),
            normalizers=torch.ones(2),
            terms=None,
            per_row=True,
        )
    (warning,) = found
    return str(warning.message)


def test_a_checkout_that_hides_the_installed_package_says_so(tmp_path, monkeypatch) -> None:
    clone, site = installed(tmp_path / "clone", None), installed(tmp_path / "site", "_C.abi3.so")
    (clone / "setup.py").touch()
    monkeypatch.setattr(dispatch, "PACKAGE", clone / "fusedkd")
    monkeypatch.setattr(sys, "path", [str(clone), str(site)])
    said = slow_call()
    assert f"_C is not built in {clone}/fusedkd, which hides the installed {site}/fusedkd, where it is" in said
    assert f"Start Python outside of {clone}" in said
    monkeypatch.setattr(sys, "path", ["", str(site)])  # as `python -m` and `python -c` have it
    monkeypatch.chdir(clone)
    assert "hides the installed" in slow_call()


@pytest.mark.parametrize("kind", ["clone", "site"])
def test_the_advice_mends_what_is_missing(kind, tmp_path, monkeypatch) -> None:
    """In a checkout: a build in place. Elsewhere, beside another without libraries: an installation."""
    folder, other = installed(tmp_path / "clone", None), installed(tmp_path / "other", None)
    if kind == "clone":
        (folder / "setup.py").touch()
    monkeypatch.setattr(dispatch, "PACKAGE", folder / "fusedkd")
    monkeypatch.setattr(sys, "path", [str(folder), str(other)])
    said = slow_call()
    assert "hides" not in said
    assert "outside" not in said
    assert (f"-e {folder}`" if kind == "clone" else "--force-reinstall .` in a checkout") in said


def test_env_tells_where_the_package_is(capsys) -> None:
    env.main()
    out = capsys.readouterr().out
    assert re.search(rf"imported from +{re.escape(str(dispatch.PACKAGE))}\n", out)
    backend, reason = dispatch.serving["kd_forward", "CPU"]
    assert re.search(rf"kd_forward +CPU +{re.escape(backend)} +{re.escape(reason)}\n", out)


# -------------------------------------------------- torch


def test_a_build_in_isolation_finds_the_installed_torch(backend, monkeypatch, tmp_path) -> None:
    """As pip arranges it: the build's own process sees no torch, and a PYTHONPATH that hides the others."""
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.path[:] = []")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = backend.torch_folder()
    assert folder == Path(torch.__file__).parent
    assert backend.missing() == []
    assert (folder / "include/torch/csrc/stable/library.h").is_file()
    assert any((folder / "lib").glob("*torch_cpu*"))


@pytest.mark.parametrize(
    ("version", "enough"), [("2.10.0", False), ("1.13.1", False), ("2.11.0+cpu", True), ("3.0", True)]
)
def test_a_torch_that_is_too_old_is_none(version, enough, backend, monkeypatch, tmp_path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch/__init__.py")
    monkeypatch.setattr(backend, "find_spec", lambda name: spec)
    assert (backend.torch_folder() is not None) == enough
    requirement = [] if enough else ["torch>=2.11"]
    assert backend.missing() == requirement
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: ["more"])
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_editable", lambda settings: ["more"])
    assert backend.get_requires_for_build_wheel() == ["more", *requirement]
    assert backend.get_requires_for_build_editable() == ["more", *requirement]


def test_one_oldest_torch(backend) -> None:
    major, minor = backend.OLDEST
    assert f'dependencies = ["torch>={major}.{minor}"' in (ROOT / "pyproject.toml").read_text()
    target = re.search(r'TORCH_TARGET_VERSION = "0x(..)(..)0+"', (ROOT / "setup.py").read_text())
    assert (int(target[1], 16), int(target[2], 16)) == backend.OLDEST


# -------------------------------------------------- compilers


@pytest.mark.parametrize("variable", ["FUSEDKD_CPU", "FUSEDKD_CUDA"])
@pytest.mark.parametrize("wish", ["", "1"])
def test_what_cannot_be_built_is_said_at_the_end(variable, wish, checkout, tmp_path) -> None:
    nowhere = str(tmp_path / "nowhere")
    environment = {**os.environ, "CC": nowhere, "CXX": nowhere, "FUSEDKD_CPU": "0", "FUSEDKD_CUDA": "0", variable: wish}
    if variable == "FUSEDKD_CUDA":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvcc").write_text("#!/bin/sh\necho no such GPU >&2\nexit 1\n")
        (tmp_path / "bin/nvcc").chmod(0o755)
        environment["PATH"] = f"{tmp_path}/bin:{environment['PATH']}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, start_new_session=True, check=False
    )
    assert (run.returncode == 0) == (wish == "")
    assert not list(checkout.glob("fusedkd/*.so"))
    *_, last = (line for line in run.stderr.splitlines() if "fusedkd" in line)
    if wish:
        assert f"the compiler is missing or failed; fusedkd works without it, {variable}=1 makes this an error" in last
    else:
        library, loss = (
            ("_C", "PyTorch definitions answer") if variable == "FUSEDKD_CPU" else ("_C_cuda", "Hopper GPUs")
        )
        assert run.stderr.count("fusedkd is built") == 1
        assert "UserWarning: " in last  # the kind that pip shows
        assert last.partition("UserWarning: ")[2].startswith(
            f"fusedkd is built without fusedkd.{library}: the compiler is missing or failed. On "
        )
        assert loss in last


# -------------------------------------------------- the source distribution


def test_the_source_distribution_is_the_repository(checkout, tmp_path) -> None:
    """Sources, headers, tests and all that they read: it builds, and its tests run."""
    (checkout / "fusedkd/_C.abi3.so").touch()  # what is built stays at home
    build = "import backend, sys; print(backend.build_sdist('dist')); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == f"fusedkd-{env.versions()['fusedkd']}.tar.gz"  # read, not imported
    with tarfile.open(checkout / "dist" / run.stdout.splitlines()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    if (ROOT / ".git").exists() and shutil.which("git"):
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        expected = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()}
        assert packed >= expected, sorted(expected - packed)
    assert {"csrc/cpu/kd_rows.h", "tests/truth.py", "backend.py", "Makefile", "constraints.txt", ".ci/run"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]
