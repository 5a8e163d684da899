"""The data of a comparison: a task of GLUE, or files and data sets of one's own; and predictions for GLUE's server."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas
from torch import Tensor

from fusedkd.integrations.command import UsageError
from recipes.finetune import tasks
from recipes.finetune.tasks import TASKS, Task
from recipes.glue.step import IGNORE, has_label

SUBMISSION = {"sst2": "SST-2", "cola": "CoLA", "rte": "RTE", "stsb": "STS-B", "mrpc": "MRPC", "qqp": "QQP"}
SUBMISSION |= {"qnli": "QNLI", "wnli": "WNLI"}
"""Names of the files that GLUE's server takes; MNLI has two."""
NAMED = frozenset(["rte", "qnli", "mnli"])
"""Tasks whose predictions are names of classes there."""


WHOLE = re.compile(r"(-?\d+(\.0+)?)?")
"""The whole numbers as classes, which one file has as 1 and another as 1.0; an empty cell is no class."""


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
        label: the column of classes, names or numbers; in the order of these. Training examples whose cell is empty
            have none.
        score: or that of a number.

    Raises:
        UsageError: naming the file and what is wrong with it.
    """
    if not 1 <= len(texts) <= 2:
        raise UsageError(f"--text must be the columns of one or two texts, not {len(texts)}")
    if (label is None) == (score is None):
        raise UsageError("--data needs one of --label, a column of classes, and --score, a column of numbers")
    target = str(label or score)
    if len({*texts, target}) < len(texts) + 1:
        raise UsageError(f"--text and --{'label' if label else 'score'} must be different columns")
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
            if target in frame:  # pandas would make 1.0 of 1 where there are empty cells
                frame[target] = pandas.Series(list(splits[split][target]), dtype=object)
            if isinstance(kind, datasets.ClassLabel):
                named = {i: name for i, name in enumerate(kind.names)} | {-1: ""}
                frame[target] = frame[target].map(named)
            parts.append(frame)
    else:
        raise UsageError(f"--data must be two files or one data set, not {len(sources)}")
    columns = dict(zip(texts, ("sentence1", "sentence2"), strict=False)) | {target: "label"}
    for name, part in zip(names, parts, strict=True):
        if missing := [column for column in columns if column not in part]:
            raise UsageError(f"{name} has no column {missing[0]}; it has {', '.join(map(str, part.columns))}")
    parts = [_cells(part[[*columns]], name).rename(columns=columns) for name, part in zip(names, parts, strict=True)]
    parts = [part.assign(label=part["label"].str.strip()) for part in parts]
    if label and all(WHOLE.fullmatch(name) for part in parts for name in part["label"]):  # 1.0 is the class 1
        parts = [part.assign(label=part["label"].str.replace(r"\..*", "", regex=True)) for part in parts]
    classes = _classes(label, names, parts) if label else ()
    metrics = ("accuracy",) if label else ("pearson", "spearman")
    task = Task("own", tuple(columns[text] for text in texts), classes, metrics, "")
    train, held_out = (_numbered(task, part, name) for part, name in zip(parts, names, strict=True))
    if without := int((~has_label(held_out["label"])).sum()):
        raise UsageError(f"{names[1]}: {without} held-out examples have no label")
    return Data(task, train, held_out, {})


def with_texts(data: Data, file: str, texts: Sequence[str]) -> Data:
    """Further training examples without a label, of a file with the columns of texts."""
    frame = _frame(file)
    texts = texts or data.task.texts
    if len(texts) != len(data.task.texts):
        raise UsageError(f"--text must be {len(data.task.texts)} columns of --unlabelled, not {len(texts)}")
    named = dict(zip(texts, data.task.texts, strict=True))
    if missing := [column for column in named if column not in frame]:
        raise UsageError(f"--unlabelled {file} has no column {missing[0]}; it has {', '.join(frame.columns)}")
    if not len(frame):
        raise UsageError(f"--unlabelled {file} must have a text at least, but has none")
    rows = _cells(frame[[*named]], f"--unlabelled {file}").rename(columns=named).assign(label="")
    return data._replace(train=datasets.concatenate_datasets([data.train, _numbered(data.task, rows, file)]))


def _cells(rows: pandas.DataFrame, source: str) -> pandas.DataFrame:
    """As text; empty ones are empty texts. Of a JSON file or a data set they may be lists."""
    rows = rows.astype(object)
    for name, column in rows.items():
        if not (is_one := column.map(pandas.api.types.is_scalar)).all():
            row = is_one.idxmin()
            kind = type(column[row]).__name__
            raise UsageError(f"{source}, row {row}: {name} must be a text or a number, not of the type {kind}")
    return rows.where(rows.notna(), "").astype(str)


def _frame(file: str) -> pandas.DataFrame:
    path = Path(file)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in READERS:
        raise UsageError(f"{file} must end in {', '.join(READERS)}, or one of them and .gz")
    if not path.is_file():
        raise UsageError(f"no such file: {file}")
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
            return READERS[suffix](lines)
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise UsageError(f"cannot read {file}: {' '.join(str(error).split())}") from None


def _separated(rows: Iterable[tuple[int, list[str]]]) -> pandas.DataFrame:
    """Of numbered lines, the first one of names. Cells are text, whatever they look like."""
    found = [(number, row) for number, row in rows if row not in ([], [""])]
    if not found:
        raise ValueError("it is empty")
    (_, names), *others = found
    if len({*names}) < len(names):
        raise ValueError(f"two of its columns have one name: {', '.join(names)}")
    for number, row in others:
        if len(row) != len(names):
            raise ValueError(f"line {number} has {len(row)} cells, but there are {len(names)} columns")
    return pandas.DataFrame([row for _, row in others], columns=names, dtype=object)


def _csv(lines: Iterable[str]) -> pandas.DataFrame:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(lines, strict=True)
    return _separated((reader.line_num, row) for row in reader)


def _tsv(lines: Iterable[str]) -> pandas.DataFrame:
    """Quotation marks are text."""
    return _separated((i, line.rstrip("\r\n").split("\t")) for i, line in enumerate(lines, start=1))


def _json(lines: Iterable[str]) -> pandas.DataFrame:
    """An object for each line. Values stay what they are; an absent one is None."""
    rows = [(i, json.loads(line)) for i, line in enumerate(lines, start=1) if line.strip()]
    if other := [i for i, row in rows if not isinstance(row, dict)]:
        raise ValueError(f"line {other[0]} is no object")
    names = dict.fromkeys(name for _, row in rows for name in row)
    return pandas.DataFrame([[row.get(name) for name in names] for _, row in rows], columns=[*names], dtype=object)


READERS: dict[str, Callable[[Iterable[str]], pandas.DataFrame]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json,
    ".json": _json,
}
"""By the end of a file's name before `.gz`."""


