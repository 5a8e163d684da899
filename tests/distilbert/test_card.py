"""What a model card says, and that it says nothing about the machine it was written on."""

import re

import pytest

from .conftest import bert

pytest.importorskip("transformers")

from huggingface_hub import ModelCard
from transformers import AutoModel, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fusedkd.distilbert.card import write_card
from fusedkd.distilbert.student import student_from_teacher


@pytest.fixture
def student_folder(tmp_path, tokenizer):
    student_from_teacher(bert(len(tokenizer), 4)).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def distilled(tmp_path) -> dict:
    text = tmp_path / "novels.txt"
    text.write_text("It was a dark and stormy night.\n")
    return {
        "parameters": 66_362_880,
        "teacher": "google-bert/bert-base-uncased",
        "teacher_parameters": 109_482_240,
        "init": "teacher",
        "layers": [0, 3],
        "language": "en",
        "data": [str(text), "Salesforce/wikitext"],
        "loss": {"temperature": 2.0, "alpha_distil": 5.0, "alpha_mse": None},
        "training": {"steps": 12000, "learning rate": 5e-4, "bf16": True, "resumed from": str(tmp_path / "at-1")},
        "metrics": {"cross-entropy": 2.34567, "KL to teacher": 0.1},
        "teacher_metrics": {"cross-entropy": 2.1},
        "evaluation": {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "validation"},
    }  # fmt: skip


def test_the_card_of_a_distilled_student(student_folder, tmp_path):
    card = ModelCard.load(write_card(student_folder, distilled(tmp_path)))
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "fill-mask", "en")
    assert data.base_model == ["google-bert/bert-base-uncased"]
    assert data.datasets == ["Salesforce/wikitext"]  # the file is no data set of the hub
    assert {"distilbert", "knowledge-distillation"} <= set(data.tags)
    first, second = data.eval_results
    assert (first.metric_type, first.metric_value, second.metric_value) == ("cross-entropy", 2.34567, 0.1)
    assert (first.dataset_type, first.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert data.model_name == "student"
    for said in (
        "# student", "DistilBertForMaskedLM of 2 layers and 66,362,880 parameters", "layers 0, 3 of the teacher",
        "Distilled from google-bert/bert-base-uncased (109,482,240 parameters)", "- novels.txt\n- Salesforce/wikitext",
        "- alpha_distil: 5\n", "- steps: 12,000\n", "- learning rate: 0.0005\n", "- bf16: yes\n",
        "- resumed from: at-1\n", "| cross-entropy | 2.346 | 2.1 |", "| KL to teacher | 0.1 |  |",
        "On Salesforce/wikitext, wikitext-2-raw-v1, validation.", "transformers 5", "torch 2",
    ):  # fmt: skip
        assert said in card.text, said
    assert "alpha_mse" not in card.text
    assert "Fine-tuned" not in card.text


def test_no_path_of_the_machine(student_folder, tmp_path, monkeypatch):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    facts = distilled(tmp_path) | {
        "teacher": str(student_folder),
        "evaluation": {"dataset": str(tmp_path / "novels.txt")},
    }
    for relative in ("runs/teacher", str(tmp_path / "runs" / "teacher")):  # the former looks like a name on the hub
        card = ModelCard.load(write_card(student_folder, facts | {"teacher": relative, "name": relative}))
        assert str(tmp_path) not in str(card)
        assert "runs/teacher" not in str(card)
        assert card.data.base_model is None
        assert "Distilled from teacher" in card.text
    assert card.data.eval_results[0].dataset_type == "text"
    assert card.data.eval_results[0].dataset_name == "novels.txt"


def test_what_is_not_known_is_not_said(student_folder):
    card = ModelCard.load(write_card(student_folder, {"init": "random"}))
    assert "random weights" in card.text
    assert re.findall(r"^## (.*)$", card.text, re.M) == ["Use", "Versions"]
    assert card.data.eval_results is None
    assert card.data.base_model is None
    assert card.data.datasets is None


def test_the_lines_that_load_the_model_load_it(student_folder, monkeypatch):
    code = re.search(r"```python\n(.*?)\n```", write_card(student_folder, {}).read_text(), re.S)[1]
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(student_folder.parent)
    found: dict = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "DistilBertForMaskedLM"
    assert len(found["tokenizer"]) == found["model"].config.vocab_size


def test_the_card_of_a_fine_tuned_model(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "sst2")
    facts = {
        "base_model": "distilbert/distilbert-base-uncased",
        "teacher": "someone/bert-sst2",
        "task": "sst2",
        "metrics": {"accuracy": 0.913},
        "evaluation": {"dataset": "nyu-mll/glue", "config": "sst2", "split": "validation"},
    }
    card = ModelCard.load(write_card(tmp_path / "sst2", facts))
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.base_model == ["distilbert/distilbert-base-uncased"]
    assert "Fine-tuned from distilbert/distilbert-base-uncased on sst2." in card.text
    assert "Distilled from someone/bert-sst2" in card.text
    assert "| accuracy | 0.913 |" in card.text
    assert "teacher |" not in card.text
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    assert card.data.eval_results[0].dataset_name == "nyu-mll/glue sst2"


def test_gpt2_generates_and_other_models_have_no_card(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    card = ModelCard.load(write_card(tmp_path / "gpt2", {}))
    assert card.data.pipeline_tag == "text-generation"
    assert "AutoModelForCausalLM" in card.text
    with pytest.raises(ValueError, match="no facts named epochs, weights"):
        write_card(tmp_path / "gpt2", {"weights": 1, "epochs": 3, "name": "x"})
    AutoModel.from_pretrained(tmp_path / "gpt2").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no model card for a GPT2Model"):
        write_card(tmp_path / "bare", {})
