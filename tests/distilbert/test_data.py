"""Text, tokens and masks."""

# ruff: noqa: E402 (imports after importorskip)

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from .conftest import WORDS, sentences

datasets = pytest.importorskip("datasets")

from transformers import AutoTokenizer, Trainer, TrainingArguments

from fusedkd.distilbert.config import TextOptions
from fusedkd.distilbert.data import in_order, load_vocab, read_text, token_counts, train_tokenizer, unescape
from fusedkd.distilbert.documentation import documentation
from fusedkd.integrations.blocks import CausalCollator, Cut, MaskingCollator, by_length, pack
from fusedkd.integrations.command import UsageError


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


def test_a_data_set_of_the_hubs_form_with_configurations(tmp_path):
    """A card that names the files of each configuration, one parquet file a split."""
    folder = tmp_path / "wiki"
    card = "---\nconfigs:\n"
    for name, count in (("tiny-v1", 8), ("small-v1", 30)):
        (folder / name).mkdir(parents=True)
        card += f"- config_name: {name}\n  data_files:\n"
        for split, lines in (("train", sentences(count)), ("validation", sentences(4, 1)), ("test", ["unseen"])):
            datasets.Dataset.from_dict({"text": lines}).to_parquet(folder / name / f"{split}.parquet")
            card += f"  - split: {split}\n    path: {name}/{split}.parquet\n"
    (folder / "README.md").write_text(card + "---\n")
    for streaming in (False, True):
        options = TextOptions(dataset=str(folder), dataset_config="small-v1", streaming=streaming)
        train, held_out = read_text(options)
        assert isinstance(train, datasets.IterableDataset) == streaming
        assert [line["text"] for line in train] == sentences(30)
        assert list(held_out["text"]) == sentences(4, 1)
    with pytest.raises(UsageError, match="small-v1"):  # without a configuration, those there are
        read_text(TextOptions(dataset=str(folder)))


# ---- blocks


def test_roberta_blocks(roberta_tokenizer):
    lines = [*sentences(20), "the [UNK] cat"]
    blocks = pack(datasets.Dataset.from_dict({"text": lines}), roberta_tokenizer, 16, "training")["input_ids"]
    assert {(b[0], b[-1]) for b in blocks} == {(0, 2)}  # <s> ... </s>
    assert [len(b) for b in blocks[:-1]] == [16] * (len(blocks) - 1)
    assert roberta_tokenizer.decode([i for b in blocks for i in b[1:-1]]) == "".join(lines[:-1]) + "the <unk> cat"
    batch = MaskingCollator(roberta_tokenizer, np.ones(len(roberta_tokenizer), np.int64), 0.5, 0.7, 0)(
        [{"input_ids": blocks[0]}, {"input_ids": [0, 7, 2]}]
    )
    assert batch["input_ids"][1, 3:].unique().item() == roberta_tokenizer.pad_token_id == 1
    chosen = batch["labels"] != -100
    assert 0.6 < (batch["input_ids"][chosen] == roberta_tokenizer.mask_token_id).float().mean() < 1
    assert not np.isin(batch["labels"][chosen], roberta_tokenizer.all_special_ids).any()


def test_gpt2_blocks_and_batches(gpt2_tokenizer):
    """Documents end with the end-of-text token; there is no [CLS], and padding carries no label."""
    lines = ["", *sentences(20), "the [UNK] cat"]
    text = datasets.Dataset.from_dict({"text": lines})
    blocks = pack(text, gpt2_tokenizer, 16, "training")["input_ids"]
    assert [len(b) for b in blocks[:-1]] == [16] * (len(blocks) - 1)
    joined = gpt2_tokenizer.decode([i for b in blocks for i in b])
    assert joined == "".join(f"{line}<|endoftext|>" for line in [*lines[1:-1], "the <unk> cat"])
    batch = CausalCollator(gpt2_tokenizer)([{"input_ids": blocks[0], "length": 16}, {"input_ids": [5, 6, 0]}])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"][0].tolist() == batch["labels"][0].tolist() == blocks[0]
    assert batch["labels"][1].tolist() == [5, 6, 0] + [-100] * 13
    assert batch["attention_mask"].sum(1).tolist() == [16, 3]


def test_by_length_keeps_lines_apart_and_cuts_long_ones(tokenizer):
    lines = ["the cat", "", " ".join(WORDS), "a dog sees"]
    blocks = by_length(datasets.Dataset.from_dict({"text": lines}), tokenizer, 16, "training")
    assert blocks["length"] == [len(b) for b in blocks["input_ids"]] == [4, 16, len(WORDS) - 14 + 2, 5]
    assert " ".join(tokenizer.decode(b[1:-1]) for b in blocks["input_ids"]).split() == " ".join(lines).split()


def test_several_processes_make_the_same_blocks(tokenizer, text_files):
    train, _ = read_text(TextOptions(train_files=text_files))
    one, two = (by_length(train, tokenizer, 8, "training", num_proc) for num_proc in (1, 2))
    assert list(one["input_ids"]) == list(two["input_ids"])


# ---- what is kept


