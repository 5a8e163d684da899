"""kd_check passes a correct trainer and names the fault of each wrong one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from fusedkd.distilbert.trainer import DistilBertTrainer
from fusedkd.integrations import probe
from fusedkd.integrations.check import kd_check
from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

from .distillers import (
    VOCABULARY,
    AlwaysGenerates,
    Classifier,
    CountedByHand,
    CountsEverything,
    DistilsPadding,
    DividedByHand,
    DividedTwice,
    Elsewhere,
    Fused,
    Generates,
    GradientOnly,
    GradientReachesTeacher,
    Head,
    ItemsIgnored,
    LocalCount,
    MicroBatchMean,
    Module,
    NoT2,
    NoTemperature,
    NotTimesProcesses,
    OnlyT,
    Refuses,
    Right,
    Twice,
    Unfrozen,
    ValueOnly,
    WithoutEntropy,
    arguments,
    gpt2,
    rows,
)


def check(kind: type[Trainer], folder: Any, data: Any = None, **options: Any):
    return kd_check(kind(gpt2(0), arguments(folder), default_data_collator, data or rows()), **options)


# -------------------------------------------------- correct ones


@pytest.mark.parametrize("kind", [Right, Fused, Module, Head])
def test_correct(kind: type[Trainer], tmp_path) -> None:
    report = check(kind, tmp_path)
    assert report.ok, report
    report.raise_for_faults()
    assert [run.name for run in report.runs] == ["8 × 1", "4 × 2", "2 × 4", "8 × 1, padded", "8 × 1, two processes"]
    for run in report.runs[1:]:
        assert run.scale == pytest.approx(1, abs=1e-4)
        assert run.difference < 1e-4
    assert abs(report.value_power) < 0.3
    assert abs(report.gradient_power) < 0.3
    assert not report.notes
    assert "no fault" in str(report)
    assert "2 × 4" in str(report)


def test_distilbert_trainer(tmp_path) -> None:
    """Three terms with two counts, one of which has no temperature."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    student, teacher = (
        BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, initializer_range=0.4, **size)) for _ in range(2)
    )
    trainer = DistilBertTrainer(student, teacher, arguments(tmp_path), default_data_collator, rows())
    report = kd_check(trainer)
    assert report.ok, report
    assert abs(report.gradient_power) < 0.3
    assert not report.notes
    assert not trainer.terms


@pytest.mark.parametrize("kd_on", ["labels", "attended"])
@pytest.mark.parametrize("divergence", ["forward_kl", [(0.5, "forward_kl"), (0.5, "dkd")]], ids=["one", "two"])
def test_own_trainer(kd_on: str, divergence: Any, tmp_path) -> None:
    """Which never makes logits, of student or teacher."""
    kd = KDConfig(kd_on=kd_on, temperature=3.0, ce_weight=0.7, divergence=divergence)
    trainer = DistillationTrainer(gpt2(0), gpt2(1), arguments(tmp_path), default_data_collator, rows(), kd=kd)
    report = kd_check(trainer)
    assert report.ok, report
    assert abs(report.gradient_power) < 0.3
    assert not report.notes
    assert kd.temperature == 3.0


