"""DistillationTrainer on other kinds of model, against `kd_loss` of the logits and labels that the models have."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fusedkd
from fusedkd.integrations import probe
from fusedkd.integrations.check import kd_check
from fusedkd.integrations.heads import Head
from fusedkd.integrations.transformers import KDConfig

from .distil_step import VOCAB, initialised, trainer
from .model_kinds import (
    CLASSES,
    CLASSIFIERS,
    DECODERS,
    IMAGE,
    KINDS,
    TAGGERS,
    Pictures,
    classes,
    classifier,
    collated,
    decoder,
    pair_of,
    pictures,
    translations,
    vision_language,
)

# -------------------------------------------------- the loss


def truth(student, teacher, kd, batch, rows):
    """(gradient, logs) by `kd_loss` of the logits; `rows` of (logits, batch) gives logits, labels and the KD's rows."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    (z, labels, mask) = rows(student(**inputs).logits, batch)
    with torch.no_grad():
        v = rows(teacher(**inputs).logits, batch)[0]
    names = ("temperature", "kd_weight", "ce_weight", "label_smoothing", "divergence")
    options = {name: getattr(kd, name) for name in names} | {"return_terms": True}
    loss, terms = fusedkd.kd_loss(z, v, labels, kd_mask=mask, **options)
    student.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return found, {"loss": loss.item(), "kd": terms.kd.item(), "ce": terms.ce.item()}


def assert_equal(found, expected, tolerance=1e-5):
    (mine, logs), (true, true_logs) = found, expected
    for name, value in logs.items():
        assert true_logs[name] == pytest.approx(value, rel=tolerance), name
    assert all(mine[name].norm() == 0 for name in mine.keys() - true.keys())
    size = torch.stack([g.norm() for g in true.values()]).norm()
    error = torch.stack([(mine[k] - g).norm() for k, g in true.items()]).norm()
    assert size > 1e-3
    assert error < tolerance * size


def whole(logits, batch):
    return logits, batch["labels"], None


def next_token(logits, batch):
    return logits[:, :-1], batch["labels"][:, 1:], None


def check_kind(student, teacher, data, rows, inputs=None, kd=None, **options):
    """Loss and gradient, by one batch and by four; a copy of the teacher has no divergence from it."""
    kd = kd or KDConfig(temperature=2.0, kd_weight=0.7, ce_weight=0.4, label_smoothing=0.1)
    batch = collated(data) if inputs is None else inputs
    expected = truth(student, teacher, kd, batch, rows)
    assert expected[1]["kd"] > 1e-3
    run = trainer(student, teacher, kd, data, eval_dataset=data, **options)
    names, collate = dict(student.named_parameters()), run.data_collator
    with probe.undisturbed(run) as twin:
        for size in (8, 2):
            loss, found = probe.step(twin, [collate(data[i : i + size]) for i in range(0, 8, size)])
            found = {name: found[p].clone() for name, p in names.items() if p in found}
            assert_equal((found, {"loss": loss}), expected)
    run.model = run.model_wrapped = copy.deepcopy(teacher)
    run.model.requires_grad_()
    metrics = run.evaluate()
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        own = teacher(**batch).loss.item()
    assert own > 0.1
    assert metrics["eval_ce"] == pytest.approx(own, rel=1e-5)  # labels mean what they mean to the model
    run.model = run.model_wrapped = student
    return run


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_of_sequences(name):
    check_kind(classifier(name, 0), classifier(name, 1, depth=2), list(classes()), whole)


@pytest.mark.parametrize("name", TAGGERS)
def test_classifiers_of_tokens(name):
    check_kind(classifier(name, 0, tags=True), classifier(name, 1, tags=True, depth=2), list(classes(tags=True)), whole)


@pytest.mark.parametrize("name", DECODERS)
def test_encoder_decoders(name):
    student, teacher = decoder(name, 0), decoder(name, 1, depth=2)
    data = list(translations())
    labels = collated(data)["labels"]
    if hasattr(student, "prepare_decoder_input_ids_from_labels"):
        shifted = student.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        shifted = torch.cat([torch.full_like(labels[:, :1], 2), labels[:, :-1].where(labels[:, :-1] != -100, 0)], 1)
    plain = student(input_ids=collated(data)["input_ids"], labels=labels).logits  # the model's own shift
    assert plain.allclose(student(input_ids=collated(data)["input_ids"], decoder_input_ids=shifted).logits, atol=1e-6)
    check_kind(student, teacher, data, whole, collated(data) | {"decoder_input_ids": shifted})


@pytest.mark.parametrize("name", ["Qwen2VL", "Llava", "Gemma3"])
def test_vision_language_models(name):
    data, collator = list(pictures(name)), Pictures(name)
    student, teacher = vision_language(name, 0), vision_language(name, 1, num_hidden_layers=2)
    check_kind(student, teacher, data, next_token, collator(data), collator=collator, remove_unused_columns=False)


# -------------------------------------------------- how a step is cut, and by whom


@pytest.mark.parametrize("kind", KINDS)
def test_cut_padded_and_on_two_processes_the_gradient_is_one(kind):
    student, teacher, data = pair_of(kind)
    found = kd_check(trainer(student, teacher, data=data))
    assert found.ok, str(found)
    assert [run.name for run in found.runs] == ["8 × 1", "4 × 2", "2 × 4", "8 × 1, padded", "8 × 1, two processes"]
    assert found.value_power is not None


