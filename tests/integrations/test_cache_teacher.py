"""`python -m fusedkd.integrations.cache_teacher`: what it writes is the teacher's log-softmax, and nothing is lost."""

import copy
import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fusedkd.integrations import cache_teacher
from fusedkd.integrations.cache_data import opened, pack_documents
from fusedkd.integrations.command import UsageError

WORDS = ("the a cat dog bird sees hears follows small big red old house river on under near and then").split()  # noqa: SIM905
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZE |= {"vocab_size": len(VOCAB), "max_position_embeddings": 64, "initializer_range": 0.5}


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    datasets.disable_progress_bars()  # what a test saves itself would show beside the command's own lines
    transformers.logging.disable_progress_bar()


def teacher(seed: int = 0, masked: bool = False) -> LlamaForCausalLM | BertForMaskedLM:
    torch.manual_seed(seed)
    return (BertForMaskedLM(BertConfig(**SIZE)) if masked else LlamaForCausalLM(LlamaConfig(**SIZE))).eval()


def saved(model, path) -> str:
    """A teacher with its tokenizer; their folder."""
    model.save_pretrained(path)
    BertTokenizer(vocab={word: i for i, word in enumerate(VOCAB)}).save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return lambda model: saved(model, tmp_path / "teacher")


@pytest.fixture
def text_file(tmp_path) -> str:
    draw = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (9,), generator=draw)) for _ in range(20)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "text.txt")


