"""`python -m recipes.glue`: a teacher fine-tuned once, students of every method and seed, a report; and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from tiny_run import classifier, tiny_run
from transformers import AutoModelForSequenceClassification, BertModel

import recipes.glue.__main__
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.run_folder import contents
from fusedkd.integrations.students import student_of
from recipes.glue import compare, report
from recipes.glue.__main__ import main
from recipes.glue.compare import finished
from recipes.glue.method import chosen_methods, parse_method


@pytest.fixture
def encoder(tmp_path, tokenizer) -> Path:
    """A body without a head, as MiniLM is."""
    BertModel.from_pretrained(saved(tmp_path / "body", tokenizer)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def saved(folder: Path, tokenizer, **options) -> Path:
    classifier(len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compared(teacher: Path, folder: Path, *options: str) -> int:
    common = ["--teacher", str(teacher), "--output_dir", str(folder), "--max_length", "32", "--max_steps", "3"]
    return main([*common, "--learning_rate", "1e-3", "--disable_tqdm", "true", *options])


def test_a_comparison(tmp_path, tokenizer, encoder, glue, capsys):
    """And once more, with one method more: what is finished is kept."""
    (glue / "SST-2" / "test.tsv").write_text("index\tsentence\n0\tcat sees\n1\tdog hears\n")
    task = ["--glue_dir", str(glue), "--task", "sst2", "--teacher_epochs", "1", "--seeds", "2", "--labels", "8"]
    folder = tmp_path / "runs"
    assert compared(encoder, folder, *task, "--method", "ce", "kd", "--predict", "true") == 0
    results = json.loads((folder / "results.json").read_text())
    assert [[each["seed"] for each in its] for its in results["students"].values()] == [[1, 2]] * 2
    assert results["students"]["kd"][0]["kl_to_teacher"] > 0
    assert results["teacher"]["kl_to_teacher"] == 0
    assert (folder / "methods.png").stat().st_size > 1000
    lines = (folder / "kd-seed1" / "SST-2.tsv").read_text().splitlines()
    assert [line[:2] for line in lines] == ["in", "0\t", "1\t"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "kd-seed1")
    assert model.config.num_hidden_layers == 2
    assert model.config.id2label == {0: "negative", 1: "positive"}
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*/model.safetensors")}
    assert len(times) == 5
    capsys.readouterr()
    assert compared(encoder, folder, *task, "--method", "ce", "kd", "pkd:variant=last") == 0
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert "pkd:variant=last" in capsys.readouterr().out
    late = ["--method", "ce", "kd", "pkd:variant=last", "hidden", "--minutes", "1e-9"]
    assert compared(encoder, folder, *task, *late) == 0  # begins no student, and reports all that are finished
    results = json.loads((folder / "results.json").read_text())
    assert {name: len(its) for name, its in results["students"].items()} == {"ce": 2, "kd": 2, "pkd:variant=last": 2}
    assert compared(encoder, folder, *task, "--method", "ce", "--width", "16") == 2
    assert "holds a run with width None, not 16" in capsys.readouterr().err
    other = tmp_path / "elsewhere" / encoder.name
    shutil.copytree(encoder, other)
    assert compared(other, folder, *task, "--method", "ce", "kd") == 0
    BertModel.from_pretrained(saved(tmp_path / "another", tokenizer, seed=7)).save_pretrained(other)
    assert compared(other, folder, *task, "--method", "ce", "kd") == 2
    assert "holds a run with teacher_sha256" in capsys.readouterr().err


def test_fewer_examples_than_a_batch(tmp_path, tokenizer, glue, capsys):
    teacher, few = saved(tmp_path / "ready", tokenizer), ["--glue_dir", str(glue), "--examples", "8"]
    assert compared(teacher, tmp_path / "runs", *few, "--method", "ce", "--dataloader_drop_last", "true") == 2
    sentence = "--dataloader_drop_last must be false, not true: 8 examples fill no batch of 32"
    assert sentence in capsys.readouterr().err


def test_a_student_of_another_method_is_none(tmp_path):
    """Folders of earlier versions could be those of two texts."""
    (tmp_path / "result.json").write_text(json.dumps({"method": "pkd:beta=1e+2", "accuracy": 0.5}))
    assert finished(tmp_path, "pkd:beta=1e+2") == {"method": "pkd:beta=1e+2", "accuracy": 0.5}
    assert finished(tmp_path, "pkd:beta=1e-2") is None
    assert finished(tmp_path / "nothing", "ce") is None


def test_a_student_of_another_generator_is_refused(tmp_path):
    """Of the same name, with other contents."""
    generator, folder = tmp_path / "generator", tmp_path / "student"
    generator.mkdir()
    folder.mkdir()
    (generator / "config.json").write_text("{}")
    chosen = parse_method(f"mate_kd:generator={generator}")
    found = {"method": chosen.text, **contents({"generator": str(generator)})}
    (folder / "result.json").write_text(json.dumps(found))
    assert compare.student(chosen, None, folder, None, "") == found
    (generator / "config.json").write_text('{"a": 1}')
    with pytest.raises(UsageError, match="holds a run with generator_sha256 "):
        compare.student(chosen, None, folder, None, "")


def test_data_of_ones_own(tmp_path, tokenizer, encoder):
    """Classes by name, one of the training examples without a label; further texts without one."""
    rows = [("the cat sees", "pet"), ("the house near", "thing"), ("a dog hears", ""), ("a river on", "thing")]
    (tmp_path / "train.csv").write_text("words,kind\n" + "".join(f"{text},{kind}\n" for text, kind in rows * 3))
    lines = [{"words": text, "kind": kind} for text, kind in rows if kind]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "more.tsv").write_text("words\nthe bird then\n")
    own = ["--data", str(tmp_path / "train.csv"), str(tmp_path / "dev.jsonl"), "--text", "words", "--label", "kind"]
    more = ["--unlabelled", str(tmp_path / "more.tsv")]
    assert compared(encoder, tmp_path / "runs", *own, *more, "--method", "kd") == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "kd-seed1")
    assert model.config.id2label == {0: "pet", 1: "thing"}


def test_scores_of_two_texts(tmp_path, encoder):
    scored = [f"the cat {word},the dog,{i / 2}\n" for i, word in enumerate(("sees", "hears", "on"))]
    text = "".join(["a,b,score\n", *scored])
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("train.csv", "dev.csv")]
    own = ["--data", *files, "--text", "a", "b", "--score", "score"]
    assert compared(encoder, tmp_path / "runs", *own, "--method", "ce", "kd") == 0
    found = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert found["metrics"] == ["pearson", "spearman"]


def test_a_classifier_is_a_teacher_as_it_is(tmp_path, tokenizer, glue, capsys):
    teacher = saved(tmp_path / "ready", tokenizer)
    assert compared(teacher, tmp_path / "runs", "--glue_dir", str(glue), "--method", "kd", "--init", "random",
                    "--width", "16", "--layers", "0") == 0  # fmt: skip
    assert "a classifier already" not in capsys.readouterr().out
    assert not (tmp_path / "runs" / "teacher").exists()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "kd-seed1")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 1)
    assert compared(teacher, tmp_path / "copied", "--glue_dir", str(glue), "--method", "ce") == 0
    assert "a classifier already: layers copied from it know the task" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "none"], "--method none: it must be all, or of"),
        (["--data", "x.csv", "y.csv", "--text", "t", "--label", "l"], "no such file: x.csv"),
        (["--data", "x.csv", "--text", "t"], "--data needs one of --label, a column of classes, and --score"),
        (["--data", "x.doc", "y.csv", "--text", "t", "--label", "l"], "x.doc must end in .csv, .tsv, .jsonl"),
        (["--width", "16"], "--width 16: copied layers are 32 wide; add --init random"),
        (["--init", "random", "--width", "16", "--method", "pkd"], "pkd needs a student as wide as its teacher, 32"),
        (["--layers", "0", "1", "2", "--method", "pkd"], "a teacher of a multiple of the student's 3 layers, not 4"),
        (["--layers", "7"], "--layers 7: must ascend within the teacher's layers"),
        (
            ["--method", "defective_kd"],
            "defective_kd needs what the teacher was before it was fine-tuned, and",
        ),
        (["--method", "early_exit", "--predict", "true"], "early_exit is saved without its exits"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, tokenizer, glue, capsys, options, sentence):
    teacher = saved(tmp_path / "ready", tokenizer)
    assert compared(teacher, tmp_path / "runs", "--glue_dir", str(glue), *options) == 2
    assert sentence in capsys.readouterr().err


def test_of_all_methods_those_that_fit(tmp_path, tokenizer, glue, capsys, monkeypatch):
    monkeypatch.setattr(recipes.glue.__main__, "chosen_methods", lambda texts: chosen_methods(["ce", "pkd", "dkd"]))
    teacher = saved(tmp_path / "ready", tokenizer, labels=1)
    task = ["--glue_dir", str(glue), "--task", "stsb", "--layers", "0", "1", "2"]
    assert compared(teacher, tmp_path / "runs", *task, "--method", "all") == 0
    out = capsys.readouterr().out
    assert "left out: --method pkd needs a teacher of a multiple of" in out
    assert "left out: --method dkd needs classes, not a score" in out
    assert [*json.loads((tmp_path / "runs" / "results.json").read_text())["students"]] == ["ce"]


def test_differences_are_paired_by_seed():
    """Whatever a seed does to both methods falls out of the difference."""
    results = {"metrics": ["accuracy"]}
    base = [{"seed": i, "accuracy": x} for i, x in enumerate((0.5, 0.7, 0.6))]
    other = [{"seed": i, "accuracy": x} for i, x in enumerate((0.52, 0.72, 0.62))]
    change, error = report.paired(other, base, results)
    assert change == pytest.approx(2.0)
    assert error == pytest.approx(0.0, abs=1e-12)
    change, error = report.paired([*other[:2], {"seed": 9, "accuracy": 0.0}], base, results)
    assert change == pytest.approx(2.0)
    results["students"] = {"ce": base, "kd": other}
    assert report.findings(results) == ["Beyond a 95 % interval better than ce: kd (+2.0 ± 0.0)."]


def test_a_student_with_all_layers_copied_is_the_teacher(tokenizer):
    teacher = classifier(len(tokenizer)).eval()
    student = student_of(teacher, [0, 1, 2, 3]).eval()
    ids = torch.arange(2, 9)[None]
    assert torch.equal(teacher(input_ids=ids).logits, student(input_ids=ids).logits)
    half = student_of(teacher, [1, 3])
    assert torch.equal(
        half.bert.encoder.layer[1].output.dense.weight, teacher.bert.encoder.layer[3].output.dense.weight
    )


def test_two_seeds_tell_little():
    """The 95 % interval of two differences is 12.7 standard errors wide on either side."""
    base = [{"seed": i, "accuracy": 0.5} for i in range(2)]
    results = {"metrics": ["accuracy"], "students": {"ce": base}}
    for name, accuracies in (("kd", (0.53, 0.55)), ("pkd", (0.5399, 0.5401)), ("alp", (0.45,))):
        results["students"][name] = [{"seed": i, "accuracy": x} for i, x in enumerate(accuracies)]
    assert report.findings(results) == [
        "Beyond a 95 % interval better than ce: pkd (+4.0 ± 0.0).",
        "Not told apart from ce: kd (+4.0 ± 1.0).",
        "One seed, whose difference from ce has no error: alp (-5.0).",
    ]


def test_a_seed_draws_the_new_head(tmp_path, tokenizer):
    """The body is the source's, whatever the seed."""
    heads, bodies = [], []
    for seed in (1, 1, 2):
        model = tiny_run(tmp_path, tokenizer, arguments={"seed": seed}).student()
        heads.append(model.classifier.weight)
        bodies.append(model.bert.encoder.layer[1].output.dense.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(bodies[0], bodies[2])
    ready = tiny_run(tmp_path, tokenizer)
    ready.source = ready.teacher
    assert torch.equal(ready.student().classifier.weight, ready.teacher.classifier.weight)
