"""The data of a comparison: a task of GLUE, or files and data sets of one's own; and predictions for GLUE's server."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas
from torch import Tensor

from fusedkd.integrations.command import UsageError
from recipes.finetune import tasks
from recipes.finetune.tasks import TASKS, Task
from recipes.glue.step import IGNORE

READERS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".json": None}
"""What separates the columns of a file, by the end of its name before `.gz`."""
SUBMISSION = {"sst2": "SST-2", "cola": "CoLA", "rte": "RTE", "stsb": "STS-B", "mrpc": "MRPC", "qqp": "QQP"}
SUBMISSION |= {"qnli": "QNLI", "wnli": "WNLI"}
"""Names of the files that GLUE's server takes; MNLI has two."""
NAMED = frozenset(["rte", "qnli", "mnli"])
"""Tasks whose predictions are names of classes there."""


class Data(NamedTuple):
    """Texts and `label`, a number; −100, or NaN of a score, where an example has none."""

    task: Task
    train: datasets.Dataset
    held_out: datasets.Dataset
    others: dict[str, datasets.Dataset]
    """Further held-out examples, by the name that their scores end in: "mm" of MNLI."""


def of_glue(name: str, glue_dir: str | None) -> Data:
    """A task of GLUE, of the files of its download or of the hub."""
    task = TASKS[name]
    train, held_out = tasks.read(task, None, glue_dir, [])
    others = {}
    if name == "mnli":
        other = replace(task, held_out=("validation_mismatched", "dev_mismatched"))
        if glue_dir:
            others["mm"] = tasks.local(other, Path(glue_dir) / task.folder / other.held_out[1])
        else:
            others["mm"] = tasks.read(other, None, None, [])[1]
    return Data(task, train, held_out, others)


def of_files(sources: Sequence[str], texts: Sequence[str], label: str | None, score: str | None) -> Data:
    """A task of one's own: two files, or the name of a hub data set that has a held-out split.

    Args:
        sources: training and held-out examples, `.csv`, `.tsv` or `.jsonl`, also with `.gz`, with names of columns; or
            one name of a hub data set, whose splits are `train` and `validation` or `test`.
        texts: the columns of one or two texts.
        label: the column of classes, names or numbers. Training examples whose cell is empty have none.
        score: or that of a number.

    Raises:
        UsageError: naming the file and what is wrong with it.
    """
    if not 1 <= len(texts) <= 2:
        raise UsageError(f"--text must be the columns of one or two texts, not {len(texts)}")
    if (label is None) == (score is None):
        raise UsageError("--data needs one of --label, a column of classes, and --score, a column of numbers")
    target = str(label or score)
    if len(sources) == 2:
        names, parts = list(sources), [_frame(source) for source in sources]
    elif len(sources) == 1:
        splits = tasks.load(sources[0])
        held = next((name for name in ("validation", "test") if name in splits), None)
        if "train" not in splits or held is None:
            raise UsageError(f"--data {sources[0]} must have the splits train and validation or test")
        names, parts = [f"{sources[0]}:{split}" for split in ("train", held)], []
        for split in ("train", held):
            kind = splits[split].features.get(target)
            frame = splits[split].to_pandas()
            if isinstance(kind, datasets.ClassLabel) and target in frame:
                named = {i: name for i, name in enumerate(kind.names)} | {-1: ""}
                frame[target] = frame[target].map(named)
            parts.append(frame)
    else:
        raise UsageError(f"--data must be two files or one data set, not {len(sources)}")
    columns = dict(zip(texts, ("sentence1", "sentence2"), strict=False)) | {target: "label"}
    for name, part in zip(names, parts, strict=True):
        if missing := [column for column in columns if column not in part]:
            raise UsageError(f"{name} has no column {missing[0]}; it has {', '.join(map(str, part.columns))}")
    parts = [part[list(columns)].rename(columns=columns).astype(object) for part in parts]
    parts = [part.where(part.notna(), "").astype(str) for part in parts]
    classes = tuple(sorted({text for part in parts for text in part["label"]} - {""})) if label else ()
    if label and len(classes) < 2:
        raise UsageError(f"--label {label} must have at least two classes, but has {', '.join(classes) or 'none'}")
    metrics = ("accuracy",) if label else ("pearson", "spearman")
    task = Task("own", tuple(columns[text] for text in texts), classes, metrics, "")
    train, held_out = (_numbered(task, part, name) for part, name in zip(parts, names, strict=True))
    if without := int((~_known(task, held_out)).sum()):
        raise UsageError(f"{names[1]}: {without} held-out examples have no label")
    return Data(task, train, held_out, {})


