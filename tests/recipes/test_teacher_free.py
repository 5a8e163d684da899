"""Generations, reversed and defective teachers: who teaches whom, for how long, and with what loss."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from method_step import CLASSES, fresh_run, random_step
from transformers import AutoModelForSequenceClassification

from recipes.glue.method import methods, parse_method
from recipes.methods import born_again, teacher_free


@pytest.fixture
def run(tmp_path):
    return fresh_run(tmp_path)


def test_permuted_predictions_keep_their_largest():
    logits = torch.randn(50, 5)
    found = born_again.permuted(logits, 0)
    assert torch.equal(found.amax(-1), logits.amax(-1))
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    assert torch.equal(found.sort(-1).values, logits.sort(-1).values)
    assert (found != logits).any(-1).float().mean() > 0.8
    assert torch.equal(found, born_again.permuted(logits, 0))


@pytest.mark.parametrize("variant", ["labels", "plain", "cwtm", "dkpp"])
def test_born_again_variants(run, variant):
    step = random_step(labels=True)
    z, y, known, rows = step.student.logits, step.labels, step.counts.labelled, step.counts.rows
    before = torch.randn(len(run.train), CLASSES, generator=torch.Generator().manual_seed(2))
    step.batch["index"] = torch.tensor([3, 1, 4, 15, 9, 2])
    loss = born_again.taught_by(before, run, variant, seed=5)(step)

    def kl(table):
        p = table[step.batch["index"]].softmax(-1)
        return F.kl_div(z.log_softmax(-1), p, reduction="none").sum(-1)

    sure = before.softmax(-1).amax(-1)
    truth = {
        "labels": F.cross_entropy(z, y, reduction="none").sum() / known + kl(before).sum() / rows,
        "plain": kl(before).sum() / rows,
        "cwtm": (sure[step.batch["index"]] / sure.mean() * F.cross_entropy(z, y, reduction="none")).sum() / known,
        "dkpp": kl(born_again.permuted(before, 5)).sum() / rows,
    }
    torch.testing.assert_close(loss, truth[variant])


def test_generations_and_their_ensemble(run, tmp_path):
    """Generation 0 is the student of labels alone; the ensemble is the mean of the others, saved and loaded."""
    models = born_again.all_generations(run, 2, "labels")
    alone = methods()["ce"].train(run).state_dict()
    assert all(torch.equal(v, alone[k]) for k, v in models[0].state_dict().items())
    assert not torch.equal(run.logits(models[1]), run.logits(models[2]))
    model = born_again.Ensemble.of(models[1:])
    mean = (run.logits(models[1]) + run.logits(models[2])) / 2
    torch.testing.assert_close(run.logits(model), mean)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(run.logits(again), mean)
    assert model.num_parameters() == sum(m.num_parameters() for m in models[1:])


def test_the_reversed_student_is_as_large_as_the_teacher(run):
    trained = []
    run.fit = lambda model, loss, rows=None, **more: trained.append((model, more)) or model
    model = parse_method("reverse_kd").method.train(run)
    assert model is not run.source
    assert model.config.num_hidden_layers == run.source.config.num_hidden_layers
    assert trained[1][1]["teacher"] is trained[0][0]
    assert trained[0][0].config.num_hidden_layers == 2
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("share", "steps"), [(0.05, 1), (0.7, 2)])
def test_a_defective_teacher_has_few_steps(run, share, steps):
    trained = []
    run.fit = lambda model, loss, rows=None, **more: trained.append((model, more)) or model
    parse_method("defective_kd").method.train(run, share=share)
    assert [more.get("steps") for _, more in trained] == [steps, None]
    assert trained[1][1]["teacher"] is trained[0][0]
    assert trained[0][0].config.num_hidden_layers == 4


def test_rounds_teach_each_other_without_labels(run):
    trained = []
    run.fit = lambda model, loss, rows=None, **more: trained.append((model, rows, more)) or model
    teacher_free.self_distillation(run, rounds=2)
    assert [rows is None for _, rows, _ in trained] == [False, True, True]
    assert [more.get("teacher") for _, _, more in trained[1:]] == [trained[0][0], trained[1][0]]
