"""OfflineTeacherCollator: the teacher's columns lie where the batch has their tokens, whatever made the batch."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import DataCollatorWithFlattening, default_data_collator

from fusedkd.integrations.cache_store import PACKED, encode
from fusedkd.integrations.offline import OfflineTeacherCollator, restarts
from fusedkd.integrations.transformers import KDConfig

from .distil_step import VOCAB, gradient, llamas

PAD = 0


def examples(k: int = 3, **changes) -> list[dict]:
    """Of 4 to 9 tokens; the columns of token x are x·10 + 0 … K − 1, so that each says whose it is."""
    draw = torch.Generator().manual_seed(2)
    found = []
    for n in (6, 9, 4, 9):
        ids = torch.randint(3, VOCAB, (n,), generator=draw)
        columns = ids[:, None] * 10 + torch.arange(k)
        found.append({"input_ids": ids, "teacher_ids": columns.int(), "teacher_logprobs": -columns.float(), **changes})
    return found


def padded(side: str, mask: bool = True, length: int = 12, hide: float = 0.0, pad: int = PAD):
    """A collator that says nothing about its side; `hide`: the share of tokens it masks, as masked LMs are trained."""

    def collate(rows):
        draw, batch = torch.Generator().manual_seed(0), {"input_ids": [], "attention_mask": []}
        for row in rows:
            assert "teacher_ids" not in row
            ids = torch.as_tensor(row["input_ids"])
            ids = ids.masked_fill(torch.rand(len(ids), generator=draw) < hide, 1)
            missing = length - len(ids)
            space = (missing, 0) if side == "left" else (0, missing)
            batch["input_ids"].append(F.pad(ids, space, value=pad))
            batch["attention_mask"].append(F.pad(torch.as_tensor(row.get("attention_mask", ids * 0 + 1)), space))
        return {name: torch.stack(batch[name]) for name in (batch if mask else ("input_ids",))}

    return collate


def assert_aligned(batch, data, k: int = 3) -> None:
    ids, columns = batch["input_ids"], batch["teacher_ids"]
    assert columns.shape == batch["teacher_logprobs"].shape == (*ids.shape, k)
    known = columns[..., 0] >= 0
    assert known.sum() == sum(len(row["input_ids"]) for row in data)
    original = torch.cat([row["input_ids"] for row in data])
    assert (columns[known] == original[:, None] * 10 + torch.arange(k)).all()
    assert (batch["teacher_logprobs"][known] == -columns[known]).all()
    assert ((columns[..., 0] // 10 == ids) | (ids == 1))[known].all()
    assert (columns[~known] == -1).all()


@pytest.mark.parametrize("hide", [0.0, 0.4])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_is_that_of_the_batch(side, mask, hide):
    data = examples()
    batch = OfflineTeacherCollator(padded(side, mask, hide=hide))(data)
    assert_aligned(batch, data)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_one_token_and_padding_that_is_a_token(side):
    """Of ids alone the side cannot be told: the attention mask tells it."""
    data = [{"input_ids": torch.full((n,), 7), "teacher_ids": torch.arange(n)[:, None]} for n in (3, 5)]
    data = [{**row, "teacher_logprobs": -row["teacher_ids"].float()} for row in data]
    found = OfflineTeacherCollator(padded(side, length=6, pad=7))(data)["teacher_ids"][..., 0].tolist()
    expected = [[0, 1, 2, -1, -1, -1], [0, 1, 2, 3, 4, -1]]
    assert found == (expected if side == "right" else [[-1, -1, -1, 0, 1, 2], [-1, 0, 1, 2, 3, 4]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_examples_that_are_padded_themselves(side):
    """On the other side than the collator pads."""
    data = examples()
    for row in data:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        ends = slice(-2, None) if side == "left" else slice(0, 2)
        row["input_ids"][ends] = row["attention_mask"][ends] = 0
        row["teacher_ids"][ends] = torch.arange(3).int()
        row["teacher_logprobs"][ends] = -torch.arange(3.0)
    assert_aligned(OfflineTeacherCollator(padded(side))(data), data)


def test_rows_without_padding():
    data = [row for row in examples() if len(row["input_ids"]) == 9]
    assert_aligned(OfflineTeacherCollator(default_data_collator)(data), data)


def test_a_collator_that_flattens():
    data = [{name: value.tolist() for name, value in row.items()} for row in examples()]
    batch = OfflineTeacherCollator(DataCollatorWithFlattening())(data)
    assert batch["input_ids"].shape == (1, 28)
    assert_aligned(batch, examples())
    assert restarts(batch["position_ids"]).sum() == 3


def test_training_does_not_depend_on_the_side():
    """With a teacher of two columns and a collator without a tokenizer."""
    student, teacher = llamas()
    data = examples()
    for row in data:
        with torch.no_grad():
            best = teacher(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1).topk(2)
        row["teacher_ids"], row["teacher_logprobs"] = best.indices, best.values
    kd = KDConfig(kd_on="attended", kd_weight=1.0, ce_weight=0.0)
    found = {}
    for side in ("left", "right"):
        student, _ = llamas()
        options = {"collator": positions_of_mask(padded(side)), "batch": 4}
        found[side], _ = gradient(student, None, kd, data=data, **options)
    size = torch.stack([g.norm() for g in found["right"].values()]).norm()
    assert size > 0.05
    for name, value in found["left"].items():
        torch.testing.assert_close(value, found["right"][name], rtol=0, atol=1e-5 * float(size))


def positions_of_mask(collator):
    """So that a token has the same position on either side."""

    def collate(rows):
        batch = collator(rows)
        return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    return collate


# -------------------------------------------------- lists of different lengths


def ragged() -> list[dict]:
    """As a served teacher returns them: at each token as many columns as it likes."""
    data = examples()
    for row in data:
        widths = [(i + len(row["input_ids"])) % 4 for i in range(len(row["input_ids"]))]
        for name in ("teacher_ids", "teacher_logprobs"):
            row[name] = [values[:w].tolist() for values, w in zip(row[name], widths, strict=True)]
    return data


def test_lists_of_different_lengths_are_padded():
    data = ragged()
    batch = OfflineTeacherCollator(padded("left"))(data)
    assert batch["teacher_ids"].shape == (4, 12, 3)
    for i, row in enumerate(data):
        rows = batch["teacher_ids"][i, 12 - len(row["input_ids"]) :], batch["teacher_logprobs"][i]
        for columns, listed in zip(rows[0], row["teacher_ids"], strict=True):
            assert columns.tolist() == listed + [-1] * (3 - len(listed))
    known = batch["teacher_ids"] >= 0
    assert (batch["teacher_logprobs"][known] == -batch["teacher_ids"][known]).all()
    assert not batch["teacher_ids"].is_floating_point()


def test_the_first_example_does_not_say_of_which_type_all_are():
    """That of one that lists nothing, of whole numbers, of fewer digits."""
    full = {"input_ids": [5, 6], "teacher_ids": [[1, 2], [3, 4]], "teacher_logprobs": [[-0.123456, -2.0]] * 2}
    nothing = full | {"teacher_ids": [[], []], "teacher_logprobs": [[], []]}
    whole = full | {"teacher_ids": [[1], [300]], "teacher_logprobs": [[0], [-0.5]]}
    ragged = full | {"teacher_ids": [[1], [3, 4]], "teacher_logprobs": [[0], [-0.3, -0.4]]}
    rounded = full | {"teacher_logprobs": torch.tensor(full["teacher_logprobs"], dtype=torch.bfloat16)}
    for first in (nothing, whole, ragged, rounded):
        one, other = (OfflineTeacherCollator(default_data_collator)(rows) for rows in ([first, full], [full, first]))
        for name in ("teacher_ids", "teacher_logprobs"):
            assert torch.equal(one[name], other[name].flip(0))
            assert one[name].dtype == (torch.int64 if name == "teacher_ids" else torch.float32)
        assert one["teacher_logprobs"][1, 0, 0] == torch.tensor(-0.123456)
        if first is ragged:
            assert one["teacher_logprobs"][0, 1].tolist() == pytest.approx([-0.3, -0.4])


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("how", ["absent", "none"])
def test_an_example_without_a_teacher_is_named(missing, how):
    data = [dict(row) for row in examples()]
    data[missing] |= {"teacher_ids": None}
    if how == "absent":
        del data[missing]["teacher_ids"]
    with pytest.raises(ValueError, match=f"or none of a batch, but example {missing} of the batch has none"):
        OfflineTeacherCollator(padded("right"))(data)


@pytest.mark.parametrize("first", [0, 1])
def test_compact_columns_beside_others(first):
    """Of each example by itself: plain ones, None as of data sets that were concatenated, or nothing at all."""
    plain = examples()[1]
    plain["teacher_logprobs"] -= plain["teacher_logprobs"].logsumexp(1, keepdim=True)
    packed = {"input_ids": plain["input_ids"], PACKED: encode(plain["teacher_ids"], plain["teacher_logprobs"])}
    bare = {"input_ids": plain["input_ids"]}
    for data in ([packed, plain], [packed, plain | {PACKED: None}]):
        batch = OfflineTeacherCollator(padded("right"))(data[:: 1 - 2 * first])
        assert torch.equal(*batch["teacher_ids"])
    for data in ([packed, bare], [packed, bare | {PACKED: None}]):
        with pytest.raises(ValueError, match=f"or none of a batch, but example {1 - first} of the batch has none"):
            OfflineTeacherCollator(padded("right"))(data[:: 1 - 2 * first])


WRONG = {
    "teacher_ids must have a row for each of the 4 tokens of example 2": {"teacher_ids": torch.zeros(3, 2)},
    "of the 4 tokens of example 2 of the batch, not 3: of an encoder–decoder, pass of=.labels.": {
        "teacher_ids": torch.zeros(3, 2),
        "labels": [5, 6, 7],
    },
    "teacher_logprobs must have a list of columns for each token": {"teacher_logprobs": torch.zeros(4)},
    "a column for each of teacher_ids, not 2 for 3: token 0 of example 2": {"teacher_logprobs": torch.zeros(4, 2)},
    "position_ids must have one for each of the 4 tokens of example 2": {"position_ids": torch.zeros(5)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_columns_are_named(message):
    data = examples()
    if "position_ids" in WRONG[message]:
        data = [{**row, "position_ids": torch.arange(len(row["input_ids"]))} for row in data]
    data[2] |= WRONG[message]
    with pytest.raises(ValueError, match=message):
        OfflineTeacherCollator(padded("right"))(data)


def test_a_collator_that_pads_nothing_is_named():
    with pytest.raises(ValueError, match="examples of different lengths, here of 4 to 9 tokens, and default_data_col"):
        OfflineTeacherCollator(default_data_collator)(examples())
    with pytest.raises(RuntimeError, match="stack"):  # of equal lengths, whatever it is
        OfflineTeacherCollator(lambda rows: torch.stack([torch.zeros(i) for i in range(2)]))(examples()[1::2])


def test_a_batch_that_does_not_hold_the_tokens_is_refused():
    collate = padded("right")
    for wrong in (lambda rows: collate(rows[::-1]), lambda rows: {"input_ids": collate(rows)["input_ids"][:, :8]}):
        with pytest.raises(ValueError, match="where the teacher's columns belong cannot be told"):
            OfflineTeacherCollator(wrong)(examples())
