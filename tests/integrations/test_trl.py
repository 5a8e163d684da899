"""TRL's generalised JSD: value and gradient by formula for every reduction, and against TRL where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fusedkd.integrations.trl import generalized_jsd_loss

B, L, V = 3, 6, 40
BETAS = (0.0, 0.1, 0.5, 1.0)
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def formula(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """With probabilities, in float64."""
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    m = beta * p + (1 - beta) * q
    summands = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    if beta in (0, 1):
        summands = q * (q / p).log() if beta else p * (p / q).log()
    if labels is not None:
        summands = summands[labels != -100]
    if num_items_in_batch is not None:
        return summands.sum() / num_items_in_batch
    rows = B if labels is None else max(len(summands), 1)
    return {"batchmean": summands.sum() / rows, "sum": summands.sum(), "mean": summands.mean()}.get(reduction, summands)


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, noise = (torch.randn(B, L, V, dtype=torch.float64, generator=draw) * 2 for _ in range(2))
    labels = torch.randint(V, (B, L), generator=draw)
    labels[0, :2] = labels[1, 3:] = labels[2, 1:] = -100
    return student.to(request.param), (student + 0.5 * noise).to(request.param), labels


def same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], student: Tensor, tight: bool) -> None:
    """Value and gradient, the latter for an upstream that differs from element to element."""
    results = []
    for function in (ours, theirs):
        leaf = student.clone().requires_grad_()
        loss = function(leaf)
        upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss.detach().double(), torch.autograd.grad(loss, leaf, upstream)[0].double()))
    (value, gradient), (true_value, true_gradient) = results
    tolerance = 1e-9 if tight else 2e-5
    assert value.shape == true_value.shape
    assert (value - true_value).norm() <= tolerance * true_value.norm()
    assert (gradient - true_gradient).norm() <= tolerance * true_gradient.norm()
    assert true_value.norm() > 1e-4
    assert true_gradient.norm() > 1e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [True, False])
def test_formula(batch: tuple[Tensor, ...], beta: float, temperature: float, reduction: str, masked: bool) -> None:
    student, teacher, labels = batch
    options = {"beta": beta, "temperature": temperature, "reduction": reduction, "labels": labels if masked else None}
    same(
        lambda z: generalized_jsd_loss(z, teacher, **options),
        lambda z: formula(z.double(), teacher.double(), **options),
        student,
        tight=student.dtype == torch.float64,
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("items", [29, torch.tensor(29), torch.tensor(29.0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_num_items_goes_before_the_reduction(batch: tuple[Tensor, ...], beta: float, items, reduction: str) -> None:
    student, teacher, labels = batch
    for chosen in (labels, None):
        options = {"labels": chosen, "beta": beta, "reduction": reduction, "num_items_in_batch": items}
        same(
            lambda z, o=options: generalized_jsd_loss(z, teacher, **o),
            lambda z, o=options: formula(z.double(), teacher.double(), **o),
            student,
            tight=student.dtype == torch.float64,
        )


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_nothing_labelled_is_zero_with_a_graph(batch: tuple[Tensor, ...], reduction: str) -> None:
    student, teacher, labels = batch
    student = student.clone().requires_grad_()
    loss = generalized_jsd_loss(student, teacher, torch.full_like(labels, -100), reduction=reduction)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_ignored_positions_and_the_teacher_get_no_gradient(batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = (x.clone() for x in batch)
    student[labels == -100] = torch.nan
    student.requires_grad_()
    generalized_jsd_loss(student, teacher.requires_grad_(), labels).backward()
    assert teacher.grad is None
    assert not student.grad[labels == -100].any()
    assert (student.grad[labels != -100].norm(dim=-1) > 0).all()


def test_causal_slices(batch: tuple[Tensor, ...]) -> None:
    """As its trainer calls it: no copy is needed of the logits without their last position."""
    student, teacher, labels = batch
    shifted = teacher[:, :-1], labels[:, 1:]
    same(
        lambda z: generalized_jsd_loss(z[:, :-1, :], *shifted),
        lambda z: formula(z.double()[:, :-1, :], shifted[0].double(), shifted[1]),
        student,
        tight=student.dtype == torch.float64,
    )


# -------------------------------------------------- against TRL


@pytest.fixture
def trainer() -> type:
    gkd = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    return gkd.GKDTrainer


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("items", [None, 29, torch.tensor(29)])
def test_installed_trl(trainer: type, batch: tuple[Tensor, ...], beta: float, reduction: str, items) -> None:
    student, teacher, labels = batch
    for chosen in (labels, None):
        options = {"labels": chosen, "beta": beta, "temperature": 0.9, "reduction": reduction}
        options["num_items_in_batch"] = items
        same(
            lambda z, o=options: generalized_jsd_loss(z, teacher, **o),
            lambda z, o=options: trainer.generalized_jsd_loss(z.double(), teacher.double(), **o),
            student,
            tight=student.dtype == torch.float64,
        )


def test_assigned_to_its_trainer(trainer: type, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.5}
    student, teacher = (transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).eval() for _ in range(2))
    ids = torch.randint(V, (B, L))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(ids > 9, -100)}
    results = []
    for replaced in (False, True):
        if replaced:
            monkeypatch.setattr(trainer, "generalized_jsd_loss", staticmethod(generalized_jsd_loss))
        stand_in = SimpleNamespace(teacher_model=teacher, beta=0.5, generalized_jsd_loss=trainer.generalized_jsd_loss)
        student.zero_grad()
        loss = trainer.compute_loss(stand_in, student, inputs, num_items_in_batch=torch.tensor(21))
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])))
    (theirs, their_gradient), (ours, gradient) = results
    assert ours == pytest.approx(theirs.item(), rel=1e-5)
    assert (gradient - their_gradient).norm() < 1e-4 * their_gradient.norm()
    assert their_gradient.norm() > 1e-2


def test_the_check_of_its_trainer(trainer: type, tmp_path) -> None:
    """What the docstring says of GKD. When this fails because TRL mended it, the docstring is to be mended too."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig

    from fusedkd.integrations.check import kd_check

    from .distillers import gpt2, tokenizer_of_letters

    talks = [[("user", "c d"), ("assistant", " ".join("efghijklmn"[: 1 + i]))] for i in range(8)]
    data = Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks])
    options = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, "max_length": 32}
    arguments = GKDConfig(lmbda=0.0, max_new_tokens=4, **options)
    found = trainer(gpt2(0), gpt2(1), arguments, processing_class=tokenizer_of_letters(), train_dataset=data)
    found.generalized_jsd_loss = generalized_jsd_loss
    processes, temperature = kd_check(found, expect_t2=False).faults
    assert "divided by the count of both, but not multiplied by their number" in processes
    assert "temperature has no effect" in temperature
