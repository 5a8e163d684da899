"""Methods of several stages and of moved embeddings: their losses by the formulas, their steps, what they look at."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from tiny_run import tiny_run

from fusedkd.integrations.command import UsageError
from recipes.glue.method import parse_method
from recipes.glue.run import Run
from recipes.glue.step import IGNORE, Counts, Step
from recipes.glue.trainer import IndexedPadding
from recipes.methods.annealing_kd import phi
from recipes.methods.freelb import Perturbed
from recipes.methods.takd import depths

ONE_STEP = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
ONE_STEP |= {"warmup_steps": 0, "max_steps": 1}
"""A step's weights are those before it, less the gradient."""


def still_run(folder, tokenizer, task="sst2", **more) -> Run:
    """Without dropout, of eight examples: the first batch is all of them."""
    run = tiny_run(folder, tokenizer, task, count=8, arguments={**ONE_STEP, **more.pop("arguments", {})}, **more)
    run.source.config.hidden_dropout_prob = run.source.config.attention_probs_dropout_prob = 0.0  # of the student
    return run


def trained(text: str, run: Run):
    method = parse_method(text)
    method.check(run)
    return method.method.train(run, **method.options)


def change(run: Run, model) -> dict:
    """Of the weights since the beginning."""
    start, now = dict(run.student().named_parameters()), dict(model.named_parameters())
    return {name: (start[name] - now[name]).detach().double() for name in start}


def close(found: dict, expected: dict, tolerance: float = 1e-5) -> bool:
    size, error = (
        torch.stack([x.norm() for x in group]).norm()
        for group in (expected.values(), [found[k] - expected[k] for k in expected])
    )
    return bool(size > 1e-2) and bool(error < tolerance * size)


def batch_of(run: Run) -> dict:
    return IndexedPadding(run.tokenizer)([*run.train])


def gradient(run: Run, loss_of) -> dict:
    """Of a loss of the student, the teacher, what both take and the labels, in float64."""
    batch, student, teacher = batch_of(run), run.student().double(), copy.deepcopy(run.teacher).double()
    labels = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    loss_of(student, teacher, inputs, labels).backward()
    return {name: p.grad for name, p in student.named_parameters()}


def kl(teacher, student, temperature):
    both = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(both[1], both[0], log_target=True, reduction="batchmean")


# ---- values and gradients


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_the_triple_loss_is_the_formula(tmp_path, tokenizer, task):
    def truth(student, teacher, inputs, labels):
        s, t = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
        cosines = F.cosine_similarity(s.hidden_states[-1], t.hidden_states[-1].detach(), dim=-1)
        far = (1 - cosines)[inputs["attention_mask"] == 1].mean()
        z, v = s.logits, t.logits.detach()
        if task == "stsb":
            return 3 * F.mse_loss(z, v) + 2 * F.mse_loss(z[:, 0], labels.double()) + 0.5 * far
        return 3 * kl(v, z, 2.0) + 2 * F.cross_entropy(z, labels) + 0.5 * far

    run = still_run(tmp_path, tokenizer, task)
    found = trained("distilbert:alpha_kd=3,alpha_cos=0.5", run)
    assert close(change(run, found), gradient(run, truth))


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_annealing_begins_with_small_logits(tmp_path, tokenizer, task):
    def truth(student, teacher, inputs, labels):
        return F.mse_loss(student(**inputs).logits, teacher(**inputs).logits.detach() / 5)

    run = still_run(tmp_path, tokenizer, task)
    found = trained("annealing_kd:tau_max=5", run)  # its one step is of the first stage
    assert close(change(run, found), gradient(run, truth))


def test_freelb_is_the_mean_over_the_ascent(tmp_path, tokenizer):
    def truth(student, teacher, inputs, labels):
        words = student.get_input_embeddings()(inputs.pop("input_ids"))
        delta, losses, targets = torch.zeros_like(words), [], None
        for _ in range(3):
            delta = delta.detach().requires_grad_()
            z = student(inputs_embeds=words + delta, **inputs).logits
            targets = teacher(input_ids=batch_of(run)["input_ids"], **inputs).logits.detach()
            losses.append(0.5 * kl(targets, z, 2.0) + 0.5 * F.cross_entropy(z, labels))
            g = torch.autograd.grad(losses[-1], delta, retain_graph=True)[0]
            delta = delta + 0.3 * g / g.flatten(1).norm(dim=1)[:, None, None]
        assert losses[0] < losses[1] < losses[2]
        return sum(losses) / 3

    run = still_run(tmp_path, tokenizer)
    found = trained("freelb_kd:start=0,step_size=0.3", run)
    assert close(change(run, found), gradient(run, truth), 1e-4)


@pytest.mark.parametrize(
    "method", ["distilbert", "distilbert_d", "annealing_kd", "takd", "freelb_kd:start=0", "pretrained_distillation"]
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path, tokenizer, method):
    cuts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    found = []
    for size in ({}, cuts):
        run = still_run(tmp_path, tokenizer, labels=5, arguments={**size, "max_steps": 2})
        found.append(change(run, trained(method, run)))
    assert close(*found, 1e-4)


@pytest.mark.parametrize("method", ["distilbert", "distilbert_d", "takd"])
def test_narrower_students(tmp_path, tokenizer, method):
    """With projections that are no part of the student, and assistants as narrow as it is."""
    run = tiny_run(tmp_path, tokenizer, width=16, init="random")
    found = trained(method, run)
    assert found.config.hidden_size == 16
    assert found.state_dict().keys() == run.student().state_dict().keys()


