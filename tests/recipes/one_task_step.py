"""The gradient of one optimiser step of TaskTrainer."""

import tempfile

import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from recipes.finetune.trainer import TaskTrainer

VOCAB, LENGTHS = 61, (4, 9, 5, 12, 7, 3, 11, 6)  # different lengths: a batch is padded to its own longest row


def models(task: str):
    torch.manual_seed(0)
    squad = task == "squad"
    more = {"vocab_size": VOCAB, "num_labels": 1 if task == "stsb" else 2, "initializer_range": 0.2}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}
    size = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}
    teacher_size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    kinds = (DistilBertForQuestionAnswering, BertForQuestionAnswering)
    if not squad:
        kinds = (DistilBertForSequenceClassification, BertForSequenceClassification)
    return kinds[0](DistilBertConfig(**size, **off, **more)), kinds[1](BertConfig(**teacher_size, **more)).eval()


def rows(task: str) -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCAB, (length,), generator=draw)
        label = {
            "sst2": torch.randint(2, (), generator=draw),
            "stsb": 5 * torch.rand((), generator=draw),
            "squad": torch.randint(length, (2,), generator=draw).sort().values,
        }[task]
        types = (torch.arange(length) > length // 2).long()
        found.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "labels": label}
        )
    return found


def pad(examples: list[dict]) -> dict[str, torch.Tensor]:
    batch = {"labels": torch.stack([row["labels"] for row in examples])}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        batch[name] = torch.nn.utils.rnn.pad_sequence([row[name] for row in examples], batch_first=True)
    return batch


def truth(task: str, count: int = 7) -> dict[str, torch.Tensor]:
    """The gradient row by row, none of them padded, with PyTorch's own losses: temperature 2, weights 0.3 and 0.6."""
    student, teacher = models(task)
    total = 0
    for row in rows(task)[:count]:
        inputs = {k: v[None] for k, v in row.items() if k != "labels"}
        with torch.no_grad():
            t = teacher(**inputs)
        s = student(inputs["input_ids"], inputs["attention_mask"])
        if task == "stsb":
            total = total + 0.3 * (s.logits - t.logits).square().sum() + 0.6 * (s.logits - row["labels"]).square().sum()
            continue
        if task == "squad":
            ends = row["labels"][:, None]
            pairs = [(s.start_logits, t.start_logits, ends[0]), (s.end_logits, t.end_logits, ends[1])]
        else:
            pairs = [(s.logits, t.logits, row["labels"][None])]
        for z, v, label in pairs:
            kd = 4 * F.kl_div((z / 2).log_softmax(-1), (v / 2).softmax(-1), reduction="sum")
            total = total + (0.3 * kd + 0.6 * F.cross_entropy(z, label)) / len(pairs)
    (total / count).backward()
    return {name: p.grad for name, p in student.named_parameters()}


class Catch(TrainerCallback):
    gradient: dict

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: p.grad.clone() for name, p in model.named_parameters()}


def gradient(task: str, batch: int, accumulation: int, count: int = 7) -> dict[str, torch.Tensor]:
    student, teacher = models(task)
    catch = Catch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        weights = {"temperature": 2.0, "alpha_kd": 0.3, "alpha_hard": 0.6}
        trainer = TaskTrainer(student, arguments, pad, rows(task)[:count], teacher=teacher, **weights)
        trainer.add_callback(catch)
        trainer.train()
    return catch.gradient


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    error = torch.stack([(found[k] - g).norm() for k, g in expected.items()]).norm()
    assert size > 0.1
    assert error < 1e-6 * size
