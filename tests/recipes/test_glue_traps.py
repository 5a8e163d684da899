"""`python -m recipes.glue` where it could be wrong in silence: order of classes, random numbers, what is kept."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from test_compare import compared, encoder, saved  # noqa: F401 (a fixture)
from tiny_run import classifier, decoder, tiny_run
from transformers import (
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

import recipes.glue.__main__
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.interrupt import Stopped
from fusedkd.integrations.students import student_of
from recipes.finetune.__main__ import load_model
from recipes.finetune.tasks import TASKS
from recipes.glue import compare
from recipes.glue.compare import fine_tuned
from recipes.glue.method import parse_method
from recipes.glue.run import Run
from recipes.glue.step import Step


@pytest.mark.parametrize("flag", ["--teacher", "--student", "--model"])
def test_a_models_classes_are_brought_into_the_order_of_the_tasks(tmp_path, tokenizer, flag):
    """MNLI's models have them in any order; the outputs of unnamed ones stay as they are."""
    names = ("CONTRADICTION", "Neutral", "entailment")
    model = classifier(len(tokenizer), labels=3).eval()
    ids = torch.arange(2, 9)[None]
    for own, order in ((names, [2, 1, 0]), (("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1, 2])):
        model.config.id2label = dict(enumerate(own))
        model.save_pretrained(tmp_path / own[0])
        tokenizer.save_pretrained(tmp_path / own[0])
        found, _ = load_model(str(tmp_path / own[0]), TASKS["mnli"], 16, flag)
        assert torch.allclose(found.eval()(input_ids=ids).logits, model(input_ids=ids).logits[:, order], atol=1e-5)
        assert found.config.id2label == dict(enumerate(TASKS["mnli"].labels))


def test_known_logits_of_the_teacher_change_no_random_number(tmp_path, tokenizer):
    """A student is the same whether or not another method has asked the teacher before."""
    run = tiny_run(tmp_path, tokenizer)
    first, again = (run.fit(run.student(), Step.soft).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_training_that_diverges_is_refused(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer, arguments={"learning_rate": 1e30})
    with pytest.raises(UsageError, match="training diverged"):
        run.fit(run.student(), Step.hard)
    with pytest.raises(UsageError, match="training diverged"):
        fine_tuned(run, tmp_path / "teacher", max_steps=2)
    assert not (tmp_path / "teacher").exists()


def test_no_examples_to_train_on_are_refused(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer, labels=12)
    with pytest.raises(UsageError, match="no examples to train on"):
        run.fit(run.student(), Step.hard, run.train.select([]))


def test_epochs_of_the_teacher_are_of_examples_with_a_label(tmp_path, tokenizer):
    """8 of 24 examples in batches of 8: an epoch is one step."""
    run = tiny_run(tmp_path, tokenizer, labels=8)
    fine_tuned(run, tmp_path / "teacher", max_steps=-1, num_train_epochs=2.0)
    assert run.logs[-1]["step"] == 2


def test_ctrl_c_leaves_no_checkpoint(tmp_path, tokenizer):
    """The same command would refuse to go on from it."""
    run = tiny_run(tmp_path, tokenizer)

    def loss(step):
        if step.number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step.hard()

    with pytest.raises(Stopped, match="SIGINT ended the training after step 2; there is no checkpoint"):
        run.fit(run.student(), loss)
    assert not [*tmp_path.glob("checkpoint-*")]


def test_what_a_students_numbers_depend_on_is_not_kept_in_silence(tmp_path, tokenizer, capsys):
    """Other contents of a file of the same name, another optimiser, fewer bits; a start that failed binds nothing."""
    teacher, runs = saved(tmp_path / "ready", tokenizer), tmp_path / "runs"
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text("words,kind\nthe cat,pet\nthe house,thing\nthe dog,pet\n")
    own = ["--data", *(str(tmp_path / name) for name in ("train.csv", "dev.csv")), "--text", "words"]
    own += ["--method", "ce"]
    assert compared(teacher, runs, *own, "--label", "kinds") == 2
    assert compared(teacher, runs, *own, "--label", "kind", "--width", "16") == 2
    assert compared(teacher, runs, *own, "--label", "kind") == 0
    own += ["--label", "kind"]
    assert compared(teacher, runs, *own, "--bf16", "true") == 2
    assert "holds a run with bf16 False, not True" in capsys.readouterr().err
    assert compared(teacher, runs, *own, "--max_grad_norm", "0.1") == 2
    (tmp_path / "train.csv").write_text("words,kind\nthe cat,thing\nthe house,pet\nthe dog,pet\n")
    assert compared(teacher, runs, *own) == 2
    assert "holds a run with data_sha256" in capsys.readouterr().err


def test_all_methods_are_those_that_fit(tmp_path, tokenizer, glue, capsys, monkeypatch):
    """Also where only the method itself finds that it does not fit."""
    few = [parse_method(name) for name in ("ce", "minimax_knn", "takd")]
    monkeypatch.setattr(recipes.glue.__main__, "chosen_methods", lambda texts: few if texts == ["all"] else few[2:])
    teacher = saved(tmp_path / "ready", tokenizer, layers=2)
    options = ["--glue_dir", str(glue), "--examples", "16", "--method", "all"]
    assert compared(teacher, tmp_path / "runs", *options) == 0
    text = capsys.readouterr().out
    assert "left out: --method minimax_knn needs examples without a label" in text
    assert "left out: takd, seed 1: takd: no depth lies between" in text
    assert [*json.loads((tmp_path / "runs" / "results.json").read_text())["students"]] == ["ce"]
    options[-1] = "takd"
    assert compared(teacher, tmp_path / "runs", *options) == 2


def test_what_fits_no_method_is_refused(tmp_path, tokenizer, glue, capsys, monkeypatch):
    """Before the teacher is fine-tuned, not after all methods have been left out for it."""
    monkeypatch.setattr(compare, "fine_tuned", lambda *given, **more: pytest.fail("the teacher was fine-tuned"))
    BertModel.from_pretrained(saved(tmp_path / "ready", tokenizer)).save_pretrained(tmp_path / "ready")
    options = ["--glue_dir", str(glue), "--examples", "16", "--method", "all"]
    assert compared(tmp_path / "ready", tmp_path / "runs", *options, "--layers", "9") == 2
    assert capsys.readouterr().err.startswith("error: --layers 9: must ascend within the teacher's layers, 0 to 3")


def test_nothing_is_reported_of_no_student(tmp_path, tokenizer, glue, capsys, monkeypatch):
    """As where every training diverges."""
    monkeypatch.setattr(recipes.glue.__main__, "chosen_methods", lambda texts: [parse_method("ce")])
    teacher = saved(tmp_path / "ready", tokenizer)
    options = ["--glue_dir", str(glue), "--examples", "16", "--method", "all", "--learning_rate", "1e30"]
    assert compared(teacher, tmp_path / "runs", *options) == 2
    output = capsys.readouterr()
    assert "left out: ce, seed 1: training diverged" in output.out
    assert output.err == "error: --method all: every method was left out, for the reasons above\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--student", "x", "--width", "16"], "--layers, --width and --init go without --student"),
        (["--label", "x"], "--text, --label and --score go with --data"),
        (["--label_smoothing_factor", "0.1"], "take --method label_smoothing"),
        (["--teacher_max_steps", "-5"], "--teacher_max_steps must not be negative, but is -5"),
        (["--teacher_epochs", "-1"], "--teacher_epochs must be positive and finite, but is -1"),
        (["--eval_strategy", "steps"], "leave out --eval_strategy"),
        (["--resume_from_checkpoint", "true"], "there are no checkpoints to go on from"),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path, capsys, options, sentence):
    assert compared(tmp_path, tmp_path / "runs", *options) == 2
    assert sentence in capsys.readouterr().err


def distilbert(vocab: int) -> DistilBertForSequenceClassification:
    torch.manual_seed(3)
    size = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=vocab, **size))


