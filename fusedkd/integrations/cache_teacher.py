"""An offline teacher: its top-k ids and log-probabilities at every position of a data set, computed once, on disk.

    python -m fusedkd.integrations.cache_teacher --teacher gpt2 --dataset train.txt --top_k 64 --output cache
    datasets.load_from_disk("cache")    # rows are NumPy arrays; memory-mapped, nothing is copied

A row of the result is a sequence of L tokens:

    input_ids, attention_mask (L,)      and every other list of numbers that the data has: labels, token_type_ids,
                                        position_ids, completion_mask; text for a masked teacher gets labels here
    teacher_ids        (L, K) int32     columns by falling probability; −1 where there is none: at unattended positions,
                                        and past the last column that is not masked (−inf)
    teacher_logprobs   (L, K) float32   natural log of softmax(logits / temperature) over the teacher's whole vocabulary

What :class:`fusedkd.TeacherTopK` takes, with ``logprobs_temperature`` the temperature given here. Row i belongs to
logits position i: for a causal model it is the distribution of token i + 1. Where position_ids start again within a
row, documents are packed: none sees another. Beside position_ids no attention_mask is added, for a causal model of
transformers keeps documents apart only without one. Log-probabilities are float32 because float16 would save only a
quarter of the disk, and its rounding of 2⁻¹² of log p shows in ``tail="bucket"``, which needs 1 − Σp.

Shards of --shard_rows sequences are written one after the other, each under its own name only once it is complete. A
run that was interrupted continues after the last one when it is started again with the same options; with others, other
data or another teacher it refuses. Of the logits one batch exists at a time.
"""

# ruff: noqa: RUF009 (`option` and `required` return dataclass fields)

from __future__ import annotations

import inspect
import json
import os
import sys
import zlib
from collections.abc import Iterator
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
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, HfArgumentParser

from fusedkd.checks import MAX_LISTED
from fusedkd.integrations.cache_data import Row, Survey, batches, documents, features_of, pretrained, read, survey
from fusedkd.integrations.command import UsageError, option

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


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


# ---- teacher


def is_masked(options: Options) -> bool:
    if options.objective != "auto":
        return options.objective == "masked"
    name = (pretrained(AutoConfig, options.teacher, "--teacher").architectures or ["unknown"])[0]
    if "MaskedLM" in name or "ForPreTraining" in name:
        return True
    if "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name:
        return False
    raise UsageError(f"cannot tell what kind of language model {name} is: give --objective causal or masked")


def fit(model: Any, data: Survey, masked: bool, k: int, position_ids: bool) -> None:
    """Refuse data that the teacher was not made for."""
    vocab = model.get_input_embeddings().weight.shape[0]
    if data.largest_id >= vocab:
        raise UsageError(
            f"the data holds the id {data.largest_id}, but the teacher has {vocab} tokens: another tokenizer?"
        )
    if k > vocab:
        raise UsageError(f"--top_k must be at most the teacher's vocabulary of {vocab}, not {k}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or data.positions
    if data.positions > positions and position_ids:
        raise UsageError(f"position_ids go up to {data.positions - 1}, but the teacher has {positions} positions")
    if data.positions > positions:
        raise UsageError(f"a row has {data.positions} tokens, but the teacher {positions} positions: see --block_size")
    if position_ids and "position_ids" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"the data has position_ids, which the teacher, a {type(model).__name__}, does not take")
    if data.packed and masked:
        raise UsageError(
            "position_ids that start again within a row mark packed documents, which masked models of transformers do "
            "not keep apart: give one document per row"
        )


def load(options: Options, masked: bool) -> Any:
    kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    several = {"device_map": "auto"} if torch.accelerator.is_available() else {}  # all the devices there are
    model = pretrained(kind, options.teacher, "--teacher", dtype=options.dtype, **several)
    model.config.use_cache = False
    return model.eval()


