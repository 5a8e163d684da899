"""Small distilling trainers, correct ones and ones with a fault each: those of published trainers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fusedkd import kd_loss
from fusedkd.nn import KDLoss

VOCABULARY, LENGTH, ROWS = 48, 12, 11


def gpt2(seed: int, dropout: float = 0.2, **more: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    size = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    size |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.4, **more))


def tokenizer_of_letters() -> Any:
    """A word each, for a chat."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *map(chr, range(ord("a"), ord("a") + VOCABULARY - 2))]
    splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} <eos> {% endfor %}"
    return tokenizer


def rows(prompts: bool = True) -> list[dict[str, Tensor]]:
    """Prompts and endings of different lengths, so that means of micro-batches are not the mean."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for i in range(ROWS):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=draw)
        place = torch.arange(LENGTH)
        attended = place < 4 + i if prompts else place >= 0
        labels = torch.where(attended & (place >= i % 5), ids, -100) if prompts else ids
        found.append({"input_ids": ids * attended, "attention_mask": attended.long(), "labels": labels})
    return found


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, remove_unused_columns=False, **options)


class Right(Trainer):
    """(1 − r)·CE + r·T²·KL over the labelled tokens of the whole step, by PyTorch's operators. The faulty ones change a
    line each.
    """

    loss_is_scaled_for_ga = True
    temperature = 2.0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher_model = gpt2(1).eval().requires_grad_(False)
        self.logged: list[float] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher_model(**inputs).logits[:, :-1]
        loss = self.divide(self.summed(outputs.logits[:, :-1], teacher, labels), labels, num_items_in_batch)
        self.logged.append(loss.item())
        return (loss, outputs) if return_outputs else loss

    def summed(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q, log_p = ((x[labels != -100] / self.temperature).log_softmax(-1) for x in (student, teacher))
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        ce = F.cross_entropy(student.transpose(1, 2), labels, reduction="sum")
        return 0.5 * ce + 0.5 * self.with_t2(kl)

    def with_t2(self, kl: Tensor) -> Tensor:
        return self.temperature**2 * kl

    def divide(self, loss: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        return loss / items * self.accelerator.num_processes


# -------------------------------------------------- correct ones


class Fused(Right):
    def summed(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss = KDLoss(temperature=self.temperature, kd_weight=0.5, ce_weight=0.5, reduction="sum")
        return loss(student, teacher, labels)


class Module(Right):
    """The temperature is an option of a module; the loss a reverse KL."""

    temperature = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kd = KDLoss(temperature=3.0, divergence="reverse_kl", reduction="sum")

    def summed(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.kd(student, teacher, labels)


class Head(Right):
    """Hidden states and the teacher's head, whose logits nobody returns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        with torch.no_grad():
            hidden = self.teacher_model.transformer(**inputs)[0][:, :-1]
        teacher = hidden @ self.teacher_model.lm_head.weight.T
        loss = kd_loss(
            outputs.logits[:, :-1], teacher, labels, temperature=self.temperature, kd_normalizer=num_items_in_batch
        )
        return loss * self.accelerator.num_processes


class Classifier(Trainer):
    """Of rows, each with one label: a mean, by the number of which the Trainer divides."""

    loss_is_scaled_for_ga = False
    temperature, t2 = 4.0, True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits
        return kd_loss(
            outputs.logits, teacher, labels, temperature=self.temperature, ce_weight=0.3, scale_by_t2=self.t2
        )


# -------------------------------------------------- accumulation


