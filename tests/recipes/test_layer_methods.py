"""The methods of hidden states, attention maps and layers: losses by plain formulas, stages, and what they keep."""

import copy
import itertools
import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

import torch
import torch.nn.functional as F
from one_stage import batch_of, far, of_width, stages
from tiny_run import tiny_run
from transformers import AutoModelForSequenceClassification

from fusedkd import layer_maps
from fusedkd.integrations.command import UsageError
from recipes.glue.method import parse_method
from recipes.methods.bert_emd import Transport, sinkhorn
from recipes.methods.contrastive import Bank
from recipes.methods.early_exit import leaves
from recipes.methods.mobilebert import only


class View:
    """Of a model on a batch, in float64, by the model's own outputs."""

    def __init__(self, model, batch):
        self.model = copy.deepcopy(model).double().eval().requires_grad_(True)
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        found = self.model(**given, output_hidden_states=True)
        self.hidden, self.logits, self.mask = found.hidden_states, found.logits, batch["attention_mask"].bool()
        self.first = [h[:, 0] for h in self.hidden]
        m = self.mask[..., None]
        self.means = [(h * m).sum(1) / m.sum(1) for h in self.hidden]

    def scores(self, layer, of="query key"):
        """Before the softmax, 0 for padded keys."""
        attention = self.model.bert.encoder.layer[layer].attention.self
        q, k = (getattr(attention, name)(self.hidden[layer]).unflatten(-1, (4, -1)) for name in of.split())
        found = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        return found.masked_fill(~self.mask[:, None, None], 0)

    def logmap(self, layer, of="query key"):
        return self.scores(layer, of).masked_fill(~self.mask[:, None, None], -1e30).log_softmax(-1)


def unit(x):
    return F.normalize(x, dim=-1)


def soft(s, t, temperature=1.0):
    sides = [(z / temperature).log_softmax(-1) for z in (s.logits, t.logits)]
    return temperature**2 * F.kl_div(*sides, reduction="batchmean", log_target=True)


def maps(s, t, i, j, of="query key"):
    """A mean over heads and the queries that are no padding."""
    p, q = t.logmap(j, of), s.logmap(i, of)
    return ((p.exp() * (p - q)).sum(-1).mean(1))[s.mask].mean()


def hard(s, y):
    return F.cross_entropy(s.logits, y)


def pkd(s, t, y, _):
    return 0.3 * hard(s, y) + 0.7 * soft(s, t, 10) + 500 * F.mse_loss(unit(s.first[1]), unit(t.first[2]))


def pkd_last(s, t, y, _):
    return 0.3 * hard(s, y) + 0.7 * soft(s, t, 10) + 500 * F.mse_loss(unit(s.first[1]), unit(t.first[3]))


def tinybert(s, t, y, linears):
    attention = sum(F.mse_loss(s.scores(i), t.scores(2 * i + 1)) for i in range(2))
    (dense,) = linears["hidden"]
    return attention + sum(F.mse_loss(dense(s.hidden[i])[s.mask], t.hidden[2 * i][s.mask]) for i in range(3))


def ckd(s, t, y, linears):
    total = 0.4 * hard(s, y) + 0.4 * soft(s, t)
    for n, (i, group) in enumerate(((1, (1, 3)), (2, (2, 4)))):  # interleaved
        own, theirs = linears["combination"][n](s.hidden[i]), torch.cat([t.hidden[j] for j in group], -1)
        total = total + 0.2 * (unit(own) - unit(theirs)).square().sum(-1)[s.mask].mean()
    return total


def alp_kd(s, t, y, _):
    total = hard(s, y) + soft(s, t)
    for i in (1, 2):
        weights = torch.stack([(s.first[i] * t.first[j]).sum(-1) for j in range(1, 5)], -1).softmax(-1)
        mixture = torch.stack(t.first[1:], -1) @ weights[..., None]
        total = total + F.mse_loss(s.first[i], mixture.squeeze(-1))
    return total / 3


def drawn(seed=1):
    return layer_maps.random_sorted(2, 4, generator=torch.Generator().manual_seed(seed))


def rail_kd(s, t, y, _):
    pairs = zip((1, 2), drawn(), strict=True)
    layers = sum((unit(s.means[i]) - unit(t.means[j])).square().sum(-1).mean() for i, j in pairs)
    return (hard(s, y) + soft(s, t) + layers) / 3


def rail_kd_together(s, t, y, beside):
    own, theirs = beside(torch.cat(s.means[1:], -1)), torch.cat([t.means[j] for j in drawn()], -1)
    return (hard(s, y) + soft(s, t) + (unit(own) - unit(theirs)).square().sum(-1).mean()) / 3


