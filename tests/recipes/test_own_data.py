"""Files of one's own: each cell is the text that stands there, each class has its number, and no line slips."""

import gzip
import json

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

import datasets

from fusedkd.integrations.command import UsageError
from recipes.glue import data
from recipes.glue.compare import partly_labelled


def read(folder, train, held_out, *, ending=".csv", texts=("text",), label="label", score=None):
    files = [folder / f"train{ending}", folder / f"dev{ending}"]
    for file, text in zip(files, (train, held_out), strict=True):
        file.write_text(text)
    return data.of_files([str(file) for file in files], texts, label, score)


def pairs(rows, task):
    return [(text, task.labels[i] if i >= 0 else "") for text, i in zip(rows["sentence1"], rows["label"], strict=True)]


def test_classes_that_are_numbers_keep_their_names(tmp_path):
    """Stars of 1 to 5 are not taken for the numbers 0 to 4 of classes; 10 comes behind 9."""
    for names in (["1", "2", "3", "4", "5"], ["1", "2"], ["-1", "1"], [str(i) for i in range(12)]):
        rows = "".join(f"text {name},{name}\n" for name in reversed(names))
        found = read(tmp_path, f"text,label\n{rows}", f"text,label\n{rows}")
        assert found.task.labels == tuple(names)
        assert pairs(found.train, found.task) == [(f"text {name}", name) for name in reversed(names)]


def test_a_missing_class_in_json_leaves_the_others_as_they_are(tmp_path):
    lines = [{"text": "a", "label": 1}, {"text": "b", "label": None}, {"text": "c"}, {"text": "12", "label": 2}]
    texts = ["".join(json.dumps(line) + "\n" for line in part) for part in (lines, [lines[0], lines[3]])]
    found = read(tmp_path, *texts, ending=".jsonl")
    assert found.task.labels == ("1", "2")
    assert pairs(found.train, found.task) == [("a", "1"), ("b", ""), ("c", ""), ("12", "2")]


def test_a_class_is_one_however_its_number_is_written(tmp_path):
    """pandas writes 1.0 where a column has empty cells, JSON where it was a float; names keep their points."""
    rows = [[("a", 0), ("b", 1)], [("a", 1.0), ("b", 0.0), ("c", 2.0)]]
    texts = ["".join(json.dumps({"text": text, "label": i}) + "\n" for text, i in part) for part in rows]
    with pytest.warns(UserWarning, match="has not: 2$"):
        found = read(tmp_path, *texts, ending=".jsonl")
    assert found.task.labels == ("0", "1", "2")
    assert pairs(found.held_out, found.task) == [("a", "1"), ("b", "0"), ("c", "2")]
    found = read(tmp_path, "text,label\na,1.0\nb,1.5\n", "text,label\na,1.0\n")
    assert found.task.labels == ("1.0", "1.5")


@pytest.mark.parametrize("cell", [["x"], {"x": 1}])
def test_cells_of_several_values_are_refused(tmp_path, cell):
    good = '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n'
    bad = good + json.dumps({"text": cell, "label": 1}) + "\n"
    kind = type(cell).__name__
    with pytest.raises(UsageError, match=rf"dev.jsonl, row 2: text must be a text or a number, not of the type {kind}"):
        read(tmp_path, good, bad, ending=".jsonl")
    (tmp_path / "more.jsonl").write_text(bad)
    with pytest.raises(UsageError, match=r"--unlabelled .*more.jsonl, row 2: text must be a text"):
        data.with_texts(read(tmp_path, good, good, ending=".jsonl"), str(tmp_path / "more.jsonl"), ["text"])


def test_a_file_without_texts_is_refused(tmp_path):
    good = "text,label\nx,a\ny,b\n"
    (tmp_path / "more.csv").write_text("text\n")
    with pytest.raises(UsageError, match=r"--unlabelled .*more.csv must have a text at least, but has none"):
        data.with_texts(read(tmp_path, good, good), str(tmp_path / "more.csv"), ["text"])


