"""`python -m fusedkd.distilbert`, from the command line to the folder it leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import bert, sentences

pytest.importorskip("transformers")

from huggingface_hub import ModelCard
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerState,
)

from fusedkd.distilbert.__main__ import main
from fusedkd.distilbert.distil import Logs, evaluations

SHORT = ["--max_steps", "6", "--eval_steps", "4", "--block_size", "16", "--per_device_train_batch_size", "4"]
SHORT += ["--report_to", "none", "--mlm_probability", "0.3", "--eval_blocks", "8"]
SMALL = ["--teacher_steps", "6", "--teacher_layers", "2", "--teacher_hidden", "16", "--teacher_heads", "2"]


def files(text_files) -> list[str]:
    return ["--train_files", text_files[0], "--eval_files", text_files[1]]


def tree(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def curve(folder: Path) -> Logs:
    return evaluations(TrainerState.load_from_json(folder / "trainer_state.json").log_history)


def test_what_is_saved_is_what_the_card_tells_of(tmp_path, text_files, capsys):
    """Without an evaluation in training, and where the best model is not the last one."""
    common = [*files(text_files), *SHORT, "--mask_smoothing", "0"]
    never = ["--eval_strategy", "no", "--save_strategy", "no"]
    best = ["--load_best_model_at_end", "true", "--save_steps", "2", "--eval_steps", "2"]
    for name, way in {"never": never, "best": [*best, "--teacher_learning_rate", "3"]}.items():
        out, again = tmp_path / name, tmp_path / f"{name} again"
        assert main([*common, *SMALL, "--vocab_size", "60", *way, "--output_dir", str(out)]) == 0, name
        told = capsys.readouterr().out
        assert f"student            held-out loss {curve(out / 'student')[-1]['eval_ce']:.3f}" in told
        found = re.search(r"held-out loss ([\d.]+),", (out / "teacher" / "README.md").read_text())[1]
        assert f"teacher            held-out loss {found}, " in told
        assert main([*common, "--teacher", str(out / "teacher"), "--output_dir", str(again)]) == 0
        assert f"teacher            held-out loss {found}, " in capsys.readouterr().out, name
    *_, last, saved = curve(tmp_path / "best" / "teacher")
    assert saved["eval_ce"] < last["eval_ce"]


def test_what_the_trainer_refuses_is_one_line(tmp_path, text_files, capsys):
    arguments = [*files(text_files), *SHORT, *SMALL, "--vocab_size", "60", "--torch_compile", "true"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: torch_compile is not supported: ")


def test_everything_from_text_files_and_again(tmp_path, text_files, capsys, monkeypatch):
    """Tokenizer, teacher, student; a card that says nothing of the machine, and loads the model."""
    out = tmp_path / "out"
    arguments = [*files(text_files), *SHORT, *SMALL, "--vocab_size", "60", "--output_dir", str(out)]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    for line in ("a vocabulary of 60", "teacher: ", "student: ", "student as copied  held-out loss"):
        assert line in told

    student = DistilBertForMaskedLM.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    batch = tokenizer(["the cat [MASK] the dog"], return_tensors="pt", return_token_type_ids=False)
    assert student(**batch).logits.shape == (1, batch["input_ids"].shape[1], len(tokenizer))
    assert [point["step"] for point in curve(out / "student")] == [0, 4, 6]
    assert "eval_kl" in curve(out / "student")[-1]
    assert "eval_kl" not in curve(out / "teacher")[-1]
    assert {f.name for f in out.iterdir()} == {"teacher", "student"}

    card = ModelCard.load(out / "student" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.base_model) == ("transformers", "fill-mask", None)
    for line in ("# student", "A DistilBertForMaskedLM of 1 layers", "trained on train.txt, distilled from a BERT"):
        assert line in card.text
    assert "distilled" not in (out / "teacher" / "README.md").read_text()
    texts = [(out / name / file).read_text() for name in ("teacher", "student") for file in ("README.md", "run.json")]
    assert not any(str(tmp_path) in text for text in texts)
    monkeypatch.chdir(out)
    loaded: dict = {}
    exec(re.search(r"```python\n(.*?)\n```", card.text, re.DOTALL)[1], loaded)
    assert type(loaded["model"]) is DistilBertForMaskedLM

    before = tree(out)
    assert main(arguments) == 0
    assert capsys.readouterr().out.count(": reusing ") == 2
    assert tree(out) == before


def test_what_is_kept_is_not_replaced_by_another_run(tmp_path, text_files, capsys):
    """A finished teacher serves other students; other options, or other text of the same names, are refused."""
    out, text = tmp_path / "out", Path(text_files[0])
    arguments = [*files(text_files), *SHORT, *SMALL, "--vocab_size", "60", "--output_dir", str(out)]
    assert main(arguments) == 0
    content = text.read_text()
    changes = {
        "student holds a run with alpha_cos 1.0, not 0.5": ["--alpha_cos", "0.5"],
        "teacher holds a run with teacher_steps 6, not 7": ["--teacher_steps", "7"],
        "teacher holds a run with training text": [],
    }
    for message, change in changes.items():
        if not change:
            text.write_text(content.replace("cat", "dog"))
        assert main([*arguments, *change]) == 2
        assert message in capsys.readouterr().err
    text.write_text(content)
    assert main([*arguments, "--logging_steps", "3"]) == 0  # it may change
    (out / "student" / "run.json").write_text("[1]")
    assert main(arguments) == 2
    assert "its run.json is not ours" in capsys.readouterr().err
    shutil.rmtree(out / "student")
    capsys.readouterr()
    assert main([*arguments, "--alpha_cos", "0.5"]) == 0
    assert "teacher: reusing" in capsys.readouterr().out


def test_teacher_and_data_set_folders(tmp_path, teacher_folder, tokenizer, capsys):
    (tmp_path / "set").mkdir()
    for split, count in (("train", 100), ("validation", 20)):
        (tmp_path / "set" / f"{split}.txt").write_text("\n".join(sentences(count)) + "\n")
    out = tmp_path / "out"
    arguments = ["--dataset", str(tmp_path / "set"), "--teacher", str(teacher_folder), "--output_dir", str(out)]
    assert main([*arguments, *SHORT, "--sequences", "by_length", "--kd_on", "masked"]) == 0
    assert not list((out / "teacher").glob("*.safetensors"))
    assert AutoTokenizer.from_pretrained(out / "student").get_vocab() == tokenizer.get_vocab()
    settings = json.loads((out / "student" / "run.json").read_text())
    assert settings["learning_rate"] == 5e-4  # the published recipe
    assert (settings["dataset"], settings["teacher"]) == ("set", "bert")
    assert "teacher            held-out loss" in capsys.readouterr().out


def test_distillation_brings_the_student_nearer_to_its_teacher(tmp_path, teacher_folder, text_files):
    """With the triple loss the KL to the teacher falls well below that of the student as copied."""
    out = tmp_path / "out"
    more = [*SHORT, "--max_steps", "60", "--eval_steps", "60", "--learning_rate", "3e-3"]
    alone = ["--alpha_distil", "0", "--alpha_cos", "0"]
    kl = {}
    for name, change in (("full", []), ("mlm_alone", alone)):
        more += ["--output_dir", str(out / name)]
        assert main([*files(text_files), "--teacher", str(teacher_folder), *more, *change]) == 0
        kl[name] = [point["eval_kl"] for point in curve(out / name / "student")]
    assert kl["full"][0] == kl["mlm_alone"][0]
    assert kl["full"][-1] < 0.7 * kl["full"][0]
    assert kl["full"][-1] < kl["mlm_alone"][-1]


def test_gpt2_from_a_stream_with_every_term(tmp_path, gpt2_tokenizer, text_files, capsys):
    teacher = tmp_path / "gpt2"
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(gpt2_tokenizer), **size)).save_pretrained(teacher)
    gpt2_tokenizer.save_pretrained(teacher)
    out = tmp_path / "out"
    arguments = [*files(text_files), "--streaming", "--teacher", str(teacher), *SHORT, "--output_dir", str(out)]
    arguments += ["--divergence", "jsd:beta=0.3", "--alpha_mse", "0.1", "--cos_layers", "copied", "--layers", "1,3"]
    arguments += ["--terms", "minilm:0.5", "tinybert"]
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
        "folder as text": (["--train_files", str(tmp_path)], f"no such file: {tmp_path} (a folder of text can be a"),
        "file of no bytes": (["--train_files", str(tmp_path / "nothing.txt")], "text"),
        "held-out file of no bytes": ([*text[:3], str(tmp_path / "nothing.txt")], "text"),
        "no gzip": (["--train_files", str(tmp_path / "text.gz")], "cannot read the text files"),
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
        "tracker": ([*text, "--report_to", "nothing"], "--report_to nothing: not installed; there are "),
        "teacher's tokenizer too large": ([*text, "--teacher", str(mismatched)], "20 vocabulary rows"),
        "another vocabulary": (
            [*text, "--teacher", str(teacher_folder), "--vocab_file", str(tmp_path / "vocab.txt")],
            "another vocabulary",
        ),
        "positions": ([*text, "--teacher", str(teacher_folder), "--block_size", "128"], "exceeds the teacher's 64"),
        "negative steps": ([*text, "--max_steps", "-1"], "--max_steps must be positive"),
        "smoothing": ([*text, "--label_smoothing_factor", "0.1"], "--label_smoothing_factor must be 0, not 0.1"),
        "negative weight": ([*text, "--alpha_distil", "-1"], "--alpha_distil must not be negative"),
        "heads": ([*text, "--teacher_hidden", "30", "--teacher_heads", "4"], "multiple of twice --teacher_heads"),
        "binary vocabulary": ([*text, "--vocab_file", str(tmp_path / "latin.txt")], "it is not UTF-8 text"),
        "unknown option": (["--no_such_option"], "--no_such_option"),
        "layers": ([*text, "--teacher", str(teacher_folder), "--layers", "0,2", "--block_size", "16"], "--layers 0,2"),
        "layers of a teacher to be trained": ([*text, "--layers", "0,9"], "--layers 0,9: must ascend within"),
    }


CASES = ["missing file", "folder as text", "file of no bytes", "held-out file of no bytes", "no gzip", "empty text",
         "a teacher's folder without one", "a file as teacher", "tracker",
         "layers of a teacher to be trained", "not utf-8", "empty held-out text", "no such data set", "no such teacher",
         "teacher's tokenizer too large", "another vocabulary", "positions", "negative steps", "negative weight",
         "smoothing", "heads", "binary vocabulary", "unknown option", "layers"]  # fmt: skip


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


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_folder_that_holds_something_else_is_left_alone(name, tmp_path, text_files, capsys):
    """Before anything is trained."""
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "chapter1.txt").write_text("precious")
    assert main([*files(text_files), *SMALL, "--vocab_size", "60", "--output_dir", str(tmp_path / "out")]) == 2
    assert f"{name} holds something else" in capsys.readouterr().err
    assert (tmp_path / "out" / name / "chapter1.txt").read_text() == "precious"
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_corrected_command_goes_on_in_the_same_folder(tmp_path, text_files, capsys):
    """What is kept there must depend on none of the corrections."""
    arguments = [*files(text_files), *SHORT, *SMALL, "--vocab_size", "60", "--save_steps", "10"]
    arguments += ["--output_dir", str(tmp_path / "out")]
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


def test_two_processes_share_the_work(tmp_path, teacher_folder, text_files):
    """Three held-out batches for two ranks: one evaluates twice, the other once."""
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "fusedkd.distilbert", *files(text_files), "--teacher", str(teacher_folder), *SHORT]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command += ["--eval_blocks", "12", "--per_device_eval_batch_size", "4", "--output_dir", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("student: ") == 1  # one process speaks
    assert json.loads((out / "student" / "run.json").read_text())["processes"] == 2
    DistilBertForMaskedLM.from_pretrained(out / "student")


def test_cased_vocabularies_stay_cased(tmp_path, text_files):
    words = sorted({w for line in sentences(200) for w in line.split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", *words]))
    out = tmp_path / "out"
    more = ["--vocab_file", str(tmp_path / "vocab.txt"), "--output_dir", str(out)]
    assert main([*files(text_files), *SHORT, *SMALL, *more]) == 0
    again = BertTokenizer.from_pretrained(out / "student")
    assert again("The the").input_ids == [2, 5, again.get_vocab()["the"], 3]
