"""Terms of DistillationTrainer that cannot be."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fusedkd.integrations import refusals
from fusedkd.integrations.terms import AttentionTerm, HiddenTerm, LayerAttentionTerm, LogitsTerm

from .distil_step import LENGTH, rows, trainer
from .term_step import NONE, models, step
from .test_transformers import collated


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


def test_bad_options_of_attention_and_of_layers_are_refused():
    for options, message in (({"kind": "l2"}, "kind must be"), ({"relations": "qk"}, "relations must be a tuple")):
        with pytest.raises(ValueError, match=message):
            AttentionTerm(**options)
    with pytest.raises(ValueError, match="pool must be None, 'mean' or 'first'"):
        LayerAttentionTerm(pool="max")


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


def test_projections_go_with_fsdp2_alone():
    accelerator = SimpleNamespace(is_fsdp2=True)
    found = SimpleNamespace(projections={"hidden": []}, is_fsdp_enabled=True, accelerator=accelerator)
    refusals.projections(found)
    accelerator.is_fsdp2 = False
    with pytest.raises(ValueError, match="projection=True does not go with FSDP1: use FSDP2"):
        refusals.projections(found)
