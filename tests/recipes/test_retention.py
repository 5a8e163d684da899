"""`python -m recipes.retention`: parameters, time and scores of finished comparisons, beside the teacher's."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from tiny_run import classifier
from transformers import BertModel

from fusedkd.integrations.command import UsageError
from recipes.glue.__main__ import main as compare
from recipes.retention.__main__ import main, scores_of


@pytest.fixture
def runs(tmp_path, tokenizer, glue) -> list[str]:
    """Of two tasks, with an encoder of four layers as teacher."""
    encoder = tmp_path / "encoder"
    classifier(len(tokenizer)).save_pretrained(tmp_path / "body")
    BertModel.from_pretrained(tmp_path / "body").save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    common = ["--teacher", str(encoder), "--max_length", "32", "--max_steps", "2", "--glue_dir", str(glue)]
    common += ["--teacher_max_steps", "2", "--disable_tqdm", "true"]
    folders = [str(tmp_path / task) for task in ("sst2", "stsb")]
    for folder, methods in zip(folders, (["ce", "kd"], ["kd", "pkd"]), strict=True):
        assert compare([*common, "--task", Path(folder).name, "--method", *methods, "--output_dir", folder]) == 0
    return folders


def test_the_table(tmp_path, runs, glue, capsys):
    out = tmp_path / "out"
    command = ["--runs", *runs, "--glue_dir", str(glue), "--output_dir", str(out), "--pairs", "3"]
    assert main(command) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    teacher, kd = results["models"]  # the methods of both tasks
    assert kd["model"] == "kd"
    assert kd["parameters"] < teacher["parameters"]
    assert list(kd["scores"]) == ["sst2", "stsb"]
    sst2 = json.loads((Path(runs[0]) / "results.json").read_text())
    assert teacher["scores"]["sst2"] == [pytest.approx(100 * sst2["teacher"]["accuracy"])]
    assert kd["scores"]["sst2"] == [pytest.approx(100 * sst2["students"]["kd"][0]["accuracy"])]
    assert results["latency"]["pairs"] == 3
    assert results["latency"]["seconds"]["teacher"] > results["latency"]["seconds"]["kd"] > 0
    assert (out / "retention.png").stat().st_size > 1000
    assert "The best students by mean score are those of kd" in capsys.readouterr().out

    def refused(*folders: str) -> str:
        assert main(["--runs", *folders, "--glue_dir", str(glue), "--output_dir", str(out)]) == 2
        return capsys.readouterr().err

    assert "has sst2 twice" in refused(runs[0], runs[0])
    assert "no results.json" in refused(str(tmp_path))
    shutil.rmtree(Path(runs[0]) / "kd-seed1")
    assert main(command) == 0
    assert f"no time of kd: there is no model in {Path(runs[0]) / 'kd-seed1'}" in capsys.readouterr().out
    again = json.loads((out / "results.json").read_text())
    assert again["models"] == results["models"]
    assert list(again["latency"]["seconds"]) == ["teacher"]


def test_a_teacher_given_and_students_of_their_own_classes(tmp_path, tokenizer, glue, capsys):
    """The teacher lies where it came from. A BiLSTM takes no token types, and here has more parameters; an early exit
    is saved without its exits: nothing that is loaded has its score.
    """
    run, teacher = str(tmp_path / "runs"), tmp_path / "ready"
    classifier(len(tokenizer)).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    common = ["--teacher", str(teacher), "--max_length", "32", "--max_steps", "1", "--glue_dir", str(glue)]
    common += ["--task", "rte", "--disable_tqdm", "true", "--output_dir", run]
    assert compare([*common, "--method", "bilstm", "early_exit"]) == 0
    out = tmp_path / "out"
    command = ["--runs", run, "--glue_dir", str(glue), "--output_dir", str(out), "--pairs", "2"]
    command += ["--teacher", str(teacher)]
    assert main(command) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in results["models"]] == ["teacher", "bilstm"]
    assert results["latency"]["seconds"]["bilstm"] > 0
    text = " ".join(capsys.readouterr().out.split())
    assert "left out: early_exit, which is saved without its exits" in text
    teacher_size, size = (row["parameters"] for row in results["models"])
    assert size > teacher_size
    assert f"with {size / teacher_size - 1:.0%} more parameters" in text
    for file in teacher.iterdir():
        file.unlink()
    assert main(command) == 2
    assert "the folder holds no model" in capsys.readouterr().err


def test_methods_are_compared_on_the_same_seeds():
    """Else the one with the luckier seeds keeps more."""
    its = {"ce": {1: 0.5, 2: 0.3}, "kd": {1: 0.6}}
    students = {name: [{"seed": i, "accuracy": x} for i, x in seeds.items()] for name, seeds in its.items()}
    results = {"task": "sst2", "metrics": ["accuracy"], "teacher": {"accuracy": 0.9}, "students": students}
    assert scores_of(results, "ce", ["ce", "kd"]) == [50.0]
    assert scores_of(results, "ce", ["ce"]) == [50.0, 30.0]
    assert scores_of(results, "teacher", ["ce", "kd"]) == [90.0]
    students["kd"][0]["seed"] = 3
    with pytest.raises(UsageError, match="--runs: of sst2 there is no seed that all of ce, kd have"):
        scores_of(results, "kd", ["ce", "kd"])
