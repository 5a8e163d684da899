"""Text, tokens and masks."""

# ruff: noqa: E402 (imports after importorskip)

import gzip
import math

import numpy as np
import pytest
import torch

from .conftest import WORDS, sentences

datasets = pytest.importorskip("datasets")

from fusedkd.distilbert.config import TextOptions, UsageError
from fusedkd.distilbert.data import (
    MaskingCollator,
    documentation,
    load_vocab,
    pack,
    read_text,
    token_counts,
    train_tokenizer,
    unescape,
)


def test_documentation_is_english_in_a_fixed_order():
    documents = documentation()
    assert sum(map(len, documents)) > 1_000_000
    assert len(set(documents)) == len(documents)
    assert not any("\n" in d for d in documents)


def test_pack_keeps_every_token_in_order_and_counts_them(tokenizer):
    lines = ["", *sentences(50), "", "the cat"]
    blocks = pack(datasets.Dataset.from_dict({"text": lines}), tokenizer, 16, "training")
    ids = blocks["input_ids"]
    assert all(b[0] == tokenizer.cls_token_id and b[-1] == tokenizer.sep_token_id for b in ids)
    assert all(len(b) == 16 for b in ids[:-1])
    assert 2 < len(ids[-1]) <= 16
    assert " ".join(tokenizer.decode(b[1:-1]) for b in ids).split() == " ".join(lines).split()
    flat = np.concatenate([np.array(b) for b in ids])
    assert np.array_equal(token_counts(blocks, 40), np.bincount(flat, minlength=40))


def test_empty_text_is_refused(tokenizer):
    with pytest.raises(UsageError, match="held-out text is empty"):
        pack(datasets.Dataset.from_dict({"text": ["", " "]}), tokenizer, 16, "held-out")


def test_trained_tokenizer_survives_saving_and_learns_no_escape(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(datasets.Dataset.from_dict({"text": ["[UNK] the cat [UNK] sees"] * 20}), 60)
    assert "unk" not in tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path / "tok")
    again = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert again("The [UNK] cat").input_ids == tokenizer("the [UNK] cat").input_ids
    assert again("the [UNK]").input_ids[2] == again.unk_token_id
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_trained_vocabulary_is_numbered_in_a_fixed_order():
    vocab = train_tokenizer(datasets.Dataset.from_dict({"text": sentences(100)}), 80).get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    assert list(vocab[t] for t in tokens) == list(range(len(vocab)))
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokens[5:] == sorted(tokens[5:])


def test_vocab_file(tmp_path):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    assert load_vocab(str(tmp_path / "vocab.txt"))("The cat").input_ids == [2, 5, 7, 3]
    (tmp_path / "cased.txt").write_text("\n".join([*special, "the", "The"]) + "\n")
    assert load_vocab(str(tmp_path / "cased.txt"))("The the").input_ids == [2, 6, 5, 3]
    (tmp_path / "bad.txt").write_text("the\n")
    with pytest.raises(UsageError, match="no BERT vocabulary"):
        load_vocab(str(tmp_path / "bad.txt"))


def test_wikitext_escapes_are_undone_where_they_are_found(tmp_path):
    assert unescape("<unk> plays a 1 @,@ 5 @.@ 2 role @-@ play")["text"] == "[UNK] plays a 1,5.2 role-play"
    file = tmp_path / "wiki.txt.gz"
    with gzip.open(file, "wt") as out:
        out.write("\n".join(["the role @-@ playing <unk> cat"] * 40))
    train, held_out = read_text(TextOptions(train_files=[str(file)]))
    assert (len(train), len(held_out)) == (38, 2)  # the last 5 % are held out
    assert set(train["text"]) == {"the role-playing [UNK] cat"}


