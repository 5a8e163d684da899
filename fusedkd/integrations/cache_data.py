"""What :mod:`fusedkd.integrations.cache_teacher` shows its teacher: text cut into blocks, conversations, or tokenized
rows as given.

Of tokenized data every column that holds a list of numbers per row is carried along. Documents that are packed into one
row, at whose beginnings its position_ids start again, are rows of their own to the teacher.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute
import torch
from rich.console import Console
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.blocks import MaskingCollator, pack
from fusedkd.integrations.cache_chat import conversations
from fusedkd.integrations.cache_store import PACKED as COMPACT
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.kinds import IGNORE
from fusedkd.integrations.offline import restarts
from fusedkd.integrations.tokenizers import check_same_vocabulary

if TYPE_CHECKING:
    from fusedkd.integrations.cache_teacher import Options

Row = dict[str, np.ndarray]
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".arrow": "arrow"}
"""Of files that are not text, by their ending."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings behind those."""
INTEGERS = ("int", "uint", "null")  # the last: of an empty data set
NUMBERS = (*INTEGERS, "float", "bool")
PER_TOKEN = ("attention_mask", "token_type_ids", "position_ids")
PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
"""Other marks of packed documents than position_ids and TRL's seq_lengths."""


class Columns(NamedTuple):
    """Of the teacher, for the tokens of a row: ``(L, K)`` each, −1 and −inf where there is none."""

    ids: np.ndarray
    logprobs: np.ndarray


def read(options: Options, masked: bool, console: Console) -> tuple[datasets.Dataset, MaskingCollator | None]:
    """Tokenized rows, and what masks them if they are text for a masked model."""
    data = opened(options.dataset, options.dataset_config, options.split, keep_linebreaks=not masked)
    if "input_ids" in data.column_names:
        return tokenized(data, console), None
    if options.messages_column in data.column_names:
        if masked:
            raise UsageError(f"the column {options.messages_column} is for causal teachers, and this one is masked")
        return conversations(data, options.messages_column, tokenizer_of(options), console), None
    if options.text_column not in data.column_names:
        raise UsageError(f"no column {options.text_column}: --text_column is one of {', '.join(data.column_names)}")
    tokenizer, lines = tokenizer_of(options), kind_of_files(options.dataset) == "text"
    text = data.select_columns(options.text_column).filter(bool, input_columns=options.text_column)
    if not masked:
        return pack_documents(text, tokenizer, options.block_size, whole=not lines), None
    if tokenizer.mask_token_id is None:
        raise UsageError(f"a masked teacher needs a tokenizer with a mask token, which {tokenizer.name_or_path} lacks")
    text = text.rename_columns({} if options.text_column == "text" else {options.text_column: "text"})
    counts = np.ones(len(tokenizer))
    collator = MaskingCollator(tokenizer, counts, options.mlm_probability, smoothing=0.0, seed=options.seed)
    return pack(text, tokenizer, options.block_size, "given"), collator


def kind_of_files(names: list[str]) -> str | None:
    """What datasets calls files of this kind; None: these are no files.

    Raises:
        UsageError: for files of several kinds, and for several names of which one is no file.
    """
    if absent := [name for name in names if not Path(name).is_file()]:
        if len(names) > 1:
            raise UsageError(f"no such file: {absent[0]}; several names of --dataset must be files")
        if _format(names[0]) != "text" and not Path(names[0]).exists():
            raise UsageError(f"--dataset {names[0]}: no such file")
        return None
    kinds = {_format(name) for name in names}
    if len(kinds) > 1:
        raise UsageError(f"the files of --dataset must be of one kind, not {' and '.join(sorted(kinds))}")
    return kinds.pop()


def _format(name: str) -> str:
    path = Path(name.lower())
    return FORMATS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix, "text")


