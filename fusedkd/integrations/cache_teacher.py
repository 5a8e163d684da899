"""An offline teacher: its top-k ids and log-probabilities at every position of a data set, computed once, on disk.

    python -m fusedkd.integrations.cache_teacher --teacher gpt2 --dataset train.txt --top_k 64 --output cache
    datasets.load_from_disk("cache")    # rows are NumPy arrays; memory-mapped, nothing is copied

A row of the result is a sequence of L tokens:

    input_ids, attention_mask (L,)      and labels or token_type_ids where the data has them, or masking here made them
    teacher_ids        (L, K) int32     columns by falling probability; −1 where there is none: at unattended positions,
                                        and past the last column that is not masked (−inf)
    teacher_logprobs   (L, K) float32   natural log of softmax(logits / temperature) over the teacher's whole vocabulary

What :class:`fusedkd.TeacherTopK` takes, with ``logprobs_temperature`` the temperature given here. Row i belongs to
logits position i: for a causal model it is the distribution of token i + 1. Log-probabilities are float32 because
float16 would save only a quarter of the disk, and its rounding of 2⁻¹² of log p shows in ``tail="bucket"``, which needs
1 − Σp.

Shards of --shard_rows sequences are written one after the other, each under its own name only once it is complete. A
run that was interrupted continues after the last one when it is started again with the same options; with others, other
data or another teacher it refuses. Of the logits one batch exists at a time.
"""

# ruff: noqa: RUF009 (`option` and `required` return dataclass fields)

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

try:
    import fusedkd.distilbert.data  # noqa: F401 (it needs all that the extra installs)
except ModuleNotFoundError as error:
    if __name__ != "__main__" or (error.name or "").startswith("fusedkd"):
        raise
    print(f'error: {error.name} is missing: cache_teacher needs pip install "fusedkd[train]"', file=sys.stderr)
    sys.exit(2)

import datasets
import numpy as np
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, HfArgumentParser
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.arguments import MAX_LISTED
from fusedkd.distilbert.config import UsageError, option
from fusedkd.distilbert.data import MaskingCollator, pack

TOKENIZED = ("input_ids", "attention_mask", "token_type_ids", "labels")