def test_data_set_folder_and_its_column(tmp_path):
    (tmp_path / "set").mkdir()
    for split, count in (("train", 30), ("test", 5)):
        rows = "\n".join(f'{{"body": "{s}", "id": 1}}' for s in sentences(count))
        (tmp_path / "set" / f"{split}.jsonl").write_text(rows)
    train, held_out = read_text(TextOptions(dataset=str(tmp_path / "set"), text_column="body"))
    assert train.column_names == held_out.column_names == ["text"]
    assert (len(train), len(held_out)) == (30, 5)
    with pytest.raises(UsageError, match="no column text: --text_column is one of body, id"):
        read_text(TextOptions(dataset=str(tmp_path / "set")))


def masked_batches(tokenizer, rounds: int, probability: float = 0.15):
    lines = datasets.Dataset.from_dict({"text": sentences(300)})
    blocks = pack(lines, tokenizer, 32, "training")
    counts = token_counts(blocks, len(tokenizer))
    collator = MaskingCollator(tokenizer, counts, probability, 0.7, seed=3)
    examples = [blocks[i] for i in range(len(blocks))]
    plain = collator.__class__(tokenizer, counts, 1e-9, 0.7, 0)(examples)
    original = plain["input_ids"].where(plain["labels"] == -100, plain["labels"])
    for epoch in range(rounds):
        collator.epoch = epoch
        yield counts, original, collator(examples)


def test_masking_statistics_follow_the_published_recipe(tokenizer):
    masked = random = kept = total = 0
    for _, original, batch in masked_batches(tokenizer, 60):
        chosen = batch["labels"] != -100
        assert int(chosen.sum()) == math.ceil(0.15 * int(batch["attention_mask"].sum()))
        assert torch.equal(batch["labels"][chosen], original[chosen])
        assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
        assert not np.isin(original[chosen].numpy(), tokenizer.all_special_ids).any()
        new = batch["input_ids"][chosen]
        replaced = (new != tokenizer.mask_token_id) & (new != original[chosen])
        assert not np.isin(new[replaced].numpy(), tokenizer.all_special_ids).any()
        masked += int((new == tokenizer.mask_token_id).sum())
        random += int(replaced.sum())
        kept += int((new == original[chosen]).sum())
        total += int(chosen.sum())
    assert masked / total == pytest.approx(0.8, abs=0.01)
    words = len(WORDS)
    assert random / total == pytest.approx(0.1 * (words - 1) / words, abs=0.01)
    assert kept / total == pytest.approx(0.1 + 0.1 / words, abs=0.01)


def test_rare_tokens_are_masked_more_often(tokenizer):
    """p ~ count^-0.7: the share of a token's occurrences that is drawn falls with that power.

    Few are drawn here, because drawing without replacement flattens it.
    """
    drawn = torch.zeros(len(tokenizer), dtype=torch.float64)
    for counts, _, batch in masked_batches(tokenizer, 300, probability=0.03):  # noqa: B007
        drawn += torch.bincount(batch["labels"][batch["labels"] != -100], minlength=len(tokenizer))
    words = slice(5, None)
    share = drawn[words].numpy() / counts[words]
    slope = np.polyfit(np.log(counts[words]), np.log(share), 1)[0]
    assert slope == pytest.approx(-0.7, abs=0.04)


def test_masks_depend_on_seed_epoch_and_batch_only(tokenizer):
    (_, _, first), (_, _, second) = masked_batches(tokenizer, 2)
    torch.manual_seed(99)
    again = next(iter(masked_batches(tokenizer, 1)))[2]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["labels"], second["labels"])


def test_padding_is_neither_attended_nor_masked(tokenizer):
    counts = np.ones(len(tokenizer), np.int64)
    rows = [{"input_ids": [2, 7, 8, 9, 10, 3]}, {"input_ids": [2, 6, 3]}]
    batch = MaskingCollator(tokenizer, counts, 0.9, 0.7, seed=0)(rows)
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert (batch["labels"] != -100).sum() == 5  # wanted: ceil(0.9 * 9); there are five ordinary tokens
    assert batch["labels"][1].tolist() == [-100, 6, -100, -100, -100, -100]
