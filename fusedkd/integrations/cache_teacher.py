"""An offline teacher: its top-k ids and log-probabilities at every position of a data set, computed once, on disk.

    fusedkd cache --teacher gpt2 --dataset train.txt --top_k 64 --output cache
    datasets.load_from_disk("cache")    # rows are NumPy arrays; memory-mapped, nothing is copied

A row of the result is a sequence of L tokens:

    input_ids, attention_mask (L,)      and every other list of numbers that the data has: labels, token_type_ids,
                                        position_ids, completion_mask; text for a masked teacher, and conversations
                                        (a column of messages, by the chat template), get labels here
    teacher_packed      bytes           the teacher's columns, by :mod:`fusedkd.integrations.cache_store`, which unpacks
                                        them: :class:`fusedkd.integrations.offline.OfflineTeacherCollator`, and so
                                        DistillationTrainer, does. With --logprobs_dtype float32 there are instead
    teacher_ids         (L, K) int32    columns by falling probability; −1 where there is none: at unattended positions,
                                        and past the last column that is not masked (−inf)
    teacher_logprobs    (L, K) float32  natural log of softmax(logits / temperature) over the teacher's whole vocabulary

What :class:`fusedkd.TeacherTopK` takes, with ``logprobs_temperature`` the temperature given here. Row i belongs to
logits position i: for a causal model it is the distribution of token i + 1. Where position_ids start again within a
row, documents are packed: none sees another. Beside position_ids no attention_mask is added, for a causal model of
transformers keeps documents apart only without one.

A token takes 164 (vocabulary 49,152) to 184 (262,144) bytes for 64 columns of uint8, 520 plain. What is listed, and the
mass off the list, is exact; a log-probability is off by at most 2/255 of the row's range, in the last columns, and
KL(true ‖ stored) is some 1e-5, less than what bfloat16 logits lose (tests/integrations/test_cache_store.py). uint10
divides that KL by 16, uint12 by 256. float16 is not offered: its rounding, 2⁻¹² of log p, is worse than uint12's.

The teacher is a model of transformers, or is asked for at a server: :mod:`fusedkd.integrations.cache_server`.

Shards of --shard_rows sequences are written one after the other, each under its own name only once it is complete. A
run that was interrupted continues after the last one when it is started again with the same options; with others, other
data or another teacher it refuses. Of the logits one batch exists at a time.
"""

# ruff: noqa: RUF009 (`option` and `required` return dataclass fields)

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

try:
    import fusedkd.integrations.cache_data  # noqa: F401 (it needs all that the extra installs)
except ModuleNotFoundError as error:
    if __name__ != "__main__" or (error.name or "").startswith("fusedkd"):
        raise
    print(f'error: {error.name} is missing: cache_teacher needs pip install "fusedkd[train]"', file=sys.stderr)
    sys.exit(2)

import datasets
import numpy as np
import transformers
from datasets.arrow_writer import ArrowWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusedkd.checks import MAX_LISTED
from fusedkd.integrations.cache_data import Columns, Row, Survey, batches, features_of, read, survey, wanted
from fusedkd.integrations.cache_model import checksum, fit, is_masked, load, top_k
from fusedkd.integrations.cache_server import Server
from fusedkd.integrations.cache_store import BITS, PACKED, encode
from fusedkd.integrations.command import UsageError, option, parse_into


