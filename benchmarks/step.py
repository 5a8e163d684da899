"""A whole step of the DistilBERT driver beside an eager implementation of the same triple loss: time, memory, error.

    python -m benchmarks.step benchmarks/results                  step-cpu.json in the folder
    python -m benchmarks.step benchmarks/results --device cuda    step-cuda.json

A step: forward passes of student and teacher, loss, backward pass, AdamW. Whoever computes the loss, it is the same
models on the same batch; fusedkd is measured as DistilBertTrainer.compute_loss, which is what the driver runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import interleave, peak_bytes, seconds_of, set_malloc
from benchmarks.record import process, stamp
from benchmarks.speed import MEMORY, duration, relative, size
from fusedkd.nn import DistilBertLoss

LOSS = DistilBertLoss()  # its temperature and weights
PROVIDERS = ("fusedkd", "eager", "torch.compile")
SECONDS = {"step": 30.0, "loss": 15.0}  # of timed rounds, per shape
ROUNDS = range(5, 30)


@dataclass(frozen=True)
class Shape:
    """A teacher of BERT's architecture, a DistilBERT of half its layers, and `batch` × `length` tokens."""

    layers: int
    width: int
    heads: int
    batch: int
    length: int
    masked: float  # share of the tokens that carry the MLM term
    vocabulary: int = 30522

    @property
    def label(self) -> str:
        models = f"{self.layers}×{self.width} → {max(self.layers // 2, 1)}×{self.width}"
        return f"{models}, {self.batch}×{self.length} tokens, {self.masked:.0%} masked"


SHAPES = {
    "cpu": [Shape(12, 768, 12, 8, 128, 0.15), Shape(4, 128, 4, 32, 64, 0.4)],  # BERT-base; what the ablation trains
    "cuda": [Shape(12, 768, 12, 32, 512, 0.15)],
}


# -------------------------------------------------- the loss in plain PyTorch


def triple_loss(
    z: Tensor, v: Tensor, student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor, attended: Tensor
) -> Tensor:
    """DistilBERT's loss of the logits ``(B, L, V)`` and last hidden states ``(B, L, H)`` of student and teacher.

    The rows of a mean are selected by weights, which copies no logits and compiles. On a GPU, autocast makes float32 of
    16-bit logits where a softmax begins.
    """
    n = attended.sum()
    log_q, p = F.log_softmax(z / LOSS.temperature, -1), F.softmax(v / LOSS.temperature, -1)
    kd = (F.kl_div(log_q, p, reduction="none").sum(-1) * attended).sum() / n * LOSS.temperature**2
    mlm = F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=-100)
    cos = ((1 - F.cosine_similarity(student_hidden, teacher_hidden, -1)) * attended).sum() / n
    return LOSS.alpha_distil * kd + LOSS.alpha_mlm * mlm + LOSS.alpha_cos * cos


@cache
def plain(provider: str) -> Callable[..., Tensor]:
    return torch.compile(triple_loss, dynamic=False) if provider == "torch.compile" else triple_loss


# -------------------------------------------------- one step


