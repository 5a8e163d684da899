"""The loss of the Trainer is exact: one optimiser step has one gradient, however it is cut into batches and ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ranks import on_ranks

from fusedkd.backends import products
from fusedkd.nn import DistilBertLoss

from . import one_step
from .one_step import EVERYTHING, gradient, make

PLAIN = {"loss": DistilBertLoss(alpha_distil=0.0, alpha_mlm=1.0, alpha_cos=0.0)}
NO_KD = {"loss": DistilBertLoss(alpha_distil=0.0)}


def terms_of(kind: str, loss: dict, rows: int = 8):
    """(student, the terms over all rows at once, by PyTorch's operators on full logits)"""
    student, teacher = one_step.models(kind)
    data = list(one_step.rows())[:rows]
    batch = {k: torch.stack([row[k] for row in data]) for k in data[0]}
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    s = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(**inputs, output_hidden_states=True)
    attended, labels = batch["attention_mask"].bool(), batch["labels"]
    z, v, predicted = s.logits, t.logits, attended
    if kind == "causal":
        z, v, labels, predicted = z[:, :-1], v[:, :-1], labels[:, 1:], attended[:, :-1] & attended[:, 1:]
    triple = loss["loss"]
    kd = predicted if triple.kd_on == "attended" else labels != -100
    z_kd, v_kd, T = z[kd], v[kd], triple.temperature
    p, q = (v_kd / T).log_softmax(-1), (z_kd / T).log_softmax(-1)
    if loss.get("divergence") == "reverse_kl":
        p, q = q, p
    cosines = [
        (1 - F.cosine_similarity(s.hidden_states[i], t.hidden_states[j], -1))[attended].mean()
        for i, j in loss.get("cos_layers", ((-1, -1),))
    ]
    return student, {
        "distil": T**2 * F.kl_div(q, p, log_target=True, reduction="batchmean"),
        "mlm": F.cross_entropy(z.flatten(0, 1), labels.flatten()),
        "cos": torch.stack(cosines).mean(),
        "mse": F.mse_loss(z_kd, v_kd),
        "kl": F.kl_div(z_kd.log_softmax(-1), v_kd.log_softmax(-1), log_target=True, reduction="batchmean"),
    }


def weights_of(loss: dict) -> dict[str, float]:
    triple = loss["loss"]
    weights = {name: getattr(triple, f"alpha_{name}") for name in ("distil", "mlm", "cos")}
    return weights | {"mse": loss.get("alpha_mse", 0.0)}


def total(loss: dict, terms):
    return sum(weight * terms[name] for name, weight in weights_of(loss).items() if weight)


def check(found, kind: str, loss: dict, has_teacher: bool = True):
    mine, logs, metrics = found
    student, terms = terms_of(kind, loss)
    objective = total(loss, terms)
    objective.backward()
    for name, weight in weights_of(loss).items():
        assert (name in logs) == (weight != 0)
        if weight:
            assert logs[name] == pytest.approx(terms[name].item(), rel=1e-5), name
            assert logs[name] > 0.1, name
    assert logs["loss"] == pytest.approx(objective.item(), rel=1e-5)
    true = {name: p.grad for name, p in student.named_parameters()}
    assert mine.keys() == true.keys()
    size = torch.stack([g.norm() for g in true.values()]).norm()
    error = torch.stack([(mine[k] - g).norm() for k, g in true.items()]).norm()
    assert size > 0.1
    assert error < 1e-6 * size
    _, held_out = terms_of(kind, loss, rows=7)
    assert metrics["eval_loss"] == pytest.approx(total(loss, held_out).item(), rel=1e-5)
    assert metrics["eval_ce"] == pytest.approx(held_out["mlm"].item(), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(held_out["mlm"].item()), rel=1e-4)
    assert ("eval_kl" in metrics) == has_teacher
    if has_teacher:
        assert metrics["eval_kl"] == pytest.approx(held_out["kl"].item(), rel=1e-5)
        assert metrics["eval_kl"] > 0.1


@pytest.mark.parametrize(
    ("kind", "batch", "accumulation", "loss"),
    [
        ("masked", 8, 1, {"loss": DistilBertLoss()}),
        ("masked", 2, 4, EVERYTHING | {"loss": DistilBertLoss(temperature=3.0, kd_on="masked")}),
        ("masked", 4, 2, EVERYTHING | {"loss": DistilBertLoss(alpha_mlm=0.0), "divergence": "reverse_kl"}),
        ("masked", 4, 2, NO_KD),
        ("causal", 8, 1, {"loss": DistilBertLoss(kd_on="masked")}),
        ("causal", 2, 4, EVERYTHING),
    ],
)
def test_a_step_is_exact_however_it_is_cut(kind, batch, accumulation, loss):
    check(gradient(kind, loss, batch, accumulation), kind, loss)


def test_two_processes_are_exact(tmp_path):
    """Gradient, logs and evaluation on an odd number of blocks, under DistributedDataParallel and FSDP2; and SIGTERM
    to one of them.
    """
    result = on_ranks(2, one_step.on_two_ranks, tmp_path)
    assert len(result) == 6
    saved = tmp_path / "checkpoint-2"
    line = f"SIGTERM ended the training after step 2; the last checkpoint is {saved}"
    assert result.pop("stopped") == [(line, 143)] * 2
    for (kind, *_), found in result.items():
        check(found, "causal" if kind == "causal" else "masked", EVERYTHING)


def forbidden(*_, **__):
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_language_modelling_without_a_teacher(kind):
    check(gradient(kind, PLAIN, 4, 2, teacher=False), kind, PLAIN, has_teacher=False)
    with pytest.raises(ValueError, match="teacher is None, but"):
        gradient(kind, NO_KD, 4, 2, teacher=False)


def test_a_teacher_without_weight_is_asked_in_evaluation_only(tmp_path, monkeypatch):
    trainer = make("masked", PLAIN, 4, 2, str(tmp_path))
    _, held_out = terms_of("masked", PLAIN, rows=7)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(held_out["kl"].item(), rel=1e-5)
    monkeypatch.setattr(trainer.teacher, "forward", forbidden)
    trainer.train()
    assert trainer.state.log_history[-2]["mlm"] > 1
    monkeypatch.undo()
    assert trainer.evaluate()["eval_kl"] != pytest.approx(held_out["kl"].item(), rel=1e-5)


def test_the_rows_that_a_loss_does_not_need_are_not_projected(tmp_path, monkeypatch):
    """Plain language modelling on the CPU pays for the labelled tokens alone."""

    seen, product = [], products.product

    def counted(a, *rest, **options):
        seen.append(len(a))
        product(a, *rest, **options)

    monkeypatch.setattr(products, "product", counted)
    trainer = make("masked", PLAIN, 8, 1, str(tmp_path))
    trainer.train()
    labelled = sum(int((row["labels"] != -100).sum()) for row in one_step.rows())
    assert max(seen) in (labelled, one_step.VOCAB)
    assert labelled in seen


def test_logs_are_means_over_steps_the_last_of_which_is_short(tmp_path):
    """Eight rows in steps of six: four micro-batches of which the last step has one."""
    options = {"max_steps": -1, "num_train_epochs": 1, "logging_steps": 2, "learning_rate": 0.0}
    trainer = make("masked", EVERYTHING, 2, 3, str(tmp_path), train_sampling_strategy="sequential", **options)
    trainer.train()
    logs = next(h for h in trainer.state.log_history if "loss" in h)
    data = trainer.train_dataset
    expected = []
    for part in (data[:6], data[6:]):
        batch = {k: torch.stack([row[k] for row in part]) for k in part[0]}
        trainer.model.train()
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        (_, terms), _ = trainer._run(trainer.model, batch, lambda pair, n=counts: trainer.losses(pair, n), False, True)
        expected.append({name: float(value) for name, value in terms.items()})
    assert logs["step"] == 2
    for name in ("distil", "mlm", "cos", "mse"):
        assert logs[name] == pytest.approx((expected[0][name] + expected[1][name]) / 2, rel=1e-5), name
    assert expected[0]["distil"] != pytest.approx(expected[1]["distil"], rel=0.01)


def test_a_divergence_that_needs_labels_is_a_mean_over_those_tokens():
    losses = [{"loss": DistilBertLoss(kd_on=on), "divergence": "dkd"} for on in ("attended", "masked")]
    found = [gradient("masked", loss, 4, 2)[1] for loss in losses]
    assert found[0]["distil"] == pytest.approx(found[1]["distil"], rel=1e-6)
    assert found[0]["distil"] > 0.1


def test_the_held_out_masks_are_those_of_their_collator(tmp_path):
    trainer = make("masked", PLAIN, 4, 2, str(tmp_path), teacher=False)
    own = []
    base = trainer.data_collator

    def collate(examples):
        own.append(len(examples))
        return base(examples)

    trainer.eval_collator = collate
    trainer.train()
    assert not own
    trainer.evaluate()
    assert own == [2, 2, 2, 1]
