"""Fine-tuning on the tasks of GLUE: an exact loss, and runs that learn. SQuAD has its own file."""

# ruff: noqa: E402 (imports after importorskip)

import gzip
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

import one_task_step
from distilbert.conftest import bert
from glue_files import labelled
from ranks import on_ranks
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.interrupt import StopOnSignal, Stopped, last_checkpoint
from recipes.finetune.__main__ import GlueArguments, GlueOptions, finetune, load_model, main
from recipes.finetune.tasks import TASKS, read, tokenized


@pytest.fixture
def student_folder(tmp_path, tokenizer) -> Path:
    torch.manual_seed(3)
    size = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.3}
    model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size))
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def options(model, glue, folder, **more) -> tuple[GlueOptions, GlueArguments]:
    names = GlueOptions.__dataclass_fields__
    own = {"max_length": 32} | {name: value for name, value in more.items() if name in names}
    common = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "report_to": "none"}
    rest = common | {name: value for name, value in more.items() if name not in names}
    return GlueOptions(model=str(model), glue_dir=str(glue), **own), GlueArguments(output_dir=str(folder), **rest)


def curve(folder, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[f"eval_{name}"] for entry in history if f"eval_{name}" in entry]


# ---- the loss


@pytest.mark.parametrize("task", ["sst2", "stsb", "squad"])
def test_one_step_has_one_gradient(task):
    """Of seven rows in four batches: the last one is short."""
    one_task_step.assert_equal(one_task_step.gradient(task, 2, 4), one_task_step.truth(task))


def test_two_processes_have_it_too():
    found = on_ranks(2, one_task_step.gradient, "squad", 2, 2, 8)
    one_task_step.assert_equal(found, one_task_step.truth("squad", count=8))


# ---- models


def roberta(vocab: int) -> RobertaForMaskedLM:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return RobertaForMaskedLM(RobertaConfig(vocab_size=vocab, max_position_embeddings=40, type_vocab_size=1, **size))


def gpt2(vocab: int) -> GPT2LMHeadModel:
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **size))


HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "gpt2"])
def test_the_body_of_a_language_model_arrives(tmp_path, student_folder, request, kind):
    folder = student_folder
    if kind != "distilbert":
        folder = tmp_path / kind
        tokenizer = request.getfixturevalue("tokenizer" if kind == "bert" else f"{kind}_tokenizer")
        if kind == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=40)
            )
        else:
            model = (bert if kind == "bert" else roberta)(len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, tokenizer = load_model(str(folder), TASKS["rte"], 32, "--model")
        heads.append(next(p for name, p in model.named_parameters() if name.endswith(HEADS)))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    source = {"distilbert": DistilBertForMaskedLM, "gpt2": GPT2LMHeadModel, "roberta": RobertaForMaskedLM}.get(kind)
    source = source.from_pretrained(folder) if source else bert(len(tokenizer))
    body = dict(source.base_model.named_parameters())
    assert len(body) > 10
    for name, parameter in model.base_model.named_parameters():
        assert "pooler" in name or torch.equal(parameter, body[name]), name

    rows = datasets.Dataset.from_list([{"sentence1": "the cat", "sentence2": "a big red house", "label": 1}] * 2)
    [row, _] = tokenized(TASKS["rte"], rows, tokenizer, 32)
    assert row["labels"] == 1
    assert row["length"] == len(row["input_ids"])
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    separator = tokenizer.sep_token or tokenizer.eos_token
    assert separator in text[text.index("cat") : text.index("house")]


def test_padding_changes_nothing_in_gpt2(tmp_path, gpt2_tokenizer):
    """Its classifier reads the last token, and its tokenizer has no padding."""
    torch.manual_seed(0)
    gpt2(len(gpt2_tokenizer)).save_pretrained(tmp_path)
    gpt2_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), TASKS["sst2"], 32, "--model")
    texts = ["the cat sees a dog", "red house near the river and under it the old bird"]
    both = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    assert (both[0] - both[1]).abs().max() > 0.1
    torch.testing.assert_close(both, torch.cat(alone))
    with pytest.raises(UsageError, match="squad needs a model that reads in both directions, not gpt2"):
        load_model(str(tmp_path), TASKS["squad"], 32, "--model")


