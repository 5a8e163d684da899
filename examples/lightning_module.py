"""Distils a causal language model with Lightning: python examples/lightning_module.py

Lightning divides each loss by the accumulation steps, and DDP by the processes, so what the loss itself divides by is
the rows of the whole step over both. In earnest: --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --text paragraphs.txt
"""

import argparse
from itertools import islice
from pathlib import Path

import lightning
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import fusedkd

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="the student, on the hub or a folder; without it a tiny one is made")
parser.add_argument("--teacher", help="with the tokenizer of the student; without it a tiny one is made")
parser.add_argument("--text", default=__file__, help="a file, a document a line")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=4, help="rows per micro-batch")
parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
options = parser.parse_args()
set_seed(0)


def load(name: str | None, width: int):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.2, **shape))


def collate(rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids = pad_sequence(rows, batch_first=True)
    return ids, attended, ids.masked_fill(attended == 0, -100)


encode = AutoTokenizer.from_pretrained(options.model).encode if options.model else lambda text: list(text.encode())
lines = [line for line in Path(options.text).read_text().splitlines() if line.strip()]
loader = DataLoader([torch.tensor(encode(line)[:256]) for line in lines], options.batch, True, collate_fn=collate)
student, teacher = load(options.model, 32), load(options.teacher, 64).eval()


class Steps:
    """The batches of a loader, each with the number of rows of its optimiser step."""

    def __len__(self) -> int:
        return len(loader)

    def __iter__(self):
        batches = iter(loader)
        while micro_batches := list(islice(batches, options.accumulate)):
            rows = sum((labels[:, 1:] != -100).sum() for _, _, labels in micro_batches)
            yield from ((*batch, rows) for batch in micro_batches)


class Distillation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def training_step(self, batch, _) -> torch.Tensor:
        ids, attended, labels, rows = batch
        count = self.all_gather(rows).sum() / (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        with torch.no_grad():
            teacher_logits = self.teacher(ids, attention_mask=attended).logits[:, :-1]
        logits = self.student(ids, attention_mask=attended).logits[:, :-1]
        loss = fusedkd.kd_loss(
            logits, teacher_logits, labels[:, 1:], temperature=2.0, kd_weight=0.5, ce_weight=0.5,
            kd_normalizer=count, ce_normalizer=count,
        )  # fmt: skip
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=2e-5 if options.model else 1e-2)


trainer = lightning.Trainer(
    max_steps=options.steps, accumulate_grad_batches=options.accumulate, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Distillation(), Steps())
print(f"{trainer.global_step} steps, loss of the last micro-batch {trainer.callback_metrics['loss']:.4f}")
