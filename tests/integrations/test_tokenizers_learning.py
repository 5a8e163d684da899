"""A student learns from a teacher of another tokenizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from fusedkd import GOLD, ULD, TeacherHead, TeacherProjected, linear_kd_loss
from fusedkd.integrations.tokenizers import PairedBatch, paired, projection, shared_ids

from .made_tokenizers import TEXT, byte_level, metaspace


class Bigram(nn.Module):
    """Hidden states of a token, and a head that makes of them the logits of the next one."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)  # type: ignore[no-any-return]

    def cross_entropy(self, side: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Of the next tokens, at all rows or some."""
        labels = side["input_ids"].masked_fill(side["attention_mask"] == 0, -100)[:, 1:]
        if mask is not None:
            labels = labels.masked_fill(~mask[:, :-1], -100)
        logits = self.head(self(side["input_ids"]))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def learn(step: Any, model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Lesson(NamedTuple):
    """A teacher that has learnt the text, and a student that has not."""

    tokenizers: tuple[Any, Any]
    """The student's and the teacher's."""
    student: Bigram
    teacher: Bigram
    seen: PairedBatch
    unseen: PairedBatch

    def of(self, batch: PairedBatch) -> TeacherHead:
        states = self.teacher(batch.teacher["input_ids"])
        return TeacherHead(batch.teacher_rows(states), self.teacher.head.weight)


@pytest.fixture
def lesson() -> Lesson:
    torch.manual_seed(0)
    tokenizers = metaspace(320), byte_level(400)
    lines = [line[:60] for line in TEXT]
    seen, unseen = (paired(each, *tokenizers) for each in (lines[1::4] + lines[2::4], lines[::4]))
    student, teacher = (Bigram(len(tokenizer)) for tokenizer in tokenizers)
    learn(lambda: teacher.cross_entropy(seen.teacher), teacher, 30)
    return Lesson(tokenizers, student, teacher.requires_grad_(False), seen, unseen)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_student_learns_from_a_teacher_of_another_tokenizer(lesson: Lesson, shift: int) -> None:
    """By W it comes close to it on other text, and predicts the text without a label; with rows one off it does not."""
    weight, student, seen, unseen = projection(*lesson.tokenizers), lesson.student, lesson.seen, lesson.unseen

    @torch.no_grad()
    def found() -> tuple[float, float]:
        hidden, given = student(unseen.student["input_ids"]), TeacherProjected(lesson.of(unseen), weight)
        kl = linear_kd_loss(hidden, student.head.weight, given, kd_mask=unseen.mask)
        return kl.item(), student.cross_entropy(seen.student, seen.mask).item()

    def step() -> Tensor:
        return linear_kd_loss(student(seen.student["input_ids"]), student.head.weight, given, kd_mask=seen.mask)

    last = seen.teacher["input_ids"].numel() - 1
    rows = torch.where(seen.mask, (seen.rows + shift).clamp(max=last), -1)
    given = TeacherProjected(lesson.of(seen._replace(rows=rows)), weight)
    before, losses, after = found(), learn(step, student, 40), found()
    assert losses[-1] < 0.5 * losses[0]
    right = shift == 0
    assert (after[0] < 0.5 * before[0]) == right
    assert (after[1] < 0.75 * before[1]) == right


def test_sorted_probabilities_and_shared_ids_teach(lesson: Lesson) -> None:
    """Of ULD and GOLD, from a teacher's head."""
    batch, start = lesson.unseen, {name: x.clone() for name, x in lesson.student.state_dict().items()}
    student, given = lesson.student, lesson.of(batch)
    for divergence in (ULD(), GOLD(*shared_ids(*lesson.tokenizers))):
        student.load_state_dict(start)

        def step(divergence: Any = divergence) -> Tensor:
            hidden = student(batch.student["input_ids"])
            return linear_kd_loss(hidden, student.head.weight, given, kd_mask=batch.mask, divergence=divergence)

        losses = learn(step, student, 8)
        assert losses[-1] < 0.85 * losses[0]