def with_texts(data: Data, file: str, texts: Sequence[str]) -> Data:
    """Further training examples without a label, of a file with the columns of texts."""
    frame = _frame(file)
    named = dict(zip(texts or data.task.texts, data.task.texts, strict=True))
    if missing := [column for column in named if column not in frame]:
        raise UsageError(f"--unlabelled {file} has no column {missing[0]}; it has {', '.join(frame.columns)}")
    rows = frame[list(named)].rename(columns=named).astype(str)
    rows["label"] = ""
    return data._replace(train=datasets.concatenate_datasets([data.train, _numbered(data.task, rows, file)]))


def _frame(file: str) -> pandas.DataFrame:
    path = Path(file)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in READERS:
        raise UsageError(f"{file} must end in {', '.join(READERS)}, or one of them and .gz")
    if not path.is_file():
        raise UsageError(f"no such file: {file}")
    try:
        if separator := READERS[suffix]:
            quoting = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
            return pandas.read_csv(path, sep=separator, quoting=quoting, dtype=str, na_filter=False)
        return pandas.read_json(path, lines=True, dtype=False)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"cannot read {file}: {' '.join(str(error).split())}") from None


def _known(task: Task, rows: datasets.Dataset) -> np.ndarray:
    labels = np.asarray(rows["label"])
    return labels != IGNORE if task.labels else ~np.isnan(labels.astype(float))


def _numbered(task: Task, rows: pandas.DataFrame, source: str) -> datasets.Dataset:
    """Labels as numbers; empty ones as those of an example without."""
    empty = rows["label"] == ""
    filled = rows.assign(label=rows["label"].where(~empty, task.labels[0] if task.labels else "0"))
    found = tasks.numbered(task, filled.reset_index(drop=True), source)
    label = np.where(empty, IGNORE if task.labels else np.nan, np.asarray(found["label"]))
    return found.remove_columns("label").add_column("label", label).cast_column("label", found.features["label"])


# ---- predictions


def test_sets(name: str, glue_dir: str | None) -> dict[str, datasets.Dataset]:
    """The texts of GLUE's test set, by the name of the file that its server takes."""
    task = TASKS[name]
    names = {"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"} if name == "mnli" else {SUBMISSION[name]: "test"}
    if glue_dir:
        folder = Path(glue_dir) / task.folder
        return {file: tasks.local(task, folder / split, labelled=False) for file, split in names.items()}
    splits = tasks.load("nyu-mll/glue", name=name)
    return {file: splits[split].select_columns([*task.texts]) for file, split in names.items()}


def write_submission(task: Task, logits: Tensor, file: Path) -> None:
    """Lines of index and prediction: a class's name or number, or a score within the task's 0 to 5."""
    if not task.labels:
        predicted = [f"{score:.3f}" for score in logits.clamp(0, 5).tolist()]
    else:
        classes = logits.argmax(-1).tolist()
        predicted = [task.labels[i] if task.name in NAMED else str(i) for i in classes]
    lines = ["index\tprediction", *(f"{i}\t{value}" for i, value in enumerate(predicted))]
    file.write_text("\n".join(lines) + "\n")
