"""The terms of DistillationTrainer beside the logits', against the plain formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fusedkd.integrations import presets
from fusedkd.integrations.check import kd_check
from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.terms import AttentionTerm, ContrastiveTerm, HiddenTerm, LayerAttentionTerm, LogitsTerm

from . import term_step
from .distil_step import LENGTH, lora, rows, trainer
from .term_step import EVERYTHING, KINDS, NONE, models, step
from .test_transformers import Padding, collated, top_k
from .test_transformers import truth as truth_of_logits

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


class Run:
    """Of a model on all rows at once: what terms compare, by hooks on each class's own projections."""

    def __init__(self, kind: str, model, data=None):
        self.batch = collated(list(rows()) if data is None else data)
        self.mask = self.batch["attention_mask"].bool()
        model.set_attn_implementation("eager")
        self.qkv, hooks, causal = {}, [], kind in ("gpt2", "llama")
        for i, attention in enumerate(layers_of(kind, model)):
            for name, (module, part) in attention.items():
                hooks.append(module.register_forward_hook(self.keep(i, name, part)))
        inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        for hook in hooks:
            hook.remove()
        self.hidden, self.heads = outputs.hidden_states, outputs.attentions[0].shape[1]
        self.maps = [each.clamp(min=1e-30).log() for each in outputs.attentions]
        seen = self.mask[:, None, None, :].expand(-1, 1, LENGTH, -1)
        self.seen = seen.tril() if causal else seen

    def keep(self, layer: int, name: str, part: int):
        def hook(module, args, output):
            self.qkv[layer, name] = output.chunk(3, -1)[part] if part >= 0 else output

        return hook

    def split(self, layer: int, name: str, heads: int):
        return self.qkv[layer, name].unflatten(-1, (heads, -1)).transpose(1, 2)

    def relation(self, layer: int, name: str, heads: int):
        """The log-softmax of the scores of one with itself."""
        x = self.split(layer, name, heads)
        scores = x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
        return scores.masked_fill(~self.seen, -torch.inf).log_softmax(-1)

    def scores(self, layer: int):
        q, k = (self.split(layer, name, self.heads) for name in "qk")
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).where(self.seen, 0)

    def pooled(self, layer: int):
        weights = self.mask.float()[..., None]
        return (self.hidden[layer] * weights).sum(1) / weights.sum(1)


def layers_of(kind: str, model):
    if kind == "bert":
        return [
            {n[0]: (getattr(layer.attention.self, n), -1) for n in ("query", "key", "value")}
            for layer in model.bert.encoder.layer
        ]
    if kind == "distilbert":
        return [
            {n[0]: (getattr(layer.attention, n), -1) for n in ("q_lin", "k_lin", "v_lin")}
            for layer in model.distilbert.transformer.layer
        ]
    if kind == "llama":
        return [
            {n[0]: (getattr(layer.self_attn, n), -1) for n in ("q_proj", "k_proj", "v_proj")}
            for layer in model.model.layers
        ]
    return [{name: (layer.attn.c_attn, part) for part, name in enumerate("qkv")} for layer in model.transformer.h]


