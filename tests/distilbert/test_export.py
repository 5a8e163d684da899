"""What the driver exports is used as its card says, in the transformers at hand and the oldest that the card names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    pipeline,
)

from fusedkd.distilbert.__main__ import main
from fusedkd.distilbert.distil import OLDEST_TRANSFORMERS
from fusedkd.distilbert.student import tokenizer_for

from .conftest import WORDS, bert

IDS = [[5, 7, 9, 11, 6, 7]]


@pytest.fixture
def distil(tmp_path, text_files):
    """Distils the teacher of a folder for two steps; the student's folder."""

    def run(teacher: Path) -> Path:
        arguments = ["--train_files", text_files[0], "--eval_files", text_files[1], "--teacher", str(teacher)]
        arguments += ["--max_steps", "2", "--block_size", "16", "--report_to", "none", "--eval_blocks", "4"]
        out = tmp_path / f"{teacher.name}-distilled"
        assert main([*arguments, "--output_dir", str(out)]) == 0
        return out / "student"

    return run


def said(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def student(distil, tmp_path, tokenizer) -> Path:
    """Of a BERT with dropout that is saved in bfloat16."""
    bert(len(tokenizer), dropout=0.1).bfloat16().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return distil(tmp_path / "bert")


@pytest.fixture
def generator(distil, tmp_path, gpt2_tokenizer) -> Path:
    """Of a GPT-2 that comes out of a Trainer, has settings of its own and a tokenizer of no named class."""
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    end = gpt2_tokenizer.eos_token_id
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=len(gpt2_tokenizer), bos_token_id=end, eos_token_id=end, **size))
    teacher.config.use_cache = teacher.generation_config.use_cache = False
    teacher.generation_config.repetition_penalty = 1.5
    teacher.save_pretrained(tmp_path / "gpt2")
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), gpt2_tokenizer.eos_token)
    unnamed = PreTrainedTokenizerFast(tokenizer_object=gpt2_tokenizer.backend_tokenizer, **ends)
    unnamed.save_pretrained(tmp_path / "gpt2")
    return distil(tmp_path / "gpt2")


def test_a_masked_student_is_used_as_its_card_says(student):
    config = said(student, "config")
    assert (config["dtype"], config["dropout"], config["attention_dropout"]) == ("float32", 0.1, 0.1)
    assert config["tie_word_embeddings"] is True
    written = said(student, "tokenizer_config")
    assert (written["tokenizer_class"], written["model_max_length"]) == ("DistilBertTokenizer", 64)
    assert f"transformers {OLDEST_TRANSFORMERS} or newer" in (student / "README.md").read_text()

    tokenizer, model = AutoTokenizer.from_pretrained(student), AutoModelForMaskedLM.from_pretrained(student)
    batch = tokenizer("the cat [MASK] the dog", return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert model(**batch).logits.shape == (1, 7, len(tokenizer))
    assert model.vocab_projector.weight is model.distilbert.embeddings.word_embeddings.weight
    fill = pipeline("fill-mask", model=str(student), tokenizer_kwargs={"truncation": True})
    for text in ("the cat [MASK] the dog", "the cat [MASK]" + " the dog" * 50):  # longer than the model takes
        assert fill(text)[0]["token_str"] in WORDS


def test_a_generating_student_uses_a_cache_and_its_teachers_settings(generator):
    assert said(generator, "config")["use_cache"] is True
    assert said(generator, "tokenizer_config")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said(generator, "generation_config").get("use_cache") in (None, True)
    tokenizer, model = AutoTokenizer.from_pretrained(generator), AutoModelForCausalLM.from_pretrained(generator)
    assert model.generation_config.repetition_penalty == 1.5
    assert model.lm_head.weight is model.transformer.wte.weight
    computed = []
    model.transformer.register_forward_pre_hook(
        lambda _, args, options: computed.append((args[0] if args else options["input_ids"]).shape[1]), with_kwargs=True
    )
    batch = tokenizer("the cat", return_tensors="pt")
    length = batch["input_ids"].shape[1]
    model.generate(**batch, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    assert sum(computed) == length + 39  # each position once


def test_the_tokenizer_of_another_model_stays_as_it_is(tokenizer):
    other = tokenizer_for(bert(30).config, tokenizer)
    assert type(other) is type(tokenizer)
    assert "token_type_ids" in other("the")  # BERT's
    assert tokenizer.model_max_length > 64 == other.model_max_length


OLD = """
import json, sys, torch
from transformers import __version__, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
*masked, causal = sys.argv[1:]
models = [AutoModelForMaskedLM.from_pretrained(folder) for folder in masked]
for folder, model in zip(masked, models):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"the cat {tokenizer.mask_token} the dog"
    model(**tokenizer(text, return_tensors="pt"))
    pipeline("fill-mask", model=folder)(text)
models.append(AutoModelForCausalLM.from_pretrained(causal))
pipeline("text-generation", model=causal)("the cat")
logits = [model.eval()(torch.tensor(IDS)).logits.tolist() for model in models]
print(json.dumps([__version__, models[-1].config.use_cache, models[-1].generation_config.repetition_penalty, logits]))
""".replace("IDS", str(IDS))


@pytest.mark.skipif("FUSEDKD_OLD_TRANSFORMERS" not in os.environ, reason="a folder with an older transformers")
def test_the_oldest_transformers_that_the_card_names(student, generator, distil, tmp_path, roberta_tokenizer):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    teacher = RobertaForMaskedLM(RobertaConfig(vocab_size=len(roberta_tokenizer), max_position_embeddings=64, **size))
    torch.nn.init.normal_(teacher.lm_head.bias)
    teacher.save_pretrained(tmp_path / "roberta")
    roberta_tokenizer.save_pretrained(tmp_path / "roberta")
    masked = [student, distil(tmp_path / "roberta")]
    path = os.pathsep.join([os.environ["FUSEDKD_OLD_TRANSFORMERS"], *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", OLD, *map(str, [*masked, generator])]
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    version, use_cache, penalty, logits = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith(OLDEST_TRANSFORMERS)
    assert (use_cache, penalty) == (True, 1.5)
    models = [*map(AutoModelForMaskedLM.from_pretrained, masked), AutoModelForCausalLM.from_pretrained(generator)]
    for model, known in zip(models, logits, strict=True):
        torch.testing.assert_close(model(torch.tensor(IDS)).logits, torch.tensor(known), rtol=1e-5, atol=1e-5)
