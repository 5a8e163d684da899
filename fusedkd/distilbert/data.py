"""From text to data sets: read, clean, train a tokenizer, count, order."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import BertTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.distilbert.config import TextOptions
from fusedkd.distilbert.documentation import documentation
from fusedkd.integrations.command import UsageError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ESCAPES = {" @-@ ": "-", " @,@ ": ",", " @.@ ": ".", "<unk>": "[UNK]"}  # of the word-level WikiText files

Text: TypeAlias = "datasets.Dataset | datasets.IterableDataset"

HELD_OUT = 20_000  # lines, at most
STREAM_HELD_OUT, STREAM_LINES, STREAM_BLOCKS = 1000, 100_000, 20_000  # what is read of a stream before training
SHUFFLED_TOKENS = 1 << 20


# ---- text


def read_text(options: TextOptions) -> tuple[Text, datasets.Dataset]:
    """The training and the held-out text: two data sets with one column, `text`; a stream for training if so asked.

    Held out is, of the documentation, every twentieth document; of other text, what the user names, its validation or
    test split, or its last 5 % (at most 20,000 lines). Of a stream it is 1000 lines, of any split or of the twentieth
    whose hash says so: a rule that holds however the stream is divided among processes.
    """
    if not (options.train_files or options.dataset):
        documents = documentation()
        held_out = documents[::20]
        del documents[::20]
        return tuple(datasets.Dataset.from_dict({"text": part}) for part in (documents, held_out))
    with reading(options):
        splits = load(options)
        train, held_out = splits["train"], splits.get("validation", splits.get("test"))
        if isinstance(train, datasets.IterableDataset):
            if held_out is None:
                held_out = train.filter(is_held, input_columns="text")
                train = train.filter(partial(is_held, wanted=False), input_columns="text")
            held_out = datasets.Dataset.from_list(list(held_out.take(STREAM_HELD_OUT)), features=held_out.features)
            first = list(train.take(1000))
        else:
            if held_out is None:
                cut = len(train) - min(max(len(train) // 20, 1), HELD_OUT)
                train, held_out = train.select(range(cut)), train.select(range(cut, len(train)))
            first = train.select(range(min(len(train), 1000)))
    if options.wikitext_escapes or any(" @-@ " in line["text"] for line in first):
        train, held_out = (split.map(unescape, input_columns="text") for split in (train, held_out))
    return train, held_out


def load(options: TextOptions) -> Any:
    """The splits of the text, each with one column, `text`."""
    if options.dataset:
        splits = datasets.load_dataset(options.dataset, options.dataset_config or None, streaming=options.streaming)
    else:
        files = {"train": options.train_files} | ({"validation": options.eval_files} if options.eval_files else {})
        splits = datasets.load_dataset("text", data_files=files, streaming=options.streaming)
    if "train" not in splits:
        raise UsageError(f"{options.dataset} has no train split (it has {', '.join(splits)})")
    columns = splits["train"].column_names or list(next(iter(splits["train"]), {}))  # a stream may not know them yet
    if options.text_column not in columns:
        raise UsageError(f"no column {options.text_column}: --text_column is one of {', '.join(columns)}")
    renaming = {} if options.text_column == "text" else {options.text_column: "text"}
    return {n: s.select_columns(options.text_column).rename_columns(renaming) for n, s in splits.items()}


@contextmanager
def reading(options: TextOptions) -> Iterator[None]:
    """One line for what can go wrong with files, folders and the hub."""
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UsageError(f"cannot read {options.dataset or 'the text files'}: {cause}") from error


def is_held(text: str, wanted: bool = True) -> bool:
    return (zlib.crc32(text.encode()) % 20 == 1) == wanted  # an empty line's is 0


def unescape(text: str) -> dict[str, str]:
    """Undo the escapes of the word-level WikiText files."""
    for escape, plain in ESCAPES.items():
        text = text.replace(escape, plain)
    return {"text": text}


# ---- tokens


def train_tokenizer(text: Text, vocab_size: int) -> Tokenizer:
    """An uncased WordPiece tokenizer with BERT's special tokens (of a stream, from its first 100,000 lines).

    `tokenizers` numbers the pieces differently each time, so they are numbered in alphabetical order here. (It breaks
    ties between equally frequent pieces differently, too; that stays.)
    """
    pieces = BertWordPieceTokenizer(lowercase=True)
    some = text.take(STREAM_LINES) if isinstance(text, datasets.IterableDataset) else text
    lines = (line.replace("[UNK]", " ") for batch in some.iter(batch_size=1000) for line in batch["text"])
    pieces.train_from_iterator(lines, vocab_size=vocab_size, special_tokens=[*SPECIAL], show_progress=False)
    tokens = [*SPECIAL, *sorted(pieces.get_vocab().keys() - set(SPECIAL))]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True)


def load_vocab(file: str) -> Tokenizer:
    """A tokenizer from a BERT vocab.txt, or .txt.gz: cased if any entry is."""
    try:
        content = gzip.decompress(Path(file).read_bytes()) if file.endswith(".gz") else Path(file).read_bytes()
        vocab = {token.strip(): i for i, token in enumerate(content.decode().rstrip("\n").split("\n"))}
    except (UnicodeDecodeError, OSError, EOFError):
        raise UsageError(f"{file} is no BERT vocabulary: it is not UTF-8 text") from None
    if missing := set(SPECIAL) - vocab.keys():
        raise UsageError(f"{file} is no BERT vocabulary: it lacks {' '.join(sorted(missing))}")
    cased = any(token != token.lower() for token in vocab.keys() - set(SPECIAL) if not token.startswith("[unused"))
    return BertTokenizer(vocab=vocab, do_lower_case=not cased)


def token_counts(blocks: Any, vocab_size: int) -> np.ndarray:
    """How often each id occurs, `[vocab_size]`; of a stream, in its first 20,000 blocks."""
    counts = np.zeros(vocab_size, np.int64)
    if isinstance(blocks, datasets.IterableDataset):
        blocks = blocks.take(STREAM_BLOCKS)
    for table in blocks.with_format("arrow").iter(batch_size=10_000):
        ids = table["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


# ---- order


class ByLength(torch.utils.data.Dataset[dict[str, Any]]):
    """Blocks in an order that brings those of like length together, a function of seed and epoch alone.

    Fifty batches' worth of random blocks are sorted by length; then the batches, of all ranks together, are shuffled.
    To be read in sequence, after `set_epoch`.
    """

    def __init__(self, blocks: datasets.Dataset, batch_size: int, seed: int):
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed
        self.lengths = blocks.with_format("numpy")["length"][:]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        draw = np.random.default_rng((self.seed, epoch))
        order, some = draw.permutation(len(self.lengths)), 50 * self.batch_size
        for part in (order[i : i + some] for i in range(0, len(order), some)):
            part[:] = part[np.argsort(self.lengths[part], kind="stable")]
        whole = len(order) // self.batch_size * self.batch_size
        draw.shuffle(order[:whole].reshape(-1, self.batch_size))
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.blocks.__getitems__(self.order[indices].tolist())

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.blocks[int(self.order[index])]


class Endless(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A stream over and over, shuffled anew each time: the Trainer counts no epochs of it, and resumes at any step.

    Each example has a field `epoch`, since the collator hears of none: the masks are other ones each time.
    """

    def __init__(self, stream: datasets.IterableDataset):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self.stream.set_epoch(epoch)
            example = None
            for example in self.stream:
                yield {**example, "epoch": epoch}
            if example is None:  # a worker without a share in the stream
                return


def in_order(blocks: Any, batch_size: int, seed: int) -> Any:
    """What the Trainer takes, with `TextOptions.trainer_arguments`: `batch_size` is that of all ranks together.

    A stream is shuffled through a buffer of a million tokens; packed blocks the Trainer draws at random itself.
    """
    if isinstance(blocks, datasets.IterableDataset):
        buffer = SHUFFLED_TOKENS // len(next(iter(blocks))["input_ids"])
        return Endless(blocks.shuffle(seed=seed, buffer_size=buffer))
    return ByLength(blocks, batch_size, seed) if "length" in blocks.column_names else blocks
