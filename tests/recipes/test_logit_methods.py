"""The losses of the methods on logits against their formulas, and what those methods train besides the student."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from method_step import CLASSES, ROWS, fresh_run, loss_of, random_step
from tiny_run import tiny_run

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.states import States
from recipes.glue.method import methods, parse_method
from recipes.glue.step import Counts, Outputs, Step
from recipes.glue.trainer import IndexedPadding
from recipes.methods import rw_kd, temperature
from recipes.methods.hard_labels import random_queries


@pytest.fixture
def run(tmp_path):
    return fresh_run(tmp_path)


# ---- formulas


def ce(z, y):
    return F.cross_entropy(z, y, reduction="none", ignore_index=-100)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def kd(divergence, alpha=0.5, temperature=2.0):
    def formula(z, v, y, known, rows):
        p, q = ((x / temperature).softmax(-1) for x in (v, z))
        soft = temperature**2 * divergence(p, q).sum()
        return alpha * soft / rows + (1 - alpha) * ce(z, y).sum() / known

    return formula


def jsd(p, q):
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def dkd(alpha, beta, temperature):
    def formula(z, v, y, known, rows):
        y_or_best = torch.where(y < 0, v.argmax(-1), y)
        p, q = ((x / temperature).softmax(-1) for x in (v, z))
        mine = F.one_hot(y_or_best, z.shape[-1]).bool()
        target = [torch.stack([x[mine], 1 - x[mine]], -1) for x in (p, q)]
        others = [x[~mine].view(len(x), -1) for x in (p, q)]
        others = [x / x.sum(-1, keepdim=True) for x in others]
        soft = alpha * kl(*target) + beta * kl(*others)
        return ce(z, y).sum() / known + temperature**2 * soft.sum() / rows

    return formula


def to_best(alpha):
    return lambda z, v, y, known, rows: alpha * ce(z, v.argmax(-1)).sum() / rows + (1 - alpha) * ce(z, y).sum() / known


def smoothed(z, v, y, known, rows):
    constant = 0.1 * torch.tensor(float(CLASSES)).log() * len(z) / rows
    return F.cross_entropy(z, y, reduction="sum", label_smoothing=0.1) / known - constant


def virtual(form):
    def formula(z, v, y, known, rows):
        p = torch.full_like(z, 0.01 / 3).scatter(1, y[:, None], 0.99)
        if form == "code":
            soft = kl((p / 20).softmax(-1), z.softmax(-1))
        else:
            soft = 400 * kl((p.log() / 20).softmax(-1), (z / 20).softmax(-1))
        return 0.9 * ce(z, y).sum() / known + 0.1 * soft.sum() / rows

    return formula


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("kd", kd(kl)),
        ("kd:temperature=5,alpha=0.2", kd(kl, 0.2, 5.0)),
        ("reverse_kl", kd(lambda p, q: kl(q, p))),
        ("jeffreys", kd(lambda p, q: kl(p, q) + kl(q, p))),
        ("jsd", kd(jsd)),
        ("logit_mse", lambda z, v, y, known, rows: (z - v).square().mean(-1).sum() / rows),
        ("dkd", dkd(1.0, 8.0, 4.0)),
        ("dkd:alpha=2,beta=0.5,temperature=1", dkd(2.0, 0.5, 1.0)),
        ("hard_kd", to_best(0.5)),
        ("argmax", to_best(1.0)),
        ("ensemble:teachers=1", lambda z, v, y, known, rows: (z - v).square().mean(-1).sum() / rows),
        ("label_smoothing", smoothed),
        ("tf_kd_reg", virtual("paper")),
        ("tf_kd_reg:form=code", virtual("code")),
        ("tf_kd_self", kd(kl)),
        ("self_distillation", kd(kl, 1.0, 1.0)),
        ("reverse_kd", kd(kl)),
        ("defective_kd", kd(kl)),
    ],
)
def test_a_loss_is_its_formula(run, text, formula):
    """In value and gradient; sums over this micro-batch, divided by the counts of the optimiser step."""
    step = random_step(labels=text.startswith(("label_smoothing", "tf_kd_reg")))
    z, v, y = step.student.logits, step.teacher.logits, step.labels
    loss = loss_of(run, text)(step)
    (gradient,) = torch.autograd.grad(loss, z)
    exact = z.detach().double().requires_grad_()
    truth = formula(exact, v.double(), y, step.counts.labelled, step.counts.rows)
    (true_gradient,) = torch.autograd.grad(truth, exact)
    torch.testing.assert_close(loss.detach().double(), truth.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-7)


def test_dkd_of_two_classes_is_kd(run):
    step = random_step()
    for side in ("student", "teacher"):
        step.__dict__[side] = Outputs(step.__dict__[side].logits[:, :2], States((), {}))
    step.batch["labels"] = step.labels % 2
    soft = step.soft(temperature=4.0)
    torch.testing.assert_close(loss_of(run, "dkd")(step), step.hard() + soft)


@pytest.mark.parametrize("target", ["logits", "probabilities"])
def test_an_ensemble_is_its_mean(run, monkeypatch, target):
    """The gradient is that of the mean of the teachers' logits or probabilities."""
    step = random_step()
    other = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(Step, "run", lambda *_: Outputs(other, States((), {})))
    z, both = step.student.logits, (step.teacher.logits, other)
    (gradient,) = torch.autograd.grad(loss_of(run, f"ensemble:teachers=2,target={target}")(step), z)
    if target == "logits":
        truth = (z - sum(both) / 2).square().mean(-1).sum()
    else:
        p = sum((v / 2).softmax(-1) for v in both) / 2
        truth = -4 * (p * (z / 2).log_softmax(-1)).sum()
    (true_gradient,) = torch.autograd.grad(truth / step.counts.rows, z)
    torch.testing.assert_close(gradient, true_gradient)


