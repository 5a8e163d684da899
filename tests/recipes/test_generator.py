"""MATE-KD and Combined-KD: what the generator draws and where, its gradient, and whom each step changes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from one_step import assert_step, one_sgd_step, still
from tiny_run import classifier, tiny_run
from transformers import AutoModelForMaskedLM

from fusedkd.integrations.command import UsageError
from fusedkd.reference import gumbel
from recipes.glue import generator as module
from recipes.glue.adversary import Adversary
from recipes.glue.generator import Generator, batches, embedded, made, masked
from recipes.glue.method import parse_method
from recipes.glue.run import Run
from recipes.methods import com_kd, mate

SEED = 5


def copied(model) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def is_as(model, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def adversary_of(run: Run, divergence=mate.divergence, **options) -> Adversary:
    student = run.student()
    return Adversary(run, Generator(run, steps=0, students=[student]), student.train(), divergence, **options)


# ---- what is drawn, and where


def test_masked_tokens_alone_are_replaced(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer, "rte")
    batch = next(batches(run, 0))
    batch["input_ids"][0, -4:], batch["attention_mask"][0, -4:] = tokenizer.pad_token_id, 0
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
    assert torch.equal(masked(batch, tokenizer, 1.0)[1], ~special)
    writer = Generator(run, steps=0, share=0.3)
    torch.manual_seed(SEED)
    ids, where = masked(batch, tokenizer, 0.3)
    assert (ids[where] == tokenizer.mask_token_id).all()
    assert torch.equal(ids[~where], batch["input_ids"][~where])
    assert 0.15 < where.sum() / (~special).sum() < 0.45
    torch.manual_seed(SEED)
    found = writer.rewritten(batch)
    assert torch.equal(found[~where], batch["input_ids"][~where])
    assert (found[where] != batch["input_ids"][where]).any()


def test_embeddings_are_the_models_own_but_for_the_drawn_rows(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    batch, student = next(batches(run, 0)), run.student()
    table = student.get_input_embeddings().weight
    (rows,), ids, where = Generator(run, steps=0).rows(batch, table.detach())
    found = embedded(student, batch, rows, where)
    expected = batch["input_ids"].clone()
    expected[where] = ids
    assert torch.equal(found, table[expected])


def test_a_batch_without_a_masked_token(tmp_path, tokenizer):
    adversary = adversary_of(tiny_run(tmp_path, tokenizer))
    adversary.generator.share = 0.0
    batch = next(adversary.batches)
    assert torch.equal(adversary.generator.rewritten(batch), batch["input_ids"])
    adversary.update()


# ---- the generator's steps


@pytest.mark.parametrize("task", ["sst2", "stsb"])
@pytest.mark.parametrize("divergence", [mate.divergence, com_kd.mse])
def test_its_gradient_is_that_of_eager_straight_through_sampling(tmp_path, tokenizer, task, divergence):
    """In float64 (squared differences are float32), through student and teacher, with the same noise."""
    run = still(tiny_run(tmp_path, tokenizer, task))
    adversary = adversary_of(run, divergence)
    generator, student, teacher = adversary.generator, adversary.student.double(), adversary.teacher.double()
    generator.model.double()
    batch = next(adversary.batches)
    torch.manual_seed(SEED)
    loss = adversary.loss(batch, seed=SEED)
    found = torch.autograd.grad(loss, adversary.parameters, allow_unused=True)

    torch.manual_seed(SEED)
    ids, where = masked(batch, tokenizer, generator.share)
    inputs = {name: batch[name] for name in ("attention_mask", "token_type_ids")}
    logits = generator.model(input_ids=ids, **inputs).logits[where]
    y = (logits + gumbel.noise(SEED, *logits.shape)).softmax(-1)
    y = F.one_hot(y.argmax(-1), y.shape[-1]) - y.detach() + y
    outputs = []
    for model in (student, teacher):
        table = model.get_input_embeddings().weight.detach()
        rows = table[batch["input_ids"]].masked_scatter(where[..., None], y @ table)
        outputs.append(model(inputs_embeds=rows, **inputs).logits)
    q, p = outputs
    tolerance = 1e-5
    if task == "stsb" or divergence is com_kd.mse:
        expected = -F.mse_loss(q, p)
    else:
        tolerance = 1e-8
        expected = -F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)
    truth = torch.autograd.grad(expected, adversary.parameters, allow_unused=True)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    assert [g is None for g in found] == [g is None for g in truth]
    some = [(g, t) for g, t in zip(found, truth, strict=True) if g is not None]
    assert len(some) > 20
    scale = max(t.norm() for _, t in some)
    for g, t in some:
        assert (g - t).norm() <= tolerance * (t.norm() + 1e-4 * scale)


def test_its_steps_change_it_alone_and_raise_the_divergence(tmp_path, tokenizer):
    adversary = adversary_of(still(tiny_run(tmp_path, tokenizer)), learning_rate=1e-2)
    others = adversary.student, adversary.teacher
    before, own = [copied(each) for each in others], copied(adversary.generator.model)

    def divergence() -> float:
        torch.manual_seed(SEED)
        with torch.no_grad():
            return -float(sum(adversary.loss(batch, seed=SEED + i) for i, batch in enumerate(some)))

    some = [next(adversary.batches) for _ in range(3)]
    first = divergence()
    for _ in range(20):
        adversary.update()
    assert divergence() > 1.05 * first
    assert not is_as(adversary.generator.model, own)
    for model, weights in zip(others, before, strict=True):
        assert is_as(model, weights)
        assert all(p.grad is None for p in model.parameters())
        assert model.training == (model is adversary.student)


def test_steps_come_in_turns(tmp_path, tokenizer, monkeypatch):
    """Before steps 0, 3 and 6 of the student, once however many micro-batches these have."""
    adversary, done = adversary_of(tiny_run(tmp_path, tokenizer), steps=2, every=3), []
    monkeypatch.setattr(adversary, "update", lambda: done.append(number))
    torch.manual_seed(SEED)
    state = torch.get_rng_state()
    for number in range(7):
        for _ in range(2):
            adversary.before(SimpleNamespace(number=number))
    assert done == [0, 0, 3, 3, 6, 6]
    assert torch.equal(torch.get_rng_state(), state)


# ---- the student's steps


@pytest.mark.parametrize(("task", "cuts"), [("sst2", 2), ("stsb", 1)])
@pytest.mark.parametrize("name", ["mate_kd", "com_kd"])
def test_the_students_step_is_the_formulas(tmp_path, tokenizer, monkeypatch, name, task, cuts):
    """However it is cut into micro-batches. The generator stays as it is."""
    run = one_sgd_step(tmp_path, tokenizer, task, cuts, labels=5, count=8)
    made_by, new = [], len(tokenizer) - 1

    def rewritten(self, batch):
        made_by.append(self.model)
        return batch["input_ids"].where(batch["input_ids"] != 5, new)

    monkeypatch.setattr(Generator, "rewritten", rewritten)
    method = {"mate_kd": mate.mate_kd, "com_kd": com_kd.com_kd}[name]
    options = {"max_temperature": 4} if name == "com_kd" else {}
    model = method(run, pretraining=0, generator_steps=0, **options)
    assert is_as(made_by[0], AutoModelForMaskedLM.from_pretrained(tmp_path / "generator-0-steps-0.3").state_dict())
    assert len(made_by) == cuts

    batch = module.IndexedPadding(tokenizer)([*run.train])
    labels, regression = batch["labels"], task == "stsb"
    known = ~labels.isnan() if regression else labels != -100
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    text = inputs["input_ids"].where(inputs["input_ids"] != 5, new)
    assert not torch.equal(text, inputs["input_ids"])

    def loss(student):
        hard, soft = [], []
        for ids in (inputs["input_ids"], text):
            q, p = (each(**{**inputs, "input_ids": ids}).logits for each in (student, run.teacher))
            p = p.detach()
            if name == "com_kd":
                soft.append(F.mse_loss(q, p / 4) / 2)
                continue
            own = q.squeeze(-1) if regression else q
            hard.append((F.mse_loss if regression else F.cross_entropy)(own[known], labels[known]) / 3)
            apart = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
            soft.append((F.mse_loss(q, p) if regression else apart) / 3)
        return sum(soft) + (hard[0] if hard else 0)

    assert_step(run, model, loss)


def test_the_annealing_grows_in_equal_steps():
    assert [com_kd.phi(number, 20, 10) for number in range(0, 20, 2)] == [i / 10 for i in range(1, 11)]
    assert com_kd.phi(1, 20, 10) == 0.1
    assert com_kd.phi(0, 2, 10) == 0.1
    assert com_kd.phi(1, 2, 10) == 0.6


# ---- where the generator comes from


def test_one_is_made_once_and_learns_to_fill_in(tmp_path, tokenizer, monkeypatch):
    """Its losses are no part of the student's curve."""
    run = tiny_run(tmp_path, tokenizer, arguments={"logging_steps": 10, "learning_rate": 3e-3})
    trainings, fit = [], Run.fit
    monkeypatch.setattr(Run, "fit", lambda self, *given, **more: trainings.append(self) or fit(self, *given, **more))
    model = made(run, 60, 0.3)
    losses = [entry["loss"] for entry in trainings[0].logs if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]
    assert run.logs == []
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_as(made(run, 60, 0.3), model.state_dict())
    assert len(trainings) == 1
    start = made(run, 0, 0.3)
    body = run.source.base_model.state_dict()
    assert is_as(start.base_model, body)


