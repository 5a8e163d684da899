"""What a distilling trainer reports of data without labels or teacher, and models that change after it was made."""

import math
import warnings
from typing import ClassVar

import datasets
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import TrainerCallback

from fusedkd.integrations.transformers import KDConfig

from .distil_step import VOCAB, gradient, llamas, make, rows, trainer
from .test_transformers import Padding, assert_equal, top_k, truth

ATTENDED = KDConfig(kd_on="attended", kd_weight=1.0, ce_weight=0.0)


def unlabelled(data, how: str):
    for row in data:
        row = dict(row)
        labels = row.pop("labels")
        yield row if how == "absent" else row | {"labels": torch.full_like(labels, -100)}


def test_columns_of_an_unused_teacher_are_left_out():
    """kd_weight = 0 on the same data: the ablation."""
    kd, data = KDConfig(kd_weight=0.0), list(rows())
    columns = [torch.ones(len(row["input_ids"]), 1 + i % 2, dtype=torch.int64) for i, row in enumerate(data)]
    listed = [
        row | {"teacher_ids": ids, "teacher_logprobs": -ids.float()} for row, ids in zip(data, columns, strict=True)
    ]
    assert_equal(gradient(llamas()[0], None, kd, data=listed), gradient(llamas()[0], None, kd, data=data))


# -------------------------------------------------- evaluation


@pytest.mark.parametrize("how", ["absent", "ignored"])
def test_without_labels_there_is_no_perplexity(how):
    student, teacher = llamas()
    _, expected = truth(student, teacher, KDConfig(kd_on="attended", temperature=1.0))
    metrics = trainer(student, teacher, ATTENDED, eval_dataset=list(unlabelled(rows(), how))).evaluate()
    assert metrics["eval_kl"] == pytest.approx(expected["kd"], rel=1e-5)
    assert metrics["eval_loss"] > 0.1
    assert metrics.keys().isdisjoint({"eval_ce", "eval_perplexity"})


def test_the_best_model_is_not_one_by_a_number_that_was_never_computed(tmp_path):
    student, teacher = llamas()
    data = list(unlabelled(rows(), "ignored"))
    options = {"eval_dataset": data, "eval_strategy": "steps", "eval_steps": 1, "folder": str(tmp_path)}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_perplexity", "save_steps": 1}
    with pytest.raises(KeyError, match=r"eval_perplexity.*not found in the evaluation metrics"):
        trainer(student, teacher, ATTENDED, data, save_strategy="steps", **options, **best).train()