def test_further_teachers_have_seeds_of_their_own(run):
    seeds, fit = [], run.fit
    run.fit = lambda *given, **more: seeds.append(more.get("seed")) or fit(*given, **more)
    model = parse_method("ensemble:teachers=3").method.train(run, teachers=3)
    assert seeds == [1001, 1002, None]
    assert model.config.num_hidden_layers == 2


# ---- a learned temperature


def test_the_gradient_of_the_temperature():
    """Of T²·KL, in closed form; the student gets none by it."""
    z, v = (2 * torch.randn(ROWS, CLASSES, dtype=torch.float64) for _ in range(2))
    at = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(temperature.softened(z.requires_grad_(), v, at).sum(), at)
    t = at.detach()
    log_p, log_q = (v / t).log_softmax(-1), (z.detach() / t).log_softmax(-1)
    p, q, delta = log_p.exp(), log_q.exp(), log_p - log_q
    divergence = (p * delta).sum(-1)
    slope = -(((q - p) * z.detach()).sum(-1) + (p * (delta - divergence[:, None]) * v).sum(-1)) / t**2
    torch.testing.assert_close(found, (2 * t * divergence + t**2 * slope).sum())


@pytest.mark.parametrize(("direction", "sign"), [("up", 1), ("down", -1)])
def test_the_temperature_is_learned(run, direction, sign):
    """Against the loss or along it: T²·KL grows with T here. The value and the student's gradient are KD's."""
    step = random_step()
    loss = loss_of(run, f"learned_temperature:direction={direction}")
    before = loss(step)
    torch.testing.assert_close(before, 0.5 * step.soft() + 0.5 * step.hard())
    del run.fit
    model = methods()["learned_temperature"].train(run, direction=direction)
    assert sign * (run.logs[-1]["temperature"] - 2.0) > 0.01
    assert not any("beside" in name for name in model.state_dict())


# ---- weights by a meta-learner