def opened(names: list[str], config: str | None, split: str, keep_linebreaks: bool = True) -> datasets.Dataset:
    """What --dataset, --dataset_config and --split name: files, a folder of save_to_disk, or a data set of the hub.

    Raises:
        UsageError: where there is no such thing, or it cannot be read.
    """
    kind, first = kind_of_files(names), Path(names[0])
    try:
        if kind is not None:
            more: dict[str, dict[str, Any]] = {"text": {"keep_linebreaks": keep_linebreaks}, "tsv": {"sep": "\t"}}
            builder = "csv" if kind == "tsv" else kind
            return datasets.load_dataset(builder, data_files=names, split="train", **more.get(kind, {}))
        if (first / "state.json").is_file() or (first / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(first)
        else:
            data = datasets.load_dataset(names[0], config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"cannot read --dataset {names[0]}: {line(error)}") from error
    if isinstance(data, dict):
        if split not in data:
            raise UsageError(f"--dataset has no split {split}: --split is one of {', '.join(data)}")
        return data[split]
    return data


def tokenized(data: datasets.Dataset, console: Console) -> datasets.Dataset:
    """The columns that are a list of numbers per row; says which are not. TRL's seq_lengths of packed documents become
    position_ids.
    """

    def holds(name: str, kinds: tuple[str, ...]) -> bool:
        inner = getattr(data.features[name], "feature", None)
        return isinstance(inner, datasets.Value) and inner.dtype.startswith(kinds)

    kept = [name for name in data.column_names if holds(name, NUMBERS)]
    for name in ("input_ids", *PER_TOKEN):
        whole = name in ("input_ids", "position_ids")
        if name in data.column_names and not holds(name, INTEGERS if whole else NUMBERS):
            what = f"a list of {'whole ' * whole}numbers per row"
            raise UsageError(f"the column {name} must hold {what}, not {data.features[name]}")
    if "seq_lengths" in kept and "position_ids" not in kept:
        data = data.map(_positions, input_columns="seq_lengths")
        kept.append("position_ids")
    marks = [name for name in PACKED if name in kept]
    if marks and "position_ids" not in kept:
        raise UsageError(
            f"the column {marks[0]} says that documents are packed: the teacher keeps them apart by a column "
            "position_ids that starts again at each of them"
        )
    if left_out := [name for name in data.column_names if name not in kept]:
        console.print(f"[bold]Left out[/bold]: {', '.join(left_out)} (no list of numbers per row)")
    return data.select_columns(kept)


def _positions(lengths: list[int]) -> dict[str, list[int]]:
    return {"position_ids": [i for length in lengths for i in range(length)]}


def pack_documents(text: datasets.Dataset, tokenizer: Tokenizer, size: int, whole: bool) -> datasets.Dataset:
    """Tokenize, join and cut into blocks; each thousand documents end with a shorter one. `whole` documents get the
    tokenizer's special tokens and end with its end-of-sequence token; lines of a file follow each other as they stand.
    """
    eos = [tokenizer.eos_token_id] if whole and tokenizer.eos_token_id is not None else []

    def blocks(documents: list[str]) -> dict[str, list[list[int]]]:
        given = documents if whole else ["".join(documents)]  # some tokenizers begin each text with a space
        tokens = tokenizer(given, add_special_tokens=whole, verbose=False)["input_ids"]
        ids = list(chain.from_iterable(t if t[-1:] == eos else t + eos for t in tokens))
        return {"input_ids": [ids[i : i + size] for i in range(0, len(ids), size)]}

    (column,) = text.column_names
    return text.map(blocks, batched=True, input_columns=column, remove_columns=column)


def batches(
    data: datasets.Dataset, rows: range, batch_size: int, collator: MaskingCollator | None
) -> Iterator[list[Row]]:
    """Lists of rows, complete with attention mask, masked (each by itself, so that no batch size changes the masks)."""
    for start in range(rows.start, rows.stop, batch_size):
        batch = [data[i] for i in range(start, min(start + batch_size, rows.stop))]
        if collator is not None:
            batch = [{k: v[0].numpy() for k, v in collator([row]).items()} for row in batch]
        yield [{"attention_mask": np.ones(len(row["input_ids"]), np.int8)} | row for row in batch]


def wanted(row: Row, masked: bool) -> np.ndarray:
    """The rows ``(L,)`` bool whose label is not −100: of a causal model that of the next token."""
    labels = row["labels"]
    if labels.shape != row["input_ids"].shape:
        raise UsageError(f"labels must be one per token, {len(row['input_ids'])}, not {len(labels)}: see --rows")
    known: np.ndarray = labels != IGNORE
    return known if masked else np.append(known, False)[1:]


def blank(batch: list[Row], k: int) -> list[Columns]:
    """No column at any row of these."""
    shapes = [(len(row["input_ids"]), k) for row in batch]
    return [Columns(np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)) for shape in shapes]


def pieces(batch: list[Row]) -> list[tuple[int, slice]]:
    """Where the documents of a batch lie: in which row, and where in it."""
    return [(i, span) for i, row in enumerate(batch) for span in documents(row)]


def documents(row: Row) -> list[slice]:
    """Where each document of a row lies, without those that are all padding."""
    ends = [len(row["input_ids"])]
    if "position_ids" in row:
        ends = [*restarts(torch.as_tensor(row["position_ids"])).nonzero()[:, 0].tolist(), *ends]
    spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [span for span in spans if row["attention_mask"][span].any()]


class Survey(NamedTuple):
    rows: int
    tokens: int
    positions: int
    """What the teacher must have: the longest row, or the largest of position_ids and one more."""
    largest_id: int
    packed: bool
    checksum: int
    """Of all that is carried along, and of where the rows end."""