@pytest.mark.parametrize("name", ["kd", "pkd", "tinybert", "mobilebert", "early_exit:of=student", "freelb_kd", "rw_kd"])
def test_a_student_of_another_architecture(tmp_path, tokenizer, name):
    """DistilBERT has no token types and other names of layers; what the student was given as stays as it is."""
    given, chosen = distilbert(len(tokenizer)), parse_method(name)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    run = tiny_run(tmp_path, tokenizer, given=given, count=32)
    chosen.check(run)
    model = chosen.train(run)
    assert isinstance(model, DistilBertForSequenceClassification)
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())
    assert np.isfinite(run.logits(model).numpy()).all()


def test_a_student_has_the_kinds_of_its_layers():
    """Of models whose layers differ: full and sliding attention."""
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    tokens = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    source = ModernBertForSequenceClassification(ModernBertConfig(**size, **tokens, sep_token_id=2))
    kinds = source.config.layer_types
    assert student_of(source, [0, 3]).config.layer_types == [kinds[0], kinds[3]]


@pytest.mark.parametrize(
    ("method", "layers", "sentence"),
    [
        ("early_exit:of=student", 1, "early_exit:of=student: the student must have two layers or more, not 1"),
        (
            "rail_kd:variant=concatenated",
            5,
            "the student must not be deeper than its teacher, but has 5 layers and not 4",
        ),
    ],
)
def test_a_student_of_the_wrong_depth_is_not_trained(tmp_path, tokenizer, monkeypatch, method, layers, sentence):
    monkeypatch.setattr(Run, "fit", lambda *given, **more: pytest.fail("it was trained"))
    run = tiny_run(tmp_path, tokenizer, given=classifier(len(tokenizer), layers=layers))
    with pytest.raises(UsageError, match=sentence):
        parse_method(method).train(run)


@pytest.mark.parametrize("name", ["bilstm", "born_again_ensemble"])
def test_a_student_of_a_class_of_its_own_predicts(tmp_path, tokenizer, glue, name):
    """It is saved and found again with what its configuration has, which names no positions."""
    (glue / "SST-2" / "test.tsv").write_text("index\tsentence\n0\tcat sees\n1\tdog hears\n")
    teacher, folder = saved(tmp_path / "ready", tokenizer), tmp_path / "runs"
    options = ["--glue_dir", str(glue), "--examples", "16", "--predict", "true", "--method", name]
    assert compared(teacher, folder, *options) == 0
    assert len((folder / f"{name}-seed1" / "SST-2.tsv").read_text().splitlines()) == 3


@pytest.mark.parametrize("method", ["pkd", "alp_kd", "freelb", "adversarial", "early_exit", "mate_kd"])
def test_what_reads_the_first_token_refuses_decoders(tmp_path, tokenizer, gpt2_tokenizer, method):
    """Theirs sees itself alone, and from embeddings without their tokens they classify at the padding."""
    run = replace(tiny_run(tmp_path, tokenizer), tokenizer=gpt2_tokenizer, source=decoder(len(tokenizer)))
    with pytest.raises(UsageError, match=f"--method {method} needs models that read in both directions, not gpt2"):
        parse_method(method).check(run)
    parse_method("kd").check(run)