def _classes(label: str, names: list[str], parts: list[pandas.DataFrame]) -> tuple[str, ...]:
    """In the order of their numbers, if they are whole numbers, or of their letters."""
    train, held_out = ({*part["label"]} - {""} for part in parts)
    found = train | held_out
    if len(found) < 2:
        raise UsageError(f"--label {label} must have at least two classes, but has {', '.join(found) or 'none'}")
    if train and (unknown := sorted(held_out - train)):
        shown = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        warnings.warn(f"classes of {names[1]} that {names[0]} has not: {shown}", stacklevel=2)
    return tuple(sorted(found, key=int if all(re.fullmatch(r"-?\d+", name) for name in found) else str))


def _numbered(task: Task, rows: pandas.DataFrame, source: str) -> datasets.Dataset:
    """Labels as numbers; empty ones as those of an example without."""
    empty = rows["label"] == ""
    filled = rows.assign(label=rows["label"].where(~empty, task.labels[0] if task.labels else "0"))
    found = tasks.numbered(task, filled.reset_index(drop=True), source)
    label = np.where(empty, IGNORE if task.labels else np.nan, np.asarray(found["label"]))
    return found.remove_columns("label").add_column("label", label).cast_column("label", found.features["label"])


def digest(data: Data) -> str:
    return tasks.digest(data.task, {"train": data.train, "held_out": data.held_out, **data.others})


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
