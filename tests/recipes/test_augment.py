"""Further texts by a masked language model: what is replaced, by what, and what the run then has."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from tiny_run import tiny_run

from fusedkd.integrations.command import UsageError
from recipes.finetune.tasks import tokenized
from recipes.glue.augment import augmented, words_of
from recipes.glue.generator import made
from recipes.glue.method import parse_method

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_the_run_has_further_rows_without_a_label(tmp_path, tokenizer, task):
    run = tiny_run(tmp_path, tokenizer, task, labels=10)
    examples, rows = run.examples.to_list(), run.train.to_list()
    more = augmented(run, 2, pretraining=0)
    assert (run.examples.to_list(), len(run.train)) == (examples, 24)
    assert more.examples.to_list()[:24] == examples
    assert str(more.train.to_list()[:24]) == str(rows)  # NaN is not equal to itself
    assert more.train.features == run.train.features
    assert len(more.examples) == len(more.train) == 72
    assert (len(more.labelled), len(more.unlabelled), more.steps) == (10, 62, run.steps)
    assert more.train["index"][:] == [*range(72)]
    assert [*tokenized(run.task, more.examples, tokenizer, 32)["input_ids"]] == [*more.train["input_ids"]]
    replaced = total = 0
    for i, new in enumerate(more.examples.to_list()[24:]):
        old = examples[i // 2]
        for column in run.task.texts:
            words = new[column].split()
            assert len(words) == len(old[column].split())
            replaced += sum(a != b for a, b in zip(words, old[column].split(), strict=True))
            total += len(words)
    assert 0.25 < replaced / total < 0.45  # 0.4, and some are drawn as they were


def test_the_most_probable_word_of_each_place_alone(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer, "rte", count=8)
    more, model = augmented(run, 1, probability=1.0, candidates=1, pretraining=0), made(run, 0, 0.3).eval()
    for row, new in zip(run.train, more.examples.to_list()[8:], strict=True):
        expected = []
        for i, token in enumerate(row["input_ids"]):
            if token in tokenizer.all_special_ids:
                continue
            inputs = {name: torch.tensor([row[name]]) for name in COLUMNS}
            inputs["input_ids"][0, i] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(**inputs).logits[0, i]
            expected.append(int(logits[5:].argmax()) + 5)  # after the special tokens
        assert " ".join(new[name] for name in run.task.texts) == tokenizer.decode(expected)


def test_words_of_several_tokens_and_what_is_no_word_stay(tmp_path, roberta_tokenizer, tokenizer):
    run = tiny_run(tmp_path, tokenizer, "rte")
    texts = [("The dog, 3 cats", "xyz dog.")]
    words = words_of(run, texts)[0]
    assert [texts[0][w.text][w.start : w.end] for w in words] == ["The", "dog", "cats", "xyz", "dog"]  # as one token
    assert [w.token for w in words] == [1, 2, 5, 7, 8]
    run = replace(run, tokenizer=roberta_tokenizer)
    texts = [("a dog under cxz", "house")]
    pieces = roberta_tokenizer(*texts[0])
    first = [word for word, text in zip(pieces.word_ids(), pieces.sequence_ids(), strict=True) if text == 0]
    once = [word for i, word in enumerate(texts[0][0].split()) if first.count(i) == 1]
    assert 0 < len(once) < 4
    assert [texts[0][0][w.start : w.end] for w in words_of(run, texts)[0] if w.text == 0] == once


def test_seeds_draw_and_numbers_are_checked(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    one, same, other = (
        augmented(replace(run, arguments=replace(run.arguments, seed=seed)), 1, pretraining=0).examples
        for seed in (1, 1, 2)
    )
    assert one.to_list() == same.to_list() != other.to_list()
    for options in ({"times": 0}, {"times": 1, "candidates": 0}, {"times": 1, "probability": 0.0}):
        with pytest.raises(UsageError, match="the first two must be positive"):
            augmented(run, **options)


def test_every_method_takes_them(tmp_path, tokenizer, monkeypatch):
    run = tiny_run(tmp_path, tokenizer)
    with pytest.raises(UsageError, match="augment=N writes some"):
        parse_method("minimax_knn").check(run)
    made(run, 0, 0.3).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    chosen = parse_method(f"minimax_knn:neighbours=2,augment=1,generator={tmp_path / 'lm'}")
    assert chosen.options == {"neighbours": 2, "augment": 1, "generator": str(tmp_path / "lm")}
    chosen.check(run)
    seen = []
    monkeypatch.setattr(type(run), "fit", lambda self, model, *_, **__: seen.append(self) or model)
    chosen.train(run)
    assert (len(seen[0].unlabelled), len(seen[0].labelled)) == (24, 24)
    assert np.array_equal(seen[0].train["index"], np.arange(48))
