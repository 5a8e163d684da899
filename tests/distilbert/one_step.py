"""The gradient of one optimiser step of DistilBertTrainer; under torchrun: `one_step.py BATCH ACCUMULATION OUT`."""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, TrainerCallback, TrainingArguments, default_data_collator

from fusedkd.distilbert.student import student_from_teacher
from fusedkd.distilbert.trainer import DistilBertTrainer
from fusedkd.nn import DistilBertLoss

VOCAB, ROWS, LENGTH = 61, 8, 12


def models():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = BertForMaskedLM(BertConfig(vocab_size=VOCAB, initializer_range=0.2, **size, **off))
    return student_from_teacher(teacher), teacher.eval()


def rows():
    """Eight rows with different numbers of attended and of masked tokens, so that a mean of means is wrong."""
    draw = torch.Generator().manual_seed(1)
    for i in range(ROWS):
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=draw)
        attention = (torch.arange(LENGTH) < 4 + i).long()
        labels = torch.where(torch.arange(LENGTH) < 1 + i % 3, ids, -100)
        yield {"input_ids": ids * attention, "attention_mask": attention, "labels": labels}


class Data(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = list(rows())

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Catch(TrainerCallback):
    gradient: dict

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: p.grad.clone() for name, p in model.named_parameters()}


def gradient(batch: int, accumulation: int, kd_on: str = "attended"):
    student, teacher = models()
    catch = Catch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        loss = DistilBertLoss(kd_on=kd_on)
        trainer = DistilBertTrainer(student, arguments, default_data_collator, Data(), criterion=loss, teacher=teacher)
        trainer.add_callback(catch)
        trainer.train()
        logs = next(h for h in trainer.state.log_history if "loss" in h)
    return catch.gradient, {k: logs[k] for k in ("loss", "distil", "mlm", "cos")}


if __name__ == "__main__":
    result = gradient(int(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.get_rank() == 0:
        torch.save(result, Path(sys.argv[3]))