@torch.inference_mode()
def top_k(model: Any, batch: list[Row], k: int, temperature: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and log-probabilities ``(L, K)`` of each row. A forward pass takes as many documents as the batch has rows,
    padded on the right, so that none sees another, whatever the model makes of position_ids.
    """
    taken = inspect.signature(getattr(model, "forward", model)).parameters
    names = [name for name in MODEL_INPUTS if name in batch[0] and name in taken]
    pieces = [(i, span) for i, row in enumerate(batch) for span in documents(row)]
    all_ids = [np.full((len(row["input_ids"]), k), -1, np.int32) for row in batch]
    all_logprobs = [np.full(ids.shape, -np.inf, np.float32) for ids in all_ids]
    for start in range(0, len(pieces), len(batch)):
        some = pieces[start : start + len(batch)]
        rows = {name: [torch.as_tensor(batch[i][name][span]).long() for i, span in some] for name in names}
        inputs = {name: pad_sequence(rows[name], batch_first=True).to(model.device) for name in names}
        for (i, span), z in zip(some, model(**inputs).logits, strict=True):
            z = z[: span.stop - span.start]
            logprobs, ids = torch.log_softmax(z.float() / temperature, dim=-1).topk(k)
            attended = torch.as_tensor(batch[i]["attention_mask"][span]).bool().to(z.device)
            if logprobs[attended].isnan().any():
                raise UsageError(f"the teacher's logits hold NaN or infinity: is --dtype {z.dtype} too narrow for it?")
            ids = ids.masked_fill((logprobs == -torch.inf) | ~attended[:, None], -1)
            all_ids[i][span] = ids.cpu().numpy()
            all_logprobs[i][span] = logprobs.masked_fill(ids < 0, -torch.inf).cpu().numpy()
    yield from zip(all_ids, all_logprobs, strict=True)


# ---- folder


def write(options: Options, console: Console) -> None:
    """Everything; the folder is ready for load_from_disk when this returns."""
    folder, masked = Path(options.output), is_masked(options)
    settings: dict[str, Any] = {k: v for k, v in asdict(options).items() if k not in FREE}
    for name in ("teacher", "tokenizer"):
        settings[name] = settings[name] and Path(settings[name]).name
    settings["dataset"] = [Path(name).name for name in options.dataset]  # what they hold is checked by its checksum
    check(folder, settings)

    data, collator = read(options, masked, console)
    data = data.with_format("numpy")
    known = survey(data)
    settings["data_checksum"] = known.checksum
    check(folder, settings)
    console.print(f"[bold]Data[/bold]: {known.tokens:,} tokens in {known.rows:,} rows")
    model = load(options, masked)
    fit(model, known, masked, options.top_k, "position_ids" in data.column_names)
    settings["teacher_checksum"] = checksum(model)
    check(folder, settings)
    kind = f"{'masked' if masked else 'causal'} language model, {model.dtype}"
    vocab = model.get_input_embeddings().weight.shape[0]
    console.print(f"[bold]Teacher[/bold]: {options.teacher}, {kind}, vocabulary {vocab:,}")

    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
    features = features_of(data, options.top_k, labels=collator is not None)
    count, rows = -(-known.rows // options.shard_rows), known.rows
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
                    best = top_k(model, batch, options.top_k, options.temperature)
                    examples = [
                        row | {"teacher_ids": ids, "teacher_logprobs": logprobs}
                        for row, (ids, logprobs) in zip(batch, best, strict=True)
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
    if options.temperature != 1:
        console.print(f"Train with KDConfig(logprobs_temperature={options.temperature:g}), as the cache has it")


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


def checksum(model: torch.nn.Module) -> int:
    """Of the beginning of every parameter, which tells a teacher from a later version of it."""
    crc = 0
    for parameter in model.parameters():
        crc = zlib.crc32(parameter.detach().flatten()[:1024].float().cpu().numpy().tobytes(), crc)
    return crc


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
