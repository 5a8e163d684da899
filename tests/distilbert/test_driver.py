"""`python -m fusedkd.distilbert`, from the command line to the folder it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import bert, sentences

pytest.importorskip("transformers")

from transformers import AutoTokenizer, BertTokenizer, DistilBertForMaskedLM, GPT2Config, GPT2LMHeadModel

from fusedkd.distilbert import report
from fusedkd.distilbert.__main__ import main

SHORT = ["--student_steps", "6", "--eval_steps", "4", "--block_size", "16", "--per_device_train_batch_size", "4"]
SHORT += ["--report_to", "none", "--mlm_probability", "0.3", "--eval_blocks", "8"]
SMALL = ["--teacher_steps", "6", "--teacher_layers", "2", "--teacher_hidden", "16", "--teacher_heads", "2"]


def files(text_files) -> list[str]:
    return ["--train_files", text_files[0], "--eval_files", text_files[1]]


def tree(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def glue(tmp_path):
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
    arguments = ["ablate", *files(text_files), *SHORT, *SMALL, "--vocab_size", "60", "--output_dir", str(out)]
    arguments += ["--arms", "full", "no_mlm", "mlm_alone", "--seeds", "2"]
    arguments += ["--tasks", "rte", "--glue_dir", glue, "--task_epochs", "1"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for line in ("Tokenizer: training", "teacher: ", "student: ", "student-no_mlm: ", "student-seed57: ", "2 seeds",
                 "MLM alone against the full loss"):  # fmt: skip
        assert line in text

    student = DistilBertForMaskedLM.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    batch = tokenizer(["the cat [MASK] the dog"], return_tensors="pt", return_token_type_ids=False)
    assert student(**batch).logits.shape == (1, batch["input_ids"].shape[1], len(tokenizer))
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name, said in (("student", "Distilled from"), ("student-mlm_alone", "masked-language modelling")):
        card = (out / name / "README.md").read_text()
        assert str(tmp_path) not in card
        assert ("Distilled from" in card) == (said == "Distilled from")

    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["train_files"] == ["train.txt"]  # names, not paths
    assert str(tmp_path) not in json.dumps(results)
    for stages in results["students"].values():
        assert [p["step"] for p in stages[0]["curve"]] == [0, 4, 6]
        assert stages[0]["curve"][0] == results["students"]["full"][0]["curve"][0]  # the same model to start from
        assert stages[0]["curve"][-1] != stages[1]["curve"][-1]
        assert all(0 <= s["tasks"]["rte"]["metrics"]["accuracy"] <= 1 for s in stages)
    assert (
        len({stage["seed"] for stage in results["teacher"] if 0 <= stage["tasks"]["rte"]["metrics"]["accuracy"] <= 1})
        == 2
    )
    assert results["latency"]["milliseconds"]["student"] > 0

    before = tree(out)
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("reusing") >= 1 + 7  # tokenizer, teacher, students
    changed = {name for name, data in tree(out).items() if before.get(name) != data}
    assert changed <= {"results.json", "curves.png"} | {n for n in before if n.startswith("tokenizer/")}

    assert main([*arguments, "--alpha_cos", "0.5"]) == 2
    assert "holds a run with --alpha_cos 1.0, not 0.5" in capsys.readouterr().err


def test_what_the_report_says():
    """Means and spreads by hand; a difference counts beyond two standard errors."""
    values = {"full": [[4.0, 4.2], [0.7, 0.8]], "no_mlm": [[5.0, 5.2], [0.6, 0.9]]}
    students = {
        arm: [
            {"curve": [{"step": 1, "loss": x, "kl": 0.1}], "tasks": {"rte": {"metrics": {"accuracy": y}}}}
            for x, y in zip(*pairs, strict=True)
        ]
        for arm, pairs in values.items()
    }
    full, other = (report.numbers(students[arm]) for arm in values)
    assert full["rte"] == pytest.approx([70, 80])
    assert report.difference(other["loss"], full["loss"]) == pytest.approx((1.0, 0.1414214))
    assert report.verdict(other["loss"], full["loss"], "loss") == "worse by 1.0000 ± 0.1414"
    assert report.verdict(other[report.SCORE], full[report.SCORE], report.SCORE).startswith("no difference")

    for stages in students.values():
        stages[0]["parameters"] = 60
    teacher = {"curve": [{"step": 1, "loss": 3.0, "kl": 0.0}], "parameters": 100}
    for score, said in ((0.9, "83.3% of the teacher's mean score, 40% fewer"), (0.0, "has 40% fewer")):  # 0: collapsed
        results = {"teacher": [{**teacher, "tasks": {"cola": {"metrics": {"matthews": score}}}}], "students": students}
        assert said in report.retention(results, full)[0]


def test_teacher_and_data_set_folders(tmp_path, teacher_folder, tokenizer, capsys):
    (tmp_path / "set").mkdir()
    for split, count in (("train", 100), ("validation", 20)):
        (tmp_path / "set" / f"{split}.txt").write_text("\n".join(sentences(count)) + "\n")
    out = tmp_path / "out"
    arguments = ["--dataset", str(tmp_path / "set"), "--teacher", str(teacher_folder), "--output_dir", str(out)]
    assert main([*arguments, *SHORT, "--sequences", "by_length", "--kd_on", "masked"]) == 0
    assert not list((out / "teacher").glob("*.safetensors"))
    assert AutoTokenizer.from_pretrained(out / "student").get_vocab() == tokenizer.get_vocab()
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["learning_rate"] == 5e-4  # the published recipe
    assert results["settings"]["arms"] == ["full"]
    assert results["teacher"][0]["parameters"] == bert(len(tokenizer)).num_parameters()
    assert "teacher" in capsys.readouterr().out


def test_distillation_brings_the_student_nearer_to_its_teacher(tmp_path, teacher_folder, text_files):
    """With the triple loss the KL to the teacher falls well below that of the student as copied."""
    out = tmp_path / "out"
    more = [*SHORT, "--student_steps", "60", "--eval_steps", "60", "--learning_rate", "3e-3", "--output_dir", str(out)]
    more += ["--arms", "full", "mlm_alone"]
    assert main([*files(text_files), "--teacher", str(teacher_folder), *more]) == 0
    curves = {n: s[0]["curve"] for n, s in json.loads((out / "results.json").read_text())["students"].items()}
    assert curves["full"][-1]["kl"] < 0.7 * curves["full"][0]["kl"]
    assert curves["full"][-1]["kl"] < curves["mlm_alone"][-1]["kl"]


def test_gpt2_from_a_stream_with_every_term(tmp_path, gpt2_tokenizer, text_files, capsys):
    teacher = tmp_path / "gpt2"
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(gpt2_tokenizer), **size)).save_pretrained(teacher)
    gpt2_tokenizer.save_pretrained(teacher)
    out = tmp_path / "out"
    arguments = [*files(text_files), "--streaming", "--teacher", str(teacher), *SHORT, "--output_dir", str(out)]
    arguments += ["--divergence", "jsd:beta=0.3", "--alpha_mse", "0.1", "--cos_layers", "copied", "--layers", "1,3"]
    assert main([*arguments, "--freeze_token_embeddings", "--bf16", "--dataloader_num_workers", "2"]) == 0
    assert "a stream" in capsys.readouterr().out
    student, source = (GPT2LMHeadModel.from_pretrained(folder) for folder in (out / "student", teacher))
    assert student.config.n_layer == 2
    assert torch.equal(student.transformer.wte.weight, source.transformer.wte.weight)
    assert not torch.equal(student.transformer.wpe.weight, source.transformer.wpe.weight)


@pytest.fixture
def bad(tmp_path, text_files, teacher_folder):
    """Command lines that cannot work, and what the one line of the answer says."""
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "text.gz").write_text("text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 5)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]))
    mismatched = tmp_path / "mismatched"
    bert(20).save_pretrained(mismatched)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(mismatched)
    text = files(text_files)
    return {
        "missing file": (["--train_files", "nowhere.txt"], "no such file: nowhere.txt"),
        "folder as text": (["--train_files", str(tmp_path)], f"{tmp_path} is a folder, not a file"),
        "file of no bytes": (["--train_files", str(tmp_path / "nothing.txt")], "the training text is empty: "),
        "held-out file of no bytes": ([*text[:3], str(tmp_path / "nothing.txt")], "the held-out text is empty: "),
        "no gzip": (["--train_files", str(tmp_path / "text.gz")], f"cannot read {tmp_path / 'text.gz'}: Not a gzipped"),
        "empty text": (["--train_files", str(tmp_path / "empty.txt")], "the training text is empty"),
        "not utf-8": (["--train_files", str(tmp_path / "latin.txt")], "cannot read the text files"),
        "empty held-out text": ([*text[:3], str(tmp_path / "empty.txt")], "the held-out text is empty"),
        "no such data set": (["--dataset", str(tmp_path / "nothing")], "cannot read"),
        "no such teacher": (
            [*text, "--teacher", str(tmp_path / "nothing")],
            f"--teacher {tmp_path / 'nothing'}: no such folder",
        ),
        "a teacher's folder without one": ([*text, "--teacher", str(tmp_path)], "holds no model (no config.json)"),
        "a file as teacher": ([*text, "--teacher", text[1]], "train.txt is a file, not the folder of a model"),
        "tracker": ([*text, "--report_to", "nothing"], "--report_to nothing: unknown, or not installed; there are "),
        "teacher's tokenizer too large": ([*text, "--teacher", str(mismatched)], "20 vocabulary rows"),
        "another vocabulary": (
            [*text, "--teacher", str(teacher_folder), "--vocab_file", str(tmp_path / "vocab.txt")],
            "another vocabulary",
        ),
        "positions": ([*text, "--teacher", str(teacher_folder), "--block_size", "128"], "exceeds the teacher's 64"),
        "negative steps": ([*text, "--student_steps", "-1"], "--student_steps must be positive"),
        "negative weight": ([*text, "--alpha_distil", "-1"], "--alpha_distil must not be negative"),
        "heads": ([*text, "--teacher_hidden", "30", "--teacher_heads", "4"], "multiple of twice --teacher_heads"),
        "binary vocabulary": ([*text, "--vocab_file", str(tmp_path / "latin.txt")], "it is not UTF-8 text"),
        "unknown option": (["--no_such_option"], "no such option: --no_such_option"),
        "unknown arm": ([*text, "--arms", "full", "nothing"], "--arms nothing: it must be one of full, no_cos"),
        "task": ([*text, "--tasks", "rte", "--glue_dir", str(tmp_path)], "no such file"),
        "no loss": ([*text, "--alpha_mlm", "0", "--arms", "mlm_alone"], "--arms mlm_alone: every weight"),
        "layers": ([*text, "--teacher", str(teacher_folder), "--layers", "0,2", "--block_size", "16"], "--layers 0,2"),
        "layers of a teacher to be trained": ([*text, "--layers", "0,9"], "--layers 0,9: must ascend within"),
    }


CASES = ["missing file", "folder as text", "file of no bytes", "held-out file of no bytes", "no gzip", "empty text",
         "a teacher's folder without one", "a file as teacher", "tracker",
         "layers of a teacher to be trained", "not utf-8", "empty held-out text", "no such data set", "no such teacher",
         "teacher's tokenizer too large", "another vocabulary", "positions", "negative steps", "negative weight",
         "heads", "binary vocabulary", "unknown option", "unknown arm", "task", "no loss", "layers"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_writes_nothing(case, bad, tmp_path, capsys):
    arguments, message = bad[case]
    out = tmp_path / "out"
    assert main([*SMALL, "--vocab_size", "60", *arguments, "--output_dir", str(out)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not out.exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, text_files, capsys):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("precious")
    assert main([*files(text_files), "--output_dir", str(out)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert tree(out) == {"chapter1.txt": b"precious"}
    (out / "run.json").write_text("[1]")
    assert main([*files(text_files), "--output_dir", str(out)]) == 2
    assert "run.json is not ours" in capsys.readouterr().err
    assert tree(out) == {"chapter1.txt": b"precious", "run.json": b"[1]"}


def test_a_corrected_command_goes_on_in_the_same_folder(tmp_path, text_files, capsys):
    """What is kept there must depend on none of the corrections."""
    arguments = [*files(text_files), *SHORT, *SMALL, "--vocab_size", "60", "--save_steps", "10"]
    arguments += ["--arms", "full", "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--teacher_learning_rate", "1e30"]) == 1
    assert main([*arguments, "--learning_rate", "1e30", "--layers", "1"]) == 1
    assert capsys.readouterr().err.count("try a lower learning rate") == 2
    assert main([*arguments, "--layers", "0"]) == 0
    assert "teacher: reusing" in capsys.readouterr().out
    for change in (["--layers", "1"], ["--layers", "0", "--teacher_learning_rate", "1e-2"]):
        assert main([*arguments, *change]) == 2
        assert "choose another --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "what"), [("fusedkd.distilbert", "the driver"), ("fusedkd.integrations.cache_teacher", "cache_teacher")]
)
def test_without_the_training_extra_it_says_what_to_install(module, what):
    hide = f"import runpy, sys; sys.modules['transformers'] = None; runpy.run_module('{module}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f'error: transformers is missing: {what} needs pip install "fusedkd[train]"'


def test_two_processes_share_the_work(tmp_path, teacher_folder, text_files, glue):
    """Three held-out batches for two ranks: one evaluates twice, the other once."""
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "fusedkd.distilbert", *files(text_files), "--teacher", str(teacher_folder), *SHORT]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command += ["--eval_blocks", "12", "--output_dir", str(out), "--arms", "full", "mlm_alone"]
    command += ["--tasks", "rte", "--glue_dir", glue, "--task_epochs", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("student-mlm_alone: ") == 1  # one process speaks
    assert (out / "results.json").is_file()
    DistilBertForMaskedLM.from_pretrained(out / "student")


def test_cased_vocabularies_stay_cased(tmp_path, text_files):
    words = sorted({w for line in sentences(200) for w in line.split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", *words]))
    out = tmp_path / "out"
    more = ["--vocab_file", str(tmp_path / "vocab.txt"), "--output_dir", str(out)]
    assert main([*files(text_files), *SHORT, *SMALL, *more]) == 0
    again = BertTokenizer.from_pretrained(out / "student")
    assert again("The the").input_ids == [2, 5, again.get_vocab()["the"], 3]