def kl(p: torch.Tensor, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of log-probabilities ``(B, heads, L, L)``: mean over heads and selected queries."""
    return (p.exp() * (p - q)).nan_to_num(0).sum(-1).mean(1)[mask].mean()


def compare(kind: str, terms, formulas, *, kd=NONE, width=48, **options) -> None:
    """One step of the Trainer against `formulas` of both runs and the projections, by name."""
    student, teacher = models(kind, width)
    twin, of_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    gradient, logs, _ = step(student, teacher, terms, kd, **options)
    fresh = trainer(models(kind, width)[0], teacher, kd, terms=terms).projections  # as they were
    with torch.no_grad():
        t = Run(kind, of_teacher)
    values = formulas(Run(kind, twin), t, fresh)
    assert {term.name for term in terms} == values.keys()
    total = sum(term.weight * values[term.name] for term in terms)
    total.backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    expected |= {f"distillation_terms.{name}": p.grad for name, p in fresh.named_parameters()}
    for name, value in values.items():
        assert logs[name] == pytest.approx(value.item(), rel=1e-4), name
        assert logs[name] > 1e-3, name
    assert logs["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert_same(gradient, expected)


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    error = torch.stack([(found.get(k, torch.zeros(())) - g).norm() for k, g in expected.items()]).norm()
    others = [k for k in found.keys() - expected.keys() if found[k].norm() > tolerance * size]
    assert not others
    assert size > 0.01
    assert error < tolerance * size


# ---- the formulas


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_behind_projections(kind):
    """Every layer with a projection of its own; at one cut, in which the rows are uneven."""

    def formulas(s, t, linears):
        pairs = [(0, 0), (1, 2), (2, 4)]
        sides = [(linears["hidden"][n](s.hidden[i])[s.mask], t.hidden[j][s.mask]) for n, (i, j) in enumerate(pairs)]
        return {"hidden": sum(F.mse_loss(*side) for side in sides)}

    compare(kind, [HiddenTerm("uniform", projection=True, weight=0.5)], formulas, batch=2, accumulation=4)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_are_the_models_own(kind):
    """With rotary embeddings and grouped keys, padding and causal masks; the student runs under sdpa."""

    def formulas(s, t, _):
        return {"attention": sum(kl(t.maps[j], s.maps[i], s.mask) for i, j in ((0, 1), (1, 3)))}

    compare(kind, [AttentionTerm(layers="uniform_attention", weight=2.0)], formulas)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_relations_of_other_numbers_of_heads(kind):
    def formulas(s, t, _):
        names = ("v",) if kind == "llama" else ("q", "k", "v")  # others are rotated
        return {"relations": sum(kl(t.relation(3, n, 8), s.relation(1, n, 8), s.mask) for n in names)}

    relations = ("vv",) if kind == "llama" else ("qq", "kk", "vv")
    terms = [AttentionTerm(relations=relations, relation_heads=8, name="relations")]
    compare(kind, terms, formulas)


def test_other_distances_and_poolings():
    def formulas(s, t, _):
        def normed(x):
            return F.layer_norm(x, x.shape[-1:])

        m = s.mask
        cosines = [1 - F.cosine_similarity(s.hidden[i], t.hidden[j], -1)[m].mean() for i, j in ((1, 1), (2, 4))]
        return {
            "cosine": sum(cosines) / 2,
            "ln": F.mse_loss(normed(s.hidden[2])[m], normed(t.hidden[4])[m]),
            "smooth": F.smooth_l1_loss(s.hidden[1][:, 0], t.hidden[2][:, 0]),
            "means": F.mse_loss(F.normalize(s.pooled(1)), F.normalize(t.pooled(3))),
        }

    terms = [
        HiddenTerm(((1, 1), (-1, -1)), distance="cosine", average=True, name="cosine"),
        HiddenTerm(normalize="layer_norm", name="ln"),
        HiddenTerm([(1, 2)], distance="smooth_l1", pool="first", name="smooth"),
        HiddenTerm([(1, 3)], normalize="l2", pool="mean", name="means"),
    ]
    compare("bert", terms, formulas, width=32, batch=2, accumulation=4)


def test_layers_by_attention_and_contrast():
    def formulas(s, t, _):
        found = 0
        for i, bucket in ((1, (1, 2)), (2, (3, 4))):
            scores = torch.stack([(s.hidden[i] * t.hidden[j]).sum(-1) for j in bucket], -1).softmax(-1)
            mixture = sum(scores[..., n, None] * t.hidden[j] for n, j in enumerate(bucket))
            found = found + F.mse_loss(s.hidden[i][s.mask], mixture[s.mask])
        scores = F.normalize(s.pooled(2)) @ F.normalize(t.pooled(4)).T / 0.07
        return {"layers": found, "contrastive": F.cross_entropy(scores, torch.arange(8))}

    compare("bert", [LayerAttentionTerm("regular"), ContrastiveTerm(weight=0.3)], formulas, width=32)


def test_logits_have_several_divergences():
    """Of several teachers as well, of one for each row, and of those on disk."""
    student, (teacher, other) = models()[0], (models(width=width)[1] for width in (48, 32))
    terms = [LogitsTerm("reverse_kl", temperature=2.0, weight=0.4)]
    _, logs, _ = step(student, teacher, terms, KDConfig())
    expected = step(models()[0], teacher, [], KDConfig(divergence="reverse_kl"))[1]["kd"]
    assert logs["logits"] == pytest.approx(expected, rel=1e-5)
    weights = KDConfig(teacher_weights=[0.5, 0.25])
    _, logs, _ = step(models()[0], [teacher, other], [LogitsTerm("reverse_kl", temperature=2.0)], weights)
    alone = step(models()[0], other, [], KDConfig(divergence="reverse_kl"))[1]["kd"]
    assert logs["logits"] == pytest.approx(0.5 * expected + 0.25 * alone, rel=1e-5)
    data = [row | {"teacher": "a"} for row in rows()]
    _, logs, _ = step(models()[0], {"a": teacher, "b": other}, terms, KDConfig(), data=data)
    assert logs["logits"] == pytest.approx(expected, rel=1e-5)
    stored, collator = list(top_k(teacher, rows(), 5)), Padding("right")
    _, logs, _ = step(models()[0], None, terms, KDConfig(), data=stored, collator=collator)
    kd = KDConfig(divergence="reverse_kl")
    assert logs["logits"] == pytest.approx(step(models()[0], None, [], kd, data=stored, collator=collator)[1]["kd"])


# ---- one gradient


@pytest.fixture(scope="module")
def whole():
    """All rows at once."""
    return step(*models(), EVERYTHING, KDConfig())


@pytest.mark.parametrize(("batch", "accumulation"), CUTS[1:])
def test_one_gradient_however_a_step_is_cut(whole, batch, accumulation):
    gradient, logs, _ = step(*models(), EVERYTHING, KDConfig(), batch=batch, accumulation=accumulation)
    assert_same(gradient, whole[0])
    for name in ("loss", "kd", "ce", *(term.name for term in EVERYTHING)):
        assert logs[name] == pytest.approx(whole[1][name], rel=1e-5), name
        assert logs[name] > 1e-3


def test_the_whole_is_the_sum_of_its_parts(whole):
    (student, teacher), silent = models(), KDConfig(kd_weight=0.0, ce_weight=0.0)
    (gradient, logs), alone = (
        truth_of_logits(student, teacher, KDConfig(), causal=False),
        step(*models(), EVERYTHING, silent),
    )
    both = {name: g + gradient.get(name, 0) for name, g in alone[0].items()}
    both |= {name: g for name, g in gradient.items() if name not in alone[0]}
    assert_same(whole[0], both)
    assert whole[1]["loss"] == pytest.approx(logs["loss"] + alone[1]["loss"], rel=1e-5)


def test_the_check_of_any_trainer_finds_no_fault():
    """As it does not for what depends on padding, the scores."""
    terms = [term for term in EVERYTHING if term.name != "scores"]
    report = kd_check(trainer(*models(), KDConfig(), terms=terms))
    assert report.ok, report


def test_an_evaluation_is_a_mean_over_rows(whole):
    options = {"eval_dataset": list(rows()), "per_device_eval_batch_size": 3}
    found = trainer(*models(), KDConfig(), terms=EVERYTHING, **options).evaluate()
    for name in ("loss", *(term.name for term in EVERYTHING)):
        assert found[f"eval_{name}"] == pytest.approx(whole[1][name], rel=1e-5), name


def test_an_evaluation_of_relations_with_grouped_values():
    """Queries have more heads than values: the mean over heads is each relation's own."""
    _, logs, _ = step(*models("llama"), presets.minilm()["terms"])
    options = {"eval_dataset": list(rows()), "per_device_eval_batch_size": 3}
    found = trainer(*models("llama"), NONE, terms=presets.minilm()["terms"], **options).evaluate()
    assert found["eval_relations"] == pytest.approx(logs["relations"], rel=1e-5)


# ---- projections


def weights_of(found) -> dict[str, torch.Tensor]:
    return {**found.model.state_dict(), **{f"projections.{k}": v for k, v in found.projections.state_dict().items()}}


def test_projections_are_trained_saved_and_left_out_of_the_student(tmp_path):
    from safetensors.torch import load_file

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "batch": 4}
    run, again = (trainer(*models(), KDConfig(), terms=EVERYTHING, folder=str(tmp_path / n), **options) for n in "ab")
    start = {k: v.clone() for k, v in weights_of(again).items()}
    own = [k for k in start if k.startswith("projections")]
    assert len(own) == 8
    run.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in weights_of(run).items():
        assert torch.equal(value, weights_of(again)[name]), name
    assert not any(torch.equal(weights_of(run)[name], start[name]) for name in own)
    names = models()[0].state_dict().keys()
    assert run.model.state_dict().keys() == names
    run.save_model(str(tmp_path / "model"))
    for saved in ("model", "a/checkpoint-2"):
        assert load_file(tmp_path / saved / "model.safetensors").keys() <= names
    (tmp_path / "a" / "checkpoint-2" / "distillation_terms.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no distillation_terms.safetensors"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_a_projection_draws_nothing_from_the_generator_of_everything_else():
    torch.manual_seed(0)
    first = trainer(*models(), terms=EVERYTHING)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    second = trainer(*models())
    assert torch.equal(after, torch.get_rng_state())
    assert not second.projections
    other = trainer(*models(), terms=EVERYTHING, seed=1)
    one, two = first.projections["hidden"][0].weight, other.projections["hidden"][0].weight
    assert not torch.equal(one, two)
    assert one.std().item() == pytest.approx(torch.nn.Linear(32, 48).weight.std().item(), rel=0.1)


def test_an_optimizer_without_the_projections_is_refused():
    student, teacher = models()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    found = trainer(student, teacher, terms=EVERYTHING, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="optimizers holds an optimizer without the projections"):
        found.train()
    optimizer.add_param_group({"params": list(found.projections.parameters())})
    found.train()


# ---- other students


def test_adapters_and_checkpointed_layers(whole):
    gradient, logs, _ = step(*models(), EVERYTHING, KDConfig(), gradient_checkpointing=True)
    assert_same(gradient, whole[0])
    pytest.importorskip("peft")
    student = lora(models()[0], target_modules=["query"]).eval()
    gradient, logs, _ = step(student, models()[1], EVERYTHING, KDConfig())
    assert any("lora" in name for name in gradient)
    assert any("hidden.0.weight" in name for name in gradient)
    assert logs["hidden"] > 0
    base = models("bert")[0]
    student = lora(base, target_modules=["query"]).eval()
    _, logs, _ = step(student, base, [HiddenTerm(), AttentionTerm()], KDConfig())
    assert logs["hidden"] > 0


def test_layers_are_drawn_for_each_epoch(tmp_path):
    """The same after a resumption."""
    term = HiddenTerm("random_sorted", name="drawn")
    options = {"batch": 4, "max_steps": -1, "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 3}

    def run(folder: str, **more):
        drawn = []
        found = trainer(*models(width=32), NONE, terms=[term], folder=str(tmp_path / folder), **options)
        compute = found.compute_loss
        found.compute_loss = lambda *a, **o: (compute(*a, **o), drawn.append(found.pairs["drawn"]))[0]
        found.train(**more)
        return drawn

    drawn = run("a")
    assert len(drawn) == 8
    assert all(drawn[i] == drawn[i + 1] for i in range(0, 8, 2))
    assert len(set(drawn)) > 1
    assert all([i for i, _ in pairs] == [1, 2] for pairs in drawn)
    assert run("b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3")) == drawn[3:]


# ---- the papers


def test_patient_kd():
    def formulas(s, t, _):
        student, teacher = (torch.stack([h[:, 0] for h in side], 1) for side in ([s.hidden[1]], [t.hidden[2]]))
        return {"patience": F.mse_loss(F.normalize(student, dim=2), F.normalize(teacher, dim=2))}

    recipe = presets.pkd()
    compare("bert", recipe["terms"], formulas, width=32)
    assert (recipe["kd"].kd_weight, recipe["kd"].temperature) == (0.7, 10.0)


def test_tinybert():
    def formulas(s, t, linears):
        (dense,) = linears["hidden"]
        hidden = sum(F.mse_loss(dense(s.hidden[i])[s.mask], t.hidden[2 * i][s.mask]) for i in range(3))
        return {"attention": sum(F.mse_loss(s.scores(i), t.scores(2 * i + 1)) for i in range(2)), "hidden": hidden}

    compare("bert", presets.tinybert()["terms"], formulas, batch=2, accumulation=4)
    assert presets.tinybert("prediction")["kd"].kd_weight == 1.0


def test_minilm():
    def formulas(s, t, _):
        values = kl(t.relation(3, "v", 2), s.relation(1, "v", 2), s.mask)
        return {"relations": kl(t.maps[3], s.maps[1], s.mask) + values}

    compare("bert", presets.minilm()["terms"], formulas)


def test_minilm_v2():
    def formulas(s, t, _):
        return {"relations": sum(kl(t.relation(2, n, 4), s.relation(1, n, 4), s.mask) for n in "qkv")}

    compare("bert", presets.minilm_v2(2, relation_heads=4)["terms"], formulas)


def test_mobilebert():
    def formulas(s, t, _):
        normed = [[F.layer_norm(h, h.shape[-1:])[s.mask] for h in side.hidden[1:]] for side in (s, t)]
        maps = sum(kl(b, a, s.mask) for a, b in zip(s.maps, t.maps, strict=True))
        return {"hidden": sum(F.mse_loss(*pair) for pair in zip(*normed, strict=True)), "attention": maps}

    student, teacher = term_step.make("bert", 0, 2, 32), term_step.make("bert", 1, 2, 32)
    terms = presets.mobilebert()["terms"]
    _, logs, _ = step(copy.deepcopy(student), copy.deepcopy(teacher), terms)
    with torch.no_grad():
        for name, value in formulas(Run("bert", student), Run("bert", teacher), None).items():
            assert logs[name] == pytest.approx(value.item(), rel=1e-4), name


def test_combinatorial_kd():
    def formulas(s, t, linears):
        found = 0
        for n, (i, group) in enumerate(((1, (1, 2)), (2, (3, 4)))):
            x = F.normalize(linears["combination"][n](s.hidden[i]), dim=-1)
            y = F.normalize(torch.cat([t.hidden[j] for j in group], -1), dim=-1)
            found = found + (x - y).square().sum(-1)[s.mask].mean()
        return {"combination": found / 2}

    compare("bert", presets.ckd()["terms"], formulas, batch=2, accumulation=4)


def test_rail_and_alp_have_terms_that_are_tested_above():
    assert presets.rail_kd()["terms"] == [
        HiddenTerm("random_sorted", distance="cosine", pool="mean", weight=2 / 3, name="layers")
    ]
    assert presets.alp_kd("regular")["terms"] == [LayerAttentionTerm("regular", weight=1 / 3)]


def test_reductions_of_other_kits():
    """TextBrewer 0.2.1 and DistillKit: the functions of hidden states, written by their formulas."""
    student, teacher = (Run("bert", model) for model in models(width=32))
    x, y, mask = student.hidden[2], teacher.hidden[4], student.mask
    terms = [
        HiddenTerm(name="hid_mse"),
        HiddenTerm(distance="cosine", name="cos"),
        HiddenTerm(normalize="l2", pool="first", name="pkd"),
    ]
    _, logs, _ = step(*models(width=32), terms)
    weights = mask.float()
    hid_mse = (F.mse_loss(x, y, reduction="none") * weights[..., None]).sum() / (weights.sum() * x.shape[-1])
    assert logs["hid_mse"] == pytest.approx(hid_mse.item(), rel=1e-5)
    cos = F.cosine_embedding_loss(x[mask], y[mask], torch.ones(int(mask.sum())))
    assert logs["cos"] == pytest.approx(cos.item(), rel=1e-5)
    first = [side[:, 0] / side[:, 0].norm(dim=1, keepdim=True) for side in (x, y)]
    summed = (first[0] - first[1]).pow(2).sum(-1).mean()  # TextBrewer's pkd_loss: the sum over columns
    assert logs["pkd"] * 32 == pytest.approx(summed.item(), rel=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (HiddenTerm(), "terms must be a list of terms, not HiddenTerm"),
        (["hidden"], "terms must hold terms of fusedkd.integrations.terms, not str"),
        ([HiddenTerm(), HiddenTerm()], "the name 'hidden' of a term is taken"),
        ([HiddenTerm(name="ce")], "the name 'ce' of a term is taken"),
        (
            [HiddenTerm()],
            "hidden state 2 of the student, 32 wide, with 4 of the teacher, 48 wide: pass projection=True",
        ),
        ([HiddenTerm([(3, 1)])], "name 3 of the student, which has 3 hidden states"),
        ([HiddenTerm("diagonal")], "must be pairs of layers or one of last, skip, uniform"),
        ([HiddenTerm("uniform_attention")], "must not be 'uniform_attention'"),
        ([AttentionTerm(layers=[(0, (1, 2))])], "must pair layer 0 with one layer of the teacher"),
        ([AttentionTerm(layers="uniform")], "must not be 'uniform', which has embeddings"),
        ([LayerAttentionTerm()], "needs hidden states of one width, but the student's are 32 wide"),
        ([LogitsTerm("dkd")], "needs labels, and its rows are those of kd_on='attended'"),
    ],
)
def test_terms_that_cannot_be_are_refused(terms, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(*models(), NONE, terms=terms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be"),
        ({"name": "a b"}, "name must be letters, digits and underscores"),
        ({"distance": "l1"}, "distance must be one of"),
        ({"shared": True}, "shared is True, but projection is False"),
        ({"pool": "max"}, "pool must be None, 'mean' or 'first'"),
        ({"projection": "yes"}, "projection must be True or False"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        HiddenTerm(**options)


def test_bad_options_of_attention_are_refused():
    for options, message in (({"kind": "l2"}, "kind must be"), ({"relations": "qk"}, "relations must be a tuple")):
        with pytest.raises(ValueError, match=message):
            AttentionTerm(**options)


def test_teachers_that_cannot_serve_are_refused():
    student, teacher = models()
    with pytest.raises(ValueError, match="teacher is None, but the term 'hidden', a HiddenTerm, compares more"):
        trainer(student, None, terms=[HiddenTerm(projection=True)])
    with pytest.raises(ValueError, match="teacher must be a single model, not a list: the term 'attention'"):
        trainer(student, [teacher], terms=[AttentionTerm()])
    trainer(student, [teacher], terms=[HiddenTerm(weight=0.0)])


def test_attentions_that_are_not_understood_are_refused():
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    from .distil_step import GEMMA, SIZE, VOCAB, initialised

    bloom = [BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)) for _ in range(2)]
    with pytest.raises(ValueError, match="BloomForCausalLM shows no queries and keys"):
        trainer(*bloom, terms=[AttentionTerm()])
    capped = [initialised(Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, **GEMMA))) for _ in range(2)]
    with pytest.raises(ValueError, match="layer 0 of Gemma2ForCausalLM has an attention that is not softmax"):
        trainer(*capped, terms=[AttentionTerm()])
    trainer(*capped, terms=[AttentionTerm(relations=("vv",))])
    options = {"sliding_window": 4, "num_key_value_heads": 2, **SIZE}
    sliding = [initialised(MistralForCausalLM(MistralConfig(vocab_size=VOCAB, **options)), i) for i in range(2)]
    with pytest.raises(ValueError, match="knows no sliding window, but the student has one of 4 tokens"):
        step(*sliding, [AttentionTerm()])


def test_batches_whose_maps_are_not_one_text_each_are_refused():
    student, teacher = models("llama")
    found = trainer(student, teacher, terms=[AttentionTerm()])
    batch = collated(list(rows()))
    packed = {k: v for k, v in batch.items() if k != "attention_mask"}
    packed["position_ids"] = torch.arange(LENGTH).remainder(6).expand(8, -1)
    with pytest.raises(ValueError, match="knows no packed documents"):
        found.compute_loss(student, packed)
    for p in student.parameters():
        p.requires_grad_(p is student.lm_head.weight)
    with pytest.raises(ValueError, match="the term 'attention' has no gradient: everything"):
        found.compute_loss(student, batch)