def tokenized(path, rows: int = 7, **columns) -> str:
    """Rows of different lengths, the last padded."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, len(VOCAB), (4 + 3 * (i % 4),), generator=draw).tolist() for i in range(rows)]
    mask = [[1] * len(row) for row in ids]
    mask[-1][-2:] = [0, 0]
    datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": mask, **columns}).save_to_disk(path)
    return str(path)


def run(model: str, data: str, out, *more: str) -> int:
    """In the plain form, unless another is asked for."""
    words = ["--teacher", model, "--dataset", data, "--output", str(out), "--logprobs_dtype", "float32"]
    return cache_teacher.main([*words, *map(str, more)])


def log_softmax(model, row, temperature: float) -> torch.Tensor:
    """The truth, of one sequence by itself: float64 ``(L, V)``."""
    inputs = {name: torch.as_tensor(row[name])[None].long() for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return (model(**inputs).logits[0].double() / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_values_are_the_teachers(masked, temperature, folder, tmp_path):
    """As near to a float64 teacher as its float32 pass over a sequence by itself: a batch rounds otherwise."""
    model = teacher(masked=masked)
    exact = copy.deepcopy(model).double()
    labels = [[i] * (4 + 3 * (i % 4)) for i in range(7)]
    data = tokenized(tmp_path / "data", labels=labels)
    more = ("--top_k", 5, "--temperature", temperature, "--batch_size", 3, "--shard_rows", 4)
    assert run(folder(model), data, tmp_path / "out", *more) == 0

    source, cached = datasets.load_from_disk(data), datasets.load_from_disk(tmp_path / "out")
    assert len(cached) == len(source) == 7
    ids, logprobs = (cached.features[name] for name in ("teacher_ids", "teacher_logprobs"))
    assert (ids.dtype, logprobs.dtype) == ("int32", "float32")
    for before, row in zip(source, cached, strict=True):
        for name in ("input_ids", "attention_mask", "labels"):
            assert row[name].tolist() == before[name]
        attended = torch.tensor(before["attention_mask"]).bool()
        truth, rounded = (log_softmax(each, before, temperature)[attended] for each in (exact, model))
        expected, rounding = truth.topk(5), (rounded - truth).abs().max().item()
        assert row["teacher_ids"].shape == row["teacher_logprobs"].shape == (len(before["input_ids"]), 5)
        assert torch.equal(torch.from_numpy(row["teacher_ids"])[attended], expected.indices)
        torch.testing.assert_close(
            torch.from_numpy(row["teacher_logprobs"])[attended].double(), expected.values, rtol=0, atol=3 * rounding
        )
        assert (row["teacher_ids"][~attended.numpy()] == -1).all()


def test_masked_columns_and_broken_teachers():
    """A column at −inf is no column; NaN is an error, but not at a position that nobody attends to."""
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    logits[0, 1, 2:] = -torch.inf
    logits[1, 2] = torch.nan

    def model(input_ids, attention_mask):
        return SimpleNamespace(logits=logits)

    model.device = "cpu"
    rows = [{"input_ids": np.zeros(3), "attention_mask": np.array(mask)} for mask in ([1, 1, 1], [1, 1, 0])]
    (ids, logprobs), (padded, _) = cache_teacher.top_k(model, rows, 4, 1.0)
    assert sorted(ids[1][:2]) == [0, 1]
    assert (ids[1][2:] == -1).all()
    assert (ids[[0, 2]] >= 0).all()
    assert np.exp(logprobs[1]).sum() == pytest.approx(1)
    assert (padded[2] == -1).all()
    rows[1]["attention_mask"][2] = 1
    with pytest.raises(UsageError, match="NaN or infinity"):
        list(cache_teacher.top_k(model, rows, 4, 1.0))


@pytest.mark.parametrize("masked", [False, True])
def test_training_with_the_cache_is_training_with_the_teacher(masked, folder, text_file, tmp_path):
    """With all columns cached, DistillationTrainer's losses are those with the teacher's model, batch and all."""
    from transformers import DataCollatorForTokenClassification, TrainingArguments

    from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

    model, out = teacher(masked=masked), tmp_path / "out"
    name = folder(model)
    assert run(name, text_file, out, "--block_size", 16, "--top_k", len(VOCAB), "--temperature", 2.0) == 0
    cached = datasets.load_from_disk(out)
    if not masked:
        cached = cached.map(lambda row: {"labels": row["input_ids"]})
    collator = DataCollatorForTokenClassification(BertTokenizer.from_pretrained(name))  # pads labels as well
    found = []
    for given, data in ((None, cached), (model, cached.remove_columns(["teacher_ids", "teacher_logprobs"]))):
        args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=True)
        kd = KDConfig(temperature=2.0, kd_weight=1.0, ce_weight=0.5, kd_on="attended", logprobs_temperature=2.0)
        student = teacher(seed=3, masked=masked)
        trainer = DistillationTrainer(student, given, args, collator, kd=kd, eval_dataset=data)
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] > 2
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_text_files_become_blocks(folder, text_file, tmp_path):
    """Every token once, in order; blocks of --block_size but for the last."""
    assert run(folder(teacher()), text_file, tmp_path / "out", "--block_size", 16, "--top_k", 3) == 0
    cached = datasets.load_from_disk(tmp_path / "out")
    lengths = [len(row["input_ids"]) for row in cached]
    assert lengths == [16] * (180 // 16) + [180 % 16]
    words = " ".join(VOCAB[i] for row in cached for i in row["input_ids"])
    assert words == " ".join(Path(text_file).read_text().split())


def test_lines_of_a_tokenizer_that_begins_texts_with_a_space():
    """They follow each other as they stand in the file."""
    lines, letters = ["ab\n", "  b\n", "\n", "a b\n"], ["▁", "a", "b", "\n"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    data = datasets.Dataset.from_dict({"text": lines})
    (row,) = pack_documents(data, PreTrainedTokenizerFast(tokenizer_object=backend), 64, whole=False)
    assert "".join(letters[i] for i in row["input_ids"]) == "▁ab\n▁▁b\n\na▁b\n"


def test_files_are_what_their_endings_say(tmp_path):
    """In capitals and compressed, too."""
    rows = [{"id": 1, "text": "the cat"}, {"id": 2, "text": "a dog"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.JSONL").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "c.csv").write_text("id,text\n1,the cat\n2,a dog\n")
    (tmp_path / "d.tsv").write_text("id\ttext\n1\tthe cat\n2\ta dog\n")
    for name in ("a.JSONL", "b.jsonl.gz", "c.csv", "d.tsv"):
        assert list(opened([str(tmp_path / name)], None, "train")) == rows, name


@pytest.mark.parametrize("size", [1, 2])
def test_blocks_that_hold_no_token_are_refused(size, folder, text_file, tmp_path, capsys):
    assert run(folder(teacher(masked=True)), text_file, tmp_path / "out", "--block_size", size, "--top_k", 3) == 2
    assert f"--block_size must be at least 3, not {size}" in capsys.readouterr().err


def test_an_empty_row_has_no_labelled_position(folder, tmp_path):
    rows = [[7, 8], [], [9, 10, 11]]
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(tmp_path / "data")
    out = tmp_path / "out"
    assert run(folder(teacher()), str(tmp_path / "data"), out, "--top_k", 3, "--rows", "labelled") == 0
    assert [len(row["input_ids"]) for row in datasets.load_from_disk(out)] == [2, 0, 3]


def test_a_masked_teacher_sees_masked_text(folder, text_file, tmp_path):
    model = teacher(masked=True)
    for out, size in (("out", 4), ("other", 3)):
        more = ("--block_size", 16, "--top_k", 3, "--mlm_probability", 0.3, "--batch_size", size)
        assert run(folder(model), text_file, tmp_path / out, *more) == 0
    cached, other = (datasets.load_from_disk(tmp_path / out) for out in ("out", "other"))
    for row, same in zip(cached, other, strict=True):
        assert (row["input_ids"] == same["input_ids"]).all()  # the masks do not depend on the batch
        masked = row["labels"] != -100
        assert masked.sum() == math.ceil(0.3 * len(masked))
        assert (row["input_ids"] == row["labels"])[~masked].sum() == 0
        expected = log_softmax(model, row, 1.0).topk(3).values
        torch.testing.assert_close(torch.from_numpy(row["teacher_logprobs"]).double(), expected, rtol=0, atol=2e-6)
    assert any((row["input_ids"] == VOCAB.index("[MASK]")).any() for row in cached)


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_continues(folder, text_file, tmp_path, monkeypatch):
    model, real, rows = folder(teacher()), cache_teacher.top_k, []

    def dies_after(count):
        def top_k(model, batch, *more):
            if len(rows) >= count:
                raise Killed
            rows.extend(batch)
            return real(model, batch, *more)

        monkeypatch.setattr(cache_teacher, "top_k", top_k)

    more = ("--block_size", 16, "--top_k", 3, "--shard_rows", 4, "--batch_size", 2)
    assert run(model, text_file, tmp_path / "whole", *more) == 0

    out = tmp_path / "out"
    dies_after(6)  # within the second of three shards
    with pytest.raises(Killed):
        run(model, text_file, out, *more)
    assert [f.name for f in sorted(out.glob("*.arrow"))] == ["data-00000-of-00003.arrow"]
    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(out)  # an unfinished one cannot be mistaken for a whole one
    (out / "data-00001-of-00003.incomplete").write_bytes(b"torn")
    first = (out / "data-00000-of-00003.arrow").stat()

    rows.clear()
    dies_after(100)
    assert run(model, text_file, out, *more) == 0
    assert len(rows) == 8  # 12 in all
    assert (out / "data-00000-of-00003.arrow").stat().st_mtime_ns == first.st_mtime_ns
    whole, resumed = (datasets.load_from_disk(tmp_path / name) for name in ("whole", "out"))
    for a, b in zip(whole, resumed, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not list(out.glob("*.incomplete"))
    names = sorted(f.name for f in out.iterdir())
    assert names == sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)

    rows.clear()
    assert run(model, text_file, out, *more) == 0
    assert not rows  # nothing is left to do


def test_other_settings_data_and_teachers_are_refused(folder, text_file, tmp_path, capsys):
    out, more = tmp_path / "out", ("--block_size", 16, "--top_k", 3)
    model = folder(teacher())
    assert run(model, text_file, out, *more) == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    capsys.readouterr()

    def refused(what, *changed):
        assert run(model, text_file, out, *more, *changed) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert f"begun with {what}" in error
        assert {f.name: f.read_bytes() for f in out.iterdir()} == before

    refused("temperature 1.0, not 2.0", "--temperature", 2)
    refused("top_k 3, not 4", "--top_k", 4)
    text = Path(text_file).read_text()
    Path(text_file).write_text(text + "the cat\n")
    refused("data_checksum")
    Path(text_file).write_text(text)
    folder(teacher(seed=1))
    refused("teacher_checksum")
    folder(teacher())
    assert run(model, text_file, out, *more, "--batch_size", 5) == 0  # does not change what is written


def test_other_columns_are_other_data(folder, tmp_path, capsys):
    """An interrupted run must not go on with other positions or labels beside the same ids."""
    model = folder(teacher())
    for name, shift in (("position_ids", 1), ("labels", 1)):
        columns = [[[j + s for j in range(4 + 3 * (i % 4))] for i in range(7)] for s in (0, shift)]
        paths = [tokenized(tmp_path / f"{name}{i}" / "data", **{name: c}) for i, c in enumerate(columns)]
        assert run(model, paths[0], tmp_path / name, "--top_k", 3) == 0
        assert run(model, paths[1], tmp_path / name, "--top_k", 3) == 2
        assert "begun with data_checksum" in capsys.readouterr().err


BAD = {
    "top_k": (["--top_k", "25"], "--top_k must be at most the teacher's vocabulary of 24, not 25"),
    "unknown": (["--topk", "5"], "no such option: --topk 5"),
    "negative": (["--temperature", "-1"], "--temperature must be positive"),
    "kernels": (["--top_k", "2000"], "--top_k must be at most 1024"),
    "no teacher": (["--teacher", "DATA/nowhere"], "cannot load --teacher"),
    "no data": (["--dataset", "DATA/nowhere"], "cannot read --dataset"),
    "no file": (["--dataset", "nowhere", "neither"], "no such file: nowhere"),
    "no column": (["--dataset", "DATA/numbers"], "--text_column is one of number"),
    "too large": (["--dataset", "DATA/large"], "the data holds the id 99, but the teacher has 24 tokens"),
    "too long": (["--block_size", "65", "--top_k", "3"], "a row has 65 tokens, but the teacher 64 positions"),
    "empty": (["--dataset", "DATA/empty"], "--dataset is empty"),
    "tokenizer": (["--tokenizer", "DATA/nowhere"], "cannot load the tokenizer"),
    "mask": (["--dataset", "DATA/mask"], "the column attention_mask must have as many numbers per row as input_ids"),
    "nested": (["--dataset", "DATA/nested"], "the column position_ids must hold a list of whole numbers per"),
    "fractions": (["--dataset", "DATA/fractions"], "the column input_ids must hold a list of whole numbers per row"),
    "below 0": (["--dataset", "DATA/below"], "the column input_ids must have ids of at least 0, but one is -1"),
    "null": (
        ["--dataset", "DATA/null"],
        "the column labels must have numbers in every row, but one of its values is n",
    ),
    "within": (["--dataset", "DATA/within"], "the column extra must have numbers in every row, but one of its values"),
    "packed": (["--dataset", "DATA/index"], "the column seq_idx says that documents are packed"),
    "positions": (
        ["--dataset", "DATA/far", "--top_k", "3"],
        "position_ids go up to 64, but the teacher has 64 positions",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, folder, text_file, tmp_path, capsys):
    for name, columns in {
        "numbers": {"number": [1]},
        "large": {"input_ids": [[5, 99]]},
        "empty": {"input_ids": [[]]},
        "mask": {"input_ids": [[5, 6]], "attention_mask": [[1]]},
        "nested": {"input_ids": [[5, 6]], "position_ids": [[[0, 1]] * 3]},
        "fractions": {"input_ids": [[7.0, 8.9]]},
        "below": {"input_ids": [[5, -1]]},
        "null": {"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], None]},
        "within": {"input_ids": [[5, 6], [7, 8]], "extra": [[1, None], [2, 3]]},
        "index": {"input_ids": [[5, 6]], "seq_idx": [[0, 1]]},
        "lengths": {"input_ids": [[5, 6]], "seq_lengths": [[1, 2]]},
        "far": {"input_ids": [[5, 6]], "position_ids": [[63, 64]]},
    }.items():
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / name)
    arguments, message = BAD[case]
    arguments = [argument.replace("DATA", str(tmp_path)) for argument in arguments]
    assert run(folder(teacher()), text_file, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_named(folder, tmp_path, capsys):
    data = tokenized(tmp_path / "data", text=["the cat"] * 7, label=[1] * 7)
    assert run(folder(teacher()), data, tmp_path / "out", "--top_k", 3) == 0
    assert "Left out: text, label " in capsys.readouterr().out
    assert "text" not in datasets.load_from_disk(tmp_path / "out").column_names


def test_a_folder_that_holds_something_else_is_left_alone(folder, text_file, tmp_path, capsys):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("precious")
    assert run(folder(teacher()), text_file, out) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [f.name for f in out.iterdir()] == ["chapter1.txt"]


def test_two_caches_have_two_fingerprints(folder, text_file, tmp_path):
    """What the caches of later maps go by."""
    for k in (2, 3):
        assert run(folder(teacher()), text_file, tmp_path / str(k), "--block_size", 16, "--top_k", k) == 0
    two, again, three = (datasets.load_from_disk(tmp_path / k)._fingerprint for k in ("2", "2", "3"))
    assert two == again != three
