"""The methods of hidden states, attention maps and layers: losses by plain formulas, however a step is cut."""

import copy
import itertools
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

import torch
import torch.nn.functional as F
from one_stage import View, batch_of, far, hard, of_width, soft, stages, unit
from tiny_run import tiny_run

from fusedkd import layer_maps
from fusedkd.integrations.command import UsageError
from recipes.glue.method import parse_method
from recipes.methods.mobilebert import only


def maps(s, t, i, j, of="query key"):
    """A mean over heads and the queries that are no padding."""
    p, q = t.logmap(j, of), s.logmap(i, of)
    return ((p.exp() * (p - q)).sum(-1).mean(1))[s.mask].mean()


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
        "ckd:alpha=0.9,beta=0.3": r"alpha \+ beta must be at most 1",
        "alp_kd:buckets=regular": "a multiple of its student's 3",
    }.items():
        chosen = parse_method(method)
        with pytest.raises(UsageError, match=sentence):
            chosen.method.train(replace(run, layers=[0, 1, 2]), **chosen.options)
    with pytest.raises(UsageError, match="layer 3 of BertForSequenceClassification has no weights of its own"):
        only(run.student(), 3)
    with pytest.raises(UsageError, match="variant must be one of skip, last, not 'middle'"):
        parse_method("pkd:variant=middle")