@pytest.mark.parametrize("t2", [True, False])
def test_classifier(t2: bool, tmp_path) -> None:
    """A label per row, and a teacher without output embeddings."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=VOCABULARY, initializer_range=0.4, num_labels=5, **size)
    torch.manual_seed(0)
    student, teacher = (BertForSequenceClassification(config) for _ in range(2))
    data = [{**row, "labels": torch.tensor(i % 5)} for i, row in enumerate(rows())]
    trainer = Classifier(student, arguments(tmp_path), default_data_collator, data)
    trainer.teacher, trainer.t2 = teacher.eval(), t2
    report = kd_check(trainer)
    assert report.ok == t2, report
    assert report.gradient_power == pytest.approx(0 if t2 else 2, abs=0.3)


def test_it_leaves_no_trace(tmp_path) -> None:
    trainer = Right(gpt2(0), arguments(tmp_path), default_data_collator, rows())
    trainer.model.train()
    trainer.model.transformer.h[0].eval()
    first = next(trainer.model.parameters())
    first.grad = torch.ones_like(first)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    teacher = {k: v.clone() for k, v in trainer.teacher_model.state_dict().items()}
    modes = [m.training for m in trainer.model.modules()]
    attributes, options = dict(vars(trainer)), trainer.args.to_dict()
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    assert kd_check(trainer).ok
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    assert all(torch.equal(teacher[k], v) for k, v in trainer.teacher_model.state_dict().items())
    assert [m.training for m in trainer.model.modules()] == modes
    assert vars(trainer) == attributes
    assert trainer.logged == []
    assert trainer.args.to_dict() == options
    assert torch.equal(first.grad, torch.ones_like(first))
    assert sum(p.grad is not None for p in trainer.model.parameters()) == 1
    assert "train" not in vars(trainer.model)
    assert trainer.teacher_model.lm_head.weight is trainer.teacher_model.transformer.wte.weight
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not trainer.accelerator._dataloaders


class Catch(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_its_steps_are_those_of_training(accumulation: int, tmp_path) -> None:
    """Of a trainer whose gradient depends on how the examples are cut."""
    data = sorted(rows(), key=lambda row: -(row["labels"] != -100).sum())[:8]
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    options |= {"max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no", "disable_tqdm": True}
    options["train_sampling_strategy"] = "sequential"
    trainer = MicroBatchMean(gpt2(0, dropout=0), arguments(tmp_path, **options), default_data_collator, data)
    with probe.undisturbed(trainer) as twin:
        loss, gradient = probe.step(twin, probe.cut(probe.examples(twin), accumulation))
    catch = Catch()
    trainer.add_callback(catch)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert catch.gradient.keys() == gradient.keys()
    assert probe.norm(probe.minus(catch.gradient, gradient)) < 1e-5 * probe.norm(catch.gradient)
    assert probe.norm(gradient) > 0.1


# -------------------------------------------------- accumulation


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (MicroBatchMean, "different numbers of tokens weigh the same"),
        (ItemsIgnored, "nobody divides by their number"),
        (DividedTwice, "divided twice by the number of micro-batches"),
        (DividedByHand, "divided twice by the number of micro-batches"),
    ],
)
def test_accumulation(kind: type[Trainer], sentence: str, tmp_path) -> None:
    report = check(kind, tmp_path)
    assert len(report.faults) == 1, report
    assert sentence in report.faults[0]
    assert sentence in str(report)
    assert not report.ok
    with pytest.raises(AssertionError, match=sentence):
        report.raise_for_faults()
    expected = {ItemsIgnored: 4, DividedTwice: 1 / 4, DividedByHand: 1 / 4, MicroBatchMean: 1}[kind]
    assert report.runs[2].scale == pytest.approx(expected, rel=0.25)


def test_even_micro_batches_hide_their_means(tmp_path) -> None:
    report = check(MicroBatchMean, tmp_path, data=rows(prompts=False))
    assert report.ok, report
    assert any("equally many labels" in note for note in report.notes)


def test_heads_of_masked_models(tmp_path) -> None:
    """transformers' own: the Trainer counts the items, and BertForMaskedLM takes a mean. No teacher, so no T²."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **size))
    report = kd_check(Trainer(model, arguments(tmp_path), default_data_collator, rows()))
    assert "nobody divides by their number" in report.faults[0]
    assert any(note.startswith("T²: no temperature") for note in report.notes)
    assert report.gradient_power is None


# -------------------------------------------------- counts


@pytest.mark.parametrize("kind", [CountsEverything, DistilsPadding])
def test_padding(kind: type[Trainer], tmp_path) -> None:
    report = check(kind, tmp_path)
    assert len(report.faults) == 1, report
    assert "ignored positions are distilled or counted" in report.faults[0]
    if kind is CountsEverything:
        assert report.runs[3].scale == pytest.approx(2 / 3, rel=1e-3)


# -------------------------------------------------- processes


@pytest.mark.parametrize(
    ("kind", "scale", "sentence"),
    [(NotTimesProcesses, 0.5, "not multiplied by their number"), (LocalCount, 2, "divided by the count of one")],
)
def test_processes(kind: type[Trainer], scale: float, sentence: str, tmp_path) -> None:
    report = check(kind, tmp_path)
    assert len(report.faults) == 1, report
    assert sentence in report.faults[0]
    assert report.runs[4].scale == pytest.approx(scale, rel=1e-3)


