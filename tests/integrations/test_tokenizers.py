"""Two tokenizers: whether they are one, what they share, W, and the rows of two models that read one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from fusedkd.integrations.tokenizers import Group, align, check_same_vocabulary, paired, projection, shared_ids
from fusedkd.integrations.transformers import DistillationTrainer

from .made_tokenizers import TEXT, byte_level, metaspace, word_piece, words

STRANGE = "Naïve 日本 costs 10× less.  Isn't it?\tNo"


@pytest.fixture(scope="module")
def three() -> tuple[Any, Any, Any]:
    return byte_level(400), metaspace(320), word_piece(330)


# -------------------------------------------------- one vocabulary or two


def test_same_size_with_other_ids_is_refused() -> None:
    one, other = words(["[UNK]", "a", "b", "c", "d", "e"]), words(["[UNK]", "a", "c", "b", "e", "d"])
    check_same_vocabulary(one, words(["[UNK]", "a", "b", "c", "d", "e"]))
    check_same_vocabulary(one, words(["[UNK]", "a", "b", "c", "d", "e", "more"]))  # a longer one may be padded
    message = (
        "4 ids stand for other tokens: 2 is 'b' of the student, 'c' of the teacher, 3 is 'c' .*, 4 is .*, …; fused"
    )
    with pytest.raises(ValueError, match=message):
        check_same_vocabulary(one, other)
    with pytest.raises(TypeError, match="a tokenizer of transformers is needed, not a str"):
        check_same_vocabulary(one, "gpt2")


def test_renamed_special_tokens_are_told(recwarn: pytest.WarningsRecorder) -> None:
    check_same_vocabulary(byte_level(280), byte_level(280))
    assert not [w for w in recwarn if "special" in str(w.message)]
    with pytest.warns(UserWarning, match=r"name special tokens differently: 0 is '<\|endoftext\|>' of the student"):
        check_same_vocabulary(byte_level(280), byte_level(280, eos="<|im_end|>"))


def test_the_trainer_refuses_another_tokenizer(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 6}
    student, teacher = GPT2LMHeadModel(GPT2Config(**sizes)), GPT2LMHeadModel(GPT2Config(**sizes))
    one, other = words(["[UNK]", "a", "b", "c", "d", "e"]), words(["[UNK]", "a", "c", "b", "e", "d"])
    options: dict[str, Any] = {"args": TrainingArguments(tmp_path, use_cpu=True, report_to=[])}
    DistillationTrainer(student, teacher, processing_class=one, teacher_tokenizer=one, **options)
    for given in (other, [one, other], {"a": one, "b": other}):
        with pytest.raises(ValueError, match="4 ids stand for other tokens"):
            DistillationTrainer(student, teacher, processing_class=one, teacher_tokenizer=given, **options)
    with pytest.raises(ValueError, match="processing_class must be given"):
        DistillationTrainer(student, teacher, teacher_tokenizer=other, **options)


def test_a_cache_is_not_written_with_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the teacher comes with one; else it may be given one."""
    cache_teacher = pytest.importorskip("fusedkd.integrations.cache_teacher")
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=6, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text("a b c\n")
    words(["[UNK]", "a", "c", "b", "e", "d"]).save_pretrained(tmp_path / "other")
    given = ["--teacher", "teacher", "--dataset", "text.txt", "--tokenizer", "other", "--output", "out", "--top_k", "2"]
    given = [str(tmp_path / word) if not word.startswith("-") and word != "2" else word for word in given]
    words(["[UNK]", "a", "b", "c", "d", "e"]).save_pretrained(tmp_path / "teacher")
    capsys.readouterr()
    assert cache_teacher.main([*given, "--block_size", "4"]) == 2
    assert "--tokenizer is not the teacher's: student and teacher must have one" in capsys.readouterr().err
    for file in (tmp_path / "teacher").glob("tokenizer*"):
        file.unlink()
    assert cache_teacher.main([*given[:4], *given[6:]]) == 2
    assert "teacher has no tokenizer: name one by --tokenizer" in capsys.readouterr().err
    assert cache_teacher.main([*given, "--block_size", "4"]) == 0


# -------------------------------------------------- shared tokens and W