def survey(data: datasets.Dataset) -> Survey:
    """What has to be known of the rows before the teacher is asked.

    Raises:
        UsageError: for an empty data set, and naming a column that has not one number per token.
    """
    tokens, positions, largest, crc, packed = 0, 0, 0, 0, False
    names = ["input_ids", *(name for name in data.column_names if name != "input_ids")]
    for batch in data.with_format("arrow").iter(batch_size=10_000):
        columns = {name: batch[name].combine_chunks() for name in names}
        for name, column in columns.items():
            if column.null_count or column.flatten().null_count:
                raise UsageError(f"the column {name} must have numbers in every row, but one of its values is null")
        flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in columns.items()}
        lengths = {name: _lengths(column) for name, column in columns.items()}
        for name in names:
            if name in PER_TOKEN and (lengths[name] != lengths["input_ids"]).any():
                raise UsageError(f"the column {name} must have as many numbers per row as input_ids")
            flat[name] = flat[name].astype(np.float64 if flat[name].dtype.kind == "f" else np.int64)
            crc = zlib.crc32(lengths[name].tobytes(), zlib.crc32(flat[name].tobytes(), crc))
        ids, last = flat["input_ids"], np.cumsum(lengths["input_ids"])
        if ids.min(initial=0) < 0:
            raise UsageError(f"the column input_ids must have ids of at least 0, but one is {ids.min()}")
        tokens, largest = tokens + len(ids), max(largest, int(ids.max(initial=0)))
        needed = flat["position_ids"] + 1 if "position_ids" in flat else lengths["input_ids"]
        positions = max(positions, int(needed.max(initial=0)))
        if "position_ids" in flat:
            begins = restarts(torch.as_tensor(flat["position_ids"]))
            begins[last[last < len(ids)]] = False
            packed = packed or bool(begins.any())
    if not tokens:
        raise UsageError("--dataset is empty")
    return Survey(len(data), tokens, positions, largest, packed, crc)


def _lengths(column: Any) -> np.ndarray:
    lengths: np.ndarray = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def features_of(data: datasets.Dataset, k: int, labels: bool, compact: bool) -> datasets.Features:
    """What is written of the rows that `batches` yields, and the teacher's columns, or their compact one. Beside
    position_ids no attention mask is added: with one, a model in training would not keep packed documents apart.
    """
    types = {name: data.features[name].feature.dtype for name in data.column_names}
    if "position_ids" not in types or "attention_mask" in types:
        types["attention_mask"] = "int8"
    if labels:
        types["labels"] = "int32"
    small = ("input_ids", "labels", *PER_TOKEN)
    types = {name: "int32" if dtype == "int64" and name in small else dtype for name, dtype in types.items()}
    columns: dict[str, Any] = {COMPACT: datasets.Value("binary")}
    if not compact:
        kinds = {"teacher_ids": "int32", "teacher_logprobs": "float32"}
        columns = {name: datasets.Array2D((None, k), kind) for name, kind in kinds.items()}
    return datasets.Features({name: datasets.List(datasets.Value(dtype)) for name, dtype in types.items()} | columns)


def tokenizer_of(options: Options) -> Tokenizer:
    """That of --tokenizer, which must give the teacher's ids to its tokens where the teacher comes with one; or its."""
    name, more = options.tokenizer or options.teacher, {} if options.tokenizer else gguf(options)
    given: Tokenizer = pretrained(AutoTokenizer, name, "the tokenizer", **more)
    if _is_empty(given):
        raise UsageError(f"{name} has no tokenizer: name one by --tokenizer")
    if not options.tokenizer or options.server:  # whose model may have any name
        return given
    try:
        own = AutoTokenizer.from_pretrained(options.teacher, **gguf(options))
    except (OSError, ValueError, KeyError):
        return given
    try:
        if not _is_empty(own):
            check_same_vocabulary(given, own)
    except ValueError as error:
        raise UsageError(f"--tokenizer is not the teacher's: {error}") from None
    return given


def _is_empty(tokenizer: Tokenizer) -> bool:
    """Whether it has special tokens alone: so transformers makes one for a folder without any."""
    return len(tokenizer) <= len(tokenizer.all_special_ids)


def gguf(options: Options) -> dict[str, Any]:
    """What from_pretrained is given for a teacher in a GGUF file."""
    return {"gguf_file": options.gguf_file} if options.gguf_file else {}


def pretrained(kind: Any, name: str, what: str, **more: Any) -> Any:
    try:
        return kind.from_pretrained(name, **more)
    except ImportError as error:
        raise UsageError(f"cannot load {what} {name}: {line(error)}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load {what} {name}: {line(error)}") from error


def line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__
