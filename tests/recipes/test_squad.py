"""SQuAD: windows of tokens and back to answers, scores, and a run that learns."""

# ruff: noqa: E402 (imports after importorskip)

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from distilbert.conftest import sentences
from transformers import AutoModelForQuestionAnswering

from fusedkd.integrations.command import UsageError
from recipes.finetune import squad
from recipes.finetune.__main__ import GlueArguments, GlueOptions, finetune
from recipes.finetune.tasks import TASKS, read


def squad_json(file: Path, count: int, seed: int) -> str:
    """Two questions per context, in SQuAD's format: which words follow "cat", and which "dog"."""
    articles = []
    draw = np.random.default_rng(seed)
    for i, text in enumerate(sentences(count, seed)):
        words = text.replace("cat", "bird").replace("dog", "house").split()
        places = sorted(draw.choice(len(words) + 1, 2, replace=False))
        asked = ["cat", "dog"] if i % 2 else ["dog", "cat"]
        for word, place in zip(asked[::-1], places[::-1], strict=True):
            words[place:place] = [word, "red", "river"] if word == "cat" else [word, "old"]
        context = " ".join(words)
        questions = []
        for word, answer in (("cat", "red river"), ("dog", "old")):
            begin = context.index(f"{word} {answer}") + 4
            given = [{"text": answer, "answer_start": begin}]
            questions.append({"id": f"{i}{word}", "question": f" {word}", "answers": given})
        articles.append({"title": f"{i}", "paragraphs": [{"context": context, "qas": questions}]})
    file.write_text(json.dumps({"version": "1.1", "data": articles}))
    return str(file)


@pytest.fixture
def files(tmp_path) -> list[str]:
    return [squad_json(tmp_path / "train.json", 64, 1), squad_json(tmp_path / "dev.json", 12, 2)]


def test_a_file_and_the_form_of_the_hub_are_one(tmp_path, files):
    _, from_file = read(TASKS["squad"], None, None, files)
    assert len(from_file) == 24
    assert from_file[1]["question"] == " dog"
    hub = tmp_path / "hub"
    hub.mkdir()
    for split in ("train", "validation"):
        from_file.add_column("title", ["t"] * 24).to_parquet(hub / f"{split}-0000.parquet")
    _, from_hub = read(TASKS["squad"], str(hub), None, [])
    for column in ("id", "question", "context", "answers"):
        assert from_hub[column][:] == from_file[column][:]
    with pytest.raises(UsageError, match="squad_files are two"):
        read(TASKS["squad"], None, None, files[:1])
    (tmp_path / "other.json").write_text('{"data": [{"a": 1}]}')
    with pytest.raises(UsageError, match="its articles have no paragraphs"):
        read(TASKS["squad"], None, None, [str(tmp_path / "other.json")] * 2)


@pytest.mark.parametrize("kind", ["tokenizer", "roberta_tokenizer"])
def test_windows_hold_the_answers_and_give_them_back(request, kind):
    tokenizer = request.getfixturevalue(kind)
    words = " ".join(sentences(18, 5)).split()  # 162 words, three windows
    context = " ".join(words)
    rows = []
    for i in (0, 7, 30, 71, 90, 159):
        begin, text = len(" ".join(words[:i])) + (i > 0), " ".join(words[i : i + 3])
        answers = {"text": [text], "answer_start": [begin]}
        rows.append({"id": str(i), "question": "a cat", "context": context, "answers": answers})
    rows = datasets.Dataset.from_list(rows)
    found = squad.windows(rows, tokenizer, 80, 8)
    assert len(found) > 2 * len(rows)
    assert max(found["length"]) == 80
    held, start, end = set(), *np.full((2, len(found), 80), -5.0)
    for i, window in enumerate(found):
        (first, last), example = window["labels"], rows[window["example"]]
        if first == last == window["input_ids"].index(tokenizer.cls_token_id):
            start[i, 0] = end[i, 0] = 50.0  # "not here"; counts for nothing: it is no token of the context
            continue
        held.add(window["example"])
        assert tokenizer.decode(window["input_ids"][first : last + 1]).strip() == example["answers"]["text"][0]
        start[i, first], end[i, last] = 2.0, 3.0
        end[i, first - 1] = 9.0  # before the start
        if last + squad.ANSWER_TOKENS < 70:
            end[i, first + squad.ANSWER_TOKENS] = 9.0  # too long
    assert held == set(range(len(rows)))
    best = squad.answers(start, end, found, rows)
    assert [text.strip() for text in best] == [answers["text"][0] for answers in rows["answers"]]
    assert squad.score([text.strip() for text in best], rows) == {"f1": 1.0, "exact_match": 1.0}
    with pytest.raises(UsageError, match="--doc_stride must be smaller"):
        squad.windows(rows, tokenizer, 80, 13)


