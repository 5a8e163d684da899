"""From text to masked batches: read, clean, tokenize, pack, mask."""

import ast
import sysconfig
import zlib
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import BertTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.distilbert.config import TextOptions, UsageError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ESCAPES = {" @-@ ": "-", " @,@ ": ",", " @.@ ": ".", "<unk>": "[UNK]"}  # of the word-level WikiText files


# ---- text


def documentation() -> list[str]:
    """The language reference and the docstrings of the standard library, one document an entry, in a fixed order.

    Docstrings are read from the source; nothing is imported.
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "pydoc_data", "encodings", "idlelib", "lib2to3"}
    documents = [topics[name] for name in sorted(topics)]
    for file in sorted(library.rglob("*.py")):
        if skipped.intersection(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        documents += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in dict.fromkeys(" ".join(d.split()) for d in documents) if len(text) > 80]


def read_text(options: TextOptions) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training and the held-out text: two data sets with one column, `text`.

    Held out is, of the documentation, every twentieth document; of other text, what the user names, or its last 5 %.
    """
    if not (options.train_files or options.dataset):
        documents = documentation()
        held_out = documents[::20]
        del documents[::20]
        return tuple(datasets.Dataset.from_dict({"text": part}) for part in (documents, held_out))
    try:
        if options.dataset:
            splits = datasets.load_dataset(options.dataset, options.dataset_config)
        else:
            files = {"train": options.train_files} | ({"validation": options.eval_files} if options.eval_files else {})
            splits = datasets.load_dataset("text", data_files=files)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UsageError(f"cannot read {options.dataset or 'the text files'}: {cause}") from error
    if "train" not in splits:
        raise UsageError(f"{options.dataset} has no train split (it has {', '.join(splits)})")
    train = splits["train"]
    held_out = splits.get("validation", splits.get("test"))
    if options.text_column not in train.column_names:
        raise UsageError(f"no column {options.text_column}: --text_column is one of {', '.join(train.column_names)}")
    if held_out is None:
        cut = len(train) - max(len(train) // 20, 1)
        train, held_out = train.select(range(cut)), train.select(range(cut, len(train)))
    train, held_out = (
        split.select_columns(options.text_column).rename_columns(
            {} if options.text_column == "text" else {options.text_column: "text"}
        )
        for split in (train, held_out)
    )
    if options.wikitext_escapes or any(" @-@ " in line for line in train[:1000]["text"]):
        train, held_out = (split.map(unescape, input_columns="text") for split in (train, held_out))
    return train, held_out


def unescape(text: str) -> dict[str, str]:
    """Undo the escapes of the word-level WikiText files."""
    for escape, plain in ESCAPES.items():
        text = text.replace(escape, plain)
    return {"text": text}


# ---- tokens


def train_tokenizer(text: datasets.Dataset, vocab_size: int) -> Tokenizer:
    """An uncased WordPiece tokenizer with BERT's special tokens.

    `tokenizers` numbers the pieces differently each time, so they are numbered in alphabetical order here. (It breaks
    ties between equally frequent pieces differently, too; that stays.)
    """
    pieces = BertWordPieceTokenizer(lowercase=True)

    lines = (line.replace("[UNK]", " ") for batch in text.iter(batch_size=1000) for line in batch["text"])
    pieces.train_from_iterator(lines, vocab_size=vocab_size, special_tokens=[*SPECIAL], show_progress=False)
    tokens = [*SPECIAL, *sorted(pieces.get_vocab().keys() - set(SPECIAL))]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True)


def load_vocab(file: str) -> Tokenizer:
    """A tokenizer from a BERT vocab.txt: cased if any entry is."""
    try:
        vocab = {token: i for i, token in enumerate(Path(file).read_text(encoding="utf-8").splitlines())}
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no BERT vocabulary: it is not UTF-8 text") from None
    if missing := set(SPECIAL) - vocab.keys():
        raise UsageError(f"{file} is no BERT vocabulary: it lacks {' '.join(sorted(missing))}")
    cased = any(token != token.lower() for token in vocab.keys() - set(SPECIAL) if not token.startswith("[unused"))
    return BertTokenizer(vocab=vocab, do_lower_case=not cased)


def pack(text: datasets.Dataset, tokenizer: Tokenizer, block_size: int, what: str) -> datasets.Dataset:
    """Tokenize, join the lines and cut them into [CLS] ... [SEP] blocks; each thousand lines end with a shorter one."""
    body = block_size - 2

    def blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        lines = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = list(chain.from_iterable(lines))
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        return {"input_ids": [[cls, *ids[i : i + body], sep] for i in range(0, len(ids), body)]}

    packed = text.map(blocks, batched=True, remove_columns=text.column_names)
    if not len(packed):
        raise UsageError(f"the {what} text is empty")
    return packed


def token_counts(blocks: datasets.Dataset, vocab_size: int) -> np.ndarray:
    """How often each id occurs, `[vocab_size]`."""
    counts = np.zeros(vocab_size, np.int64)
    for table in blocks.with_format("arrow").iter(batch_size=10_000):
        ids = table["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


# ---- masks


class MaskingCollator:
    """Dynamic masking as DistilBERT was trained: rare tokens more often, p ~ count^-smoothing.

    Of each batch, ceil(mlm_probability * tokens) positions are drawn without replacement over the whole batch; 80 %
    become [MASK], 10 % a random token, 10 % stay. Special tokens are never drawn. Two differences from the published
    driver: random tokens are ordinary ones (there: any id), and the draw is a function of seed, epoch and batch, not of
    a running generator: the same for every student, for any number of workers, and after a resume.
    """

    def __init__(self, tokenizer: Tokenizer, counts: np.ndarray, mlm_probability: float, smoothing: float, seed: int):
        self.pad, self.mask = tokenizer.pad_token_id, tokenizer.mask_token_id
        self.mlm_probability, self.seed, self.epoch = mlm_probability, seed, 0
        self.weights = torch.from_numpy(np.maximum(counts, 1).astype(np.float64) ** -smoothing)
        self.weights[tokenizer.all_special_ids] = 0
        self.weights[len(tokenizer) :] = 0  # rows that only pad the teacher's vocabulary
        self.ordinary = self.weights.nonzero().squeeze(1)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.as_tensor(example["input_ids"]) for example in examples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        key = f"{self.seed} {self.epoch}".encode() + ids.numpy().tobytes()
        draw = torch.Generator().manual_seed(zlib.crc32(key))

        flat, weights = ids.flatten(), self.weights[ids.flatten()]
        wanted = int(np.ceil(self.mlm_probability * int(attention.sum())))
        chosen = weights.new_empty(0, dtype=torch.long)
        if count := min(wanted, int((weights > 0).sum())):
            chosen = torch.multinomial(weights, count, generator=draw)
        labels = torch.full_like(flat, -100)
        labels[chosen] = flat[chosen]
        fate = torch.rand(len(chosen), generator=draw)
        random = self.ordinary[torch.randint(len(self.ordinary), (len(chosen),), generator=draw)]
        flat[chosen] = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, random, flat[chosen]))
        return {"input_ids": flat.view_as(ids), "attention_mask": attention, "labels": labels.view_as(ids)}