@pytest.mark.parametrize("kind", KINDS)
def test_several_teachers(kind):
    student, one, data = pair_of(kind)
    two, kd = initialised(copy.deepcopy(one), 7), KDConfig(ce_weight=0.0, kd_weight=1.0)
    run = trainer(student, [one, two], replace(kd, teacher_weights=[0.25, 0.75]), data, eval_dataset=data)
    both, metrics = run.compute_loss(student, collated(data)).item(), run.evaluate()
    each, halves, rows = [], [], []
    for i, teacher in enumerate((one, two)):
        single = trainer(student, teacher, kd, data, eval_dataset=data)
        each.append(single.compute_loss(student, collated(data)).item())
        assert metrics[f"eval_kl_{i}"] == pytest.approx(single.evaluate()["eval_kl"], rel=1e-5)
        half = collated(data[i::2])
        halves.append(single.compute_loss(student, half).item())
        rows.append(int(single.masks(half)[0].sum()))
    assert both == pytest.approx(0.25 * each[0] + 0.75 * each[1], rel=1e-5)
    named = [row | {"teacher": "ab"[i % 2]} for i, row in enumerate(data)]
    run = trainer(student, {"a": one, "b": two}, kd, named, collator=collated)
    loss = run.compute_loss(student, run.data_collator(named)).item()
    assert loss == pytest.approx((halves[0] * rows[0] + halves[1] * rows[1]) / sum(rows), rel=1e-5)


def test_training_evaluation_and_prediction_of_a_classifier():
    student, teacher, data = pair_of("sequences")
    for row in data:
        row["label"] = int(row.pop("labels"))  # the collator's other name
    data = [row for row in data if row["label"] >= 0]

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    kd = KDConfig(kd_weight=1.0, ce_weight=0.0, temperature=1.0, divergence="reverse_kl")
    options = {"max_steps": 15, "learning_rate": 3e-2, "eval_dataset": data, "compute_metrics": accuracy}
    run = trainer(student, teacher, kd, data, 4, **options)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_kl"] < 0.5 * before["eval_kl"]
    assert "eval_perplexity" not in after
    assert 0 <= after["eval_accuracy"] <= 1
    assert run.predict(data).predictions.shape == (7, CLASSES)


def test_prediction_of_an_encoder_decoder():
    student, teacher, data = pair_of("decoder")
    batch = collated(data)
    labels = batch.pop("labels")
    shifted = student.prepare_decoder_input_ids_from_labels(labels=labels)
    with torch.no_grad():
        logits = student(**batch, decoder_input_ids=shifted).logits
    found = trainer(student, teacher, data=data).predict(data)
    predicted = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    assert torch.from_numpy(predicted).allclose(logits, atol=1e-5)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert found.metrics["test_perplexity"] == pytest.approx(ce.exp().item(), rel=1e-5)


# -------------------------------------------------- rows


def test_unlabelled_rows():
    """With kd_on="attended": all sequences, all tokens, all that the decoder's mask selects."""
    kd = KDConfig(temperature=1.0, kd_weight=1.0, ce_weight=0.0, kd_on="attended")

    def divergence(student, teacher, inputs, mask=None):
        with torch.no_grad():
            return fusedkd.kd_loss(student(**inputs).logits, teacher(**inputs).logits, kd_mask=mask).item()

    for kind in KINDS:
        student, teacher, data = pair_of(kind)
        batch = collated(data)
        labels = batch.pop("labels")
        mask = {"sequences": None, "tokens": batch["attention_mask"] != 0}.get(kind)
        if kind == "decoder":
            mask = torch.arange(7) < 2 + torch.arange(8)[:, None] % 5
            batch["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels=labels)
            batch["decoder_attention_mask"] = mask.long()
        found = trainer(student, teacher, kd, data).compute_loss(student, batch).item()
        assert found == pytest.approx(divergence(student, teacher, batch, mask), rel=1e-5)
    with pytest.raises(ValueError, match="must have labels or decoder_input_ids"):
        trainer(student, teacher, kd, data).compute_loss(student, {"input_ids": batch["input_ids"]})
    student, teacher, data = pair_of("sequences")
    with pytest.raises(ValueError, match=r"no labels, which select rows unless kd_on='attended' and ce_weight=0$"):
        trainer(student, teacher, data=data).compute_loss(student, {"input_ids": batch["input_ids"]})


def test_no_row_predicts_a_placeholder():
    student, teacher = vision_language("Llava", 0), vision_language("Llava", 1)
    batch = Pictures("Llava")(list(pictures("Llava")))
    kd = KDConfig(temperature=1.0, kd_weight=1.0, ce_weight=0.0, kd_on="attended")
    found = trainer(student, teacher, kd).compute_loss(student, batch).item()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        z, v = (each(**inputs).logits[:, :-1] for each in (student, teacher))
    mask = (batch["attention_mask"][:, 1:] != 0) & (batch["input_ids"][:, 1:] != IMAGE)
    assert found == pytest.approx(fusedkd.kd_loss(z, v, kd_mask=mask).item(), rel=1e-5)


def test_a_new_head_of_an_encoder_decoder():
    student, teacher, data = pair_of("decoder")
    run = trainer(student, teacher, data=data)
    assert run.head.added == (student, "final_logits_bias")
    assert run.head.parameters()[1].equal(student.final_logits_bias[0])
    student.resize_token_embeddings(VOCAB + 3)
    assert run.head.columns == VOCAB + 3
    assert run.head.parameters()[1].shape == (VOCAB + 3,)
    bart = decoder("BartForConditionalGeneration", 0)
    bart.final_logits_bias.zero_()
    assert Head.of(bart).added == (bart, "final_logits_bias")  # zeros do not hide it
