"""What is masked, how often, and anew in each pass over the text."""

# ruff: noqa: E402 (imports after importorskip)

import math

import numpy as np
import pytest
import torch

from .conftest import WORDS, bert, sentences

datasets = pytest.importorskip("datasets")

from transformers import TrainingArguments

from fusedkd.distilbert.config import TextOptions
from fusedkd.distilbert.data import in_order, read_text, token_counts
from fusedkd.distilbert.trainer import DistilBertTrainer
from fusedkd.integrations.blocks import MaskingCollator, pack
from fusedkd.nn import DistilBertLoss


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


class Spy(DistilBertTrainer):
    """Keeps, of each block that is trained on, the positions that were masked, pass after pass."""

    seen: dict[str, list[str]]

    def training_step(self, model, inputs, num_items_in_batch=None):
        masked = inputs["labels"] != -100
        for ids, labels, chosen in zip(inputs["input_ids"], inputs["labels"], masked, strict=True):
            self.seen.setdefault(str(labels.where(chosen, ids).tolist()), []).append(str(chosen.tolist()))
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize(("streaming", "workers"), [(False, 1), (True, 0), (True, 1)])
def test_each_pass_has_its_own_masks(tmp_path, tokenizer, streaming, workers):
    """Also of a stream, whose passes the Trainer does not count, and with one block a batch, always the same one."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(sentences(8)) + "\n")
    options = TextOptions(train_files=[str(file)], eval_files=[str(file)], streaming=streaming)
    blocks = pack(read_text(options)[0], tokenizer, 24, "training")
    count = sum(1 for _ in blocks)
    collator = MaskingCollator(tokenizer, np.ones(len(tokenizer), np.int64), 0.3, 0.0, seed=1)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=6 * count, per_device_train_batch_size=1, save_strategy="no", report_to=[],
        remove_unused_columns=False, disable_tqdm=True, use_cpu=True, dataloader_num_workers=workers,
        **options.trainer_arguments,
    )  # fmt: skip
    plain = DistilBertLoss(alpha_distil=0.0, alpha_mlm=1.0, alpha_cos=0.0)
    trainer = Spy(bert(len(tokenizer)), None, arguments, collator, in_order(blocks, 1, seed=1), loss=plain)
    trainer.seen = {}
    trainer.train()
    assert len(trainer.seen) == count
    for masks in trainer.seen.values():
        assert len(masks) == 6
        assert len(set(masks)) >= 4  # a short block has few