class Step:
    """Models, optimiser and batch of a shape; what each provider does with them."""

    def __init__(self, shape: Shape, device: str):
        from transformers import BertConfig, BertForMaskedLM, TrainingArguments

        from fusedkd.distilbert.student import student_from_teacher
        from fusedkd.distilbert.trainer import DistilBertTrainer

        self.device = device
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=shape.vocabulary,
            num_hidden_layers=shape.layers,
            hidden_size=shape.width,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
        )
        teacher = BertForMaskedLM(config)
        student = student_from_teacher(teacher, init="random")  # a copy of random weights would be near it
        with tempfile.TemporaryDirectory() as folder:
            precision = {"use_cpu": True} if device == "cpu" else {"bf16": True}
            arguments = TrainingArguments(folder, report_to="none", disable_tqdm=True, **precision)
            self.trainer = DistilBertTrainer(student, teacher, arguments, loss=LOSS)
        self.student, self.teacher = student.train(), self.trainer.teacher
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-4, fused=True)

        ids = torch.randint(shape.vocabulary, (shape.batch, shape.length))
        labels = torch.full_like(ids, -100)
        chosen = torch.randperm(ids.numel())[: round(shape.masked * ids.numel())]
        labels.view(-1)[chosen] = torch.randint(shape.vocabulary, chosen.shape)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.batch = {name: x.to(device) for name, x in batch.items()}

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.device == "cpu" else torch.autocast(self.device, torch.bfloat16)

    def loss(self, provider: str) -> Tensor:
        """Of the models' outputs."""
        with self.autocast():
            if provider == "fusedkd":
                loss: Tensor = self.trainer.compute_loss(self.student, dict(self.batch))
                return loss
            inputs = {k: v for k, v in self.batch.items() if k != "labels"} | {"output_hidden_states": True}
            student = self.student(**inputs)
            with torch.no_grad():
                teacher = self.teacher(**inputs)
            states = student.hidden_states[-1], teacher.hidden_states[-1]
            masks = self.batch["labels"], self.batch["attention_mask"]
            return plain(provider)(student.logits, teacher.logits, *states, *masks)

    def run(self, provider: str) -> None:
        self.loss(provider).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self, provider: str) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to all weights in one vector; the same dropout each time."""
        torch.manual_seed(1)
        loss = self.loss(provider)
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in self.student.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return loss.detach(), found

    def alone(self) -> Callable[[str], Any]:
        """A function of the provider: from the input of both heads to the loss and its gradient there."""
        with self.autocast(), torch.no_grad():
            pair, _ = self.trainer._run(self.student, dict(self.batch), lambda pair: pair, False, True)
        leaves = [x.requires_grad_() for x in (pair.hidden, pair.states.hidden[-1])]
        teacher_state = pair.teacher_states.hidden[-1]
        pair = pair._replace(states=pair.states._replace(hidden=(*pair.states.hidden[:-1], leaves[1])))
        counts = torch.stack([mask.sum() for mask in pair.masks])
        wanted = [*leaves, pair.weight, pair.bias]

        def run(provider: str) -> Any:
            with self.autocast():
                if provider == "fusedkd":
                    loss, _ = self.trainer.losses(pair, counts)
                else:
                    head = pair.teacher
                    with torch.no_grad():
                        v = F.linear(head.hidden, head.weight, head.bias)
                    z = F.linear(pair.hidden, pair.weight, pair.bias)
                    masks = self.batch["labels"], self.batch["attention_mask"]
                    loss = plain(provider)(z, v, leaves[1], teacher_state, *masks)
            return torch.autograd.grad(loss, wanted)

        return run


# -------------------------------------------------- measuring


def measure(shape: Shape, providers: Sequence[str], device: str) -> list[dict[str, Any]]:
    """An entry per provider, fusedkd and eager among them: time and peak memory of the step and of its loss, distance
    from eager.
    """
    step = Step(shape, device)
    gradients = {provider: step.gradient(provider) for provider in providers}
    expected, truth = gradients["eager"]
    entries: dict[str, dict[str, Any]] = {
        provider: {
            **asdict(shape),
            "shape": shape.label,
            "provider": provider,
            "value": value.item(),
            "value_difference": abs(value / expected - 1).item(),
            "gradient_difference": ((gradient - truth).norm() / truth.norm()).item(),
        }
        for provider, (value, gradient) in gradients.items()
    }
    del gradients, truth
    step.run(providers[0])  # from here on the optimiser has its state
    for name, run in (("step", step.run), ("loss", step.alone())):
        runs = {provider: partial(run, provider) for provider in providers}
        start = time.perf_counter()
        peaks = {provider: peak_bytes(run, device) for provider, run in runs.items()}
        rounds = round(SECONDS[name] / (time.perf_counter() - start))
        timed = {p: lambda _, run=run: seconds_of(lambda _: run(), 0, device) for p, run in runs.items()}
        seconds = interleave(timed, min(max(rounds, ROUNDS.start), ROUNDS.stop))
        for provider, found in seconds.items():
            fifths = statistics.quantiles(found, n=5)
            entries[provider][name] = {
                "rounds": len(found),
                "median": statistics.median(found),
                "p20": fifths[0],
                "p80": fifths[-1],
                "ratio": statistics.median(a / b for a, b in zip(found, seconds["fusedkd"], strict=True)),
                "peak_bytes": peaks[provider],
            }
    return list(entries.values())


def record(shapes: Sequence[Shape], providers: Sequence[str], device: str, command: str) -> dict[str, Any]:
    return {
        "machine_info": {**process(command), "memory": "fresh" if device == "cpu" else None},
        **stamp(),
        "driver_step": [entry for shape in shapes for entry in measure(shape, providers, device)],
    }


# -------------------------------------------------- table


def table(data: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Header and five rows per shape; legend."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for entry in data["driver_step"]:
        shapes.setdefault(entry["shape"], []).append(entry)
    rows = [["", "", *(entry["provider"] for entry in next(iter(shapes.values())))]]
    for shape, entries in shapes.items():
        rows += [
            [shape, "step", *(_time(entry, "step") for entry in entries)],
            ["", "its memory", *(size(entry["step"]["peak_bytes"]) for entry in entries)],
            ["", "of it the loss", *(_time(entry, "loss") for entry in entries)],
            ["", "its memory", *(size(entry["loss"]["peak_bytes"]) for entry in entries)],
            ["", "loss and gradient against eager", *map(_difference, entries)],
        ]
    rounds = [entry[name]["rounds"] for entry in data["driver_step"] for name in SECONDS]
    vocabulary = data["driver_step"][0]["vocabulary"]
    return rows, (
        f"{MEMORY.get(data['machine_info'].get('memory'), '')}"
        f"Teacher → student, layers × width, {vocabulary:,} tokens in the vocabulary. A step: forward passes of "
        "student and teacher, triple loss, backward pass, AdamW. Of it the loss: from the input of both output heads "
        "to the loss and the gradient there. fusedkd: DistilBertTrainer; torch.compile: the eager loss compiled, the "
        f"models not. Medians of {min(rounds)} to {max(rounds)} rounds in which the providers took turns, p20–p80 in "
        "brackets, and the time relative to fusedkd's. Memory: the peak beyond weights and optimiser state, or beyond "
        "the hidden states. Last row: relative difference from eager at the same weights, batch and dropout."
    )


def _time(entry: dict[str, Any], name: str) -> str:
    found = entry[name]
    spread = f"({duration(found['p20'])}–{duration(found['p80'])})"
    if entry["provider"] == "fusedkd":
        return f"**{duration(found['median'])}** {spread}"
    return f"{duration(found['median'])} {spread} {found['ratio']:.2f}×"


def _difference(entry: dict[str, Any]) -> str:
    names = ("value_difference", "gradient_difference")
    return "–" if entry["provider"] == "eager" else " / ".join(relative(entry[name]) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    command = f"python -m benchmarks.step {options.folder} --device {options.device}"
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"step-{options.device}.json"
    set_malloc("fresh")
    data = record(SHAPES[options.device], PROVIDERS, options.device, command)
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