def test_processes_counted_by_hand(tmp_path) -> None:
    assert check(CountedByHand, tmp_path).ok


# -------------------------------------------------- T²


@pytest.mark.parametrize(
    ("kind", "value", "gradient", "sentence"),
    [
        (NoT2, 2, 2, "T² is missing in value and gradient"),
        (WithoutEntropy, 2, 2, "T² is missing in value and gradient"),
        (OnlyT, 1, 1, "T² is missing in value and gradient"),
        (ValueOnly, 0, 2, "T² is in the value but not in the gradient"),
        (GradientOnly, 2, 0, "T² is in the gradient but not in the value"),
        (Twice, -2, -2, "more than once"),
        (NoTemperature, None, None, "neither loss nor gradient depends on temperature"),
        (Unfrozen, 2, 2, "T² is missing in value and gradient"),
        (GradientReachesTeacher, 2, 2, "T² is missing in value and gradient"),
    ],
)
def test_t2(kind: type[Trainer], value: float, gradient: float, sentence: str, tmp_path) -> None:
    report = check(kind, tmp_path)
    assert len(report.faults) == 1, report
    assert sentence in report.faults[0]
    if value is None:
        assert report.gradient_power is None
    else:
        assert report.value_power == pytest.approx(value, abs=0.3)
        assert report.gradient_power == pytest.approx(gradient, abs=0.3)


@pytest.mark.parametrize(("kind", "ok"), [(NoT2, True), (Right, True), (ValueOnly, False)])
def test_the_convention_without_t2(kind: type[Trainer], ok: bool, tmp_path) -> None:
    assert check(kind, tmp_path, expect_t2=False).ok == ok


# -------------------------------------------------- what is said rather than raised


def test_two_faults(tmp_path) -> None:
    report = check(Elsewhere, tmp_path)
    assert len(report.faults) == 2, report
    assert "2 faults" in str(report)
    assert "two processes" in report.faults[0]
    assert "T² is missing" in report.faults[1]


def test_a_temperature_that_is_refused_is_a_note(tmp_path) -> None:
    report = check(Refuses, tmp_path)
    assert report.ok
    assert report.notes == ("T²: another temperature is refused (temperature must be 2).",)
    assert "not checked: T²" in str(report)


@pytest.mark.parametrize("count", [3, 5])
def test_few_examples_are_enough(count: int, tmp_path) -> None:
    report = check(Right, tmp_path, data=rows()[-count:])
    assert report.ok, report
    assert not report.notes
    assert len(report.runs) == 5
    for kind, sentence in ((MicroBatchMean, "different numbers of tokens weigh the same"), (NoT2, "T² is missing")):
        faults = check(kind, tmp_path, data=rows()[-count:]).faults
        assert len(faults) == 1
        assert sentence in faults[0]


def test_a_batch_without_rows_is_a_note(tmp_path) -> None:
    ids = torch.arange(1, 13)[None]

    def flattened(examples):
        return {"input_ids": ids, "labels": ids, "cu_seq_lens_q": torch.tensor([0, 5, 12])}

    report = kd_check(Right(gpt2(0), arguments(tmp_path), flattened, rows()))
    assert report.ok
    assert report.notes == ("anything: the training data gave no batch with a number of rows.",)
    assert "nothing was checked" in str(report)


def test_generated_text_is_switched_off(tmp_path) -> None:
    report = check(Generates, tmp_path)
    assert report.ok, report
    assert report.notes == ("text that the trainer generates (lmbda = 1): all here is with lmbda = 0.",)
    assert len(report.runs) == 5
    assert abs(report.gradient_power) < 0.3


def test_a_step_that_draws_is_a_note(tmp_path) -> None:
    report = check(AlwaysGenerates, tmp_path)
    assert report.ok, report
    assert "two steps of one batch differ" in report.notes[0]
    assert "nothing was checked" in str(report)


def test_no_gradient(tmp_path) -> None:
    data = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows()]
    report = check(Fused, tmp_path, data=data)
    assert not report.ok
    assert "norm" in report.faults[0]