def test_gains_are_products_of_gradients(run):
    """⟨∇loss_i, g⟩ by autograd, example by example."""
    model = run.student().train()
    rows = run.labelled.select(range(8, 16))
    side = rw_kd.HeldBack(run, rows, 8, 2.0)
    batch = side.collate([run.train[i] for i in range(4)])
    batch["labels"][1] = -100
    step = Step(model, run.teacher, batch, Counts.of(batch), None)
    gains = side.gains(step)
    assert model.training
    model.eval()
    weights = dict(model.named_parameters())
    held_back = F.cross_entropy(model(**{k: v for k, v in side.collate(list(rows)).items() if k != "index"}).logits,
                                torch.tensor(rows["labels"]))  # fmt: skip
    g = torch.autograd.grad(held_back, list(weights.values()))
    length = torch.cat([x.flatten() for x in g]).norm()
    for name, own in zip(weights, g, strict=True):
        torch.testing.assert_close(side.gradient[name], own / length, rtol=1e-4, atol=1e-6)
    losses = rw_kd.by_example(step.run(model).logits, step.teacher.logits, step.labels, 2.0)
    for i in range(4):
        for which in range(2):
            own = torch.autograd.grad(losses[i, which], list(weights.values()), retain_graph=True, allow_unused=True)
            true = sum((a * b).sum() for a, b in zip(own, g, strict=True) if a is not None) / length
            torch.testing.assert_close(gains[i, which], torch.as_tensor(true), rtol=2e-2, atol=2e-4)


def test_gains_are_not_in_half_precision(run):
    """accelerate wraps `forward` in autocast, which one around it does not end; it is there again afterwards."""
    model = run.student().eval()
    batch = IndexedPadding(run.tokenizer)([run.train[i] for i in range(4)])
    step = Step(model, run.teacher, batch, Counts.of(batch), None)
    expected = rw_kd.HeldBack(run, run.labelled, 8, 2.0).gains(step)
    wrapped = model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    step = Step(model, run.teacher, batch, Counts.of(batch), None)
    assert step.run(model).logits.dtype == torch.bfloat16
    assert torch.equal(rw_kd.HeldBack(run, run.labelled, 8, 2.0).gains(step), expected)
    assert model.forward is wrapped


