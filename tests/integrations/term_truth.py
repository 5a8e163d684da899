"""The terms of DistillationTrainer by the plain formulas, from the outputs of the models themselves."""

import copy

import pytest
import torch

from .distil_step import LENGTH, rows, trainer
from .term_step import NONE, models, step
from .test_transformers import collated


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