def test_shared_ids_are_tokens_of_one_text(three: tuple[Any, Any, Any]) -> None:
    """A space before a word is a part of it, whatever marks it."""
    of_byte, of_meta, of_piece = three
    for student, teacher, marks in (
        (of_byte, of_meta, ("Ġ", "▁")),
        (of_byte, of_piece, ("Ġ", "")),
        (of_meta, of_piece, ("▁", "")),
    ):
        ids, others = shared_ids(student, teacher)
        assert len(ids) > 50
        assert len(ids.unique()) == len(others.unique()) == len(ids)
        pairs = dict(zip(student.convert_ids_to_tokens(ids), teacher.convert_ids_to_tokens(others), strict=True))
        known = set(student.get_vocab()), set(teacher.get_vocab())
        for word in ("teacher", "the", "loss"):
            one, other = (mark + word for mark in marks)
            if one in known[0] and other in known[1]:
                assert pairs.pop(one) == other
        joined = "##ing" if teacher is of_piece else "ing"
        if "ing" in pairs:
            assert pairs["ing"] == joined
    pairs = dict(zip(*(x.tolist() for x in shared_ids(of_byte, of_meta)), strict=True))
    assert pairs[of_byte.eos_token_id] == of_meta.eos_token_id
    same = shared_ids(of_byte, of_byte)
    assert torch.equal(*same)
    assert len(same[0]) == len(of_byte)


def test_a_token_twice_is_the_one_that_its_tokenizer_uses(three: tuple[Any, Any, Any]) -> None:
    """Llama's <0x41> and A are both "A"."""
    of_byte, of_meta, _ = three
    pairs = dict(zip(*(x.tolist() for x in shared_ids(of_byte, of_meta)), strict=True))
    if "A" in of_meta.get_vocab():
        assert pairs[of_byte.convert_tokens_to_ids("A")] == of_meta.convert_tokens_to_ids("A")


def test_projection(three: tuple[Any, Any, Any]) -> None:
    """What the student has goes there; any other token to the first of the student's tokens for its text."""
    of_byte, of_meta, _ = three
    W = projection(of_meta, of_byte, columns=(330, 410))
    assert (W.shape, W.dtype) == ((330, 410), torch.float64)
    dense = W.to_dense()
    ids, others = shared_ids(of_meta, of_byte)
    assert (dense[ids, others] == 1).all()
    mass = dense.sum(0)
    assert ((mass == 0) | (mass == 1)).all()
    spread = projection(of_meta, of_byte, decay=1.0).to_dense()
    checked = 0
    for token, t in of_byte.get_vocab().items():
        text = of_byte.decode([t])
        if t in others or t in of_byte.all_special_ids or "\ufffd" in text or not text.startswith(" "):
            continue
        pieces = of_meta.encode(text[1:], add_special_tokens=False)  # which puts a space before it
        if of_meta.unk_token_id in pieces:
            continue
        assert dense[pieces[0], t] == 1, token
        assert spread[:, t].nonzero().flatten().tolist() == sorted(set(pieces))
        checked += 1
    assert checked > 2
    torch.testing.assert_close(projection(of_byte, of_byte).to_dense(), torch.eye(400, dtype=torch.float64))
    with pytest.raises(ValueError, match="columns must hold the ids up to"):
        projection(of_meta, of_byte, columns=(10, 10))
    with pytest.raises(ValueError, match="decay must be at least 0 and at most 1"):
        projection(of_meta, of_byte, decay=2)


def test_words_without_a_tokenization_go_nowhere() -> None:
    student, teacher = words(["[UNK]", "a", "."]), words(["[UNK]", "a", "strange", "."])
    W = projection(student, teacher).to_dense()
    assert W.nonzero().tolist() == [[0, 0], [1, 1], [2, 3]]


# -------------------------------------------------- alignment