def test_scores_by_hand():
    """Right but for an article and a capital; two of three words, so F1 = 0.8; wrong; the second of two answers."""
    given = [["red river"], ["big red"], ["old"], ["house", "red house"]]
    rows = [{"id": str(i), "answers": {"text": text, "answer_start": [0] * len(text)}} for i, text in enumerate(given)]
    found = squad.score(["the Red river.", "big red dog", "dog", "red house"], datasets.Dataset.from_list(rows))
    assert found == {"f1": pytest.approx((1 + 0.8 + 0 + 1) / 4), "exact_match": pytest.approx(2 / 4)}


def test_answers_of_articles_alone_have_no_f1():
    """As SQuAD's own script counts: nothing is left to agree on, but the two are the same."""
    empty = datasets.Dataset.from_list([{"id": "0", "answers": {"text": ["The"], "answer_start": [0]}}])
    for text, exact in (("", 1.0), ("a", 1.0), ("An, the.", 1.0), ("cat", 0.0)):
        assert squad.score([text], empty) == {"f1": 0.0, "exact_match": exact}
    given = datasets.Dataset.from_list(
        [{"id": "0", "answers": {"text": ["the the-a cat’s  CAT"], "answer_start": [0]}}]
    )
    # left of it: thea cat’s cat; of the other: cat cat
    assert squad.score(["Cat cat!"], given) == {"f1": pytest.approx(2 * 1 / 5), "exact_match": 0.0}


def test_spans():
    offsets = [[0, 3], [4, 7], [7, 9], [10, 12]]
    assert squad.token_span(offsets, 4, 9) == (1, 2)
    assert squad.token_span(offsets, 5, 8) == (1, 2)  # inside of tokens
    assert squad.token_span(offsets, 0, 12) == (0, 3)
    assert squad.token_span(offsets[1:], 0, 7) is None
    assert squad.token_span(offsets, 10, 13) is None
    assert squad.token_span([], 0, 1) is None


def test_questions_without_answers_are_refused(tokenizer):
    rows = [{"id": "0", "question": "a", "context": "the cat", "answers": {"text": [], "answer_start": []}}]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "question", "context")}
        | {"answers": {"text": [datasets.Value("string")], "answer_start": [datasets.Value("int64")]}}
    )
    with pytest.raises(UsageError, match=r"^question 0 has no answer: the task is SQuAD 1\.1, not 2\.0"):
        squad.windows(datasets.Dataset.from_list(rows, features=features), tokenizer, 90, 8)


def test_a_run_learns(tmp_path, files, teacher_folder, monkeypatch):
    monkeypatch.setattr(squad, "QUESTION_TOKENS", 16)  # room that is kept for them: the model has 64 positions
    options = GlueOptions(task="squad", model=str(teacher_folder), squad_files=files, max_length=64, doc_stride=8)
    arguments = GlueArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=8,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        report_to="none",
    )
    found = finetune(options, arguments)
    assert found.keys() == {"f1", "exact_match"}
    assert found["exact_match"] > 0.8
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model.qa_outputs.weight).all()