class MicroBatchMean(Right):
    """ms-swift, DistiLLM: each micro-batch over its own tokens, and the Trainer divides by their number."""

    loss_is_scaled_for_ga = False

    def divide(self, loss: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        return loss / (labels != -100).sum()


class ItemsIgnored(Right):
    """ModelOpt: a mean per micro-batch in a Trainer that believes it is scaled; grows with the accumulation."""

    def divide(self, loss: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        return loss / (labels != -100).sum()


class DividedTwice(Right):
    loss_is_scaled_for_ga = False


class DividedByHand(Right):
    def divide(self, loss: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        return super().divide(loss, labels, items) / self.args.gradient_accumulation_steps


# -------------------------------------------------- counts


class CountsEverything(Right):
    def _get_num_items_in_batch(self, batch_samples, device):
        return sum(b["labels"].numel() for b in batch_samples) * torch.tensor(self.accelerator.num_processes)


class DistilsPadding(Right):
    """KD on all positions, labelled or not."""

    def summed(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return super().summed(student, teacher, labels.clamp(min=0))


# -------------------------------------------------- processes


class NotTimesProcesses(Right):
    """TRL's GKD and axolotl."""

    def divide(self, loss: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        return loss / items


class LocalCount(Right):
    """Multiplies, but counts its own tokens only."""

    def _get_num_items_in_batch(self, batch_samples, device):
        return sum((b["labels"][:, 1:] != -100).sum() for b in batch_samples)


class CountedByHand(LocalCount):
    """Correct: gathered by the trainer itself, as are a metric and a sum."""

    def _get_num_items_in_batch(self, batch_samples, device):
        count = super()._get_num_items_in_batch(batch_samples, device)
        if self.args.world_size == 1:
            return count
        assert self.accelerator.gather(count).shape == (2,)
        assert self.accelerator.gather_for_metrics({"rows": torch.ones(8, 3)})["rows"].shape == (16, 3)
        assert torch.equal(self.accelerator.reduce(count, "mean"), count)
        return self.accelerator.reduce(count, "sum")


# -------------------------------------------------- T²


class NoT2(Right):
    def with_t2(self, kl: Tensor) -> Tensor:
        return kl


class ValueOnly(Right):
    """axolotl: the value has T², the hand-written gradient does not."""

    def with_t2(self, kl: Tensor) -> Tensor:
        return kl + (self.temperature**2 - 1) * kl.detach()


class GradientOnly(Right):
    def with_t2(self, kl: Tensor) -> Tensor:
        return self.temperature**2 * kl - (self.temperature**2 - 1) * kl.detach()


class Twice(Right):
    def with_t2(self, kl: Tensor) -> Tensor:
        return self.temperature**4 * kl


class OnlyT(Right):
    def with_t2(self, kl: Tensor) -> Tensor:
        return self.temperature * kl


class NoTemperature(Right):
    """TRL's GKD: the temperature is that of its sampling."""

    def summed(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return kd_loss(student, teacher, labels, reduction="sum")


class WithoutEntropy(NoT2):
    """−Σ p log q, as in TextBrewer: its value does not tend to 0, but the teacher's part of it does."""

    def summed(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        keep = labels != -100
        p = (teacher[keep] / self.temperature).softmax(-1)
        return -(p * (student[keep] / self.temperature).log_softmax(-1)).sum()


class Unfrozen(NoT2):
    """Nobody froze the teacher, whose head is not its embedding."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher_model = gpt2(1, tie_word_embeddings=False).eval()
        assert all(p.requires_grad for p in self.teacher_model.parameters())


class GradientReachesTeacher(Unfrozen):
    """And nobody said that it needs no gradient."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        student, teacher = (each(**inputs).logits[:, :-1] for each in (model, self.teacher_model))
        return self.divide(self.summed(student, teacher, labels), labels, num_items_in_batch)


# -------------------------------------------------- others


class Generates(Right):
    """TRL's GKD: a share `lmbda` of the batches is made of text that the student draws."""

    lmbda = 1.0

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.drawn(inputs):
            tokens = torch.randint(1, VOCABULARY, inputs["input_ids"].shape)
            inputs = {**inputs, "input_ids": tokens * inputs["attention_mask"]}
        return super().training_step(model, inputs, num_items_in_batch)

    def drawn(self, inputs: Any) -> bool:
        return random.random() < self.lmbda


class AlwaysGenerates(Generates):
    """Nothing that is known switches it off."""

    lmbda = None

    def drawn(self, inputs: Any) -> bool:
        return True


class Refuses(Right):
    def with_t2(self, kl: Tensor) -> Tensor:
        if self.temperature != 2:
            raise ValueError("temperature must be 2")
        return 4 * kl


@dataclass
class Config:
    kd_temperature: float = 2.0


class Elsewhere(Right):
    """The temperature in a configuration object, and another fault beside: both are found."""

    temperature = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.config = Config()

    def summed(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        options = {"temperature": self.config.kd_temperature, "scale_by_t2": False}
        return kd_loss(student, teacher, labels, reduction="sum", **options)

    def divide(self, loss: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        return loss / items