def required(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass
class Options:
    teacher: str = required("a causal or masked language model: a folder, or a name on the hub")
    dataset: list[str] = required(
        "text files; or a folder of save_to_disk; or a name or folder for datasets.load_dataset. One that has a column "
        "input_ids is taken as it is, row by row"
    )
    output: str = required("the folder to write, or to continue")
    top_k: int = option(64, "columns per position")
    temperature: float = option(1.0, "of the softmax; tails other than 'renormalize' need that of the training")
    tokenizer: str | None = option(None, "folder or name; None: the teacher's")
    block_size: int = option(512, "tokens per row into which text is packed (tokenized data stays as it is)")
    dataset_config: str | None = option(None, "configuration for datasets.load_dataset")
    split: str = option("train", "of a data set that has several")
    text_column: str = option("text", "column of the text, a document each")
    objective: Literal["auto", "causal", "masked"] = option("auto", "auto: what the teacher's config says it is")
    mlm_probability: float = option(0.15, "masked teachers on text: share of tokens masked, once and for all")
    seed: int = option(0, "of those masks")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of the teacher; auto: as it was saved")
    batch_size: int = option(8, "rows per forward pass")
    shard_rows: int = option(1024, "rows per shard: what an interruption can cost")


FREE = ("output", "batch_size")  # may change between two runs in the same folder


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
    parser = HfArgumentParser(
        Options,  # type: ignore[arg-type]
        prog="python -m fusedkd.integrations.cache_teacher",
        usage="%(prog)s --teacher NAME --dataset NAME [NAME ...] --output FOLDER [options]",
        description="Write a teacher's top-k log-probabilities at every position of a data set to disk.",
    )
    (options,) = parser.parse_args_into_dataclasses(argv)
    for name in ("top_k", "temperature", "block_size", "batch_size", "shard_rows"):
        if not getattr(options, name) > 0:
            raise UsageError(f"--{name} must be positive, not {getattr(options, name)}")
    if options.top_k > MAX_LISTED:
        raise UsageError(f"--top_k must be at most {MAX_LISTED}, not {options.top_k}")
    if not 0 < options.mlm_probability < 1:
        raise UsageError(f"--mlm_probability must lie between 0 and 1, not {options.mlm_probability}")
    return options


# ---- data


def read(options: Options, masked: bool) -> tuple[datasets.Dataset, MaskingCollator | None]:
    """Tokenized rows, and what masks them if they are text for a masked model."""
    names, first = options.dataset, Path(options.dataset[0])
    files = all(Path(name).is_file() for name in names)
    if not files and len(names) > 1:
        raise UsageError(f"no such file: {next(name for name in names if not Path(name).is_file())}")
    try:
        if files:
            data = datasets.load_dataset("text", data_files=names, split="train", keep_linebreaks=not masked)
        elif (first / "state.json").is_file() or (first / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(first)
        else:
            data = datasets.load_dataset(names[0], options.dataset_config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"cannot read --dataset {names[0]}: {_line(error)}") from error
    if isinstance(data, dict):
        if options.split not in data:
            raise UsageError(f"--dataset has no split {options.split}: --split is one of {', '.join(data)}")
        data = data[options.split]
    if "input_ids" in data.column_names:
        per_token = [name for name in TOKENIZED if not isinstance(data.features.get(name), datasets.Value | None)]
        return data.select_columns(per_token), None
    if options.text_column not in data.column_names:
        raise UsageError(f"no column {options.text_column}: --text_column is one of {', '.join(data.column_names)}")
    tokenizer = pretrained(AutoTokenizer, options.tokenizer or options.teacher, "the tokenizer")
    text = data.select_columns(options.text_column).filter(bool, input_columns=options.text_column)
    if not masked:
        return pack_documents(text, tokenizer, options.block_size, whole=not files), None
    if tokenizer.mask_token_id is None:
        raise UsageError(f"a masked teacher needs a tokenizer with a mask token, which {tokenizer.name_or_path} lacks")
    text = text.rename_columns({} if options.text_column == "text" else {options.text_column: "text"})
    counts = np.ones(len(tokenizer))
    collator = MaskingCollator(tokenizer, counts, options.mlm_probability, smoothing=0.0, seed=options.seed)
    return pack(text, tokenizer, options.block_size, "given"), collator


def pack_documents(text: datasets.Dataset, tokenizer: Tokenizer, size: int, whole: bool) -> datasets.Dataset:
    """Tokenize, join and cut into blocks; each thousand documents end with a shorter one. `whole` documents get the
    tokenizer's special tokens and end with its end-of-sequence token; lines of a file follow each other as they stand.
    """
    eos = [tokenizer.eos_token_id] if whole and tokenizer.eos_token_id is not None else []

    def blocks(documents: list[str]) -> dict[str, list[list[int]]]:
        tokens = tokenizer(documents, add_special_tokens=whole, verbose=False)["input_ids"]
        ids = list(chain.from_iterable(t if t[-1:] == eos else t + eos for t in tokens))
        return {"input_ids": [ids[i : i + size] for i in range(0, len(ids), size)]}

    (column,) = text.column_names
    return text.map(blocks, batched=True, input_columns=column, remove_columns=column)


def batches(
    data: datasets.Dataset, rows: range, batch_size: int, collator: MaskingCollator | None
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Lists of rows, complete with attention mask, masked (each by itself, so that no batch size changes the masks)."""
    for start in range(rows.start, rows.stop, batch_size):
        batch = [data[i] for i in range(start, min(start + batch_size, rows.stop))]
        if collator is not None:
            batch = [{k: v[0].numpy() for k, v in collator([row]).items()} for row in batch]
        yield [{"attention_mask": np.ones(len(row["input_ids"]), np.int8)} | row for row in batch]


# ---- teacher


def pretrained(kind: Any, name: str, what: str, **more: Any) -> Any:
    try:
        return kind.from_pretrained(name, **more)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load {what} {name}: {_line(error)}") from error


def is_masked(options: Options) -> bool:
    if options.objective != "auto":
        return options.objective == "masked"
    name = (pretrained(AutoConfig, options.teacher, "--teacher").architectures or ["unknown"])[0]
    if "MaskedLM" in name or "ForPreTraining" in name:
        return True
    if "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name:
        return False
    raise UsageError(f"cannot tell what kind of language model {name} is: give --objective causal or masked")


def load(options: Options, masked: bool) -> Any:
    kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    several = {"device_map": "auto"} if torch.accelerator.is_available() else {}  # all the devices there are
    model = pretrained(kind, options.teacher, "--teacher", dtype=options.dtype, **several)
    model.config.use_cache = False
    return model.eval()


@torch.inference_mode()
def top_k(
    model: Any, batch: list[dict[str, np.ndarray]], k: int, temperature: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and log-probabilities ``(L, K)`` of each row, from one forward pass over all, padded on the right."""

    def padded(name: str) -> Tensor:
        rows = [torch.as_tensor(row[name]).long() for row in batch]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)

    inputs = {name: padded(name) for name in TOKENIZED[:3] if name in batch[0]}
    logits = model(**inputs).logits
    for row, z in zip(batch, logits, strict=True):
        z = z[: len(row["input_ids"])]
        logprobs, ids = torch.log_softmax(z.float() / temperature, dim=-1).topk(k)
        attended = torch.as_tensor(row["attention_mask"]).bool().to(z.device)
        if logprobs[attended].isnan().any():
            raise UsageError(f"the teacher's logits hold NaN or infinity: --dtype {z.dtype} may be too narrow for it")
        ids = ids.masked_fill((logprobs == -torch.inf) | ~attended[:, None], -1)
        yield ids.to(torch.int32).cpu().numpy(), logprobs.masked_fill(ids < 0, -torch.inf).cpu().numpy()


# ---- folder


def write(options: Options, console: Console) -> None:
    """Everything; the folder is ready for load_from_disk when this returns."""
    folder, masked = Path(options.output), is_masked(options)
    settings: dict[str, Any] = {k: v for k, v in asdict(options).items() if k not in FREE}
    for name in ("teacher", "tokenizer"):
        settings[name] = settings[name] and Path(settings[name]).name
    settings["dataset"] = [Path(name).name for name in options.dataset]  # what they hold is checked by its checksum
    check(folder, settings)

    data, collator = read(options, masked)
    data = data.with_format("numpy")
    rows, tokens, longest, largest, settings["data_checksum"] = survey(data)
    check(folder, settings)
    console.print(f"[bold]Data[/bold]: {tokens:,} tokens in {rows:,} rows")
    model = load(options, masked)
    vocab = model.get_input_embeddings().weight.shape[0]
    if largest >= vocab:
        raise UsageError(f"the data holds the id {largest}, but the teacher has {vocab} tokens: another tokenizer?")
    if options.top_k > vocab:
        raise UsageError(f"--top_k must be at most the teacher's vocabulary of {vocab}, not {options.top_k}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > positions:
        raise UsageError(f"a row has {longest} tokens, but the teacher {positions} positions: see --block_size")
    settings["teacher_checksum"] = checksum(model)
    check(folder, settings)
    kind = f"{'masked' if masked else 'causal'} language model"
    console.print(f"[bold]Teacher[/bold]: {options.teacher}, {kind}, {model.dtype}, vocabulary {vocab:,}")

    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
    features = features_of(data, options.top_k, labels=collator is not None)
    count = -(-rows // options.shard_rows)
    shards = [folder / f"data-{i:05d}-of-{count:05d}.arrow" for i in range(count)]  # as save_to_disk names them
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
                for batch in batches(data, part, options.batch_size, collator):
                    known = top_k(model, batch, options.top_k, options.temperature)
                    examples = [
                        row | {"teacher_ids": ids, "teacher_logprobs": logprobs}
                        for row, (ids, logprobs) in zip(batch, known, strict=True)
                    ]
                    writer.write_batch({name: [example[name] for example in examples] for name in features})
                    listed = np.exp(np.concatenate([example["teacher_logprobs"] for example in examples])).sum(-1)
                    share = f"rows (top {options.top_k} hold {listed[listed > 0].mean():.1%})"
                    progress.update(bar, advance=len(batch), description=share)
                writer.finalize()
            os.replace(partial, shard)
    finish(folder, features, shards, settings)
    size = sum(shard.stat().st_size for shard in shards)
    console.print(f"[bold]Done[/bold]: {size / 1e9:,.2f} GB in {folder}; read it with datasets.load_from_disk")


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


def survey(data: datasets.Dataset) -> tuple[int, int, int, int, int]:
    """Rows, tokens, the longest row, the largest id, and a checksum of all ids and of where the rows end."""
    tokens, longest, largest, crc = 0, 0, 0, 0
    for batch in data.with_format("arrow").iter(batch_size=10_000):
        ids = batch["input_ids"].combine_chunks()
        flat = ids.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        lengths = ids.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        tokens, longest = tokens + len(flat), max(longest, int(lengths.max(initial=0)))
        largest = max(largest, int(flat.max(initial=0)))
        crc = zlib.crc32(lengths.tobytes(), zlib.crc32(flat.tobytes(), crc))
    if not tokens:
        raise UsageError("--dataset is empty")
    return len(data), tokens, longest, largest, crc


def checksum(model: torch.nn.Module) -> int:
    """Of the beginning of every parameter, which tells a teacher from a later version of it."""
    crc = 0
    for parameter in model.parameters():
        crc = zlib.crc32(parameter.detach().flatten()[:1024].float().cpu().numpy().tobytes(), crc)
    return crc


def features_of(data: datasets.Dataset, k: int, labels: bool) -> datasets.Features:
    names = dict.fromkeys([*data.column_names, "attention_mask", *(["labels"] if labels else [])])
    tokens = {name: datasets.List(datasets.Value("int8" if name == "attention_mask" else "int32")) for name in names}
    columns = {"teacher_ids": datasets.Array2D((None, k), "int32")}
    return datasets.Features(tokens | columns | {"teacher_logprobs": datasets.Array2D((None, k), "float32")})


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


def _line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
