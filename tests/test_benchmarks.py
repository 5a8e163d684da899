"""The benchmark harness measures what it says, and the pages quote what it measured."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fusedkd.backends import dispatch
from fusedkd.divergences import FAMILIES, WITH_KERNEL
from fusedkd.reference.divergences import kl_terms

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import accuracy, attention, eager, gumbel, history, linear, memory, providers, report, step  # noqa: E402
from benchmarks.cases import Case, family, kd, listed  # noqa: E402
from benchmarks.measure import evaluate, interleave, peak_bytes  # noqa: E402
from benchmarks.providers import CASES, PEERS, PRODUCTS, PROVIDERS, available, loss_of  # noqa: E402
from benchmarks.speed import label  # noqa: E402

ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # or no clock runs
NUMBERS = {"median", "p20", "p80", "ratio", "peak_bytes"}
MEMORY = {"bytes_moved", "gb_per_s", "of_copy"}
SPEEDS = {
    "smoke": MEMORY,
    "smoke-linear": {"tflop_per_s"},
    "smoke-attention": {"tflop_per_s"},
    "smoke-projected": {"tflop_per_s"},
    "smoke-layers": MEMORY,
}
HEADINGS = [
    "cosine_hidden_loss 6×20 bfloat16",
    "linear_kd_loss 6×(5, 7)×33 bfloat16, T = 2, with CE, 4 rows per tile",
    "attention_mse_loss 2×3×9×64 float32, forward only",
    "hidden_loss 6×(5 → 7) bfloat16, l2",
    "layer_attention_loss (2, 3)×6×20 bfloat16, forward only",
]


def test_harness_writes_json_table_and_picture(tmp_path):
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("matplotlib")
    command = f"-m pytest benchmarks --cases {' '.join(SPEEDS)} -k not(compile) --rounds 3"
    command += " -p no:cacheprovider -W ignore --benchmark-json"
    subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "cpu.json")],
        cwd=ROOT,
        env={**ALONE, "FUSEDKD_BACKEND": "definitions", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert {"CPU", "threads", "copy_gb_per_s", "versions", "command"} <= set(data["machine_info"])
    measured = [
        (name, str(case), provider)
        for name in SPEEDS
        for case in CASES[name]
        for provider in available(case, "cpu")
        if provider != "torch.compile"
    ]
    found = [(benchmark["group"], benchmark["extra_info"]["provider"]) for benchmark in data["benchmarks"]]
    assert found == [(case, provider) for _, case, provider in measured]
    for benchmark, (cases, *_) in zip(data["benchmarks"], measured, strict=True):
        entry = benchmark["extra_info"]
        assert all(math.isfinite(entry[name]) for name in NUMBERS | SPEEDS[cases]), entry
        assert entry["p20"] <= entry["median"] <= entry["p80"]
        assert benchmark["stats"]["median"] == pytest.approx(entry["median"])  # the clock replays the rounds
        assert entry["ratio"] == 1 or entry["provider"] != "fusedkd"
        if entry["provider"] == PRODUCTS:
            assert entry["value_error"] is entry["gradient_error"] is None
            continue
        assert 0 < entry["value_error"] < (1e-2 if entry["dtype"] == "bfloat16" else 1e-4)
        if entry["backward"]:  # not 0: float32 cannot meet float64 exactly
            assert 0 < entry["gradient_error"] < (4e-3 if entry["dtype"] == "bfloat16" else 1e-5)
            if entry["provider"] == "fusedkd" and entry["dtype"] == "float32":
                assert entry["gradient_error"] < (1e-7 if cases == "smoke" else 3e-7)  # float32 products err

    ((name, table),) = report.render(tmp_path)
    assert name == "cpu"
    assert all(table.count(heading) == 1 for heading in HEADINGS)
    assert (tmp_path / "cpu.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_pages_quote_the_recorded_results(page):
    assert report.with_quotes(page) == page.read_text(), "run: python -m benchmarks.report"


def test_a_block_is_renewed_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "quote", lambda name, page: f"numbers of {name}\n")
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- benchmarks:cpu -->\nold\nold\n<!-- /benchmarks -->\nb\n"
        "<!-- benchmarks:cuda -->\n<!-- /benchmarks -->\n"
    )
    assert report.with_quotes(page) == (
        "a\n<!-- benchmarks:cpu -->\nnumbers of cpu\n<!-- /benchmarks -->\nb\n"
        "<!-- benchmarks:cuda -->\nnumbers of cuda\n<!-- /benchmarks -->\n"
    )


def test_rounds_interleave_and_turn():
    clock = itertools.count()
    seconds = interleave({name: lambda i: next(clock) for name in "abc"}, rounds=3)
    assert seconds == {"a": [0, 5, 7], "b": [1, 3, 8], "c": [2, 4, 6]}


@pytest.mark.parametrize("cases", ["cpu", "smoke"])
def test_every_family_is_measured(cases):
    assert {case.divergence for case in CASES[cases] if case.loss == "kd_loss" and case.backward} == set(WITH_KERNEL)


@pytest.mark.parametrize("cases", CASES)
def test_names_tell_cases_apart(cases):
    assert len({str(case) for case in CASES[cases]}) == len({case.label for case in CASES[cases]}) == len(CASES[cases])


def test_a_family_without_an_eager_expression_is_measured_alone(monkeypatch):
    monkeypatch.delitem(eager.DIVERGENCES, "jsd")
    assert available(family("jsd", 6, 33), "cpu") == ["fusedkd"]


PLAIN, TILED = {"fusedkd", PRODUCTS, "eager", "torch.compile"}, {"fusedkd", PRODUCTS}
WITH_CE, KL_ALONE = {"liger chunked", "orda"}, {"liger JSD", "liger KL", "trl"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PLAIN | WITH_CE),
        ({"backward": False}, PLAIN | WITH_CE),
        ({"temperature": 1.0}, PLAIN | WITH_CE),
        ({"ce": False}, PLAIN | WITH_CE | KL_ALONE),
        ({"ce": False, "temperature": 1.0}, PLAIN | WITH_CE | KL_ALONE | {"fla"}),
        ({"ce": False, "divergence": "reverse_kl"}, PLAIN),
        ({"ce": False, "tile": 4}, TILED),
    ],
)
def test_peers_are_measured_in_the_cases_they_know_where_installed(options, expected, monkeypatch):
    case = linear.linear(6, 5, 7, 33, "float32", **options)
    monkeypatch.setattr(providers, "_imports", lambda module: True)
    assert set(available(case, "cuda")) == expected
    assert set(available(case, "cpu")) == expected - {name for name, peer in PEERS.items() if not peer.cpu}
    monkeypatch.setattr(providers, "_imports", lambda module: not module.startswith(("liger", "fla")))
    assert set(available(case, "cuda")) == expected - {"liger chunked", "liger JSD", "liger KL", "fla"}


def test_cross_entropy_alone_has_a_peer_in_pytorch(monkeypatch):
    case = linear.linear(6, 5, 7, 33, "float32", kd=False)
    monkeypatch.setattr(providers, "_imports", lambda module: True)
    own = {"torch linear CE"} if hasattr(torch.nn.functional, "linear_cross_entropy") else set()
    assert set(available(case, "cpu")) == PLAIN | own


def test_every_peer_is_measured_somewhere(monkeypatch):
    monkeypatch.setattr(providers, "_imports", lambda module: True)
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", None, raising=False)  # of 2.13
    measured = [
        (case, device)
        for device in ("cpu", "cuda")
        for kind in ("", "-linear", "-projected", "-attention", "-layers")
        for case in CASES[f"{device}{kind}"]
    ]
    assert {(case.loss, p) for case, device in measured for p in available(case, device)} == {
        (loss, provider) for loss, of_loss in PROVIDERS.items() for provider in of_loss
    }


def test_a_run_is_in_the_history_once(tmp_path):
    data = json.loads((report.RECORD / "cpu.json").read_text())
    data["benchmarks"] = [benchmark for benchmark in data["benchmarks"] if "-float32-jsd-" in benchmark["group"]]
    for date in ("2026-01-01", "2026-01-01", "2026-01-02"):
        (tmp_path / "cpu.json").write_text(json.dumps({**data, "datetime": date}))
        history.append(tmp_path)
    first, second = [json.loads(line) for line in (tmp_path / history.NAME).read_text().splitlines()]
    assert (first["date"], second["date"]) == ("2026-01-01", "2026-01-02")
    assert {**first, "date": ""} == {**second, "date": ""}
    medians = {b["extra_info"]["provider"]: b["extra_info"]["median"] * 1e3 for b in data["benchmarks"]}
    assert first["median_ms"] == pytest.approx(medians, rel=1e-3)
    assert first["machine"] == data["machine_info"]["CPU"]


def test_the_history_has_the_recorded_results():
    known = (report.RECORD / history.NAME).read_text().splitlines()
    found = [line for path in report.RECORD.glob("*.json") for line in history.lines(json.loads(path.read_text()))]
    assert found
    assert set(found) <= set(known), "run: python -m benchmarks.report"


def test_every_recorded_picture_is_on_a_page():
    assert not [picture.name for picture in report.RECORD.glob("*.png") if not report.shown(picture.name)]


FLOAT64 = [
    Case("kd_loss", 100, 11, "float64", 2.0, True),  # 100: more rows than are taken at a time
    linear.linear(100, 5, 7, 11, "float64"),
    linear.linear(100, 5, 7, 11, "float64", 4.0, ce=False, upstream=0.5),
    linear.linear(6, 5, 7, 11, "float64", divergence="jsd"),
    *(attention.attention(loss, 2, 7, "float64", heads=3) for loss in ("kl", "mse")),
    attention.attention("kl", 2, 7, "float64", heads=3, causal=True),
    Case("kd_loss", 100, 11, "float64", 2.0, True, upstream=0.5),
    *(family(name, 6, 11, "float64") for name in WITH_KERNEL),
    *(listed(teacher, 6, 33, "float64", k=5) for teacher in eager.LISTED),
]


@pytest.mark.parametrize("case", FLOAT64, ids=str)
def test_truth_is_what_a_user_would_write_and_its_gradient(case, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # the expressions in float64
    inputs = case.inputs("cpu")[0]
    value, gradient = evaluate(loss_of("eager", case), case, inputs)
    truth = case.truth(*inputs)
    torch.testing.assert_close(value.item(), truth[0], rtol=1e-6, atol=0)  # samples and top-k are float32
    torch.testing.assert_close(gradient, truth[1], rtol=1e-6, atol=1e-9)  # of each operand, if they are several


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1000.0), (torch.bfloat16, 0.0)])
def test_pairs_are_as_far_apart_as_they_say(dtype, offset):
    for kl in (1.0, 1e-6):
        student, teacher = (x.double() / accuracy.TEMPERATURE for x in accuracy.pair(kl, dtype, offset))
        found = kl_terms(teacher.log_softmax(-1), student.log_softmax(-1)).sum(-1).mean().item()
        assert found == pytest.approx(kl, rel=0.2)


def test_accuracy_table_and_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    settings = [accuracy.Setting("jsd", "float32", 0.0)]
    monkeypatch.setattr(accuracy, "LEVELS", [1.0, 1e-6])
    monkeypatch.setattr(accuracy, "COLUMNS", 1000)
    accuracy.pair.cache_clear()
    monkeypatch.setattr(accuracy, "SETTINGS", settings)
    monkeypatch.setattr(accuracy.providers, "available", lambda case, device: ["fusedkd", "eager"])
    data = accuracy.record("cpu", "as a test")
    accuracy.pair.cache_clear()
    errors = {(e["provider"], e["kl"], e["masked"]): e for e in data["accuracy"]}
    assert len(errors) == 9
    assert errors["eager", 1e-2, True]["gradient_error"] == "NaN"
    for kl, masked in ((1.0, False), (1e-6, False), (1e-2, True)):
        assert 0 < errors["fusedkd", kl, masked]["gradient_error"] < 1e-5
        assert 0 < errors["fusedkd", kl, masked]["value_error"] < 1e-5
        assert 0 < errors[accuracy.ROUNDED, kl, masked]["gradient_error"] < 1e-7
    (tmp_path / "accuracy-cpu.json").write_text(json.dumps(data))
    ((name, table),) = report.render(tmp_path)
    assert (name, table.count("| jsd, float32 |")) == ("accuracy-cpu", 1)
    assert (tmp_path / "accuracy-cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_training_step_is_measured_beside_eager(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(step, "SECONDS", dict.fromkeys(step.SECONDS, 0.0))
    shape = step.Shape(layers=2, width=16, heads=2, batch=3, length=8, masked=0.5, vocabulary=97)
    data = step.record([shape], ("fusedkd", "eager"), "cpu", "as a test")
    fused, plain = data["driver_step"]
    assert (fused["provider"], plain["provider"]) == ("fusedkd", "eager")
    assert fused["value"] == pytest.approx(plain["value"]) != 0
    assert 0 < fused["gradient_difference"] < 1e-6
    for part in ("step", "loss"):
        assert 0 < fused[part]["p20"] <= fused[part]["median"] <= fused[part]["p80"]
    (tmp_path / "step-cpu.json").write_text(json.dumps(data))
    ((name, table),) = report.render(tmp_path)
    assert name == "step-cpu"
    assert "| 2×16 → 1×16, 3×8 tokens, 50% masked | step | **" in table


def test_straight_through_samples_are_measured_beside_eager(tmp_path, monkeypatch):
    monkeypatch.setattr(gumbel, "SECONDS", 0.0)
    shape = gumbel.Shape(3, 8, 0.5, vocabulary=97, hidden=16, student=8, teacher=12, dtype="float32")
    providers = [name for name in gumbel.PROVIDERS if "compile" not in name]
    data = gumbel.record([shape], providers, "cpu", "as a test")
    entries = data["straight_through"]
    assert [entry["provider"] for entry in entries] == providers
    assert all(0 < entry["gradient_error"] < 1e-6 for entry in entries)
    assert all(0 < entry["p20"] <= entry["median"] <= entry["p80"] for entry in entries)
    (tmp_path / "gumbel-cpu.json").write_text(json.dumps(data))
    ((name, table),) = report.render(tmp_path)
    assert name == "gumbel-cpu"
    assert "| 3×8, 50% masked, V = 97, 16 → 8, 12, float32 | fusedkd | **" in table


def test_memory_is_measured_against_size(tmp_path):
    data = memory.record({"maps": ("L", {n: attention.attention("kl", 1, n, heads=2) for n in (8, 16)})}, "cpu", "test")
    assert [(e["at"], e["provider"]) for e in data["memory_against_size"]] == list(
        itertools.product((8, 16), memory.PROVIDERS)
    )
    (tmp_path / "memory-cpu.json").write_text(json.dumps(data))
    ((name, table),) = report.render(tmp_path)
    assert name == "memory-cpu"
    assert "| maps | L = 8 | **" in table


def test_eager_triple_loss_is_that_of_the_sums():
    z, v = torch.randn(2, 2, 3, 11, dtype=torch.float64).unbind()
    x, y = torch.randn(2, 2, 3, 5, dtype=torch.float64).unbind()
    labels, attended = torch.tensor([[4, -100, -100], [-100, 7, -100]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    rows = attended.bool()
    log_p, log_q = (v[rows] / 2).log_softmax(-1), (z[rows] / 2).log_softmax(-1)
    kd = 4 * kl_terms(log_p, log_q).sum() / 5
    mlm = -(z[0, 0].log_softmax(-1)[4] + z[1, 1].log_softmax(-1)[7]) / 2
    cos = sum(1 - a @ b / (a.norm() * b.norm()) for a, b in zip(x[rows], y[rows], strict=True)) / 5
    torch.testing.assert_close(step.triple_loss(z, v, x, y, labels, attended), 5 * kd + 2 * mlm + cos)


def test_divergence_table_lists_every_family():
    rows = report.divergences().splitlines()
    assert len(rows) == 2 + len(FAMILIES)
    assert rows[5].startswith('| `"jsd"` | `JSD(beta=0.5)` | β·KL(p‖m)')
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


@pytest.mark.parametrize(
    ("case", "heading"),
    [
        (family("jsd", 6, 33), "kd_loss 6×33 float32, jsd, T = 2"),
        (linear.linear(6, 5, 7, 33, "float32"), "linear_kd_loss 6×(5, 7)×33 float32, T = 2, with CE"),
    ],
)
def test_label_of_an_entry_is_that_of_its_case(case, heading):
    assert label({**asdict(case), "median": 1.0}) == case.label == heading


linux = pytest.mark.skipif(peak_bytes(lambda: None, "cpu") is None, reason="needs /proc/self/clear_refs")


@linux
def test_peak_memory_sees_a_temporary():
    elements = 5_000_000
    peak = peak_bytes(lambda: torch.ones(elements).sum(), "cpu")
    assert peak == pytest.approx(4 * elements, rel=0.1)


@linux
@pytest.mark.skipif(dispatch.serving["kd_forward", "CPU"][0] != "C++", reason="needs the C++ kernels")
@pytest.mark.parametrize("backward", [True, False])
def test_kd_loss_has_no_temporary_that_grows_with_the_logits(backward):
    case = kd(128, 30522, backward=backward)
    student, teacher = torch.randn(2, case.rows, case.columns).unbind()
    inputs = student.requires_grad_(), teacher, torch.randint(case.columns, (case.rows,))
    loss = loss_of("fusedkd", case)
    evaluate(loss, case, inputs)  # threads start
    peak = min(peak_bytes(lambda: evaluate(loss, case, inputs), "cpu") for _ in range(3))  # or a huge page's 2 MB
    row_pairs = torch.get_num_threads() * 2 * case.columns * 4
    assert peak - case.gradient_bytes < row_pairs + 0.5e6  # resident pages are counted in batches per core