def test_a_score_beyond_float32_is_refused(tmp_path):
    bad = "text,score\na,1\nb,1e39\n"
    with pytest.raises(UsageError, match=r"row 1: the label is not a number that float32 holds: '1e39'"):
        read(tmp_path, bad, bad, label=None, score="score")


def test_cells_are_text(tmp_path):
    text = 'text,label\nnan,a\n"one, ""two""\nlines", b\n007,a \n,b\nNA,\n'
    found = read(tmp_path, text, "text,label\nx,a\ny,b\n")
    assert pairs(found.train, found.task) == [
        ("nan", "a"), ('one, "two"\nlines', "b"), ("007", "a"), ("", "b"), ("NA", ""),
    ]  # fmt: skip
    found = read(tmp_path, 'text\tlabel\n"half a quote\ta\r\nx,y\tb\n', "text\tlabel\nx\ta\n", ending=".tsv")
    assert pairs(found.train, found.task) == [('"half a quote', "a"), ("x,y", "b")]


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ("text,label\nhello, world,a\nbye, all,b\n", "train.csv: line 2 has 3 cells, but there are 2 columns"),
        ("text,label\nhello,a\nbye\n", "train.csv: line 3 has 1 cells, but there are 2 columns"),
        ("text,text,label\na,b,c\n", "two of its columns have one name"),
        ('text,label\n"hello,a\nbye,b\n', "train.csv: unexpected end of data"),
        ("", "train.csv: it is empty"),
    ],
)
def test_torn_files_are_refused(tmp_path, train, sentence):
    with pytest.raises(UsageError, match=sentence):
        read(tmp_path, train, "text,label\nx,a\ny,b\n")


def test_columns_that_do_not_fit_are_refused(tmp_path):
    good = "text,label\nx,a\ny,b\n"
    with pytest.raises(UsageError, match="--text and --label must be different columns"):
        read(tmp_path, good, good, texts=("label",))
    found = read(tmp_path, good, good)
    with pytest.raises(UsageError, match="--text must be 1 columns of --unlabelled, not 2"):
        data.with_texts(found, str(tmp_path / "dev.csv"), ["text", "label"])
    with pytest.warns(UserWarning, match=r"classes of .*dev.csv that .*train.csv has not: B$"):
        read(tmp_path, good, "text,label\nx,a\ny,B\n")


def test_further_texts_have_no_label(tmp_path):
    good = "text,label\nx,a\ny,b\n"
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write('{"text": "null"}\n{"text": null}\n')
    found = data.with_texts(read(tmp_path, good, good), str(tmp_path / "more.jsonl.gz"), ["text"])
    assert pairs(found.train, found.task) == [("x", "a"), ("y", "b"), ("null", ""), ("", "")]


def test_the_digest_is_of_texts_labels_and_classes(tmp_path):
    good = "text,label\nx,a\ny,b\nv,a\n"
    other = [good, good.replace("x,", "z,"), good.replace("x,a", "x,b"), good.replace(",a", ",c")]
    assert len({data.digest(read(tmp_path, text, text)) for text in (*other, good)}) == 4


def test_labels_are_kept_of_examples_that_have_one(tmp_path):
    rows = "text,label\n" + "x,a\n" * 3 + "y,\n" * 50 + "z,b\n" * 3
    found = read(tmp_path, rows, "text,label\nx,a\n")
    train = found.train.rename_column("label", "labels")
    assert (np.array(partly_labelled(train, 4, found.task)["labels"]) != -100).sum() == 4
    assert partly_labelled(train, 500, found.task)["labels"][:] == train["labels"][:]
    scores = datasets.Dataset.from_dict({"text": ["", "", ""], "labels": [1.0, float("nan"), 2.0]})
    kept = partly_labelled(scores, 1, data.TASKS["stsb"])["labels"][:]
    assert np.isnan(kept).sum() == 2
    assert np.isnan(kept[1])