@pytest.mark.parametrize("text", ["mate_kd:generator_steps=1", "com_kd:generator_steps=1", "augmented_kd:times=1"])
def test_one_is_made_with_bf16(tmp_path, tokenizer, text):
    """The Trainer's autocast ends with the model's forward; and what was just made is what is found the next time."""
    run, chosen = tiny_run(tmp_path, tokenizer, arguments={"bf16": True}), parse_method(f"{text},pretraining=2")
    first, again = (chosen.train(replace(run, logs=[])) for _ in range(2))
    assert is_as(first, again.state_dict())


def test_other_generators_are_refused(tmp_path, tokenizer, roberta_tokenizer):
    run = tiny_run(tmp_path / "run", tokenizer)

    def refused(sentence: str, run: Run = run, folder: str = "", **options) -> None:
        with pytest.raises(UsageError, match=sentence):
            Generator(run, folder, steps=0, **options)

    refused("share must be above 0 and at most 1, not 0", share=0)
    refused("no such folder", folder=str(tmp_path / "nothing"))
    refused("must have one vocabulary", students=[classifier(len(tokenizer) + 1)])
    folder = tmp_path / "classifier"
    classifier(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    refused("it is no masked language model, it lacks cls", folder=str(folder))
    made(run, 0, 0.3).save_pretrained(tmp_path / "lm")
    roberta_tokenizer.save_pretrained(tmp_path / "lm")
    refused("its vocabulary is not the teacher's", folder=str(tmp_path / "lm"))
    tokenizer.save_pretrained(tmp_path / "lm")
    Generator(run, str(tmp_path / "lm"))
    refused("too few positions for 200 tokens", replace(run, max_length=200), str(tmp_path / "lm"))
    student = run.student()
    for options in ({"steps": -1}, {"every": 0}):
        with pytest.raises(UsageError, match="at least 0 and at least 1"):
            Adversary(run, Generator(run, steps=0), student, mate.divergence, **options)
    tokenizer.mask_token = None
    refused("needs a tokenizer with a mask token")