def test_models_that_are_refused(tmp_path, student_folder, teacher_folder):
    with pytest.raises(UsageError, match="it is not fine-tuned on sst2: no "):
        load_model(str(teacher_folder), TASKS["sst2"], 32, "--teacher")
    with pytest.raises(UsageError, match="--max_length 65 exceeds its 64 positions"):
        load_model(str(student_folder), TASKS["sst2"], 65, "--model")
    for task, least in (("sst2", 3), ("rte", 5)):  # [CLS], [SEP] and once more [SEP]
        with pytest.raises(
            UsageError, match=f"--max_length {least - 1} leaves a text without a token: it must be {least}"
        ):
            load_model(str(student_folder), TASKS[task], least - 1, "--model")
        load_model(str(student_folder), TASKS[task], least, "--model")
    with pytest.raises(UsageError, match=r"^--model .*nowhere: no such folder$"):
        load_model(str(tmp_path / "nowhere"), TASKS["sst2"], 32, "--model")
    config = json.loads((student_folder / "config.json").read_text())
    (student_folder / "config.json").write_text(json.dumps({**config, "n_layers": 2}))
    with pytest.raises(UsageError, match=r"16 weights missing or of another size, ..distilbert.transformer.layer.1"):
        load_model(str(student_folder), TASKS["sst2"], 32, "--model")


# ---- runs


def test_a_run_learns_is_kept_and_teaches(tmp_path, glue, student_folder, teacher_folder):
    """A teacher learns the task; a student of it, shown no label, follows; finished folders are reused."""
    out = tmp_path / "out" / "teacher"
    taught = options(teacher_folder, glue, out, num_train_epochs=5)
    found = finetune(*taught)
    assert found == {"accuracy": curve(out, "accuracy")[-1]}
    assert len(curve(out, "accuracy")) == 5
    assert found["accuracy"] > 0.9
    assert str(tmp_path) not in (out / "run.json").read_text()
    assert json.loads((out / "eval_results.json").read_text()) == found

    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    texts, labels = zip(*labelled(40, 40), strict=True)
    right = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits.argmax(-1) == torch.tensor(labels)
    assert right.double().mean() == pytest.approx(found["accuracy"])

    before = (out / "model.safetensors").stat().st_mtime_ns
    assert finetune(*taught) == found
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"holds a run with learning_rate 0.01, not 0.02"):
        finetune(*options(teacher_folder, glue, out, num_train_epochs=5, learning_rate=0.02))
    with pytest.raises(UsageError, match="holds something else"):
        finetune(*options(teacher_folder, glue, student_folder))

    for split in ("train", "dev"):  # half of the labels wrong: what is learnt is the teacher's
        rows = [f"{text}\t{i % 2 if split == 'train' else label}" for i, (text, label) in enumerate(labelled(96, 96))]
        with gzip.open(glue / "SST-2" / f"{split}.tsv.gz", "wt") as file:
            file.write("\n".join(["sentence\tlabel", *rows]) + "\n")
    follow = {"teacher": str(out), "alpha_kd": 1.0, "alpha_hard": 0.0, "num_train_epochs": 4}
    assert finetune(*options(student_folder, glue, tmp_path / "out" / "student", **follow))["accuracy"] > 0.85


def test_a_score_is_learnt_and_examples_are_limited(tmp_path, glue, student_folder):
    """In a folder where nothing is kept of a first command, which diverged."""
    diverging = options(student_folder, glue, tmp_path / "out", task="stsb", learning_rate=1e30, max_train_examples=24)
    with pytest.raises(UsageError, match=r"not numbers|try a lower learning rate"):
        finetune(*diverging)
    more = {"num_train_epochs": 6, "max_train_examples": 80, "train_sampling_strategy": "group_by_length"}
    found = finetune(*options(student_folder, glue, tmp_path / "out", task="stsb", **more))
    assert found.keys() == {"pearson", "spearman"}
    assert max(curve(tmp_path / "out", "pearson")) > 0.6
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 60  # 80 examples in batches of 8


def test_what_is_saved_is_what_is_scored(tmp_path, glue, student_folder):
    """Whenever it was evaluated on the way: never, before the last step, or when it was better."""
    ways = {
        "never": {"eval_strategy": "no", "save_strategy": "no", "max_steps": 2},
        "before": {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, "learning_rate": 0.1},
        "better": {"load_best_model_at_end": True, "num_train_epochs": 3, "learning_rate": 0.1},
    }
    for name, way in ways.items():
        out = tmp_path / name
        found = finetune(*options(student_folder, glue, out, task="stsb", **way))
        again = options(out, glue, tmp_path / f"{name} again", task="stsb", learning_rate=1e-30, max_steps=1)
        assert finetune(*again) == pytest.approx(found)