def bert_emd(s, t, y, _):
    """All flows are equal in the first step."""
    total = F.mse_loss(s.hidden[0][s.mask], t.hidden[0][s.mask])
    for i, j in itertools.product(range(2), range(4)):
        of_hidden = F.mse_loss(s.hidden[i + 1][s.mask], t.hidden[j + 1][s.mask])
        total = total + (of_hidden + F.mse_loss(s.scores(i), t.scores(j))) / 8
    return 0.005 * total + soft(s, t)


def minilm(s, t, y, _):
    return maps(s, t, 1, 3) + maps(s, t, 1, 3, "value value")


def mobilebert(s, t, y, _):
    sides = [F.layer_norm(h, h.shape[-1:])[s.mask] for h in (s.hidden[1], t.hidden[2])]
    return 100 * F.mse_loss(*sides) + maps(s, t, 0, 1)


def cilda(s, t, y, beside):
    own, theirs = beside(torch.cat(s.means[1:], -1)), torch.cat(t.means[1:], -1)
    scores = unit(own) @ unit(theirs).T / 0.07
    return 0.5 * hard(s, y) + 0.5 * soft(s, t) + 0.5 * F.cross_entropy(scores, torch.arange(len(y)))


def hidden(s, t, y, _):
    away = 1 - F.cosine_similarity(s.hidden[2], t.hidden[4], dim=-1)[s.mask].mean()
    return 0.5 * hard(s, y) + 0.5 * soft(s, t, 2) + away


FORMULAS = {
    "pkd": pkd,
    "pkd:variant=last": pkd_last,
    "tinybert": tinybert,
    "ckd:variant=interleaved": ckd,
    "alp_kd": alp_kd,
    "rail_kd": rail_kd,
    "rail_kd:variant=concatenated": rail_kd_together,
    "bert_emd": bert_emd,
    "minilm": minilm,
    "mobilebert": mobilebert,
    "cilda": cilda,
    "hidden": hidden,
}
ALL = [*FORMULAS, "minilm_v2", "codir", "early_exit"]


@pytest.mark.parametrize("method", FORMULAS)
def test_a_loss_is_its_formula(tmp_path, tokenizer, method):
    """Value and gradient of the first stage, on rows of different lengths."""
    stage = stages(tmp_path, tokenizer, method)[0]
    stage.model.requires_grad_(True)
    batch = batch_of(stage.run)
    s, t = View(stage.model, batch), View(stage.teacher, batch)
    beside = copy.deepcopy(stage.bound.projections if stage.bound else None).double() if stage.bound else None
    beside = copy.deepcopy(stage.beside).double() if stage.beside is not None else beside
    expected = FORMULAS[method](s, t, batch["labels"], beside)
    expected.backward()
    assert stage.loss(stage.step(batch)).item() == pytest.approx(expected.item(), rel=1e-4)
    truth = {n: p.grad for n, p in s.model.named_parameters() if p.grad is not None}
    if beside is not None:
        at = "beside." if stage.beside is not None else "bound."
        truth |= {f"{at}{n}": p.grad for n, p in beside.named_parameters()}
    assert far(stage.gradient(batch), truth) < 1e-4