def test_weights_leave_a_half_within_a_short_training():
    """As AdamW moves them, whose steps are learning rates whatever the gradient's size."""
    torch.manual_seed(0)
    network = rw_kd.Weights(16, 100.0)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    losses, known = torch.rand(32, 2), torch.ones(32, dtype=torch.bool)
    for _ in range(100):
        (-rw_kd.SHARE / 100 * network(losses, known)[:, 1].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert network(losses, known)[:, 1].min() > 0.8


def test_examples_that_help_are_weighted_up():
    """The network's loss is the change of the held-back loss: its gradient raises w where KL helps more than CE."""
    network, known = rw_kd.Weights(8), torch.tensor([True, True, False])
    losses = torch.tensor([[1.0, 0.1], [0.1, 2.0], [0.0, 1.0]])
    weights = network(losses, known)
    assert torch.equal(weights, torch.full((3, 2), 0.5))
    gains = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    for _ in range(30):
        (-(network(losses, known) * gains).sum()).backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.5 * p.grad
                p.grad = None
    after = network(losses, known)[:, 1]
    assert after[0] < 0.2 < 0.8 < after[1]


def test_weights_are_a_half_at_first_and_held_back_rows_are_never_trained_on(run, monkeypatch):
    caught = {}
    monkeypatch.setattr(
        rw_kd.HeldBack, "gains", lambda side, step: caught.update(side=side) or torch.arange(2.0 * ROWS).view(-1, 2)
    )
    run.fit = lambda model, loss, rows, **more: caught.update(loss=loss, rows=rows, **more) or model
    parse_method("rw_kd").method.train(run, held_back=0.25)
    assert len(caught["rows"]) == 18
    step = random_step()
    z = step.student.logits
    loss = caught["loss"](step)
    held_back = set(caught["side"].rows["index"])
    assert len(held_back) == 6
    assert not held_back & set(caught["rows"]["index"])
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    truth = 0.5 * step.soft() + 0.5 * step.hard()
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(gradient, torch.autograd.grad(truth, z)[0])
    own = torch.autograd.grad(loss, list(caught["beside"].parameters()))
    assert any(g.abs().sum() > 0 for g in own)


# ---- queries of random words


def test_random_queries(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    rows = random_queries(run)
    assert rows.column_names == run.train.column_names
    assert set(rows["labels"]) == {-100}
    assert rows["index"][:] == list(range(len(run.train)))
    assert rows["input_ids"][:] == random_queries(run)["input_ids"][:]
    texts = {" ".join(map(str, ids)) for ids in run.train["input_ids"]}
    assert not texts & {" ".join(map(str, ids)) for ids in rows["input_ids"]}
    assert len({word for ids in rows["input_ids"] for word in ids}) > 15


def test_the_second_of_a_random_pair_differs_in_three_words(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer, "rte")
    separator = tokenizer.sep_token_id
    rows = random_queries(run)
    differ = []
    for ids in rows["input_ids"]:
        words = tokenizer.decode(ids).replace(tokenizer.cls_token, "").split(tokenizer.sep_token)
        assert ids.count(separator) == 2
        first, second = (text.split() for text in words[:2])
        if len(first) == len(second):
            differ.append(sum(a != b for a, b in zip(first, second, strict=True)))
    assert 1 <= max(differ) <= 3


# ---- training


def quiet(tmp_path, tokenizer, **arguments):
    """Without dropout, by plain gradient descent."""
    run = tiny_run(tmp_path, tokenizer, labels=12, arguments={"optim": "sgd", "learning_rate": 0.5, **arguments})
    run.source.config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    return run


@pytest.mark.parametrize("text", ["rw_kd:held_back=0.25", "learned_temperature"])
def test_micro_batches_give_one_gradient(tmp_path, tokenizer, text):
    found = []
    for size, pieces in ((8, 1), (2, 4)):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces, "max_steps": 2}
        run = quiet(tmp_path, tokenizer, **arguments)
        chosen = parse_method(text)
        found.append(chosen.method.train(run, **chosen.options).state_dict())
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("text", ["logit_mse", "argmax", "argmax:queries=random_words"])
def test_a_student_comes_closer_to_its_teacher(tmp_path, tokenizer, text):
    run = tiny_run(tmp_path, tokenizer, arguments={"max_steps": 20, "learning_rate": 3e-3})
    chosen = parse_method(text)
    teacher = run.logits(run.teacher)
    models = run.student(), chosen.method.train(run, **chosen.options)
    distances = [F.cross_entropy(run.logits(model), teacher.argmax(-1)) for model in models]
    assert distances[1] < 0.8 * distances[0]


# ---- options


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kd:alpha=2", "alpha must be between 0 and 1, not 2"),
        ("reverse_kd:temperature=0", "temperature must be above 0, not 0"),
        ("kd:divergence=l2", "divergence must be one of forward_kl, reverse_kl"),
        ("jsd:divergence=l2", "divergence must be one of forward_kl, reverse_kl"),
        ("ensemble:teachers=2.5", "teachers must be a whole number, not '2.5'"),
        ("ensemble:teachers=0", "teachers must be above 0, not 0"),
        ("kd:divergence=logit_mse", "temperature must be 1, not 2"),
        ("learned_temperature:start=20", "0 < low < start < high must hold, not low=1.0, start=20.0, high=10.0"),
        ("rw_kd:held_back=0.01", "held_back=0.01 of 24 labelled examples leaves none on one of the sides"),
        ("tf_kd_reg:correct=1.5", "correct must be between 0 and 1, not 1.5"),
        ("self_distillation:rounds=0", "rounds must be above 0, not 0"),
        ("born_again:generations=0", "generations must be above 0, not 0"),
        ("defective_kd:share=0", "share must be above 0 and at most 1, not 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(run, text, sentence):
    with pytest.raises(UsageError, match=sentence):
        loss_of(run, text)


@pytest.mark.parametrize("text", ["kd:divergence=jsd", "born_again:variant=cwtm"])
def test_what_is_of_classes_is_refused_for_scores(tmp_path, tokenizer, text):
    with pytest.raises(UsageError, match="is one of classes, but the labels of stsb are scores"):
        loss_of(tiny_run(tmp_path, tokenizer, "stsb"), text)