def test_other_inputs_of_the_same_name(tmp_path, glue, student_folder):
    """A model in another folder, and other rows in the same files."""
    run = options(student_folder, glue, tmp_path / "out", task="rte", max_steps=1)
    found = finetune(*run)
    other = tmp_path / "elsewhere" / student_folder.name
    shutil.copytree(student_folder, other)
    assert finetune(*options(other, glue, tmp_path / "out", task="rte", max_steps=1)) == found
    model = DistilBertForMaskedLM.from_pretrained(other)
    torch.nn.init.zeros_(model.distilbert.embeddings.word_embeddings.weight)
    model.save_pretrained(other)
    with pytest.raises(UsageError, match="holds a run with model_sha256 "):
        finetune(*options(other, glue, tmp_path / "out", task="rte", max_steps=1))
    file = glue / "RTE" / "dev.tsv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UsageError, match="holds a run with data_sha256 "):
        finetune(*run)


def test_an_interrupted_run_goes_on(tmp_path, glue, student_folder, monkeypatch):
    """SIGTERM in the second epoch: a clear end, and after it the same run."""
    run = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    finetune(*options(student_folder, glue, tmp_path / "whole", **run))

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", kill)
        with pytest.raises(Stopped, match="SIGTERM ended the training after step 10"):
            finetune(*options(student_folder, glue, tmp_path / "out", **run))
    assert last_checkpoint(tmp_path / "out")
    finetune(*options(student_folder, glue, tmp_path / "out", resume_from_checkpoint=True, **run))
    for name in ("loss", "accuracy"):
        assert curve(tmp_path / "out", name) == curve(tmp_path / "whole", name)


def test_what_is_refused(tmp_path, glue, student_folder, teacher_folder):
    wrong = {
        "--model is missing": {"model": ""},
        "--num_train_epochs must be positive": {"num_train_epochs": 0},
        "--divergence logit_mse needs --temperature 1": {"divergence": "logit_mse"},
        "--label_smoothing_factor must be 0, not 0.3": {"label_smoothing_factor": 0.3},
        "both 0": {"teacher": "x", "alpha_kd": 0.0, "alpha_hard": 0.0},
        "it is not fine-tuned": {"teacher": str(teacher_folder)},
        "no such file": {"glue_dir": str(tmp_path)},
    }
    for message, changes in wrong.items():
        own, arguments = options(student_folder, glue, tmp_path / "out")
        for name, value in changes.items():
            setattr(own if hasattr(own, name) else arguments, name, value)
        with pytest.raises(UsageError, match=message):
            finetune(own, arguments)
    assert not (tmp_path / "out").exists()
    few = {"dataloader_drop_last": True, "max_train_examples": 5, "max_steps": 1}
    with pytest.raises(
        UsageError, match=r"^--dataloader_drop_last must be false, not true: 5 examples fill no batch of 8$"
    ):
        finetune(*options(student_folder, glue, tmp_path / "few", **few))


def test_the_command(tmp_path, glue, student_folder, capsys):
    arguments = ["--model", str(student_folder), "--glue_dir", str(glue), "--max_length", "32", "--report_to", "none"]
    arguments += ["--num_train_epochs", "1", "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--task", "nothing"]) == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "sst2: accuracy 0." in capsys.readouterr().out


@pytest.mark.skipif("FUSEDKD_GLUE_DIR" not in os.environ, reason="FUSEDKD_GLUE_DIR names no folder of GLUE's files")
def test_the_files_of_glue_have_their_official_sizes():
    sizes = {"sst2": (67349, 872), "cola": (8551, 1043), "rte": (2490, 277), "stsb": (5749, 1500)}
    for name, expected in sizes.items():
        parts = read(TASKS[name], None, os.environ["FUSEDKD_GLUE_DIR"], [])
        assert tuple(map(len, parts)) == expected
        for part in parts:
            assert all(all(part[column]) for column in TASKS[name].texts)
            labels = np.array(part["label"])
            assert labels.min() == 0
            assert labels.max() == (len(TASKS[name].labels) - 1 if TASKS[name].labels else 5)