def required(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass
class Options:
    teacher: str = required("a causal or masked language model: a folder, a name on the hub, or a .gguf file")
    dataset: list[str] = required(
        "files: text, .jsonl, .csv, .tsv, .arrow or .parquet; or a folder of save_to_disk; or a name or folder for "
        "datasets.load_dataset. "
        "One that has a column input_ids is taken as it is, row by row; one of conversations by the chat template"
    )
    output: str = required("the folder to write, or to continue")
    top_k: int = option(64, "columns per position")
    temperature: float = option(1.0, "of the softmax; tails other than 'renormalize' need that of the training")
    logprobs_dtype: Literal["uint8", "uint10", "uint12", "uint16", "float32"] = option(
        "uint8", "of the log-probabilities; float32: two plain columns, with ids of 32 bits"
    )
    rows: Literal["all", "labelled"] = option(
        "all",
        "the teacher's rows that are stored; labelled: those alone whose token, of causal models the next, has one",
    )
    tokenizer: str | None = option(None, "folder or name; None: the teacher's")
    gguf_file: str | None = option(None, "the file, where --teacher is a folder or name that holds GGUF files")
    block_size: int = option(
        512, "tokens per row into which text is packed (tokenized data and conversations stay as they are)"
    )
    dataset_config: str | None = option(None, "configuration for datasets.load_dataset")
    split: str = option("train", "of a data set that has several")
    text_column: str = option("text", "column of the text, a document each")
    messages_column: str = option(
        "messages", "column of conversations, lists of messages {role, content}; labels on what the assistant says"
    )
    objective: Literal["auto", "causal", "masked"] = option("auto", "auto: what the teacher's config says it is")
    mlm_probability: float = option(0.15, "masked teachers on text: share of tokens masked, once and for all")
    seed: int = option(0, "of those masks")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of the teacher; auto: as it was saved")
    batch_size: int = option(8, "rows per forward pass")
    shard_rows: int = option(1024, "rows per shard: what an interruption can cost")
    server: str | None = option(None, "URL of a server that has the teacher; --teacher is its name there")
    server_kind: Literal["vllm", "sglang", "openai"] = option("vllm", "of that server; openai: any with echo")
    server_offset: int | None = option(
        None, "openai, tokens as texts: entry i is of token i + this, 0 or 1; None: found"
    )
    server_concurrency: int = option(8, "requests to it at a time, of --batch_size rows each")
    server_retries: int = option(5, "repetitions of a request that failed, after 1, 2, 4, … seconds")
    server_timeout: float = option(600.0, "seconds to wait for an answer")
    server_key_variable: str | None = option(None, "environment variable that holds the key for it, if it wants one")


OF_SERVER = ("server", "server_concurrency", "server_retries", "server_timeout", "server_key_variable")
FREE = ("output", "batch_size", *OF_SERVER)  # may change between two runs in the same folder

Answers = Callable[[Iterable[list[Row]]], Iterable[tuple[list[Row], Iterable[Columns]]]]
"""Batches, in their order, with the teacher's columns of each row."""
Examples = Callable[[range], Iterable[tuple[list[dict[str, Any]], list[Columns]]]]
"""Of a shard's rows: what is written of each, and the teacher's columns."""


def main(argv: list[str] | None = None) -> int:
    """The command line; 0, or 2 and one line on stderr for what the user can put right."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        write(parse(argv), console)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str] | None) -> Options:
    (options,) = parse_into([Options], argv, "fusedkd cache")
    if options.server_retries < 0:
        raise UsageError(f"--server_retries must be 0 or more, not {options.server_retries}")
    sizes = ("top_k", "temperature", "block_size", "batch_size", "shard_rows", "server_concurrency", "server_timeout")
    for name in sizes:
        if not getattr(options, name) > 0:
            raise UsageError(f"--{name} must be positive, not {getattr(options, name)}")
    if options.top_k > MAX_LISTED:
        raise UsageError(f"--top_k must be at most {MAX_LISTED}, not {options.top_k}")
    if not 0 < options.mlm_probability < 1:
        raise UsageError(f"--mlm_probability must lie between 0 and 1, not {options.mlm_probability}")
    if options.server and (options.temperature != 1 or options.objective == "masked" or options.gguf_file):
        wrong = "--temperature" if options.temperature != 1 else "--gguf_file" if options.gguf_file else "--objective"
        raise UsageError(f"{wrong} does not go with --server: a server answers for its causal model, at temperature 1")
    if options.server_offset not in (None, 0, 1):
        raise UsageError(f"--server_offset must be 0 or 1, not {options.server_offset}")
    file = Path(options.teacher)
    if file.suffix == ".gguf" and file.is_file():
        options.teacher, options.gguf_file = str(file.parent), file.name
    elif not options.gguf_file and not (file / "config.json").exists() and (files := sorted(file.glob("*.gguf"))):
        raise UsageError(f"--teacher {file} holds GGUF files: give --gguf_file {files[0].name}")
    return options


def write(options: Options, console: Console) -> None:
    """Everything; the folder is ready for load_from_disk when this returns."""
    folder, masked = Path(options.output), is_masked(options)
    settings: dict[str, Any] = {k: v for k, v in asdict(options).items() if k not in FREE}
    for name in ("teacher", "tokenizer"):
        settings[name] = settings[name] and Path(settings[name]).name
    settings["dataset"] = [Path(name).name for name in options.dataset]  # what they hold is checked by its checksum
    check(folder, settings)
    server = Server(options) if options.server else None

    data, collator = read(options, masked, console)
    data = data.with_format("numpy")
    known = survey(data)
    if options.rows == "labelled" and collator is None and "labels" not in data.column_names:
        raise UsageError(
            "--rows labelled needs a column labels: chat data, and text for a masked teacher, get one here"
        )
    settings["data_checksum"] = known.checksum
    check(folder, settings)
    console.print(f"[bold]Data[/bold]: {known.tokens:,} tokens in {known.rows:,} rows")
    who: Any
    answers: Answers
    if server:
        server.fit(known)
        who, what, answers = server.identity, f"{options.server_kind} server", server.answers
    else:
        who, what, answers = _local(options, masked, known, "position_ids" in data.column_names)
    settings["teacher_checksum"] = who
    check(folder, settings)
    console.print(f"[bold]Teacher[/bold]: {options.teacher}, {what}")

    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
    compact = options.logprobs_dtype != "float32"
    features = features_of(data, options.top_k, labels=collator is not None, compact=compact)
    count = -(-known.rows // options.shard_rows)
    shards = [folder / f"data-{i:05d}-of-{count:05d}.arrow" for i in range(count)]  # as save_to_disk names them

    def examples(part: range) -> Iterator[tuple[list[dict[str, Any]], list[Columns]]]:
        for batch, found in answers(batches(data, part, options.batch_size, collator)):
            best = [_wanted(row, each, masked, options) for row, each in zip(batch, found, strict=True)]
            yield [row | _stored(each, options) for row, each in zip(batch, best, strict=True)], best

    fill(shards, features, known.rows, examples, options, console)
    finish(folder, features, shards, settings)
    size = sum(shard.stat().st_size for shard in shards)
    each = f"{size / known.tokens:,.0f} bytes per token"
    console.print(f"[bold]Done[/bold]: {size / 1e9:,.2f} GB, {each}, in {folder}; read it with datasets.load_from_disk")
    if options.temperature != 1:
        at = f"{options.temperature:g}"
        console.print(f"Train with KDConfig(logprobs_temperature={at}), or fusedkd distil --logprobs_temperature {at}")


def fill(
    shards: list[Path], features: datasets.Features, rows: int, examples: Examples, options: Options, console: Console
) -> None:
    """Write those that are not there yet."""
    mass = listed = 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        bar = progress.add_task("rows", total=rows)
        for i, shard in enumerate(shards):
            part = range(i * options.shard_rows, min((i + 1) * options.shard_rows, rows))
            if shard.is_file():
                progress.advance(bar, len(part))
                continue
            partial = shard.with_suffix(".incomplete")
            with ArrowWriter(path=str(partial), features=features) as writer:
                for some, best in examples(part):
                    writer.write_batch({name: [example[name] for example in some] for name in features})
                    mass += sum(np.exp(each.logprobs, dtype=np.float64).sum() for each in best)
                    listed += sum(int((each.ids >= 0).any(1).sum()) for each in best)
                    share = f"rows (top {options.top_k} hold {mass / max(listed, 1):.1%})"
                    progress.update(bar, advance=len(some), description=share)
                writer.finalize()
            os.replace(partial, shard)


def _local(options: Options, masked: bool, known: Survey, position_ids: bool) -> tuple[Any, str, Answers]:
    """The teacher as a model here: its checksum, what it is, and its answers."""
    model = load(options, masked)
    fit(model, known, masked, options.top_k, position_ids)
    vocab = model.get_input_embeddings().weight.shape[0]
    what = f"{'masked' if masked else 'causal'} language model, {model.dtype}, vocabulary {vocab:,}"

    def answers(batches: Iterable[list[Row]]) -> Iterator[tuple[list[Row], Iterable[Columns]]]:
        return ((batch, top_k(model, batch, options.top_k, options.temperature)) for batch in batches)

    return checksum(model), what, answers


def _wanted(row: Row, found: Columns, masked: bool, options: Options) -> Columns:
    """With --rows labelled those alone."""
    if options.rows == "labelled":
        other = ~wanted(row, masked)
        found.ids[other], found.logprobs[other] = -1, -np.inf
    return found


def _stored(found: Columns, options: Options) -> dict[str, Any]:
    if options.logprobs_dtype == "float32":
        return {"teacher_ids": found.ids, "teacher_logprobs": found.logprobs}
    try:
        return {PACKED: encode(*found, bits=BITS[options.logprobs_dtype], temperature=options.temperature)}
    except ValueError as error:
        raise UsageError(f"what the teacher answers cannot be right: {error}") from error


def check(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse an output folder that holds anything but a run with these settings, as far as they are known."""
    file = folder / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise UsageError(
                    f"{folder} was begun with {name} {before.get(name)}, not {value}: choose another --output"
                )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something else (no settings.json): choose another --output")


def finish(folder: Path, features: datasets.Features, shards: list[Path], settings: dict[str, Any]) -> None:
    """The two JSON files that make a saved data set of the shards; that of an empty one, with their names put in."""
    empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features).with_format("numpy")
    empty.save_to_disk(folder / "empty")
    for file in sorted((folder / "empty").iterdir()):
        if file.name == "state.json":
            state = json.loads(file.read_text())
            state["_data_files"] = [{"filename": shard.name} for shard in shards]
            state["_fingerprint"] = datasets.fingerprint.Hasher.hash(settings)  # what caches of later maps go by
            file.write_text(json.dumps(state, indent=1))
        if file.suffix == ".json":
            os.replace(file, folder / file.name)
        else:
            file.unlink()
    (folder / "empty").rmdir()


def _replace(file: Path, text: str) -> None:
    temporary = file.with_suffix(".incomplete")
    temporary.write_text(text)
    os.replace(temporary, file)


if __name__ == "__main__":
    sys.exit(main())
