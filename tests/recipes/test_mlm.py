"""A masked-LM head for a body without one: what begins, what is trained, and who can load it."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from distilbert.conftest import bert
from transformers import AutoModelForMaskedLM, AutoTokenizer

from fusedkd.distilbert.student import load_teacher
from recipes.mlm import begin_as_unigrams, main


@pytest.fixture
def encoder(tmp_path, tokenizer):
    """A folder with a BERT's body alone; with dropout."""
    folder = tmp_path / "encoder"
    bert(len(tokenizer), dropout=0.1).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(encoder, text_files, folder, *more: str) -> list[str]:
    train, held_out = text_files
    given = ["--teacher", str(encoder), "--train_files", train, "--eval_files", held_out, "--output_dir", str(folder)]
    given += ["--max_steps", "30", "--eval_steps", "30", "--logging_steps", "30", "--block_size", "16"]
    return [*given, "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--report_to", "none", *more]


def test_a_body_gets_a_head(tmp_path, encoder, text_files, capsys):
    assert main(flags(encoder, text_files, tmp_path / "out")) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["after"] < found["before"] - 0.1
    assert f"held-out loss at 15% masked: {found['before']:.3f} -> {found['after']:.3f}" in capsys.readouterr().out
    folder = tmp_path / "out" / "model"
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.hidden_dropout_prob == 0.1
    assert "The body was trained before: name " in (folder / "README.md").read_text()
    teacher, tokenizer = load_teacher(str(folder), 16)  # as python -m fusedkd.distilbert does
    assert tokenizer.mask_token_id == AutoTokenizer.from_pretrained(encoder).mask_token_id
    head = teacher.cls.predictions
    assert all(p.std() > 0 for p in (head.transform.dense.weight, head.bias))
    layers = [m.base_model.encoder.layer[0] for m in (AutoModelForMaskedLM.from_pretrained(encoder), teacher)]
    assert not torch.equal(*(layer.output.dense.weight for layer in layers))
    assert main(flags(encoder, text_files, tmp_path / "out")) == 0  # finds it finished
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == found
    assert main(flags(encoder, text_files, tmp_path / "out", "--mlm_probability", "0.3")) == 2
    assert "holds a run with mlm_probability 0.15, not 0.3" in capsys.readouterr().err


def test_a_new_head_begins_as_a_unigram_model():
    model, counts = bert(4), np.array([6, 0, 1, 3])
    begin_as_unigrams(model, counts)
    found = model.get_output_embeddings().bias.softmax(0)
    assert found.tolist() == pytest.approx([6 / 10.5, 0.5 / 10.5, 1 / 10.5, 3 / 10.5])
    assert model.cls.predictions.bias is model.get_output_embeddings().bias


def test_what_it_refuses(tmp_path, encoder, text_files, capsys):
    for option, sentence in {
        ("--block_size", "200"): "--block_size 200 exceeds the teacher's 64 positions",
        ("--mlm_probability", "1"): "--mlm_probability must lie between 0 and 1, not 1.0",
    }.items():
        assert main(flags(encoder, text_files, tmp_path / "out", *option)) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
