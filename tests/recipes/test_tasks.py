"""The tasks of GLUE: reading their files, and scores."""

# ruff: noqa: E402 (imports after importorskip)

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from glue_files import labelled

from fusedkd.integrations.command import UsageError
from recipes.finetune.tasks import TASKS, read, score

# ---- reading


def test_files_of_glue(glue):
    cola = read(TASKS["cola"], None, str(glue), [])
    assert [len(part) for part in cola] == [96, 40]
    assert cola[0][1] == {"label": 0, "sentence": '"the cat sees'}  # no header, quotation marks are text
    assert cola[0][2]["sentence"] == "null"
    rte, _ = read(TASKS["rte"], None, str(glue), [])
    first, label = labelled(96, 96)[0]
    assert rte[0] == {"sentence1": first, "sentence2": first[:9], "label": label}
    stsb, _ = read(TASKS["stsb"], None, str(glue), [])
    assert stsb["label"][:5] == [4.5 * label for _, label in labelled(96, 96)[:5]]
    with pytest.raises(UsageError, match=r"no such file: .*MRPC/train.tsv"):
        read(TASKS["mrpc"], None, str(glue), [])
    (glue / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    with pytest.raises(
        UsageError, match=r"dev\.tsv, row 0: the label is not one of entailment, not_entailment: 'maybe'"
    ):
        read(TASKS["rte"], None, str(glue), [])
    (glue / "RTE" / "dev.tsv").write_text("index\tsentence1\tlabel\n0\ta\t1\n")
    with pytest.raises(UsageError, match=r"dev\.tsv is not of the form of rte: it has no column sentence2"):
        read(TASKS["rte"], None, str(glue), [])
    (glue / "STS-B" / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t2.5\na\tb\tnan\n")
    with pytest.raises(UsageError, match=r"dev\.tsv, row 1: the label is not a number that float32 holds: 'nan'"):
        read(TASKS["stsb"], None, str(glue), [])
    (glue / "SST-2" / "dev.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(UsageError, match=r"cannot read .*dev\.tsv: 'utf-8' codec"):
        read(TASKS["sst2"], None, str(glue), [])


HEAD = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


def qqp(folder: Path, lines: str) -> list[dict]:
    """The training examples of a file with these lines."""
    (folder / "QQP").mkdir(exist_ok=True)
    for split, text in (("train", lines), ("dev", "9\t8\t7\ta\tb\t1\n")):
        (folder / "QQP" / f"{split}.tsv").write_text(f"\ufeff{HEAD}{text}", newline="")
    return list(read(TASKS["qqp"], None, str(folder), [])[0])


def test_ends_of_lines_and_pieces_of_records(tmp_path):
    """Windows' ends of lines; as in GLUE's own file a question with line breaks, whose pieces are left out."""
    lines = '1\t2\t3\tWhat?\tWhy?\t0\r\n4\t5\t6\t"Who\n\nwas\r he?\n"\tWho\t1\n7\t8\t9\tHow?\tSo\r?\t1\n'
    with pytest.warns(UserWarning, match=r"train\.tsv: 3 of its lines lack a text or a label and are left out"):
        assert qqp(tmp_path, lines) == [
            {"question1": "What?", "question2": "Why?", "label": 0},
            {"question1": "How?", "question2": "So\r?", "label": 1},
        ]
    with pytest.raises(UsageError, match=r"cannot read .*train\.tsv: .*Expected 6 fields in line 3, saw 7"):
        qqp(tmp_path, "1\t2\t3\ta\tb\t0\n1\t2\t3\ta\tb\tc\t0\n")


def hub_folder(folder: Path, configs: dict[str, dict[str, list[dict]]]) -> str:
    """A data set in the hub's form: parquet files, and a README that names the configurations."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            (folder / config).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


def test_a_data_set_in_the_form_of_the_hub(tmp_path):
    rows = [{"sentence": text, "label": label, "idx": i} for i, (text, label) in enumerate(labelled(9, 0))]
    other = [{"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": 0}]
    configs = {
        "sst2": {"train": rows, "validation": rows[:4], "test": [{**rows[0], "label": -1}]},
        "stsb": {"train": other},
    }
    folder = hub_folder(tmp_path / "hub", configs)
    train, held_out = read(TASKS["sst2"], folder, None, [])
    assert train["sentence"][:] == [row["sentence"] for row in rows]
    assert held_out["label"][:] == [row["label"] for row in rows[:4]]
    with pytest.raises(UsageError, match=r"no split validation \(it has train\)"):
        read(TASKS["stsb"], folder, None, [])
    with pytest.raises(UsageError, match="cannot read"):
        read(TASKS["cola"], folder, None, [])
    folder = hub_folder(tmp_path / "bad", {"sst2": {"train": rows, "validation": [{**rows[0], "label": -1}]}})
    with pytest.raises(UsageError, match=r"bad, row 0: the label is not one of negative, positive: '-1'"):
        read(TASKS["sst2"], folder, None, [])


# ---- scores


def test_scores_by_hand():
    """The labels predicted are 1 1 0 1 0, those given 1 0 0 1 1: two true positives, one of each other kind."""
    logits = np.array([[0, 1], [0, 2], [3, 1], [-1, 0], [1, 0]], np.float32)
    labels = np.array([1, 0, 0, 1, 1])
    assert score(TASKS["sst2"], logits, labels) == {"accuracy": pytest.approx(3 / 5)}
    assert score(TASKS["cola"], logits, labels) == {"matthews": pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))}
    assert score(TASKS["mrpc"], logits, labels) == {"f1": pytest.approx(4 / 6), "accuracy": pytest.approx(3 / 5)}
    scores = score(TASKS["stsb"], np.array([1, 2, 4], np.float32), np.array([0, 5, 4], np.float32))
    # deviations from the means: −4/3, −1/3, 5/3 and −3, 2, 1; ranks 1 2 3 and 1 3 2
    assert scores["pearson"] == pytest.approx((4 - 2 / 3 + 5 / 3) / np.sqrt(42 / 9 * 14))
    assert scores["spearman"] == pytest.approx(0.5, abs=1e-6)
    three = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    assert score(TASKS["mnli"], three, np.array([0, 1, 2, 0])) == {"accuracy": pytest.approx(0.75)}


@pytest.mark.filterwarnings("error")
def test_constant_predictions_have_no_correlation():
    ones = np.ones(4, np.float32)
    assert score(TASKS["stsb"], ones, np.arange(4, dtype=np.float32)) == {"pearson": 0.0, "spearman": 0.0}
    for given in ([0, 1, 1, 0], [1] * 99 + [0], [0] * 99 + [1], [1] * 100, [0] * 100, [1] * 721 + [0] * 322):
        for answer in ([0.0, 1.0], [1.0, 0.0]):
            assert score(TASKS["cola"], np.tile(answer, (len(given), 1)), np.array(given)) == {"matthews": 0.0}
    for answer, f1, accuracy in (([0.0, 1.0], 2 * 99 / 199, 0.99), ([1.0, 0.0], 0.0, 0.01)):
        found = score(TASKS["mrpc"], np.tile(answer, (100, 1)), np.array([1] * 99 + [0]))
        assert found == {"f1": pytest.approx(f1), "accuracy": pytest.approx(accuracy)}


def test_matthews_is_that_of_the_table_of_two_classes():
    draw = np.random.default_rng(0)
    for share in (0.5, 0.9, 0.99):
        labels = (draw.random(300) < share).astype(np.int64)
        logits = draw.standard_normal((300, 2)) + 0.7 * np.eye(2)[labels]
        said = logits.argmax(-1)
        tp, tn, fp, fn = (int(((said == a) & (labels == b)).sum()) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
        known = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert score(TASKS["cola"], logits, labels)["matthews"] == pytest.approx(known, abs=1e-12)
