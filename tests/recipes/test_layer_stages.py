"""The methods of hidden states, attention maps and layers: their stages, and what they keep."""

import copy
import itertools
import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

import torch
import torch.nn.functional as F
from one_stage import View, batch_of, far, hard, soft, stages, unit
from tiny_run import tiny_run
from transformers import AutoModelForSequenceClassification

from recipes.glue.method import parse_method
from recipes.methods.bert_emd import Transport, sinkhorn
from recipes.methods.contrastive import Bank
from recipes.methods.early_exit import leaves

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
    """Hidden states and attention have a flow each, and the mean of the weights of both."""
    transport = Transport(2, 2, 3)
    cost = torch.tensor([[[1.0, 2.0, 4.0], [3.0, 9.0, 2.0]], [[2.0, 1.0, 1.0], [50.0, 30.0, 20.0]]])
    total = 2 * cost.mean().item()
    assert transport.cost_of(cost, 0) == pytest.approx(total)
    assert transport.cost_of(cost, 0) == pytest.approx(total)  # another micro-batch of the step
    half = torch.full((2,), 0.5, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
    flow = torch.stack([sinkhorn(2 * each.double(), *half) for each in cost])
    assert transport.cost_of(cost, 1) == pytest.approx((flow * cost).sum().item())
    shares = 1 / ((flow * cost).sum(2) / half[0])
    torch.testing.assert_close(transport.student, (shares / shares.sum(1, keepdim=True)).mean(0))
    assert transport.student.argmax() == 0
    assert transport.teacher.sum() == pytest.approx(1)
    transport.cost_of(torch.zeros(2, 2, 3), 2)
    transport.cost_of(torch.zeros(2, 2, 3), 3)  # of layers that agree
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