def test_a_loss_of_no_row_is_no_number():
    metrics = trainer(*llamas(), eval_dataset=list(unlabelled(rows(), "ignored"))).evaluate()
    assert math.isnan(metrics["eval_loss"])
    assert metrics.keys().isdisjoint({"eval_ce", "eval_kl", "eval_perplexity"})


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_data_without_teacher_columns_is_evaluated_by_cross_entropy(name):
    student, teacher = make(name, 0), make(name, 1)
    data = list(rows())
    collator = Padding("right")
    for ce_weight in (0.25, 0.0):
        kd = KDConfig(ce_weight=ce_weight)
        _, expected = truth(student, teacher, kd, causal=name == "llama")
        run = trainer(student, None, kd, list(top_k(teacher, data, 3)), collator=collator, eval_dataset=data)
        metrics = run.evaluate()
        assert metrics["eval_ce"] == pytest.approx(expected["ce"], rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected["ce"]), rel=1e-5)
        loss = ce_weight * expected["ce"] if ce_weight else math.nan
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5, nan_ok=True)
        assert "eval_kl_top_k" not in metrics
    run = trainer(student, None, kd, data, collator=collator)
    with pytest.raises(ValueError, match="the data set must have the columns teacher_ids and teacher_logprobs"):
        run.train()


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_the_divergence_from_a_list_says_so(tail):
    """It is not that from the teacher, which the K columns do not tell."""
    student, teacher = llamas()
    kd, data = KDConfig(temperature=1.0, tail=tail), list(top_k(teacher, list(rows()), 4))
    found = []
    for row in data:
        log_q = student(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
        log_q, log_p = log_q.gather(-1, row["teacher_ids"].long()), row["teacher_logprobs"]
        if tail == "bucket":
            log_q, log_p = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_q, log_p))
        else:
            log_p = log_p.log_softmax(-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        found.append(kl[:-1][row["labels"][1:] != -100])
    metrics = trainer(student, None, kd, data, collator=Padding("right"), eval_dataset=data).evaluate()
    assert metrics["eval_kl_top_k"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)
    assert "eval_kl" not in metrics


# -------------------------------------------------- training


def test_batches_without_a_label_are_told_of_once():
    student, teacher = llamas()
    data = list(rows())
    blank = [*data[:4], *unlabelled(data[4:], "ignored")]
    options = {"batch": 4, "max_steps": 4, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    with pytest.warns(UserWarning, match="a batch without a row of ce and kd") as caught:
        trainer(student, teacher, data=blank, **options).train()
    assert sum("without a row" in str(each.message) for each in caught) == 1
    with pytest.warns(UserWarning, match="a batch without a row of ce, to which"):
        trainer(student, teacher, KDConfig(kd_on="attended"), blank, **options).train()
    with warnings.catch_warnings(action="error", category=UserWarning):
        trainer(student, teacher, data=data, **options).train()
        trainer(student, teacher, ATTENDED, blank, **options).train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_that_ends_begins_again(accumulation):
    stream = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4).to_iterable_dataset()
    run = trainer(*llamas(), data=stream, batch=1, max_steps=9, accumulation=accumulation)
    run.train()
    assert run.state.global_step == 9


def test_what_a_stream_ends_with_is_left_out():
    """Three batches, two in a step: each epoch has one step of the first two."""

    class Norm(TrainerCallback):
        found: ClassVar[list[float]] = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **more):
            self.found.append(sum(p.grad.square().sum() for p in model.parameters()).item())

    data = [{name: row[name] for name in ("input_ids", "labels")} for row in list(rows())[:3]]
    stream = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in data]).to_iterable_dataset()
    run = trainer(*llamas(), data=stream, batch=1, max_steps=4, accumulation=2, learning_rate=0.0)
    run.add_callback(Norm)
    with pytest.warns(UserWarning, match="the training stream ended within an optimiser step"):
        run.train()
    assert Norm.found == pytest.approx([Norm.found[0]] * 4)
    logs = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logs == pytest.approx([logs[0]] * 4)


def test_the_model_of_model_init_is_trained():
    made = []

    def model_init():
        made.append(llamas()[0].eval())
        return made[-1]

    expected = truth(*llamas(), KDConfig())
    _, teacher = llamas()
    assert_equal(gradient(None, teacher, model_init=model_init), expected)
    assert len(made) == 2
    assert made[0].lm_head is not made[1].lm_head


def test_a_second_training_logs_its_own_means():
    _, expected = truth(*llamas(), KDConfig())
    found = trainer(*llamas(), learning_rate=0.0)
    for _ in range(2):
        found.train()
        logs = [h for h in found.state.log_history if "loss" in h]
        assert logs[-1]["kd"] == pytest.approx(expected["kd"], rel=1e-5)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_embeddings_resized_after_the_trainer_was_made(side):
    kd = KDConfig()
    student, teacher = llamas()
    run = trainer(student, teacher, kd, eval_dataset=list(rows()))
    for model in (student, teacher):
        if side == "student" or model is teacher:
            model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    expected = truth(student, teacher, kd)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected[1]["loss"], rel=1e-5)
    run.train()
    logs = next(h for h in run.state.log_history if "loss" in h)
    assert logs["loss"] == pytest.approx(expected[1]["loss"], rel=1e-5)
    assert student.lm_head.weight.shape[0] == (VOCAB + 3 if side == "student" else VOCAB)