def test_align_finds_the_smallest_groups() -> None:
    def spans(*ends: int | None) -> list[tuple[int, int] | None]:
        return [None if end is None else (0, end) for end in ends]

    assert align(spans(2, 5, 7), spans(2, 3, 5, 7)) == [
        Group(range(0, 1), range(0, 1)),
        Group(range(1, 2), range(1, 3)),
        Group(range(2, 3), range(3, 4)),
    ]
    special = align(spans(None, 2, 4, 6, None), spans(3, 4, 6))
    assert special == [Group(range(1, 3), range(0, 2)), Group(range(3, 4), range(2, 3))]
    characters = align(spans(1, 1, 1, 2), spans(1, 2))  # three bytes of one character
    assert characters == [Group(range(0, 3), range(0, 1)), Group(range(3, 4), range(1, 2))]
    assert align(spans(2, 4), spans(3)) == []
    assert align([], spans(3)) == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 2), (2, 1), (1, 1)])
def test_rows_have_read_the_same_text(three: tuple[Any, Any, Any], order: tuple[int, int]) -> None:
    """Of each pair of rows; and without a pair no row of the student has one that ends where it does."""
    student, teacher = (three[i] for i in order)
    texts = [TEXT[0], STRANGE, "", TEXT[3]]
    batch = paired(texts, student, teacher)
    width = batch.teacher["input_ids"].shape[1]
    found = 0
    for b, text in enumerate(texts):
        ends = []
        for tokenizer in (student, teacher):
            encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
            offsets = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
            ends.append([0 if special else end for (_, end), special in offsets])
        for i, row in enumerate(batch.rows[b].tolist()):
            if row < 0:
                continue
            assert row // width == b
            assert ends[0][i] == ends[1][row % width]
            assert batch.student["attention_mask"][b, i] == batch.teacher["attention_mask"][b, row % width] == 1
            found += 1
    assert found > 0.5 * sum(len(student(text)["input_ids"]) for text in texts) - 8
    if order == (1, 1):
        assert torch.equal(
            batch.rows, torch.arange(batch.rows.numel()).view_as(batch.rows).masked_fill(~batch.mask, -1)
        )
        last = batch.student["attention_mask"].sum(1) - 2  # which predicts the end
        assert batch.mask[0, last[0]]
        assert not batch.mask[:, -1].any()


def test_texts_whose_beginnings_are_cut_off() -> None:
    """Elsewhere on either side: the rows of their first tokens have not read the same."""
    text = "ab cd ef gh ij"
    sides = [metaspace(size, [text] * 9) for size in (60, 14)]  # of words, and of letters
    for tokenizer in sides:
        tokenizer.truncation_side = "left"
    assert [len(each(text)["input_ids"]) for each in sides] == [7, 17]
    batch = paired([text], *sides, max_length=5)
    student, teacher = (side.convert_ids_to_tokens(x["input_ids"][0]) for side, x in zip(sides, batch[:2], strict=True))
    assert (student, teacher) == (["<s>", "▁ef", "▁gh", "▁ij", "</s>"], ["<s>", "▁", "i", "j", "</s>"])
    assert batch.rows.tolist() == [[-1, -1, -1, 3, -1]]


def test_masked_models_and_cut_texts(three: tuple[Any, Any, Any]) -> None:
    """Rows of tokens that are one on both sides; what one side does not see has no row."""
    of_byte, _, of_piece = three
    batch = paired(TEXT[:2], of_piece, of_byte, causal=False)
    width, ids = batch.teacher["input_ids"].shape[1], batch.teacher["input_ids"].flatten()
    for b, i in batch.mask.nonzero().tolist():
        one = of_piece.convert_ids_to_tokens(int(batch.student["input_ids"][b, i])).removeprefix("##")
        other = of_byte.decode([int(ids[batch.rows[b, i]])]).strip()
        assert one == other.lower()
        assert batch.rows[b, i] // width == b
    short = paired(TEXT[:2], of_piece, of_byte, max_length=12)
    assert short.student["input_ids"].shape[1] == short.teacher["input_ids"].shape[1] == 12
    assert short.mask.any()
    slow = type("Slow", (), {"get_vocab": dict})()
    with pytest.raises(TypeError, match="the teacher's tokenizer must be a fast one"):
        paired(TEXT[:1], of_piece, slow)
    for texts in ("one text", []):
        with pytest.raises(ValueError, match="texts must be a list of at least one text"):
            paired(texts, of_piece, of_byte)
