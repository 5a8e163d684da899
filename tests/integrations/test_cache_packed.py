"""Packed documents in `python -m fusedkd.integrations.cache_teacher`, and in training with what it writes."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import numpy as np
import torch
from transformers import BertTokenizer

from .test_cache_teacher import VOCAB, log_softmax, own_caches, run, saved, teacher  # noqa: F401  (a fixture)

LENGTHS = ((4, 6), (5,), (3, 3, 4), (7, 3))
"""Of the documents in each packed row."""


def packed(path, ends: int = 0, **columns) -> str:
    """Rows of several documents, whose position_ids start again at each; the last row ends with padding."""
    draw = torch.Generator().manual_seed(4)
    ids = [torch.randint(5, len(VOCAB), (sum(lengths),), generator=draw).tolist() for lengths in LENGTHS]
    positions = [[i for n in lengths for i in range(n)] for lengths in LENGTHS]
    data = {"input_ids": ids, "position_ids": positions} | columns
    if ends:
        data["attention_mask"] = [[1] * len(row) for row in ids]
        data["attention_mask"][-1][-ends:] = [0] * ends
    datasets.Dataset.from_dict(data).save_to_disk(path)
    return str(path)


def alone(model, row, lengths) -> torch.Tensor:
    """The truth: each document of a row by itself, float64 ``(L, V)``."""
    parts = torch.as_tensor(row["input_ids"]).long().split(lengths)
    return torch.cat([log_softmax(model, {"input_ids": ids, "attention_mask": ids * 0 + 1}, 1.0) for ids in parts])


@pytest.mark.parametrize("ends", [0, 2])
def test_packed_documents_do_not_see_each_other(ends, tmp_path):
    model = teacher()
    completion = [[i % 2 for i in range(sum(lengths))] for lengths in LENGTHS]
    weights = [[0.5] * sum(lengths) for lengths in LENGTHS]
    data = packed(tmp_path / "data", ends, completion_mask=completion, loss_weights=weights)
    for out, size in (("out", 3), ("other", 1)):
        assert (
            run(
                saved(model, tmp_path / "teacher"),
                data,
                tmp_path / out,
                "--top_k",
                5,
                "--batch_size",
                size,
                "--shard_rows",
                3,
            )
            == 0
        )
    cached, other = (datasets.load_from_disk(tmp_path / out) for out in ("out", "other"))
    assert ("attention_mask" in cached.column_names) == bool(ends)
    for i, (row, again, before) in enumerate(zip(cached, other, datasets.load_from_disk(data), strict=True)):
        for name in ("input_ids", "position_ids", "completion_mask", "loss_weights"):
            assert row[name].tolist() == before[name]
        attended = torch.as_tensor(before.get("attention_mask", [1] * len(before["input_ids"]))).bool()
        expected = alone(model, before, LENGTHS[i])[attended].topk(5)
        found = torch.from_numpy(row["teacher_logprobs"])[attended].double()
        torch.testing.assert_close(found, expected.values, rtol=1e-6, atol=2e-6)
        assert torch.equal(torch.from_numpy(row["teacher_ids"])[attended].long(), expected.indices)
        assert (row["teacher_ids"][~attended.numpy()] == -1).all()
        assert np.allclose(row["teacher_logprobs"], again["teacher_logprobs"], rtol=1e-6, atol=2e-6)
    joined = log_softmax(model, {"input_ids": before["input_ids"], "attention_mask": [1] * 10}, 1.0)
    assert (joined[7:] - alone(model, before, LENGTHS[-1])[7:]).abs().max() > 0.1  # it would show


def test_lengths_of_packed_documents_become_positions(tmp_path):
    """TRL's packed rows have them instead."""
    data = packed(tmp_path / "data", seq_lengths=[list(lengths) for lengths in LENGTHS])
    datasets.load_from_disk(data).remove_columns("position_ids").save_to_disk(tmp_path / "lengths")
    for name in ("data", "lengths"):
        assert (
            run(saved(teacher(), tmp_path / "teacher"), str(tmp_path / name), tmp_path / f"{name}-out", "--top_k", 5)
            == 0
        )
    one, other = (datasets.load_from_disk(tmp_path / f"{name}-out") for name in ("data", "lengths"))
    assert set(one.column_names) == set(other.column_names)
    for a, b in zip(one, other, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ends", [0, 2])
def test_training_on_packed_documents_is_training_on_each(ends, tmp_path):
    """DistillationTrainer takes the cache of packed rows, padded by a collator that knows of no position_ids."""
    from transformers import DataCollatorWithPadding, TrainingArguments

    from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

    model, student = teacher(), teacher(seed=3)
    name = saved(model, tmp_path / "teacher")
    assert run(name, packed(tmp_path / "data", ends), tmp_path / "out", "--top_k", len(VOCAB)) == 0
    cached = datasets.load_from_disk(tmp_path / "out")
    divergences = []
    for row, lengths in zip(cached, LENGTHS, strict=True):
        p, q = (alone(each, row, lengths) for each in (model, student))
        kl = (p.exp() * (p - q)).sum(-1)
        attended = len(kl) - (ends if lengths == LENGTHS[-1] else 0)
        documents = kl[:attended].split([*lengths[:-1], lengths[-1] - len(kl) + attended])
        divergences += [document[:-1] for document in documents]  # at the last token no next one is known
    args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, disable_tqdm=True)
    kd = KDConfig(temperature=1.0, kd_weight=1.0, ce_weight=0.0, kd_on="attended")
    collator = DataCollatorWithPadding(BertTokenizer.from_pretrained(name))
    trainer = DistillationTrainer(student, None, args, collator, kd=kd, eval_dataset=cached)
    expected = torch.cat(divergences).mean().item()
    assert expected > 0.5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_packed_documents_of_a_masked_teacher_are_refused(tmp_path, capsys):
    """Its students, models of transformers, would not keep them apart."""
    assert (
        run(
            saved(teacher(masked=True), tmp_path / "teacher"), packed(tmp_path / "data"), tmp_path / "out", "--top_k", 3
        )
        == 2
    )
    assert "masked models of transformers do not keep apart" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
