"""`python -m recipes.ablation`: several students, a task, and what the report says of them."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")


from distilbert.conftest import sentences

from fusedkd.distilbert.config import parse
from recipes.ablation import report
from recipes.ablation.__main__ import AblationOptions, main

SHORT = ["--max_steps", "6", "--eval_steps", "4", "--block_size", "16", "--per_device_train_batch_size", "4"]
SHORT += ["--report_to", "none", "--mlm_probability", "0.3", "--eval_blocks", "8"]
SMALL = ["--teacher_steps", "6", "--teacher_layers", "2", "--teacher_hidden", "16", "--teacher_heads", "2"]


def tree(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def glue(tmp_path) -> str:
    """RTE in the layout of GLUE's download: a pair is entailed if its texts are equal."""
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    texts = sentences(60)
    for split, count in (("train", 40), ("dev", 20)):
        pairs = [
            (t, t, "entailment") if i % 2 else (t, texts[i], "not_entailment") for i, t in enumerate(texts[:count])
        ]
        lines = ["\t".join(map(str, (i, *pair))) for i, pair in enumerate(pairs)]
        (folder / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    return str(folder.parent)


def test_ablation_from_text_files_and_again(tmp_path, text_files, glue, capsys):
    """Teacher, three arms, two seeds, a task; then the report alone."""
    out = tmp_path / "out"
    arguments = ["--train_files", text_files[0], "--eval_files", text_files[1], *SHORT, *SMALL, "--vocab_size", "60"]
    arguments += ["--arms", "full", "no_mlm", "mlm_alone", "--seeds", "2", "--output_dir", str(out)]
    arguments += ["--tasks", "rte", "--glue_dir", glue, "--task_epochs", "1"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for line in ("teacher: ", "student: ", "student-no_mlm: ", "student-seed57: ", "2 seeds", "MLM alone against"):
        assert line in text
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["train_files"] == ["train.txt"]  # names, not paths
    assert str(tmp_path) not in json.dumps(results)
    for stages in results["students"].values():
        assert [p["step"] for p in stages[0]["curve"]] == [0, 4, 6]
        assert stages[0]["curve"][0] == results["students"]["full"][0]["curve"][0]  # the same model to start from
        assert stages[0]["curve"][-1] != stages[1]["curve"][-1]
        assert all(0 <= s["tasks"]["rte"]["metrics"]["accuracy"] <= 1 for s in stages)
        assert all(0 < s["seconds_per_step"] < 10 for s in stages)
    assert len({s["seed"] for s in results["teacher"] if 0 <= s["tasks"]["rte"]["metrics"]["accuracy"] <= 1}) == 2
    assert results["latency"]["milliseconds"]["student"] > 0
    teacher = results["teacher"][0]
    student = results["students"]["full"][0]
    assert 0 < student["body"] < teacher["body"] < teacher["parameters"]

    before = tree(out)
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("reusing") == 7  # teacher, students
    changed = {name for name, data in tree(out).items() if before.get(name) != data}
    assert changed <= {"results.json", "curves.png"}

    assert main([*arguments, "--alpha_cos", "0.5"]) == 2
    assert "holds a run with alpha_cos 1.0, not 0.5" in capsys.readouterr().err


def test_a_teacher_from_elsewhere_is_fine_tuned_too(tmp_path, teacher_folder, text_files, glue):
    arguments = ["--train_files", text_files[0], "--eval_files", text_files[1], "--teacher", str(teacher_folder)]
    arguments += [*SHORT, "--output_dir", str(tmp_path / "out"), "--arms", "full", "--seeds", "1"]
    assert main([*arguments, "--tasks", "rte", "--glue_dir", glue, "--task_epochs", "1"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["teacher"][0]["tasks"].keys() == {"rte"}
    assert results["teacher"][0]["curve"][0]["loss"] > 1


REFUSED = {
    "--arms full nothing": "--arms nothing: it must be one of full, no_cos",
    "--tasks squad": "--tasks squad: it must be one of sst2, ",
    "--tasks rte --glue_dir nowhere": "no such file: nowhere",
    "--alpha_mlm 0 --arms mlm_alone": "--arms mlm_alone: every weight of the loss is 0",
    "--seeds 0": "--seeds must be positive",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_refused(change, tmp_path, text_files, capsys):
    arguments = ["--train_files", text_files[0], "--output_dir", str(tmp_path / "out"), *change.split()]
    assert main(arguments) == 2
    assert REFUSED[change] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_its_preset_holds_options_only():
    preset = Path(__file__).parents[2] / "configs" / "ablation.yaml"
    config, options = parse(["--config", str(preset)], "program", [AblationOptions])
    assert (options.tasks, options.seeds, config.training.max_steps) == (["sst2", "stsb"], 3, 250)


def test_what_the_report_says():
    """Differences by hand, of the same seed each; one counts beyond its 95 % interval."""
    values = {"full": [[4.0, 4.2, 4.1], [0.7, 0.8, 0.7]], "no_mlm": [[5.0, 5.3, 5.15], [0.6, 0.9, 0.7]]}
    students = {
        arm: [
            {"curve": [{"step": 1, "loss": x, "kl": 0.1}], "tasks": {"rte": {"metrics": {"accuracy": y}}}}
            for x, y in zip(*pairs, strict=True)
        ]
        for arm, pairs in values.items()
    }
    full, other = (report.numbers(students[arm]) for arm in values)
    assert full["rte"] == pytest.approx([70, 80, 70])
    assert report.difference(other["loss"], full["loss"]) == pytest.approx((1.05, 0.05 / 3**0.5))
    assert report.verdict(other["loss"], full["loss"], "loss") == "worse by 1.0500 ± 0.0289"
    assert report.verdict(other[report.SCORE], full[report.SCORE], report.SCORE) == "not told apart (+0.000 ± 5.774)"

    for stages in students.values():
        stages[0]["parameters"] = 60
    teacher = {"curve": [{"step": 1, "loss": 3.0, "kl": 0.0}], "parameters": 100}
    for score, said in ((0.9, "81.5% of the teacher's mean score, 40% fewer"), (0.0, "has 40% fewer")):  # 0: collapsed
        results = {"teacher": [{**teacher, "tasks": {"cola": {"metrics": {"matthews": score}}}}], "students": students}
        assert said in report.retention(results, full)[0]


def test_ablation_without_tasks(tmp_path, text_files, capsys):
    """The form of `make demo`: two arms on text, compared in a table and a picture."""
    out = tmp_path / "out"
    arguments = ["--train_files", text_files[0], "--eval_files", text_files[1], *SHORT, *SMALL, "--vocab_size", "60"]
    assert main([*arguments, "--arms", "full", "mlm_alone", "--seeds", "1", "--output_dir", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Teacher and students" in text
    assert "Fine-tuned" not in text
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((out / "results.json").read_text())["students"]) == {"full", "mlm_alone"}