@pytest.mark.parametrize("method", [m for m in ALL if m != "cilda"])
def test_a_step_has_one_gradient(tmp_path, tokenizer, method):
    """The second step of eight examples at once and of four times two; only CILDA's examples need each other."""
    found = []
    for cuts in (1, 4):
        stage = stages(tmp_path / str(cuts), tokenizer, method)[0]
        for number in range(2):
            gradient = stage.gradient(batch_of(stage.run, 8 * number), cuts, number)
        found.append({name: g.clone() for name, g in gradient.items()})
    assert far(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("method", ALL)
def test_a_loss_falls(tmp_path, tokenizer, method):
    stage = stages(tmp_path, tokenizer, method)[0]
    batch, parameters = batch_of(stage.run), [p for p in stage.parameters().values() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 2e-3)
    losses = []
    for number in range(12):
        loss = stage.loss(stage.step(batch, number=min(number, 1)))  # the flow and the bank of one step
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[1]


NARROW = ["ckd", "rail_kd", "rail_kd:variant=concatenated", "minilm_v2", "cilda", "codir", "hidden"]


@pytest.mark.parametrize("method", [*NARROW, "tinybert", "bert_emd", "minilm"])
def test_a_student_may_have_another_width(tmp_path, tokenizer, method):
    """Where heads need not be as many, of fewer heads too."""
    given = of_width(tokenizer, 16, 2 if method in NARROW else 4)
    stage = stages(tmp_path, tokenizer, method, given=given)[0]
    gradient = stage.gradient(batch_of(stage.run))
    assert gradient["bert.encoder.layer.0.attention.self.query.weight"].norm() > 0
    assert all(g.isfinite().all() for g in gradient.values())


@pytest.mark.parametrize("method", ["tinybert", "bert_emd", "minilm", "mobilebert:alpha=1", "pkd", "alp_kd"])
def test_what_a_method_cannot_do_is_said(tmp_path, tokenizer, method):
    run = tiny_run(tmp_path, tokenizer, given=of_width(tokenizer, 16, 2))
    with pytest.raises(UsageError, match=f"--method {method} needs a student as wide|of as many attention heads"):
        parse_method(method).check(run)


def test_numbers_that_do_not_fit_are_said(tmp_path, tokenizer):
    run = tiny_run(tmp_path, tokenizer)
    for method, sentence in {
        "minilm_v2:relation_heads=5": "5 relation heads must divide 32 columns",
        "tinybert:intermediate=1.5": "shares of the steps must not be negative",
        "alp_kd:buckets=regular": "a multiple of its student's 3",
    }.items():
        chosen = parse_method(method)
        with pytest.raises(UsageError, match=sentence):
            chosen.method.train(replace(run, layers=[0, 1, 2]), **chosen.options)
    with pytest.raises(UsageError, match="layer 3 of BertForSequenceClassification has no weights of its own"):
        only(run.student(), 3)
    with pytest.raises(UsageError, match="variant must be one of skip, last, not 'middle'"):
        parse_method("pkd:variant=middle")


# ---- stages


def test_stages_share_out_the_steps(tmp_path, tokenizer):
    more = {"labels": 12, "arguments": {"max_steps": 10}}
    first, second = stages(tmp_path, tokenizer, "tinybert", **more)
    assert (first.options["steps"], second.options["steps"]) == (7, 3)
    assert second.options["terms"] == []
    first, second = stages(tmp_path, tokenizer, "minilm", **more)
    assert first.teacher is first.run.source
    assert first.rows is None
    assert len(second.rows) == 12
    assert [s.options["steps"] for s in (first, second)] == [5, 5]
    found = stages(tmp_path, tokenizer, "mobilebert:progressive=0.8", **more)
    assert [s.options["steps"] for s in found] == [4, 4, 2]
    for layer, stage in enumerate(found[:2]):
        assert len(stage.trained) == 16
        assert all(f"encoder.layer.{layer}." in name for name in stage.trained)
    assert len(found[2].trained) == len([*found[2].model.parameters()])


def test_progressive_transfer_leaves_the_rest_alone(tmp_path, tokenizer):
    """A step for each layer, and none for the whole."""
    run = tiny_run(tmp_path, tokenizer, arguments={"max_steps": 2, "learning_rate": 1e-2})
    found = parse_method("mobilebert").method.train(run, progressive=1.0).state_dict()
    changed = {name for name, v in run.student().state_dict().items() if not torch.equal(v, found[name])}
    assert {".".join(name.split(".")[1:4]) for name in changed} == {"encoder.layer.0", "encoder.layer.1"}


@pytest.mark.parametrize("method", ["bert_emd", "codir"])
def test_training_is_the_same_however_a_step_is_cut(tmp_path, tokenizer, method):
    """What is kept from step to step, too: flows, weights of layers, a bank."""
    found = []
    for size, cuts in ((8, 1), (2, 4)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": cuts, "optim": "sgd"}
        stage = stages(tmp_path, tokenizer, method, arguments={"max_steps": 3, "learning_rate": 0.05, **cut})[0]
        config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = type(stage.model)(copy.deepcopy(stage.model.config).__class__(**stage.model.config.to_dict() | config))
        model.load_state_dict(stage.model.state_dict())
        tiny_fit = super(type(stage.run), stage.run).fit
        found.append(tiny_fit(model, stage.loss, **stage.options).state_dict())
    start = stage.model.state_dict()
    moved = {name: v - start[name] for name, v in found[0].items()}
    assert far({name: v - start[name] for name, v in found[1].items()}, moved) < 1e-3


# ---- transport


def test_the_flow_is_nearly_the_cheapest():
    draw = torch.Generator().manual_seed(0)
    cost = torch.rand(4, 4, generator=draw, dtype=torch.float64)
    equal = torch.full((4,), 0.25, dtype=torch.float64)
    flow = sinkhorn(cost, equal, equal)
    torch.testing.assert_close(flow.sum(1), equal)
    torch.testing.assert_close(flow.sum(0), equal, rtol=1e-2, atol=0)
    best = min(sum(cost[i, j] for i, j in enumerate(order)) / 4 for order in itertools.permutations(range(4)))
    assert best <= (flow * cost).sum() < 1.05 * best


def test_layers_that_cost_more_weigh_less():
    transport, cost = Transport(2, 3), torch.tensor([[1.0, 2.0, 4.0], [3.0, 9.0, 2.0]])
    assert transport.cost_of(cost, 0) == pytest.approx(cost.mean().item())
    assert transport.cost_of(cost, 0) == pytest.approx(cost.mean().item())  # another micro-batch of the step
    half = torch.full((2,), 0.5, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
    flow = sinkhorn(2 * cost.double(), *half)
    assert transport.cost_of(cost, 1) == pytest.approx((flow * cost).sum().item())
    per_unit = (flow * cost).sum(1) / half[0]
    torch.testing.assert_close(transport.student, (1 / per_unit) / (1 / per_unit).sum())
    assert transport.student.argmax() == per_unit.argmin()
    assert transport.teacher.sum() == pytest.approx(1)
    transport.cost_of(torch.zeros(2, 3), 2)
    transport.cost_of(torch.zeros(2, 3), 3)  # of layers that agree
    assert transport.flow.isfinite().all()
    assert transport.student.isfinite().all()


# ---- contrast


def test_a_bank_has_the_examples_of_steps_before():
    bank, rows = Bank(3), torch.arange(8.0).view(4, 2)
    bank.add(rows[:2], torch.tensor([0, 1]), 0)
    bank.add(rows[2:], torch.tensor([0, 1]), 0)
    assert bank.others(torch.tensor(0)) is None
    bank.add(rows[:1], torch.tensor([5]), 1)
    assert torch.equal(bank.others(torch.tensor(0)), rows[[1, 3]])
    assert torch.equal(bank.others(torch.tensor(1)), rows[[2]])
    assert len(bank.others(torch.tensor(7))) == 3
    assert bank.rows.data_ptr() != rows.data_ptr()


def test_codir_is_its_formula(tmp_path, tokenizer):
    stage = stages(tmp_path, tokenizer, "codir")[0]
    batches = batch_of(stage.run), batch_of(stage.run, 8)
    before, t = (View(stage.teacher, batch) for batch in batches)
    s = View(stage.model, batches[1])
    beside = copy.deepcopy(stage.beside).double()
    stage.loss(stage.step(batches[0]))
    found = stage.loss(stage.step(batches[1], number=1)).item()
    own, theirs, bank = (unit(torch.cat(v.means[1:], -1)) for v in (s, t, before))
    own = unit(beside(torch.cat(s.means[1:], -1)))
    classes, others = t.logits.argmax(-1), before.logits.argmax(-1)
    assert len(others.unique()) == 2
    losses = []
    for i, label in enumerate(classes):
        scores = torch.cat([theirs[i : i + 1], bank[others != label]]) @ own[i] / 0.07
        losses.append(-scores.log_softmax(0)[0])
    expected = 0.5 * hard(s, batches[1]["labels"]) + 0.5 * soft(s, t) + 0.1 * torch.stack(losses).mean()
    assert found == pytest.approx(expected.item(), rel=1e-5)


# ---- early exit


def test_examples_leave_where_they_are_sure():
    logits = torch.tensor([[[9.0, 0], [1, 0], [0, 0]], [[0, 0], [0, 9.0], [1, 0]], [[0, 0], [0, 0], [0, 0]]])
    assert leaves(logits, 0.1).tolist() == [0, 1, 2]
    assert leaves(logits, 0.0).tolist() == [2, 2, 2]
    assert leaves(logits, 1.01).tolist() == [0, 0, 0]


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_only_heads_are_taught_and_a_saved_model_is_the_backbone(tmp_path, tokenizer, of):
    run = tiny_run(tmp_path, tokenizer, arguments={"max_steps": 4})
    method = parse_method("early_exit").method
    never = method.train(run, of=of, speed=0.0)
    assert run.logs[-1] == {"exit_layer": 4.0 if of == "teacher" else 2.0}
    if of == "teacher":
        weights = never.state_dict()
        assert all(torch.equal(v, weights[name]) for name, v in run.teacher.state_dict().items())
        torch.testing.assert_close(run.logits(never), run.logits(run.teacher))
    always = method.train(run, of=of, speed=1.01)
    assert run.logs[-1] == {"exit_layer": 1.0}
    heads = [run.logits(model) for model in (always, never)]
    assert not torch.allclose(*heads)
    always.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(run.logits(loaded), heads[1])


def test_heads_are_taught_the_last_layers_answer(tmp_path, tokenizer):
    stage = stages(tmp_path, tokenizer, "early_exit")[0]
    batch = batch_of(stage.run)
    t = View(stage.model, batch)
    expected = 0
    for head, h in zip(stage.beside.heads, t.first[1:-1], strict=True):
        own = copy.deepcopy(head).double()(h).log_softmax(-1)
        expected = expected + F.kl_div(own, t.logits.log_softmax(-1), reduction="batchmean", log_target=True)
    assert stage.loss(stage.step(batch)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert not stage.model.training
    assert stage.trained == []