# ---- schedules and stages


def test_phi_rises_in_equal_parts():
    assert [phi(n, 6, 3) for n in range(6)] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert [phi(n, 4, 1) for n in range(4)] == [1, 1, 1, 1]
    assert phi(99, 100, 7) == 1


@pytest.fixture
def stages(monkeypatch):
    """Of each training: layers of the model and of its teacher, rows, labelled rows, steps."""
    found, fit = [], Run.fit

    def noted(self, model, loss, rows=None, *, teacher=None, steps=None, **more):
        labels = (self.train if rows is None else rows)["labels"]
        depth = (teacher or self.teacher).config.num_hidden_layers
        known = sum(label != IGNORE for label in labels)
        found.append((model.config.num_hidden_layers, depth, len(labels), known, steps))
        return fit(self, model, loss, rows, teacher=teacher, steps=steps, **more)

    monkeypatch.setattr(Run, "fit", noted)
    return found


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("annealing_kd", [(2, 4, 24, 6, 7), (2, 4, 6, 6, 3)]),
        ("takd", [(3, 4, 24, 6, None), (2, 3, 24, 6, None)]),
        ("distilbert_d", [(2, 4, 24, 6, 5), (2, 4, 24, 6, 5)]),
        ("pretrained_distillation:share=0.8", [(2, 4, 24, 6, 8), (2, 4, 6, 6, 2)]),
        ("kd_unlabelled", [(2, 4, 24, 6, None)]),
        ("freelb", [(2, 4, 6, 6, None)]),
    ],
)
def test_stages_share_the_steps(tmp_path, tokenizer, stages, method, expected):
    trained(method, tiny_run(tmp_path, tokenizer, labels=6, arguments={"max_steps": 10}))
    assert stages == expected


def test_a_further_stage_reads_on(tmp_path, tokenizer, monkeypatch):
    """In an order of its own, though it is the same model and seed; a new model begins as the first one did."""
    run, read = tiny_run(tmp_path, tokenizer, count=200, arguments={"max_steps": 2}), []

    def loss(step):
        read[-1] += step.batch["index"].tolist()
        return step.hard()

    student = run.student()
    for model in (student, student, run.student()):
        read.append([])
        run.fit(model, loss)
    first, further, again = read
    assert again == first != further
    assert len(set(first) & set(further)) < len(first) // 2


def test_a_chain_of_assistants(tmp_path, tokenizer, stages):
    run = tiny_run(tmp_path, tokenizer, layers=[0])
    trained("takd:assistants=3+2", run)
    assert [stage[:2] for stage in stages] == [(3, 4), (2, 3), (1, 2)]


@pytest.mark.parametrize("given", ["2", "6", "4+4", "3+5", "four", "5+"])
def test_assistants_lie_between(given):
    with pytest.raises(UsageError, match="fall between the teacher's 6 layers and the student's 2"):
        depths(given, 6, 2)


def test_options_out_of_range(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    with pytest.raises(UsageError, match="no depth lies between the teacher's 6 layers and the student's 5"):
        depths("", 6, 5)
    for text, sentence in {
        "annealing_kd:tau_max=0": "tau_max must be above 0, not 0",
        "annealing_kd:share=1.5": "share must be between 0 and 1, not 1.5",
        "freelb:ascents=1.5": "ascents must be a whole number, not '1.5'",
    }.items():
        with pytest.raises(UsageError, match=sentence):
            trained(text, run)


# ---- labels


def test_without_labels_none_is_seen(tmp_path, tokenizer):
    found = []
    for wrong in (False, True):
        run = tiny_run(tmp_path, tokenizer, arguments={"max_steps": 30, "learning_rate": 3e-3})
        if wrong:
            run.train = run.train.map(lambda row: {"labels": 1 - row["labels"]})
        found.append(trained("kd_unlabelled", run))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in found), strict=True))
    teacher, before, after = (run.logits(model) for model in (run.teacher, run.student(), found[0]))
    assert kl(teacher, after, 1.0) < 0.3 * kl(teacher, before, 1.0)


# ---- FreeLB's perturbations


def test_perturbations_begin_small_and_off_padding(tmp_path, tokenizer):
    attended = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    moves = Perturbed(3, 0.1, 0.2, 0.15)
    delta = moves.first(torch.ones(2, 4, 8), attended)
    assert (delta[1, 2:] == 0).all()
    for row, tokens in ((0, 4), (1, 2)):
        bound = 0.2 / (tokens * 8) ** 0.5
        assert 0.7 * bound < delta[row].abs().max() <= bound
    gradient = torch.zeros(2, 4, 8)
    gradient[0] = 1e-6  # of any size
    further = moves.next(delta, gradient)
    expected = delta[0] + 0.1 / 32**0.5
    torch.testing.assert_close(further[0], expected * min(1.0, 0.15 / expected.norm()))
    assert further[1].norm() <= 0.15 + 1e-6


def test_all_ascents_have_one_dropout(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    batch, student, seen = batch_of(run), run.student().train(), []
    step = Step(student, run.teacher, batch, Counts.of(batch), None)

    def loss(logits):
        seen.append(logits.detach())
        return step.hard(logits)

    for _ in range(2):
        Perturbed(2, 0.0, 0.0, 0.0)(step, loss)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])