def test_text_is_tokenized_once(tmp_path, text_files, monkeypatch):
    """Also with the tokenizer read from a folder, and not with another block size."""
    tokenized, call = [], Cut.__call__
    monkeypatch.setattr(Cut, "__call__", lambda self, batch: tokenized.append(1) or call(self, batch))
    train, _ = read_text(TextOptions(train_files=text_files[:1]))
    tokenizer = train_tokenizer(train, 60)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    counts = token_counts(pack(train, tokenizer, 16, "training"), 60)
    assert tokenized
    tokenized.clear()
    again = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert np.array_equal(token_counts(pack(train, again, 16, "training"), 60), counts)
    assert not tokenized
    assert token_counts(pack(train, tokenizer, 8, "training"), 60).sum() > counts.sum()  # more [CLS]
    assert len(tokenized) == 1


# ---- streams and order


def test_a_stream_is_held_out_by_a_rule(tmp_path, text_files, tokenizer):
    """Nothing held out is trained on, however the stream is divided."""
    more = tmp_path / "more.txt"
    more.write_text("\n".join(sentences(150, seed=2)))
    train, held_out = read_text(TextOptions(train_files=[text_files[0], str(more)], streaming=True))
    shards = [[line["text"] for line in train.shard(2, i)] for i in range(2)]
    assert all(shards)
    assert sorted([*shards[0], *shards[1], *held_out["text"]]) == sorted(sentences(200) + sentences(150, seed=2))
    assert 5 < len(held_out) < 40
    blocks = pack(train, tokenizer, 16, "training")
    ids = [i for block in blocks for i in block["input_ids"]]
    assert np.array_equal(token_counts(blocks, 40), np.bincount(ids, minlength=40))
    assert len(train_tokenizer(train, 60)) == 60


def test_a_stream_with_eval_files_and_a_column_of_its_own(tmp_path, text_files, tokenizer):
    _, held_out = read_text(TextOptions(train_files=text_files[:1], eval_files=text_files[1:], streaming=True))
    assert list(held_out["text"]) == sentences(40, 1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(f'{{"body": "{s} @-@ a"}}' for s in sentences(90)))
    options = {"dataset": str(tmp_path / "set"), "streaming": True}
    train, held_out = read_text(TextOptions(text_column="body", **options))
    assert {*(line["text"] for line in train), *held_out["text"]} == {f"{s}-a" for s in sentences(90)}
    with pytest.raises(UsageError, match="no column text: --text_column is one of body"):
        read_text(TextOptions(**options))
    (tmp_path / "empty.txt").write_text("\n\n")
    train, _ = read_text(TextOptions(train_files=[str(tmp_path / "empty.txt")], streaming=True))
    with pytest.raises(UsageError, match="the training text is empty"):
        pack(train, tokenizer, 16, "training")


def test_batches_of_like_length(tokenizer):
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(WORDS, n)) for n in draw.integers(1, 60, 800)]
    blocks = by_length(datasets.Dataset.from_dict({"text": lines}), tokenizer, 64, "training")
    ordered = in_order(blocks, 8, seed=1)
    seen = ordered.order.copy()
    assert sorted(seen) == list(range(len(blocks)))
    assert ordered[3] == ordered.__getitems__([3])[0] == blocks[int(seen[3])]

    def padding(order: np.ndarray) -> float:
        rows = ordered.lengths[order].reshape(-1, 8)
        return 1 - rows.sum() / (rows.max(1, keepdims=True) * 8).sum()

    assert padding(seen) < 0.03 < 0.3 < padding(np.arange(len(blocks)))
    first_of_batches = ordered.lengths[seen].reshape(-1, 8)[:, 0]
    assert abs(np.corrcoef(first_of_batches, np.arange(len(first_of_batches)))[0, 1]) < 0.3  # short ones first: no
    ordered.set_epoch(1)
    assert not np.array_equal(ordered.order, seen)
    assert np.array_equal(in_order(blocks, 8, seed=1).order, seen)
    assert not np.array_equal(in_order(blocks, 8, seed=2).order, seen)


class Recorder(torch.nn.Module):
    """A model that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(())), []

    def forward(self, input_ids, attention_mask, labels):
        self.seen.append(input_ids.tolist())
        torch.rand(len(self.seen))  # as dropout does
        return {"loss": self.weight * input_ids.float().mean()}


@pytest.mark.parametrize("kind", ["packed", "by_length", "streaming"])
def test_a_resumed_trainer_sees_the_same_batches(kind, tmp_path, text_files, tokenizer):
    """Resumed in its second epoch, for all three kinds of data set."""
    sequences, streaming = ("packed", True) if kind == "streaming" else (kind, False)
    options = TextOptions(train_files=text_files[1:], sequences=sequences, streaming=streaming)
    cut = by_length if kind == "by_length" else pack
    text, _ = read_text(options)

    def train(checkpoint: Path | None) -> list:
        blocks = in_order(cut(text, tokenizer, 8, "training"), 4, seed=5)
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=30, per_device_train_batch_size=4, save_steps=22, report_to=[],
            remove_unused_columns=False, disable_tqdm=True, seed=5, use_cpu=True, **options.trainer_arguments,
        )  # fmt: skip
        model = Recorder()
        trainer = Trainer(model, arguments, CausalCollator(tokenizer), blocks)
        torch.rand(7 if checkpoint else 3)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return model.seen

    tokenizer.eos_token_id = tokenizer.pad_token_id
    whole = train(None)
    epoch = next(i for i in range(1, 30) if {str(r) for r in whole[i]} & {str(r) for b in whole[:i] for r in b})
    assert len(whole) == 30
    assert train(tmp_path / "out" / "checkpoint-22") == whole[22:]
    assert 5 < epoch < 22  # the checkpoint lies in the second epoch
    assert whole[:5] != whole[epoch : epoch + 5]
