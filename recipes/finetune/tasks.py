"""The tasks: what GLUE and SQuAD look like on the hub and in files, and how they are scored."""

import csv
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, multiclass_accuracy
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.command import UsageError


@dataclass(frozen=True)
class Task:
    """Names are the hub's.

    labels    in their order; none: the label is a score (regression)
    metrics   the first one says which epoch was the best
    folder    where GLUE's download has the files
    local     the columns that have another name there
    header    all columns of files without a line of names
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    folder: str
    local: dict[str, str] = field(default_factory=dict)
    header: tuple[str, ...] | None = None
    held_out: tuple[str, str] = ("validation", "dev")

    @property
    def numbers(self) -> dict[str, int]:
        """Of the labels, by name or as they are; a name that is a number is a name."""
        return {str(i): i for i in range(len(self.labels))} | {name: i for i, name in enumerate(self.labels)}


PAIR, ENTAILMENT = ("sentence1", "sentence2"), ("entailment", "not_entailment")
MRPC = {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}
MNLI = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}
TASKS = {
    task.name: task
    for task in (
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), "SST-2"),
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), "CoLA",
             header=("source", "label", "mark", "sentence")),
        Task("rte", PAIR, ENTAILMENT, ("accuracy",), "RTE"),
        Task("stsb", PAIR, (), ("pearson", "spearman"), "STS-B", {"label": "score"}),
        Task("mrpc", PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"), "MRPC", MRPC),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy"), "QQP",
             {"label": "is_duplicate"}),
        Task("qnli", ("question", "sentence"), ENTAILMENT, ("accuracy",), "QNLI"),
        Task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), "MNLI", MNLI,
             held_out=("validation_matched", "dev_matched")),
        Task("wnli", PAIR, ("not_entailment", "entailment"), ("accuracy",), "WNLI"),
        Task("squad", ("question", "context"), (), ("f1", "exact_match"), ""),
    )
}  # fmt: skip


# ---- reading


def read(task: Task, dataset: str | None, glue_dir: str | None, squad_files: list[str]) -> list[datasets.Dataset]:
    """Training and held-out examples: the task's texts and `label`, of SQuAD also `id` and `answers`.

    From `squad_files` or `glue_dir` where given, otherwise from `dataset`, a hub name or a folder of the same form.
    """
    squad = task.name == "squad"
    if glue_dir and not squad:
        return [local(task, Path(glue_dir) / task.folder / split) for split in ("train", task.held_out[1])]
    if squad and squad_files:
        if len(squad_files) != 2:
            raise UsageError("--squad_files are two: of the training and of the held-out questions")
        return [squad_file(file) for file in squad_files]
    source = dataset or ("rajpurkar/squad" if squad else "nyu-mll/glue")
    splits = load(source, name=None if squad else task.name)
    parts = []
    for split in ("train", task.held_out[0]):
        if split not in splits:
            raise UsageError(f"{source} has no split {split} (it has {', '.join(splits)})")
        wanted = [*task.texts, *(("id", "answers") if squad else ("label",))]
        if missing := set(wanted) - set(splits[split].column_names):
            raise UsageError(f"{source} is not of the form of {task.name}: it has no column {min(missing)}")
        parts.append(splits[split].select_columns(wanted))
    return parts if squad else [numbered(task, part.to_pandas(), source) for part in parts]


def load(source: str, **options: Any) -> Any:
    try:
        return datasets.load_dataset(source, **options)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UsageError(f"cannot read {options.get('data_files', {}).get('train', source)}: {cause}") from error


def local(task: Task, stem: Path, labelled: bool = True) -> datasets.Dataset:
    """Of a tab-separated file of GLUE's download, as it is or with gzip. Quotation marks are text.

    Files of the test set (`labelled` False) have a line of names and no label: a row of the result for each line.
    """
    file = next((file for file in (stem.with_suffix(".tsv"), stem.with_suffix(".tsv.gz")) if file.is_file()), None)
    if file is None:
        raise UsageError(f"no such file: {stem.with_suffix('.tsv')} (or .tsv.gz)")
    form: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE, "lineterminator": "\n", "encoding": "utf-8-sig"}
    form |= {"header": None, "names": task.header} if task.header and labelled else {}
    try:
        rows = pandas.read_csv(file, dtype=str, na_filter=False, index_col=False, **form)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    rows.columns = rows.columns.str.rstrip("\r")
    names = {name: task.local.get(name, name) for name in (*task.texts, *(["label"] if labelled else []))}
    if missing := set(names.values()) - set(rows.columns):
        raise UsageError(f"{file} is not of the form of {task.name}: it has no column {min(missing)}")
    rows = rows[list(names.values())].set_axis(list(names), axis=1).apply(lambda column: column.str.rstrip("\r"))
    if not labelled:
        return datasets.Dataset.from_pandas(rows, preserve_index=False)
    torn = (rows == "").any(axis=1)
    if torn.any():  # some of QQP's are broken over lines
        warnings.warn(f"{file}: {torn.sum()} of its lines lack a text or a label and are left out", stacklevel=2)
    return numbered(task, rows[~torn], str(file))


def numbered(task: Task, rows: pandas.DataFrame, source: str) -> datasets.Dataset:
    """The texts, and the label as a number: files have names of classes."""
    label = rows["label"].astype(str)
    found = label.map(task.numbers) if task.labels else pandas.to_numeric(label, errors="coerce")
    with np.errstate(over="ignore"):
        known = np.isfinite(found.astype(np.float32))  # in which scores are kept
    if not known.all():
        what = f"one of {', '.join(task.labels)}" if task.labels else "a number that float32 holds"
        raise UsageError(f"{source}, row {known.idxmin()}: the label is not {what}: {label[known.idxmin()]!r}")
    columns = {name: rows[name].tolist() for name in task.texts} | {"label": found.tolist()}
    features = {name: datasets.Value("string") for name in task.texts}
    number = datasets.Value("int64" if task.labels else "float32")
    return datasets.Dataset.from_dict(columns, datasets.Features(features | {"label": number}))


def squad_file(file: str) -> datasets.Dataset:
    """The questions of a JSON file in SQuAD's own format (version 1.1), in the columns of the hub's."""
    if not Path(file).is_file():
        raise UsageError(f"no such file: {file}")

    def flat(batch: dict[str, Any]) -> dict[str, list[Any]]:
        rows = [
            (question["id"], paragraph["context"], question["question"], question["answers"])
            for paragraphs in batch["paragraphs"]
            for paragraph in paragraphs
            for question in paragraph["qas"]
        ]
        ids, contexts, questions, answers = zip(*rows, strict=True) if rows else ((), (), (), ())
        columns = [{key: [a[key] for a in given] for key in ("text", "answer_start")} for given in answers]
        return {"id": list(ids), "context": list(contexts), "question": list(questions), "answers": columns}

    articles = load("json", data_files={"train": file}, field="data", split="train")
    if "paragraphs" not in articles.column_names:
        raise UsageError(f"{file} is no SQuAD file: its articles have no paragraphs")
    return articles.map(flat, batched=True, batch_size=10, remove_columns=articles.column_names)


def digest(task: Task, parts: dict[str, datasets.Dataset]) -> str:
    """Of all texts and labels, and of what the classes are."""
    found = hashlib.sha256(json.dumps(task.labels).encode())
    for name, rows in parts.items():
        found.update(json.dumps([name, rows.to_dict()]).encode())
    return found.hexdigest()


def tokenized(task: Task, rows: datasets.Dataset, tokenizer: Tokenizer, max_length: int) -> datasets.Dataset:
    """Token ids, `labels` where there are some, `length`.

    A tokenizer without a separator puts its end-of-text token between two texts.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in task.texts]
        if len(texts) == 2 and tokenizer.sep_token is None:
            texts = [[tokenizer.eos_token.join(pair) for pair in zip(*texts, strict=True)]]
        tokens = tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=True)
        labels = {"labels": batch["label"]} if "label" in batch else {}
        return {**tokens, **labels, "length": [len(ids) for ids in tokens["input_ids"]]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


# ---- scoring

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": lambda logits, labels: multiclass_accuracy(logits, labels, logits.shape[-1], average="micro"),
    "f1": lambda logits, labels: binary_f1_score(logits.argmax(-1), labels),
    # Of two classes it is Pearson's correlation; the Matthews coefficient of torchmetrics is not 0 without variation.
    "matthews": lambda logits, labels: pearson_corrcoef(logits.argmax(-1).double(), labels.double()),
    "pearson": pearson_corrcoef,
    "spearman": spearman_corrcoef,
}


def score(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics, between 0 and 1 (correlations: −1 and 1). Without variation a correlation is 0."""
    predicted, given = torch.from_numpy(outputs).double(), torch.from_numpy(labels)
    if not task.labels:
        given = given.double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The variance of predictions or target is close to zero")
        return {name: float(METRICS[name](predicted, given).nan_to_num(0.0)) for name in task.metrics}
