"""The benchmark harness measures what it says, and the README quotes what it measured."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedkd import ops

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import report  # noqa: E402
from benchmarks.cases import Case, kd  # noqa: E402
from benchmarks.measure import evaluate, interleave, peak_bytes  # noqa: E402
from benchmarks.providers import loss_of  # noqa: E402

NUMBERS = ("median", "p20", "p80", "ratio", "peak_bytes", "value_error", "bytes_moved", "gb_per_s", "of_copy")


def test_harness_writes_json_table_and_picture(tmp_path):
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("matplotlib")
    command = "-m pytest benchmarks --cases smoke -k not(compile) -p no:cacheprovider -W ignore --benchmark-json"
    subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "cpu.json")],
        cwd=ROOT,
        env={**os.environ, "FUSEDKD_BACKEND": "definitions", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert {"CPU", "threads", "copy_gb_per_s", "versions", "command"} <= set(data["machine_info"])
    assert len(data["benchmarks"]) == 6
    for benchmark in data["benchmarks"]:
        entry = benchmark["extra_info"]
        assert all(math.isfinite(entry[name]) for name in NUMBERS), entry
        assert entry["p20"] <= entry["median"] <= entry["p80"]
        assert benchmark["stats"]["median"] == pytest.approx(entry["median"])  # the clock replays the rounds
        assert entry["ratio"] == 1 or entry["provider"] != "fusedkd"
        assert 0 < entry["value_error"] < (1e-2 if entry["dtype"] == "bfloat16" else 1e-5)
        if entry["backward"]:  # not 0: float32 cannot meet float64 exactly
            assert 0 < entry["gradient_error"] < (4e-3 if entry["dtype"] == "bfloat16" else 1e-6)

    assert list(report.render(tmp_path)) == [tmp_path / "cpu.json"]
    assert (tmp_path / "cpu.md").read_text().count("cosine_hidden_loss 6×20 bfloat16") == 1
    assert (tmp_path / "cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_readme_quotes_the_recorded_results():
    text = (ROOT / "README.md").read_text()
    assert report.with_quotes(text) == text, "run: python -m benchmarks.report"


def test_readme_block_is_renewed_and_nothing_else(monkeypatch):
    monkeypatch.setattr(report, "quote", lambda name: f"numbers of {name}\n")
    text = (
        "a\n<!-- benchmarks:cpu -->\nold\nold\n<!-- /benchmarks -->\nb\n"
        "<!-- benchmarks:cuda -->\n<!-- /benchmarks -->\n"
    )
    assert report.with_quotes(text) == (
        "a\n<!-- benchmarks:cpu -->\nnumbers of cpu\n<!-- /benchmarks -->\nb\n"
        "<!-- benchmarks:cuda -->\nnumbers of cuda\n<!-- /benchmarks -->\n"
    )


def test_rounds_interleave_and_turn():
    clock = itertools.count()
    seconds = interleave({name: lambda i: next(clock) for name in "abc"}, rounds=3)
    assert seconds == {"a": [0, 5, 7], "b": [1, 3, 8], "c": [2, 4, 6]}


def test_truth_is_the_gradient_of_the_value():
    case = Case("kd_loss", 300, 11, "float64", temperature=2.0, ce=True)  # 300: more rows than are taken at a time
    student, teacher, labels = case.inputs("cpu")[0]
    value, gradient = case.truth(student, teacher, labels)
    log_q, log_p = torch.log_softmax(student / 2, -1), torch.log_softmax(teacher / 2, -1)
    expected = 0.5 * 4 * torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    expected = expected + 0.5 * torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(value, expected.item())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


linux = pytest.mark.skipif(peak_bytes(lambda: None, "cpu") is None, reason="needs /proc/self/clear_refs")


@linux
def test_peak_memory_sees_a_temporary():
    elements = 5_000_000
    peak = peak_bytes(lambda: torch.ones(elements).sum(), "cpu")
    assert peak == pytest.approx(4 * elements, rel=0.1)


@linux
@pytest.mark.skipif(ops.backends["kd_forward", "CPU"][0] != "C++", reason="needs the C++ kernels")
@pytest.mark.parametrize("backward", [True, False])
def test_kd_loss_has_no_temporary_that_grows_with_the_logits(backward):
    case = kd(128, 30522, backward=backward)
    student, teacher = torch.randn(2, case.rows, case.columns).unbind()
    inputs = student.requires_grad_(), teacher, torch.randint(case.columns, (case.rows,))
    loss = loss_of("fusedkd", case)
    evaluate(loss, case, inputs)  # threads start
    peak = peak_bytes(lambda: evaluate(loss, case, inputs), "cpu")
    row_pairs = torch.get_num_threads() * 2 * case.columns * 4
    assert peak - case.gradient_bytes < row_pairs + 0.5e6  # resident pages are counted in batches per core
