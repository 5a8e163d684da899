"""What `fusedkd distil` trains on: conversations, rows of tokens, or what `fusedkd cache` wrote."""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
from rich.console import Console
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.cache_chat import conversations
from fusedkd.integrations.cache_data import PACKED as MARKS
from fusedkd.integrations.cache_data import opened
from fusedkd.integrations.cache_store import PACKED
from fusedkd.integrations.command import UsageError, option
from fusedkd.integrations.kinds import IGNORE
from fusedkd.integrations.offline import COLUMNS

TOKENS = ("input_ids", "labels", "attention_mask")
"""Columns that have one entry for each token."""


@dataclass
class DataOptions:
    _argument_group_name = "data"
    dataset: list[str] = option([], "files (.jsonl, .parquet) or a hub data set; offline: what `fusedkd cache` wrote")
    dataset_config: str | None = option(None, "its configuration, of a hub data set that has several")
    split: str = option("train", "of a data set that has several")
    messages_column: str = option("messages", "its column of conversations")
    held_out: int = option(64, "conversations of its end, for evaluation")
    max_length: int = option(1024, "tokens of a conversation; what is beyond is cut off; offline: as it was cached")
    packing: bool = option(False, "conversations one after the other in a row, without padding, none sees another")


def rows_of(
    options: DataOptions, tokenizer: Tokenizer, offline: bool, console: Console
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows: `input_ids`, `labels`, an `attention_mask` where the data has one, and of an offline
    teacher its columns.

    Raises:
        UsageError: for data that is nothing of the kind, or has too few conversations with an answer.
    """
    data = opened(options.dataset, options.dataset_config, options.split)
    if "input_ids" in data.column_names:
        rows = tokenized(data, options, offline, console)
    elif offline:
        raise UsageError(f"--dataset {options.dataset[0]} is no cache: `fusedkd cache` writes one")
    elif options.messages_column not in data.column_names:
        names = ", ".join(data.column_names)
        raise UsageError(f"--dataset has no column {options.messages_column}: --messages_column is one of {names}")
    else:
        rows = conversations(data, options.messages_column, tokenizer, console)
    if not offline:  # a cached row is as long as it was cached
        rows = rows.map(_cut, fn_kwargs={"length": options.max_length})
    answered = rows.filter(_has_answer)
    if silent := len(rows) - len(answered):
        where = "" if offline else f" in their first {options.max_length:,} tokens (--max_length)"
        console.print(f"[bold]Left out[/bold]: {silent:,} conversations without an answer{where}")
    train = len(answered) - options.held_out
    if train < 1:
        raise UsageError(f"--held_out {options.held_out} leaves none of {len(answered)} conversations with an answer")
    console.print(f"[bold]Data[/bold]: {train:,} conversations, {options.held_out:,} held out")
    rest = list(range(train, len(answered)))  # datasets refuses an empty range at the end
    return answered.select(range(train)), answered.select(rest)


def tokenized(data: datasets.Dataset, options: DataOptions, offline: bool, console: Console) -> datasets.Dataset:
    """Those of its columns that are trained on; says which are not."""
    name, has = options.dataset[0], set(data.column_names)
    teacher = [column for column in (PACKED, *COLUMNS) if column in has] if offline else []
    if offline and teacher not in ([PACKED], [*COLUMNS]):
        raise UsageError(f"--dataset {name} has not the teacher's columns, which `fusedkd cache` writes")
    if "labels" not in has:
        raise UsageError(f"--dataset {name} has input_ids and no labels, which say what is learnt")
    if marks := has.intersection(("position_ids", "seq_lengths", *MARKS)):
        raise UsageError(
            f"--dataset {name} has a column {min(marks)}, of conversations that are packed: give them one a row, "
            "and --packing true"
        )
    tokens = [column for column in TOKENS if column in has]
    if left := [column for column in data.column_names if column not in (*tokens, *teacher)]:
        console.print(f"[bold]Left out[/bold]: the columns {', '.join(left)}")
    data = data.with_format(None).select_columns([*tokens, *teacher])
    for i, row in enumerate(data.select_columns(tokens)):
        lengths = {column: len(row[column]) for column in tokens}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{count} {column}" for column, count in lengths.items())
            raise UsageError(f"--dataset {name} must have one label for each token, but row {i} has {found}")
        if options.packing and 0 in row.get("attention_mask", ()):
            raise UsageError(f"--packing takes rows without padding, but row {i} of --dataset {name} has some")
    plain = [column for column in teacher if column in COLUMNS]  # as arrays: lists of lists are slow
    return data.with_format("numpy", plain, output_all_columns=True) if plain else data


def each_turn(rows: datasets.Dataset) -> datasets.Dataset:
    """A row for each of the assistant's turns: the conversation up to its end, of which this turn has labels."""

    def turns(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in batch}
        for i, labels in enumerate(batch["labels"]):
            said = [label != IGNORE for label in labels]
            begins = [j for j in range(len(said)) if said[j] and not (j and said[j - 1])]
            for begin in begins:
                end = next((j for j in range(begin, len(said)) if not said[j]), len(said))
                row = {name: values[i][:end] for name, values in batch.items()}
                row["labels"] = [IGNORE] * begin + labels[begin:end]
                for name, values in row.items():
                    found[name].append(values)
        return found

    return rows.map(turns, batched=True).filter(_has_answer)


def _cut(row: dict[str, Any], length: int) -> dict[str, Any]:
    return {name: row[name][:length] for name in TOKENS if name in row}


def _has_answer(row: dict[str, Any]) -> bool:
    return any(label != IGNORE for label in row["labels"][1:])
